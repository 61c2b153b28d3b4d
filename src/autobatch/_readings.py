"""What trials held, and where the straight lines through it reach the budget."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trial import Trial

__all__ = [
    "NO_LIMIT",
    "PROOF",
    "Line",
    "Reading",
    "limit_of",
    "profile_limit",
    "profiled",
    "readings_of",
]

PROOF: Final = 3  # points that prove a line
NO_LIMIT: Final = sys.maxsize  # where memory does not grow with the size
# Of a measured peak: profiles that miss one by more are not believed
_MISBELIEF: Final = 0.01


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


class Line(NamedTuple):
    """A straight line through the last sizes that fit."""

    base: Reading
    top: Reading
    points: int
    stray: float  # how far one of them lies off it at most, as a share of the room
    is_noisy: bool  # whether they lie on both sides of it

    @classmethod
    def through(cls, fits: Sequence[Reading], tolerance: float) -> Line:
        """Through as many of the last ones, at least two, as lie on it but for so much, as a share of the room."""
        top = fits[-1]
        line = cls(fits[-2], top, 2, 0.0, is_noisy=False)
        for count in range(PROOF, len(fits) + 1):
            base, *between = fits[-count:-1]
            slope = (top.peak - base.peak) / (top.size - base.size)
            off = [r.peak - base.peak - slope * (r.size - base.size) for r in between]
            stray = max(map(abs, off)) / max(1, top.room)
            if stray > tolerance:
                break
            line = cls(base, top, count, stray, is_noisy=min(off) < 0 < max(off))
        return line

    @property
    def is_proven(self) -> bool:
        """Whether enough of them lie on it."""
        return self.points >= PROOF

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

    def is_parallel(self, other: Line, tolerance: float) -> bool:
        """Whether both rise alike over the sizes of this one, but for a share of the room."""
        apart = self.top.size - self.base.size
        return abs(self.slope - other.slope) * apart <= tolerance * self.top.room


def profile_limit(readings: list[Reading]) -> int | None:
    """Size at which the first allocation of a step would reach the budget; None where the lines miss a peak."""
    if len(seen := profiled(readings)) <= 1:
        return None
    a, b = seen[:2]
    count = min(len(a.profile), len(b.profile))
    if abs(len(a.profile) - len(b.profile)) > count:
        return None
    # Aligned from the end: loading the data, at the start, may take one allocation per sample.
    lines = list(zip(a.profile[-count:], b.profile[-count:], strict=True))
    apart = b.size - a.size
    for r in readings:
        steps = (r.size - a.size) / apart
        foretold = max(low + (high - low) * steps for low, high in lines)
        if r.size > 1 and abs(foretold - r.peak) > _MISBELIEF * r.peak:
            return None
    budget = a.peak + a.left
    reach = (a.size + (budget - x) * apart // (y - x) for x, y in lines if y > x)
    return min(reach, default=NO_LIMIT)
