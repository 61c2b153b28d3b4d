"""A search that goes where predicted memory reaches the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from autobatch._search.fragments import scatter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory.estimate.prediction import Peaks
    from autobatch._trials import Trial

# An estimate that misses the requested bytes of the first trial by a larger share is not used
MAX_ERROR: Final = 0.01
# Sizes up to this multiple of the limit may fit: an allocator reserves more or less by fragments
_BEYOND: Final = 1.04
# Below this share of the budget a measured peak corrects predictions by bytes, above it by a factor
_SMALL: Final = 0.5
# Share of the scatter by fragments that corrected predictions miss: 0.1 to 0.5 in recorded searches
_UNFORETOLD: Final = 1 / 3
_MAX_TRIALS: Final = 4  # trials until peaks alone guide the search


class PeakEstimate(Protocol):
    """Peak memory of this process in a training step, predicted without running it."""

    def peaks(self, batch_size: int) -> Peaks:
        """Return the peaks at a batch size, without a limit of memory."""


@dataclass(frozen=True)
class EstimatedSearch:
    """Proposals from predicted peaks, which trials check and correct."""

    estimate: PeakEstimate  # predicted peaks
    resolution: float  # accuracy of the size found, as a share
    error_of_peaks: float  # largest error of reserved bytes that are predicted, as a share

    def is_trusted(self, trials: Sequence[Trial]) -> bool:
        """Return True if the first trial confirms the estimate, and no later one failed."""
        is_early = len(trials) < _MAX_TRIALS
        return is_early and all(t.fits for t in trials) and abs(self.error(trials)) <= MAX_ERROR

    def error(self, trials: Sequence[Trial]) -> float:
        """Return the error of the bytes requested in the first trial, as a share of them."""
        first = trials[0]
        if not first.requested:
            return -1.0
        return self.estimate.peaks(first.batch_size).requested / first.requested - 1

    def propose(self, trials: Sequence[Trial], *, high: int, budget: int) -> int | None:
        """Return the size to try after the largest fit; None if that is the answer.

        A size is tried that fits in spite of the doubt about predictions, and one in doubt only if
        that gains nothing and too much memory is unused.
        """
        top = max(trials, key=lambda trial: trial.batch_size)
        left, room = budget - (top.peak or 0), budget - top.resident
        if left <= self.resolution * room:
            return None
        capacity = self._capacity(top, budget)
        for doubt in (self._doubt(top, budget), 0.0):
            limit = self._largest(top.batch_size, high, int((1 - doubt) * capacity))
            if limit - top.batch_size > int(self.resolution * limit):
                return limit
        return None

    def _capacity(self, top: Trial, budget: int) -> int:
        """Return the predicted bytes that correspond to the budget."""
        peak, predicted = top.peak or 0, self._reserved(top.batch_size)
        if peak < _SMALL * budget:
            return budget + predicted - peak
        return budget * predicted // peak

    def _doubt(self, top: Trial, budget: int) -> float:
        """Return the error of corrected predictions at the limit, as a share.

        The nearer the top is to the limit, the more of the error its peak has shown.
        """
        peaks = self.estimate.peaks(top.batch_size)
        has_fragments = peaks.reserved > peaks.allocated  # an allocator holds more than is in use
        fragments = scatter(peaks.reserved / peaks.allocated) if has_fragments else 0.0
        unseen = max(0.0, 1 - (top.peak or 0) / budget)
        return unseen * self.error_of_peaks + _UNFORETOLD * fragments

    def _reserved(self, batch_size: int) -> int:
        return self.estimate.peaks(batch_size).reserved

    def _largest(self, low: int, high: int, capacity: int) -> int:
        """Return a size predicted to fit, within a thousandth of one that does not.

        Predictions take time: they begin at the size that a straight line gives, and look at few
        sizes beyond the first that does not fit.
        """
        rise = self._reserved(2 * low) - self._reserved(low)
        size = low + low * (capacity - self._reserved(low)) // rise if rise > 0 else high
        size = min(max(size, low + 1), high)
        good, bad, step = low, high + 1, max(1, size // 50)
        while good < size < bad:  # away from the line's size, until both sides are known
            fits = self._reserved(size) <= capacity
            good, bad = (size, bad) if fits else (good, size)
            size += step if fits else -step
            step *= 2
        while bad - good > max(1, good // 1000):
            middle = (good + bad) // 2
            fits = self._reserved(middle) <= capacity
            good, bad = (middle, bad) if fits else (good, middle)
        beyond = range(good + 1, min(int(_BEYOND * good), high) + 1, max(1, good // 100))
        return max((n for n in beyond if self._reserved(n) <= capacity), default=good)
