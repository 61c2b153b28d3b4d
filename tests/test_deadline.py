from __future__ import annotations

import pytest
import torch

import autobatch
from autobatch._trials.time_limit import TimeLimit
from autobatch.testing import SimulatedAccelerator


def after(seconds, *, limit=60.0, trials=None):
    """Return a time limit after so many seconds, with the seconds of trials by batch size."""
    time_limit = TimeLimit(limit, 100.0)
    for size, trial_seconds in (trials or {}).items():
        time_limit.record(size, trial_seconds)
    time_limit.now += seconds
    return time_limit


@pytest.mark.parametrize(
    ("size", "reserve", "allowed"),
    [
        (16, 0, True),
        (32, 0, True),
        (33, 0, False),
        (32, 1, False),
        (4, 10, True),
        (4, 11, False),
    ],
)
def test_a_trial_is_allowed_if_its_proportional_time_is_left(size, reserve, allowed):
    time_limit = after(40, trials={16: 10.0})

    assert time_limit.allows(size, 16, reserve) == allowed


def test_the_first_trial_and_without_a_limit_all_are_allowed():
    time_limit = after(10**9, limit=None, trials={8: 10.0})

    assert after(1000).allows(8, None, 0)
    assert time_limit.allows(10**9, 8, 10**9)
    assert time_limit.affordable(8, 0) is None


def test_the_affordable_size_takes_half_of_the_time_left():
    time_limit = after(20, trials={16: 10.0})

    assert time_limit.affordable(16, 0) == 32
    assert time_limit.affordable(16, 20) == 16
    assert time_limit.allows(32, 16, 20)


def test_excluded_seconds_are_spent_and_do_not_count():
    time_limit = after(30, trials={16: 20.0})

    with time_limit.excluded():
        time_limit.now += 20

    assert time_limit.spent == 50
    assert time_limit.allows(16, 16, 10)
    assert not time_limit.allows(16, 16, 11)
    assert time_limit.affordable(16, 0) == 12


@pytest.mark.parametrize(("size", "nearest"), [(3, 4), (4, 4), (9, 16), (17, 16)])
def test_the_nearest_size_is_the_smallest_above_or_the_largest(size, nearest):
    assert after(0, trials={4: 1.0, 16: 1.0, 8: 1.0}).nearest(size) == nearest
    assert after(0).nearest(size) is None


class Clock(SimulatedAccelerator):
    """A device on which only steps take time."""

    now = 0.0

    def clock(self):
        return self.now


def steps_of_find(seconds, **options):
    """Return the report and the number of steps, if each step takes the seconds of its number."""
    device, steps = Clock("1GiB"), []

    def train(batch_size):
        while True:
            torch.ones(batch_size, 100).sum()
            steps.append(batch_size)
            device.now += seconds(len(steps))
            yield

    report = autobatch.find(train, device=device, verbose=False, **options)
    return report, len(steps)


@pytest.mark.parametrize(("time_limit", "expected"), [(5, 5), (4.5, 5), (0.5, 2), (None, 200)])
def test_a_trial_ends_with_the_step_that_reaches_the_time_limit(time_limit, expected):
    report, steps = steps_of_find(
        lambda _: 1.0,
        time_limit=time_limit,
        steps_per_trial=100,
        max_micro_batch_size=1,
        timing_seconds=0,
    )

    assert steps == expected
    assert report.plan.micro_batch_size == 1


def test_timing_ends_with_the_update_that_uses_up_its_seconds():
    in_trial = 2

    _, steps = steps_of_find(
        lambda step: 0.1 if step <= in_trial else 10.0,
        timing_seconds=5,
        steps_per_trial=2,
        max_micro_batch_size=1,
    )

    assert steps == in_trial + 1 + 2  # the first update of a turn is not timed, and two make a time


def test_warm_up_without_a_step_of_the_optimizer_obeys_the_limit():
    model, steps = torch.nn.Linear(1, 1), {}

    class Slow(SimulatedAccelerator):
        def clock(self):
            return float(sum(steps.values()))

    def train(batch_size):
        while True:
            model(torch.ones(batch_size, 1)).sum().backward()
            steps[batch_size] = steps.get(batch_size, 0) + 1
            yield

    report = autobatch.find(train, device=Slow("1MiB"), time_limit=5, timing_seconds=0)

    assert steps == {8: 6}  # one more than the limit, which is timed
    assert report.plan.micro_batch_size == 8
    assert any("no torch.optim optimizer stepped" in note for note in report.notes)
