"""What a tuning run has found, as notes and reports ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch._throughput import settled, speed_rows

if TYPE_CHECKING:
    from autobatch._curve import CurvePoint
    from autobatch._learning_rate import LearningRateRule
    from autobatch._plan import BatchPlan
    from autobatch._throughput import SpeedRow
    from autobatch._trial import Trial

__all__ = ["Bound", "Findings", "Look", "tightest_bound"]


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest micro-batch a search may try, and the sentence that says what sets it."""

    batch_size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """How far was looked for the largest samples, on which trials run.

    Args:
        read: Samples read.
        among: Samples there are; None where that is not known.
        is_even: Whether those read were all of one size.
    """

    read: int
    among: int | None
    is_even: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """What a tuning run found, as far as a note could be about it.

    Args:
        task: What is done with the batches; only "train" makes updates.
        plan: What was chosen.
        trials: All trials, in the order they were run.
        curve: Sizes that were timed besides.
        unreached: Sizes that were to be timed for the curve, and for which there was no time.
        curve_seconds: That it may take.
        target_batch_size: The effective batch that was asked for, if one was.
        latency_limit: Seconds within which a batch has to be answered, if that was asked.
        bound: What kept the search from going higher, if anything did.
        time_limit: Seconds, if the search was stopped because of them; otherwise None.
        source: Where memory is read; a fallback gives its reason, "… because …".
        total: What the device has, in bytes.
        foreign: What others hold of it, in bytes.
        before: What was trained with until now, where that is known.
        learning_rate: How the learning rate usually goes with the batch, where a rule is known.
        dataset_size: Samples per epoch, where that is known.
        last_samples: Samples in the last micro-batch of an epoch, where that is known.
        doubts: Sentences about what was tried, which may not be what will be trained.
        remarks: Sentences from where the tuning was asked for.
        look: How far was looked for the largest samples, where that was done.
    """

    task: str
    plan: BatchPlan
    trials: tuple[Trial, ...]
    curve: tuple[CurvePoint, ...]
    unreached: tuple[int, ...]
    curve_seconds: float
    target_batch_size: int | None
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
    doubts: tuple[str, ...]
    remarks: tuple[str, ...]
    look: Look | None

    @property
    def largest_fit(self) -> int:
        """The largest micro-batch that was run and fits."""
        return max(
            (trial.batch_size for trial in settled(self.trials) if trial.fits),
            default=0,
        )

    @property
    def sizes(self) -> tuple[SpeedRow, ...]:
        """What was timed."""
        return speed_rows(self.trials, self.curve, self.plan.world_size)


def tightest_bound(
    *,
    target_batch_size: int | None,
    max_micro_batch_size: int | None,
    dataset_size: int | None,
    world_size: int,
) -> Bound | None:
    """The lowest of the bounds on a micro-batch, or None when only memory bounds it."""
    bounds = []
    if target_batch_size is not None:
        share = target_batch_size // world_size
        what = f"target_batch_size={target_batch_size}{_on(world_size)}"
        bounds.append(Bound(share, f"{what} needs no more than {share:,} at once"))
    if max_micro_batch_size is not None:
        what = f"max_micro_batch_size={max_micro_batch_size}"
        bounds.append(Bound(max_micro_batch_size, f"{what} allows no more"))
    if dataset_size is not None:
        share = dataset_size // world_size
        what = f"{dataset_size:,} samples{_on(world_size)}"
        bounds.append(Bound(share, f"an epoch of {what} has no more"))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)


def _on(world_size: int) -> str:
    return f" on {world_size} ranks" if world_size > 1 else ""
