"""Effective batch sizes, learning-rate rule and optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

from autobatch._throughput import fit_line, latest_by_size
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._noise import NoiseReading
    from autobatch._plan import BatchPlan
    from autobatch._throughput import CurvePoint, LineFit, StepTimes
    from autobatch._trials import Trial

_LINEAR: Final = {"SGD"}
_SQUARE_ROOT: Final = {
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adafactor", "SparseAdam",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LearningRateRule:
    """How a learning rate usually goes with the effective batch; printed, never applied.

    Args:
        optimizer: The class it is about.
        rule: "linear" (arXiv 1706.02677) or "square-root" (arXiv 2205.10287).
    """

    optimizer: str
    rule: Literal["linear", "square-root"]

    def factor(self, batches: float) -> float:
        """What multiplies the learning rate where the effective batch is multiplied by `batches`."""
        return batches if self.rule == "linear" else math.sqrt(batches)


def rule_for(optimizer: object) -> LearningRateRule | None:
    """The rule for an optimizer, by its class or one it extends; None where no rule is known."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _LINEAR:
            return LearningRateRule(type(optimizer).__name__, "linear")
        if kind.__name__ in _SQUARE_ROOT:
            return LearningRateRule(type(optimizer).__name__, "square-root")
    return None


def common_rule(optimizers: Iterable[object]) -> LearningRateRule | None:
    """The rule that all of these have; None where they differ, or where one has none."""
    rules = {rule_for(optimizer) for optimizer in optimizers}
    return rules.pop() if len(rules) == 1 else None


_RUNGS: Final = 7  # of the ladder of effective batches, the plan's own among them
_RUNGS_ABOVE: Final = 3  # what is left, once the smaller ones have had their share
# Within about this factor a noise scale agrees with the critical batch of a run: an estimate, from small networks
_TRUSTED: Final = 4.0
_NEAR: Final = 1.1  # times the shortest: as good as any


@dataclass(frozen=True, slots=True)
class EffectiveRow:
    """What one effective batch costs: derived from measured step times, and estimated where it is about the loss.

    Args:
        effective_batch_size: Samples per optimizer update, over all ranks.
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        updates_per_epoch: None where the size of the data set is not known.
        update_seconds: Seconds from one update to the next; None where the micro-batch was not timed.
        epoch_seconds: Seconds in training steps per epoch; None where either is not known.
        relative_updates: Updates to the same loss, as a multiple of those of the plan; this and what follows are
            None where no noise scale was measured.
        relative_samples: Samples to the same loss, as a multiple.
        relative_time: Time to the same loss, as a multiple.
        relative_time_low: The same where the noise scale is as far off as it may be, the lower end.
        relative_time_high: The upper end.
        useful_samples_per_second: Samples per second, each counted by what it does for the loss beside one of a very
            small batch.
        learning_rate_factor: What usually multiplies the learning rate of the plan; None where no rule is known.
    """

    effective_batch_size: int
    micro_batch_size: int
    accumulate_grad_batches: int
    updates_per_epoch: int | None
    update_seconds: float | None
    epoch_seconds: float | None
    relative_updates: float | None = None
    relative_samples: float | None = None
    relative_time: float | None = None
    relative_time_low: float | None = None
    relative_time_high: float | None = None
    useful_samples_per_second: float | None = None
    learning_rate_factor: float | None = None


@dataclass(frozen=True, slots=True)
class NoiseRange:
    """A noise scale, in samples, and how far off it may be."""

    samples: float
    low: float
    high: float

    @classmethod
    def of(cls, reading: NoiseReading | None) -> NoiseRange | None:
        """What a reading is good for; None where columns that need it would be guessed."""
        if reading is None or reading.state != "ok" or not reading.samples:
            return None
        samples = reading.samples
        return cls(
            samples,
            low=min(samples / _TRUSTED, reading.low or samples),
            high=max(samples * _TRUSTED, reading.high or samples),
        )


# Effective batches


@dataclass(frozen=True, slots=True)
class Costs:
    """What the costs of effective batches are worked out from.

    Args:
        plan: What was chosen; the others are compared with it.
        pace: Seconds, as measured.
        dataset_size: Samples per epoch, where known.
        noise: The noise scale, where one was measured.
        rule: How the learning rate goes with the batch, where a rule is known.
    """

    plan: BatchPlan
    pace: StepTimes
    dataset_size: int | None
    noise: NoiseRange | None
    rule: LearningRateRule | None

    def row(self, rung: BatchPlan) -> EffectiveRow:
        """What one rung of the ladder costs; the whole data set, where it holds no more than that."""
        samples = self.dataset_size
        effective = rung.effective_batch_size
        if samples is not None:
            effective = min(effective, samples)
        row = EffectiveRow(
            effective_batch_size=effective,
            micro_batch_size=rung.micro_batch_size,
            accumulate_grad_batches=rung.accumulate_grad_batches,
            updates_per_epoch=None if samples is None else updates_per_epoch(rung, samples),
            update_seconds=self._update_seconds(rung),
            epoch_seconds=self._epoch_seconds(rung),
        )
        if self.rule is not None:
            factor = self.rule.factor(effective / self._chosen)
            row = replace(row, learning_rate_factor=factor)
        return row if self.noise is None else self._compared(row, self.noise)

    def last_samples(self, rung: BatchPlan) -> int | None:
        """Samples in the last micro-batch of an epoch, where that is known."""
        if self.dataset_size is None:
            return None
        of_rank = -(-self.dataset_size // rung.world_size)
        return of_rank % rung.micro_batch_size or rung.micro_batch_size

    @property
    def _chosen(self) -> int:
        samples, effective = self.dataset_size, self.plan.effective_batch_size
        return effective if samples is None else min(effective, samples)

    def _update_seconds(self, rung: BatchPlan) -> float | None:
        if rung.micro_batch_size not in self.pace.sizes:  # told is what was measured
            return None
        return self.pace.update(rung.micro_batch_size, rung.accumulate_grad_batches)

    def _epoch_seconds(self, rung: BatchPlan) -> float | None:
        if self.dataset_size is None or rung.micro_batch_size not in self.pace.sizes:
            return None
        micro_seconds = self.pace.micro(rung.micro_batch_size) or 0.0
        updates = updates_per_epoch(rung, self.dataset_size)
        return (
            _passes(rung, self.dataset_size) * micro_seconds + updates * self.pace.optimizer_seconds
        )

    def _compared(self, row: EffectiveRow, noise: NoiseRange) -> EffectiveRow:
        """The row with what it means for the loss: arXiv 1812.06162, steps and samples to the same loss."""
        here, there = row.effective_batch_size, self._chosen
        row = replace(
            row,
            relative_updates=_relative_updates(here, there, noise.samples),
            relative_samples=_relative_updates(here, there, noise.samples) * here / there,
        )
        seconds, chosen_seconds = row.update_seconds, self._update_seconds(self.plan)
        if not seconds or not chosen_seconds:
            return row
        times = [
            _relative_updates(here, there, samples) * seconds / chosen_seconds
            for samples in (noise.samples, noise.low, noise.high)
        ]
        throughput = here / seconds
        return replace(
            row,
            relative_time=times[0],
            relative_time_low=min(times),
            relative_time_high=max(times),
            useful_samples_per_second=throughput * noise.samples / (noise.samples + here),
        )


def _relative_updates(here: int, there: int, noise: float) -> float:
    return (1 + noise / here) / (1 + noise / there)


def effective_rows(
    costs: Costs, trials: Sequence[Trial], curve: Sequence[CurvePoint]
) -> tuple[EffectiveRow, ...]:
    """A ladder of effective batches, about a factor of two apart: the plan's own among them, all of the data at its end."""
    tried = latest_by_size(trials)
    run = {trial.batch_size for trial in tried if trial.fits}
    run |= {point.batch_size for point in curve}
    refused = {t.batch_size for t in tried if t.outcome is Outcome.REFUSED}
    rungs = _ladder(costs.plan, run, costs.dataset_size)
    rows = [
        costs.row(rung)
        for rung in rungs
        # Training with it would fail at the end of an epoch
        if rung == costs.plan or costs.last_samples(rung) not in refused
    ]
    chosen = costs.row(costs.plan)
    return tuple(
        row
        for row in rows
        # Where the plan asks for more than there is, less of it may be all there is as well
        if row.effective_batch_size != chosen.effective_batch_size or is_of(row, costs.plan)
    )


def is_of(row: EffectiveRow, plan: BatchPlan) -> bool:
    """Whether a row is about the plan itself."""
    return (row.micro_batch_size, row.accumulate_grad_batches) == (
        plan.micro_batch_size,
        plan.accumulate_grad_batches,
    )


def _ladder(plan: BatchPlan, run: Iterable[int], dataset_size: int | None) -> list[BatchPlan]:
    smaller = list(islice(_smaller(plan, run), _RUNGS - 1))
    larger = list(islice(_larger(plan, dataset_size), _RUNGS - 1))
    above = min(len(larger), max(_RUNGS_ABOVE, _RUNGS - 1 - len(smaller)))
    below = smaller[: _RUNGS - 1 - above]
    whole = _whole(plan, dataset_size)
    shown = larger[:above] if whole is None else [*larger[: above - 1], whole]
    return [*reversed(below), plan, *shown]


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
    """Double the accumulation, as long as an epoch still fills one update; all of the epoch in one is the last."""
    while dataset_size is None or 3 * plan.effective_batch_size <= dataset_size:
        plan = replace(plan, accumulate_grad_batches=plan.accumulate_grad_batches * 2)
        yield plan
    whole = _whole(plan, dataset_size)
    if whole is not None:
        yield whole


def _whole(plan: BatchPlan, dataset_size: int | None) -> BatchPlan | None:
    """The data set in one update; None where the plan makes no more of an epoch, or where its size is not known."""
    if dataset_size is None or plan.effective_batch_size >= dataset_size:
        return None
    return replace(plan, accumulate_grad_batches=_passes(plan, dataset_size))


def updates_per_epoch(plan: BatchPlan, dataset_size: int) -> int:
    """Optimizer updates in one epoch, the last of which may be of fewer micro-batches."""
    return -(-_passes(plan, dataset_size) // plan.accumulate_grad_batches)


def _passes(plan: BatchPlan, dataset_size: int) -> int:
    """Micro-batches of each rank in one epoch."""
    return -(-dataset_size // (plan.micro_batch_size * plan.world_size))


# What the noise scale says about the choice


@dataclass(frozen=True, slots=True)
class Optimum:
    """Which effective batch would reach the same loss soonest: estimated.

    Args:
        effective_batch_size: The one of the ladder with the shortest time.
        near_low: The smallest of the ladder within 10 % of that time.
        near_high: The largest of the ladder within 10 % of that time.
        accumulate_grad_batches: The best accumulation at the plan's micro-batch; below 1, accumulating costs time.
        at_once: The best batch, in samples, if it fitted at once; None where times do not follow a line.
    """

    effective_batch_size: int
    near_low: int
    near_high: int
    accumulate_grad_batches: float
    at_once: float | None


def optimum(costs: Costs, rows: Sequence[EffectiveRow]) -> Optimum | None:
    """What the rows come to; None where no noise scale was measured, or nothing timed."""
    timed = {row: row.relative_time for row in rows if row.relative_time is not None}
    micro_seconds = costs.pace.micro(costs.plan.micro_batch_size)
    if costs.noise is None or not timed or not micro_seconds:
        return None
    least = min(timed.values())
    near = [row for row, taken in timed.items() if taken <= _NEAR * least]
    fit = fit_line(costs.pace)
    optimizer_seconds = costs.pace.optimizer_seconds
    return Optimum(
        effective_batch_size=min(timed, key=timed.__getitem__).effective_batch_size,
        near_low=near[0].effective_batch_size,
        near_high=near[-1].effective_batch_size,
        accumulate_grad_batches=best_accumulation(
            costs.noise, costs.plan, micro_seconds, optimizer_seconds
        ),
        at_once=best_batch(costs.noise, fit, optimizer_seconds) if fit else None,
    )


def best_batch(noise: NoiseRange, fit: LineFit, optimizer_seconds: float) -> float | None:
    """The batch with the shortest time to the same loss, in samples, if all of it fitted at once.

    The square root of the noise scale times the batch that runs at half of the full speed; None where samples cost
    nothing, and there is no such batch.
    """
    if not fit.seconds_per_sample:
        return None
    half_speed = (fit.fixed_seconds + optimizer_seconds) / fit.seconds_per_sample
    return math.sqrt(noise.samples * half_speed)


def best_accumulation(
    noise: NoiseRange, plan: BatchPlan, micro_seconds: float, optimizer_seconds: float
) -> float:
    """The accumulation with the shortest time to the same loss at a micro-batch; below 1, accumulating costs time."""
    share = optimizer_seconds / micro_seconds if micro_seconds else math.inf
    return math.sqrt(noise.samples / (plan.micro_batch_size * plan.world_size) * share)
