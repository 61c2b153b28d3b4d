from __future__ import annotations

import pytest

from autobatch._trials.time_limit import TimeLimit


def after(seconds, *, limit=60.0, trials=None):
    """Return a time limit after so many seconds, with the seconds of trials by batch size."""
    time_limit = TimeLimit(limit, 100.0)
    for size, trial_seconds in (trials or {}).items():
        time_limit.record(size, trial_seconds)
    time_limit.now += seconds
    return time_limit


def test_time_counts_from_the_beginning():
    assert after(7).spent == 7


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


def test_the_first_trial_is_always_allowed():
    assert after(1000).allows(8, None, 0)


def test_without_a_limit_everything_is_allowed():
    time_limit = after(10**9, limit=None, trials={8: 10.0})

    assert time_limit.allows(10**9, 8, 10**9)
    assert time_limit.affordable(8, 0) is None


def test_the_affordable_size_takes_half_of_the_time_left():
    time_limit = after(20, trials={16: 10.0})

    assert time_limit.affordable(16, 0) == 32
    assert time_limit.affordable(16, 20) == 16
    assert time_limit.allows(32, 16, 20)


def test_the_largest_size_is_the_largest_that_ran():
    assert after(0).largest is None
    assert after(0, trials={8: 1.0, 32: 2.0, 16: 1.0}).largest == 32


def test_excluded_seconds_are_spent_and_do_not_count():
    time_limit = after(30, trials={16: 20.0})

    with time_limit.excluded():
        time_limit.now += 20

    assert time_limit.spent == 50
    assert time_limit.allows(16, 16, 10)
    assert not time_limit.allows(16, 16, 11)
    assert time_limit.affordable(16, 0) == 12


@pytest.mark.parametrize(("size", "nearest"), [(3, 4), (4, 4), (5, 16), (17, 16)])
def test_the_nearest_size_is_the_smallest_above_or_the_largest(size, nearest):
    assert after(0, trials={16: 1.0, 4: 1.0}).nearest(size) == nearest
    assert after(0).nearest(size) is None
