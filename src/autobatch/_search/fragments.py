"""Sizes that may fit in fragmented memory, where a failure does not rule out larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist, mean
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._search import Bracket
    from autobatch._trials import Trial

# Share of the budget from which on fragments decide
_NEAR: Final = 0.6
_FARTHEST: Final = 4  # times the largest fit
# A failure where less of the budget was foretold is a jump of memory
_FORETOLD: Final = 0.9
# Trials that reserve a smaller share of the budget have fragments of another kind
_COMPARABLE: Final = 1 / 3
# Scatter of the ratio of reserved to allocated bytes: a share of it, and one of the fragments
_ERROR: Final = 0.003
_SCATTER: Final = 0.03
# Ratios of failures are above the largest that fits, by this share of the fragments
_BEYOND: Final = 0.15
_LEAST_CHANCE: Final = 0.2
_MAX_FAILURES: Final = 4


@dataclass(frozen=True)
class FragmentedMemory:
    """Peaks near the budget: allocated bytes on a line, times a ratio that scatters by fragments.

    Args:
        bracket: What is known of sizes.
        budget: Bytes that may be reserved.
        top: The largest fit.
        slope: Allocated bytes per sample there.
        ratios: Reserved over allocated bytes where that was read.
        failed: Larger sizes that did not fit.
    """

    bracket: Bracket
    budget: int
    top: Trial
    slope: float
    ratios: Sequence[float]
    failed: Sequence[int]

    @classmethod
    def of(cls, trials: Sequence[Trial], bracket: Bracket, budget: int) -> Self | None:
        """Return the memory near the budget; None where it is far, not fragmented, or jumps."""
        fits = sorted((t for t in trials if t.fits), key=lambda trial: trial.batch_size)
        if len(fits) < 2 or any(not 0 < _allocated(t) < (t.peak or 0) for t in fits):  # noqa: PLR2004
            return None
        *before, top = fits
        base = next((t for t in reversed(before) if 2 * t.batch_size <= top.batch_size), before[0])
        slope = (_allocated(top) - _allocated(base)) / (top.batch_size - base.batch_size)
        failed = [t.batch_size for t in trials if not t.fits and t.batch_size > top.batch_size]
        comparable = [t for t in before if (t.peak or 0) >= _COMPARABLE * budget] + [top]
        ratios = [(t.peak or 0) / _allocated(t) for t in comparable]
        if slope <= 0:
            return None
        memory = cls(bracket, budget, top, slope, ratios, failed)
        # A line to much larger sizes is one below them, where memory hardly grows yet
        is_near = (top.peak or 0) >= _NEAR * budget and memory.most <= _FARTHEST * top.batch_size
        foretold = min(map(memory.allocated, failed), default=budget) * ratios[-1]
        is_jump = foretold < _FORETOLD * budget or (len(failed) > 1 and not is_near)
        return None if is_jump or not (is_near or failed) else memory

    def allocated(self, size: int) -> float:
        """Return the allocated bytes of a size, on the line."""
        return _allocated(self.top) + self.slope * (size - self.top.batch_size)

    @property
    def most(self) -> int:
        """Largest size that fits if nothing is fragmented."""
        return self.top.batch_size + int((self.budget - _allocated(self.top)) / self.slope)

    def next_size(self, resolution: float) -> int | None:
        """Return the size with the largest gain to expect; None if that is half the resolution.

        After several failures fragments are not as expected, and the bracket is bisected.
        """
        good = self.bracket.good
        left, room = self.budget - (self.top.peak or 0), self.budget - self.top.resident
        if left <= max(2 * resolution, 1 / good) * room:
            return None
        if len(self.failed) >= _MAX_FAILURES:
            return None if self.bracket.is_closed(resolution) else self.bracket.middle
        sizes = range(good + 1, min(self.most, self.bracket.high) + 1, max(1, good // 500))
        # Sizes beside a failure have fragments of the same kind
        free = (n for n in sizes if all(abs(n - f) > resolution / 2 * f for f in self.failed))
        gains = {n: self._chance(n) * (n / good - 1) for n in free}
        best = max(gains, key=gains.__getitem__, default=good)
        return best if gains.get(best, 0.0) >= resolution / 2 else None

    def _chance(self, size: int) -> float:
        """Return the share of the ratios at which a size fits, also above failures; 0 if small."""
        largest = self.budget / self.allocated(size)
        beyond = _BEYOND * (max(self.ratios) - 1)
        above = [self.budget / self.allocated(failed) + beyond for failed in self.failed]
        chance = mean(
            NormalDist(each, scatter(each)).cdf(largest) for each in (*self.ratios, *above)
        )
        return chance if chance >= _LEAST_CHANCE else 0.0


def scatter(ratio: float) -> float:
    """Return the scatter of the ratio of reserved to allocated bytes."""
    return _ERROR + _SCATTER * max(0.0, ratio - 1)


def _allocated(trial: Trial) -> int:
    return trial.allocated or 0
