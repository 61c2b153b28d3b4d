"""Calls of a workload, timed one by one, with the sizes taking turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._timing import time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autobatch._workload import Bench, Workload

__all__ = ["Calls", "turn_seconds"]

_TURN: Final = 10  # calls that a size has in its turn, one after the other
_TURN_SECONDS: Final = 0.5  # after which the turn of a slow one is over
# Before those that are timed: the first starts the workload, the second may still find caches cold
_BEFORE: Final = 2
_SLOW: Final = 0.25  # seconds of a call, beside which cold caches are nothing


def _before(call_seconds: float) -> int:
    """How many calls of a turn are left out."""
    return 1 if call_seconds >= _SLOW else _BEFORE


def turn_seconds(call_seconds: float) -> float:
    """What a turn takes, all its calls together."""
    most = call_seconds + (_TURN_SECONDS if call_seconds < _TURN_SECONDS else 0.0)
    return _before(call_seconds) * call_seconds + min(_TURN * call_seconds, most)


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

    def rounds(
        self,
        expected: Mapping[int, float],
        is_done: Callable[[Sequence[float]], bool],
        until: float,
    ) -> None:
        """Let sizes take turns until the calls of each are all it takes, or so many seconds are spent all told.

        `expected` is what a call of each size takes.
        """
        waiting = list(expected)
        while waiting:
            waiting = [
                size
                for size in waiting
                if not is_done(self.seconds.get(size, ()))
                and self.affords(expected[size], until)
                and self.turn(size, expected[size], until)
            ]

    def affords(self, call_seconds: float, until: float) -> bool:
        """Whether a turn of calls that take so long should be over before so many seconds are spent."""
        return self.spent + turn_seconds(call_seconds) <= until

    def turn(self, size: int, call_seconds: float, until: float) -> bool:
        """Time some calls of one size; False where memory, which had room for its trial, has none any more."""
        return self._time(
            size,
            call_seconds,
            until,
            lambda seconds: len(seconds) >= _TURN or sum(seconds) >= _TURN_SECONDS,
        )

    def stay(
        self,
        size: int,
        call_seconds: float,
        is_done: Callable[[Sequence[float]], bool],
        until: float,
    ) -> bool:
        """Time calls of one size, one after the other, until they are all it takes; False likewise."""
        return self._time(size, call_seconds, until, is_done)

    def _time(
        self,
        size: int,
        call_seconds: float,
        until: float,
        enough: Callable[[Sequence[float]], bool],
    ) -> bool:
        clock = self._bench.probe.clock
        began, spent = clock(), self.spent

        def is_over(seconds: Sequence[float]) -> bool:
            if not seconds or enough(seconds):
                return bool(seconds)
            return spent + clock() - began + max(seconds) > until

        seconds = time_calls(
            self._workload,
            size,
            before=_before(call_seconds),
            is_new=size not in self.seconds,
            enough=is_over,
            bench=self._bench,
        )
        self.spent += clock() - began
        # Of what does not fit any more, no call counts
        known = self.seconds.get(size, [])
        self.seconds[size] = [] if seconds is None else [*known, *seconds]
        return seconds is not None
