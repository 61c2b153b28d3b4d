from __future__ import annotations

import contextlib
import functools
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import autobatch
from autobatch import BatchPlan, Outcome
from autobatch._memory import memory_budget
from autobatch._report.tradeoff import LearningRateRule
from autobatch._settings import Settings
from autobatch._subject import Subject
from autobatch._trials import run_trial
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch._trials.workload import Bench
from autobatch._tune import tune
from autobatch.sinks import progress
from autobatch.testing import PaperDevice, SimulatedAccelerator
from networks import Perceptron, ResNet, Transformer, training
from nvml_standin import Card, FakeGpu

MIB, GIB = 2**20, 2**30


def perceptron():
    torch.manual_seed(0)
    model = Perceptron()
    return model, torch.optim.AdamW(model.parameters())


def state_of(model, optimizer):
    return [
        *(value.clone() for value in model.state_dict().values()),
        model.noise.get_state(),
        torch.get_rng_state(),
        torch.tensor(model.training),
        torch.tensor(len(model.sizes)),
        torch.tensor(len(optimizer.state)),
        torch.tensor([parameter.grad is None for parameter in model.parameters()]),
    ]


def unchanged(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def accepted(workload, size, device):
    """Whether this size runs on this very device, within what it has."""
    budget = memory_budget(device.read(), 1.0)
    with OptimizerWatch(device.clock) as optimizers:
        bench = Bench(device, lambda: budget, optimizers, contextlib.nullcontext)
        return run_trial(workload, size, accumulate=1, steps=2, bench=bench).fits


# What is found


def test_the_largest_micro_batch_that_fits_is_found():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, memory_limit=1.0)

    assert report.plan == BatchPlan(112, 1, 1)
    assert report.largest_fit == 112
    assert report.budget == 1000


def test_only_verified_sizes_are_returned():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, target_batch_size=1000)

    assert report.plan.micro_batch_size in {
        trial.batch_size for trial in report.trials if trial.fits
    }


def test_the_effective_batch_is_the_one_asked_for():
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    report = autobatch.find(device.workload, device=device, target_batch_size=1024)

    assert report.plan.effective_batch_size == 1024
    assert report.plan.accumulate_grad_batches > 1


def test_a_deviation_is_never_silent():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, target_batch_size=257)

    assert report.plan.effective_batch_size != 257
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


def test_what_others_hold_is_not_ours():
    def budget(foreign):
        device = PaperDevice(1000, per_sample=1, foreign=foreign)
        return autobatch.find(device.workload, device=device).budget

    assert budget(0) == 900
    assert budget(300) == 600


def test_the_smallest_budget_seen_is_the_one_that_holds():
    device = PaperDevice(1000, per_sample=10)

    def train(batch_size, accumulate):
        device.foreign = 400 if batch_size == 16 else 0  # another process comes, and goes again
        yield from device.workload(batch_size, accumulate)

    report = autobatch.find(train, device=device, memory_limit=1.0, search=autobatch.Bisection())

    assert report.budget == 600
    assert report.plan.micro_batch_size == 60


class OneGpu:
    """A stand-in for one GPU of 10 GiB, where a training step holds so much of it per sample."""

    def __init__(self, monkeypatch, others=0):
        card = Card("4b2f8c1e-0000-0000-0000-000000000000", total=10 * GIB, others=others)
        self.gpu = FakeGpu(cards=(card,)).install(monkeypatch)

    def train(self, batch_size):
        while True:
            with self.gpu.holding(0, batch_size * 10 * MIB):
                pass
            yield


def test_others_on_the_gpu_as_nvml_sees_them_shrink_the_budget_and_the_batch(
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


def test_a_known_plan_that_does_not_fit_any_more_is_an_error():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    with pytest.raises(autobatch.DoesNotFitError, match="does not fit any more"):
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


# What a workload may be


def test_a_function_that_runs_one_step_will_do():
    steps = []
    report = autobatch.find(steps.append, device=PaperDevice(10), max_micro_batch_size=16)

    assert report.plan.micro_batch_size == 16
    assert set(steps) >= {8, 16}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        functools.partial,
        lambda f: type("Loop", (), {"__call__": lambda self, batch_size: f(batch_size)})(),
        lambda f: type("Loop", (), {"train": lambda self, batch_size: f(batch_size)})().train,
    ],
    ids=["function", "partial", "callable object", "method"],
)
def test_a_workload_may_be_any_callable(wrap):
    def train(batch_size):
        while True:
            yield

    report = autobatch.find(wrap(train), device=PaperDevice(10), max_micro_batch_size=16)

    assert report.plan.micro_batch_size == 16


def test_a_workload_may_be_defined_before_what_it_uses():
    def outer():
        def train(batch_size):
            while True:
                if batch_size < 0:
                    late()
                yield

        report = autobatch.find(train, device=PaperDevice(10), max_micro_batch_size=16)

        def late():
            pass

        return report

    assert outer().plan.micro_batch_size == 16


def test_a_workload_that_can_not_fill_a_size_sets_the_bound():
    def train(batch_size):
        while True:
            yield min(batch_size, 100)

    report = autobatch.find(train, device=PaperDevice(10))

    assert report.plan.micro_batch_size == 100
    assert any("100" in note or "never ran more" in note for note in report.notes)


def test_accumulation_is_tried_where_the_plan_will_need_it():
    asked = []

    def train(batch_size, accumulate):
        asked.append((batch_size, accumulate))
        while True:
            yield

    autobatch.find(train, device=PaperDevice(10), target_batch_size=32)

    assert dict(asked) == {8: 2, 32: 1}


def test_the_log_holds_a_line_per_trial_and_the_report(caplog):
    device = PaperDevice(1000, fixed=100, per_sample=8)

    with caplog.at_level("INFO", logger="autobatch"):
        report = autobatch.find(device.workload, device=device)

    *lines, last = [record.getMessage() for record in caplog.records if record.name == "autobatch"]
    assert len(lines) == len(report.trials)
    assert all(line.startswith("batch_size=") for line in lines)
    assert str(report) in last


# Nothing is left behind


def test_modules_optimizers_and_random_state_are_given_back():
    model, optimizer = perceptron()
    before, numbers, words = (
        state_of(model, optimizer),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )

    report = autobatch.find(training(model, optimizer), device=SimulatedAccelerator("1MiB"))

    assert any(not trial.fits for trial in report.trials) or len(report.trials) > 2
    assert unchanged(before, state_of(model, optimizer))
    assert numbers == np.random.get_state()[1].tolist()
    assert words == random.getstate()


def test_training_after_tuning_is_what_it_would_have_been():
    def losses(tuned):
        model, optimizer = perceptron()
        if tuned:
            autobatch.find(training(model, optimizer), device=SimulatedAccelerator("1MiB"))
        steps = training(model, optimizer)(16, 2)
        for _ in range(5):
            next(steps)
        return state_of(model, optimizer)

    assert unchanged(losses(tuned=True), losses(tuned=False))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 3, 9, 14])
def test_an_error_passes_as_it_is_and_everything_is_given_back(error, at):
    model, optimizer = perceptron()
    before, count = state_of(model, optimizer), itertools.count(1)

    def train(batch_size, accumulate):
        for _ in training(model, optimizer)(batch_size, accumulate):
            if next(count) == at:
                raise error("mine")
            yield

    with pytest.raises(error, match="mine") as caught:
        autobatch.find(train, device=SimulatedAccelerator("1MiB"))

    assert unchanged(before, state_of(model, optimizer))
    assert "batch_size=" in caught.value.__notes__[0]


def test_what_a_partial_holds_is_given_back():
    model, optimizer = perceptron()
    model.eval()

    def train(model, optimizer, batch_size):
        model.train()  # before its first forward
        yield from training(model, optimizer)(batch_size, 1)

    autobatch.find(
        functools.partial(train, model, optimizer),
        device=SimulatedAccelerator("1MiB"),
        max_micro_batch_size=16,
    )

    assert not model.training


def test_what_restore_names_is_given_back():
    model, optimizer = perceptron()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    generator, tensor = torch.Generator().manual_seed(1), torch.zeros(3)
    drawn = generator.get_state()

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            scheduler.step()
            torch.rand(1, generator=generator)
            tensor.add_(1)
            yield

    autobatch.find(
        train,
        device=SimulatedAccelerator("1MiB"),
        restore=[model, scheduler, generator, tensor],
    )

    assert scheduler.last_epoch == 0
    assert torch.equal(generator.get_state(), drawn)
    assert tensor.tolist() == [0, 0, 0]


def test_the_cap_of_the_allocator_is_the_users_own_again(monkeypatch):
    OneGpu(monkeypatch)
    torch.cuda.set_per_process_memory_fraction(0.7, 0)
    seen = []

    def train(batch_size):
        seen.append(torch.cuda.get_per_process_memory_fraction(0))
        yield
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        autobatch.find(train, device="cuda:0", memory_limit=0.5)

    assert seen[0] < 0.7
    assert torch.cuda.get_per_process_memory_fraction(0) == 0.7


def test_memory_that_runs_out_anywhere_in_a_trial_is_survived():
    """Refuse each allocation of the first trial in turn: state comes back, nothing is left over, an answer is verified."""
    model, optimizer = perceptron()
    workload = training(model, optimizer)
    probe = SimulatedAccelerator("1MiB")
    assert accepted(workload, 8, probe)
    model, optimizer = perceptron()
    before = state_of(model, optimizer)

    for allocation in range(1, probe.ledger.allocations, 7):
        device = SimulatedAccelerator("1MiB")
        device.attach(model, optimizer)
        at_rest = device.read().reserved
        device.ledger.refuse_at = allocation

        report = autobatch.find(
            training(model, optimizer),
            device=device,
            steps_per_trial=2,
            max_micro_batch_size=16,
        )

        assert report.trials[0].outcome is Outcome.OUT_OF_MEMORY
        assert report.plan.micro_batch_size in {t.batch_size for t in report.trials if t.fits}
        assert unchanged(before, state_of(model, optimizer))
        device.attach(model)  # `seen` is bound anew at each restore
        assert device.read().reserved == at_rest


def test_what_can_not_accumulate_is_shown_no_accumulation():
    report = autobatch.find(
        lambda batch_size: None, device=PaperDevice(10), max_micro_batch_size=16
    )

    assert {row.accumulate_grad_batches for row in report.effective} == {1}
    assert autobatch.TuningReport.from_json(report.to_json()) == report


def test_what_first_steps_late_is_given_back_too():
    torch.manual_seed(0)
    one, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = {id(net): torch.optim.AdamW(net.parameters()) for net in (one, other)}
    nets = {"one": one, "other": other}  # out of sight of the workload's own variables
    before = [parameter.clone() for net in nets.values() for parameter in net.parameters()]

    def train(batch_size):
        for step in itertools.count():
            net = nets["other"] if step % 2 else nets["one"]
            net(torch.randn(batch_size, 4)).square().mean().backward()
            optimizers[id(net)].step()
            optimizers[id(net)].zero_grad()
            yield

    autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)

    after = [parameter for net in nets.values() for parameter in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(optimizer.state for optimizer in optimizers.values())


def test_parameters_outside_of_any_module_train_as_if_nothing_had_been():
    def trained(tuned):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(16))
        optimizer = torch.optim.AdamW([weight], lr=0.1)

        def train(batch_size):
            while True:
                (torch.randn(batch_size, 16) @ weight).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                yield

        if tuned:
            autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)
        steps = train(8)
        for _ in range(3):
            next(steps)
        return weight

    assert torch.equal(trained(tuned=True), trained(tuned=False))


def test_every_trial_starts_from_the_same_state():
    """A scheduler that is made for twenty steps would otherwise be stepped past its end by the search."""
    model, optimizer = perceptron()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            scheduler.step()
            yield

    report = autobatch.find(
        train,
        device=SimulatedAccelerator("1MiB"),
        restore=[scheduler],
        search=autobatch.Bisection(),
    )

    assert len(report.trials) * 6 > 20
    assert scheduler.last_epoch == 0


def test_a_confirming_trial_that_is_slow_does_not_win():
    """Between two fast sizes one is slow: it looked fast, was run, and is not taken."""
    seconds = {100: 0.1, 50: 5.0}
    device = PaperDevice(10_000, per_sample=1, fixed=0, seconds_per_step=0, seconds_per_sample=0)

    def train(batch_size, accumulate):
        for _ in device.workload(batch_size, accumulate):
            device._now += accumulate * seconds.get(batch_size, 0.002 * batch_size)
            yield

    report = autobatch.find(train, device=device, target_batch_size=100)

    assert report.plan == BatchPlan(100, 1)


def test_time_is_kept_for_the_trials_that_confirm_the_plan():
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
def test_timing_sizes_takes_no_time_from_the_trials_that_confirm_the_plan():
    device = PaperDevice(100, per_sample=1, seconds_per_sample=0.01, seconds_per_step=0)

    report = autobatch.find(device.workload, device=device, target_batch_size=770, time_limit=12)

    assert report.search_seconds > 12
    assert report.plan.effective_batch_size == 770


def test_a_loader_that_runs_dry_sets_the_bound():
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


def test_a_budget_that_shrinks_to_nothing_while_a_plan_is_confirmed_is_told():
    device = PaperDevice(1000, per_sample=10)

    def train(batch_size, accumulate):
        if device.sizes_run:
            device.foreign = 995
        yield from device.workload(batch_size, accumulate)

    with pytest.raises(autobatch.DoesNotFitError, match="No batch size fits"):
        autobatch.find(train, device=device, target_batch_size=60)


def test_a_plan_is_verified_in_the_pattern_that_training_will_use():
    asked = []

    def train(batch_size, accumulate):
        while True:
            asked.append((min(batch_size, 100), accumulate))
            yield min(batch_size, 100)

    report = autobatch.find(train, device=PaperDevice(10), target_batch_size=200)

    assert report.plan == BatchPlan(100, 2)
    assert (100, 2) in asked


def test_a_huge_target_is_no_problem():
    device = PaperDevice(1000, fixed=100, per_sample=8)

    report = autobatch.find(device.workload, device=device, target_batch_size=10**12)

    assert report.plan.effective_batch_size == pytest.approx(10**12, rel=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target_batch_size": 0}, "target_batch_size=0"),
        ({"target_batch_size": -3}, "target_batch_size=-3"),
        ({"target_batch_size": True}, "target_batch_size=True"),
        ({"target_batch_size": 2.5}, "target_batch_size=2.5"),
        ({"target_batch_size": "64"}, "target_batch_size='64'"),
        ({"max_micro_batch_size": 0}, "max_micro_batch_size=0"),
        ({"steps_per_trial": 0}, "steps_per_trial=0"),
        ({"steps_per_trial": 1.5}, "steps_per_trial=1.5"),
        ({"time_limit": 0}, "time_limit=0"),
        ({"time_limit": "soon"}, "time_limit='soon'"),
        ({"dataset_size": -1}, "dataset_size=-1"),
        ({"memory_limit": 0}, "memory_limit=0"),
        ({"memory_limit": 1.5}, "memory_limit=1.5"),
        ({"memory_limit": 1}, "memory_limit=1 .*1.0"),
        ({"memory_limit": "lots"}, "memory_limit='lots'"),
        ({"device": "tpu:9"}, "device='tpu:9'"),
        ({"device": "cuda:7"}, "device='cuda:7'"),
        ({"device": SimulatedAccelerator}, "device="),
        ({"plan": "no/such/report.json"}, "no/such/report.json"),
        ({"plan": 32}, "plan=32"),
        ({"plan": BatchPlan(0)}, "plan="),
        ({"plan": BatchPlan(8, 1, 2)}, "2 ranks"),
        ({"plan": BatchPlan(8), "target_batch_size": 64}, "target_batch_size=64"),
        ({"plan": BatchPlan(64), "max_micro_batch_size": 8}, "max_micro_batch_size=8"),
        ({"search": autobatch.Bisection}, "search="),
        ({"search": "bisection"}, "search='bisection'"),
        ({"restore": nn.Linear(1, 1)}, "restore=Linear"),
        ({"restore": ["a name"]}, "restore holds a str"),
    ],
    ids=str,
)
def test_a_bad_argument_gets_one_sentence_and_nothing_runs(arguments, sentence):
    started = []

    with pytest.raises(ValueError, match=sentence) as caught:
        autobatch.find(
            started.append,
            **{"device": PaperDevice(10), **arguments},
        )

    assert "\n" not in str(caught.value)
    assert not started


async def asynchronous(batch_size):
    pass


@pytest.mark.parametrize(
    "workload",
    [
        None,
        3,
        lambda: None,
        lambda a, b, c: None,
        nn.Linear(1, 1),
        asynchronous,
        functools.partial(asynchronous),
    ],
)
def test_a_workload_that_can_not_be_called_with_a_batch_size_is_refused(workload):
    with pytest.raises(ValueError, match="workload="):
        autobatch.find(workload, device=PaperDevice(10))


def test_a_plan_that_a_workload_can_not_follow_is_refused_with_everything_restored():
    model, optimizer = perceptron()
    before = state_of(model, optimizer)

    def train(batch_size):
        yield from training(model, optimizer)(batch_size, 1)

    with pytest.raises(ValueError, match=r"def train\(batch_size, accumulate\)"):
        autobatch.find(train, device=SimulatedAccelerator("256KiB"), target_batch_size=4096)

    assert unchanged(before, state_of(model, optimizer))


def test_a_workload_that_ignores_its_batch_size_is_told_so():
    model, optimizer = perceptron()

    with pytest.raises(ValueError, match="very same memory at batch_size="):
        autobatch.find(
            lambda batch_size: training(model, optimizer)(32, 1),
            device=SimulatedAccelerator("8MiB"),
        )


def test_a_workload_that_does_nothing_is_told_so():
    with pytest.raises(ValueError, match="allocated no memory at all"):
        autobatch.find(lambda batch_size: None, device=SimulatedAccelerator("1MiB"))


def test_a_number_that_is_no_count_of_samples_is_told():
    def train(batch_size):
        yield from itertools.count(1)

    with pytest.raises(ValueError, match="yielded 1, 2, 3"):
        autobatch.find(train, device=PaperDevice(10))


def test_numbers_of_numpy_count_too():
    def train(batch_size):
        while True:
            yield np.int64(32)

    with pytest.raises(ValueError, match="yielded 32 at"):
        autobatch.find(train, device=PaperDevice(10))


def test_a_size_too_small_for_the_model_does_not_hide_that_nothing_fits():
    model, optimizer = perceptron()

    with pytest.raises(
        autobatch.DoesNotFitError,
        match=r"batch_size=1 was refused .*Expected more than 1 value",
    ):
        autobatch.find(training(model, optimizer), device=SimulatedAccelerator("50KiB"))


def test_a_workload_that_yields_nothing_is_an_error():
    def train(batch_size):
        yield from ()

    with pytest.raises(autobatch.ShortTrialError, match="batch_size=8"):
        autobatch.find(train, device=PaperDevice(10))


def test_when_nothing_fits_the_error_says_what_was_tried():
    device = PaperDevice(100, fixed=200)

    with pytest.raises(
        autobatch.DoesNotFitError, match=r"No batch size fits .*batch_size=1 ran out"
    ):
        autobatch.find(device.workload, device=device)


def test_a_device_that_is_full_already_is_refused_before_anything_runs():
    device = PaperDevice(1000, foreign=950)

    with pytest.raises(
        autobatch.DoesNotFitError, match=r"memory_limit=0\.9 leaves a budget of 0 B"
    ):
        autobatch.find(device.workload, device=device)

    assert not device.sizes_run


def test_a_target_below_one_sample_per_rank_is_refused():
    device = PaperDevice(1000)

    with pytest.raises(ValueError, match=r"target_batch_size=2 .* 4 ranks"):
        tuned(device, world_size=4, target_batch_size=2)

    assert not device.sizes_run


def test_ranks_share_the_effective_batch():
    report = tuned(PaperDevice(1000, per_sample=10), world_size=4, target_batch_size=1000)

    assert report.plan == BatchPlan(50, 5, 4)
    assert report.plan.effective_batch_size == 1000


class Alike:
    """Ranks that all see what this one sees."""

    rank = 0

    def __init__(self, world_size):
        self.world_size = world_size

    def gather(self, value):
        return [value] * self.world_size

    def abort_together(self):
        return contextlib.nullcontext()


def tuned(device, *, world_size, **settings):
    """What a door does for several ranks."""
    asked = dict.fromkeys(Settings.model_fields) | {
        "memory_limit": 0.9,
        "steps_per_trial": 2,
        "percentile": None,
    }
    job = Subject(
        workload=device.workload,
        can_accumulate=True,
        start=8,
        accumulate=1,
        before=None,
        samples_trained=None,
        update_at_most=None,
        last_samples=None,
        doubts=None,
        remarks=None,
        task="train",
        subject="paper",
        environment={},
        look=None,
        curve_seconds=0.0,
        learning_rate=None,
    )
    with (
        Snapshot() as snapshot,
        OptimizerWatch(device.clock) as optimizers,
        progress() as shown,
    ):
        return tune(
            job,
            Settings.checked(**asked | settings),
            known=None,
            probe=device,
            search=autobatch.GuidedBisection(),
            snapshot=snapshot,
            optimizers=optimizers,
            first_touch=contextlib.nullcontext,
            shown=shown,
            ranks=Alike(world_size),
        )


def test_a_model_that_is_elsewhere_than_the_memory_that_is_watched_is_told(monkeypatch):
    OneGpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def train(batch_size):
        nn.Linear(2, 2)(torch.zeros(batch_size, 2))

    with pytest.raises(ValueError, match='device="cpu"'):
        autobatch.find(train)


def test_a_compiled_model_is_captured_eager_and_timed_compiled():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    before = [parameter.clone() for parameter in model.parameters()]

    def train(batch_size):
        while True:
            compiled(torch.randn(batch_size, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)

    assert report.plan.micro_batch_size == 32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# On the host, and on real networks


def test_the_host_will_do_where_there_is_no_accelerator():
    model, optimizer = perceptron()

    report = autobatch.find(training(model, optimizer), max_micro_batch_size=64)

    assert report.device.name
    assert report.plan.micro_batch_size == 64
    assert 0 < report.budget < report.device.total


def brute_force(workload, device, high):
    good, bad = 0, high
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if accepted(workload, middle, device) else (good, middle)
    return good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "capacity"),
    [
        (Transformer, "200MiB"),
        (Transformer, "260MiB"),
        (Transformer, "400MiB"),
        (ResNet, "100MiB"),
        (ResNet, "140MiB"),
        (ResNet, "240MiB"),
    ],
)
def test_the_size_found_is_the_largest_that_the_accelerator_accepts(network, capacity, capsys):
    torch.manual_seed(0)
    model = network()
    workload = training(model, torch.optim.AdamW(model.parameters()))
    device = SimulatedAccelerator(capacity)

    report = autobatch.find(workload, device=device, memory_limit=1.0)
    found = report.plan.micro_batch_size
    true = brute_force(workload, device, 2 * found)

    with capsys.disabled():
        print(
            f"\n{network.__name__} in {capacity}: found {found}, true {true}, {len(report.trials)} trials"
        )
    assert 30 <= true <= 1000
    assert 0.99 * true <= found <= true
    assert all(trial.fits for trial in report.trials)


# What is told


def test_find_sees_the_optimizers_that_step():
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                layer(torch.randn(batch_size, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, target_batch_size=8, device=SimulatedAccelerator("1MiB"))

    assert report.learning_rate == LearningRateRule("SGD", "linear")


def test_find_tells_of_batch_norm_where_it_accumulates():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                net(torch.randn(batch_size, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def told(plan):
        report = autobatch.find(train, plan=plan, device=SimulatedAccelerator("1MiB"))
        return [note for note in report.notes if "BatchNorm" in note]

    assert told(BatchPlan(64, 1)) == []
    (note,) = told(BatchPlan(8, 8))
    assert note.startswith("1 BatchNorm layer uses the statistics of 8 samples, not 64")


def loop(model, optimizer, *, step, after):
    """A training loop with a say in when its optimizer steps, and when it yields."""

    def train(batch_size, accumulate):
        for i in itertools.count(1):
            (model.loss(batch_size) / accumulate).backward()
            if step(i, accumulate):
                optimizer.step()
            if after(i, accumulate):
                optimizer.zero_grad()
                yield

    return train


def each(i, accumulate):
    return True


def last(i, accumulate):
    return i % accumulate == 0


def never(i, accumulate):
    return False


def remarks_about(train, **options):
    report = autobatch.find(
        train, device=SimulatedAccelerator("100MiB"), memory_limit=1.0, **options
    )
    about = ("Trials computed gradients", "Asked to accumulate")
    return [note for note in report.notes if note.startswith(about)]


@pytest.mark.parametrize("plan", [BatchPlan(8), BatchPlan(8, 4)])
def test_a_loop_whose_optimizer_never_steps_is_told_so(plan):
    model, optimizer = perceptron()

    (note,) = remarks_about(loop(model, optimizer, step=never, after=last), plan=plan)

    assert "no torch.optim optimizer stepped in them" in note
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("after", [each, last])
def test_a_loop_that_steps_after_every_micro_batch_of_an_update_is_told_so(after):
    train = loop(*perceptron(), step=each, after=after)

    (note,) = remarks_about(train, plan=BatchPlan(8, 4))

    assert "8 samples instead of 32, and an epoch 4 times as many updates" in note
    assert remarks_about(train, plan=BatchPlan(8)) == []


def test_nothing_is_said_of_a_loop_that_steps_once_per_update():
    train = loop(*perceptron(), step=last, after=last)

    assert remarks_about(train, plan=BatchPlan(8, 4)) == []


def test_an_update_that_the_end_of_the_data_cuts_short_is_no_sign_of_that():
    data = torch.randn(40, 16)
    model, optimizer = perceptron()

    def train(batch_size, accumulate):
        batches = data.split(batch_size)
        for i, x in enumerate(batches, 1):
            model(x).square().mean().backward()
            if i % accumulate == 0 or i == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                yield len(x) if len(batches) == 1 else None

    assert remarks_about(train, target_batch_size=80) == []


def test_an_optimizer_that_steps_more_often_than_another_is_no_matter():
    model, optimizer = perceptron()
    critic = torch.nn.Linear(4, 1)
    often = torch.optim.SGD(critic.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                critic(torch.randn(batch_size, 4)).mean().backward()
                often.step()
                model.loss(batch_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    assert remarks_about(train, plan=BatchPlan(8, 4)) == []


def test_a_loop_that_computes_no_gradient_owes_no_step():
    model, _ = perceptron()

    def forward(batch_size):
        model.loss(batch_size)

    def answer(batch_size):
        with torch.inference_mode():
            model.loss(batch_size)

    assert remarks_about(forward, plan=BatchPlan(8)) == []
    assert remarks_about(answer, latency_limit=10.0, max_micro_batch_size=2) == []


def test_a_model_made_by_the_loop_itself_is_seen_too():
    def train(batch_size, accumulate):
        model, optimizer = perceptron()
        yield from loop(model, optimizer, step=never, after=last)(batch_size, accumulate)

    (note,) = remarks_about(train, plan=BatchPlan(8, 4))

    assert note.startswith("Trials computed gradients")
