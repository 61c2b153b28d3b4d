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

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def largest(self) -> int | None:
        """The largest size that was run, however it ended."""
        return max(self._seconds, default=None)

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
        return self.spent + expected + reserve <= self._limit

    def affordable(self, yardstick: int | None, reserve: float) -> int | None:
        """The largest size sure to be over in half of the time left; None where nothing limits it."""
        if self._limit is None or yardstick is None:
            return None
        spare = (self._limit - self.spent - reserve) / 2
        return max(1, int(yardstick * spare / max(self._seconds[yardstick], 1e-9)))
