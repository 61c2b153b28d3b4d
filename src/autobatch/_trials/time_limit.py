"""Time left for trials."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class TimeLimit:
    """A limit in seconds, measured on the clock of rank 0.

    A trial is expected to take at most as long, in proportion to its batch size, as a trial that
    ran before, the `yardstick`. Without a yardstick nothing can be estimated, and everything is
    allowed.
    """

    def __init__(self, limit: float | None, start: float) -> None:
        self.limit = limit  # seconds in all; None for no limit
        self.now = start  # the latest reading of the clock
        self._start = start
        self._trial_seconds: dict[int, float] = {}  # by batch size
        self._excluded = 0.0  # seconds that do not count

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.now - self._start

    @property
    def left(self) -> float | None:
        """Seconds until the limit; None without one."""
        return None if self.limit is None else max(0.0, self.limit - self._counted)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Do not count the time of the block, which has a limit of its own."""
        began = self.spent
        yield
        self._excluded += self.spent - began

    @property
    def largest(self) -> int | None:
        """The largest batch size that was run, whatever the outcome."""
        return max(self._trial_seconds, default=None)

    def nearest(self, batch_size: int) -> int | None:
        """Return the smallest batch size that was run and is at least this, or else the largest."""
        above = (size for size in self._trial_seconds if size >= batch_size)
        return min(above, default=self.largest)

    def record(self, batch_size: int, seconds: float) -> None:
        """Remember the duration of a trial."""
        self._trial_seconds[batch_size] = seconds

    def seconds_of(self, batch_size: int) -> float:
        """Return the duration of the latest trial of a batch size."""
        return self._trial_seconds[batch_size]

    def allows(self, batch_size: int, yardstick: int | None, reserve: float) -> bool:
        """Return whether a trial should end in time and leave `reserve` seconds."""
        if self.limit is None or yardstick is None:
            return True
        expected = self._trial_seconds[yardstick] * max(1.0, batch_size / yardstick)
        return self._counted + expected + reserve <= self.limit

    def affordable(self, yardstick: int | None, reserve: float) -> int | None:
        """Return the largest batch size expected to take half of the time left; None: any."""
        if self.limit is None or yardstick is None:
            return None
        spare = (self.limit - self._counted - reserve) / 2
        return max(1, int(yardstick * spare / max(self._trial_seconds[yardstick], 1e-9)))

    @property
    def _counted(self) -> float:
        return self.spent - self._excluded
