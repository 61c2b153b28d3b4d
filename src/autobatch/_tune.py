"""The whole story in one function: budget, trials, plan, report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from autobatch._answers import Answers
from autobatch._calls import Calls
from autobatch._choice import CONFIRMATIONS, Choice
from autobatch._deadline import Deadline
from autobatch._latency import largest_within
from autobatch._latency_text import latency_notes, nothing_within
from autobatch._memory import format_bytes
from autobatch._notes import Bound, Findings, notes, tightest_bound
from autobatch._plan import BatchPlan, per_rank
from autobatch._record import Record
from autobatch._report import Device, TuningReport
from autobatch._speed import Speed, Timed
from autobatch._throughput import settled
from autobatch._trial import Outcome, Trial, run_trial
from autobatch._workload import Bench
from autobatch.errors import AutobatchError, DoesNotFitError, ShortTrialError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from autobatch._learning_rate import LearningRateRule
    from autobatch._memory import MemoryProbe
    from autobatch._notes import Look
    from autobatch._optimizers import OptimizerWatch
    from autobatch._ranks import Ranks
    from autobatch._report import Task
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch._snapshot import Snapshot
    from autobatch._workload import Workload
    from autobatch.sinks import Progress

__all__ = ["Job", "tune"]

_CEILING: Final = 2**20  # a workload that never meets a limit has to stop somewhere
# Times the batch with the very same allocations: the workload does not use it
_IGNORED: Final = 16


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be tuned, told apart from what was asked for.

    Args:
        workload: A training loop that yields after every optimizer step.
        can_accumulate: Whether it takes an accumulation.
        start: The first size to try.
        accumulate: The accumulation that stays where no target is asked for.
        before: What was trained with until now, where that is known.
        samples_trained: Samples that an epoch trains on with a plan, where it is not the whole data set.
        update_at_most: Samples that one update can have, where it can not go on into the next epoch.
        last_samples: Samples in the last micro-batch that each rank trains on in an epoch, at a size.
        remarks: What a person should be told of a plan besides, where there may be something; given the time left
            to find out.
        doubts: What trials have shown that makes them another thing than training with a plan, asked once they have run.
        task: What a report says is done with the batches.
        subject: What a report calls it.
        environment: Versions, for the report.
        look: How far was looked for the largest samples, asked once trials have run.
        curve_seconds: The most that timing the speed curve may take; 0 for none.
        learning_rate: How the learning rate of its optimizer goes with the batch, asked once trials have run.
    """

    workload: Workload
    can_accumulate: bool
    start: int
    accumulate: int
    before: BatchPlan | None
    samples_trained: Callable[[BatchPlan], int | None] | None
    update_at_most: int | None
    last_samples: Callable[[int], int | None] | None
    remarks: Callable[[BatchPlan, Deadline], tuple[str, ...]] | None
    doubts: Callable[[BatchPlan], tuple[str, ...]] | None
    task: Task
    subject: str
    environment: dict[str, str]
    look: Callable[[], Look | None] | None
    curve_seconds: float
    learning_rate: Callable[[], LearningRateRule | None] | None


def tune(
    job: Job,
    settings: Settings,
    *,
    known: BatchPlan | None,
    probe: MemoryProbe,
    search: Search,
    snapshot: Snapshot,
    optimizers: OptimizerWatch,
    first_touch: Callable[[], AbstractContextManager[None]],
    shown: Progress,
    ranks: Ranks,
) -> TuningReport:
    """Budget, trials, plan, report: the steps of a tuning run, in their order; every rank of a job calls it."""
    _check_target(settings, ranks.world_size)
    tuning = _Tuning(job, settings, probe, snapshot, shown, ranks)
    times_later = bool(job.curve_seconds) and known is None and tuning.limit is None
    tuning.bench = Bench(
        probe, tuning.record.read_budget, optimizers, first_touch, times_later
    )
    tuning.begin(known)
    if known is not None:
        plan = tuning.verify(known)
    else:
        tuning.search(search)
        if tuning.limit is None:
            tuning.time_sizes()
            plan = tuning.choose()
            tuning.time_chosen(plan)
        else:
            plan = tuning.choose_within()
    tuning.check_agreement(plan)
    return tuning.report(plan)


def _within(target: int | None, most: int | None, world_size: int) -> int | None:
    """The effective batch to go for: what was asked, or as much of it as there is."""
    if target is None or most is None or target <= most:
        return target
    return max(world_size, most - most % world_size)


def _check_target(settings: Settings, world_size: int) -> None:
    target = settings.target_batch_size
    if target is not None and target < world_size:
        raise ValueError(
            f"target_batch_size={target} is less than one sample for each of the {world_size} ranks; "
            f"give {world_size} or more."
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every rank has to have been asked alike before they start."""

    settings: Settings
    accumulate: int
    known: BatchPlan | None


@dataclass(frozen=True, slots=True)
class _Range:
    """Where a rank would start, and where it would end."""

    start: int
    high: int


class _Tuning:
    """One tuning run: its trials, its budget, its clock."""

    bench: Bench

    def __init__(
        self,
        job: Job,
        settings: Settings,
        probe: MemoryProbe,
        snapshot: Snapshot,
        shown: Progress,
        ranks: Ranks,
    ) -> None:
        self._job, self._settings, self._probe = job, settings, probe
        self._snapshot, self._shown, self._ranks = snapshot, shown, ranks
        self.record = Record(probe, settings.memory_limit, ranks)
        self._out_of_time = False
        self._target = _within(
            settings.target_batch_size, job.update_at_most, ranks.world_size
        )
        self._bound = tightest_bound(
            target_batch_size=settings.target_batch_size,
            max_micro_batch_size=settings.max_micro_batch_size,
            dataset_size=settings.dataset_size,
            world_size=ranks.world_size,
        )
        self._high = max(1, self._bound.batch_size) if self._bound else _CEILING
        self.limit = settings.limit_on_latency

    @cached_property
    def _answers(self) -> Answers | None:
        """What each size answers in, where that is limited."""
        if self.limit is None:
            return None
        calls = Calls(self._job.workload, self.bench)
        return Answers(
            self.limit,
            calls,
            self._fits,
            self._steps,
            self._snapshot,
            self.record.everywhere,
        )

    def _steps(self) -> dict[int, float]:
        """Seconds of a step in the trial of each size that fits."""
        return {
            trial.batch_size: trial.step_seconds or 0.0
            for trial in settled(self.record.trials)
            if trial.fits
        }

    def begin(self, known: BatchPlan | None) -> None:
        """Refuse to start where a rank is past its budget already, or where ranks were asked different things."""
        self.record.begin(self._check_room)
        self._deadline = Deadline(self._settings.time_limit, lambda: self.record.now)
        settings = self._settings.model_copy(update={"dataset_size": None})
        asked = _Asked(settings, self._job.accumulate, known)
        for rank, other in enumerate(self._ranks.everywhere(lambda: asked)):
            if other != asked:
                raise AutobatchError(
                    f"Ranks were asked for different things: rank {self._ranks.rank} for {asked}, rank {rank} for "
                    f"{other}. Give every rank the same arguments."
                )
        # A rank may have a shard of its own
        ranges = self._ranks.everywhere(lambda: _Range(self._job.start, self._high))
        self._start = ranges[0].start
        self._high = min(each.high for each in ranges)

    def check_agreement(self, plan: BatchPlan) -> None:
        """Refuse a plan that is not that of all ranks: each has chosen for itself, from what all were told."""
        plans = self._ranks.everywhere(lambda: plan)
        if any(other != plan for other in plans):
            raise AutobatchError(
                f"Ranks chose different plans: {plans}. Please report this; training with them would not be sound."
            )

    def _check_room(self) -> None:
        self._probe.attach(*self._snapshot.alive)
        self._probe.release()
        reading, budget = self._probe.read(), self.record.read_budget()
        if budget <= reading.reserved:
            raise DoesNotFitError(
                f"memory_limit={self._settings.memory_limit!r} leaves a budget of {format_bytes(max(0, budget))} on "
                f"{self._probe.name}, where others hold {format_bytes(reading.foreign)} and this process already "
                f"holds {format_bytes(reading.reserved)}. Free memory on the device, or raise memory_limit."
            )

    def search(self, search: Search) -> None:
        """Try sizes until the search is content, or time runs out."""
        while size := self._next_size(search):
            try:
                trial = self.attempt(size)
            except ShortTrialError:
                if not any(proven < size for proven in self.record.fitting):
                    raise
                # Smaller ones ran: there is not data enough for this one
                self._snapshot.restore()
                self._high = (self.record.fitting[-1] + size) // 2
                continue
            if trial.batch_size < size:
                # The workload could not fill it: it goes no further
                self._high = min(self._high, trial.batch_size)
            self._check_size_is_used(trial)
            self._check_speed(trial)

    def _check_speed(self, trial: Trial) -> None:
        """Where a limit on latency is beyond a size, go no higher: what fits there is of no use."""
        if self._answers is None or not trial.fits:
            return
        reason = self._answers.beyond(trial.batch_size)
        if reason is not None:
            self._high = min(self._high, trial.batch_size)
            self._bound = Bound(self._high, reason)

    def _next_size(self, search: Search) -> int | None:
        """What the search proposes, as far as there is time for it and for confirming the plan."""
        size = self._proposal(search, self._high)
        self._out_of_time = size is not None and not self._in_time(size)
        if self._out_of_time:
            affordable = self._deadline.affordable(self._yardstick, self._reserve)
            size = self._proposal(search, min(self._high, affordable or self._high))
        return size if size is not None and self._in_time(size) else None

    def _in_time(self, size: int) -> bool:
        return self._deadline.allows(size, self._yardstick, self._reserve)

    @property
    def _yardstick(self) -> int | None:
        return (
            self.record.fitting[-1] if self.record.fitting else self._deadline.largest
        )

    @property
    def _reserve(self) -> float:
        """Seconds for the trials that may have to confirm a plan, none of them larger than what ran."""
        if self._target is None or not self.record.fitting:
            return 0.0
        return CONFIRMATIONS * self._deadline.seconds_of(self.record.fitting[-1])

    def _proposal(self, search: Search, high: int) -> int | None:
        if self._answers is not None and self.record.fitting:
            # Memory may have room for sizes that are slow beyond all use
            high = min(high, self._answers.reach)
        start = min(self._start, high)
        return search.propose(
            self.record.trials, start=start, high=high, budget=self.record.budget
        )

    def time_sizes(self) -> None:
        """Time a few sizes in turns: the plan is chosen by that, and the report shows it."""
        if not self.record.fitting or not self._job.curve_seconds:
            return
        target, began = self._target, self._deadline.spent
        self._speed.measure(
            None if target is None else per_rank(target, self._ranks.world_size),
            seconds=self._job.curve_seconds,
            trial_seconds=self._deadline.seconds_of(self.record.fitting[-1]),
        )
        self._deadline.leave_out(self._deadline.spent - began)
        # Nothing times what is tried from now on
        self.bench = replace(self.bench, times_later=False)

    def time_chosen(self, plan: BatchPlan) -> None:
        """Time the size that was chosen, where that was run after the others were timed."""
        began = self._deadline.spent
        self._speed.add(plan.micro_batch_size)
        self._deadline.leave_out(self._deadline.spent - began)

    def _with_its_time(self, trial: Trial) -> Trial:
        """A trial as the curve timed its size: while memory is watched, steps are slower."""
        for timed in self._speed.curve:
            if (timed.batch_size, timed.accumulate) == (
                trial.batch_size,
                trial.accumulate,
            ):
                return (
                    replace(
                        trial,
                        step_seconds=timed.step_seconds,
                        optimizer_seconds=timed.optimizer_seconds,
                    )
                    if trial.fits
                    else trial
                )
        return trial

    @cached_property
    def _speed(self) -> Speed:
        return Speed(
            Timed(
                workload=self._job.workload,
                pattern=self._accumulate_at,
                run=self._run,
                bench=self.bench,
                record=self.record,
                before=self._before,
                restore=self._snapshot.restore,
            )
        )

    def _before(self, size: int) -> None:
        """Say which size comes now, and tell the probe what is there."""
        if self._ranks.rank == 0:
            self._shown.trying(size)
        self._probe.attach(*self._snapshot.alive)

    def choose(self) -> BatchPlan:
        """The plan to take: one whose micro-batch was run, and the best of those."""
        choice = Choice(
            record=self.record,
            speed=self._speed,
            world_size=self._ranks.world_size,
            in_time=self._takes_its_time,
            attempt=lambda size, accumulate: self.attempt(size, accumulate=accumulate),
            check=self._check_can_accumulate,
            can_accumulate=self._job.can_accumulate,
            last_samples=self._job.last_samples or (lambda _: None),
        )
        plan = (
            choice.largest(self._job.accumulate)
            if self._target is None
            else choice.towards(self._target)
        )
        if plan is None:
            raise self._nothing_fits()
        return plan

    def _takes_its_time(self, size: int) -> bool:
        """Whether there is time for one more trial; where there is not, the report tells."""
        allowed = self._deadline.allows(size, self._yardstick, 0.0)
        self._out_of_time = self._out_of_time or not allowed
        return allowed

    def choose_within(self) -> BatchPlan:
        """The largest size that fits and answers within the limit on latency."""
        answers = self._answers
        if answers is None or not self.record.fitting:
            raise self._nothing_fits()
        answers.measure()
        best = largest_within(answers.latencies, answers.limit.seconds)
        if best is None:
            raise DoesNotFitError(nothing_within(answers.latencies, answers.limit))
        return BatchPlan(best.batch_size, world_size=self._ranks.world_size)

    def _fits(self, size: int) -> bool:
        """Whether a trial has shown that a size fits, or shows it now."""
        if all(size != trial.batch_size for trial in self.record.trials):
            if not self._takes_its_time(size):
                return False
            self.attempt(size)
        return size in self.record.fitting

    def verify(self, plan: BatchPlan) -> BatchPlan:
        """Take a known plan, if one trial shows that it fits."""
        self._check_can_accumulate(plan)
        if plan.micro_batch_size > self._high:
            why = self._bound.reason if self._bound else f"none goes above {_CEILING:,}"
            raise ValueError(
                f"plan={plan} asks for micro-batches of {plan.micro_batch_size}, but {why}."
            )
        trial = self.attempt(
            plan.micro_batch_size, accumulate=min(2, plan.accumulate_grad_batches)
        )
        if trial.fits and trial.batch_size == plan.micro_batch_size:
            return plan
        raise DoesNotFitError(
            f"plan={plan} does not fit any more: {_told(trial, self.record.budget)}. Leave plan out to search anew."
        )

    def attempt(self, size: int, *, accumulate: int | None = None) -> Trial:
        """Run one trial, and put everything back: each starts from the same state."""
        began = self._deadline.spent
        if self._ranks.rank == 0:
            self._shown.trying(size)
        pattern = accumulate or self._accumulate_at(size)
        trial = self.record.add(lambda: self._run(size, pattern))
        self._snapshot.restore()
        self._deadline.record(trial.batch_size, self._deadline.spent - began)
        if self._ranks.rank == 0:
            best = max(self.record.fitting, default=None)
            self._shown.tried(trial, best=best, budget=self.record.budget)
        return trial

    def report(self, plan: BatchPlan) -> TuningReport:
        """What was asked, found and chosen."""
        settings, reading = self._settings, self.record.reading
        samples = settings.dataset_size
        if self._job.samples_trained is not None:
            samples = self._job.samples_trained(plan)
        findings = Findings(
            task=self._job.task,
            plan=plan,
            trials=tuple(map(self._with_its_time, self.record.trials)),
            curve=self._speed.curve,
            unreached=self._speed.unreached,
            curve_seconds=self._job.curve_seconds,
            target_batch_size=settings.target_batch_size,
            latency_limit=settings.latency_limit,
            bound=self._bound_met(),
            time_limit=settings.time_limit if self._out_of_time else None,
            source=self._probe.source,
            total=reading.total,
            foreign=reading.foreign,
            before=self._job.before,
            learning_rate=self._job.learning_rate()
            if self._job.learning_rate
            else None,
            dataset_size=samples,
            last_samples=self._job.last_samples(plan.micro_batch_size)
            if self._job.last_samples
            else None,
            doubts=self._job.doubts(plan) if self._job.doubts else (),
            remarks=self._remarks(plan),
            look=self._job.look() if self._job.look else None,
        )
        return TuningReport(
            autobatch_version=version("lightning-autobatch"),
            settings=settings,
            subject=self._job.subject,
            device=Device(
                name=self._probe.name,
                source=self._probe.source,
                total=reading.total,
                foreign=reading.foreign,
            ),
            budget=self.record.budget,
            trials=findings.trials,
            plan=plan,
            task=self._job.task,
            latencies=self._answers.latencies if self._answers else (),
            can_accumulate=self._job.can_accumulate,
            dataset_size=samples,
            look=findings.look,
            curve=self._speed.curve,
            loading=self._speed.loading,
            learning_rate=findings.learning_rate,
            search_seconds=self._deadline.spent,
            notes=notes(findings),
            environment=self._job.environment,
        )

    def _remarks(self, plan: BatchPlan) -> tuple[str, ...]:
        told = self._job.remarks
        remarks = told(plan, self._deadline) if told else ()
        answers = self._answers
        if answers is None:
            return remarks
        return (
            *latency_notes(
                answers.latencies,
                answers.limit,
                plan.micro_batch_size,
                answers.unfinished,
            ),
            *remarks,
        )

    def _run(self, size: int, accumulate: int) -> Trial:
        self._probe.attach(*self._snapshot.alive)
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
            if not any(size < trial.batch_size for trial in self.record.trials):
                raise
            # Larger ones ran, or ran out of memory: it is too small for the workload (a single sample and BatchNorm)
            return Trial(
                size, Outcome.REFUSED, accumulate=accumulate, error=repr(error)
            )

    def _accumulate_at(self, size: int) -> int:
        """The pattern that training will use: with accumulation, gradients live on through the next micro-batch."""
        if not self._job.can_accumulate:
            return 1
        target = self._target
        if target is None:
            return min(2, self._job.accumulate)
        return 1 if size * self._ranks.world_size >= target else 2

    def _check_can_accumulate(self, plan: BatchPlan) -> None:
        if plan.accumulate_grad_batches == 1 or self._job.can_accumulate:
            return
        target = self._settings.target_batch_size
        asked = f"plan={plan}" if target is None else f"target_batch_size={target}"
        raise ValueError(
            f"{asked} takes {plan.accumulate_grad_batches} micro-batches of "
            f"{plan.micro_batch_size} per update, and this workload can not accumulate: write it as "
            "`def train(batch_size, accumulate):`, dividing each loss by `accumulate` and yielding after each "
            "optimizer step, or give a target that fits at once."
        )

    def _check_size_is_used(self, trial: Trial) -> None:
        shape = _allocations(trial)
        for other in self.record.trials:
            if (
                len(shape) > 1
                and trial.batch_size >= _IGNORED * other.batch_size
                and _allocations(other) == shape
            ):
                raise ValueError(
                    f"The workload allocated the very same memory at batch_size={other.batch_size} and at "
                    f"batch_size={trial.batch_size}; it must make micro-batches of the size it is given, "
                    "and where the data set is smaller than that, name its length in dataset_size."
                )

    def _nothing_fits(self) -> DoesNotFitError:
        tried = "; ".join(
            _told(trial, self.record.budget)
            for trial in sorted(self.record.trials, key=lambda t: t.batch_size)
        )
        if self._out_of_time:
            return DoesNotFitError(
                f"No batch size was found to fit within time_limit={self._settings.time_limit:g} seconds: {tried}. "
                "Raise time_limit."
            )
        return DoesNotFitError(
            f"No batch size fits the budget of {format_bytes(self.record.budget)} on {self._probe.name}: {tried}. "
            "Free memory on the device, raise memory_limit, or shrink the model."
        )

    def _bound_met(self) -> Bound | None:
        """What kept the search from going higher, where something did."""
        if self._bound is None or self._bound.batch_size > self._high:
            reached = self._high < _CEILING
            return (
                Bound(self._high, "the workload never ran more samples at once")
                if reached
                else self._ceiling()
            )
        return self._bound

    def _ceiling(self) -> Bound | None:
        return Bound(_CEILING, f"no search goes above {_CEILING:,}")


def _allocations(trial: Trial) -> tuple[int, ...]:
    """The profile of a trial, counted from where its step began."""
    return tuple(nbytes - trial.profile[0] for nbytes in trial.profile)


def _told(trial: Trial, budget: int) -> str:
    if trial.outcome is Outcome.OVER_BUDGET and trial.peak is not None:
        return (
            f"batch_size={trial.batch_size} peaked at {format_bytes(trial.peak)}, over the budget of "
            f"{format_bytes(budget)}"
        )
    how = "was refused" if trial.outcome is Outcome.REFUSED else "ran out of memory"
    said = f" ({trial.error})" if trial.error else ""
    return f"batch_size={trial.batch_size} {how}{said}"
