"""Time single calls of a workload, one batch size after another."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._latency import Latency
from autobatch._trials.timing import time_calls
from autobatch._trials.workload import SizedWorkload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autobatch._trials.context import TrialContext
    from autobatch._trials.workload import Workload

# The calls of a size before the next size has its turn: as many as begin within the time
_TURN_CALLS: Final = 10
_TURN_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Goal:
    """Timed calls after which a size is done: enough calls, or too many that are late."""

    calls: int
    limit: float  # seconds after which a call is late
    most_late: int  # late calls that do not end it earlier

    def is_reached(self, seconds: Sequence[float]) -> bool:
        late = sum(each > self.limit for each in seconds)
        return len(seconds) >= self.calls or late > self.most_late


class LatencyTimer:
    """Times single calls of a workload on this rank; the workload answers a batch per yield."""

    def __init__(self, workload: Workload, context: TrialContext) -> None:
        self.spent = 0.0  # seconds, with the calls that are left out
        self._seconds: dict[int, list[float]] = {}  # of each call, by size
        self._workload, self._context = workload, context

    def latencies(self, percentile: float) -> tuple[Latency, ...]:
        """Return the latency of every size that was timed."""
        timed = ((size, seconds) for size, seconds in self._seconds.items() if seconds)
        return tuple(Latency.of(size, seconds, percentile) for size, seconds in timed)

    def take_turns(self, expected: Mapping[int, float], goal: Goal, until: float) -> bool:
        """Time sizes in turns until each reaches the goal, so drift affects all equally.

        Args:
            expected: Seconds of a call, by size.
            goal: Number of calls of each size, which none exceeds.
            until: Seconds that may be spent by then, earlier calls included.
        """
        waiting = list(expected)
        while waiting:
            waiting = [
                size
                for size in waiting
                if not goal.is_reached(self._seconds.get(size, ()))
                and self.spent + turn_seconds(expected[size]) <= until
                and self.turn(size, expected[size], until, goal.calls)
            ]
        return True

    def turn(self, size: int, expected: float, until: float, most: int = sys.maxsize) -> bool:
        """Time one turn of a size, up to `most` calls in all; False if it is out of memory."""
        calls = min(_TURN_CALLS, most - len(self._seconds.get(size, ())))

        def is_end(seconds: Sequence[float]) -> bool:
            return len(seconds) >= calls or sum(seconds) >= _TURN_SECONDS

        return self._time(size, expected, is_end, until)

    def stay(self, size: int, expected: float, goal: Goal, until: float) -> bool:
        """Time one size until it reaches the goal; False if it is out of memory.

        Other processes may have taken memory since the trial of the size.
        """
        known = self._seconds.get(size, [])
        return self._time(size, expected, lambda new: goal.is_reached([*known, *new]), until)

    def _time(
        self, size: int, expected: float, is_end: Callable[[Sequence[float]], bool], until: float
    ) -> bool:
        clock = self._context.probe.clock
        began, spent = clock(), self.spent

        def is_enough(seconds: Sequence[float]) -> bool:
            if not seconds:
                return False
            return spent + clock() - began + max(seconds) > until or is_end(seconds)

        seconds = time_calls(
            SizedWorkload(self._workload, size, accumulate=1, may_be_refused=False),
            before=warm_up(expected),
            is_new=size not in self._seconds,
            enough=is_enough,
            context=self._context,
        )
        self.spent += clock() - began
        # No call of a size counts that does not fit any more
        self._seconds[size] = [] if seconds is None else [*self._seconds.get(size, []), *seconds]
        return seconds is not None


def warm_up(call_seconds: float) -> int:
    """Calls that are not timed: the first starts the workload, the second may find cold caches."""
    is_slow = call_seconds >= 0.25  # noqa: PLR2004 -- seconds, beside which cold caches are nothing
    return 1 if is_slow else 2


def turn_seconds(call_seconds: float) -> float:
    """Return the time of a turn, warm-up included."""
    # One call at least, and the last one may begin just before the time is over
    seconds = call_seconds + (_TURN_SECONDS if call_seconds < _TURN_SECONDS else 0.0)
    return warm_up(call_seconds) * call_seconds + min(_TURN_CALLS * call_seconds, seconds)
