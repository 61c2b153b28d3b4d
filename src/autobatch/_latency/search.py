"""Find the largest batch within a latency limit by timing calls.

Trials show roughly how long a size takes; timed calls decide. The search narrows down between the
largest size within the limit and the smallest above it, times the answer well, and then smaller
sizes. docs/latency-search.md compares it with plain bisection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from autobatch._latency import (
    FEWEST_CALLS,
    SMALLEST_SECONDS,
    Latency,
    TooSlow,
    Unfinished,
    best_within,
    calls_above,
    enough_calls,
    largest_within,
    slowest,
)
from autobatch._latency.timer import Goal, LatencyTimer, turn_seconds, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from autobatch._settings import LatencyLimit
    from autobatch._trials.runner import TrialRunner

SECONDS_TIMED: Final = 20.0  # limit of all timed calls together
_FOR_ANSWER: Final = 0.85  # share of it for the answer, if its calls are too slow for 100 of them
# Seconds of a call; 100 slower ones take more than half of the time, so trials alone find the size
SLOW_CALL: Final = SECONDS_TIMED / 2 / FEWEST_CALLS
_CLOSE: Final = 1 / 32  # of a size: the range in which the search ends
# Share of the range that the next size keeps from both of its ends, so that it always shrinks
_MARGIN: Final = 1 / 4
# The next size of the memory search: at most this many times the largest that fits …
_GROWTH: Final = 16
# … and expected to take at most this many times the limit, of quick calls and of slow ones
_OVERSHOOT: Final = 4.0
_OVERSHOOT_SLOW: Final = 1 + 1 / 16


class LatencySearch:
    """Find the largest size within a limit; every rank times calls, and the slowest decides."""

    def __init__(self, limit: LatencyLimit, trials: TrialRunner) -> None:
        self.limit = limit
        self.latencies: tuple[Latency, ...] = ()  # of the sizes that were timed, ascending
        self._trials = trials
        self._timer = LatencyTimer(trials.workload, trials.context)
        self._enough = enough_calls(limit.percentile)
        # Longest call of which two, a warm-up and a timed one, fit into the time
        self._longest = min(limit.seconds, _FOR_ANSWER * SECONDS_TIMED / 2)
        self._out_of_memory: frozenset[int] = frozenset()  # when they were timed
        self.spent = 0.0  # seconds of timed calls, on the rank that spent most
        self._is_out_of_time = False
        self._lacks_trials = False

    @property
    def reach(self) -> int:
        """The largest size that is worth a trial next, above the largest that fits."""
        steps = self._known.steps
        size = max(steps)
        if steps[size] > SLOW_CALL:
            smaller = max((other for other in steps if other < size), default=0)
            lower = (smaller, steps.get(smaller, 0.0))
            crossing = _crossing(lower, (size, steps[size]), self._longest)
            return max(size + 1, int(min(2 * size, _OVERSHOOT_SLOW * max(0.0, crossing))))
        overshoot = _OVERSHOOT if self._longest <= SLOW_CALL else _OVERSHOOT_SLOW
        growth = overshoot * self._longest / max(steps[size], SMALLEST_SECONDS)
        return int(size * max(2, min(_GROWTH, growth)))

    def too_slow(self, size: int) -> TooSlow | None:
        """Return the reason why nothing above a size that fits is of use; None if it may be."""
        step, limit = self._known.steps[size], self.limit.seconds
        if step <= self._longest:
            return None
        if step > SLOW_CALL:
            return TooSlow(size, step)
        # A few quick steps may have been disturbed: calls decide
        latency = self._latency(size)
        if latency is None and self._check_time(size, FEWEST_CALLS):
            self._time_turn(size)
            latency = self._latency(size)
        if latency is None or min(latency.p50_seconds, latency.at_percentile_seconds) <= limit:
            return None
        return TooSlow(size, None)

    def measure(self) -> None:
        """Find the largest size within the limit, time it well, and then time smaller sizes."""
        self._find_largest()
        self._time_smaller()
        self._time_answer()
        if not self.latencies:
            # A call takes longer than all timing should: one timed call is better than none
            steps = self._trials.step_seconds
            in_time = (size for size, step in steps.items() if step <= self.limit.seconds)
            size = max(in_time, default=min(steps))
            once = Goal(1, math.inf, 0)
            self._on_every_rank(partial(self._timer.stay, size, math.inf, once, math.inf))

    @property
    def unfinished(self) -> Unfinished:
        """Sizes for which time or trials were missing."""
        known, best = self._known, self._best
        over = min(known.over(self.limit.seconds), default=None)
        below = _powers_of_two(best.batch_size) if best else []
        is_cut = self._is_out_of_time and not self._lacks_trials
        return Unfinished(
            seconds=SECONDS_TIMED if is_cut else None,
            is_open=known.next_size(self.limit.seconds) is not None,
            over=over,
            by_trial=over is not None and over not in known.timed,
            left_out=tuple(size for size in below if size not in known.timed),
        )

    def _find_largest(self) -> None:
        """Time sizes around the limit, until the largest within it has enough calls."""
        while True:
            while (size := self._next_size()) is not None and self._time_candidate(size):
                pass
            best = self._best
            if best is None or best.calls >= self._enough:
                return
            # Where it fails, the next smaller one is timed well before sizes in between
            while best is not None and best.calls < self._enough:
                if not self._time_well(best.batch_size):
                    return
                best = self._best

    def _time_answer(self) -> None:
        """Time the size that will be chosen, until it has enough calls."""
        limit = self.limit.seconds
        while (best := best_within(self.latencies, limit)) and best.calls < self._enough:
            if not self._time_well(best.batch_size):
                return

    def _next_size(self) -> int | None:
        """Run trials until the next size to time is known; None if there is none."""
        while True:
            known, left = self._known, _FOR_ANSWER * SECONDS_TIMED - self.spent
            affordable = min(self._longest, left / 2)  # the first call is not timed
            size = known.next_size(affordable)
            if size is None or size in known.steps:
                return size
            if self._lacks_trials or not self._check_time(size, 0):
                return known.candidate(affordable)
            self._lacks_trials = not self._trials.verify(size)

    def _time_candidate(self, size: int) -> bool:
        """Time one turn of a quick size, or a slow size well; return False if time is out."""
        if self._expected(size) > SLOW_CALL:
            return self._time_well(size)
        # The answer comes first: afterwards there has to be time for its calls
        if not self._check_time(size, FEWEST_CALLS):
            return False
        self._time_turn(size)
        latency, limit = self._latency(size), self.limit.seconds
        is_in_doubt = latency and latency.p50_seconds <= limit < latency.at_percentile_seconds
        if is_in_doubt and self._has_time_for(size, 2 * self._enough):
            # Of the few calls of one turn, a single late one may be noise
            self._time_well(size)
        return True

    def _time_well(self, size: int) -> bool:
        """Time calls of a size until they are enough or too many are late; False if time is out."""
        latency, seconds = self._latency(size), self._expected(size)
        calls = latency.calls if latency else 0
        until = _FOR_ANSWER * SECONDS_TIMED
        fewest = self.spent + (FEWEST_CALLS - calls + warm_up(seconds)) * seconds
        if until < fewest <= SECONDS_TIMED:
            until = SECONDS_TIMED
        if self.spent + turn_seconds(seconds) > until:
            self._is_out_of_time = True
            return False
        affordable = calls + max(1, int((until - self.spent) / seconds))
        goal = self._goal(min(self._enough, affordable))
        self._on_every_rank(partial(self._timer.stay, size, seconds, goal, until), size)
        return True

    def _time_smaller(self) -> None:
        """Time a single sample, then powers of two below the answer from the largest, in turns."""
        best = self._best
        sizes = _powers_of_two(best.batch_size) if best else [min(self._trials.step_seconds)]
        first, *others = sizes
        for size in (first, *reversed(others)):
            is_new = self._latency(size) is None
            if is_new and self._has_time_for(size, 0) and self._trials.verify(size):
                self._time_turn(size)
        expected = {size: self._expected(size) for size in sizes if self._latency(size)}
        goal = self._goal(min(self._enough, best.calls) if best else self._enough)
        self._on_every_rank(partial(self._timer.take_turns, expected, goal, SECONDS_TIMED))

    def _time_turn(self, size: int) -> None:
        seconds = self._expected(size)
        self._on_every_rank(partial(self._timer.turn, size, seconds, SECONDS_TIMED), size)

    def _goal(self, calls: int) -> Goal:
        """Return a goal that also ends when the percentile cannot be within the limit any more."""
        return Goal(calls, self.limit.seconds, calls_above(calls, self.limit.percentile))

    def _on_every_rank(self, time: Callable[[], bool], size: int | None = None) -> None:
        """Time calls on every rank and restore all state; remember `size` if memory refused it."""
        context = self._trials.context
        if size is not None:
            context.progress.trying(size)
        with context.ranks.abort_together(), context.ranks.dry():
            ran = time()
            context.snapshot.restore()
            latencies = self._timer.latencies(self.limit.percentile)
            ranks = self._trials.gather(_RankTimes(latencies, self._timer.spent, ran))
        sizes = frozenset.intersection(
            *(frozenset(each.batch_size for each in rank.latencies) for rank in ranks)
        )
        merged = slowest(rank.latencies for rank in ranks)
        self.latencies = tuple(each for each in merged if each.batch_size in sizes)
        self.spent = max(rank.spent for rank in ranks)
        if size is not None and not all(rank.ran for rank in ranks):
            self._out_of_memory |= {size}

    @property
    def _known(self) -> KnownTimes:
        # Other processes may have taken the memory since a trial
        out_of_memory = dict.fromkeys(self._out_of_memory, math.inf)
        timed = {each.batch_size: each.at_percentile_seconds for each in self.latencies}
        return KnownTimes(self.limit.seconds, timed, {**self._trials.step_seconds, **out_of_memory})

    @property
    def _best(self) -> Latency | None:
        return largest_within(self.latencies, self.limit.seconds)

    def _latency(self, size: int) -> Latency | None:
        return next((each for each in self.latencies if each.batch_size == size), None)

    def _expected(self, size: int) -> float:
        """Seconds of a call: median if timed, else of its trial, else of the next larger size."""
        timed = {each.batch_size: each.p50_seconds for each in self.latencies}
        known = {**self._trials.step_seconds, **timed}
        nearest = min((each for each in known if each >= size), default=max(known))
        return max(SMALLEST_SECONDS, known[nearest])

    def _has_time_for(self, size: int, calls: int) -> bool:
        """Return whether there is time for a turn and for further calls of the same length."""
        seconds = self._expected(size)
        return self.spent + turn_seconds(seconds) + calls * seconds <= SECONDS_TIMED

    def _check_time(self, size: int, calls: int) -> bool:
        """Return whether there is time as `_has_time_for` does; remember it if there is none."""
        has_time = self._has_time_for(size, calls)
        self._is_out_of_time |= not has_time
        return has_time


@dataclass(frozen=True, slots=True)
class KnownTimes:
    """Seconds of a call, as far as they are known."""

    limit: float  # of a call
    timed: Mapping[int, float]  # at the percentile, by size, from timed calls
    steps: Mapping[int, float]  # of a step in its trial, by size, for all sizes that fit

    def next_size(self, longest: float) -> int | None:
        """Return the size to time next, or to run a trial of; None if the answer is known.

        First the largest that its trial shows to be in time; then sizes between the largest within
        the limit and the smallest above it. Slow steps are believed without timed calls. There is
        time for calls of `longest` seconds.
        """
        candidate = self.candidate(longest)
        low, seconds = self._best, self.timed.get(self._best, 0.0)
        if candidate is not None:
            low, seconds = candidate, self.steps[candidate]
            if seconds <= SLOW_CALL:
                return candidate
        over = {size: each for size, each in self.over(longest).items() if size > low}
        if not over or seconds > longest:
            return candidate
        high = min(over)
        if high - low > max(1, _CLOSE * low):
            return _inside(low, high, _crossing((low, seconds), (high, over[high]), longest))
        if candidate is not None:
            return candidate
        return high if high not in self.timed and over[high] <= SLOW_CALL else None

    def candidate(self, longest: float) -> int | None:
        """Return the largest size above the best that is in time by its trial but not timed."""
        sizes = (
            size
            for size, seconds in self.steps.items()
            if size > self._best and size not in self.timed and seconds <= longest
        )
        return max(sizes, default=None)

    def over(self, longest: float) -> dict[int, float]:
        """Return larger sizes than the best that are over the limit, with their seconds."""
        return {
            size: seconds
            for size, seconds in {**self.steps, **self.timed}.items()
            if size > self._best and seconds > (self.limit if size in self.timed else longest)
        }

    @property
    def _best(self) -> int:
        """Largest timed size within the limit; 0 if there is none."""
        within = (size for size, seconds in self.timed.items() if seconds <= self.limit)
        return max(within, default=0)


def _crossing(lower: tuple[int, float], upper: tuple[int, float], seconds: float) -> float:
    """Size at which the line through two sizes reaches a time; infinity if it does not rise."""
    rise = (upper[1] - lower[1]) / (upper[0] - lower[0])
    return lower[0] + (seconds - lower[1]) / rise if rise > 0 else math.inf


def _inside(low: int, high: int, size: float) -> int:
    """Move a size into the range, away from both ends."""
    margin = _MARGIN * (high - low)
    kept = min(max(size, low + margin), high - margin)
    return min(max(int(kept), low + 1), high - 1)


def _powers_of_two(largest: int) -> list[int]:
    """Return the powers of two up to the largest size, and that size."""
    return sorted({*(2**power for power in range(largest.bit_length())), largest})


@dataclass(frozen=True, slots=True)
class _RankTimes:
    """Timed calls of one rank."""

    latencies: tuple[Latency, ...]
    spent: float  # seconds
    ran: bool  # False if memory did not suffice
