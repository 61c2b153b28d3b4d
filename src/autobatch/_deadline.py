"""Which trials there is time for, judged by those that ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Deadline"]


class Deadline:
    """A limit in seconds, on a device's own clock; None never ends.

    A trial is taken to last no longer than in proportion to one that ran, the `yardstick`; where none has run yet
    there is nothing to judge by, and time for it.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._began = clock()
        self._seconds: dict[int, float] = {}  # of each trial, by its size
        self._left_out = 0.0  # seconds that have a bound of their own

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def limit(self) -> float | None:
        """Seconds that there are in all, as they were asked."""
        return self._limit

    def leave_out(self, seconds: float) -> None:
        """Count so many of those spent for nothing: they have a bound of their own."""
        self._left_out += seconds

    @property
    def largest(self) -> int | None:
        """The largest size that was run, however it ended."""
        return max(self._seconds, default=None)

    def nearest(self, batch_size: int) -> int | None:
        """The smallest size that was run and is no smaller than this; the largest, where there is none."""
        above = (size for size in self._seconds if size >= batch_size)
        return min(above, default=self.largest)

    def record(self, batch_size: int, seconds: float) -> None:
        """Remember how long the trial of a size took."""
        self._seconds[batch_size] = seconds

    def seconds_of(self, batch_size: int) -> float:
        """What the trial of a size took."""
        return self._seconds[batch_size]

    def allows(self, batch_size: int, yardstick: int | None, reserve: float) -> bool:
        """Whether a trial would be over in time, with so many seconds kept for what comes after."""
        if self._limit is None or yardstick is None:
            return True
        expected = self._seconds[yardstick] * max(1.0, batch_size / yardstick)
        return self._counted + expected + reserve <= self._limit

    def affordable(self, yardstick: int | None, reserve: float) -> int | None:
        """The largest size sure to be over in half of the time left; None where nothing limits it."""
        if self._limit is None or yardstick is None:
            return None
        spare = (self._limit - self._counted - reserve) / 2
        return max(1, int(yardstick * spare / max(self._seconds[yardstick], 1e-9)))

    @property
    def _counted(self) -> float:
        return self.spent - self._left_out
