"""The whole tuning run: budget, search, throughput, plan, report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from autobatch import _settings
from autobatch._guide import Guide
from autobatch._latency import best_within
from autobatch._latency.search import SECONDS_TIMED, LatencySearch
from autobatch._memory.host import HostProbe
from autobatch._plan import MAX_CONFIRMATIONS, BatchPlan, check_can_accumulate, choose_plan
from autobatch._report import Device, TuningReport
from autobatch._report.latency import nothing_within, too_slow_reason
from autobatch._report.notes import notes
from autobatch._report.result import RunDetails
from autobatch._search.guided import GuidedBisection
from autobatch._search.multiples import next_multiple
from autobatch._settings import Bound, tightest_bound
from autobatch._subject import version_of
from autobatch._throughput.curve import Throughput, TimingLimit, add_to_curve, measure_throughput
from autobatch._throughput.preference import Preference
from autobatch._trials import is_selective, latest_by_size
from autobatch._trials.ignored_size import check_size_is_used
from autobatch._trials.runner import Accumulation, TrialRunner
from autobatch.errors import AutobatchError, DoesNotFitError, ShortTrialError

if TYPE_CHECKING:
    from autobatch._distributed import Ranks
    from autobatch._prior_plan import PriorPlan
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch._subject import Subject
    from autobatch._trials.context import TrialContext

# A workload that never meets a limit has to stop somewhere
_MAX_BATCH_SIZE: Final = 2**20
# Share of the planned training that timing sizes may take
_SHARE_OF_TRAINING: Final = 0.1
# Share of the search's time that timing sizes may take where speed does not decide between them
_SHARE_OF_SEARCH: Final = 0.5


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan, and the measurements by which it was chosen."""

    plan: BatchPlan
    throughput: Throughput = field(default_factory=Throughput)
    timing_limit: TimingLimit = field(default_factory=TimingLimit)
    latency: LatencySearch | None = None  # of inference within a limit


def tune(
    subject: Subject, settings: Settings, context: TrialContext, search: Search, prior: PriorPlan
) -> TuningReport:
    """Find a batch plan: budget, search, throughput, plan, report; every rank of a job calls it.

    A plan that is known before needs one trial, and a search only if it does not fit.
    """
    ranks, known = context.ranks, prior.plan
    settings = prior.applied_to(settings, ranks.replicas)
    if ranks.as_if:  # one process stands for the ranks of a job that does not run
        settings = without_timing(settings, ranks.as_if)
    accumulation = accumulation_of(subject, settings, ranks)
    own_size = own_batch_size(subject, known, ranks)
    runner = TrialRunner(subject.workload, accumulation, settings, context, own_size)
    runner.start()
    check_same_arguments(subject, settings, known, ranks)
    sizes = search_range(subject, settings, ranks)
    guide = Guide(search, subject, runner)
    runner.begin("searching" if known is None else "checking the plan")
    if known is not None:
        try:
            chosen = Chosen(verify(known, runner, sizes))
        except DoesNotFitError as error:
            # A new run begins, with a budget, a time limit and a record of its own
            return tune(subject, settings, context, search, prior.after(error))
    elif settings.limit_on_latency is not None:
        latency = LatencySearch(settings.limit_on_latency, runner)
        sizes = find_largest_fit(search, runner, sizes, latency, is_timed=True)
        chosen = choose_within_latency(latency, runner)
    else:
        is_timed = not most_timing_seconds(settings)  # otherwise all sizes are timed afterwards
        sizes = find_largest_fit(guide, runner, sizes, None, is_timed=is_timed)
        chosen = choose_by_speed(subject, runner)
    check_same_plan(chosen.plan, ranks)
    keep_within_budget(chosen.plan, runner)
    run = details_of_run(subject, runner, chosen, sizes.bound_met, prior)
    report = build_report(subject, runner, chosen, guide.followed)
    return report.model_copy(update={"notes": notes(report, run)})


def without_timing(settings: Settings, devices: int) -> Settings:
    """Return the settings of a job that does not run: its communication cannot be timed."""
    if settings.latency_limit is not None:
        raise ValueError(
            f"latency_limit={settings.latency_limit:g} is about time, which one process cannot "
            f"measure for {devices} devices; leave it out, or run all of them."
        )
    return settings.model_copy(update={"timing_seconds": 0.0})


def accumulation_of(subject: Subject, settings: Settings, ranks: Ranks) -> Accumulation:
    """Return the gradient accumulation of a run, for as much of the target as there is data.

    Ranks may have shards of different lengths; the shortest counts for all of them.
    """
    replicas, target = ranks.replicas, settings.target_batch_size
    lengths = ranks.gather(subject.baseline.max_samples_per_update)
    most = min((length for length in lengths if length is not None), default=None)
    if target is not None and target < replicas:
        raise ValueError(
            f"target_batch_size={target} is less than one sample for each of the {replicas} "
            f"ranks; give {replicas} or more."
        )
    if target is not None and most is not None and target > most:
        target = max(replicas, most - most % replicas)
    return Accumulation(
        is_supported=subject.baseline.can_accumulate,
        default=subject.baseline.accumulate,
        target=target,
        replicas=replicas,
    )


def own_batch_size(subject: Subject, known: BatchPlan | None, ranks: Ranks) -> int | None:
    """Return the user's own batch size, at which errors are the user's: of a plan, or of rank 0."""
    own, *_ = ranks.gather(subject.baseline.own_batch_size)
    return own if known is None else known.micro_batch_size


@dataclass(frozen=True, slots=True)
class _Arguments:
    """Arguments that must be the same on every rank."""

    settings: Settings
    accumulate: int
    known: BatchPlan | None
    data_parallel_size: int


def check_same_arguments(
    subject: Subject, settings: Settings, known: BatchPlan | None, ranks: Ranks
) -> None:
    """Refuse different arguments on different ranks."""
    # Ranks may have shards of different lengths
    settings = settings.model_copy(update={"dataset_size": None})
    own = _Arguments(settings, subject.baseline.accumulate, known, ranks.replicas)
    for rank, other in enumerate(ranks.gather(own)):
        if other != own:
            raise AutobatchError(
                f"Ranks were given different arguments: rank {ranks.rank} {own}, rank {rank} "
                f"{other}. Give every rank the same arguments."
            )


@dataclass(frozen=True, slots=True)
class SearchRange:
    """Batch sizes to search."""

    start: int  # the first size to try
    high: int  # the largest size to try
    bound: Bound | None  # the tightest bound by the arguments; None if there is none

    def limited(self, high: int) -> SearchRange:
        """Return the range without sizes above `high`."""
        return replace(self, high=min(self.high, high))

    @property
    def bound_met(self) -> Bound:
        """The bound that keeps the search from larger sizes."""
        if self.bound is not None and self.bound.batch_size <= self.high:
            return self.bound
        if self.high < _MAX_BATCH_SIZE:
            return Bound(self.high, "the workload never ran more samples at once")
        return Bound(_MAX_BATCH_SIZE, f"no search goes above {_MAX_BATCH_SIZE:,}")


def search_range(subject: Subject, settings: Settings, ranks: Ranks) -> SearchRange:
    """Return the batch sizes to search, the same on every rank."""
    bound = tightest_bound(settings, ranks.replicas)
    high = max(1, bound.batch_size) if bound else _MAX_BATCH_SIZE
    ranges = ranks.gather(SearchRange(subject.baseline.start_batch_size, high, bound))
    return replace(min(ranges, key=lambda each: each.high), start=ranges[0].start)


def verify(plan: BatchPlan, runner: TrialRunner, sizes: SearchRange) -> BatchPlan:
    """Return a known plan if one trial shows that it fits."""
    check_can_accumulate(plan, runner)
    size = plan.micro_batch_size
    if size > sizes.high:
        raise ValueError(f"plan={plan} has micro-batches of {size}, but {sizes.bound_met.reason}.")
    trial = runner.run(size, is_timed=True, accumulate=plan.trial_accumulation)
    if trial.fits and trial.batch_size == size:
        return plan
    raise DoesNotFitError(
        f"plan={plan} does not fit: {trial.failure(runner.budget)}. Leave plan out to search."
    )


def find_largest_fit(
    search: Search,
    runner: TrialRunner,
    sizes: SearchRange,
    latency: LatencySearch | None,
    *,
    is_timed: bool,
) -> SearchRange:
    """Run trials until the search ends or time runs out; return the sizes that were in reach."""
    while size := _next_size(search, runner, sizes, latency):
        try:
            trial = runner.run(size, is_timed=is_timed)
        except ShortTrialError:
            fitting = runner.fitting
            if not fitting or fitting[0] >= size:
                raise
            # Smaller ones ran: there is not enough data for this one
            runner.context.snapshot.restore()
            sizes = sizes.limited((fitting[-1] + size) // 2)
            continue
        if trial.batch_size < size:  # the workload could not fill it
            sizes = sizes.limited(trial.batch_size)
        check_size_is_used(runner.trials)
        if latency and trial.fits and (too_slow := latency.too_slow(trial.batch_size)):
            # Larger sizes would fit, but take too long
            sizes = sizes.limited(trial.batch_size)
            bound = Bound(sizes.high, too_slow_reason(too_slow, latency.limit))
            sizes = replace(sizes, bound=bound)
    runner.raise_first_refusal(is_timed=is_timed)
    return sizes


def _next_size(
    search: Search, runner: TrialRunner, sizes: SearchRange, latency: LatencySearch | None
) -> int | None:
    """Return the size that the search proposes, if there is time for it; None to end.

    If there is not, the search proposes a smaller one. Sets `runner.is_out_of_time` by its latest
    proposal alone: once it has its answer, sizes left out before do not matter.
    """
    trials_after = MAX_CONFIRMATIONS if runner.accumulation.samples else 0
    has_time_for = partial(runner.has_time_for, trials_after=trials_after)
    if latency is not None and runner.fitting:
        # Memory may have room for sizes that are far too slow
        sizes = sizes.limited(latency.reach)
    size = _proposal(search, runner, sizes)
    runner.is_out_of_time = size is not None and not has_time_for(size)
    if not runner.is_out_of_time:
        return size
    affordable = runner.affordable(trials_after=trials_after)
    size = _proposal(search, runner, sizes.limited(affordable or sizes.high))
    return size if size is not None and has_time_for(size) else None


def _proposal(search: Search, runner: TrialRunner, sizes: SearchRange) -> int | None:
    trials, start = runner.trials, min(sizes.start, sizes.high)
    if is_selective(trials):
        return next_multiple(trials, sizes.high)
    return search.propose(trials, start=start, high=sizes.high, budget=runner.budget)


def choose_within_latency(latency: LatencySearch, runner: TrialRunner) -> Chosen:
    """Choose the batch size with the most throughput of those that meet the limit on latency."""
    runner.context.progress.begin("timing answers", SECONDS_TIMED)
    runner.check_any_fits()
    latency.measure()
    best = best_within(latency.latencies, latency.limit.seconds)
    if best is None:
        raise DoesNotFitError(nothing_within(latency.latencies, latency.limit))
    plan = BatchPlan(best.batch_size, world_size=runner.accumulation.replicas)
    return Chosen(plan, latency=latency)


def choose_by_speed(subject: Subject, runner: TrialRunner) -> Chosen:
    """Time the sizes that fit, and choose a plan by that; the largest if speed decides nothing."""
    preference = preference_of(subject, runner)
    limit = timing_limit(subject, runner, preference)
    if limit.seconds:
        runner.context.progress.begin("timing sizes", limit.seconds)
    throughput = measure_throughput(runner, limit.seconds, preference)
    runner.begin("checking the plan")
    plan = choose_plan(runner, throughput, subject.last_micro_batch, preference)
    throughput = add_to_curve(throughput, runner, plan.micro_batch_size)
    check_size_is_used([*runner.trials, *map(runner.merge, throughput.unrecorded.values())])
    return Chosen(plan, throughput, limit)


def most_timing_seconds(settings: Settings) -> float:
    """Return the seconds that timing sizes may take, whatever training is planned."""
    given = settings.timing_seconds
    return _settings.TIMING_SECONDS if given is None else given


def timing_limit(
    subject: Subject, runner: TrialRunner, preference: Preference | None
) -> TimingLimit:
    """Return the time that timing sizes may take.

    By default at most a tenth of the planned training, and where speed does not decide which size
    is taken, at most half of the time of the search.
    """
    limits = [TimingLimit(most_timing_seconds(runner.settings))]
    if runner.settings.timing_seconds is not None:
        return limits[0]
    takes_largest = preference is None
    if takes_largest:
        seconds = _SHARE_OF_SEARCH * runner.time_limit.spent
        limits.append(TimingLimit(seconds, "half the time of the search"))
    sample_seconds = [seconds / size for size, seconds in runner.step_seconds.items()]
    if sample_seconds:
        planned, *_ = runner.gather(subject.planned_seconds(min(sample_seconds)))
        if planned is not None:
            share = "a tenth of the shortest time that the planned training may take"
            limits.append(TimingLimit(_SHARE_OF_TRAINING * planned, share))
    return min(limits, key=attrgetter("seconds"))


def preference_of(subject: Subject, runner: TrialRunner) -> Preference | None:
    """Return the order of sizes that are about as fast; None if the largest is taken."""
    has_batch_norm, *_ = runner.gather(subject.has_batch_norm())
    settings, samples = runner.settings, runner.accumulation.samples
    is_untimed = not most_timing_seconds(settings)
    takes_largest = samples is None and (settings.prefer == "largest" or is_untimed)
    if takes_largest:
        return None
    return Preference(runner.own_size, has_batch_norm, is_split=samples is not None)


def check_same_plan(plan: BatchPlan, ranks: Ranks) -> None:
    """Refuse different plans on different ranks: each has chosen one from the shared record."""
    plans = ranks.gather(plan)
    if any(other != plan for other in plans):
        raise AutobatchError(
            f"Ranks chose different plans: {plans}. Please report this; training with them would "
            "be wrong."
        )


def keep_within_budget(plan: BatchPlan, runner: TrialRunner) -> None:
    """Let training begin with as little memory as trials, and stay within the budget on a host."""
    probe = runner.context.probe
    probe.release()
    trial = latest_by_size(runner.trials)[plan.micro_batch_size]
    if isinstance(probe, HostProbe) and trial.peak is not None:
        probe.keep_within(runner.budget - trial.resident, trial.peak - trial.resident)


def details_of_run(
    subject: Subject, runner: TrialRunner, chosen: Chosen, bound: Bound, prior: PriorPlan
) -> RunDetails:
    """Return facts for notes that the report lacks; the subject may measure for its own notes."""
    return RunDetails(
        bound=bound,
        is_out_of_time=runner.is_out_of_time,
        unreached=chosen.throughput.unreached,
        timing_limit=chosen.timing_limit,
        before=subject.baseline.plan,
        last_samples=subject.last_micro_batch(chosen.plan.micro_batch_size),
        subject_notes=subject.notes(chosen.plan, runner.time_limit),
        prior_note=prior.note,
        unfinished=chosen.latency.unfinished if chosen.latency else None,
    )


def build_report(
    subject: Subject, runner: TrialRunner, chosen: Chosen, guide: str | None
) -> TuningReport:
    """Return the report of a run, without notes."""
    plan, throughput, latency = chosen.plan, chosen.throughput, chosen.latency
    context, described = runner.context, subject.describe()
    probe, reading, ranks = context.probe, context.budget.reading, context.ranks
    return TuningReport(
        autobatch_version=version_of("lightning-autobatch"),
        settings=runner.settings,
        subject=described.name,
        device=Device(
            name=probe.name, source=probe.source, total=reading.total, foreign=reading.foreign
        ),
        budget=runner.budget,
        trials=tuple(map(throughput.with_times, runner.trials)),
        plan=plan,
        task=subject.task,
        latencies=latency.latencies if latency else (),
        can_accumulate=subject.baseline.can_accumulate,
        devices=ranks.as_if or ranks.world_size,
        as_if=ranks.as_if is not None,
        dataset_size=subject.samples_per_epoch(plan),
        look=described.look,
        curve=throughput.curve,
        loading=throughput.loading,
        learning_rate=described.learning_rate,
        guide=guide,
        search_seconds=context.seconds(),
        timing_seconds=latency.spent if latency else throughput.seconds,
        notes=(),
        environment=described.environment,
    )


def checked_search(search: Search | None) -> Search:
    """Return the given search, or the default one."""
    if search is None:
        return GuidedBisection()
    if isinstance(search, type) or not callable(getattr(search, "propose", None)):
        raise ValueError(
            f"search={search!r} cannot propose sizes; give an object such as Bisection()."
        )
    return search
