"""Costs of effective batch sizes: time, loss and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from autobatch._plan import ceil_div
from autobatch._throughput import fit_line
from autobatch._trials import Outcome, latest_by_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._noise import NoiseReading
    from autobatch._plan import BatchPlan
    from autobatch._throughput import CurvePoint, StepTimes
    from autobatch._trials import Trial

_Rule: TypeAlias = Literal["linear", "square-root"]
_ADAPTIVE: Final = (
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adafactor", "SparseAdam",
)  # fmt: skip
_RULES: Final[dict[str, _Rule]] = {"SGD": "linear", **dict.fromkeys(_ADAPTIVE, "square-root")}


@dataclass(frozen=True, slots=True)
class LearningRateRule:
    """Usual relation of learning rate and effective batch size; printed, never applied.

    Args:
        optimizer: Class name of the optimizer.
        rule: "linear" (arXiv 1706.02677) or "square-root" (arXiv 2205.10287).
    """

    optimizer: str
    rule: _Rule

    def factor(self, ratio: float) -> float:
        """Return the factor of the learning rate for a `ratio` of effective batch sizes."""
        return ratio if self.rule == "linear" else math.sqrt(ratio)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside of wrappers such as accelerate's and Lightning's."""
    inner = getattr(optimizer, "optimizer", None)
    while hasattr(inner, "param_groups") and inner is not optimizer:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def rule_for(optimizer: object) -> LearningRateRule | None:
    """Return the rule of the optimizer's class or its base classes; None if no rule is known."""
    optimizer = unwrapped(optimizer)
    name, kinds = type(optimizer).__name__, type(optimizer).__mro__
    rules = (_RULES[kind.__name__] for kind in kinds if kind.__name__ in _RULES)
    return next((LearningRateRule(name, rule) for rule in rules), None)


def common_rule(optimizers: Iterable[object]) -> LearningRateRule | None:
    """Return the rule that all optimizers share; None if they differ or one has none."""
    rules = {rule_for(optimizer) for optimizer in optimizers}
    return rules.pop() if len(rules) == 1 else None


_ROWS: Final = 7  # of the table of effective batch sizes
_ROWS_ABOVE: Final = 3  # rows kept for batches larger than the plan's
# A noise scale agrees with the critical batch size of a run within about this factor: an
# estimate, measured with small networks
_NOISE_ERROR: Final = 4.0
_NEAR_SHORTEST: Final = 1.1  # times the shortest time


@dataclass(frozen=True, slots=True)
class EffectiveRow:
    """Cost of one effective batch: derived from measured step times, estimated for the loss.

    Relative values are multiples of the plan's, None if no noise scale was measured.

    Args:
        effective_batch_size: Samples per optimizer update, over all ranks.
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        updates_per_epoch: Optimizer updates; None if the size of the dataset is unknown.
        update_seconds: Seconds from one update to the next; None if the micro-batch was not timed.
        epoch_seconds: Seconds in training steps per epoch; None if either is unknown.
        relative_updates: Updates to the same loss.
        relative_samples: Samples to the same loss.
        relative_time: Time to the same loss.
        relative_time_low: Lowest time within the error of the noise scale.
        relative_time_high: Highest time within the error of the noise scale.
        useful_samples_per_second: Samples per second, weighted by their effect on the loss
            compared with samples of a very small batch.
        learning_rate_factor: Usual factor of the plan's learning rate; None without a rule.
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
    """A noise scale and its range of error, in samples."""

    samples: float
    low: float
    high: float

    @classmethod
    def of(cls, reading: NoiseReading | None) -> NoiseRange | None:
        """Return the range of a settled reading; None for any other reading."""
        if reading is None or reading.state != "ok" or not reading.samples:
            return None
        samples = reading.samples
        low = min(samples / _NOISE_ERROR, reading.low or samples)
        high = max(samples * _NOISE_ERROR, reading.high or samples)
        return cls(samples, low, high)


# Effective batches


@dataclass(frozen=True, slots=True)
class Costs:
    """Inputs of the costs of effective batches."""

    plan: BatchPlan  # the chosen one, the reference of relative values
    pace: StepTimes  # measured
    dataset_size: int | None  # samples per epoch, if known
    noise: NoiseRange | None  # if one was measured
    rule: LearningRateRule | None  # of the learning rate, if one is known

    def row(self, candidate: BatchPlan) -> EffectiveRow:
        """Return the cost of a plan; its effective batch is at most the dataset."""
        samples, effective = self.dataset_size, self._samples_per_update(candidate)
        ratio = effective / self._samples_per_update(self.plan)
        row = EffectiveRow(
            effective_batch_size=effective,
            micro_batch_size=candidate.micro_batch_size,
            accumulate_grad_batches=candidate.accumulate_grad_batches,
            updates_per_epoch=None if samples is None else updates_per_epoch(candidate, samples),
            update_seconds=self._update_seconds(candidate),
            epoch_seconds=self._epoch_seconds(candidate),
            learning_rate_factor=self.rule.factor(ratio) if self.rule else None,
        )
        return row if self.noise is None else self._compared(row, self.noise)

    def last_samples(self, candidate: BatchPlan) -> int | None:
        """Return the samples in the last micro-batch of an epoch; None if unknown."""
        if self.dataset_size is None:
            return None
        of_rank = ceil_div(self.dataset_size, candidate.world_size)
        return of_rank % candidate.micro_batch_size or candidate.micro_batch_size

    def _samples_per_update(self, candidate: BatchPlan) -> int:
        samples, effective = self.dataset_size, candidate.effective_batch_size
        return effective if samples is None else min(effective, samples)

    def _update_seconds(self, candidate: BatchPlan) -> float | None:
        if candidate.micro_batch_size not in self.pace.sizes:  # report measured sizes only
            return None
        return self.pace.update(candidate.micro_batch_size, candidate.accumulate_grad_batches)

    def _epoch_seconds(self, candidate: BatchPlan) -> float | None:
        samples, micro_seconds = self.dataset_size, self.pace.micro(candidate.micro_batch_size)
        if samples is None or candidate.micro_batch_size not in self.pace.sizes:
            return None
        updates = updates_per_epoch(candidate, samples)
        passes = _micro_batches(candidate, samples) * (micro_seconds or 0.0)
        return passes + updates * self.pace.optimizer_seconds

    def _compared(self, row: EffectiveRow, noise: NoiseRange) -> EffectiveRow:
        """Return the row with its steps and samples to the same loss (arXiv 1812.06162)."""
        size, reference = row.effective_batch_size, self._samples_per_update(self.plan)
        updates = _relative_updates(size, reference, noise.samples)
        row = replace(row, relative_updates=updates, relative_samples=updates * size / reference)
        seconds, reference_seconds = row.update_seconds, self._update_seconds(self.plan)
        if not seconds or not reference_seconds:
            return row
        times = [
            _relative_updates(size, reference, samples) * seconds / reference_seconds
            for samples in (noise.samples, noise.low, noise.high)
        ]
        return replace(
            row,
            relative_time=times[0],
            relative_time_low=min(times),
            relative_time_high=max(times),
            useful_samples_per_second=size / seconds * noise.samples / (noise.samples + size),
        )


def _relative_updates(size: int, reference: int, noise: float) -> float:
    return (1 + noise / size) / (1 + noise / reference)


def effective_rows(
    costs: Costs, trials: Sequence[Trial], curve: Sequence[CurvePoint]
) -> tuple[EffectiveRow, ...]:
    """Return rows about a factor of two apart, with the plan's own and, last, a whole epoch."""
    latest = latest_by_size(trials).values()
    run = {trial.batch_size for trial in latest if trial.fits}
    run |= {point.batch_size for point in curve}
    refused = {trial.batch_size for trial in latest if trial.outcome is Outcome.REFUSED}
    # A refused last micro-batch would end training at the end of an epoch
    rows = [
        costs.row(candidate)
        for candidate in _candidates(costs.plan, run, costs.dataset_size)
        if candidate == costs.plan or costs.last_samples(candidate) not in refused
    ]
    chosen = costs.row(costs.plan)
    return tuple(
        row
        for row in rows
        # If the plan asks for more than an epoch, smaller batches may be the whole epoch as well
        if row.effective_batch_size != chosen.effective_batch_size or is_of(row, costs.plan)
    )


def is_of(row: EffectiveRow, plan: BatchPlan) -> bool:
    """Return True for the row of the plan."""
    return (row.micro_batch_size, row.accumulate_grad_batches) == (
        plan.micro_batch_size,
        plan.accumulate_grad_batches,
    )


def _candidates(plan: BatchPlan, run: Iterable[int], dataset_size: int | None) -> list[BatchPlan]:
    smaller = list(islice(_smaller(plan, run), _ROWS - 1))
    larger = list(islice(_larger(plan, dataset_size), _ROWS - 1))
    whole = []  # one update per epoch
    if dataset_size is not None and plan.effective_batch_size < dataset_size:
        whole = [replace(plan, accumulate_grad_batches=_micro_batches(plan, dataset_size))]
    above = min(len(larger + whole), max(_ROWS_ABOVE, _ROWS - 1 - len(smaller)))
    below = smaller[: _ROWS - 1 - above]
    return [*reversed(below), plan, *larger[: above - len(whole)], *whole]


def _smaller(plan: BatchPlan, run: Iterable[int]) -> Iterator[BatchPlan]:
    """Halve the accumulation, then go down the micro-batches that ran."""
    while plan.accumulate_grad_batches > 1:
        plan = replace(plan, accumulate_grad_batches=plan.accumulate_grad_batches // 2)
        yield plan
    for size in sorted(run, reverse=True):
        if 3 * size <= 2 * plan.micro_batch_size:
            # The sizes that ran are seldom exact halves
            plan = replace(plan, micro_batch_size=size)
            yield plan


def _larger(plan: BatchPlan, dataset_size: int | None) -> Iterator[BatchPlan]:
    """Double the accumulation while an epoch fills an update."""
    while dataset_size is None or 3 * plan.effective_batch_size <= dataset_size:
        plan = replace(plan, accumulate_grad_batches=plan.accumulate_grad_batches * 2)
        yield plan


def updates_per_epoch(plan: BatchPlan, dataset_size: int) -> int:
    """Return the optimizer updates of one epoch; the last may have fewer micro-batches."""
    return ceil_div(_micro_batches(plan, dataset_size), plan.accumulate_grad_batches)


def _micro_batches(plan: BatchPlan, dataset_size: int) -> int:
    """Return the micro-batches of each rank in one epoch."""
    return ceil_div(dataset_size, plan.micro_batch_size * plan.world_size)


# Optimum


@dataclass(frozen=True, slots=True)
class Optimum:
    """Estimated effective batch with the shortest time to the same loss.

    Args:
        effective_batch_size: Batch of the row with the shortest time.
        near_low: Smallest batch of a row within 10 % of the shortest time.
        near_high: Largest batch of a row within 10 % of the shortest time.
        accumulate_grad_batches: Best accumulation at the plan's micro-batch; below 1,
            accumulation costs time.
        at_once: Best batch, in samples, without a memory limit; None if times are not linear
            in the batch size, or do not grow with it.
    """

    effective_batch_size: int
    near_low: int
    near_high: int
    accumulate_grad_batches: float
    at_once: float | None


def optimum(costs: Costs, rows: Sequence[EffectiveRow]) -> Optimum | None:
    """Return the optimum of the rows; None without a noise scale or without timed rows."""
    times = {row: row.relative_time for row in rows if row.relative_time is not None}
    micro_seconds = costs.pace.micro(costs.plan.micro_batch_size)
    if costs.noise is None or not times or not micro_seconds:
        return None
    shortest = min(times, key=times.__getitem__)
    near = [row for row, time in times.items() if time <= _NEAR_SHORTEST * times[shortest]]
    fit, optimizer_seconds = fit_line(costs.pace), costs.pace.optimizer_seconds
    samples = costs.plan.micro_batch_size * costs.plan.world_size
    accumulate = math.sqrt(costs.noise.samples / samples * optimizer_seconds / micro_seconds)
    at_once = None
    if fit and fit.seconds_per_sample:
        # The noise scale times the batch that runs at half of the full speed
        half_speed = (fit.fixed_seconds + optimizer_seconds) / fit.seconds_per_sample
        at_once = math.sqrt(costs.noise.samples * half_speed)
    return Optimum(
        effective_batch_size=shortest.effective_batch_size,
        near_low=near[0].effective_batch_size,
        near_high=near[-1].effective_batch_size,
        accumulate_grad_batches=accumulate,
        at_once=at_once,
    )
