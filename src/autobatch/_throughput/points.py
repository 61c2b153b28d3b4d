"""A point of the throughput curve from the timings of one size, and the noise of the machine."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Final

from autobatch._throughput import CurvePoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch._trials.timing import Timing

# Standard errors by which two turns may differ by chance: updates in a row share their noise
_STANDARD_ERRORS: Final = 3.0
_WAKE_UP_SECONDS: Final = 1e-4  # that another process can cost an update
# Shares by which updates are slower at times: on any machine, in the only turn of a size as far as
# anybody knows, and in many turns
_USUAL_NOISE: Final = 0.015
_FIRST_ERROR: Final = 0.2
_LEAST_ERROR: Final = 0.005


def point(
    batch_size: int, accumulate: int, timings: Sequence[Timing], peak: int | None, noise: float
) -> CurvePoint:
    """Return the point of the curve that the turns of one size give."""
    seconds = [each / accumulate for timing in timings for each in timing.update_seconds]
    optimizer = [each for timing in timings for each in timing.optimizer_seconds]
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    middle = statistics.median(seconds)
    first, *later = (statistics.median(timing.update_seconds) for timing in timings)
    drift = later[-1] / first if later and first else None
    return CurvePoint(
        batch_size=batch_size,
        accumulate=accumulate,
        step_seconds=middle,
        step_seconds_low=min(middle, deciles[0]),  # rounding may reverse them
        step_seconds_high=max(middle, deciles[-1]),
        optimizer_seconds=statistics.median(optimizer) if optimizer else None,
        updates=len(seconds),
        peak=peak,
        drift=drift,
        drift_error=None if drift is None else _drift_error(timings[0], timings[-1]),
        step_seconds_error=_error(len(timings), noise) * _undisturbed(timings) / accumulate,
        undisturbed_seconds=_undisturbed(timings) / accumulate,
    )


def noise_of(timings: Mapping[int, Sequence[Timing]]) -> float:
    """Return the share by which this machine slows updates down at times, over all turns.

    Other processes do that for as long as an update or many turns.
    """
    quick = [list(map(_quick, turns)) for turns in timings.values()]
    deciles = [_deciles(turn) for turns in timings.values() for turn in turns]
    pairs = [
        *((each[0], each[-1]) for each in deciles),
        *((min(each), max(each)) for each in quick),
    ]
    squares = [(slow / fast - 1) ** 2 for fast, slow in pairs if slow > fast > 0]
    return max(_USUAL_NOISE, math.sqrt(statistics.mean(squares)) if squares else 0.0)


def _undisturbed(timings: Sequence[Timing]) -> float:
    """Return the seconds of an update that nothing slowed down: the least of all turns."""
    return min(map(_quick, timings))


def _quick(timing: Timing) -> float:
    return float(_deciles(timing)[0])


def _deciles(timing: Timing) -> Sequence[float]:
    return statistics.quantiles(timing.update_seconds, n=10, method="inclusive")


def _error(turns: int, noise: float) -> float:
    """Return the share by which undisturbed updates may be quicker than those of these turns.

    Half of the turns of a machine that others use too are slow, so each turn halves the doubt.
    """
    least = _LEAST_ERROR if turns > 1 else _FIRST_ERROR
    return max(least, 3 * noise * 0.5 ** (turns - 1))


def _drift_error(one: Timing, other: Timing) -> float:
    """Return the distance from 1 that the ratio of two turns may have by chance."""
    middle = statistics.median(one.update_seconds)
    error = math.hypot(*(_median_error(each.update_seconds) for each in (one, other)))
    return (_STANDARD_ERRORS * error + _WAKE_UP_SECONDS) / middle


def _median_error(seconds: Sequence[float]) -> float:
    """Return the standard error of a median, from the quartiles.

    The quartiles of a normal distribution are 1.35 standard deviations apart, and the median of a
    sample has 1.25 times the standard error of its mean.
    """
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(seconds))
