"""Sizes at which the user's own code raises an error."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import autobatch
from autobatch import BatchPlan, Outcome, Trial
from autobatch._search.multiples import next_multiple
from autobatch.testing import PaperDevice


def found(accepts, *, fits=100, error=ValueError, **options):
    """Tune a loop that raises an error at sizes it does not accept."""
    device = PaperDevice(200 + 8 * fits, fixed=200, per_sample=8)
    started = []

    def train(batch_size, accumulate):
        started.append(batch_size)
        if not accepts(batch_size):
            raise error(f"not {batch_size}\nand more")
        yield from device.workload(batch_size, accumulate)

    report = autobatch.find(train, device=device, memory_limit=1.0, **options)
    return report, started


def divides(samples):
    return lambda size: samples % size == 0


@pytest.mark.parametrize(
    ("accepts", "target", "plan"),
    [
        (divides(512), 128, BatchPlan(64, 2)),
        (divides(512), None, BatchPlan(64)),
        (divides(512), 120, BatchPlan(8, 15)),  # exact with a size that ran
        (divides(96), 96, BatchPlan(48, 2)),
        (lambda size: size <= 50, 200, BatchPlan(40, 5)),
        (lambda size: size % 32 == 0, 256, BatchPlan(64, 4)),
        (lambda size: size == 1, 128, BatchPlan(1, 128)),
        (lambda size: size == 1, None, BatchPlan(1)),
    ],
)
def test_sizes_that_run_reach_the_target(accepts, target, plan):
    report, started = found(accepts, target_batch_size=target)

    assert report.plan == plan
    ran = {trial.batch_size for trial in report.trials if trial.fits}
    assert plan.micro_batch_size in ran
    assert len({size for size in started if not accepts(size)}) <= 6
    assert any(
        note.startswith("The workload itself raised an error at batch_size=")
        and "(ValueError: not " in note
        and "and more" not in note
        for note in report.notes
    ) == any(trial.outcome is Outcome.REFUSED for trial in report.trials)


@pytest.mark.curve
@pytest.mark.parametrize("target", [128, None])
def test_timing_leaves_out_sizes_that_are_refused(target):
    report, _ = found(divides(512), target_batch_size=target)

    assert all(512 % point.batch_size == 0 for point in report.curve)
    assert 512 % report.plan.micro_batch_size == 0
    assert target in (None, report.plan.effective_batch_size)


def test_no_epoch_ends_with_a_size_that_is_refused():
    report, _ = found(divides(512), dataset_size=600)

    assert report.plan == BatchPlan(16)  # an epoch of 32 ends with 24, one of 64 as well


def test_the_first_error_is_raised_if_no_size_runs():
    with pytest.raises(KeyError, match="not 8") as caught:
        found(lambda size: False, error=KeyError)

    assert caught.value.__notes__ == ["autobatch was trying batch_size=8"]


def test_an_error_at_the_size_that_ran_first_is_raised():
    device, runs = PaperDevice(1000, fixed=200, per_sample=8), []

    def train(batch_size, accumulate):
        runs.append(batch_size)
        if runs.count(8) == 2:
            raise ZeroDivisionError("mine")
        yield from device.workload(batch_size, accumulate)

    with pytest.raises(ZeroDivisionError, match="mine"):
        autobatch.find(train, device=device, target_batch_size=8, plan=BatchPlan(8))
        autobatch.find(train, device=device, plan=BatchPlan(8))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_interrupt_refuses_no_size(error):
    with pytest.raises(error):
        found(lambda size: size == 8, error=error)


def test_errors_of_autobatch_refuse_no_size():
    def train(batch_size):
        while True:
            yield batch_size if batch_size <= 8 else 2 * batch_size

    with pytest.raises(ValueError, match="yielded"):
        autobatch.find(train, device=PaperDevice(1000))


@given(
    own=st.integers(1, 64),
    high=st.integers(1, 2000),
    fits=st.integers(1, 3000),
    accepts=st.sampled_from(
        [divides(512), divides(96), lambda n: n < 50, lambda n: n == 1, lambda n: n % 8 == 0]
    ),
)
def test_multiples_end_after_few_refusals_and_double_what_runs(own, high, fits, accepts):
    own = min(own, high)

    def outcome(size):
        if not accepts(size):
            return Outcome.REFUSED
        return Outcome.FIT if size <= fits else Outcome.OUT_OF_MEMORY

    trials = [Trial(own, outcome(own))]
    while (size := next_multiple(trials, high)) is not None:
        assert 1 <= size <= high
        assert size not in {trial.batch_size for trial in trials}
        trials.append(Trial(size, outcome(size)))

    assert sum(trial.outcome is Outcome.REFUSED for trial in trials) <= 6
    ran = [trial.batch_size for trial in trials if trial.fits]
    if own in ran:
        below = min(high, fits)
        doubles = [own * 2**i for i in range(int(math.log2(below / own)) + 1)]
        reached = [size for size in doubles if all(map(accepts, doubles[: doubles.index(size)]))]
        assert {size for size in reached if accepts(size)} <= set(ran)
