"""Run trials on every rank within the time limit, restoring all state after each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._plan import CONFIRMATIONS
from autobatch._trials import Outcome, Trial, run_trial
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._settings import Settings
    from autobatch._subject import Subject
    from autobatch._trials.snapshot import Snapshot
    from autobatch._trials.workload import Bench
    from autobatch.sinks import Progress

_WORST_LAST: Final = (
    Outcome.FIT,
    Outcome.OVER_BUDGET,
    Outcome.OUT_OF_MEMORY,
    Outcome.REFUSED,
)


def merged(trials: Sequence[Trial], budgets: Sequence[int]) -> Trial:
    """The trial of one size on all ranks as one: as slow as the slowest, as close to its budget as the closest.

    Ranks may have different budgets. Bytes are counted on the scale of the smallest, from where that ends.
    """
    if len(trials) == 1:
        return trials[0].judged(budgets[0])
    judged = [trial.judged(budget) for trial, budget in zip(trials, budgets, strict=True)]
    worst = max(judged, key=lambda trial: _WORST_LAST.index(trial.outcome))
    size = min(trial.batch_size for trial in judged)
    if worst.peak is None:
        return replace(worst, batch_size=size)
    closest, budget = max(
        zip(judged, budgets, strict=True),
        key=lambda pair: (pair[0].peak or 0) - pair[1],
    )
    spare = budget - min(budgets)
    return replace(
        closest,
        batch_size=size,
        outcome=worst.outcome,
        peak=(closest.peak or 0) - spare,
        resident=max(0, closest.resident - spare),
        profile=tuple(nbytes - spare for nbytes in closest.profile),
        step_seconds=_slowest(trial.step_seconds for trial in judged),
        optimizer_seconds=_slowest(trial.optimizer_seconds for trial in judged),
    )


def _slowest(seconds: Any) -> float | None:
    known = [each for each in seconds if each is not None]
    return max(known, default=None)


class TimeLimit:
    """A limit in seconds, on a device's own clock; None never ends.

    A trial is taken to last no longer than in proportion to one that ran, the `yardstick`; where none has run yet
    there is nothing to judge by, and time for it.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._began = clock()
        self._seconds: dict[int, float] = {}  # of each trial, by its size
        self._left_out = 0.0  # seconds that have a bound of their own

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def limit(self) -> float | None:
        """Seconds that there are in all, as they were asked."""
        return self._limit

    def leave_out(self, seconds: float) -> None:
        """Count so many of those spent for nothing: they have a bound of their own."""
        self._left_out += seconds

    @property
    def largest(self) -> int | None:
        """The largest size that was run, however it ended."""
        return max(self._seconds, default=None)

    def nearest(self, batch_size: int) -> int | None:
        """The smallest size that was run and is no smaller than this; the largest, where there is none."""
        above = (size for size in self._seconds if size >= batch_size)
        return min(above, default=self.largest)

    def record(self, batch_size: int, seconds: float) -> None:
        """Remember how long the trial of a size took."""
        self._seconds[batch_size] = seconds

    def seconds_of(self, batch_size: int) -> float:
        """What the trial of a size took."""
        return self._seconds[batch_size]

    def allows(self, batch_size: int, yardstick: int | None, reserve: float) -> bool:
        """Whether a trial would be over in time, with so many seconds kept for what comes after."""
        if self._limit is None or yardstick is None:
            return True
        expected = self._seconds[yardstick] * max(1.0, batch_size / yardstick)
        return self._counted + expected + reserve <= self._limit

    def affordable(self, yardstick: int | None, reserve: float) -> int | None:
        """The largest size sure to be over in half of the time left; None where nothing limits it."""
        if self._limit is None or yardstick is None:
            return None
        spare = (self._limit - self._counted - reserve) / 2
        return max(1, int(yardstick * spare / max(self._seconds[yardstick], 1e-9)))

    @property
    def _counted(self) -> float:
        return self.spent - self._left_out


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of what it did."""

    result: Any
    budget: int  # bytes this rank may hold
    seconds: float  # on this rank's clock


class TrialHistory:
    """What was tried so far, the same on every rank.

    Args:
        probe: This rank's device.
        memory_limit: What of it may be held, as the user says it.
        ranks: Who tries together.
    """

    def __init__(self, probe: MemoryProbe, memory_limit: float | str, ranks: Ranks) -> None:
        self._probe = probe
        self.ranks = ranks
        self._limit = parse_memory_limit(memory_limit)
        self.reading = probe.read()
        self._own_budget = memory_budget(self.reading, self._limit)
        self._budgets: Sequence[int] = ()  # of each rank
        # Seconds on rank 0's clock, by which all of them decide about time
        self.now = 0.0
        # Of every rank each, in the order they were run
        self._trials: list[Sequence[Trial]] = []

    @property
    def trials(self) -> list[Trial]:
        """All of them, judged by the budgets that hold now."""
        return [self.judged(trials) for trials in self._trials]

    @property
    def fitting(self) -> list[int]:
        """The sizes that ran and fit, in ascending order."""
        return sorted({trial.batch_size for trial in self.trials if trial.fits})

    @property
    def budget(self) -> int:
        """The smallest that a rank has, in bytes."""
        return min(self._budgets)

    def read_budget(self) -> int:
        """This rank's smallest budget so far: others may take memory at any time."""
        self.reading = self._probe.read()
        budget = memory_budget(self.reading, self._limit)
        self._own_budget = min(self._own_budget, budget)
        return self._own_budget

    def begin(self, check: Callable[[], None]) -> None:
        """Let every rank check that it can begin."""
        self.everywhere(check)

    def add(self, run: Callable[[], Trial]) -> Trial:
        """Let every rank run a trial, and keep what they saw."""
        self.keep(self.everywhere(run))
        return self.trials[-1]

    def keep(self, trials: Sequence[Trial]) -> None:
        """Count a trial that every rank has run already."""
        self._trials.append(trials)

    def judged(self, trials: Sequence[Trial]) -> Trial:
        """A trial that every rank has run, as one."""
        return merged(trials, self._budgets)

    def everywhere(self, act: Callable[[], T]) -> list[T]:
        """Run `act` on every rank and return all results."""
        with self.ranks.abort_together():
            return self.gather(act())

    def gather(self, result: T) -> list[T]:
        """Return the results of all ranks, and update the budgets and the clock of rank 0."""
        said = self.ranks.gather(_Told(result, self._own_budget, self._probe.clock()))
        self._budgets = [each.budget for each in said]
        self.now = said[0].seconds
        return [each.result for each in said]


class TrialRunner:
    """The trials of one tuning run, and the time that is left for them.

    Args:
        job: What is tuned.
        settings: What was asked for.
        bench: What trials run on.
        record: What every rank saw so far.
        snapshot: Gives back what a trial changes.
        shown: Where progress is shown.
        ranks: Who tries together.
    """

    deadline: TimeLimit  # from the beginning on

    def __init__(
        self,
        job: Subject,
        settings: Settings,
        bench: Bench,
        record: TrialHistory,
        snapshot: Snapshot,
        shown: Progress,
        ranks: Ranks,
    ) -> None:
        self._job, self._settings, self._record = job, settings, record
        self._snapshot, self._shown, self._ranks = snapshot, shown, ranks
        self.bench = bench
        self.target = _within(
            settings.target_batch_size, job.update_at_most, ranks.world_size
        )  # the effective batch to go for; None where none is
        self.out_of_time = False  # whether a size was left out for that

    def begin(self) -> None:
        """Count the time from now on."""
        self.deadline = TimeLimit(self._settings.time_limit, lambda: self._record.now)

    def attempt(self, size: int, *, accumulate: int | None = None) -> Trial:
        """Run one trial, and put everything back: each starts from the same state."""
        began = self.deadline.spent
        self._show(size)
        pattern = accumulate or self.accumulate_at(size)
        trial = self._record.add(lambda: self.run(size, pattern))
        self._snapshot.restore()
        self.deadline.record(trial.batch_size, self.deadline.spent - began)
        if self._ranks.rank == 0:
            best = max(self._record.fitting, default=None)
            self._shown.tried(trial, best=best, budget=self._record.budget)
        return trial

    def run(self, size: int, accumulate: int) -> Trial:
        """This rank's part of a trial."""
        self.bench.probe.attach(*self._snapshot.alive)
        try:
            return run_trial(
                self._job.workload,
                size,
                accumulate=accumulate,
                steps=self._settings.steps_per_trial,
                bench=self.bench,
            )
        except AutobatchError:
            raise
        except Exception as error:
            if not any(size < trial.batch_size for trial in self._record.trials):
                raise
            # Larger ones ran, or ran out of memory: it is too small for the workload (a single sample and BatchNorm)
            return Trial(size, Outcome.REFUSED, accumulate=accumulate, error=repr(error))

    def accumulate_at(self, size: int) -> int:
        """The pattern that training will use: with accumulation, gradients live on through the next micro-batch."""
        if not self._job.can_accumulate:
            return 1
        target = self.target
        if target is None:
            return min(2, self._job.accumulate)
        return 1 if size * self._ranks.world_size >= target else 2

    def before(self, size: int) -> None:
        """Say which size comes now, and tell the probe what is there."""
        self._show(size)
        self.bench.probe.attach(*self._snapshot.alive)

    def _show(self, size: int) -> None:
        if self._ranks.rank == 0:
            self._shown.trying(size)

    def in_time(self, size: int) -> bool:
        """Whether a trial would be over in time, and those that may have to confirm a plan."""
        return self.deadline.allows(size, self._yardstick, self._reserve)

    @property
    def _yardstick(self) -> int | None:
        return self._record.fitting[-1] if self._record.fitting else self.deadline.largest

    @property
    def _reserve(self) -> float:
        """Seconds for the trials that may have to confirm a plan, none of them larger than what ran."""
        if self.target is None or not self._record.fitting:
            return 0.0
        return CONFIRMATIONS * self.deadline.seconds_of(self._record.fitting[-1])

    @property
    def affordable(self) -> int | None:
        """The largest size that there is time for; None where nothing limits it."""
        return self.deadline.affordable(self._yardstick, self._reserve)

    def takes_its_time(self, size: int) -> bool:
        """Whether there is time for one more trial; where there is not, the report tells."""
        allowed = self.deadline.allows(size, self._yardstick, 0.0)
        self.out_of_time = self.out_of_time or not allowed
        return allowed


def _within(target: int | None, most: int | None, world_size: int) -> int | None:
    """The effective batch to go for: what was asked, or as much of it as there is."""
    if target is None or most is None or target <= most:
        return target
    return max(world_size, most - most % world_size)
