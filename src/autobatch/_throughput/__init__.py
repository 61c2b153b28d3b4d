"""Throughput of each batch size: rows of the report, interpolated step times, and a line fit."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from autobatch._trials import Trial


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
        drift_error: How far from 1 that may be by chance, by the spread of its updates and what clock and scheduler
            do to short ones; None where there is no drift.
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
    # As in reports from before it was told
    drift_error: float | None = None


_SMOOTH: Final = 0.1  # largest relative miss of a line that is worth drawing
_KNEE: Final = 0.95  # of the fastest
_ROUNDS: Final = 20  # of reweighting: the weights settle within a handful
_HUBER: Final = 0.05  # relative residual beyond which a point counts for less


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """What one micro-batch gives: measured.

    Args:
        batch_size: Samples per device and forward pass.
        samples_per_second: Over all ranks.
        samples_per_second_low: 90 % of its updates were faster than this; None where it was timed in a trial only.
        samples_per_second_high: 10 % of its updates were faster than this; None likewise.
        of_fastest: Share of the fastest size measured, 0 to 1.
        step_seconds: Seconds per micro-batch, its share of the optimizer step included.
        updates: Optimizer updates that were timed; None where it was timed in a trial only.
        peak: Most memory this process held, in bytes; None where it was not read.
    """

    batch_size: int
    samples_per_second: float
    samples_per_second_low: float | None
    samples_per_second_high: float | None
    of_fastest: float
    step_seconds: float
    updates: int | None
    peak: int | None


@dataclass(frozen=True, slots=True)
class LineFit:
    """Seconds of a micro-batch as a straight line in its size: derived.

    Args:
        fixed_seconds: What a micro-batch takes whatever its size.
        seconds_per_sample: What each of its samples takes.
        worst_miss: The largest relative distance of a measured size from the line.
    """

    fixed_seconds: float
    seconds_per_sample: float
    worst_miss: float

    def seconds(self, batch_size: float) -> float:
        """Seconds of a micro-batch of this size."""
        return self.fixed_seconds + self.seconds_per_sample * batch_size


def latest_by_size(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """The trial that speaks for each size, the latest, in ascending order."""
    latest = {trial.batch_size: trial for trial in trials}
    return tuple(latest[size] for size in sorted(latest))


def speed_rows(
    trials: Sequence[Trial], curve: Sequence[CurvePoint], world_size: int
) -> tuple[SpeedRow, ...]:
    """What each size that fits gives, for the sizes that were timed; what was timed longer counts."""
    rows = {
        trial.batch_size: SpeedRow(
            batch_size=trial.batch_size,
            samples_per_second=trial.batch_size * world_size / trial.step_seconds,
            samples_per_second_low=None,
            samples_per_second_high=None,
            of_fastest=1.0,
            step_seconds=trial.step_seconds,
            updates=None,
            peak=trial.peak,
        )
        for trial in latest_by_size(trials)
        if trial.fits and trial.step_seconds
    }
    for point in curve:
        if not point.step_seconds:
            continue
        tried = rows.get(point.batch_size)
        rows[point.batch_size] = _timed_row(point, tried, world_size)
    fastest = max((row.samples_per_second for row in rows.values()), default=1.0)
    return tuple(
        replace(rows[size], of_fastest=rows[size].samples_per_second / fastest)
        for size in sorted(rows)
    )


def _timed_row(point: CurvePoint, tried: SpeedRow | None, world_size: int) -> SpeedRow:
    samples = point.batch_size * world_size
    return SpeedRow(
        batch_size=point.batch_size,
        samples_per_second=samples / point.step_seconds,
        samples_per_second_low=samples / point.step_seconds_high,
        samples_per_second_high=samples / point.step_seconds_low
        if point.step_seconds_low
        else None,
        of_fastest=1.0,
        step_seconds=point.step_seconds,
        updates=point.updates,
        peak=tried.peak if tried else point.peak,
    )


def knee(rows: Sequence[SpeedRow]) -> int | None:
    """The smallest size that gives 95 % of the fastest."""
    return min((r.batch_size for r in rows if r.of_fastest >= _KNEE), default=None)


def fit_line(pace: StepTimes) -> LineFit | None:
    """A line through the seconds of a micro-batch, where it is worth drawing: three sizes, none missed by over 10 %.

    Relative residuals with Huber's weights: a size that does not follow the others bends the line little.
    """
    points = list(zip(pace.sizes, pace.micro_seconds, strict=True))
    if len(points) < 3 or min(pace.micro_seconds) <= 0:  # noqa: PLR2004 -- two are always on a line
        return None
    weights = [1.0] * len(points)
    fixed = slope = 0.0
    for _ in range(_ROUNDS):
        fixed, slope = _weighted(points, weights)
        misses = [abs(fixed + slope * size - taken) / taken for size, taken in points]
        weights = [min(1.0, _HUBER / miss) if miss else 1.0 for miss in misses]
    worst = max(abs(fixed + slope * size - taken) / taken for size, taken in points)
    return LineFit(fixed, slope, worst) if worst <= _SMOOTH else None


def _weighted(points: Sequence[tuple[int, float]], weights: Sequence[float]) -> tuple[float, float]:
    """The line, nowhere below zero, with the least weighted sum of squared relative residuals."""
    # Divided by what was measured: fixed * (1 / taken) + slope * (size / taken) = 1
    rows = [(1 / taken, size / taken) for size, taken in points]
    aa = sum(w * a * a for w, (a, _) in zip(weights, rows, strict=True))
    ab = sum(w * a * b for w, (a, b) in zip(weights, rows, strict=True))
    bb = sum(w * b * b for w, (_, b) in zip(weights, rows, strict=True))
    a1 = sum(w * a for w, (a, _) in zip(weights, rows, strict=True))
    b1 = sum(w * b for w, (_, b) in zip(weights, rows, strict=True))
    determinant = aa * bb - ab * ab
    if determinant > 0:
        fixed, slope = (
            (a1 * bb - b1 * ab) / determinant,
            (b1 * aa - a1 * ab) / determinant,
        )
        if fixed >= 0 and slope >= 0:
            return fixed, slope
        if fixed >= 0:
            return a1 / aa, 0.0
    return 0.0, b1 / bb


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long a size takes, from what was timed.

    Between timed sizes the micro-batch seconds are read off a straight line; outside of them nothing is said.
    """

    sizes: tuple[int, ...]
    micro_seconds: tuple[
        float, ...
    ]  # forward and backward of one micro-batch, without the optimizer
    optimizer_seconds: float  # of one optimizer step, hardly dependent on the batch

    @classmethod
    def of(cls, trials: Iterable[Trial], curve: Iterable[CurvePoint]) -> StepTimes:
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
        return self.micro_seconds[right - 1] * (1 - share) + self.micro_seconds[right] * share

    def update(self, batch_size: int, accumulate: int) -> float | None:
        """Seconds of one optimizer update of so many micro-batches; None outside the sizes that were timed."""
        micro = self.micro(batch_size)
        return None if micro is None else accumulate * micro + self.optimizer_seconds


def _micro_seconds(timed: Trial | CurvePoint) -> float:
    seconds = timed.step_seconds or 0.0
    return max(0.0, seconds - (timed.optimizer_seconds or 0.0) / timed.accumulate)
