"""Extrapolate peak memory to the budget with straight lines and parabolas.

Arithmetic that decides a batch size is on whole bytes: a peak equal to the budget fits.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial

MIN_POINTS: Final = 3  # readings on one line that prove it
UNLIMITED: Final = sys.maxsize  # limit where memory does not grow with the batch size
# Profiles that miss a measured peak by a larger share are not used
_MAX_PROFILE_ERROR: Final = 0.01
# Share of the length of a line; points nearer to its first one do not test its slope
_MIN_DISTANCE: Final = 0.1
_ROUNDING: Final = 2  # bytes; a smaller deviation from a line is rounding


class Reading(NamedTuple):
    """Memory of one trial, in bytes."""

    size: int  # samples
    fits: bool
    peak: int
    left: int  # from the peak to the budget
    room: int  # from memory resident before the trial to the budget
    profile: tuple[int, ...]

    @property
    def headroom(self) -> float:
        """Factor by which the memory of the trial may grow to fill the room."""
        return self.room / max(1, self.room - self.left)

    @property
    def proportional_limit(self) -> int:
        """A size that fits if memory is a maximum of lines that start above resident memory."""
        return int(self.size * self.headroom)


def readings_of(trials: Sequence[Trial], budget: int) -> list[Reading]:
    """Return the latest reading of every size whose peak is known, smallest size first.

    Reserved bytes decide, but they rise in steps. Where all trials have allocated bytes, which are
    smooth, these are the peaks, and the budget is scaled as at the largest fit.
    """
    trials = [t for t in trials if t.peak is not None]
    top = max((t for t in trials if t.fits), key=lambda t: t.batch_size, default=None)
    if top is not None and top.peak and all(t.allocated for t in trials):
        budget = budget * (top.allocated or 0) // top.peak
        trials = [replace(t, peak=t.allocated) for t in trials]
    readings = {
        t.batch_size: Reading(
            t.batch_size, t.fits, t.peak, budget - t.peak, budget - t.resident, t.profile
        )
        for t in trials
        if t.peak is not None
    }
    return [readings[size] for size in sorted(readings)]


def limit_through(a: Reading, b: Reading) -> int:
    """Return the size at which the line through two readings reaches the budget."""
    rise = b.peak - a.peak
    return b.size + b.left * (b.size - a.size) // rise if rise > 0 else UNLIMITED


class LinearFit(NamedTuple):
    """A straight line through the first and the last of several readings that fit."""

    first: Reading
    last: Reading
    points: int
    witnesses: int  # points between both ends and far enough from the first to test the slope
    residual: float  # largest distance of a point from the line, as a share of the room
    is_noisy: bool  # points lie on both sides of the line
    is_convex: bool  # all points between the ends lie below the line: memory rises ever faster

    @classmethod
    def through(cls, fits: Sequence[Reading], tolerance: float) -> LinearFit:
        """Fit as many of the last readings, at least two, as the tolerance allows."""
        last = fits[-1]
        line = cls(fits[-2], last, 2, 0, 0.0, is_noisy=False, is_convex=False)
        for count in range(MIN_POINTS, len(fits) + 1):
            first, *between = fits[-count:-1]
            slope = (last.peak - first.peak) / (last.size - first.size)
            deviations = [r.peak - first.peak - slope * (r.size - first.size) for r in between]
            residual = max(map(abs, deviations)) / max(1, last.room)
            if residual > tolerance:
                break
            distance = (last.size - first.size) * _MIN_DISTANCE
            line = cls(
                first,
                last,
                count,
                sum(r.size - first.size >= distance for r in between),
                residual,
                is_noisy=min(deviations) < 0 < max(deviations),
                is_convex=max(deviations) < 0,
            )
        return line

    @property
    def is_proven(self) -> bool:
        """Return True if points besides both ends confirm the line."""
        return self.witnesses > 0

    @property
    def slope(self) -> float:
        """Bytes per sample."""
        return (self.last.peak - self.first.peak) / (self.last.size - self.first.size)

    @property
    def limit(self) -> int:
        """Size at which the line reaches the budget."""
        return limit_through(self.first, self.last)

    @property
    def uncertainty(self) -> float:
        """Error of the limit in samples, from the residual; grows with the extrapolation."""
        if self.slope <= 0:
            return 0.0
        length = self.last.size - self.first.size
        leverage = 1 + max(0, self.limit - self.last.size) / length
        return leverage * self.residual * self.last.room / self.slope

    def is_parallel(self, other: LinearFit, tolerance: float) -> bool:
        """Compare slopes: the rise over this line may differ by `tolerance` times the room."""
        length = self.last.size - self.first.size
        return abs(self.slope - other.slope) * length <= tolerance * self.last.room


class QuadraticFit(NamedTuple):
    """Bytes as a function of the size: a parabola that rises ever faster, else a straight line."""

    size: int  # the last size fitted
    held: int  # bytes at that size
    rise: int  # bytes from an earlier size to the last one
    run: int  # samples from that earlier size to the last one
    curvature: float  # bytes per sample squared; 0 for a straight line

    @classmethod
    def through(cls, sizes: Sequence[int], held: Sequence[int]) -> QuadraticFit:
        """Fit two or three points; of three on a concave curve, the line through the last two."""
        (a, b), c = sizes[:2], sizes[-1]
        rise, run = held[-1] - held[0], c - a
        below = rise * (b - a) // run - (held[1] - held[0])  # bytes, of the middle point
        if below < -_ROUNDING:
            # Concave: the steepest continuation that is still safe is the last segment
            return cls(c, held[-1], held[-1] - held[1], c - b, 0.0)
        curvature = below / ((b - a) * (c - b)) if below > _ROUNDING else 0.0
        return cls(c, held[-1], rise, run, curvature)

    @classmethod
    def through_peaks(cls, readings: Sequence[Reading]) -> QuadraticFit:
        return cls.through([r.size for r in readings], [r.peak for r in readings])

    def at(self, size: int) -> float:
        """Return the bytes at a size."""
        distance = size - self.size
        straight = self.held + self.rise * distance / self.run
        return straight + self.curvature * distance * (distance + self.run)

    def limit(self, budget: int) -> int:
        """Return the largest size at or below the budget."""
        left = budget - self.held
        if self.curvature:
            slope = self.rise / self.run + self.curvature * self.run
            root = math.sqrt(max(0.0, slope**2 + 4 * self.curvature * left))
            return self.size + math.floor((root - slope) / (2 * self.curvature))
        if self.rise > 0:
            return self.size + left * self.run // self.rise
        return UNLIMITED


def with_profiles(readings: Sequence[Reading]) -> list[Reading]:
    """Select readings with profiles; size 1 takes other paths through the code and is left out."""
    return [r for r in readings if r.size > 1 and len(r.profile) > 1]


def profile_limit(readings: Sequence[Reading]) -> int | None:
    """Return the size at which one allocation of a step reaches the budget.

    None if there are too few profiles, or if they contradict a measured peak.
    """
    profiled = with_profiles(readings)
    if len(profiled) < 2:  # noqa: PLR2004 -- a line needs two
        return None
    fitted = [*profiled[:2], *profiled[2:][-1:]]
    count = min(len(r.profile) for r in fitted)
    # Aligned at the end: loading the data, at the start, may take one allocation per sample
    allocations = zip(*(r.profile[-count:] for r in fitted), strict=True)
    curves = [QuadraticFit.through([r.size for r in fitted], held) for held in allocations]
    for r in readings:
        in_fit = r in fitted
        peak = max(r.profile[-count:]) if in_fit else max(curve.at(r.size) for curve in curves)
        if r.size > 1 and abs(peak - r.peak) > _MAX_PROFILE_ERROR * r.peak:
            return None
    budget = profiled[0].peak + profiled[0].left
    return min(curve.limit(budget) for curve in curves)
