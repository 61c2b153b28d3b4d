"""Forecast the largest batch size that fits, by the regime that the memory readings are in.

`forecast` tries the regimes in order; the first one that applies decides:

    profiles      trials carry the bytes after each allocation, which predict all peaks so far
    single fit    one reading, nothing to extrapolate
    flat          memory does not grow with the batch size yet
    bend          memory rises ever faster, on a parabola
    jump          a size failed that the line promised to fit
    line          memory rises on a straight line, possibly with noise
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from autobatch._search.extrapolation import (
    MIN_POINTS,
    UNLIMITED,
    LinearFit,
    QuadraticFit,
    Reading,
    limit_through,
    profile_limit,
    with_profiles,
)

if TYPE_CHECKING:
    from autobatch._search import Bracket

# Below this headroom a second reading is taken at half the size instead of a larger one
_LOW_HEADROOM: Final = 1.5
# Share of the headroom used by the second reading: room is left for a third, which proves the line
_SECOND_READING: Final = 0.75
# Memory counts as flat if the line reaches the budget beyond this multiple of the size
_FLAT: Final = 64
# A line that exceeds a failed size by this factor does not help to locate the failure
_MAX_OVERSHOOT: Final = 4
# Two readings promise too much by up to this share of the way beyond them
_MARGIN_OF_TWO: Final = 0.04
# Factor between sizes on the way to a jump: small enough to see nearly every jump before it
_JUMP_STEP: Final = 1.24


class Forecast(NamedTuple):
    """Prediction of the largest fit, and the next size on the way to it."""

    limit: int  # largest size predicted to fit
    size: float  # size to try next
    is_certain: bool  # the prediction may end the search
    noise: float = 0.0  # sizes closer together than this share cannot be distinguished


@dataclass(frozen=True)
class Evidence:
    """Memory readings and the parameters of the search."""

    readings: list[Reading]  # smallest size first
    bracket: Bracket
    resolution: float
    growth: int

    @cached_property
    def fits(self) -> list[Reading]:
        return [r for r in self.readings if r.fits]

    @property
    def top(self) -> Reading:
        """Reading of the largest fit."""
        return self.fits[-1]

    @cached_property
    def failed(self) -> list[Reading]:
        """Reading of the smallest failure, if its peak is known."""
        return [r for r in self.readings if r.size == self.bracket.bad]

    @property
    def margin(self) -> float:
        """Share left free below a limit, because memory is never quite on a line."""
        return self.resolution / 2

    @cached_property
    def line(self) -> LinearFit:
        """An exact line, also one that continues after a jump, or else a rough one."""
        exact = LinearFit.through(self.fits, self.resolution / 4)
        if exact.is_proven:
            return exact
        before = self.line_before
        if before is not None and exact.is_parallel(before, self.resolution / 4):
            return exact._replace(witnesses=1)
        rough = LinearFit.through(self.fits, 2 * self.resolution)
        return exact if rough.is_convex else rough

    @cached_property
    def line_before(self) -> LinearFit | None:
        """Line through the readings before the last one or two, which have left it."""
        for count in (1, 2):
            if len(self.fits) - count < MIN_POINTS:
                return None
            line = LinearFit.through(self.fits[:-count], self.resolution)
            if line.points >= MIN_POINTS and line.limit < _FLAT * line.last.size:
                return line
        return None


def forecast(evidence: Evidence) -> Forecast:
    """Return the forecast of the first regime that applies."""
    regimes = (from_profiles, from_single_fit, from_flat, from_bend, from_jump)
    for regime in regimes:
        if (found := regime(evidence)) is not None:
            return found
    return from_line(evidence)


def from_profiles(evidence: Evidence) -> Forecast | None:
    """Follow one line or parabola per allocation, unless the profiles prove unreliable."""
    top, bad = evidence.top, evidence.bracket.bad
    limit = profile_limit(evidence.readings)
    if limit is None or (bad is not None and limit >= bad):
        return None
    before = profile_limit([r for r in evidence.readings if r is not top])
    if before is not None and limit > (1 + evidence.resolution) * before + 1:
        # The limit recedes on approach: the allocations compared are not the same ones
        return None
    if limit == UNLIMITED:
        return Forecast(limit, evidence.growth * top.size, is_certain=False)
    if len(evidence.fits) < MIN_POINTS and limit > evidence.growth * top.size:
        # Far to extrapolate: check the prediction half-way, at the geometric mean
        return Forecast(limit, math.isqrt(limit * top.size), is_certain=True)
    return Forecast(limit, limit, is_certain=True)


def from_single_fit(evidence: Evidence) -> Forecast | None:
    """Grow in proportion to the headroom, since one reading shows no slope."""
    if len(evidence.fits) > 1:
        return None
    factor = min(evidence.growth, _SECOND_READING * evidence.top.headroom)
    return Forecast(UNLIMITED, evidence.top.size * factor, is_certain=False)


def from_flat(evidence: Evidence) -> Forecast | None:
    """Take long steps if memory does not grow with the batch size yet."""
    line, top, bad = evidence.line, evidence.top, evidence.bracket.bad
    if line.limit <= _FLAT * top.size or top.size < 2 * line.first.size:
        return None
    if bad is None:
        return Forecast(UNLIMITED, 2 * evidence.growth * top.size, is_certain=False)
    # Memory may start to grow in proportion right above the last reading
    safe = max(top.size, min(top.proportional_limit, bad))
    return Forecast(UNLIMITED, math.sqrt(safe * bad), is_certain=False)


def from_bend(evidence: Evidence) -> Forecast | None:
    """Follow a parabola that fits the readings better than a line, unless a failure denies it."""
    bad = evidence.bracket.bad
    if len(evidence.fits) < MIN_POINTS:
        return None
    *before, a, b, top = evidence.fits
    parabola = QuadraticFit.through_peaks((a, b, top))
    limit = parabola.limit(top.peak + top.left)
    tolerance = evidence.resolution * top.room  # bytes
    bend = parabola.curvature * (b.size - a.size) * (top.size - b.size)  # bytes off the line
    # After a failure that a line did not predict, a smaller bend is evidence enough
    is_bent = bend > (2 * tolerance if bad is None else tolerance / 32)
    is_denied = bad is not None and limit >= bad
    if not is_bent or is_denied:
        return None
    if any(abs(parabola.at(r.size) - r.peak) > tolerance for r in before):
        return None
    size = limit - int(evidence.margin * limit)
    # Certain if the parabola through the readings before has predicted the last peak
    is_certain = bool(before) and (
        abs(QuadraticFit.through_peaks((before[-1], a, b)).at(top.size) - top.peak) <= tolerance
    )
    return Forecast(limit, size, is_certain)


def from_jump(evidence: Evidence) -> Forecast | None:
    """Approach a jump of memory in small steps if the line promised the size that failed.

    Readings beyond the jump make it predictable; another failure would not.
    """
    line, bad, resolution = evidence.line, evidence.bracket.bad, evidence.resolution
    is_trusted = line.is_proven or evidence.fits == [line.first, line.last]
    if bad is None or not is_trusted:
        return None
    good = line.last.size
    is_well_above = bad > (1 + 2 * (resolution + line.residual)) * good
    if not is_well_above or line.limit < bad:
        return None
    size = math.sqrt(good * bad)
    if line.limit <= _MAX_OVERSHOOT * bad and _JUMP_STEP * good < bad:
        size = max(bad / 2, _JUMP_STEP * good)
    return Forecast(line.limit, size, is_certain=False)


def from_line(evidence: Evidence) -> Forecast:
    """Follow the line through the last fits, no further than the readings justify."""
    line, top = evidence.line, evidence.top
    if line.is_proven:
        sizes = [line.limit - max(round(evidence.margin * line.limit), line.uncertainty)]
    else:
        sizes = _unproven_sizes(evidence)
    # A short line is not extrapolated far
    length = top.size - line.first.size
    sizes += [top.size * evidence.growth, top.size + evidence.growth * length]
    is_full = top.left <= evidence.margin * top.room
    noise = 2 * line.residual if line.is_noisy else 0.0
    return Forecast(line.limit, min(sizes), is_full or line.is_proven, noise)


def _unproven_sizes(evidence: Evidence) -> list[float]:
    """Limit the extrapolation from two readings that no third one confirms."""
    line, fits, top = evidence.line, evidence.fits, evidence.top
    size = line.limit - round(evidence.margin * line.limit)
    if len(fits) < MIN_POINTS:
        aim = min(size, top.size * min(evidence.growth, max(2, top.headroom)))
        return [aim - _MARGIN_OF_TWO * max(0.0, aim - top.size)]
    if line.limit < top.proportional_limit:
        # Memory has jumped, and may continue with the former slope
        before = evidence.line_before
        if before is None:
            return [top.proportional_limit]
        return [(top.size + top.left / before.slope) * (1 - evidence.margin)]
    if LinearFit.through(fits[:-1], 2 * evidence.resolution).limit > line.limit:
        # Memory rises ever faster, and a line overestimates the limit
        return [size, top.proportional_limit]
    return [size]


def exploratory_size(evidence: Evidence) -> int:
    """Return a safe size whose reading shows how memory grows; 0 if none is needed."""
    top, fits, bracket = evidence.top, evidence.fits, evidence.bracket
    profiled = with_profiles(evidence.readings)
    if top.size == 1 and len(top.profile) > 1:
        return bracket.clip(2)
    if profiled == [top]:
        double = min(2 * top.size, bracket.high)
        is_free = bracket.bad is None or double < bracket.bad
        is_safe = is_free and double <= top.proportional_limit
        return double if is_safe else max(2, top.size // 2)
    if len(fits) == 1 and top.headroom < _LOW_HEADROOM:
        return top.size // 2
    if not profiled and len(fits) == MIN_POINTS - 1 and limit_through(*fits) <= top.size:
        # At the limit already, if the line is true: a point between both readings tests it
        return (fits[0].size + top.size) // 2
    return 0
