"""One batch size, tried: run real steps, count them, time them, name the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Outcome", "Trial"]


class Outcome(StrEnum):
    """How a trial ended."""

    FIT = "fit"
    OVER_BUDGET = "over_budget"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED = "refused"  # an error of the workload's own, below a size that ran: too small for it


@dataclass(frozen=True, slots=True)
class Trial:
    """What running one batch size showed.

    Args:
        batch_size: Samples per forward pass.
        outcome: How it ended.
        peak: Most memory this process held during the trial, in bytes; None when it did not end.
        step_seconds: Seconds per micro-batch, its share of the optimizer step included; None when not timed.
        accumulate: Micro-batches per optimizer step in this trial.
        optimizer_seconds: Seconds of one optimizer step; None when not timed.
        resident: Bytes this process held when the trial began.
        profile: Bytes held after each allocation of the last step, where the probe keeps a ledger.
    """

    batch_size: int
    outcome: Outcome
    peak: int | None = None
    step_seconds: float | None = None
    accumulate: int = 1
    optimizer_seconds: float | None = None
    resident: int = 0
    profile: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it ran and stayed in the budget."""
        return self.outcome is Outcome.FIT

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second of one device."""
        return self.batch_size / self.step_seconds if self.step_seconds else None
