"""Choice among sizes that are about as fast as the fastest, by more than luck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Share of the highest throughput that counts as fast
FAST_ENOUGH: Final = 0.95
# Errors by which a difference has to exceed that
_ERRORS: Final = 2.0
# Share by which a size may be over that, when time has ended before its error was small
_MOST_OVER: Final = 0.06
# Samples of which BatchNorm takes good statistics
_ENOUGH_FOR_STATISTICS: Final = 16


@dataclass(frozen=True, slots=True)
class SampleTime:
    """Time per sample at one size: measured.

    Args:
        seconds: Seconds per sample.
        error: Share of it by which it may be less: noise of a machine only adds to it.
    """

    seconds: float
    error: float

    def is_slow(self, fastest: SampleTime) -> bool:
        """Return True if it is over the limit of a fast size by more than its error, or by much.

        The fastest one can be faster still, which changes nothing.
        """
        return self._over(fastest) > min(_ERRORS * self.error, _MOST_OVER)

    def may_be_fast(self, fastest: SampleTime) -> bool:
        """Return True if it is within the limit of a fast size, or over it by at most its error."""
        return self._over(fastest) <= _ERRORS * self.error

    def is_fast(self, fastest: SampleTime) -> bool:
        """Return True if it is within the limit of a fast size by more than the error of that."""
        return self == fastest or -self._over(fastest) > _ERRORS * fastest.error

    def _over(self, fastest: SampleTime) -> float:
        return FAST_ENOUGH * self.seconds / fastest.seconds - 1


@dataclass(frozen=True, slots=True)
class Preference:
    """Order of sizes that are about as fast; without one (None) the largest is taken."""

    own_size: int | None  # the user's own batch size, which comes first; None if it is not known
    has_batch_norm: bool  # the network takes statistics of a micro-batch
    is_split: bool  # a size is one of several micro-batches of the same update

    def undecided(self, sizes: Collection[int], times: Mapping[int, SampleTime]) -> Collection[int]:
        """Return the sizes whose errors decide which of `sizes` is taken, and the fastest of all.

        Returns nothing if the choice is settled.
        """
        if not times:
            return ()
        fastest = min(times, key=lambda size: times[size].seconds)
        doubtful = set()
        for size in self.order(sizes):
            if times[size].is_fast(times[fastest]):
                break
            if times[size].may_be_fast(times[fastest]):
                doubtful |= {size, fastest}
        return doubtful

    def order(self, sizes: Collection[int]) -> list[int]:
        """Return the sizes worth taking, the preferred one first.

        The smallest comes first: it leaves memory, and gives more updates if there is no target.
        With BatchNorm sizes of 16 or more come alone if there are any, and the largest part of an
        update first.
        """
        ordered = sorted(set(sizes), reverse=self.has_batch_norm and self.is_split)
        if self.has_batch_norm:
            enough = [size for size in ordered if size >= _ENOUGH_FOR_STATISTICS]
            ordered = enough or sorted(ordered, reverse=True)
        own = [size for size in {*sizes} if size == self.own_size]
        return [*own, *(size for size in ordered if size not in own)]
