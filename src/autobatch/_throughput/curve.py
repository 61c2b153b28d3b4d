"""Time several batch sizes in turns."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

from autobatch._throughput import CurvePoint
from autobatch._throughput.loading import Loading, loading_watch
from autobatch._trials.timing import time_updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from autobatch._trials import Trial
    from autobatch._trials.runner import TrialHistory
    from autobatch._trials.timing import Timing
    from autobatch._trials.workload import Bench, Workload

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
    seconds = [taken / accumulate for timing in timings for taken in timing.update_seconds]
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


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed, and how.

    Args:
        workload: A training loop that yields after every optimizer step.
        pattern: The accumulation at which a size is run.
        run: Runs a trial of a size, with so many micro-batches per update.
        bench: What it runs on.
        record: What every rank saw so far.
        before: Called with each size before it runs.
        restore: Puts everything back.
    """

    workload: Workload
    pattern: Callable[[int], int]
    run: Callable[[int, int], Trial]
    bench: Bench
    record: TrialHistory
    before: Callable[[int], None]
    restore: Callable[[], None]


class Speed:
    """The speed curve of a run, and how long its data were waited for meanwhile."""

    def __init__(self, timed: Timed) -> None:
        self.curve: tuple[CurvePoint, ...] = ()
        self.unreached: tuple[int, ...] = ()  # sizes that there was no time for
        # What every rank saw of sizes that were tried for the curve only
        self.aside: dict[int, Sequence[Trial]] = {}
        self._timed = timed
        self._waited = Loading(0.0, 0.0, 0)
        self._failed: set[int] = set()  # sizes that memory has no room for any more
        self._seconds = 0.0  # that timing may take, and has not

    @property
    def loading(self) -> Loading | None:
        """What reading data took beside the updates that were timed; None where no loader was read in them."""
        return self._waited if self._waited.batches else None

    def measure(self, samples: int | None, *, seconds: float, trial_seconds: float) -> None:
        """Time the sizes that fit and some below, for so many seconds at most.

        Args:
            samples: That each rank's share of an update should have, where that is known.
            seconds: For all of it.
            trial_seconds: What a trial takes, at most.
        """
        record = self._timed.record
        began = record.now

        def affordable(taken: float) -> bool:
            return record.now - began + taken <= seconds

        sizes = curve_sizes(record.fitting, samples)
        for size in reversed(sizes):
            # Half of the time is for the turns
            if size not in record.fitting and affordable(trial_seconds + seconds / 2):
                self._try_aside(size)
        tried = {trial.batch_size: trial for trial in record.trials if trial.fits}
        tried |= {size: record.judged(trials) for size, trials in self.aside.items()}
        timings = in_turns(
            [size for size in sizes if size in tried and tried[size].fits],
            visit=self._visit,
            affordable=affordable,
            update_seconds=lambda size: (tried[size].step_seconds or 0.0) * tried[size].accumulate,
        )
        failed = {size for size, trial in tried.items() if not trial.fits}
        self.unreached = tuple(
            size for size in sizes if size not in {*timings, *failed, *self._failed}
        )
        self.curve = tuple(
            point(size, self._timed.pattern(size), visits, tried[size].peak)
            for size, visits in timings.items()
        )
        self._seconds = seconds - (record.now - began)

    def add(self, size: int) -> None:
        """Time one more, which was run since, as far as there is time left."""
        reached = {each.batch_size for each in self.curve}
        if not reached or size in {*reached, *self.unreached}:
            return
        record = self._timed.record
        began = record.now
        trial = next(t for t in reversed(record.trials) if t.batch_size == size)
        visits = in_turns(
            [size],
            visit=self._visit,
            affordable=lambda taken: record.now - began + taken <= self._seconds,
            update_seconds=lambda _: (trial.step_seconds or 0.0) * trial.accumulate,
        ).get(size)
        if visits:
            added = point(size, self._timed.pattern(size), visits, trial.peak)
            self.curve = tuple(sorted((*self.curve, added), key=lambda each: each.batch_size))
        else:
            self.unreached = (*self.unreached, size)

    def _try_aside(self, size: int) -> None:
        """Run a trial that the search did not ask for."""
        timed = self._timed
        timed.before(size)
        with timed.record.ranks.abort_together():
            trials = timed.record.gather(timed.run(size, timed.pattern(size)))
        timed.restore()
        if all(trial.batch_size == size for trial in trials):
            self.aside[size] = trials
        else:
            self._failed.add(size)  # the workload can not fill it

    def _visit(self, size: int) -> Timing | None:
        """Time some updates of a size, as the slowest rank takes them; None where one of them ran out of memory."""
        timed = self._timed
        timed.before(size)
        with timed.record.ranks.abort_together():
            visits = timed.record.gather(self._updates(size))
        timed.restore()
        known = [visit for visit in visits if visit is not None]
        if len(known) < len(visits):
            self._failed.add(size)
            return None
        slowest = max(known, key=lambda visit: median(visit.timing.update_seconds))
        self._waited = _added(self._waited, slowest.loading)
        return slowest.timing

    def _updates(self, size: int) -> _Visit | None:
        # The host's own clock: to wait for the device here would slow down what is timed
        with loading_watch(time.perf_counter) as waited:
            before = Loading(0.0, 0.0, 0)

            def enough_of_them(taken: Sequence[float]) -> bool:
                nonlocal before
                if not taken:  # a loader has started its workers by now
                    before = Loading(waited.seconds, 0.0, waited.batches)
                return enough(taken)

            timing = time_updates(
                self._timed.workload,
                size,
                accumulate=self._timed.pattern(size),
                enough=enough_of_them,
                bench=self._timed.bench,
            )
        if timing is None:
            return None
        wait = waited.seconds - before.wait_seconds
        steps = max(0.0, sum(timing.update_seconds) - wait)
        return _Visit(timing, Loading(wait, steps, waited.batches - before.batches))


@dataclass(frozen=True, slots=True)
class _Visit:
    """One visit to a size, on one rank."""

    timing: Timing
    loading: Loading


def _added(one: Loading, other: Loading) -> Loading:
    return Loading(
        one.wait_seconds + other.wait_seconds,
        one.step_seconds + other.step_seconds,
        one.batches + other.batches,
    )
