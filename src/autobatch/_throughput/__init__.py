"""Throughput of each batch size: rows of the report, interpolated step times, and a line fit."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from autobatch._throughput.preference import SampleTime
from autobatch._trials import latest_by_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autobatch._trials import Trial

_KNEE: Final = 0.95  # share of the highest throughput
_MAX_RESIDUAL: Final = 0.1  # largest relative residual of a line fit that is used


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Timing of one micro-batch size: measured.

    Args:
        batch_size: Samples per device and forward pass.
        accumulate: Micro-batches per optimizer update while it was timed.
        step_seconds: Median seconds per micro-batch, including its share of the optimizer step.
        step_seconds_low: 10 % quantile of the same.
        step_seconds_high: 90 % quantile of the same.
        optimizer_seconds: Median seconds of one optimizer step; None if none was seen.
        updates: Number of optimizer updates timed.
        peak: Peak memory of this process in bytes; None if it was not read.
        drift: Later timing as a multiple of the earlier one; None if there was only one.
        drift_error: Difference of the drift from 1 that noise explains, from the spread of the
            updates and the resolution of clock and scheduler; None if there is no drift.
        step_seconds_error: Error of `undisturbed_seconds`, by which the choice of a size goes: from
            the number of turns, and the noise of the machine in all of them; None in reports of
            earlier versions.
        undisturbed_seconds: The same as `step_seconds` for updates that other processes did not
            slow down; None in reports of earlier versions.
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
    drift_error: float | None = None  # missing in earlier reports
    step_seconds_error: float | None = None  # missing in earlier reports
    undisturbed_seconds: float | None = None  # missing in earlier reports


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Throughput of one micro-batch size: measured.

    Args:
        batch_size: Samples per device and forward pass.
        samples_per_second: Over all ranks.
        samples_per_second_low: 90 % of the updates were faster; None if timed in a trial only.
        samples_per_second_high: 10 % of the updates were faster; None if timed in a trial only.
        of_fastest: Share of the highest throughput measured, 0 to 1.
        step_seconds: Seconds per micro-batch, including its share of the optimizer step.
        updates: Number of optimizer updates timed; None if timed in a trial only.
        peak: Peak memory of this process in bytes; None if it was not read.
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
        fixed_seconds: Seconds of a micro-batch that do not depend on its size.
        seconds_per_sample: Seconds that each sample adds.
        worst_miss: Largest relative residual of a measured size.
    """

    fixed_seconds: float
    seconds_per_sample: float
    worst_miss: float

    def seconds(self, batch_size: float) -> float:
        """Return the seconds of a micro-batch of this size."""
        return self.fixed_seconds + self.seconds_per_sample * batch_size


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Step times of measured sizes, interpolated linearly between them and never extrapolated."""

    sizes: tuple[int, ...]
    # Forward and backward pass of one micro-batch of each size, without the optimizer step
    micro_seconds: tuple[float, ...]
    optimizer_seconds: float  # one optimizer step, nearly independent of the batch size
    # Standard errors of these times, as shares of them; none if they are not known
    errors: tuple[float, ...] = ()

    @classmethod
    def of(cls, trials: Iterable[Trial], curve: Iterable[CurvePoint]) -> StepTimes:
        """Take the time of a size from the curve, which was timed longer, or its latest trial."""
        ordered = _timed(trials, curve)
        optimizer = sorted(each.optimizer_seconds or 0.0 for each in ordered)
        return cls(
            sizes=tuple(each.batch_size for each in ordered),
            micro_seconds=tuple(map(_micro_seconds, ordered)),
            optimizer_seconds=optimizer[len(optimizer) // 2] if optimizer else 0.0,
            errors=tuple(map(_error, ordered)),
        )

    @classmethod
    def undisturbed(cls, curve: Iterable[CurvePoint]) -> StepTimes:
        """Take the times of the curve without what other processes added to them."""
        points = (
            replace(point, step_seconds=point.undisturbed_seconds or point.step_seconds)
            for point in curve
        )
        return cls.of((), points)

    def micro(self, batch_size: int) -> float | None:
        """Return the seconds of one micro-batch; None outside the sizes measured."""
        if not self.sizes or not self.sizes[0] <= batch_size <= self.sizes[-1]:
            return None
        right = bisect.bisect_left(self.sizes, batch_size)
        if self.sizes[right] == batch_size:
            return self.micro_seconds[right]
        low, high = self.sizes[right - 1], self.sizes[right]
        share = (batch_size - low) / (high - low)
        return self.micro_seconds[right - 1] * (1 - share) + self.micro_seconds[right] * share

    def per_sample(self, batch_size: int, accumulate: int) -> SampleTime | None:
        """Return the time per sample, its share of the optimizer step included."""
        seconds = self.update(batch_size, accumulate)
        if seconds is None:
            return None
        return SampleTime(seconds / (batch_size * accumulate), self._error(batch_size))

    def by_size(self, micro_batches: Mapping[int, int]) -> dict[int, SampleTime]:
        """Return the time per sample of sizes, at the given micro-batches per update."""
        times = {size: self.per_sample(size, count) for size, count in micro_batches.items()}
        return {size: each for size, each in times.items() if each is not None}

    def _error(self, batch_size: int) -> float:
        """Return the error of the next larger size timed, or between two of the worse one."""
        right = bisect.bisect_left(self.sizes, batch_size)
        left = right if self.sizes[right] == batch_size else right - 1
        return max(self.errors[left : right + 1], default=0.0)

    def update(self, batch_size: int, accumulate: int) -> float | None:
        """Return the seconds of one optimizer update; None outside the sizes measured."""
        micro = self.micro(batch_size)
        return None if micro is None else accumulate * micro + self.optimizer_seconds


def _micro_seconds(timed: Trial | CurvePoint) -> float:
    seconds = timed.step_seconds or 0.0
    return max(0.0, seconds - (timed.optimizer_seconds or 0.0) / timed.accumulate)


def _error(timed: Trial | CurvePoint) -> float:
    error = timed.step_seconds_error if isinstance(timed, CurvePoint) else None
    return (error or 0.0) / timed.step_seconds if timed.step_seconds else 0.0


def _timed(trials: Iterable[Trial], curve: Iterable[CurvePoint]) -> list[Trial | CurvePoint]:
    """Return each size that was timed, in ascending order: from the curve, or its latest trial."""
    latest = latest_by_size(trials)
    timed: dict[int, Trial | CurvePoint] = {n: each for n, each in latest.items() if each.fits}
    timed |= {point.batch_size: point for point in curve if point.step_seconds}
    return [timed[size] for size in sorted(timed) if timed[size].step_seconds]


def speed_rows(
    trials: Sequence[Trial], curve: Sequence[CurvePoint], world_size: int
) -> tuple[SpeedRow, ...]:
    """Return the throughput of each size timed, from the curve or else from its latest trial."""
    peaks = {size: trial.peak for size, trial in latest_by_size(trials).items() if trial.fits}
    rows = [_speed_row(timed, peaks, world_size) for timed in _timed(trials, curve)]
    fastest = max((row.samples_per_second for row in rows), default=1.0)
    return tuple(replace(row, of_fastest=row.samples_per_second / fastest) for row in rows)


def _speed_row(
    timed: Trial | CurvePoint, peaks: Mapping[int, int | None], world_size: int
) -> SpeedRow:
    size, seconds = timed.batch_size, timed.step_seconds or 0.0
    samples = size * world_size
    row = SpeedRow(
        batch_size=size,
        samples_per_second=samples / seconds,
        samples_per_second_low=None,
        samples_per_second_high=None,
        of_fastest=1.0,
        step_seconds=seconds,
        updates=None,
        peak=peaks.get(size, timed.peak),
    )
    if not isinstance(timed, CurvePoint):
        return row
    low = timed.step_seconds_low
    return replace(
        row,
        samples_per_second_low=samples / timed.step_seconds_high,
        samples_per_second_high=samples / low if low else None,
        updates=timed.updates,
    )


def row_of(rows: Iterable[SpeedRow], batch_size: int) -> SpeedRow | None:
    """Return the row of a size; None if it was not timed."""
    return next((row for row in rows if row.batch_size == batch_size), None)


def knee(speeds: Mapping[int, float]) -> int | None:
    """Return the smallest size with at least 95 % of the highest throughput."""
    fastest = max(speeds.values(), default=0.0)
    return min((n for n, speed in speeds.items() if speed / fastest >= _KNEE), default=None)


def fit_line(times: StepTimes) -> LineFit | None:
    """Fit a line, with neither part negative, to the seconds of a micro-batch.

    None for fewer than three sizes, or if the line misses a size by more than 10 %.
    """
    points = list(zip(times.sizes, times.micro_seconds, strict=True))
    if len(points) < 3 or min(times.micro_seconds) <= 0:  # noqa: PLR2004 -- two fit any line
        return None
    # Least squares of relative residuals: fixed * u + slope * v = 1
    rows = [(1 / seconds, size / seconds) for size, seconds in points]
    u1, v1 = (sum(column) for column in zip(*rows, strict=True))
    uu, uv, vv = (
        sum(u * u for u, _ in rows),
        sum(u * v for u, v in rows),
        sum(v * v for _, v in rows),
    )
    determinant = uu * vv - uv * uv
    fixed, slope = 0.0, v1 / vv
    if determinant > 0 and u1 * vv >= v1 * uv:
        fixed, slope = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    if slope < 0:
        fixed, slope = u1 / uu, 0.0
    worst = max(abs(fixed * u + slope * v - 1) for u, v in rows)
    return LineFit(fixed, slope, worst) if worst <= _MAX_RESIDUAL else None
