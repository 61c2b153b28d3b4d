"""A search on predicted peaks: its proposals, and when it does without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from autobatch import Outcome, Trial
from autobatch._memory.estimate.prediction import Peaks
from autobatch._search.estimated import EstimatedSearch

BUDGET, HELD = 100_000, 1000


@dataclass(frozen=True)
class Line:
    """Estimate whose peaks are on a straight line; reserved bytes exceed requested ones."""

    each: float
    reserve: float = 1.1

    def peaks(self, batch_size):
        requested = int(HELD + self.each * batch_size)
        return Peaks(requested, requested, int(self.reserve * requested))


def run(estimate, each, *, start=8, high=100_000, reserve=1.1, truth=None, error=0.02):
    """Search on a line of `each` bytes a sample, as long as the estimate is trusted."""
    true, trials, size = truth or Line(each, reserve), [], start
    search = EstimatedSearch(estimate, 0.01, error)
    while size is not None:
        peaks = true.peaks(size)
        fits = peaks.reserved <= BUDGET
        trials.append(
            Trial(
                size,
                Outcome.FIT if fits else Outcome.OUT_OF_MEMORY,
                peak=peaks.reserved if fits else None,
                resident=HELD,
                requested=peaks.requested if fits else None,
            )
        )
        if not search.is_trusted(trials):
            break
        size = search.propose(trials, high=high, budget=BUDGET)
    return [trial.batch_size if trial.fits else -trial.batch_size for trial in trials]


def test_a_true_estimate_takes_three_trials_without_a_failure():
    assert run(Line(100), 100) == [8, 879, 896]


@pytest.mark.parametrize("reserve", [0.92, 1.0, 1.09])
def test_no_trial_fails_if_predictions_err_by_no_more_than_was_measured(reserve):
    found = run(Line(100, reserve=1.0), 100, reserve=reserve, error=0.1)

    assert min(found) > 0
    assert found[-1] >= 0.99 * int((BUDGET / reserve - HELD) / 100)
    assert len(found) <= 4


@pytest.mark.parametrize("each", [2000, 3000, 5000, 9000])
def test_a_size_in_doubt_is_tried_before_much_memory_stays_unused(each):
    found = run(Line(each), each, start=2)

    assert found[-1] == int((BUDGET / 1.1 - HELD) / each)


def test_a_first_trial_at_the_predicted_limit_is_the_answer():
    assert run(Line(100), 100, start=899) == [899]


def test_the_cap_is_tried_at_once_if_it_has_room_to_spare():
    assert run(Line(100), 100, high=500) == [8, 500]


@dataclass(frozen=True)
class Rough(Line):
    """Estimate whose reserved bytes are 5 % higher at every fourth size."""

    def peaks(self, batch_size):
        peaks = super().peaks(batch_size)
        return replace(peaks, reserved=int(peaks.reserved * (1 if batch_size % 4 else 1.05)))


def test_a_size_beyond_the_first_that_does_not_fit_is_found():
    """864 needs too much, and 899 does not."""
    found = run(Rough(100), 100, truth=Rough(100))

    assert min(found) > 0
    assert 0.99 * 899 < found[-1] <= 899
    assert len(found) <= 3


@pytest.mark.parametrize("reserve", [1.07, 1.115])
def test_reserved_bytes_that_were_not_predicted_are_learned_from_a_trial(reserve):
    found = run(Line(100), 100, start=64, reserve=reserve)

    largest = int((BUDGET / reserve - HELD) / 100)
    assert found[-1] >= 0.99 * largest
    assert len(found) <= 4
    assert min(found) > 0


@pytest.mark.parametrize("wrong", [1, 85, 119, 140])
def test_requested_bytes_off_by_more_than_a_hundredth_end_its_trust(wrong):
    assert run(Line(wrong), 100) == [8]


def test_a_failure_at_a_predicted_size_ends_its_trust():
    # Memory per sample rises beyond the first trial: the estimate agrees there only
    assert run(Line(100, reserve=0.9), 100, start=300, reserve=1.1)[0] == 300
    assert run(Line(100, reserve=0.9), 100, start=30, reserve=1.1)[-1] < 0
