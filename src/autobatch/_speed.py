"""What each size gives, timed in turns besides the trials: as slow as the slowest rank."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from autobatch._curve import curve_sizes, enough, in_turns, point
from autobatch._loading import Loading, loading_watch
from autobatch._timing import time_updates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._curve import CurvePoint
    from autobatch._record import Record
    from autobatch._timing import Timing
    from autobatch._trial import Trial
    from autobatch._workload import Bench, Workload

__all__ = ["Speed", "Timed"]


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
    record: Record
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

    def measure(
        self, samples: int | None, *, seconds: float, trial_seconds: float
    ) -> None:
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
            update_seconds=lambda size: (
                (tried[size].step_seconds or 0.0) * tried[size].accumulate
            ),
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
            self.curve = tuple(
                sorted((*self.curve, added), key=lambda each: each.batch_size)
            )
        else:
            self.unreached = (*self.unreached, size)

    def _try_aside(self, size: int) -> None:
        """Run a trial that the search did not ask for."""
        timed = self._timed
        timed.before(size)
        trials = timed.record.everywhere(lambda: timed.run(size, timed.pattern(size)))
        timed.restore()
        if all(trial.batch_size == size for trial in trials):
            self.aside[size] = trials
        else:
            self._failed.add(size)  # the workload can not fill it

    def _visit(self, size: int) -> Timing | None:
        """Time some updates of a size, as the slowest rank takes them; None where one of them ran out of memory."""
        timed = self._timed
        timed.before(size)
        visits = timed.record.everywhere(lambda: self._updates(size))
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
