"""Notes of a report: one function per note, which returns None unless its trigger is met."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes
from autobatch._plan import ceil_div
from autobatch._report.tradeoff import updates_per_epoch
from autobatch._report.units import counted, factor, percent
from autobatch._throughput import latest_by_size, speed_rows
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from autobatch._accumulation import BatchNorms, Splitting
    from autobatch._plan import BatchPlan
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._throughput import CurvePoint, SpeedRow
    from autobatch._throughput.loading import Loading
    from autobatch._trials import Trial

_CROWDED: Final = 0.1  # share of device memory held by other processes that is worth a note
_TIGHT: Final = 0.05  # share of available memory; with less to spare, little more fits
_SAME_SPEED: Final = 0.05  # relative difference of speeds within the noise of their timing
_SCATTERED: Final = 0.3  # relative spread of single updates that hides differences of sizes
_WAITING: Final = 0.1  # share of time spent on data that more workers would save
_LEAST_MEASURED: Final = 0.5  # seconds; data loading over less time is noise
_STEADY_BATCH: Final = 16  # samples; statistics of smaller batches are noisy
_FAR_ABOVE_BEST: Final = 2  # times the best accumulation: the accuracy of its estimate


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest micro-batch that a search may try, and the reason."""

    batch_size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """Number of samples read to find the largest ones, on which trials run.

    Args:
        read: Samples read.
        among: Samples in the dataset; None if unknown.
        is_even: True if all samples read have one size.
    """

    read: int
    among: int | None
    is_even: bool


@dataclass(frozen=True, slots=True)
class TuningResult:
    """Result of a tuning run, as far as notes depend on it.

    Args:
        task: Use of the batches; only "train" makes updates.
        plan: The chosen plan.
        trials: All trials, in their order.
        curve: Sizes timed after the search.
        unreached: Sizes that the curve had no time for.
        curve_seconds: Time limit of the curve.
        target_batch_size: Requested effective batch size.
        latency_limit: Requested limit for one call, in seconds.
        bound: The bound that kept the search from larger sizes.
        time_limit: Seconds, if they ended the search; otherwise None.
        source: Source of memory readings; a fallback includes its reason, "… because …".
        total: Bytes of device memory.
        foreign: Bytes held by other processes.
        before: The plan of the training so far, if known.
        learning_rate: Usual relation of learning rate and batch size, if a rule is known.
        dataset_size: Samples per epoch, if known.
        last_samples: Samples in the last micro-batch of an epoch, if known.
        trial_notes: Notes on differences between trials and training.
        plan_notes: Notes of the subject on the plan.
        look: Number of samples read to find the largest ones, if any were read.
    """

    task: str
    plan: BatchPlan
    trials: tuple[Trial, ...]
    curve: tuple[CurvePoint, ...]
    unreached: tuple[int, ...]
    curve_seconds: float
    target_batch_size: int | None
    latency_limit: float | None
    bound: Bound | None
    time_limit: float | None
    source: str
    total: int
    foreign: int
    before: BatchPlan | None
    learning_rate: LearningRateRule | None
    dataset_size: int | None
    last_samples: int | None
    trial_notes: tuple[str, ...]
    plan_notes: tuple[str, ...]
    look: Look | None

    @property
    def fitting(self) -> list[Trial]:
        """Latest trial of each size that fits."""
        return [trial for trial in latest_by_size(self.trials) if trial.fits]

    @property
    def largest_fit(self) -> int:
        """The largest micro-batch that ran and fits."""
        return max((trial.batch_size for trial in self.fitting), default=0)

    @property
    def refused(self) -> list[int]:
        """Sizes for which the workload raised an error of its own."""
        trials = latest_by_size(self.trials)
        return [trial.batch_size for trial in trials if trial.outcome is Outcome.REFUSED]

    @property
    def speeds(self) -> dict[int, SpeedRow]:
        """Measured speed of each size."""
        rows = speed_rows(self.trials, self.curve, self.plan.world_size)
        return {row.batch_size: row for row in rows}


def tightest_bound(
    *,
    target_batch_size: int | None,
    max_micro_batch_size: int | None,
    dataset_size: int | None,
    world_size: int,
) -> Bound | None:
    """Return the lowest bound on a micro-batch; None if only memory bounds it."""
    ranks = f" on {world_size} ranks" if world_size > 1 else ""
    bounds = []
    if target_batch_size is not None:
        size = target_batch_size // world_size
        reason = f"target_batch_size={target_batch_size}{ranks} needs no more than {size:,} at once"
        bounds.append(Bound(size, reason))
    if max_micro_batch_size is not None:
        reason = f"max_micro_batch_size={max_micro_batch_size} allows no more"
        bounds.append(Bound(max_micro_batch_size, reason))
    if dataset_size is not None:
        reason = f"an epoch of {dataset_size:,} samples{ranks} has no more"
        bounds.append(Bound(dataset_size // world_size, reason))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)


def notes(result: TuningResult) -> tuple[str, ...]:
    """Return all notes on a tuning run, the most important first."""
    found = (
        # The plan itself
        _fails_at_end(result),
        *result.trial_notes,
        _deviation(result),
        _out_of_time(result),
        # Training with the plan
        _changed(result),
        _short_epoch(result),
        _all_at_once(result),
        *result.plan_notes,
        # Other sizes
        _past_knee(result),
        _tight(result),
        _uneven(result),
        _crowded(result),
        _unreached(result),
        _not_sought(result),
        _refused(result),
        # Quality of the measurements
        _scattered(result),
        _drifted(result),
        _fallback(result),
    )
    return tuple(note for note in found if note)


def _fails_at_end(result: TuningResult) -> str | None:
    """Note a last micro-batch of an epoch that the workload refuses."""
    samples = result.last_samples
    if samples not in result.refused:
        return None
    return (
        "Training will fail at the end of an epoch: its last micro-batch has "
        f"{counted(samples, 'sample')}, which the workload itself refused. "
        "Leave it out with drop_last=True of the loader."
    )


def _deviation(result: TuningResult) -> str | None:
    """Note an effective batch size other than the requested one."""
    target, got = result.target_batch_size, result.plan.effective_batch_size
    if target is None or target == got:
        return None
    reason = _reason_for_deviation(result, target)
    return f"Asked for {target:,} samples per update, got {got:,}: {reason}."


def _reason_for_deviation(result: TuningResult, target: int) -> str:
    plan, samples = result.plan, result.dataset_size
    if samples is not None and plan.effective_batch_size <= samples < target:
        return f"an epoch has no more than {samples:,} samples"
    share, rest = divmod(target, plan.world_size)
    if rest:
        return f"{target:,} is not divisible by {plan.world_size} ranks"
    largest = max(1, min(result.largest_fit, share))
    micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share // micro > 2 * ceil_div(share, largest):
        return (
            f"exact would take {share // micro:,} micro-batches of {micro:,} instead of "
            f"{plan.accumulate_grad_batches:,} of {plan.micro_batch_size:,}"
        )
    if result.last_samples is not None and 1 in result.refused:
        return (
            f"with {target:,}, an epoch would end with a single sample, which the workload "
            "refused; drop_last=True of the loader leaves it out"
        )
    return "no plan that gives it exactly was verified"


def _out_of_time(result: TuningResult) -> str | None:
    """Note a search that was ended by its time limit."""
    if result.time_limit is None:
        return None
    stopped = f"The search stopped at time_limit={result.time_limit:g} seconds"
    if result.latency_limit is not None:
        return f"{stopped}: larger sizes may answer in time too."
    return f"{stopped}: {result.largest_fit:,} is the largest verified so far, more may fit."


def _changed(result: TuningResult) -> str | None:
    """Note a training that changes: effective batch size, learning rate or accumulation."""
    before, plan, samples = result.before, result.plan, result.dataset_size
    if before is None:
        return None
    sentences = []
    old, new = before.effective_batch_size, plan.effective_batch_size
    # Before and after, a whole epoch in one update is no change either
    if old != new and (samples is None or min(old, new) < samples):
        sentences.append(f"The effective batch goes from {old:,} to {new:,}{_updates(result)}.")
        if result.learning_rate is not None:
            most = max(old, new) if samples is None else samples
            ratio = min(new, most) / min(old, most)
            sentences.append(usual_learning_rate(result.learning_rate, ratio))
    if before.accumulate_grad_batches not in (1, plan.accumulate_grad_batches):
        purpose = "" if result.target_batch_size is None else " to reach target_batch_size"
        sentences.append(
            f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer is "
            f"overridden with {plan.accumulate_grad_batches}{purpose}."
        )
    return " ".join(sentences) or None


def _updates(result: TuningResult) -> str:
    if result.dataset_size is None or result.before is None:
        return ""
    new = updates_per_epoch(result.plan, result.dataset_size)
    old = updates_per_epoch(result.before, result.dataset_size)
    return f": {counted(new, 'update')} per epoch instead of {old:,}"


def _short_epoch(result: TuningResult) -> str | None:
    """Note an epoch that does not fill one update."""
    samples, update = result.dataset_size, result.plan.effective_batch_size
    if samples is None or samples >= update:
        return None
    return (
        f"The epoch ({samples:,} samples) is smaller than the effective batch ({update:,}): "
        "each epoch performs one smaller update."
    )


def _all_at_once(result: TuningResult) -> str | None:
    """Note a whole epoch in one micro-batch, if no target was requested."""
    plan, samples = result.plan, result.dataset_size
    if result.task != "train" or result.target_batch_size is not None or samples is None:
        return None
    if plan.effective_batch_size != samples or plan.accumulate_grad_batches > 1:
        return None
    # A note on the changed effective batch size has the number of updates already
    updates = ": it performs one update" if _changed(result) is None else ""
    return (
        f"All {samples:,} samples of an epoch fit at once{updates}. "
        "Set target_batch_size for smaller batches and more updates."
    )


def _past_knee(result: TuningResult) -> str | None:
    """Note a smaller micro-batch that is about as fast as the largest, or faster."""
    if result.latency_limit is not None or result.target_batch_size is not None:
        return None
    size = result.plan.micro_batch_size
    speeds = {other: row.samples_per_second for other, row in result.speeds.items()}
    smaller = [other for other in speeds if other < size]
    if size not in speeds or not smaller:
        return None
    fastest = max(smaller, key=speeds.__getitem__)
    slower = 1 - speeds[size] / speeds[fastest]
    if slower > _SAME_SPEED:
        return f"{size:,} fits, and is {percent(slower)} slower than {fastest:,}."
    least = (1 - _SAME_SPEED) * speeds[size]
    as_fast = [other for other in smaller if 2 * other <= size and speeds[other] >= least]
    if not as_fast:
        return None
    gain = ", which gives more updates of the same samples" if result.task == "train" else ""
    return f"{size:,} fits, and is about as fast as {min(as_fast):,}{gain}."


def _tight(result: TuningResult) -> str | None:
    """Note a plan that takes nearly all memory, if no lower budget leaves some anyway."""
    size = result.plan.micro_batch_size
    peak = next((trial.peak for trial in result.fitting if trial.batch_size == size), None)
    available = result.total - result.foreign
    if peak is None or peak < (1 - _TIGHT) * available:
        return None
    return (
        f"Only {format_bytes(max(0, available - peak))} of {format_bytes(result.total)} to spare: "
        "longer inputs, or other processes on this device, may not fit. "
        "A lower memory_limit leaves more."
    )


def _uneven(result: TuningResult) -> str | None:
    """Note samples of different sizes."""
    look = result.look
    if look is None or look.is_even:
        return None
    if look.read == look.among:
        return (
            f"Samples differ in size. Trials ran the largest of all {look.read:,}, and times "
            "are for these."
        )
    among = "" if look.among is None else f" of {look.among:,}"
    return (
        f"Samples differ in size. Trials ran the largest of the {look.read:,}{among} that were "
        "read, and times are for these; a larger sample needs more memory: create it in worst_case."
    )


def _crowded(result: TuningResult) -> str | None:
    """Note memory held by other processes, if memory limits the search."""
    if result.foreign <= _CROWDED * result.total or _reached_bound(result):
        return None
    return (
        f"Other processes hold {format_bytes(result.foreign)} of this device's "
        f"{format_bytes(result.total)}; the largest fit changes when they start or stop."
    )


def _reached_bound(result: TuningResult) -> bool:
    return result.bound is not None and result.largest_fit >= result.bound.batch_size


def _unreached(result: TuningResult) -> str | None:
    """Note sizes that the speed curve had no time for."""
    if not result.unreached:
        return None
    fitting = {trial.batch_size for trial in result.fitting}
    in_trials = sorted(fitting.intersection(result.unreached))
    never = sorted(set(result.unreached) - fitting)
    parts = []
    if in_trials:
        parts.append(f"micro-batches of {_listed(in_trials)} were timed in their trials only")
    if never:
        parts.append(f"micro-batches of {_listed(never)} were left out")
    limit = f"{result.curve_seconds:g} seconds"
    return f"{limit} were too few to time all sizes: {', '.join(parts)}."


def _listed(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _not_sought(result: TuningResult) -> str | None:
    """Note the bound that ended the search, unless the note on a whole epoch shows it."""
    if result.bound is None or not _reached_bound(result) or _all_at_once(result):
        return None
    return f"Largest fit not sought: {result.bound.reason}."


def _refused(result: TuningResult) -> str | None:
    """Note sizes that the workload refuses, unless training fails because of them."""
    if not result.refused or result.last_samples in result.refused:
        return None
    return (
        f"The workload itself refused batch_size={max(result.refused)} with an error other than "
        "out of memory; only larger sizes run."
    )


def _scattered(result: TuningResult) -> str | None:
    """Note updates of the chosen size that differ too much to compare sizes."""
    row = result.speeds.get(result.plan.micro_batch_size)
    if row is None or row.samples_per_second_low is None or row.samples_per_second_high is None:
        return None
    low, high = row.samples_per_second_low, row.samples_per_second_high
    if (high - low) / 2 <= _SCATTERED * row.samples_per_second:
        return None
    return (
        f"Single updates of {row.batch_size:,} ran at {low:,.0f} to {high:,.0f} samples/s; "
        "on a quieter machine another size may be the fastest."
    )


def _drifted(result: TuningResult) -> str | None:
    """Note timings that change from the first to the second round."""
    drifts = [_significant_drift(point) for point in result.curve if point.drift is not None]
    drift = statistics.median(drifts) if drifts else 0.0
    if drift <= _SAME_SPEED:
        return None
    return (
        f"Timings drifted by {percent(drift)} while sizes were timed; other processes may use "
        "this device."
    )


def _significant_drift(point: CurvePoint) -> float:
    """Return the relative drift of one size, or 0 within its error."""
    drift = abs((point.drift or 1.0) - 1)
    return drift if drift > (point.drift_error or 0.0) else 0.0


def _fallback(result: TuningResult) -> str | None:
    """Note a source of memory readings that is not the best one."""
    return f"Memory is read from {result.source}." if " because " in result.source else None


# Data loading


def waiting(loading: Loading | None) -> str | None:
    """Note training that waited for data."""
    if loading is None or loading.share <= _WAITING:
        return None
    if loading.wait_seconds + loading.step_seconds < _LEAST_MEASURED:
        return None
    share = percent(loading.share)
    return f"Data loading took {share} of the time: more workers before more batch."


# Side effects of accumulation and of another effective batch size


def batch_norm(norms: BatchNorms, plan: BatchPlan) -> tuple[str, ...]:
    """Note layers that normalize over a micro-batch instead of the effective batch."""
    if plan.accumulate_grad_batches == 1:
        return ()
    found = []
    if norms.alone:
        found.append(_statistics(norms.alone, "BatchNorm", plan.micro_batch_size, plan))
    if norms.together:
        samples = plan.micro_batch_size * plan.world_size
        found.append(_statistics(norms.together, "SyncBatchNorm", samples, plan))
    return tuple(found)


def _statistics(layers: int, kind: str, samples: int, plan: BatchPlan) -> str:
    use, their = ("layer uses", "its") if layers == 1 else ("layers use", "their")
    note = (
        f"{layers} {kind} {use} the statistics of {counted(samples, 'sample')}, "
        f"not {plan.effective_batch_size:,}"
    )
    if samples >= _STEADY_BATCH:
        return f"{note}."
    return (
        f"{note}, and {their} running averages move {plan.accumulate_grad_batches:,} times per "
        f"update. Micro-batches of {_STEADY_BATCH} or more, or GroupNorm, are steadier."
    )


def not_additive(splitting: Splitting, plan: BatchPlan) -> str:
    """Note a loss that is not a mean over samples."""
    whole, parts = plan.effective_batch_size, plan.accumulate_grad_batches
    if splitting.is_sum:
        return (
            "The loss adds its samples up instead of averaging them: accumulated over "
            f"{parts:,} micro-batches, its gradient is 1/{parts:,} of the gradient of one batch "
            f"of {whole:,}."
        )
    return (
        f"Splitting a batch of {splitting.samples} changed its gradient by "
        f"{percent(splitting.change)}: the loss compares samples with each other, or averages over "
        "something else, such as tokens. Accumulating does not reproduce a batch of "
        f"{whole:,}: use larger micro-batches, or divide sums by the total of the whole update."
    )


def not_tested(seconds: float) -> str:
    """Note that the time limit left the splitting test out."""
    return (
        f"time_limit={seconds:g} seconds left no time to test whether micro-batches give the "
        "gradient of one batch."
    )


def usual_learning_rate(rule: LearningRateRule, ratio: float) -> str:
    """Return the usual change of a learning rate for a change of the effective batch size."""
    change = factor(rule.factor(ratio))
    return (
        f"{rule.optimizer} usually wants about {change} the learning rate for that "
        f"({rule.rule} rule)."
    )


def stretched_schedule(
    scheduler: str, updates: int | None, before: BatchPlan, plan: BatchPlan
) -> str | None:
    """Note a learning-rate schedule in updates; `updates` is its length, if known."""
    old, new = before.effective_batch_size, plan.effective_batch_size
    if old == new:
        return None
    if updates is None:
        return (
            f"{scheduler} counts updates, each of {new:,} samples now instead of {old:,}; "
            "a length from trainer.estimated_stepping_batches would adapt."
        )
    return (
        f"{scheduler} counts updates: its {updates:,} steps now cover {updates * new:,} samples "
        f"instead of {updates * old:,}."
    )


def accumulation_costs(plan: BatchPlan, best: float, optimizer_share: float) -> str | None:
    """Note a plan that accumulates far more than the estimated best accumulation.

    Args:
        plan: The chosen plan.
        best: Accumulation with the shortest time to the same loss; below 1, it costs time.
        optimizer_share: Share of the optimizer in an update of one micro-batch.
    """
    best = max(1.0, best)
    if plan.accumulate_grad_batches <= _FAR_ABOVE_BEST * best:
        return None
    return (
        f"Accumulating more than ×{best:.0f} would likely cost time: it only saves optimizer "
        f"steps, {percent(optimizer_share)} of an update without accumulation."
    )


# Optimizer steps in trials


def never_stepped() -> str:
    """Note trials that computed gradients without an optimizer step."""
    return (
        "Trials computed gradients, but no torch.optim optimizer stepped in them: the peak does "
        "not include optimizer state, and an update may take longer than timed. Ignore this if "
        "something else updates the weights."
    )


def ignores_accumulate(plan: BatchPlan) -> str | None:
    """Note a loop that steps its optimizer after each backward pass in spite of accumulation."""
    times, whole = plan.accumulate_grad_batches, plan.effective_batch_size
    if times == 1:
        return None
    return (
        "Asked to accumulate, the loop still stepped its optimizer after every backward pass: if "
        f"each is one micro-batch, an update has {whole // times:,} samples instead of {whole:,}, "
        f"and an epoch {times:,} times as many updates. Step after `accumulate` backward passes."
    )


def manual_optimization(plan: BatchPlan) -> str | None:
    """Note a module with manual optimization, which has to accumulate by itself."""
    if plan.accumulate_grad_batches == 1:
        return None
    return (
        f"This module uses manual optimization: to reach {plan.effective_batch_size:,} samples per "
        f"update its training_step has to step every {plan.accumulate_grad_batches:,} "
        "micro-batches. Trials ran it as it steps now."
    )


def repeated_closures(plan: BatchPlan) -> str | None:
    """Note an optimizer that evaluates its closure several times in a step."""
    if plan.accumulate_grad_batches == 1:
        return None
    return (
        "LBFGS evaluates the last micro-batch of an update several times, and Lightning adds up "
        "the gradients of all evaluations: give a target_batch_size that fits at once."
    )


def last_window(plan: BatchPlan, micro_batches: int, samples: int) -> str | None:
    """Note the weights that Lightning gives to the last update of an epoch.

    Args:
        plan: The chosen plan.
        micro_batches: Micro-batches in the last update.
        samples: Samples in its last micro-batch.
    """
    whole, size = plan.accumulate_grad_batches, plan.micro_batch_size
    sentences = []
    if micro_batches < whole:
        made = f"{micro_batches:,} micro-batch{'es' if micro_batches > 1 else ''}"
        sentences.append(
            f"The last update of an epoch is made of {made} instead of {whole:,}, and Lightning "
            f"still divides by {whole:,}: its gradient is {100 * micro_batches / whole:.3g} % of "
            "what it should be"
        )
    if samples < size and micro_batches > 1:
        sentences.append(
            f"The last micro-batch of an epoch has {samples:,} of {size:,} samples, and Lightning "
            f"counts it as a full one: its samples weigh {size / samples:.3g} times as much as "
            "others"
        )
    return f"{'. '.join(sentences)}; repair_last_window=True corrects it." if sentences else None
