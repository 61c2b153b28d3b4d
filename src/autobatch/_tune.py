"""The whole tuning run: budget, search, throughput, plan, report."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from autobatch._latency import largest_within
from autobatch._latency.search import LatencySearch
from autobatch._memory import format_bytes
from autobatch._plan import BatchPlan, Choice, per_rank
from autobatch._report import Device, TuningReport
from autobatch._report.latency import latency_notes, nothing_within, too_slow_reason
from autobatch._report.notes import Bound, TuningResult, notes, tightest_bound
from autobatch._search.guided import GuidedBisection
from autobatch._throughput import latest_by_size
from autobatch._throughput.curve import Speed, Timed
from autobatch._trials import Outcome
from autobatch._trials.runner import TrialHistory, TrialRunner
from autobatch._trials.workload import Bench
from autobatch.errors import AutobatchError, DoesNotFitError, ShortTrialError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe, MemoryReading
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch._subject import Subject
    from autobatch._trials import Trial
    from autobatch._trials.optimizers import OptimizerWatch
    from autobatch._trials.snapshot import Snapshot
    from autobatch.sinks import Progress


T = TypeVar("T")

_CEILING: Final = 2**20  # a workload that never meets a limit has to stop somewhere
# Times the batch with the very same allocations: the workload does not use it
_IGNORED: Final = 16


def tune(
    job: Subject,
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
    is_limited = settings.limit_on_latency is not None
    record = TrialHistory(probe, settings.memory_limit, ranks)
    bench = Bench(
        probe=probe,
        budget=record.read_budget,
        optimizers=optimizers,
        first_touch=first_touch,
        times_later=bool(job.curve_seconds) and known is None and not is_limited,
    )
    tries = TrialRunner(job, settings, bench, record, snapshot, shown, ranks)
    tuning = _Tuning(job, settings, tries, record, snapshot, ranks)
    tuning.begin(known)
    if known is not None:
        plan = tuning.verify(known)
    else:
        tuning.search(search)
        if is_limited:
            plan = tuning.choose_within()
        else:
            tuning.time_sizes()
            plan = tuning.choose()
            tuning.time_chosen(plan)
    tuning.check_agreement(plan)
    return tuning.report(plan)


def _check_target(settings: Settings, world_size: int) -> None:
    target = settings.target_batch_size
    if target is not None and target < world_size:
        raise target_too_small(target, world_size)


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
    """One tuning run, from what was asked to what is reported."""

    def __init__(
        self,
        job: Subject,
        settings: Settings,
        tries: TrialRunner,
        record: TrialHistory,
        snapshot: Snapshot,
        ranks: Ranks,
    ) -> None:
        self._job, self._settings, self._tries = job, settings, tries
        self._record, self._snapshot, self._ranks = record, snapshot, ranks
        self._probe = tries.bench.probe
        self._bound = tightest_bound(
            target_batch_size=settings.target_batch_size,
            max_micro_batch_size=settings.max_micro_batch_size,
            dataset_size=settings.dataset_size,
            world_size=ranks.world_size,
        )
        self._high = max(1, self._bound.batch_size) if self._bound else _CEILING

    @cached_property
    def _answers(self) -> LatencySearch | None:
        """What each size answers in, where that is limited."""
        limit = self._settings.limit_on_latency
        if limit is None:
            return None
        return LatencySearch(limit, self, self._job.workload, self._tries.bench, self._snapshot)

    def everywhere(self, act: Callable[[], T]) -> Sequence[T]:
        """Run `act` on every rank and return all results."""
        return self._record.everywhere(act)

    @property
    def step_seconds(self) -> dict[int, float]:
        """Seconds of a step in its trial, for each size that fits."""
        return {
            trial.batch_size: trial.step_seconds or 0.0
            for trial in latest_by_size(self._record.trials)
            if trial.fits
        }

    def begin(self, known: BatchPlan | None) -> None:
        """Refuse to start where a rank is past its budget already, or where ranks were asked different things."""
        self._record.begin(self._check_room)
        self._tries.begin()
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
            raise different_plans(plans)

    def _check_room(self) -> None:
        self._probe.attach(*self._snapshot.alive)
        self._probe.release()
        reading, budget = self._probe.read(), self._record.read_budget()
        if budget <= reading.reserved:
            raise no_room(self._settings, self._probe.name, reading, budget)

    def search(self, search: Search) -> None:
        """Try sizes until the search is content, or time runs out."""
        while size := self._next_size(search):
            try:
                trial = self._tries.attempt(size)
            except ShortTrialError:
                if not any(proven < size for proven in self._record.fitting):
                    raise
                # Smaller ones ran: there is not data enough for this one
                self._snapshot.restore()
                self._high = (self._record.fitting[-1] + size) // 2
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
        too_slow = self._answers.too_slow(trial.batch_size)
        if too_slow is not None:
            self._high = min(self._high, trial.batch_size)
            self._bound = Bound(self._high, too_slow_reason(too_slow, self._answers.limit))

    def _next_size(self, search: Search) -> int | None:
        """What the search proposes, as far as there is time for it and for confirming the plan."""
        size = self._proposal(search, self._high)
        self._tries.out_of_time = size is not None and not self._tries.in_time(size)
        if self._tries.out_of_time:
            affordable = self._tries.affordable
            size = self._proposal(search, min(self._high, affordable or self._high))
        return size if size is not None and self._tries.in_time(size) else None

    def _proposal(self, search: Search, high: int) -> int | None:
        if self._answers is not None and self._record.fitting:
            # Memory may have room for sizes that are slow beyond all use
            high = min(high, self._answers.reach)
        start = min(self._start, high)
        return search.propose(
            self._record.trials, start=start, high=high, budget=self._record.budget
        )

    def time_sizes(self) -> None:
        """Time a few sizes in turns: the plan is chosen by that, and the report shows it."""
        if not self._record.fitting or not self._job.curve_seconds:
            return
        target, began = self._tries.target, self._tries.deadline.spent
        self._speed.measure(
            None if target is None else per_rank(target, self._ranks.world_size),
            seconds=self._job.curve_seconds,
            trial_seconds=self._tries.deadline.seconds_of(self._record.fitting[-1]),
        )
        self._tries.deadline.leave_out(self._tries.deadline.spent - began)
        # Nothing times what is tried from now on
        self._tries.bench = replace(self._tries.bench, times_later=False)

    def time_chosen(self, plan: BatchPlan) -> None:
        """Time the size that was chosen, where that was run after the others were timed."""
        began = self._tries.deadline.spent
        self._speed.add(plan.micro_batch_size)
        self._tries.deadline.leave_out(self._tries.deadline.spent - began)

    def _with_its_time(self, trial: Trial) -> Trial:
        """A trial as the curve timed its size: while memory is watched, steps are slower."""
        pattern = trial.batch_size, trial.accumulate
        for timed in self._speed.curve:
            if trial.fits and (timed.batch_size, timed.accumulate) == pattern:
                return replace(
                    trial,
                    step_seconds=timed.step_seconds,
                    optimizer_seconds=timed.optimizer_seconds,
                )
        return trial

    @cached_property
    def _speed(self) -> Speed:
        return Speed(
            Timed(
                workload=self._job.workload,
                pattern=self._tries.accumulate_at,
                run=self._tries.run,
                bench=self._tries.bench,
                record=self._record,
                before=self._tries.before,
                restore=self._snapshot.restore,
            )
        )

    def choose(self) -> BatchPlan:
        """The plan to take: one whose micro-batch was run, and the best of those."""
        choice = Choice(
            record=self._record,
            speed=self._speed,
            world_size=self._ranks.world_size,
            in_time=self._tries.takes_its_time,
            attempt=lambda size, accumulate: self._tries.attempt(size, accumulate=accumulate),
            check=self._check_can_accumulate,
            can_accumulate=self._job.can_accumulate,
            last_samples=self._job.last_samples or (lambda _: None),
        )
        plan = (
            choice.largest(self._job.accumulate)
            if self._tries.target is None
            else choice.towards(self._tries.target)
        )
        if plan is None:
            raise self._nothing_fits()
        return plan

    def choose_within(self) -> BatchPlan:
        """The largest size that fits and answers within the limit on latency."""
        answers = self._answers
        if answers is None or not self._record.fitting:
            raise self._nothing_fits()
        answers.measure()
        best = largest_within(answers.latencies, answers.limit.seconds)
        if best is None:
            raise DoesNotFitError(nothing_within(answers.latencies, answers.limit))
        return BatchPlan(best.batch_size, world_size=self._ranks.world_size)

    def fits(self, size: int) -> bool:
        """Return whether a size fits by its trial, which runs now if there was none."""
        if all(size != trial.batch_size for trial in self._record.trials):
            if not self._tries.takes_its_time(size):
                return False
            self._tries.attempt(size)
        return size in self._record.fitting

    def verify(self, plan: BatchPlan) -> BatchPlan:
        """Take a known plan, if one trial shows that it fits."""
        self._check_can_accumulate(plan)
        if plan.micro_batch_size > self._high:
            why = self._bound.reason if self._bound else f"none goes above {_CEILING:,}"
            raise ValueError(
                f"plan={plan} asks for micro-batches of {plan.micro_batch_size}, but {why}."
            )
        trial = self._tries.attempt(
            plan.micro_batch_size, accumulate=min(2, plan.accumulate_grad_batches)
        )
        if trial.fits and trial.batch_size == plan.micro_batch_size:
            return plan
        raise fits_no_more(plan, trial, self._record.budget)

    def report(self, plan: BatchPlan) -> TuningReport:
        """What was asked, found and chosen."""
        found = self._findings(plan)
        return TuningReport(
            autobatch_version=version("lightning-autobatch"),
            settings=self._settings,
            subject=self._job.subject,
            device=Device(
                name=self._probe.name,
                source=self._probe.source,
                total=found.total,
                foreign=found.foreign,
            ),
            budget=self._record.budget,
            trials=found.trials,
            plan=plan,
            task=self._job.task,
            latencies=self._answers.latencies if self._answers else (),
            can_accumulate=self._job.can_accumulate,
            dataset_size=found.dataset_size,
            look=found.look,
            curve=found.curve,
            loading=self._speed.loading,
            learning_rate=found.learning_rate,
            search_seconds=self._tries.deadline.spent,
            notes=notes(found),
            environment=self._job.environment,
        )

    def _findings(self, plan: BatchPlan) -> TuningResult:
        job, settings, reading = self._job, self._settings, self._record.reading
        samples = settings.dataset_size
        if job.samples_trained is not None:
            samples = job.samples_trained(plan)
        size = plan.micro_batch_size
        return TuningResult(
            task=job.task,
            plan=plan,
            trials=tuple(map(self._with_its_time, self._record.trials)),
            curve=self._speed.curve,
            unreached=self._speed.unreached,
            curve_seconds=job.curve_seconds,
            target_batch_size=settings.target_batch_size,
            latency_limit=settings.latency_limit,
            bound=self._bound_met(),
            time_limit=settings.time_limit if self._tries.out_of_time else None,
            source=self._probe.source,
            total=reading.total,
            foreign=reading.foreign,
            before=job.before,
            learning_rate=job.learning_rate() if job.learning_rate else None,
            dataset_size=samples,
            last_samples=job.last_samples(size) if job.last_samples else None,
            doubts=job.doubts(plan) if job.doubts else (),
            remarks=self._remarks(plan),
            look=job.look() if job.look else None,
        )

    def _remarks(self, plan: BatchPlan) -> tuple[str, ...]:
        told = self._job.remarks
        remarks = told(plan, self._tries.deadline) if told else ()
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

    def _check_can_accumulate(self, plan: BatchPlan) -> None:
        if plan.accumulate_grad_batches > 1 and not self._job.can_accumulate:
            raise can_not_accumulate(plan, self._settings.target_batch_size)

    def _check_size_is_used(self, trial: Trial) -> None:
        shape = _allocations(trial)
        for other in self._record.trials:
            if (
                len(shape) > 1
                and trial.batch_size >= _IGNORED * other.batch_size
                and _allocations(other) == shape
            ):
                raise size_is_not_used(other, trial)

    def _nothing_fits(self) -> DoesNotFitError:
        time_limit = self._settings.time_limit if self._tries.out_of_time else None
        return nothing_fits(self._record.trials, self._record.budget, self._probe.name, time_limit)

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


def known_plan(
    plan: BatchPlan | str | Path | None, settings: Settings, *, world_size: int | None
) -> BatchPlan | None:
    """The plan that was given, read from its report where a path was; refused where it says something else than asked.

    A `world_size` of None is one that is not known yet.
    """
    if plan is None:
        return None
    if settings.latency_limit is not None:
        raise ValueError(
            f"plan={str(plan)!r} is verified, and latency_limit={settings.latency_limit:g} asks for a search; give one "
            "of the two."
        )
    if isinstance(plan, (str, Path)):
        report = TuningReport.read(plan)
        if report.task != "train":
            raise ValueError(
                f"plan={str(plan)!r} is a report about {report.task}, which trains nothing; give one of a training."
            )
        plan = report.plan
    if not isinstance(plan, BatchPlan):
        raise ValueError(f"plan={plan!r} is not a plan; give a BatchPlan, or the path of a report.")
    counts = (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size)
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"plan={plan} must hold whole numbers of 1 or more.")
    if world_size not in (None, plan.world_size):
        raise ValueError(
            f"plan={plan} is for {plan.world_size} ranks, and {world_size} train here."
        )
    most = settings.max_micro_batch_size
    if most is not None and plan.micro_batch_size > most:
        raise ValueError(
            f"plan={plan} has micro-batches of {plan.micro_batch_size}, and max_micro_batch_size={most} allows no more."
        )
    asked = settings.target_batch_size
    if asked is not None and asked != plan.effective_batch_size:
        raise ValueError(
            f"plan={plan} gives {plan.effective_batch_size} samples per update, and target_batch_size={asked} asks "
            "for another number: give one of the two."
        )
    return plan


def checked_search(search: Search | None) -> Search:
    """The search that was asked for, or the default one; refused where it can not propose."""
    if search is None:
        return GuidedBisection()
    if isinstance(search, type) or not callable(getattr(search, "propose", None)):
        raise ValueError(
            f"search={search!r} can not propose sizes; give an object such as Bisection()."
        )
    return search


def versions() -> dict[str, str]:
    """What a reader of the report may want to know about where it was made."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**found, "cuda": torch.version.cuda} if torch.version.cuda else found


def target_too_small(target: int, world_size: int) -> ValueError:
    """Ranks would have nothing to do."""
    return ValueError(
        f"target_batch_size={target} is less than one sample for each of the {world_size} ranks; "
        f"give {world_size} or more."
    )


def different_plans(plans: Sequence[BatchPlan]) -> AutobatchError:
    """Ranks did not agree."""
    return AutobatchError(
        f"Ranks chose different plans: {plans}. Please report this; training with them would not be sound."
    )


def no_room(
    settings: Settings, device: str, reading: MemoryReading, budget: int
) -> DoesNotFitError:
    """The budget is spent before any trial."""
    return DoesNotFitError(
        f"memory_limit={settings.memory_limit!r} leaves a budget of {format_bytes(max(0, budget))} on "
        f"{device}, where others hold {format_bytes(reading.foreign)} and this process already "
        f"holds {format_bytes(reading.reserved)}. Free memory on the device, or raise memory_limit."
    )


def nothing_fits(
    trials: Sequence[Trial], budget: int, device: str, time_limit: float | None
) -> DoesNotFitError:
    """No size was found; `time_limit` is what ended the search, where it did."""
    tried = "; ".join(_told(trial, budget) for trial in sorted(trials, key=lambda t: t.batch_size))
    if time_limit is not None:
        return DoesNotFitError(
            f"No batch size was found to fit within time_limit={time_limit:g} seconds: {tried}. "
            "Raise time_limit."
        )
    return DoesNotFitError(
        f"No batch size fits the budget of {format_bytes(budget)} on {device}: {tried}. "
        "Free memory on the device, raise memory_limit, or shrink the model."
    )


def fits_no_more(plan: BatchPlan, trial: Trial, budget: int) -> DoesNotFitError:
    """The trial that should have verified a known plan did not."""
    return DoesNotFitError(
        f"plan={plan} does not fit any more: {_told(trial, budget)}. Leave plan out to search anew."
    )


def can_not_accumulate(plan: BatchPlan, target: int | None) -> ValueError:
    """A plan takes more passes per update than the workload can make; `target` asked for it, or the plan itself."""
    asked = f"plan={plan}" if target is None else f"target_batch_size={target}"
    return ValueError(
        f"{asked} takes {plan.accumulate_grad_batches} micro-batches of "
        f"{plan.micro_batch_size} per update, and this workload can not accumulate: write it as "
        "`def train(batch_size, accumulate):`, dividing each loss by `accumulate` and yielding after each "
        "optimizer step, or give a target that fits at once."
    )


def size_is_not_used(one: Trial, other: Trial) -> ValueError:
    """Two sizes far apart did the very same."""
    return ValueError(
        f"The workload allocated the very same memory at batch_size={one.batch_size} and at "
        f"batch_size={other.batch_size}; it must make micro-batches of the size it is given, "
        "and where the data set is smaller than that, name its length in dataset_size."
    )


def _told(trial: Trial, budget: int) -> str:
    if trial.outcome is Outcome.OVER_BUDGET and trial.peak is not None:
        return (
            f"batch_size={trial.batch_size} peaked at {format_bytes(trial.peak)}, over the budget of "
            f"{format_bytes(budget)}"
        )
    how = "was refused" if trial.outcome is Outcome.REFUSED else "ran out of memory"
    said = f" ({trial.error})" if trial.error else ""
    return f"batch_size={trial.batch_size} {how}{said}"
