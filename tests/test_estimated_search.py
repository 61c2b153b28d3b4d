"""A search on predicted peaks: its proposals, and when it does without them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from autobatch import GuidedBisection, Outcome, Trial
from autobatch._search.estimated import EstimatedSearch

BUDGET, HELD = 100_000, 1000


@dataclass(frozen=True)
class Line:
    """Estimate whose peaks are on a straight line; reserved bytes exceed requested ones."""

    each: float
    reserve: float = 1.1

    def requested(self, batch_size):
        return int(HELD + self.each * batch_size)

    def reserved(self, batch_size, capacity):
        peak = int(self.reserve * self.requested(batch_size))
        return peak if peak <= capacity else None


def run(estimate, each, *, start=8, high=100_000, search=None, reserve=1.1):
    """Search on a line of `each` bytes a sample."""
    true, trials = Line(each, reserve), []
    guided = EstimatedSearch(search or GuidedBisection(), estimate)
    options = {"start": start, "high": high, "budget": BUDGET}
    while (size := guided.propose(tuple(trials), **options)) is not None:
        peak = true.reserved(size, BUDGET)
        trials.append(
            Trial(
                size,
                Outcome.OUT_OF_MEMORY if peak is None else Outcome.FIT,
                peak=peak,
                resident=HELD,
                requested=true.requested(size) if peak else None,
            )
        )
    return [trial.batch_size if trial.fits else -trial.batch_size for trial in trials]


def test_a_true_estimate_takes_three_trials_without_a_failure():
    assert run(Line(100), 100) == [8, 881, 899]


def test_a_first_trial_at_the_predicted_limit_is_the_answer():
    assert run(Line(100), 100, start=899) == [899]


def test_the_cap_is_tried_at_once_if_it_has_room_to_spare():
    assert run(Line(100), 100, high=500) == [8, 500]


@pytest.mark.parametrize("reserve", [1.07, 1.115])
def test_reserved_bytes_that_were_not_predicted_are_learned_from_a_trial(reserve):
    found = run(Line(100), 100, start=64, reserve=reserve)

    largest = int((BUDGET / reserve - HELD) / 100)
    assert found[-1] >= 0.99 * largest
    assert len(found) <= 4
    assert min(found) > 0


def test_requested_bytes_off_by_more_than_a_hundredth_discard_the_estimate():
    plain = run(Line(1), 100)

    assert plain == run(Line(140), 100)
    assert plain[:2] == [8, 64]


def test_a_failure_at_a_predicted_size_leaves_the_search_to_peaks():
    # Memory per sample rises beyond the first trial: the estimate agrees there only
    found = run(Line(100, reserve=0.9), 100, start=300, reserve=1.1)

    assert max(found) >= 0.99 * 899
    assert len(found) <= 6
