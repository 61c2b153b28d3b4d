"""Inference latency: percentiles of single calls, the largest size within a limit, streams."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FEWEST_CALLS: Final = 100  # timed at each size if there is time, whatever the percentile
SMALLEST_SECONDS: Final = 1e-9  # of a call: a clock may not have moved at all
_AS_FAST: Final = 0.99  # share of the most throughput that a smaller size may do with


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured latency of one batch size, over single calls.

    Args:
        batch_size: Samples per call.
        p50_seconds: Median.
        p90_seconds: 90th percentile.
        p99_seconds: 99th percentile.
        at_percentile_seconds: The percentile that the limit is for.
        calls: Number of timed calls; none is left out.
    """

    batch_size: int
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float
    at_percentile_seconds: float
    calls: int

    @classmethod
    def of(cls, batch_size: int, seconds: Iterable[float], percentile: float) -> Latency:
        """Return the latency that the times of single calls amount to."""
        ordered = sorted(max(each, SMALLEST_SECONDS) for each in seconds)
        p50, p90, p99, at_percentile = (
            ordered[_rank(len(ordered), each) - 1] for each in (50, 90, 99, percentile)
        )
        return cls(batch_size, p50, p90, p99, at_percentile, len(ordered))

    @property
    def samples_per_second(self) -> float:
        """Throughput of one device that answers one batch after another."""
        return self.batch_size / self.p50_seconds


def _rank(calls: int, percentile: float) -> int:
    """Rank of the percentile among the sorted calls, from 1 (nearest-rank method)."""
    return max(1, math.ceil(percentile * calls / 100))


def enough_calls(percentile: float) -> int:
    """Return the number of calls that a percentile should stand on."""
    if percentile >= 100:  # noqa: PLR2004 -- the slowest of any number of calls
        return FEWEST_CALLS
    return max(FEWEST_CALLS, round(100 / (100 - percentile)))


def calls_above(calls: int, percentile: float) -> int:
    """Return how many of the calls may be slower than the percentile."""
    return calls - _rank(calls, percentile)


def slowest(of_ranks: Iterable[Sequence[Latency]]) -> tuple[Latency, ...]:
    """Merge the latencies of several ranks, by size: each number is that of the slowest rank."""
    by_size = sorted((each for one in of_ranks for each in one), key=attrgetter("batch_size"))
    merged = []
    for size, group in groupby(by_size, attrgetter("batch_size")):
        *seconds, calls = zip(*(astuple(each)[1:] for each in group), strict=True)
        merged.append(Latency(*[size, *map(max, seconds), min(calls)]))
    return tuple(merged)


def largest_within(latencies: Iterable[Latency], seconds: float) -> Latency | None:
    """Return the largest size that is within a limit at the percentile; None if there is none."""
    within = (each for each in latencies if each.at_percentile_seconds <= seconds)
    return max(within, key=attrgetter("batch_size"), default=None)


def best_within(latencies: Iterable[Latency], seconds: float) -> Latency | None:
    """Return the smallest size within a limit that gives nearly the most samples of all within it.

    None if there is none.
    """
    within = [each for each in latencies if each.at_percentile_seconds <= seconds]
    most = max((each.samples_per_second for each in within), default=0.0)
    fast = (each for each in within if each.samples_per_second >= _AS_FAST * most)
    return min(fast, key=attrgetter("batch_size"), default=None)


@dataclass(frozen=True, slots=True)
class TooSlow:
    """A size above which no size is of use."""

    batch_size: int
    step_seconds: float | None  # of its trial; None if its calls were timed, all over the limit


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Sizes that were not timed."""

    seconds: float | None  # the limit of timing, if it ended the search
    is_open: bool  # a larger size than the one found may be within the limit
    over: int | None  # the smallest larger size that is over the limit, if one is known
    by_trial: bool  # `over` is known by its trial only
    left_out: tuple[int, ...]  # smaller sizes


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One stream of samples at one batch size, derived from measured latency.

    Args:
        batch_size: Samples per call.
        filling_seconds: Time for which the first sample of a batch waits for the last.
        worst_seconds: Time until the first sample is answered, at the percentile of the limit.
        utilisation: Share of the time in which the device is busy; above 1 it cannot keep up.
    """

    batch_size: int
    filling_seconds: float
    worst_seconds: float
    utilisation: float

    @property
    def is_stable(self) -> bool:
        """True if the device keeps up: at a utilisation of 1 a delay would never be made up."""
        return self.utilisation < 1


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of samples that arrive one by one, at each batch size.

    Args:
        rate: Samples per second.
        limit_seconds: Limit on the time until a sample is answered; None for no limit.
        rows: One row per timed size.
    """

    rate: float
    limit_seconds: float | None
    rows: tuple[StreamRow, ...]

    @property
    def best(self) -> StreamRow | None:
        """The stable size with the soonest answers; None if none is stable within the limit."""
        limit = math.inf if self.limit_seconds is None else self.limit_seconds
        fine = (row for row in self.rows if row.is_stable and row.worst_seconds <= limit)
        return min(fine, key=attrgetter("worst_seconds"), default=None)


def stream(latencies: Iterable[Latency], rate: float, limit_seconds: float | None) -> Stream:
    """Return a stream of `rate` samples per second; `ValueError` if that is not a rate."""
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
    """Return how many synchronous cameras can share a batch that is answered before the next.

    Of the timed sizes; 0 if a single frame takes too long; `ValueError` if `fps` is not a rate.
    """
    largest = largest_within(latencies, 1 / _positive("fps", fps))
    return largest.batch_size if largest else 0


def _positive(name: str, rate: float) -> float:
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 < rate < math.inf:
        raise ValueError(f"{name}={rate!r} is not a rate; give a number per second.")
    return rate
