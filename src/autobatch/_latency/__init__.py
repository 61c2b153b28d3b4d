"""Inference latency: percentiles, limits and streams."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Of the fastest: above the knee a larger batch buys next to nothing
_FAST_ENOUGH: Final = 0.95
_CALLS_LEAST: Final = 100  # that are timed at each size, whatever the percentile
_TICK: Final = 1e-9  # seconds; a clock may not have moved at all
# Between a size within the limit and one over it, this share of the size is close enough
_CLOSE: Final = 1 / 32
# What is tried between two sizes stays so far from either, as a share of the distance: the doubt shrinks each time
_APART: Final = 1 / 4
_HICCUP: Final = 0.5  # seconds; no disturbance takes so long as to be taken for a step


@dataclass(frozen=True, slots=True)
class LatencyLimit:
    """How long a call may take.

    Args:
        seconds: So long at most.
        percentile: So many of all calls, in percent.
    """

    seconds: float
    percentile: float


@dataclass(frozen=True, slots=True)
class Latency:
    """One batch size, answered many times: measured.

    Args:
        batch_size: Samples per call.
        p50_seconds: Half of the calls take no longer.
        p90_seconds: 90 % of the calls take no longer.
        p99_seconds: 99 % of the calls take no longer.
        at_percentile_seconds: The same for the percentile that was asked for.
        calls: How many were timed; none of them is left out.
    """

    batch_size: int
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float
    at_percentile_seconds: float
    calls: int

    @classmethod
    def of(cls, batch_size: int, seconds: Iterable[float], percentile: float) -> Latency:
        """What the times of single calls come to."""
        ordered = sorted(max(each, _TICK) for each in seconds)
        return cls(
            batch_size=batch_size,
            p50_seconds=_quantile(ordered, 50),
            p90_seconds=_quantile(ordered, 90),
            p99_seconds=_quantile(ordered, 99),
            at_percentile_seconds=_quantile(ordered, percentile),
            calls=len(ordered),
        )

    @property
    def samples_per_second(self) -> float:
        """Samples per second of one device that answers one batch after another."""
        return self.batch_size / self.p50_seconds


def _quantile(ordered: Sequence[float], percent: float) -> float:
    """A call that was made, such that so many of all took no longer: of few calls, the slowest."""
    return ordered[_rank(len(ordered), percent) - 1]


def enough_calls(percentile: float) -> int:
    """Calls of which so many percent are not simply all of them."""
    if percentile >= 100:  # noqa: PLR2004 -- the slowest of any number of calls
        return _CALLS_LEAST
    return max(_CALLS_LEAST, round(100 / (100 - percentile)))


def tells_percentile(calls: int, percentile: float) -> bool:
    """Whether so many calls tell the percentile apart from the slowest of them."""
    return _rank(calls, percentile) < calls


def may_be_over(calls: int, percentile: float) -> int:
    """How many of so many calls may be over the limit, and the percentile within."""
    return calls - _rank(calls, percentile)


def _rank(calls: int, percentile: float) -> int:
    """The how-manieth call, in ascending order, the percentile is."""
    return max(1, math.ceil(percentile * calls / 100))


def slowest(of_ranks: Iterable[Sequence[Latency]]) -> tuple[Latency, ...]:
    """The latencies of several ranks as one, in ascending order: at each size as slow as the slowest of them."""
    size = attrgetter("batch_size")
    every = sorted((each for told in of_ranks for each in told), key=size)
    return tuple(_slowest(list(each)) for _, each in groupby(every, key=size))


def _slowest(latencies: Sequence[Latency]) -> Latency:
    return replace(
        latencies[0],
        p50_seconds=max(each.p50_seconds for each in latencies),
        p90_seconds=max(each.p90_seconds for each in latencies),
        p99_seconds=max(each.p99_seconds for each in latencies),
        at_percentile_seconds=max(each.at_percentile_seconds for each in latencies),
        calls=min(each.calls for each in latencies),
    )


# Which size


def ladder(largest: int) -> list[int]:
    """Powers of two up to the largest size, and that itself."""
    powers = [2**power for power in range(largest.bit_length())]
    return powers if powers[-1] == largest else [*powers, largest]


def largest_within(latencies: Iterable[Latency], seconds: float) -> Latency | None:
    """The largest size that answers in time, at the percentile that was asked for; None where none of them does."""
    within = (each for each in latencies if each.at_percentile_seconds <= seconds)
    return max(within, key=attrgetter("batch_size"), default=None)


def smallest_over(
    latencies: Sequence[Latency], steps: Mapping[int, float], seconds: float
) -> int | None:
    """The smallest size above the largest that answers in time which does not, by its calls or else by its trial."""
    best = largest_within(latencies, seconds)
    return min(_over(latencies, steps, best, seconds, seconds), default=None)


def next_size(
    latencies: Sequence[Latency],
    steps: Mapping[int, float],
    seconds: float,
    affordable: float,
) -> int | None:
    """The size whose calls tell most about the largest that answers in time; None where nothing is left to ask.

    First the largest that its trial shows to be in time; then between the largest that answers in time and the next
    that does not. Of slow steps the trial is believed where it says that a size is over the limit.

    Args:
        latencies: Of sizes that were timed.
        steps: Seconds of a step in its trial, by size, of all sizes that fit.
        seconds: The limit.
        affordable: Seconds of a call for which there is time.
    """
    timed = {each.batch_size for each in latencies}
    aim = min(seconds, affordable)
    best = largest_within(latencies, seconds)
    low, took = (best.batch_size, best.at_percentile_seconds) if best else (0, 0.0)
    soon = promising(latencies, steps, seconds, aim)
    if soon is not None:
        if steps[soon] <= _HICCUP:
            return soon
        # Slow as it is, whether it is the largest is asked of trials first
        low, took = soon, steps[soon]
    over = {
        size: each
        for size, each in _over(latencies, steps, best, seconds, aim).items()
        if size > low
    }
    if not over or took > aim:
        return soon
    high = min(over)
    if high - low > max(1, _CLOSE * low):
        return _inside(low, high, crossing((low, took), (high, over[high]), aim))
    if soon is not None:
        return soon
    return high if high not in timed and over[high] <= _HICCUP else None


def promising(
    latencies: Sequence[Latency], steps: Mapping[int, float], seconds: float, aim: float
) -> int | None:
    """The largest size above all that answer in time that was not timed, but took no longer than `aim` in its trial."""
    best = largest_within(latencies, seconds)
    low = best.batch_size if best else 0
    timed = {each.batch_size for each in latencies}
    return max(
        (s for s, step in steps.items() if s > low and s not in timed and step <= aim),
        default=None,
    )


def _over(
    latencies: Iterable[Latency],
    steps: Mapping[int, float],
    best: Latency | None,
    seconds: float,
    aim: float,
) -> dict[int, float]:
    """Sizes above the best that are over the limit, with what they take; by their trials where they were not timed."""
    timed = {each.batch_size: each.at_percentile_seconds for each in latencies}
    over = {size: took for size, took in timed.items() if took > seconds}
    over |= {s: step for s, step in steps.items() if s not in timed and step > aim}
    low = best.batch_size if best else 0
    return {size: took for size, took in over.items() if size > low}


def crossing(lower: tuple[int, float], upper: tuple[int, float], seconds: float) -> float:
    """The size at which a line through two sizes and their seconds takes so many; infinity where it does not rise."""
    rise = (upper[1] - lower[1]) / (upper[0] - lower[0])
    return lower[0] + (seconds - lower[1]) / rise if rise > 0 else math.inf


def _inside(low: int, high: int, size: float) -> int:
    """The size, kept away from both ends."""
    apart = _APART * (high - low)
    kept = min(max(size, low + apart), high - apart)
    return min(max(int(kept), low + 1), high - 1)


def knee(latencies: Iterable[Latency]) -> Latency | None:
    """The smallest size with nearly all of the throughput of the fastest; None where nothing was timed."""
    ascending = sorted(latencies, key=attrgetter("batch_size"))
    fastest = max((each.samples_per_second for each in ascending), default=0.0)
    fast = (e for e in ascending if e.samples_per_second >= _FAST_ENOUGH * fastest)
    return next(fast, None)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What timing did not come to.

    Args:
        seconds: That timing may take, where they ran out; None where something else ended it.
        is_open: Whether a larger size than the one that was found may answer in time as well.
        over: The smallest size that is known to be over the limit; None where none is.
        by_trial: Whether that one is known by its trial only.
        left_out: Smaller sizes that were not timed.
    """

    seconds: float | None
    is_open: bool
    over: int | None
    by_trial: bool
    left_out: tuple[int, ...]


# What comes in


@dataclass(frozen=True, slots=True)
class StreamRow:
    """What a stream of samples gets at one batch size: derived from measured latencies.

    Args:
        batch_size: Samples per call.
        filling_seconds: How long the first sample of a batch waits for its last.
        worst_seconds: How long that first sample waits for its answer, at the percentile that was asked for.
        utilisation: Share of the time in which the device is busy, more than 1 where it can not keep up.
    """

    batch_size: int
    filling_seconds: float
    worst_seconds: float
    utilisation: float

    @property
    def is_stable(self) -> bool:
        """Whether the device keeps up: at a utilisation of 1 any delay would last for ever."""
        return self.utilisation < 1


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of samples that come one by one, and what it gets at each batch size.

    Args:
        rate: Samples per second.
        limit_seconds: How long an answer may take; None where nothing was asked.
        rows: Of each size that was timed.
    """

    rate: float
    limit_seconds: float | None
    rows: tuple[StreamRow, ...]

    @property
    def best(self) -> StreamRow | None:
        """The size whose slowest answers come soonest; None where none keeps up and answers within the limit."""
        most = math.inf if self.limit_seconds is None else self.limit_seconds
        fine = (row for row in self.rows if row.is_stable and row.worst_seconds <= most)
        return min(fine, key=attrgetter("worst_seconds"), default=None)


def stream(latencies: Iterable[Latency], rate: float, limit_seconds: float | None) -> Stream:
    """What a stream of so many samples per second gets; `ValueError` where that is no rate."""
    rows = tuple(_stream_row(each, _positive("rate", rate)) for each in latencies)
    return Stream(rate, limit_seconds, rows)


def _stream_row(latency: Latency, rate: float) -> StreamRow:
    filling = (latency.batch_size - 1) / rate
    return StreamRow(
        batch_size=latency.batch_size,
        filling_seconds=filling,
        worst_seconds=filling + latency.at_percentile_seconds,
        utilisation=rate / latency.samples_per_second,
    )


def cameras(latencies: Iterable[Latency], fps: float) -> int:
    """Cameras that take their frames together, so many per second, and are answered in one batch before the next.

    Of the sizes that were timed; 0 where not even one frame is answered in time; `ValueError` where `fps` is no rate.
    """
    most = largest_within(latencies, 1 / _positive("fps", fps))
    return most.batch_size if most else 0


def _positive(name: str, rate: float) -> float:
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 < rate < math.inf:
        raise ValueError(f"{name}={rate!r} is not a rate; give a number per second.")
    return rate
