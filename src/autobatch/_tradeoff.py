"""Speed curve and updates per epoch: what a batch size costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from autobatch._pace import Pace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._plan import BatchPlan
    from autobatch._trial import Trial

__all__ = [
    "EffectiveRow",
    "SpeedRow",
    "effective_rows",
    "settled",
    "speed_rows",
    "updates_per_epoch",
]

_RUNGS = 6  # of the ladder of effective batches, the plan's own among them
_RUNGS_ABOVE = 2  # what is left, once the smaller ones have had their share


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """What one micro-batch gives: measured.

    Args:
        batch_size: Samples per device and forward pass.
        samples_per_second: Over all ranks.
        of_fastest: Share of the fastest size measured, 0 to 1.
        step_seconds: Seconds per micro-batch, its share of the optimizer step included.
        peak: Most memory this process held, in bytes; None where it was not read.
    """

    batch_size: int
    samples_per_second: float
    of_fastest: float
    step_seconds: float
    peak: int | None


@dataclass(frozen=True, slots=True)
class EffectiveRow:
    """What one effective batch costs: derived from measured step times.

    Args:
        effective_batch_size: Samples per optimizer update, over all ranks.
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        updates_per_epoch: None where the size of the data set is not known.
        update_seconds: Seconds from one update to the next; None where the micro-batch was not timed.
        epoch_seconds: Seconds in training steps per epoch; None where either is not known.
    """

    effective_batch_size: int
    micro_batch_size: int
    accumulate_grad_batches: int
    updates_per_epoch: int | None
    update_seconds: float | None
    epoch_seconds: float | None


def settled(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """The trial that speaks for each size, the latest, in ascending order."""
    latest = {trial.batch_size: trial for trial in trials}
    return tuple(latest[size] for size in sorted(latest))


def speed_rows(trials: Sequence[Trial], world_size: int) -> tuple[SpeedRow, ...]:
    """What each size that fits gives, for the sizes that were timed."""
    rows = [
        SpeedRow(
            batch_size=trial.batch_size,
            samples_per_second=trial.batch_size * world_size / trial.step_seconds,
            of_fastest=1.0,
            step_seconds=trial.step_seconds,
            peak=trial.peak,
        )
        for trial in settled(trials)
        if trial.fits and trial.step_seconds
    ]
    fastest = max((row.samples_per_second for row in rows), default=1.0)
    return tuple(
        replace(row, of_fastest=row.samples_per_second / fastest) for row in rows
    )


def effective_rows(
    plan: BatchPlan, trials: Sequence[Trial], dataset_size: int | None
) -> tuple[EffectiveRow, ...]:
    """A ladder of effective batches, about a factor of two apart, with the plan's own among them."""
    run = [trial.batch_size for trial in settled(trials) if trial.fits]
    pace = Pace.of(trials)
    return tuple(
        _row(rung, pace, dataset_size) for rung in _ladder(plan, run, dataset_size)
    )


def _ladder(
    plan: BatchPlan, run: Iterable[int], dataset_size: int | None
) -> list[BatchPlan]:
    smaller = list(islice(_smaller(plan, run), _RUNGS - 1))
    larger = list(islice(_larger(plan, dataset_size), _RUNGS - 1))
    above = min(len(larger), max(_RUNGS_ABOVE, _RUNGS - 1 - len(smaller)))
    below = smaller[: _RUNGS - 1 - above]
    return [*reversed(below), plan, *larger[:above]]


def _smaller(plan: BatchPlan, run: Iterable[int]) -> Iterator[BatchPlan]:
    """Halve the accumulation, then go down the micro-batches that were run."""
    while plan.accumulate_grad_batches > 1:
        plan = replace(plan, accumulate_grad_batches=plan.accumulate_grad_batches // 2)
        yield plan
    for size in sorted(run, reverse=True):
        if 3 * size <= 2 * plan.micro_batch_size:
            # The sizes run are seldom exact halves
            plan = replace(plan, micro_batch_size=size)
            yield plan


def _larger(plan: BatchPlan, dataset_size: int | None) -> Iterator[BatchPlan]:
    """Double the accumulation, as long as an epoch still fills one update."""
    while dataset_size is None or 2 * plan.effective_batch_size <= dataset_size:
        plan = replace(plan, accumulate_grad_batches=plan.accumulate_grad_batches * 2)
        yield plan


def updates_per_epoch(plan: BatchPlan, dataset_size: int) -> int:
    """Optimizer updates in one epoch, the last of which may be of fewer micro-batches."""
    return -(-_passes(plan, dataset_size) // plan.accumulate_grad_batches)


def _passes(plan: BatchPlan, dataset_size: int) -> int:
    """Micro-batches of each rank in one epoch."""
    return -(-dataset_size // (plan.micro_batch_size * plan.world_size))


def _row(plan: BatchPlan, pace: Pace, dataset_size: int | None) -> EffectiveRow:
    updates = None if dataset_size is None else updates_per_epoch(plan, dataset_size)
    update_seconds = epoch_seconds = None
    if plan.micro_batch_size in pace.sizes:  # told is what was measured
        micro_seconds = pace.micro(plan.micro_batch_size) or 0.0
        update_seconds = (
            plan.accumulate_grad_batches * micro_seconds + pace.optimizer_seconds
        )
        if dataset_size is not None and updates is not None:
            epoch_seconds = (
                _passes(plan, dataset_size) * micro_seconds
                + updates * pace.optimizer_seconds
            )
    return EffectiveRow(
        effective_batch_size=plan.effective_batch_size,
        micro_batch_size=plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
        updates_per_epoch=updates,
        update_seconds=update_seconds,
        epoch_seconds=epoch_seconds,
    )
