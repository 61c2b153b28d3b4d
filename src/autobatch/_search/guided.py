"""GuidedBisection: bisection guided by measured memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from autobatch._search import _Bracket, _check_resolution
from autobatch._search.extrapolation import (
    NO_LIMIT,
    PROOF,
    LinearFit,
    QuadraticFit,
    Reading,
    limit_of,
    profile_limit,
    profiled,
    readings_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial

_NEAR = 1.5  # headroom under which a step down teaches more than a step up
_SHORT = 0.75  # of the headroom: the second trial leaves room for a third, that proves the line
_FLAT = 64  # times the size: a limit so far away says that memory does not grow yet
_FAR = 4  # times a failed size: a line that promises so much says nothing of where it fails
_STEP = 1.24  # how much larger the next size is where memory must jump: next to no jump is passed unseen


@dataclass(frozen=True)
class GuidedBisection:
    """Bisection with a better pivot than the middle: the size at which memory should reach the budget.

    Where trials carry profiles, two small sizes give one straight line per allocation, and the first line to reach
    the budget names the largest size; a third size turns them into parabolas where memory grows with the square of the
    batch, as that of all pairs of samples does. Bare peaks give one line, followed as far as it has proved right, or
    one parabola; where a size fails that it promised, memory jumps in between, and small steps look for where. Without
    either it is `Bisection`.

    The law, wherever memory never falls as the size grows: the size found is within `resolution` of the largest that
    fits (at least one sample), or it leaves unused at most `resolution` of the bytes between what was resident and
    the budget (at least one sample's share of them); where peaks scatter about a line by up to twice that, five times
    `resolution`. The first holds, and no trial fails unless the very first does, on straight lines below which a few
    sizes fit, and on maxima of straight lines whose profiles are true.

    Args:
        resolution: How close is close enough, as a share.
        growth: How many times larger the next size may be on the word of the peaks so far; twice that where memory
            does not grow with the size yet.
    """

    resolution: float = 0.01
    growth: int = 8

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)
        if type(self.growth) is not int or self.growth < 2:  # noqa: PLR2004
            raise ValueError(f"growth must be at least 2, got {self.growth!r}.")

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = _Bracket.of(trials, high)
        if bracket.closed(self.resolution):
            return None
        readings = readings_of(trials, budget)
        fits = [r for r in readings if r.fits]
        over = [r for r in readings if r.size == bracket.bad]
        if not bracket.good:
            return bracket.clip(min([bracket.middle, *(r.in_proportion for r in over)]))
        if not fits or fits[-1].size < bracket.good:
            return bracket.middle
        small = _small_size(readings, fits, bracket)
        if small > bracket.refused and all(small != t.batch_size for t in trials):
            return small
        forecast = self._from_profiles(readings, fits, bracket)
        forecast = forecast or self._from_peaks(fits, over, bracket)
        near = self.resolution + forecast.noise
        if bracket.closed(near):
            return None
        if forecast.sure and self._spent(fits[-1], forecast.limit, near):
            return None
        return self._step(trials, bracket, forecast)

    def _from_profiles(
        self, readings: list[Reading], fits: list[Reading], bracket: _Bracket
    ) -> _Forecast | None:
        """Follow one line per allocation, or parabola; None where profiles are missing or do not tell the truth."""
        top = fits[-1]
        limit = profile_limit(readings)
        if limit is None or (bracket.bad is not None and limit >= bracket.bad):
            return None
        before = profile_limit([r for r in readings if r is not top])
        if before is not None and limit > (1 + self.resolution) * before + 1:
            # A limit that recedes as it is come near: allocations that do not match, say
            return None
        if limit == NO_LIMIT:
            return _Forecast(limit, self.growth * top.size, sure=False)
        if len(fits) >= PROOF:
            # Peaks read further up know better.
            limit = min(limit, limit_of(fits[-2], top))
        elif limit > self.growth * top.size:
            # A long way: see whether the middle of it, in proportion, is as foretold.
            return _Forecast(limit, math.isqrt(limit * top.size), sure=True)
        return _Forecast(limit, limit, sure=True)

    def _from_peaks(self, fits: list[Reading], over: list[Reading], bracket: _Bracket) -> _Forecast:
        """Follow the line through the last fits, as far as it has proved right."""
        top, bad = fits[-1], bracket.bad
        if len(fits) == 1:
            aim = top.size * min(self.growth, _SHORT * top.headroom)
            return _Forecast(NO_LIMIT, aim, sure=False)
        line = self._line(fits)
        if line.limit > _FLAT * top.size and top.size >= 2 * line.base.size:
            return _Forecast(NO_LIMIT, self._along(top, bad), sure=False)
        if bent := self._along_a_bend(fits, bad):
            return bent
        trusted = line.is_proven or fits == [line.base, top]
        if bad is not None and trusted and self._promises(line, bad):
            return _Forecast(line.limit, self._before_a_jump(line, bad), sure=False)
        # Half the resolution stays free, since nothing is quite straight.
        spare = max(int(self.resolution / 2 * line.limit), line.doubt)
        aims = [line.limit - spare] if line.is_proven else self._doubted(line, fits)
        aims += [limit_of(top, r) for r in over]
        # A short line says little about far away.
        apart = top.size - line.base.size
        aims += [top.size * self.growth, top.size + self.growth * apart]
        # It takes more to end a search than to go on.
        straight = line.is_noisy or line.stray <= self.resolution / 2
        noise = 2 * line.stray if line.is_noisy else 0.0
        full = top.left <= self.resolution / 2 * top.room
        sure = full or (line.is_proven and straight)
        return _Forecast(line.limit, min(aims), sure, noise)

    def _along_a_bend(self, fits: list[Reading], bad: int | None) -> _Forecast | None:
        """Follow a parabola, where readings lie on one rather than on a line, and a failure does not deny it."""
        if len(fits) < PROOF:
            return None
        *before, a, b, top = fits
        parabola = _parabola(a, b, top)
        limit = parabola.limit(top.peak + top.left)
        near = self.resolution * top.room
        off = parabola.bend * (b.size - a.size) * (top.size - b.size)
        # Where a line has promised what failed, less of a bend is enough
        is_bent = off > (2 * near if bad is None else near / 32)
        is_denied = bad is not None and limit >= bad
        if not is_bent or is_denied:
            return None
        if any(abs(parabola.at(r.size) - r.peak) > near for r in before):
            return None
        aim = limit - int(self.resolution / 2 * limit)
        last = [_parabola(r, a, b).at(top.size) for r in before[-1:]]
        sure = any(abs(foretold - top.peak) <= near for foretold in last)
        return _Forecast(limit, aim, sure)

    def _line(self, fits: list[Reading]) -> LinearFit:
        """The line to follow: an exact one, also one that goes on after a jump, or else a rough one."""
        exact = LinearFit.through(fits, self.resolution / 4)
        if exact.is_proven:
            return exact
        before = self._before(fits)
        if before is not None and exact.is_parallel(before, self.resolution / 4):
            return exact._replace(witnesses=1)
        rough = LinearFit.through(fits, 2 * self.resolution)
        return exact if rough.is_bent else rough

    def _before(self, fits: list[Reading]) -> LinearFit | None:
        """The line that readings were on, where the last one or two have left it."""
        for count in (1, 2):
            if len(fits) - count < PROOF:
                return None
            before = LinearFit.through(fits[:-count], self.resolution)
            if before.points >= PROOF and before.limit < _FLAT * before.top.size:
                return before
        return None

    def _doubted(self, line: LinearFit, fits: list[Reading]) -> list[float]:
        """How far to follow two readings that no third one confirms."""
        top = line.top
        aim = line.limit - int(self.resolution / 2 * line.limit)
        if len(fits) < PROOF:
            return [aim, top.size * min(self.growth, max(2, top.headroom))]
        if line.limit < top.in_proportion:
            # It has jumped, and may go on as before
            before = self._before(fits)
            if before is None:
                return [top.in_proportion]
            further = top.left / before.slope
            return [(top.size + further) * (1 - self.resolution / 2)]
        if LinearFit.through(fits[:-1], 2 * self.resolution).limit > line.limit:
            # It bends upwards, where lines promise too much
            return [aim, top.in_proportion]
        return [aim]

    def _promises(self, line: LinearFit, bad: int) -> bool:
        """Whether a size that fails is foretold to fit, well above the largest that does."""
        well_above = bad > (1 + 2 * (self.resolution + line.stray)) * line.top.size
        return well_above and line.limit >= (1 - self.resolution) * bad

    def _before_a_jump(self, line: LinearFit, bad: int) -> float:
        """In small steps, not to fail again: where they meet the jump, memory past it can be foretold."""
        good = line.top.size
        if line.limit > _FAR * bad:
            return math.sqrt(good * bad)
        if _STEP * good < bad:
            return max(bad / 2, _STEP * good)
        if line.limit <= (1 + 2 * self.resolution) * bad:
            # Rather noise than a jump
            return (1 - 2 * self.resolution) * bad
        return math.sqrt(good * bad)

    def _along(self, top: Reading, bad: int | None) -> float:
        """How far to go where memory does not grow yet: it may begin to right here, in proportion to the size."""
        if bad is None:
            return 2 * self.growth * top.size
        sure = max(top.size, min(top.in_proportion, bad))
        return math.sqrt(sure * bad)

    def _spent(self, top: Reading, limit: int, near: float) -> bool:
        """Whether the next size is foretold not to fit, and an error about it would waste next to nothing."""
        gap = max(1, int(near * (limit + 1)))
        share = max(near, 1 / top.size)
        return limit + 1 - top.size <= gap and top.left <= share * top.room

    def _step(self, trials: Sequence[Trial], bracket: _Bracket, forecast: _Forecast) -> int:
        """Go where the forecast points, but let no three trials narrow the doubt too little."""
        good, bad = bracket.good, bracket.bad
        # Where the next size is foretold not to fit, this one proves it.
        aim = max(forecast.aim, good + max(1, int(self.resolution * good)))
        before = _Bracket.of(trials[:-3], bracket.high)
        if bad is None:
            # In doubt it goes on in steps that grow, as long as none has failed
            in_doubt = not forecast.sure or forecast.aim <= good
            if good < 2 * before.good and in_doubt:
                aim = max(aim, min(2 * good - before.good, forecast.limit))
            return bracket.clip(aim)
        slow = before.bad is not None and before.low * bad**2 > before.bad * good**2
        return bracket.clip(math.isqrt(good * bad) if slow or aim >= bad else aim)


class _Forecast(NamedTuple):
    limit: int  # largest size foretold to fit
    aim: float  # how far to follow it in one step
    sure: bool  # whether it may end the search
    noise: float = 0.0  # share of a size within which readings do not tell sizes apart


def _parabola(a: Reading, b: Reading, top: Reading) -> QuadraticFit:
    """The curve through three peaks."""
    return QuadraticFit.through((a.size, b.size, top.size), (a.peak, b.peak, top.peak))


def _small_size(readings: list[Reading], fits: list[Reading], bracket: _Bracket) -> int:
    """Name a size that teaches how memory grows, and is safe; 0 where none is wanted."""
    top, seen = fits[-1], profiled(readings)
    if top.size == 1 and len(top.profile) > 1:
        return bracket.clip(2)
    if seen == [top]:
        up = min(2 * top.size, bracket.high)
        free = bracket.bad is None or up < bracket.bad
        return up if free and up <= top.in_proportion else max(2, top.size // 2)
    if len(fits) == 1 and top.headroom < _NEAR:
        return top.size // 2
    if not seen and len(fits) == PROOF - 1 and limit_of(*fits) <= top.size:
        # The limit already, if the line is one: a point between them shows it.
        return (fits[0].size + top.size) // 2
    return 0
