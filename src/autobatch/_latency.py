"""How long a batch takes to answer, and how many samples come through: what inference asks of a batch size."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Latency"]


@dataclass(frozen=True, slots=True)
class Latency:
    """One batch size, answered many times: measured.

    Args:
        batch_size: Samples per call.
        p50: Median seconds of one call.
        p90: 90 % of calls take no longer, in seconds.
        p99: 99 % of calls take no longer, in seconds.
        at_percentile: The same for the percentile that was asked for, in seconds.
        calls: How many were timed; none is left out.
    """

    batch_size: int
    p50: float
    p90: float
    p99: float
    at_percentile: float
    calls: int
