"""Seconds per micro-batch and per update: measured at some sizes, interpolated between them."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch._curve import CurvePoint
    from autobatch._trial import Trial

__all__ = ["Pace"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a size takes, from what was timed.

    Between timed sizes the micro-batch seconds are read off a straight line; outside of them nothing is said.
    """

    sizes: tuple[int, ...]
    micro_seconds: tuple[
        float, ...
    ]  # forward and backward of one micro-batch, without the optimizer
    optimizer_seconds: float  # of one optimizer step, hardly dependent on the batch

    @classmethod
    def of(cls, trials: Iterable[Trial], curve: Iterable[CurvePoint]) -> Pace:
        """The pace that these show: of each size the latest trial, or the curve, which was timed longer."""
        latest = {trial.batch_size: trial for trial in trials}
        timed: dict[int, Trial | CurvePoint] = {
            size: trial for size, trial in latest.items() if trial.fits
        }
        timed |= {point.batch_size: point for point in curve}
        ordered = [each for _, each in sorted(timed.items()) if each.step_seconds]
        optimizer = sorted(each.optimizer_seconds or 0.0 for each in ordered)
        return cls(
            sizes=tuple(each.batch_size for each in ordered),
            micro_seconds=tuple(map(_micro_seconds, ordered)),
            optimizer_seconds=optimizer[len(optimizer) // 2] if optimizer else 0.0,
        )

    def micro(self, batch_size: int) -> float | None:
        """Seconds of one micro-batch of this size; None outside the sizes that were timed."""
        if not self.sizes or not self.sizes[0] <= batch_size <= self.sizes[-1]:
            return None
        right = bisect.bisect_left(self.sizes, batch_size)
        if self.sizes[right] == batch_size:
            return self.micro_seconds[right]
        low, high = self.sizes[right - 1], self.sizes[right]
        share = (batch_size - low) / (high - low)
        return (
            self.micro_seconds[right - 1] * (1 - share)
            + self.micro_seconds[right] * share
        )

    def update(self, batch_size: int, accumulate: int) -> float | None:
        """Seconds of one optimizer update of so many micro-batches; None outside the sizes that were timed."""
        micro = self.micro(batch_size)
        return None if micro is None else accumulate * micro + self.optimizer_seconds


def _micro_seconds(timed: Trial | CurvePoint) -> float:
    seconds = timed.step_seconds or 0.0
    return max(0.0, seconds - (timed.optimizer_seconds or 0.0) / timed.accumulate)
