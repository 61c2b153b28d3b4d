"""Extrapolate peak memory to the budget with lines and parabolas."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial

PROOF: Final = 3  # points that prove a line
NO_LIMIT: Final = sys.maxsize  # where memory does not grow with the size
# Of a measured peak: profiles that miss one by more are not believed
_MISBELIEF: Final = 0.01
# Of a line, from its base: points that are nearer say little of where it goes
_APART: Final = 0.1
_ROUNDING: Final = 2  # bytes by which a point may miss a line that it is on


class Reading(NamedTuple):
    """What a trial of a size held."""

    size: int
    fits: bool
    peak: int
    left: int  # bytes between the peak and the budget
    room: int  # bytes between what was resident and the budget
    profile: tuple[int, ...]

    @property
    def headroom(self) -> float:
        """How many times what the trial took would fill the room."""
        return self.room / max(1, self.room - self.left)

    @property
    def in_proportion(self) -> int:
        """A size that fits if memory is a maximum of straight lines that start at or above what was resident."""
        return int(self.size * self.headroom)


def readings_of(trials: Sequence[Trial], budget: int) -> list[Reading]:
    """Every size whose peak was read, smallest first."""
    read = {
        t.batch_size: Reading(
            size=t.batch_size,
            fits=t.fits,
            peak=t.peak,
            left=budget - t.peak,
            room=budget - t.resident,
            profile=t.profile,
        )
        for t in trials
        if t.peak is not None
    }
    return [read[size] for size in sorted(read)]


def profiled(readings: list[Reading]) -> list[Reading]:
    """Leave out size 1: a single sample takes other paths through the code."""
    return [r for r in readings if r.size > 1 and len(r.profile) > 1]


def limit_of(a: Reading, b: Reading) -> int:
    """Size at which the line through two readings reaches the budget."""
    rise = b.peak - a.peak
    return b.size + b.left * (b.size - a.size) // rise if rise > 0 else NO_LIMIT


class LinearFit(NamedTuple):
    """A straight line through the last sizes that fit."""

    base: Reading
    top: Reading
    points: int
    witnesses: int  # of the points between its ends, those that are far enough from the first to say anything
    stray: float  # how far one of them lies off it at most, as a share of the room
    is_noisy: bool  # whether they lie on both sides of it
    is_bent: bool  # whether they all lie below it: memory rises ever faster

    @classmethod
    def through(cls, fits: Sequence[Reading], tolerance: float) -> LinearFit:
        """Through as many of the last ones, at least two, as lie on it but for so much, as a share of the room."""
        top = fits[-1]
        line = cls(fits[-2], top, 2, 0, 0.0, is_noisy=False, is_bent=False)
        for count in range(PROOF, len(fits) + 1):
            base, *between = fits[-count:-1]
            slope = (top.peak - base.peak) / (top.size - base.size)
            off = [r.peak - base.peak - slope * (r.size - base.size) for r in between]
            stray = max(map(abs, off)) / max(1, top.room)
            if stray > tolerance:
                break
            apart = (top.size - base.size) * _APART
            line = cls(
                base,
                top,
                count,
                sum(r.size - base.size >= apart for r in between),
                stray,
                is_noisy=min(off) < 0 < max(off),
                is_bent=max(off) < 0,
            )
        return line

    @property
    def is_proven(self) -> bool:
        """Whether others than its ends show that it is one."""
        return self.witnesses > 0

    @property
    def slope(self) -> float:
        """Bytes per sample."""
        return (self.top.peak - self.base.peak) / (self.top.size - self.base.size)

    @property
    def limit(self) -> int:
        """Size at which it reaches the budget."""
        return limit_of(self.base, self.top)

    @property
    def doubt(self) -> float:
        """Sizes below the limit that may not fit, since readings stray: the more, the further it is followed."""
        if self.slope <= 0:
            return 0.0
        apart = self.top.size - self.base.size
        further = 1 + max(0, self.limit - self.top.size) / apart
        return further * self.stray * self.top.room / self.slope

    def is_parallel(self, other: LinearFit, tolerance: float) -> bool:
        """Whether both rise alike over the sizes of this one, but for a share of the room."""
        apart = self.top.size - self.base.size
        return abs(self.slope - other.slope) * apart <= tolerance * self.top.room


class QuadraticFit(NamedTuple):
    """Bytes over the size: a straight line, or where they rise ever faster, a parabola."""

    size: int
    held: int  # bytes at that size
    rise: int  # bytes, from an earlier size to it
    apart: int  # how far below it that one was
    bend: float  # bytes per sample and sample: how it leaves the line through these two

    @classmethod
    def through(cls, sizes: Sequence[int], held: Sequence[int]) -> QuadraticFit:
        """Through the first and the last of two or three points, and through the middle one if that lies below."""
        (a, b), c = sizes[:2], sizes[-1]
        rise, apart = held[-1] - held[0], c - a
        below = rise * (b - a) // apart - (held[1] - held[0])
        if below < -_ROUNDING:
            # It may go on as it last did, and no flatter
            return cls(c, held[-1], held[-1] - held[1], c - b, 0.0)
        bend = below / ((b - a) * (c - b)) if below > _ROUNDING else 0.0
        return cls(c, held[-1], rise, apart, bend)

    def at(self, size: int) -> float:
        """Bytes held at a size."""
        further = size - self.size
        straight = self.held + self.rise * further / self.apart
        return straight + self.bend * further * (further + self.apart)

    def limit(self, budget: int) -> int:
        """The largest size at which it does not pass the budget."""
        left = budget - self.held
        if self.bend:
            steep = self.rise / self.apart + self.bend * self.apart
            root = math.sqrt(max(0.0, steep**2 + 4 * self.bend * left))
            return self.size + math.floor((root - steep) / (2 * self.bend))
        if self.rise > 0:
            return self.size + left * self.apart // self.rise
        return NO_LIMIT


def profile_limit(readings: list[Reading]) -> int | None:
    """Size at which the first allocation of a step would reach the budget; None where profiles miss a peak."""
    if len(seen := profiled(readings)) <= 1:
        return None
    read = [*seen[:2], *seen[2:][-1:]]
    counts = [len(r.profile) for r in read]
    count = min(counts)
    if max(counts) > 2 * count:
        return None
    sizes = [r.size for r in read]
    # Aligned from the end: loading the data, at the start, may take one allocation per sample.
    held = zip(*(r.profile[-count:] for r in read), strict=True)
    curves = [QuadraticFit.through(sizes, each) for each in held]
    for r in readings:
        foretold = (
            max(r.profile[-count:]) if r in read else max(curve.at(r.size) for curve in curves)
        )
        if r.size > 1 and abs(foretold - r.peak) > _MISBELIEF * r.peak:
            return None
    budget = seen[0].peak + seen[0].left
    return min(curve.limit(budget) for curve in curves)
