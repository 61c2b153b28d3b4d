from __future__ import annotations

import importlib.metadata

import pytest
import torch

import autobatch
from autobatch import BatchPlan, Outcome
from autobatch.testing import PaperDevice, SimulatedAccelerator
from finding import OneGpu, accepted, perceptron, tuned
from networks import ResNet, Transformer, training

MIB, GIB = 2**20, 2**30


def test_the_largest_micro_batch_that_fits_is_found():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, memory_limit=1.0)

    assert report.plan == BatchPlan(112, 1, 1)
    assert report.largest_fit == 112
    assert report.budget == 1000


def test_a_report_is_made_where_only_the_sources_are_on_the_path(monkeypatch):
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    device = PaperDevice("1GiB", per_sample=2**20)

    report = autobatch.find(device.workload, device=device, plan=BatchPlan(4, 1), verbose=False)

    assert report.autobatch_version == "not installed"


def test_the_effective_batch_is_the_one_asked_for_with_a_verified_size():
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    report = autobatch.find(device.workload, device=device, target_batch_size=1024)

    assert report.plan.effective_batch_size == 1024
    assert report.plan.accumulate_grad_batches > 1
    assert report.plan.micro_batch_size in {t.batch_size for t in report.trials if t.fits}


def test_a_deviation_is_never_silent():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, target_batch_size=257)

    assert report.plan == BatchPlan(86, 3)  # 257 is a prime
    assert any("257" in note for note in report.notes)


@pytest.mark.parametrize(
    ("bounds", "largest"),
    [
        ({"max_micro_batch_size": 50}, 50),
        ({"dataset_size": 40}, 40),
        ({"target_batch_size": 64}, 64),
        ({"dataset_size": 40, "max_micro_batch_size": 30}, 30),
        ({"max_micro_batch_size": 3}, 3),
    ],
)
def test_a_bound_is_never_passed_and_is_itself_run(bounds, largest):
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, **bounds)

    assert max(device.sizes_run) == largest
    assert report.largest_fit == largest
    said = ("Largest fit not sought", "All 40 samples of an epoch fit at once")
    assert any(note.startswith(said) for note in report.notes)


def test_memory_of_other_processes_shrinks_the_budget():
    def budget(foreign):
        device = PaperDevice(1000, per_sample=1, foreign=foreign)
        return autobatch.find(device.workload, device=device).budget

    assert budget(0) == 900
    assert budget(300) == 600


def test_the_smallest_budget_so_far_holds():
    device = PaperDevice(1000, per_sample=10)

    def train(batch_size, accumulate):
        device.foreign = 400 if batch_size == 16 else 0  # another process comes, and goes again
        yield from device.workload(batch_size, accumulate)

    report = autobatch.find(train, device=device, memory_limit=1.0, search=autobatch.Bisection())

    assert report.budget == 600
    assert report.plan.micro_batch_size == 60


def test_other_gpu_processes_shrink_the_budget_and_the_batch(
    monkeypatch,
):
    def found(others):
        return autobatch.find(OneGpu(monkeypatch, others).train, device="cuda:0")

    alone, crowded = found(0), found(6 * GIB)

    assert alone.budget - crowded.budget == 6 * GIB
    assert alone.plan.micro_batch_size * 10 * MIB <= alone.budget
    assert 0.98 * crowded.budget <= crowded.plan.micro_batch_size * 10 * MIB <= crowded.budget
    assert alone.plan.micro_batch_size > 2 * crowded.plan.micro_batch_size


def test_a_known_plan_is_verified_by_one_trial(tmp_path):
    device = PaperDevice(1000, fixed=100, per_sample=8)
    first = autobatch.find(device.workload, device=device, target_batch_size=300)
    path = tmp_path / "report.json"
    path.write_text(first.to_json(), encoding="utf-8")

    for plan in (first.plan, path, str(path)):
        report = autobatch.find(device.workload, device=device, plan=plan)
        assert report.plan == first.plan
        assert len(report.trials) == 1


def test_a_known_plan_that_does_not_fit_raises():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    with pytest.raises(
        autobatch.DoesNotFitError, match=r"plan=.* does not fit: .* Leave plan out to search"
    ):
        autobatch.find(device.workload, device=device, plan=BatchPlan(500))


def test_no_trial_is_started_that_would_overrun_the_time_limit():
    device = PaperDevice(10**6, per_sample=10, seconds_per_sample=1.0, seconds_per_step=0)

    report = autobatch.find(device.workload, device=device, time_limit=100)

    assert device.clock() <= 100
    assert report.plan.micro_batch_size == report.largest_fit
    assert any("time_limit=100" in note for note in report.notes)


def test_size_one_is_not_a_memory_problem_for_a_batchnorm():
    """Looking down for a second reading, the search meets a size the model itself refuses."""
    model, optimizer = perceptron()

    report = autobatch.find(
        training(model, optimizer),
        device=SimulatedAccelerator("4MiB"),
        target_batch_size=3,
        plan=None,
    )
    assert report.plan == BatchPlan(3)

    class LookingDown:
        def propose(self, trials, *, start, high, budget):
            return next(
                (size for size in (4, 1, 8) if size not in {t.batch_size for t in trials}),
                None,
            )

    report = autobatch.find(
        training(model, optimizer),
        device=SimulatedAccelerator("4MiB"),
        search=LookingDown(),
    )

    assert [trial.outcome for trial in report.trials] == [
        Outcome.FIT,
        Outcome.REFUSED,
        Outcome.FIT,
    ]
    assert report.plan.micro_batch_size == 8


def test_a_slow_confirming_trial_does_not_win():
    """Between two fast sizes one is slow: it looked fast, was run, and is not taken."""
    seconds = {100: 0.1, 50: 5.0}
    device = PaperDevice(10_000, per_sample=1, fixed=0, seconds_per_step=0, seconds_per_sample=0)

    def train(batch_size, accumulate):
        for _ in device.workload(batch_size, accumulate):
            device._now += accumulate * seconds.get(batch_size, 0.002 * batch_size)
            yield

    report = autobatch.find(train, device=device, target_batch_size=100)

    assert report.plan == BatchPlan(100, 1)


def test_time_is_reserved_for_trials_that_confirm_the_plan():
    device = PaperDevice(100, per_sample=1, seconds_per_sample=0.01, seconds_per_step=0)

    report = autobatch.find(
        device.workload,
        device=device,
        target_batch_size=720,
        memory_limit=1.0,
        time_limit=20,
    )

    assert device.clock() <= 20
    assert report.plan.effective_batch_size == 720


@pytest.mark.curve
def test_the_curve_takes_no_time_from_confirming_trials():
    device = PaperDevice(100, per_sample=1, seconds_per_sample=0.01, seconds_per_step=0)

    report = autobatch.find(device.workload, device=device, target_batch_size=770, time_limit=12)

    assert report.search_seconds > 12 >= report.search_seconds - report.timing_seconds
    assert "search 5.76 s, timing " in report.text()
    assert report.plan.effective_batch_size == 770


def test_a_loader_that_ends_early_bounds_the_search():
    data = torch.randn(100, 16)
    model, optimizer = perceptron()

    def train(batch_size):
        for x in torch.utils.data.DataLoader(data, batch_size, drop_last=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, device=SimulatedAccelerator("8MiB"))

    assert 16 <= report.plan.micro_batch_size <= 100


def test_a_budget_that_vanishes_while_a_plan_is_confirmed_raises():
    device = PaperDevice(1000, per_sample=10)

    def train(batch_size, accumulate):
        if device.sizes_run:
            device.foreign = 995
        yield from device.workload(batch_size, accumulate)

    with pytest.raises(autobatch.DoesNotFitError, match="No batch size fits"):
        autobatch.find(train, device=device, target_batch_size=60)


def test_a_plan_is_verified_with_the_accumulation_of_training():
    asked = []

    def train(batch_size, accumulate):
        while True:
            asked.append((min(batch_size, 100), accumulate))
            yield min(batch_size, 100)

    report = autobatch.find(train, device=PaperDevice(10), target_batch_size=200)

    assert report.plan == BatchPlan(100, 2)
    assert (100, 2) in asked


def test_a_huge_target_is_reached():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, target_batch_size=10**12)

    assert report.plan.effective_batch_size == pytest.approx(10**12, rel=1e-6)


def test_ranks_share_the_effective_batch():
    def plan(target, world_size):
        device = PaperDevice(1000, per_sample=10)
        return tuned(device, world_size=world_size, target_batch_size=target).plan

    assert plan(1000, 4) == BatchPlan(50, 5, 4)
    assert plan(256, 4) == BatchPlan(64, 1, 4)
    assert plan(256, 3).effective_batch_size == 255


def test_the_host_is_tuned_without_an_accelerator():
    model, optimizer = perceptron()

    report = autobatch.find(training(model, optimizer), max_micro_batch_size=64)

    assert report.device.name
    assert report.plan.micro_batch_size == 64
    assert 0 < report.budget < report.device.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "capacity"),
    [
        (Transformer, "200MiB"),
        (Transformer, "260MiB"),
        (ResNet, "100MiB"),
        (ResNet, "140MiB"),
    ],
)
def test_the_size_found_is_the_largest_that_the_accelerator_accepts(network, capacity):
    torch.manual_seed(0)
    model = network()
    workload = training(model, torch.optim.AdamW(model.parameters()))
    device = SimulatedAccelerator(capacity)

    report = autobatch.find(workload, device=device, memory_limit=1.0)
    found = report.plan.micro_batch_size
    assert 30 <= found <= 1000
    assert accepted(workload, found, device)
    assert not accepted(workload, int(found / 0.99) + 1, device)
    assert all(trial.fits for trial in report.trials)
