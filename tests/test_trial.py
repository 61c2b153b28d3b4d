from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

import autobatch
from autobatch import Outcome, Trial
from autobatch.errors import DoesNotFitError, ShortTrialError
from autobatch.testing import PaperDevice, SimulatedAccelerator
from finding import perceptron, state_of, unchanged
from networks import training
from nvml_standin import GIB, FakeGpu


class Once:
    """A search that proposes one size, and keeps its trial."""

    def __init__(self, size):
        self.size = size
        self.trial = None

    def propose(self, trials, *, start, high, budget):
        if not trials:
            return self.size
        self.trial = trials[0]
        return None


def attempt(workload, size, device, *, memory_limit=1.0, **options):
    """Return the trial of one size, which need not fit."""
    once = Once(size)
    with contextlib.suppress(DoesNotFitError):
        autobatch.find(
            workload,
            device=device,
            search=once,
            memory_limit=memory_limit,
            verbose=False,
            **options,
        )
    return once.trial


def test_a_size_that_ran_and_stayed_in_the_budget_fits():
    device = PaperDevice(1000, fixed=100, per_sample=10)

    trial = attempt(device.workload, 8, device, memory_limit=180)

    assert trial.outcome is Outcome.FIT
    assert trial.peak == 180
    assert trial.step_seconds == pytest.approx(1e-3 + 8e-5)
    assert trial.samples_per_second == pytest.approx(8 / (1e-3 + 8e-5))


def test_an_allocation_past_the_budget_is_out_of_memory():
    device = PaperDevice(1000, fixed=100, per_sample=10)

    trial = attempt(device.workload, 9, device, memory_limit=180)

    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert trial.peak is None
    assert trial.step_seconds is None


def test_a_budget_that_shrank_meanwhile_decides():
    device = PaperDevice(1000, fixed=100, per_sample=10, foreign=800)

    def train(batch_size, accumulate):
        for _ in device.workload(batch_size, accumulate):
            device.foreign = 850
            yield

    trial = attempt(train, 8, device)

    assert trial.outcome is Outcome.OVER_BUDGET
    assert trial.peak == 180


def test_accumulation_is_timed_per_micro_batch():
    device = PaperDevice(1000, per_sample=1)

    trial = attempt(device.workload, 8, device, target_batch_size=16)

    assert trial.accumulate == 2
    assert trial.step_seconds == pytest.approx(1e-3 + 8e-5)


def test_state_that_appears_after_the_first_step_is_in_the_peak():
    device = PaperDevice(1000, fixed=100, per_sample=10, state=300)

    assert attempt(device.workload, 8, device).peak == 480


def test_a_workload_that_ends_is_restarted():
    started = []

    def train(batch_size, accumulate):
        started.append(batch_size)
        yield

    trial = attempt(train, 4, PaperDevice(10), steps_per_trial=3)

    assert trial.fits
    assert len(started) >= 3


@pytest.mark.parametrize("steps", [0, 1])
def test_a_workload_that_does_not_yield_when_it_starts_again_is_an_error(steps):
    left = iter(range(steps))

    def train(batch_size, accumulate):
        for _ in itertools.islice(left, 1):
            yield

    match = f"ended after {steps} optimizer steps at batch_size=4, and did not yield"
    with pytest.raises(ShortTrialError, match=match):
        attempt(train, 4, PaperDevice(10))


def test_swallowed_out_of_memory_is_not_a_fit():
    def train(batch_size, accumulate):
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                torch.zeros(batch_size)
            yield

    trial = attempt(train, 1000, SimulatedAccelerator("1KiB"))

    assert trial.outcome is Outcome.OUT_OF_MEMORY


def making_room(gpu, steps):
    """Steps of 1 GiB, of which some have the allocator empty its cache."""

    def train(batch_size, accumulate):
        for step in itertools.count():
            gpu.cards[0].retries += step in steps
            with gpu.holding(0, GIB):
                yield

    return train


@pytest.mark.parametrize(
    ("steps", "outcome"),
    [
        ({0}, Outcome.FIT),
        ({2}, Outcome.OUT_OF_MEMORY),
        ({0, 1, 2}, Outcome.OUT_OF_MEMORY),
    ],
)
def test_the_allocator_may_retry_in_the_first_step_only(monkeypatch, steps, outcome):
    gpu = FakeGpu().install(monkeypatch)

    trial = attempt(making_room(gpu, steps), 8, "cuda:0", memory_limit="6GiB")

    assert trial.outcome is outcome


def convolution(gpu, chosen):
    """Imitate cuDNN's benchmark: once per size it asks for too much memory, then for less."""

    def train(batch_size, accumulate):
        while True:
            if batch_size not in chosen:
                chosen.add(batch_size)
                with contextlib.suppress(torch.OutOfMemoryError):
                    gpu.allocate(0, 10 * GIB)
                with gpu.holding(0, 5 * GIB):
                    pass
            with gpu.holding(0, GIB):
                yield

    return train


@pytest.mark.parametrize("tries", [True, False])
def test_cudnn_benchmarking_is_not_part_of_the_peak(monkeypatch, tries):
    gpu, chosen = FakeGpu().install(monkeypatch), set()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", tries)

    trial = attempt(convolution(gpu, chosen), 8, "cuda:0", memory_limit="6GiB")

    assert chosen == {8}
    assert trial.outcome is (Outcome.FIT if tries else Outcome.OUT_OF_MEMORY)
    assert trial.peak == (GIB if tries else None)


def test_memory_refused_after_cudnn_benchmarking_is_not_a_fit(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def train(batch_size, accumulate):
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                gpu.allocate(0, 10 * GIB)
            yield

    trial = attempt(train, 8, "cuda:0", memory_limit="6GiB")

    assert trial.outcome is Outcome.OUT_OF_MEMORY


def test_a_size_without_any_cudnn_algorithm_is_out_of_memory(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def train(batch_size, accumulate):
        gpu.allocate(0, 10 * GIB)
        yield

    trial = attempt(train, 8, "cuda:0", memory_limit="6GiB")

    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert gpu.cards[0].share == 1.0


def test_a_size_that_was_not_reached_is_not_verified():
    def train(batch_size, accumulate):
        while True:
            yield min(batch_size, 5)

    assert attempt(train, 8, PaperDevice(10)).batch_size == 5


@pytest.mark.parametrize("said", [32, np.int64(32), 0])
def test_a_workload_that_ignores_its_batch_size_is_told_so(said):
    def train(batch_size, accumulate):
        while True:
            yield said

    with pytest.raises(ValueError, match=f"yielded {said} at batch_size=8"):
        attempt(train, 8, PaperDevice(10))


def test_the_generator_is_closed_under_the_modes_it_was_started_under():
    probe, closed = SimulatedAccelerator("1GiB"), []

    def train(batch_size, accumulate):
        try:
            while True:
                torch.zeros(1)
                yield
        finally:
            closed.append(torch.zeros(256))

    attempt(train, 1, probe)

    assert closed  # once watched, once timed without
    assert probe.ledger.peak >= 1024


def test_steps_go_on_until_an_optimizer_has_stepped():
    """A GradScaler skips its first steps while its scale settles, without optimizer state."""
    model, optimizer = perceptron()
    scaler = torch.amp.GradScaler("cpu")
    stepped = []

    def train(batch_size, accumulate):
        for step in itertools.count():
            scaler.scale(model.loss(batch_size)).backward()
            if step < 8:
                model.layers[0].weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            stepped.append(len(optimizer.state) > 0)
            yield

    trial = attempt(train, 4, SimulatedAccelerator("1GiB"))

    assert trial.fits
    assert stepped[8]
    assert stepped.index(True) == 8


def test_the_optimizer_is_timed_without_its_closure():
    model, optimizer = perceptron()
    times = iter(range(10**6))

    class Ticking(SimulatedAccelerator):
        def clock(self):
            return float(next(times))

    def train(batch_size, accumulate):
        def closure():
            loss = model.loss(batch_size)
            loss.backward()
            return loss

        while True:
            optimizer.step(closure)
            yield

    trial = attempt(train, 4, Ticking("1GiB"))

    # Four readings in a step, around the optimizer and around its closure: 3 ticks less 1
    assert trial.optimizer_seconds == 2.0
    assert trial.step_seconds == 5.0


def branching(model, optimizer):
    """Train with a loss of several passes."""

    def train(batch_size, accumulate):
        while True:
            first = model.loss(batch_size)
            loss = first + first * model.loss(batch_size)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train


@pytest.mark.parametrize("kind", [training, branching])
def test_memory_running_out_at_any_allocation_leaves_nothing_behind(kind):
    """Refuse each allocation of a trial in turn: it fails, no tensor is left, and none is changed."""
    model, optimizer = perceptron()
    workload, device = kind(model, optimizer), SimulatedAccelerator("1GiB")
    assert attempt(workload, 4, device, steps_per_trial=2).fits
    allocations = device.ledger.allocations
    device.attach(model, optimizer)
    at_rest = device.read().reserved
    before = state_of(model, optimizer)

    assert allocations > 50
    for allocation in range(1, allocations + 1):
        device.ledger.refuse_at = allocation

        trial = attempt(workload, 4, device, steps_per_trial=2)

        device.attach(model)  # a restored buffer is a new tensor
        assert trial.outcome is Outcome.OUT_OF_MEMORY
        assert device.read().reserved == at_rest, f"left after refusing allocation {allocation}"
        assert unchanged(before, state_of(model, optimizer))


def test_frames_of_a_failed_step_are_freed():
    held = []

    def train(batch_size, accumulate):
        big = torch.zeros(100)
        held.append(weakref.ref(big))
        try:
            torch.zeros(10**9)
        except torch.OutOfMemoryError as error:
            raise RuntimeError("step failed") from error
        yield

    trial = attempt(train, 1, SimulatedAccelerator("1MiB"))
    gc.collect()

    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert held[0]() is None


@pytest.mark.parametrize(
    ("peak", "outcome", "budget", "judged"),
    [
        (100, Outcome.FIT, 100, Outcome.FIT),
        (100, Outcome.FIT, 99, Outcome.OVER_BUDGET),
        (None, Outcome.OUT_OF_MEMORY, 10**9, Outcome.OUT_OF_MEMORY),
        (None, Outcome.REFUSED, 10**9, Outcome.REFUSED),
    ],
)
def test_a_trial_is_judged_by_the_budget_that_holds(peak, outcome, budget, judged):
    assert Trial(8, outcome, peak).judged(budget).outcome is judged
