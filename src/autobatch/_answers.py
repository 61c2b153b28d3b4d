"""The largest batch that answers within a limit: sizes timed up to where they take too long, and then between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from autobatch._latency import (
    Latency,
    between,
    enough_calls,
    ladder,
    largest_within,
    slowest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._calls import Calls
    from autobatch._latency import LatencyLimit
    from autobatch._snapshot import Snapshot

__all__ = ["SECONDS_TIMED", "Answers"]

SECONDS_TIMED: Final = 20.0  # that all timing may take
_CLIMBING: Final = 0.6  # share of it for the powers of two
_REFINEMENTS: Final = 6  # sizes timed between two of those
_GROWTH: Final = 16  # times a size, for the next to try, where that is fast
_BEYOND: Final = 4  # times the limit, that the next may take
_HICCUP: Final = 0.5  # seconds; no disturbance takes so long as to be taken for a step


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of the calls it has timed."""

    latencies: tuple[Latency, ...]
    too_slow: frozenset[int]  # sizes of which even the fastest call is over the limit
    affords: bool  # whether there is time for what comes next


class Answers:
    """What each size answers in, the same on every rank: as slow as the slowest.

    Args:
        limit: What a call may take.
        calls: Times them, on this rank.
        fits: Whether a size was run by a trial and fits, or is run now and does.
        snapshot: Puts everything back.
        everywhere: What something gives on each of the ranks that time together.
    """

    def __init__(
        self,
        limit: LatencyLimit,
        calls: Calls,
        fits: Callable[[int], bool],
        snapshot: Snapshot,
        everywhere: Callable[[Callable[[], _Told]], Sequence[_Told]],
    ) -> None:
        self.latencies: tuple[Latency, ...] = ()
        self.is_out_of_time = False
        self.limit = limit
        self._calls = calls
        self._fits = fits
        self._snapshot = snapshot
        self._everywhere = everywhere
        self._enough = enough_calls(limit.percentile)
        self._too_slow: frozenset[int] = frozenset()

    def reach(self, size: int, seconds: float) -> int:
        """How far to go up from a size whose step takes so many seconds: it may turn out slow beyond all use."""
        most = _BEYOND * self.limit.seconds / seconds if seconds else _GROWTH
        return int(size * max(2, min(_GROWTH, most)))

    def is_beyond(self, size: int, seconds: float) -> bool:
        """Whether nothing above a size that fits, whose step took so many seconds, can be within the limit."""
        if seconds <= self.limit.seconds:
            return False
        if seconds > _HICCUP:
            return seconds > 2 * self.limit.seconds
        # A few quick steps arouse suspicion, no more
        return self._is_too_slow(size)

    def measure(self, largest: int) -> None:
        """Time powers of two up to the largest size that fits, in turns; then sizes between, where the limit lies."""
        until = _CLIMBING * SECONDS_TIMED
        self._climb(largest, until)
        hopeful = [size for size in self._timed if size not in self._too_slow]
        self._rounds(hopeful, until)
        self._refine()
        self._make_sure()

    def _refine(self) -> None:
        """One turn for each size between, which is enough to see where to go on."""
        for _ in range(_REFINEMENTS):
            size = between(self.latencies, self.limit.seconds)
            if size is None or not self._has_time(size, SECONDS_TIMED):
                return
            if not self._fits(size):
                return
            self._together(partial(self._calls.turn, size))

    def _make_sure(self) -> None:
        """As many calls as it takes for the largest size that seems to be within the limit, or for the next."""
        while best := largest_within(self.latencies, self.limit.seconds):
            size = best.batch_size
            if best.calls >= self._enough or not self._has_time(size, SECONDS_TIMED):
                return
            self._rounds([size], SECONDS_TIMED)

    def _is_too_slow(self, size: int) -> bool:
        """Whether it is over the limit with the fastest of its first calls."""
        if size not in self._timed:
            self._together(partial(self._calls.turn, size))
        return size in self._too_slow

    @property
    def _timed(self) -> list[int]:
        return [each.batch_size for each in self.latencies]

    def _climb(self, largest: int, until: float) -> None:
        """One turn for each, as far as a call can be within the limit."""
        for size in ladder(largest):
            if not self._has_time(size, until):
                return
            if self._fits(size) and self._is_too_slow(size):
                return

    def _has_time(self, size: int, until: float) -> bool:
        affords = self._together(partial(self._calls.affords, size, until))
        self.is_out_of_time |= not affords
        return affords

    def _rounds(self, sizes: list[int], until: float) -> None:
        self._together(lambda: self._calls.rounds(sizes, self._is_known, until))

    def _is_known(self, seconds: Sequence[float]) -> bool:
        """Whether the calls of a size are enough, or show that it is too slow in any case."""
        return len(seconds) >= self._enough or self._is_over(seconds)

    def _is_over(self, seconds: Sequence[float]) -> bool:
        return min(seconds, default=0.0) > self.limit.seconds

    def _together(self, act: Callable[[], object]) -> bool:
        """Let every rank act, put everything back, and take in what they have timed; whether all of them agreed."""

        def told() -> _Told:
            agreed = act()
            self._snapshot.restore()
            return self._told(affords=bool(agreed))

        said = self._everywhere(told)
        everywhere = frozenset.intersection(
            *(frozenset(each.batch_size for each in told.latencies) for told in said)
        )
        self.latencies = tuple(
            each
            for each in slowest(told.latencies for told in said)
            if each.batch_size in everywhere
        )
        self._too_slow = frozenset.union(*(told.too_slow for told in said))
        return all(told.affords for told in said)

    def _told(self, *, affords: bool) -> _Told:
        timed = {size: each for size, each in self._calls.seconds.items() if each}
        return _Told(
            latencies=tuple(
                Latency.of(size, seconds, self.limit.percentile)
                for size, seconds in timed.items()
            ),
            too_slow=frozenset(
                size for size, seconds in timed.items() if self._is_over(seconds)
            ),
            affords=affords,
        )
