"""Record of one trial, a batch size that was run and measured, and views of several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from autobatch._memory import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Outcome(StrEnum):
    """Outcome of a trial, from the best to the worst."""

    FIT = "fit"
    OVER_BUDGET = "over_budget"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED = "refused"  # an error of the workload at another size than the user's own


@dataclass(frozen=True, slots=True)
class Trial:
    """Measurements of one batch size.

    Args:
        batch_size: Samples per forward pass.
        outcome: Outcome of the trial.
        peak: Most memory this process held during the trial, in bytes; None if an allocation failed
            or the trial did not end.
        step_seconds: Seconds per micro-batch, its share of the optimizer step included; None when
            not timed. Without a point on the throughput curve they may be longer, since memory was
            watched meanwhile.
        accumulate: Micro-batches per optimizer step in this trial.
        optimizer_seconds: Seconds of one optimizer step; None when not timed.
        resident: Bytes this process held when the trial began.
        profile: Bytes held after each allocation of the last step, if the probe keeps a ledger.
        error: Message of the failure, if there was one.
        allocated: Most bytes in use at once, without cached and fragmented memory; None if unknown.
        requested: The same, before the allocator rounds sizes up to blocks.
    """

    batch_size: int
    outcome: Outcome
    peak: int | None = None
    step_seconds: float | None = None
    accumulate: int = 1
    optimizer_seconds: float | None = None
    resident: int = 0
    profile: tuple[int, ...] = ()
    error: str | None = None
    allocated: int | None = None
    requested: int | None = None

    @property
    def fits(self) -> bool:
        """True if the batch size ran and stayed in the budget."""
        return self.outcome is Outcome.FIT

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second of one device."""
        return self.batch_size / self.step_seconds if self.step_seconds else None

    def judged(self, budget: int) -> Trial:
        """Return the same trial under another budget, in bytes."""
        if self.peak is None or self.outcome not in (Outcome.FIT, Outcome.OVER_BUDGET):
            return self
        return replace(self, outcome=Outcome.FIT if self.peak <= budget else Outcome.OVER_BUDGET)

    def failure(self, budget: int) -> str:
        """Return a clause for error messages about a trial that does not fit."""
        if self.outcome is Outcome.OVER_BUDGET and self.peak is not None:
            return (
                f"batch_size={self.batch_size} peaked at {format_bytes(self.peak)}, over the "
                f"budget of {format_bytes(budget)}"
            )
        verb = "was refused" if self.outcome is Outcome.REFUSED else "ran out of memory"
        message = f" ({self.error})" if self.error else ""
        return f"batch_size={self.batch_size} {verb}{message}"


def trial_accumulation(accumulate: int) -> int:
    """Return the micro-batches per update in a trial of a longer accumulation.

    From the second micro-batch on, gradients stay allocated during forward and backward; further
    ones add nothing.
    """
    return min(2, accumulate)


def latest_by_size(trials: Iterable[Trial]) -> dict[int, Trial]:
    """Return the latest trial of each size, in ascending order of size."""
    latest = {trial.batch_size: trial for trial in trials}
    return dict(sorted(latest.items()))


def refused_sizes(trials: Sequence[Trial]) -> set[int]:
    """Return the sizes that the workload refused, by an error of its own, and never ran."""
    refused = {trial.batch_size for trial in trials if trial.outcome is Outcome.REFUSED}
    return refused - {trial.batch_size for trial in trials if trial.fits}


def is_selective(trials: Sequence[Trial]) -> bool:
    """Return True if the workload refused a size for another reason than too few samples."""
    least = min((trial.batch_size for trial in trials if trial.fits), default=1)
    return any(size > least for size in refused_sizes(trials))
