"""Calls of a workload, timed one by one, with the sizes taking turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._trial import time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from autobatch._trial import Bench, Workload

__all__ = ["Calls"]

_TURN: Final = 10  # calls that a size has in its turn, one after the other
_TURN_SECONDS: Final = 0.5  # after which the turn of a slow one is over


class Calls:
    """Times calls, on this rank.

    How long they take differs from minute to minute: where sizes take turns, this falls on all of them alike.

    Args:
        workload: Answers one batch each time it yields.
        bench: What trials run on.
    """

    def __init__(self, workload: Workload, bench: Bench) -> None:
        self.seconds: dict[int, list[float]] = {}  # of each call, by size
        self.spent = 0.0  # seconds, all told
        self._workload = workload
        self._bench = bench
        self._took: dict[int, float] = {}  # seconds of the last turn, by size

    def rounds(
        self,
        sizes: Iterable[int],
        is_done: Callable[[Sequence[float]], bool],
        until: float,
    ) -> None:
        """Let sizes take turns until the calls of each are all it takes, or so many seconds are spent all told."""
        waiting = list(sizes)
        while waiting:
            waiting = [
                size
                for size in waiting
                if not is_done(self.seconds.get(size, ()))
                and self.affords(size, until)
                and self.turn(size)
            ]

    def affords(self, size: int, until: float) -> bool:
        """Whether the turn of a size should be over before so many seconds are spent."""
        smaller = max((each for each in self._took if each <= size), default=None)
        if smaller is None:
            return self.spent < until
        return self.spent + self._took[smaller] * size / smaller <= until

    def turn(self, size: int) -> bool:
        """Time some calls of one size; False where memory, which had room for its trial, has none any more."""
        clock = self._bench.probe.clock
        began = clock()
        seconds = time_calls(
            self._workload,
            size,
            is_new=size not in self.seconds,
            enough=_enough,
            bench=self._bench,
        )
        self._took[size] = clock() - began
        self.spent += self._took[size]
        # Of what does not fit any more, no call counts
        known = self.seconds.get(size, [])
        self.seconds[size] = [] if seconds is None else [*known, *seconds]
        return seconds is not None


def _enough(seconds: Sequence[float]) -> bool:
    return len(seconds) >= _TURN or sum(seconds) >= _TURN_SECONDS
