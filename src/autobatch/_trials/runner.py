"""Run trials on every rank within the time limit, restoring all state after each."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from autobatch._memory import format_bytes
from autobatch._trials import Outcome, latest_by_size, trial_accumulation
from autobatch._trials.measure import run_trial
from autobatch._trials.time_limit import TimeLimit
from autobatch._trials.timing import time_together, time_updates
from autobatch._trials.workload import SizedWorkload
from autobatch.errors import AutobatchError, DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._settings import Settings
    from autobatch._trials import Trial
    from autobatch._trials.context import TrialContext
    from autobatch._trials.workload import Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Accumulation:
    """Gradient accumulation of a tuning run."""

    is_supported: bool  # the workload can accumulate
    default: int  # micro-batches per update without a target
    target: int | None  # samples per update to reach, over all ranks; None without a target
    replicas: int  # ranks that train on different data

    @property
    def samples(self) -> int | None:
        """Samples per update and rank that reach the target; None without one."""
        return None if self.target is None else per_rank(self.target, self.replicas)

    def in_update(self, batch_size: int) -> int:
        """Return the micro-batches per update in training, to about the target."""
        samples = self.samples
        return self.default if samples is None else max(1, round(samples / batch_size))

    def in_trial(self, batch_size: int) -> int:
        """Return the micro-batches per update in a trial of a size, as training will need them."""
        if not self.is_supported:
            return 1
        if self.target is None:
            return trial_accumulation(self.default)
        return 1 if batch_size * self.replicas >= self.target else 2


def per_rank(target: int, replicas: int) -> int:
    """Return the samples per update of each rank, rounded to the nearest whole number."""
    return max(1, round(target / replicas))


@dataclass(frozen=True, slots=True)
class _RankResult:
    """A value that one rank shares, with its budget and clock."""

    value: Any
    budget: int  # bytes
    now: float  # seconds


class TrialRunner:
    """Runs the trials of one tuning run, the same on every rank, and records them."""

    def __init__(
        self,
        workload: Workload,
        accumulation: Accumulation,
        settings: Settings,
        context: TrialContext,
        own_size: int | None,
    ) -> None:
        self.workload = workload
        self.accumulation = accumulation
        self.context = context
        self.time_limit = TimeLimit(settings.time_limit, 0.0)
        self.is_out_of_time = False  # whether a batch size was left out for lack of time
        self.settings = settings
        self.own_size = own_size  # the user's own, the same on every rank; None if not known
        self._ranks = context.ranks
        self._results: list[Sequence[Trial]] = []  # of every rank, in the order of the trials
        self._budgets: Sequence[int] = ()  # of every rank, in bytes
        self._now = 0.0  # reading of this rank's clock at the latest gather
        # Whether updates are timed with real collectives, all ranks in step: a module is sharded
        self.runs_together = False
        # Whether all ranks have run an update together; also True if they need not
        self._has_communicated = False

    # The record, the same on every rank

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, judged by the budgets that hold now."""
        return [self.merge(results) for results in self._results]

    @property
    def fitting(self) -> list[int]:
        """Batch sizes that ran and fit, in ascending order."""
        return sorted({trial.batch_size for trial in self.trials if trial.fits})

    @property
    def step_seconds(self) -> dict[int, float]:
        """Seconds of a step in the latest trial of each batch size that fits."""
        latest = latest_by_size(self.trials)
        return {size: trial.step_seconds or 0.0 for size, trial in latest.items() if trial.fits}

    @property
    def budget(self) -> int:
        """The smallest budget of all ranks, in bytes."""
        return min(self._budgets)

    def merge(self, results: Sequence[Trial]) -> Trial:
        """Return the results of all ranks as one trial."""
        return merged(results, self._budgets)

    def record(self, results: Sequence[Trial]) -> None:
        """Record a trial that every rank has run already."""
        if self._ranks.as_if:  # the other ranks do not run: its time is without communication
            results = [replace(each, step_seconds=None) for each in results]
        self._results.append(results)

    # Trials

    def begin(self, phase: str) -> None:
        """Show that a phase begins that has the rest of the time limit."""
        self.context.progress.begin(phase, self.time_limit.left)

    def start(self) -> None:
        """Check that the budget leaves memory for trials, and start the time limit."""
        context = self.context
        context.budget.restart()
        with self._ranks.abort_together():
            context.probe.attach(*context.snapshot.alive)
            context.probe.release()
            reading, budget = context.probe.read(), context.budget.read()
            if budget <= reading.reserved:
                raise DoesNotFitError(
                    f"memory_limit={self.settings.memory_limit!r} leaves a budget of "
                    f"{format_bytes(max(0, budget))} on {context.probe.name}, where other "
                    f"processes hold {format_bytes(reading.foreign)} and this process already "
                    f"holds {format_bytes(reading.reserved)}. Free memory on the device, or raise "
                    "memory_limit."
                )
            self.gather(None)
        self.time_limit = TimeLimit(self.settings.time_limit, self.time_limit.now)

    def run(self, batch_size: int, *, is_timed: bool, accumulate: int | None = None) -> Trial:
        """Run one trial on every rank, restore all state, and record the merged result.

        Without `accumulate` it accumulates as training at this size will.
        """
        began, deadline = self.time_limit.spent, self.deadline(self.time_limit.left)
        with self.on_every_rank(batch_size):
            sized, steps = self.sized(batch_size, accumulate), self.settings.steps_per_trial
            trial = run_trial(
                sized, steps=steps, is_timed=is_timed, deadline=deadline, context=self.context
            )
            self.record(self.gather(trial))
        self._communicate_once()
        trial = self.trials[-1]
        self.time_limit.record(trial.batch_size, self.time_limit.spent - began)
        best = max(self.fitting, default=None)
        self.context.progress.tried(trial, best=best, budget=self.budget)
        return trial

    def run_unrecorded(self, batch_size: int, seconds: float | None) -> Sequence[Trial]:
        """Run a trial on every rank without recording it; return the results of all ranks."""
        deadline = self.deadline(seconds)
        with self.on_every_rank(batch_size):
            sized, steps = self.sized(batch_size), self.settings.steps_per_trial
            trial = run_trial(
                sized, steps=steps, is_timed=False, deadline=deadline, context=self.context
            )
            return self.gather(trial)

    def _communicate_once(self) -> None:
        """Run one update of a sharded module by all ranks together, once a size fits.

        Memory that only real communication takes, such as the buffers of NCCL, is allocated then,
        and counts. A single sample takes the least.
        """
        trial = self.trials[-1]
        if self._has_communicated or not trial.fits:
            return
        is_sharded = any(self.gather(self.context.snapshot.has_sharded))
        if not is_sharded or self._ranks.world_size == 1:
            self._has_communicated = True
            return
        if self.settings.latency_limit is not None:
            raise AutobatchError(
                f"latency_limit={self.settings.latency_limit:g} is about time, and trials of a "
                "module that is divided among ranks leave out its communication; leave it out, or "
                "time calls by hand."
            )
        size = next(filter(self.has_room, sorted({1, trial.batch_size})), None)
        if size is None:
            return
        self._has_communicated = self.runs_together = True
        with self.on_every_rank(size, is_dry=False):
            time_together(self.sized(size), lambda _: True, self.context)
            self.context.budget.read()
            self.gather(None)

    def has_room(self, batch_size: int) -> bool:
        """Return whether all ranks run two dry updates of a size, whose memory stays in caches.

        The second one has the optimizer's state beside it, as all later ones do.
        """
        with self.on_every_rank(batch_size):
            timing = time_updates(self.sized(batch_size), bool, self.context)
            return all(self.gather(timing is not None))

    def sized(self, batch_size: int, accumulate: int | None = None) -> SizedWorkload:
        """Return the workload at a size, by default with the accumulation of its trial."""
        accumulate = accumulate or self.accumulation.in_trial(batch_size)
        may_be_refused = self.may_be_refused(batch_size)
        return SizedWorkload(self.workload, batch_size, accumulate, may_be_refused=may_be_refused)

    def deadline(self, seconds: float | None) -> float:
        """Return the reading of this rank's clock so many seconds after the latest gather."""
        return inf if seconds is None else self._now + seconds

    def may_be_refused(self, batch_size: int) -> bool:
        """Return False for the user's own size, or else the first that ran: errors are theirs."""
        ran = (trial.batch_size for trial in self.trials if trial.fits)
        own_size = next(ran, None) if self.own_size is None else self.own_size
        return batch_size != own_size

    def raise_first_refusal(self, *, is_timed: bool) -> None:
        """Run the first size again if the workload refused all: then its error is the user's."""
        trials = self.trials
        if trials and all(trial.outcome is Outcome.REFUSED for trial in trials):
            self.own_size = trials[0].batch_size
            self.run(self.own_size, is_timed=is_timed, accumulate=trials[0].accumulate)

    @contextmanager
    def on_every_rank(self, batch_size: int, *, is_dry: bool = True) -> Iterator[None]:
        """Prepare the block that runs a batch size, and restore all state after it.

        If it is dry, its collectives wait for no other rank, and an exception is raised on every
        rank. Otherwise a rank that fails may leave others waiting in a collective until its process
        ends.
        """
        self.context.progress.trying(batch_size)
        self.context.probe.attach(*self.context.snapshot.alive)
        with self._ranks.dry() if is_dry else nullcontext():
            with self._ranks.abort_together() if is_dry else self._ranks.in_step():
                yield
            self.context.snapshot.restore()

    def gather(self, value: T) -> Sequence[T]:
        """Return the values of all ranks, and update the budgets and the time."""
        self._now = self.context.probe.clock()
        results = self._ranks.gather(_RankResult(value, self.context.budget.nbytes, self._now))
        self._budgets = [result.budget for result in results]
        self.time_limit.now = results[0].now
        return [result.value for result in results]

    def verify(self, batch_size: int) -> bool:
        """Return whether a trial shows that a size fits; run one now if there is time."""
        if all(batch_size != trial.batch_size for trial in self.trials):
            if not self.check_time_for(batch_size):
                return False
            self.run(batch_size, is_timed=True)
        return batch_size in self.fitting

    def check_any_fits(self) -> None:
        """Raise DoesNotFitError if no batch size fits."""
        if self.fitting:
            return
        trials = sorted(self.trials, key=lambda trial: trial.batch_size)
        failures = "; ".join(trial.failure(self.budget) for trial in trials)
        if self.is_out_of_time:
            raise DoesNotFitError(
                "No batch size was found to fit within "
                f"time_limit={self.time_limit.limit:g} seconds: {failures}. Raise time_limit."
            )
        raise DoesNotFitError(
            f"No batch size fits the budget of {format_bytes(self.budget)} on "
            f"{self.context.probe.name}: {failures}. Free memory on the device, raise "
            "memory_limit, or shrink the model."
        )

    # Time

    def has_time_for(self, batch_size: int, *, trials_after: int) -> bool:
        """Return whether there is time for a trial, and more of the largest size that fits."""
        known, reserve = self._size_to_predict_from, self._seconds_of(trials_after)
        return self.time_limit.allows(batch_size, known, reserve)

    def affordable(self, *, trials_after: int) -> int | None:
        """Return the largest size expected to take half of the time left; None: any."""
        known, reserve = self._size_to_predict_from, self._seconds_of(trials_after)
        return self.time_limit.affordable(known, reserve)

    def check_time_for(self, batch_size: int) -> bool:
        """Return whether there is time for one more trial; remember if there is not."""
        has_time = self.has_time_for(batch_size, trials_after=0)
        self.is_out_of_time = self.is_out_of_time or not has_time
        return has_time

    @property
    def _size_to_predict_from(self) -> int | None:
        """The size whose trial predicts the time of others: the largest that fits, or else ran."""
        return self.fitting[-1] if self.fitting else self.time_limit.largest

    def _seconds_of(self, trials: int) -> float:
        if not trials or not self.fitting:
            return 0.0
        return trials * self.time_limit.seconds_of(self.fitting[-1])


def merged(trials: Sequence[Trial], budgets: Sequence[int]) -> Trial:
    """Merge the trials of one size on all ranks: the slowest, and the closest to its budget.

    Ranks may have different budgets. Bytes are shifted so that their distance to the smallest
    budget is the distance to the budget of their own rank.
    """
    if len(trials) == 1:
        return trials[0].judged(budgets[0])
    judged = [trial.judged(budget) for trial, budget in zip(trials, budgets, strict=True)]
    worst = max(judged, key=lambda trial: list(Outcome).index(trial.outcome))
    size = min(trial.batch_size for trial in judged)
    if worst.peak is None:
        return replace(worst, batch_size=size)
    closest, budget = max(
        zip(judged, budgets, strict=True), key=lambda pair: (pair[0].peak or 0) - pair[1]
    )
    shift = budget - min(budgets)
    return replace(
        closest,
        batch_size=size,
        outcome=worst.outcome,
        peak=(closest.peak or 0) - shift,
        resident=max(0, closest.resident - shift),
        allocated=None if closest.allocated is None else closest.allocated - shift,
        profile=tuple(nbytes - shift for nbytes in closest.profile),
        step_seconds=_slowest(trial.step_seconds for trial in judged),
        optimizer_seconds=_slowest(trial.optimizer_seconds for trial in judged),
    )


def _slowest(seconds: Iterable[float | None]) -> float | None:
    return max((each for each in seconds if each is not None), default=None)
