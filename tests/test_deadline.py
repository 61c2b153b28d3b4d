from __future__ import annotations

import pytest

from autobatch._trials.runner import TimeLimit


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def after(seconds, *, limit=60.0, trials=None):
    """A deadline so many seconds on its way, with what the trials of some sizes took."""
    clock = Clock()
    deadline = TimeLimit(limit, clock)
    for size, took in (trials or {}).items():
        deadline.record(size, took)
    clock.now += seconds
    return deadline


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
def test_a_trial_is_allowed_that_is_over_in_time_in_proportion_to_one_that_ran(
    size, reserve, allowed
):
    deadline = after(40, trials={16: 10.0})

    assert deadline.allows(size, 16, reserve) == allowed


def test_the_first_trial_is_always_allowed():
    assert after(1000).allows(8, None, 0)


def test_without_a_limit_there_is_time_for_everything():
    deadline = after(10**9, limit=None, trials={8: 10.0})

    assert deadline.allows(10**9, 8, 10**9)
    assert deadline.affordable(8, 0) is None


def test_what_is_affordable_takes_half_of_the_time_left():
    deadline = after(20, trials={16: 10.0})

    assert deadline.affordable(16, 0) == 32
    assert deadline.affordable(16, 20) == 16
    assert deadline.allows(32, 16, 20)


def test_the_largest_is_the_largest_that_ran():
    assert after(0).largest is None
    assert after(0, trials={8: 1.0, 32: 2.0, 16: 1.0}).largest == 32


def test_seconds_that_have_a_bound_of_their_own_are_spent_and_do_not_count():
    deadline = after(50, trials={16: 20.0})
    assert not deadline.allows(16, 16, 0)

    deadline.leave_out(20)

    assert deadline.spent == 50
    assert deadline.allows(16, 16, 10)
    assert not deadline.allows(16, 16, 11)
    assert deadline.affordable(16, 0) == 12


@pytest.mark.parametrize(("size", "nearest"), [(3, 4), (4, 4), (5, 16), (17, 16)])
def test_the_nearest_size_that_ran_is_no_smaller_where_there_is_one(size, nearest):
    assert after(0, trials={16: 1.0, 4: 1.0}).nearest(size) == nearest
    assert after(0).nearest(size) is None
