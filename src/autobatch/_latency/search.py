"""Find the largest batch within a latency limit by timing calls."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from autobatch._latency import (
    Latency,
    Unfinished,
    crossing,
    enough_calls,
    ladder,
    largest_within,
    may_be_over,
    next_size,
    promising,
    slowest,
    smallest_over,
)
from autobatch._report.units import SECONDS, quantity
from autobatch._trials.timing import time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autobatch._latency import LatencyLimit
    from autobatch._trials.context import TrialContext
    from autobatch._trials.runner import TrialRunner
    from autobatch._trials.workload import Workload


SECONDS_TIMED: Final = 20.0  # that all timing may take
# Of it, what may be spent by the time that the largest in time is found, and that it has calls enough
_SEEKING: Final = 0.6
_SETTLING: Final = 0.85
_STEPS: Final = 24  # sizes that are asked about in one go: a doubt of 1 : 100,000 is gone by then
_GROWTH: Final = 16  # times a size, for the next to try, where that is fast
_BEYOND: Final = 4  # times the limit, that the next may take
_DOUBT: Final = 2.0  # seconds, for the calls of a size that are over the limit only in part
_HICCUP: Final = 0.5  # seconds; no disturbance takes so long as to be taken for a step
_TICK: Final = 1e-9  # seconds; a clock may not have moved at all
_MISS: Final = 1 / 16  # of a size that is foretold to take as long as the limit


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of the calls it has timed."""

    latencies: tuple[Latency, ...]
    too_slow: frozenset[int]  # sizes of which even the fastest call is over the limit
    spent: float  # seconds
    agrees: bool  # to what it was asked


class LatencySearch:
    """What each size answers in, the same on every rank: as slow as the slowest.

    Args:
        limit: What a call may take.
        trials: The runner of the trials; every rank times with it.
    """

    def __init__(self, limit: LatencyLimit, trials: TrialRunner) -> None:
        self.latencies: tuple[Latency, ...] = ()
        self.limit = limit
        self._trials = trials
        self._calls = LatencyTimer(trials.workload, trials.context)
        self._enough = enough_calls(limit.percentile)
        self._too_slow: frozenset[int] = frozenset()
        self._refused: frozenset[int] = frozenset()  # by memory, once they were timed
        self._spent = 0.0  # seconds, by the rank that spent most
        self._is_out_of_time = False
        self._lacks_trials = False

    @property
    def _steps(self) -> Mapping[int, float]:
        """Seconds of a step of each size that fits; of what memory refused since, beyond any limit."""
        return {**self._trials.step_seconds, **dict.fromkeys(self._refused, math.inf)}

    # How far trials go

    @property
    def reach(self) -> int:
        """How far to go up from the largest size that fits: where steps are slow, one too many is dear."""
        steps = self._steps
        size = max(steps)
        if steps[size] > _HICCUP:
            aim = (1 + _MISS) * self._foretold(steps)
            return max(size + 1, int(min(2 * size, aim)))
        slack = _BEYOND if self._longest <= _HICCUP else 1 + _MISS
        most = slack * self._longest / steps[size] if steps[size] else _GROWTH
        return int(size * max(2, min(_GROWTH, most)))

    def beyond(self, size: int) -> str | None:
        """Why nothing above a size that fits is of use; None where a larger one may be within the limit."""
        step = self._steps[size]
        if step <= self._longest:
            return None
        limit = f"latency_limit={self.limit.seconds:g} seconds"
        if step <= _HICCUP:
            # A few quick steps arouse suspicion, no more
            over = self._is_too_slow(size)
            return f"at {size} every call takes longer than {limit}" if over else None
        took = quantity(step, SECONDS)
        if step > self.limit.seconds:
            return f"at {size} a step of its trial took {took}, longer than {limit}"
        return (
            f"at {size} a step of its trial took {took}, too long to be timed again and again in "
            f"{SECONDS_TIMED:g} seconds"
        )

    @property
    def _longest(self) -> float:
        """Seconds of a call that is of use: one is left out before the first that is timed."""
        return min(self.limit.seconds, SECONDS_TIMED / 2)

    def _foretold(self, steps: Mapping[int, float]) -> float:
        """The size whose step should take as long as a call may."""
        *_, small, size = 0, *sorted(steps)
        lower = (small, steps.get(small, 0.0))
        return max(0.0, crossing(lower, (size, steps[size]), self._longest))

    def _is_too_slow(self, size: int) -> bool:
        """Whether it is over the limit with the fastest of its first calls."""
        if size not in self._timed and self._has_time(size, SECONDS_TIMED):
            self._turn(size, SECONDS_TIMED)
        return size in self._too_slow

    # What is timed

    def measure(self) -> None:
        """Find the largest size that answers in time, make sure of it, and time smaller ones, in this order.

        Where there is time for enough calls of all of them, they take turns.
        """
        self._seek(_SEEKING * SECONDS_TIMED)
        self._take_turns()
        self._settle(_SETTLING * SECONDS_TIMED)
        self._survey()
        self._settle(SECONDS_TIMED)
        if not self.latencies:
            # A single call takes longer than all timing should: two of them are better than no answer
            steps, seconds = self._trials.step_seconds, self.limit.seconds
            in_time = [size for size, step in steps.items() if step <= seconds]
            self._stay(max(in_time, default=min(steps)), 1, math.inf)

    @property
    def unfinished(self) -> Unfinished:
        """What there was no time for, or no trial."""
        seconds, steps = self.limit.seconds, self._steps
        best = largest_within(self.latencies, seconds)
        over = smallest_over(self.latencies, self._trials.step_seconds, seconds)
        timed = set(self._timed)
        below = ladder(best.batch_size) if best else []
        is_cut = self._is_out_of_time and not self._lacks_trials
        return Unfinished(
            seconds=SECONDS_TIMED if is_cut else None,
            is_open=next_size(self.latencies, steps, seconds, math.inf) is not None,
            over=over,
            by_trial=over is not None and over not in timed,
            left_out=tuple(size for size in below if size not in timed),
        )

    def _seek(self, until: float) -> None:
        """Time what tells most about where the limit lies: one turn each, and more where that leaves a doubt."""
        for _ in range(_STEPS):
            affordable = max(0.0, until - self._spent) / 2
            size = next_size(self.latencies, self._steps, self.limit.seconds, affordable)
            if size is None:
                break
            if size not in self._steps:
                if not (self._has_time(size, until) and self._is_run(size)):
                    self._settle_for_less(affordable, until)
                    break
            elif not self._look_at(size, until):
                break
        unasked = next_size(self.latencies, self._steps, self.limit.seconds, math.inf)
        if unasked is not None:
            self._is_out_of_time |= not self._affords(unasked, until)

    def _is_run(self, size: int) -> bool:
        """Whether a trial shows that it fits; else none is to come that would say where the limit lies."""
        fits = self._trials.fits(size)
        self._lacks_trials |= not fits
        return fits

    def _settle_for_less(self, affordable: float, until: float) -> None:
        """Time the largest size that its trial shows to be in time, where there are to be no more trials."""
        limit = self.limit.seconds
        aim = min(limit, affordable)
        size = promising(self.latencies, self._steps, limit, aim)
        if size is not None:
            self._look_at(size, until)

    def _look_at(self, size: int, until: float) -> bool:
        """Time a turn; where only some of its calls are over the limit, as many as it takes; False without time.

        Of slow calls trials have told where to look: it is the one, and the first call, left out, is paid for once.
        """
        if not self._has_time(size, until):
            return False
        if self._steps[size] > _HICCUP:
            return self._stay(size, self._enough, _SETTLING * SECONDS_TIMED)
        if not self._turn(size, until):
            return False
        here = self._latency(size)
        if (
            here is not None
            and here.p50_seconds <= self.limit.seconds < here.at_percentile_seconds
            and self._enough * here.p50_seconds < _DOUBT
        ):
            # Of the calls of one turn, a single one that was disturbed decides
            self._rounds([size], until)
        return True

    def _take_turns(self) -> None:
        """Calls enough for powers of two up to the largest in time, if there is time for all of them."""
        best = largest_within(self.latencies, self.limit.seconds)
        if best is None:
            return
        sizes = ladder(best.batch_size)
        needed = sum(self._seconds_for(size) for size in sizes)
        if self._spent + needed > _SETTLING * SECONDS_TIMED:
            return
        self._rounds([size for size in sizes if self._trials.fits(size)], SECONDS_TIMED)

    def _seconds_for(self, size: int) -> float:
        """What the calls would take that a size still lacks, with those that are left out."""
        known = self._latency(size)
        lacking = max(0, self._enough - (known.calls if known else 0))
        return lacking / 10 * turn_seconds(self._expected(size))

    def _settle(self, until: float) -> None:
        """As many calls as it takes for the largest size that seems to be within the limit, or for the next."""
        while True:
            self._seek(until)
            best = largest_within(self.latencies, self.limit.seconds)
            if best is None or best.calls >= self._enough:
                return
            size, lacking = best.batch_size, self._enough - best.calls
            if not self._has_time(size, until):
                return
            self._stay(size, lacking, until)

    def _survey(self) -> None:
        """Smaller sizes, for what they give: a single sample first, and then from the slowest on."""
        best = largest_within(self.latencies, self.limit.seconds)
        first, *others = ladder(best.batch_size) if best else [min(self._trials.step_seconds)]
        sizes = [first, *reversed(others)]
        for size in sizes:
            if size in self._timed or not self._affords(size, SECONDS_TIMED):
                continue
            if self._trials.fits(size):
                self._turn(size, SECONDS_TIMED)
        self._rounds([s for s in sizes if s in self._timed], SECONDS_TIMED)

    # How long things take, and whether there is time for them

    @property
    def _timed(self) -> list[int]:
        return [each.batch_size for each in self.latencies]

    def _latency(self, size: int) -> Latency | None:
        return next((e for e in self.latencies if e.batch_size == size), None)

    def _expected(self, size: int) -> float:
        """Seconds of a call: as timed, as in its trial, or as the sizes around it tell."""
        known = {
            **self._trials.step_seconds,
            **{e.batch_size: e.p50_seconds for e in self.latencies},
        }
        if size in known:
            return known[size]
        sizes = sorted(known)
        above = bisect_left(sizes, size)
        if above == 0:
            return known[sizes[0]]
        low = sizes[above - 1]
        if above == len(sizes):
            return known[low] * size / low
        high = sizes[above]
        share = (size - low) / (high - low)
        return (1 - share) * known[low] + share * known[high]

    def _has_time(self, size: int, until: float) -> bool:
        affords = self._affords(size, until)
        self._is_out_of_time |= not affords
        return affords

    def _affords(self, size: int, until: float) -> bool:
        return self._together(partial(self._calls.affords, self._expected(size), until))

    def _turn(self, size: int, until: float) -> bool:
        expected = self._expected(size)
        return self._ran(size, partial(self._calls.turn, size, expected, until))

    def _stay(self, size: int, calls: int, until: float) -> bool:
        """Time so many calls in one go, fewer where more are over the limit than the percentile allows."""
        expected = self._expected(size)
        known = self._calls.seconds.get(size, [])
        room = (until - self._calls.spent) / max(expected, _TICK)
        many = len(known) + int(min(calls, max(1.0, room)))
        spare = may_be_over(many, self.limit.percentile)

        def is_done(seconds: Sequence[float]) -> bool:
            late = sum(each > self.limit.seconds for each in (*known, *seconds))
            return len(seconds) >= calls or late > spare

        return self._ran(size, partial(self._calls.stay, size, expected, is_done, until))

    def _ran(self, size: int, act: Callable[[], bool]) -> bool:
        """Whether a size was timed: others may have taken the memory since its trial."""
        ran = self._together(act)
        if not ran:
            self._refused |= {size}
        return ran

    def _rounds(self, sizes: list[int], until: float) -> None:
        expected = {size: self._expected(size) for size in sizes}
        self._together(lambda: self._calls.rounds(expected, self._is_known, until))

    def _is_known(self, seconds: Sequence[float]) -> bool:
        """Whether the calls of a size are enough, or show that it is too slow in any case."""
        return len(seconds) >= self._enough or self._is_over(seconds)

    def _is_over(self, seconds: Sequence[float]) -> bool:
        return min(seconds, default=0.0) > self.limit.seconds

    def _together(self, act: Callable[[], object]) -> bool:
        """Let every rank act, put everything back, and take in what they have timed; whether all of them agreed."""

        def told() -> _Told:
            agreed = act()
            self._trials.context.snapshot.restore()
            return self._told(agrees=bool(agreed))

        said = self._trials.everywhere(told)
        everywhere = frozenset.intersection(
            *(frozenset(each.batch_size for each in told.latencies) for told in said)
        )
        self.latencies = tuple(
            each
            for each in slowest(told.latencies for told in said)
            if each.batch_size in everywhere
        )
        self._too_slow = frozenset.union(*(told.too_slow for told in said))
        self._spent = max(told.spent for told in said)
        return all(told.agrees for told in said)

    def _told(self, *, agrees: bool) -> _Told:
        timed = {size: each for size, each in self._calls.seconds.items() if each}
        return _Told(
            latencies=tuple(
                Latency.of(size, seconds, self.limit.percentile) for size, seconds in timed.items()
            ),
            too_slow=frozenset(size for size, seconds in timed.items() if self._is_over(seconds)),
            spent=self._calls.spent,
            agrees=agrees,
        )


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


class LatencyTimer:
    """Times calls, on this rank.

    How long they take differs from minute to minute: where sizes take turns, this falls on all of them alike.

    Args:
        workload: Answers one batch each time it yields.
        context: What trials run on.
    """

    def __init__(self, workload: Workload, context: TrialContext) -> None:
        self.seconds: dict[int, list[float]] = {}  # of each call, by size
        self.spent = 0.0  # seconds, all told
        self._workload = workload
        self._context = context

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
        clock = self._context.probe.clock
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
            context=self._context,
        )
        self.spent += clock() - began
        # Of what does not fit any more, no call counts
        known = self.seconds.get(size, [])
        self.seconds[size] = [] if seconds is None else [*known, *seconds]
        return seconds is not None
