"""Seconds per micro-batch and per update: measured at some sizes, interpolated between them."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch._trial import Trial

__all__ = ["Pace"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a size takes, from the trials that were timed.

    Between timed sizes the micro-batch seconds are read off a straight line; outside of them nothing is said.
    """

    sizes: tuple[int, ...]
    micro_seconds: tuple[
        float, ...
    ]  # forward and backward of one micro-batch, without the optimizer
    optimizer_seconds: float  # of one optimizer step, hardly dependent on the batch

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> Pace:
        """The pace that these trials show, the latest of each size counting."""
        latest = {trial.batch_size: trial for trial in trials}
        ordered = [
            trial
            for _, trial in sorted(latest.items())
            if trial.fits and trial.step_seconds
        ]
        optimizer = [trial.optimizer_seconds or 0.0 for trial in ordered]
        return cls(
            sizes=tuple(trial.batch_size for trial in ordered),
            micro_seconds=tuple(map(_micro_seconds, ordered)),
            optimizer_seconds=sorted(optimizer)[len(optimizer) // 2]
            if optimizer
            else 0.0,
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


def _micro_seconds(trial: Trial) -> float:
    seconds = trial.step_seconds or 0.0
    return max(0.0, seconds - (trial.optimizer_seconds or 0.0) / trial.accumulate)
