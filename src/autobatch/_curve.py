"""The speed curve: micro-batches timed over whole updates, in turns."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from autobatch._timing import Timing

__all__ = ["SECONDS", "CurvePoint", "curve_sizes", "enough", "in_turns", "point"]

SECONDS: float = 20.0  # the most that all of a curve may take

# Updates that are timed in one visit: a busy moment of the machine is then a visit to several sizes, not all of one
_LEAST: Final = 3
_MOST: Final = 10
_VISIT_SECONDS: Final = 0.5
_LONG_ENOUGH: Final = 0.02  # seconds of a visit: less is a moment of the scheduler
_QUICK_MOST: Final = 100  # updates of a visit, where they are quicker than that takes
# Standard errors by which two visits may differ without a cause: updates that follow each other are disturbed together
_ERRORS: Final = 3.0
_JITTER: Final = 1e-4  # seconds, that a wake-up of another process costs an update
_EXACT: Final = 3  # sizes besides, that give the target exactly


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


def curve_sizes(fitting: Sequence[int], samples: int | None) -> list[int]:
    """What to time: the sizes that fit, powers of two below, and the largest ones of which `samples` is a multiple."""
    largest = fitting[-1]
    powers = {2**exponent for exponent in range(largest.bit_length())}
    exact: list[int] = []
    if samples is not None:
        below = range(min(largest, samples), largest // 4, -1)
        exact = [size for size in below if samples % size == 0][:_EXACT]
    return sorted({*fitting, *powers, *exact})


def enough(update_seconds: Sequence[float]) -> bool:
    """Whether a visit has timed as many updates as it should."""
    taken, spent = len(update_seconds), sum(update_seconds)
    if taken >= _MOST:
        return spent >= _LONG_ENOUGH or taken >= _QUICK_MOST
    return taken >= _LEAST and spent >= _VISIT_SECONDS


def in_turns(
    sizes: Iterable[int],
    *,
    visit: Callable[[int], Timing | None],
    affordable: Callable[[float], bool],
    update_seconds: Callable[[int], float],
) -> dict[int, list[Timing]]:
    """Visit all sizes going up, and all of them again going down, leaving out what there is no time for.

    Where there is not even time to go up once, it goes down first: the large sizes are those that plans are made of.

    Args:
        sizes: To be timed.
        visit: Times one; None where that failed, and then it is left out.
        affordable: Whether there is time for something that takes so many seconds.
        update_seconds: What an update of a size is expected to take.
    """
    upwards = sorted(sizes)
    timings: dict[int, list[Timing]] = {size: [] for size in upwards}
    failed: set[int] = set()
    once = sum(_expected(update_seconds(size)) for size in upwards)
    turns = (upwards, upwards[::-1]) if affordable(once) else (upwards[::-1], upwards)
    for turn in turns:
        for size in turn:
            if size in failed or not affordable(_expected(update_seconds(size))):
                continue
            timing = visit(size)
            if timing is None:
                failed.add(size)
            else:
                timings[size].append(timing)
    return {size: each for size, each in timings.items() if each and size not in failed}


def _expected(update_seconds: float) -> float:
    """Seconds of a visit, with the update that is not timed."""
    most = _VISIT_SECONDS / update_seconds if update_seconds else _MOST
    quick = min(_QUICK_MOST, _LONG_ENOUGH / update_seconds) if update_seconds else _MOST
    return (1 + max(1 + quick, min(_MOST, max(_LEAST, most)))) * update_seconds


def point(
    batch_size: int, accumulate: int, timings: Sequence[Timing], peak: int | None
) -> CurvePoint:
    """What the visits to one size come to."""
    seconds = [
        taken / accumulate for timing in timings for taken in timing.update_seconds
    ]
    optimizer = [taken for timing in timings for taken in timing.optimizer_seconds]
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    middle = statistics.median(seconds)
    first, *later = (statistics.median(timing.update_seconds) for timing in timings)
    drift = later[-1] / first if later and first else None
    return CurvePoint(
        batch_size=batch_size,
        accumulate=accumulate,
        step_seconds=middle,
        step_seconds_low=min(middle, deciles[0]),  # but for rounding it is
        step_seconds_high=max(middle, deciles[-1]),
        optimizer_seconds=statistics.median(optimizer) if optimizer else None,
        updates=len(seconds),
        peak=peak,
        drift=drift,
        drift_error=None if drift is None else _drift_error(timings[0], timings[-1]),
    )


def _drift_error(one: Timing, other: Timing) -> float:
    """How far from 1 the ratio of two visits may be by chance."""
    middle = statistics.median(one.update_seconds)
    chance = math.hypot(*(_median_error(each.update_seconds) for each in (one, other)))
    return (_ERRORS * chance + _JITTER) / middle


def _median_error(seconds: Sequence[float]) -> float:
    """Standard error of a median, by the quartiles: of a normal spread, these are 1.35 deviations apart."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(seconds))
