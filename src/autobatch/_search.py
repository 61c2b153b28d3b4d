"""Which batch size to try next, given what has been tried."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from autobatch._trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trial import Trial

__all__ = ["Bisection", "GuidedBisection", "Search"]

_NEAR = 1.5  # headroom under which a step down teaches more than a step up
_SHORT = 0.75  # of the headroom: the second trial leaves room for a third, that proves the line
_LINE = 3  # points that prove a line
_NO_LIMIT = sys.maxsize  # where memory does not grow with the size
_MISBELIEF = 0.01  # of a measured peak: profiles that miss one by more are not believed


class Search(Protocol):
    """Which batch size to try next: a pure function of the history, so that ranks and reruns agree."""

    def propose(
        self, trials: Sequence[Trial], *, start: int, high: int, budget: int
    ) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""


@dataclass(frozen=True)
class Bisection:
    """Double until a size fails, then halve what is in doubt; never reads memory.

    Args:
        resolution: How far the largest fit may end below a size that failed, as a share of it; at least one sample.
    """

    resolution: float = 0.01

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)

    def propose(
        self,
        trials: Sequence[Trial],
        *,
        start: int,
        high: int,
        budget: int,  # noqa: ARG002
    ) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = _Bracket.of(trials, high)
        return None if bracket.closed(self.resolution) else bracket.middle


@dataclass(frozen=True)
class GuidedBisection:
    """Bisection with a better pivot than the middle: the size at which memory should reach the budget.

    Where trials carry profiles, two small sizes give one straight line per allocation, and the first line to reach
    the budget names the largest size. Bare peaks give one line, followed as far as it has proved right. Without
    either it is `Bisection`.

    The law, wherever memory never falls as the size grows: the size found is within `resolution` of the largest that
    fits (at least one sample), or it leaves unused at most `resolution` of the bytes between what was resident and
    the budget (at least one sample's share of them). The first holds, and no trial fails unless the very first does,
    on straight lines below which a few sizes fit, and on maxima of straight lines whose profiles are true.

    Args:
        resolution: How close is close enough, as a share.
        growth: How many times larger the next size may be on the word of the peaks so far.
    """

    resolution: float = 0.01
    growth: int = 8

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)
        if type(self.growth) is not int or self.growth < 2:  # noqa: PLR2004
            raise ValueError(f"growth must be at least 2, got {self.growth!r}.")

    def propose(
        self, trials: Sequence[Trial], *, start: int, high: int, budget: int
    ) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = _Bracket.of(trials, high)
        if bracket.closed(self.resolution):
            return None
        readings = _readings(trials, budget)
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
        forecast = forecast or self._from_peaks(fits, over)
        if forecast.sure and self._spent(fits[-1], forecast.limit):
            return None
        return self._step(trials, bracket, forecast)

    def _from_profiles(
        self, readings: list[_Reading], fits: list[_Reading], bracket: _Bracket
    ) -> _Forecast | None:
        """Follow one line per allocation; None where profiles are missing or do not tell the truth."""
        top = fits[-1]
        limit = _profile_limit(readings)
        if limit is None or (bracket.bad is not None and limit >= bracket.bad):
            return None
        if limit == _NO_LIMIT:
            return _Forecast(limit, self.growth * top.size, sure=False)
        if len(fits) >= _LINE:
            # Peaks read further up know better.
            limit = min(limit, _limit(fits[-2], top))
        elif limit > self.growth * top.size:
            # A long way: see whether half of it is as foretold.
            return _Forecast(limit, limit // 2, sure=True)
        return _Forecast(limit, limit, sure=True)

    def _from_peaks(self, fits: list[_Reading], over: list[_Reading]) -> _Forecast:
        """Follow the line through the last fits, as far as it has proved right."""
        top = fits[-1]
        careful = min(self.growth, max(2, top.headroom))
        if len(fits) == 1:
            aim = top.size * min(self.growth, _SHORT * top.headroom)
            return _Forecast(_NO_LIMIT, aim, sure=False)
        miss = _miss(fits)
        steady = abs(miss) <= self.resolution
        base = fits[-_LINE] if steady else fits[-2]
        limit = _limit(base, top)
        aims: list[float] = [_limit(top, r) for r in over]
        # Half the resolution stays free, since nothing is quite straight.
        aims += [limit - int(self.resolution / 2 * limit)]
        aims += [top.size * (self.growth if steady else careful)]
        # A short line says little about far away.
        aims += [top.size + self.growth * (top.size - base.size)]
        if self.resolution < miss < math.inf:
            # It bends upwards, where lines promise too much.
            aims += [top.in_proportion]
        # It takes more to end a search than to go on.
        return _Forecast(limit, min(aims), sure=abs(miss) <= self.resolution / 2)

    def _spent(self, top: _Reading, limit: int) -> bool:
        """Whether the next size is foretold not to fit, and an error about it would waste next to nothing."""
        gap = max(1, int(self.resolution * (limit + 1)))
        share = max(self.resolution, 1 / top.size)
        return limit + 1 - top.size <= gap and top.left <= share * top.room

    def _step(
        self, trials: Sequence[Trial], bracket: _Bracket, forecast: _Forecast
    ) -> int:
        """Go where the forecast points, but let no three trials narrow the doubt too little."""
        good, bad = bracket.good, bracket.bad
        # Where the next size is foretold not to fit, this one proves it.
        aim = max(forecast.aim, good + max(1, int(self.resolution * good)))
        before = _Bracket.of(trials[:-3], bracket.high)
        if bad is None:
            slow = good < 2 * before.good and not forecast.sure
            return bracket.clip(max(aim, 2 * good - before.good) if slow else aim)
        slow = before.bad is not None and before.low * bad**2 > before.bad * good**2
        return bracket.clip(math.isqrt(good * bad) if slow or aim >= bad else aim)


class _Forecast(NamedTuple):
    limit: int  # largest size foretold to fit
    aim: float  # how far to follow it in one step
    sure: bool  # whether it may end the search


class _Bracket(NamedTuple):
    good: int  # largest size that fits; 0 when none does
    refused: int  # largest size too small for the workload; 0 when none is
    bad: int | None  # smallest failure above these: one below a fit is noise
    high: int

    @classmethod
    def of(cls, trials: Sequence[Trial], high: int) -> _Bracket:
        good = max((t.batch_size for t in trials if t.fits), default=0)
        small = [t.batch_size for t in trials if t.outcome is Outcome.REFUSED]
        refused = max(small, default=0)
        failed = [t.batch_size for t in trials if not t.fits]
        above = [size for size in failed if size > max(good, refused)]
        return cls(good, refused, min(above, default=None), high)

    @property
    def low(self) -> int:
        return max(self.good, self.refused)

    @property
    def middle(self) -> int:
        if self.bad is None:
            return self.clip(2 * self.low)
        return self.clip((self.low + self.bad) // 2)

    def clip(self, size: float) -> int:
        ceiling = self.high if self.bad is None else min(self.high, self.bad - 1)
        return int(min(max(size, self.low + 1), ceiling))

    def closed(self, resolution: float) -> bool:
        if self.low >= self.high:
            return True
        if self.bad is None:
            return False
        gap = max(1, int(resolution * self.bad)) if self.good else 1
        return self.bad - self.low <= gap


class _Reading(NamedTuple):
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


def _readings(trials: Sequence[Trial], budget: int) -> list[_Reading]:
    """Every size whose peak was read, smallest first."""
    read = {
        t.batch_size: _Reading(
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


def _profiled(readings: list[_Reading]) -> list[_Reading]:
    """Leave out size 1: a single sample takes other paths through the code."""
    return [r for r in readings if r.size > 1 and len(r.profile) > 1]


def _small_size(
    readings: list[_Reading], fits: list[_Reading], bracket: _Bracket
) -> int:
    """Name a size that teaches how memory grows, and is safe; 0 where none is wanted."""
    top, profiled = fits[-1], _profiled(readings)
    if top.size == 1 and len(top.profile) > 1:
        return bracket.clip(2)
    if profiled == [top]:
        up = min(2 * top.size, bracket.high)
        free = bracket.bad is None or up < bracket.bad
        return up if free and up <= top.in_proportion else max(2, top.size // 2)
    if len(fits) == 1 and top.headroom < _NEAR:
        return top.size // 2
    if not profiled and len(fits) == _LINE - 1 and _limit(*fits) <= top.size:
        # The limit already, if the line is one: a point between them shows it.
        return (fits[0].size + top.size) // 2
    return 0


def _limit(a: _Reading, b: _Reading) -> int:
    """Size at which the line through two readings reaches the budget."""
    rise = b.peak - a.peak
    return b.size + b.left * (b.size - a.size) // rise if rise > 0 else _NO_LIMIT


def _miss(fits: list[_Reading]) -> float:
    """How far the top lies above the line through the two before it: a share of the room, less if it lies far off."""
    if len(fits) < _LINE:
        return math.inf
    a, b, top = fits[-_LINE:]
    distance = (top.size - b.size) / (b.size - a.size)
    foretold = b.peak + (b.peak - a.peak) * distance
    return (top.peak - foretold) / (1 + distance) / max(1, top.room)


def _profile_limit(readings: list[_Reading]) -> int | None:
    """Size at which the first allocation of a step would reach the budget; None where the lines miss a peak."""
    if len(profiled := _profiled(readings)) <= 1:
        return None
    a, b = profiled[:2]
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
    return min(reach, default=_NO_LIMIT)


def _check_resolution(resolution: float) -> None:
    if not isinstance(resolution, float) or not 0 < resolution < 1:
        raise ValueError(f"resolution must lie between 0 and 1, got {resolution!r}.")
