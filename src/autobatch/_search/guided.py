"""GuidedBisection: bisection guided by measured memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch._search import Bracket, check_resolution
from autobatch._search.extrapolation import Reading, readings_of
from autobatch._search.forecast import Evidence, Forecast, exploratory_size, forecast
from autobatch._search.fragments import FragmentedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial


@dataclass(frozen=True)
class GuidedBisection:
    """Bisection whose pivot is the size at which memory is predicted to reach the budget.

    If trials carry memory profiles, two small sizes give a straight line per allocation, and the
    line that reaches the budget first predicts the largest size; a third size turns the lines into
    parabolas if memory grows with the square of the batch, as for a matrix of all pairs of samples.
    Peaks alone give one line, extrapolated as far as it has proved right, or one parabola. After a
    failure that the line did not predict, memory jumps in between, and small steps locate the jump.
    Without any readings the search is `Bisection`.

    Where trials carry allocated bytes, as on CUDA, these are extrapolated: they are smooth, while
    reserved bytes, which decide, rise in steps and may fall as the size grows.

    Guarantee, if memory never falls as the size grows: the size found is within `resolution` of the
    largest that fits, or it leaves unused at most `resolution` of the bytes between resident memory
    and the budget (at least one sample's share of them); five times `resolution` if peaks scatter
    about a line by up to twice that. On straight lines below which a few sizes fit, and on maxima
    of straight lines with true profiles, the first part holds, and no trial fails unless the very
    first does. If reserved memory may fall as the size grows, the size found has run, and on the
    curves measured so far it is within 1 % of the largest or leaves at most 2 % of those bytes
    (and one sample's share) unused.

    Args:
        resolution: Accuracy of the size found, as a share.
        growth: Largest factor from one size to the next while extrapolating peaks; twice that while
            memory does not grow with the batch size.
        estimate: Whether predicted memory guides the search after its first trial, where the
            training step of a Trainer can be traced and that trial agrees: on CUDA, on one rank.
            Nothing is run for it, and trials decide as ever.
    """

    resolution: float = 0.01
    growth: int = 8
    estimate: bool = True

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if type(self.growth) is not int or self.growth < 2:  # noqa: PLR2004
            raise ValueError(f"growth must be at least 2, got {self.growth!r}.")
        if type(self.estimate) is not bool:
            raise ValueError(f"estimate must be True or False, got {self.estimate!r}.")

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Return an untried size from 1 to `high`, or None if the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = Bracket.of(trials, high)
        fragmented = FragmentedMemory.of(trials, bracket, budget)
        if fragmented is not None:
            return fragmented.next_size(self.resolution)
        evidence = Evidence(readings_of(trials, budget), bracket, self.resolution, self.growth)
        if bracket.is_closed(self.resolution):
            return None
        if not bracket.good:
            # Nothing fits yet: bisect, or go to a size in proportion to a failed peak
            sizes = [bracket.middle, *(r.proportional_limit for r in evidence.failed)]
            return bracket.clip(min(sizes))
        if not evidence.fits or evidence.top.size < bracket.good:
            return bracket.middle
        exploratory = exploratory_size(evidence)
        if exploratory > bracket.refused and all(t.batch_size != exploratory for t in trials):
            return exploratory
        predicted = forecast(evidence)
        accuracy = self.resolution + predicted.noise
        if bracket.is_closed(accuracy):
            return None
        if predicted.is_certain and _is_reached(predicted.limit, evidence.top, accuracy):
            return None
        return self._next_size(trials, bracket, predicted)

    def _next_size(self, trials: Sequence[Trial], bracket: Bracket, predicted: Forecast) -> int:
        """Return the size of the forecast, but narrow the bracket enough every three trials."""
        good, bad = bracket.good, bracket.bad
        # At the predicted limit, the next larger size proves it by failing
        size = max(predicted.size, good + max(1, int(self.resolution * good)))
        before = Bracket.of(trials[:-3], bracket.high)
        if bad is None:
            # Without a certain prediction steps grow as long as no size fails
            is_uncertain = not predicted.is_certain or predicted.size <= good
            if good < 2 * before.good and is_uncertain:
                size = max(size, min(2 * good - before.good, predicted.limit))
            return bracket.clip(size)
        is_slow = before.bad is not None and before.low * bad**2 > before.bad * good**2
        return bracket.clip(math.isqrt(good * bad) if is_slow or size >= bad else size)


def _is_reached(limit: int, top: Reading, accuracy: float) -> bool:
    """Return True if larger sizes will not fit, and an error of that prediction costs little."""
    share = max(accuracy, 1 / top.size)
    return limit - top.size <= int(accuracy * limit) and top.left <= share * top.room
