"""Result of a tuning run, as far as the notes of its report depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch._throughput import latest_by_size, speed_rows
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._throughput import CurvePoint, SpeedRow
    from autobatch._trials import Trial


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest micro-batch that a search may try, and the reason."""

    batch_size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """Number of samples read to find the largest ones, on which trials run.

    Args:
        read: Samples read.
        among: Samples in the dataset; None if unknown.
        is_even: True if all samples read have one size.
    """

    read: int
    among: int | None
    is_even: bool


@dataclass(frozen=True, slots=True)
class TuningResult:
    """Result of a tuning run, as far as notes depend on it.

    Args:
        task: Use of the batches; only "train" makes updates.
        plan: The chosen plan.
        trials: All trials, in their order.
        curve: Sizes timed after the search.
        unreached: Sizes that the curve had no time for.
        curve_seconds: Time limit of the curve.
        target_batch_size: Requested effective batch size.
        prefer: Requested choice without a target, "fast" or "largest".
        latency_limit: Requested limit for one call, in seconds.
        bound: The bound that kept the search from larger sizes.
        time_limit: Seconds, if they ended the search; otherwise None.
        source: Source of memory readings; a fallback includes its reason, "… because …".
        total: Bytes of device memory.
        foreign: Bytes held by other processes.
        before: The plan of the training so far, if known.
        learning_rate: Usual relation of learning rate and batch size, if a rule is known.
        dataset_size: Samples per epoch, if known.
        last_samples: Samples in the last micro-batch of an epoch, if known.
        trial_notes: Notes on differences between trials and training.
        plan_notes: Notes of the subject on the plan.
        look: Number of samples read to find the largest ones, if any were read.
    """

    task: str
    plan: BatchPlan
    trials: tuple[Trial, ...]
    curve: tuple[CurvePoint, ...]
    unreached: tuple[int, ...]
    curve_seconds: float
    target_batch_size: int | None
    prefer: str
    latency_limit: float | None
    bound: Bound | None
    time_limit: float | None
    source: str
    total: int
    foreign: int
    before: BatchPlan | None
    learning_rate: LearningRateRule | None
    dataset_size: int | None
    last_samples: int | None
    trial_notes: tuple[str, ...]
    plan_notes: tuple[str, ...]
    look: Look | None

    @property
    def fitting(self) -> list[Trial]:
        """Latest trial of each size that fits."""
        return [trial for trial in latest_by_size(self.trials) if trial.fits]

    @property
    def largest_fit(self) -> int:
        """The largest micro-batch that ran and fits."""
        return max((trial.batch_size for trial in self.fitting), default=0)

    @property
    def refused(self) -> list[int]:
        """Sizes for which the workload raised an error of its own."""
        return [trial.batch_size for trial in self.refusals]

    @property
    def refusals(self) -> list[Trial]:
        """Latest trial of each of these sizes."""
        trials = latest_by_size(self.trials)
        return [trial for trial in trials if trial.outcome is Outcome.REFUSED]

    @property
    def speeds(self) -> dict[int, SpeedRow]:
        """Measured speed of each size."""
        rows = speed_rows(self.trials, self.curve, self.plan.world_size)
        return {row.batch_size: row for row in rows}


def tightest_bound(
    *,
    target_batch_size: int | None,
    max_micro_batch_size: int | None,
    dataset_size: int | None,
    world_size: int,
) -> Bound | None:
    """Return the lowest bound on a micro-batch; None if only memory bounds it."""
    ranks = f" on {world_size} ranks" if world_size > 1 else ""
    bounds = []
    if target_batch_size is not None:
        size = target_batch_size // world_size
        reason = f"target_batch_size={target_batch_size}{ranks} needs no more than {size:,} at once"
        bounds.append(Bound(size, reason))
    if max_micro_batch_size is not None:
        reason = f"max_micro_batch_size={max_micro_batch_size} allows no more"
        bounds.append(Bound(max_micro_batch_size, reason))
    if dataset_size is not None:
        reason = f"an epoch of {dataset_size:,} samples{ranks} has no more"
        bounds.append(Bound(dataset_size // world_size, reason))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)
