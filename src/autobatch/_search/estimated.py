"""GuidedBisection that first goes where predicted memory reaches the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory import PeakEstimate
    from autobatch._search.guided import GuidedBisection
    from autobatch._trials import Trial

# An estimate that misses the requested bytes of the first trial by a larger share is not used
_MAX_ERROR: Final = 0.01
# Share of the predicted limit left out by the first proposal: its trial corrects the prediction
_MARGIN: Final = 0.02
# Below this share of the budget a measured peak corrects predictions by bytes, above it by a factor
_SMALL: Final = 0.1
_MAX_TRIALS: Final = 4  # trials until peaks alone guide the search


@dataclass(frozen=True)
class EstimatedSearch:
    """Search on predicted peaks, checked and corrected by trials; on measured ones if they fail.

    Args:
        search: Search on measured peaks.
        estimate: Predicted peaks.
    """

    search: GuidedBisection
    estimate: PeakEstimate

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Return an untried size from 1 to `high`, or None if the largest fit is the answer."""
        if self.is_trusted(trials) and len(trials) < _MAX_TRIALS:
            top = max(trials, key=lambda trial: trial.batch_size)
            return self._next_size(top, high, budget)
        return self.search.propose(trials, start=start, high=high, budget=budget)

    def is_trusted(self, trials: Sequence[Trial]) -> bool:
        """Return True if the first trial confirms the estimate, and no later one failed."""
        if not trials or not all(trial.fits for trial in trials):
            return False
        first = trials[0]
        if first.requested is None:
            return False
        error = self.estimate.requested(first.batch_size) - first.requested
        return abs(error) <= _MAX_ERROR * first.requested

    def _next_size(self, top: Trial, high: int, budget: int) -> int | None:
        """Return the size to try after the largest fit; None if it is the answer."""
        resolution = self.search.resolution
        if budget - (top.peak or 0) <= resolution * (budget - top.resident):
            return None
        capacity = self._capacity(top, budget)
        limit = self._largest(top.batch_size, high, capacity)
        if limit - top.batch_size <= int(resolution * limit):
            return None
        careful = int((1 - _MARGIN) * limit)
        is_near = top.batch_size >= (1 - 2 * _MARGIN) * limit
        is_roomy = self.estimate.reserved(limit, int((1 - _MARGIN) * capacity)) is not None
        return limit if is_near or is_roomy else max(careful, top.batch_size + 1)

    def _capacity(self, top: Trial, budget: int) -> int:
        """Return the capacity of the prediction that corresponds to the budget."""
        peak = top.peak or 0
        predicted = self.estimate.reserved(top.batch_size, 2 * budget)
        if predicted is None:
            return budget
        if peak < _SMALL * budget:
            return budget + predicted - peak
        return budget * predicted // peak

    def _largest(self, low: int, high: int, capacity: int) -> int:
        """Return the largest size predicted to fit, within a thousandth."""

        def fits(size: int) -> bool:
            return self.estimate.reserved(size, capacity) is not None

        bad = min(2 * low, high + 1)
        while bad <= high and fits(bad):
            low, bad = bad, min(2 * bad, high + 1)
        while bad - low > max(1, low // 1000):
            middle = (low + bad) // 2
            low, bad = (middle, bad) if fits(middle) else (low, middle)
        return low
