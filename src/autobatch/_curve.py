"""The speed curve: micro-batches timed over whole updates, in turns."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CurvePoint"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One micro-batch, timed: measured.

    Args:
        batch_size: Samples per device and forward pass.
        accumulate: Micro-batches per optimizer update while it was timed.
        step_seconds: Median seconds per micro-batch, its share of the optimizer step included.
        step_seconds_low: The 10 % quantile of the same.
        step_seconds_high: The 90 % quantile of the same.
        optimizer_seconds: Median seconds of one optimizer step; None where none was seen.
        updates: Optimizer updates that were timed.
        peak: Most memory this process held, in bytes; None where it was not read.
        drift: Its later timing as a multiple of its earlier one; None where there was one only.
    """

    batch_size: int
    accumulate: int
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    optimizer_seconds: float | None
    updates: int
    peak: int | None
    drift: float | None
