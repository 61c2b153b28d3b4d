"""Notes of a report, each with its trigger."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes
from autobatch._report.tradeoff import updates_per_epoch
from autobatch._throughput import latest_by_size, speed_rows
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from autobatch._accumulation import BatchNorms, Splitting
    from autobatch._plan import BatchPlan
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._throughput import CurvePoint, SpeedRow
    from autobatch._throughput.loading import Loading
    from autobatch._trials import Trial


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest micro-batch a search may try, and the sentence that says what sets it."""

    batch_size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """How far was looked for the largest samples, on which trials run.

    Args:
        read: Samples read.
        among: Samples there are; None where that is not known.
        is_even: Whether those read were all of one size.
    """

    read: int
    among: int | None
    is_even: bool


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What a tuning run found, as far as a note could be about it.

    Args:
        task: What is done with the batches; only "train" makes updates.
        plan: What was chosen.
        trials: All trials, in the order they were run.
        curve: Sizes that were timed besides.
        unreached: Sizes that were to be timed for the curve, and for which there was no time.
        curve_seconds: That it may take.
        target_batch_size: The effective batch that was asked for, if one was.
        latency_limit: Seconds within which a batch has to be answered, if that was asked.
        bound: What kept the search from going higher, if anything did.
        time_limit: Seconds, if the search was stopped because of them; otherwise None.
        source: Where memory is read; a fallback gives its reason, "… because …".
        total: What the device has, in bytes.
        foreign: What others hold of it, in bytes.
        before: What was trained with until now, where that is known.
        learning_rate: How the learning rate usually goes with the batch, where a rule is known.
        dataset_size: Samples per epoch, where that is known.
        last_samples: Samples in the last micro-batch of an epoch, where that is known.
        doubts: Sentences about what was tried, which may not be what will be trained.
        remarks: Sentences from where the tuning was asked for.
        look: How far was looked for the largest samples, where that was done.
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
    doubts: tuple[str, ...]
    remarks: tuple[str, ...]
    look: Look | None

    @property
    def largest_fit(self) -> int:
        """The largest micro-batch that was run and fits."""
        return max(
            (trial.batch_size for trial in latest_by_size(self.trials) if trial.fits),
            default=0,
        )

    @property
    def sizes(self) -> tuple[SpeedRow, ...]:
        """What was timed."""
        return speed_rows(self.trials, self.curve, self.plan.world_size)


def tightest_bound(
    *,
    target_batch_size: int | None,
    max_micro_batch_size: int | None,
    dataset_size: int | None,
    world_size: int,
) -> Bound | None:
    """The lowest of the bounds on a micro-batch, or None when only memory bounds it."""
    bounds = []
    if target_batch_size is not None:
        share = target_batch_size // world_size
        what = f"target_batch_size={target_batch_size}{_on(world_size)}"
        bounds.append(Bound(share, f"{what} needs no more than {share:,} at once"))
    if max_micro_batch_size is not None:
        what = f"max_micro_batch_size={max_micro_batch_size}"
        bounds.append(Bound(max_micro_batch_size, f"{what} allows no more"))
    if dataset_size is not None:
        share = dataset_size // world_size
        what = f"{dataset_size:,} samples{_on(world_size)}"
        bounds.append(Bound(share, f"an epoch of {what} has no more"))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)


def _on(world_size: int) -> str:
    return f" on {world_size} ranks" if world_size > 1 else ""


_MUCH: Final = 0.1  # share of a device's memory held by others that a person should hear of
_TIGHT: Final = 0.05  # share of what others leave of a device below which little more fits
_SPREAD: Final = 0.05  # speeds no further apart are alike: timings tell no more
_WILD: Final = 0.3  # of its median, that a speed reaches up and down: others of it are noise
_WAITING: Final = 0.1  # share of the time beyond which more workers help more than a larger batch
_TELLING: Final = 0.5  # seconds that have to be measured: less is a busy moment


def notes(found: TuningResult) -> tuple[str, ...]:
    """All that a person should be told, in the order of what it changes."""
    told = (
        # The answer itself
        _fails_at_end(found),
        *found.doubts,
        _deviation(found),
        _out_of_time(found),
        # Training with it
        _changed(found),
        _short_epoch(found),
        _all_at_once(found),
        *found.remarks,
        # Whether another would do
        _past_knee(found),
        _tight(found),
        _uneven(found),
        _crowded(found),
        _unreached(found),
        _not_sought(found),
        _refused(found),
        # How far to trust what was measured
        _scattered(found),
        _drifted(found),
        _fallback(found),
    )
    return tuple(note for note in told if note)


def _deviation(found: TuningResult) -> str | None:
    asked, got = found.target_batch_size, found.plan.effective_batch_size
    if asked is None or asked == got:
        return None
    return f"Asked for {asked:,} samples per update, got {got:,}: {_why_not_exact(found, asked)}."


def _why_not_exact(found: TuningResult, asked: int) -> str:
    got, samples = found.plan.effective_batch_size, found.dataset_size
    if samples is not None and got <= samples < asked:
        return f"an epoch has no more than {samples:,} samples"
    share, rest = divmod(asked, found.plan.world_size)
    if rest:
        return f"{asked:,} does not divide by {found.plan.world_size} ranks"
    largest = max(1, min(found.largest_fit, share))
    micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share // micro > 2 * -(-share // largest):
        return (
            f"exact would take {share // micro:,} micro-batches of {micro:,} instead of "
            f"{found.plan.accumulate_grad_batches:,} of {found.plan.micro_batch_size:,}"
        )
    if found.last_samples is not None and 1 in _refused_sizes(found):
        return (
            f"with {asked:,}, an epoch would end with a single sample, which the workload refused; "
            "drop_last=True of the loader leaves it out"
        )
    return "no plan that gives it exactly was verified"


def _changed(found: TuningResult) -> str | None:
    before, plan, samples = found.before, found.plan, found.dataset_size
    if before is None:
        return None
    then, now = before.effective_batch_size, plan.effective_batch_size
    # All of an epoch, then as now, is no change either
    if then == now or (samples is not None and min(then, now) >= samples):
        return _overridden(before, plan)
    told = [f"The effective batch goes from {then:,} to {now:,}{_updates(found, before)}."]
    if found.learning_rate is not None:
        most = max(then, now) if samples is None else samples
        batches = min(now, most) / min(then, most)
        told.append(usual_learning_rate(found.learning_rate, batches))
    if (gives_way := _overridden(before, plan)) is not None:
        told.append(gives_way)
    return " ".join(told)


def _updates(found: TuningResult, before: BatchPlan) -> str:
    if found.dataset_size is None:
        return ""
    now, then = (updates_per_epoch(each, found.dataset_size) for each in (found.plan, before))
    return f": {now:,} update{'s' if now > 1 else ''} per epoch instead of {then:,}"


def _overridden(before: BatchPlan, plan: BatchPlan) -> str | None:
    if before.accumulate_grad_batches in (1, plan.accumulate_grad_batches):
        return None
    return (
        f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer gives "
        f"way to {plan.accumulate_grad_batches}, for the target."
    )


def _short_epoch(found: TuningResult) -> str | None:
    samples, update = found.dataset_size, found.plan.effective_batch_size
    if samples is None or samples >= update:
        return None
    return (
        f"An epoch of {samples:,} samples is less than one update of {update:,}: every epoch makes one update, "
        "of what there is."
    )


def _all_at_once(found: TuningResult) -> str | None:
    """Where memory would take the whole data set, and no one asked for that."""
    plan, samples = found.plan, found.dataset_size
    if found.task != "train" or found.target_batch_size is not None or samples is None:
        return None
    if plan.effective_batch_size != samples or plan.accumulate_grad_batches > 1:
        return None
    told = f"All {samples:,} samples of an epoch fit at once"
    if _changed(found) is None:
        told += ": it makes one update"
    return f"{told}. target_batch_size asks for smaller batches, and more updates."


def _past_knee(found: TuningResult) -> str | None:
    """Where the largest that fits was taken for its own sake, and gives no more speed than a smaller one."""
    if found.latency_limit is not None:
        return None  # taken for another reason
    size = found.plan.micro_batch_size
    speeds = {row.batch_size: row.samples_per_second for row in found.sizes}
    here = speeds.pop(size, None)
    smaller = [other for other in speeds if other < size]
    if found.target_batch_size is not None or here is None or not smaller:
        return None
    fastest = max(smaller, key=lambda other: speeds[other])
    slower = 1 - here / speeds[fastest]
    if slower > _SPREAD:
        return f"{size:,} fits, and is {share(slower)} slower than {fastest:,}."
    halves = [other for other in smaller if 2 * other <= size]
    enough = [other for other in halves if speeds[other] >= (1 - _SPREAD) * here]
    if not enough:
        return None
    told = f"{size:,} fits, and is about as fast as {min(enough):,}"
    if found.task != "train":
        return f"{told}."
    return f"{told}, which makes more updates of the same samples."


def _tight(found: TuningResult) -> str | None:
    """Where the plan takes nearly all that there is: a budget below that leaves room by itself."""
    size = found.plan.micro_batch_size
    peaks = [t.peak for t in latest_by_size(found.trials) if t.batch_size == size and t.fits]
    room = found.total - found.foreign
    if not peaks or peaks[0] is None or peaks[0] < (1 - _TIGHT) * room:
        return None
    return (
        f"Only {format_bytes(max(0, room - peaks[0]))} of {format_bytes(found.total)} to spare: longer inputs, or "
        "others on this device, may not fit. A lower memory_limit leaves more."
    )


def _unreached(found: TuningResult) -> str | None:
    """Where the time of the curve ran out, and which sizes that leaves with less than the others, or with nothing."""
    if not found.unreached:
        return None
    tried = {trial.batch_size for trial in latest_by_size(found.trials) if trial.fits}
    by_trial, not_run = (
        [size for size in sorted(found.unreached) if (size in tried) is known]
        for known in (True, False)
    )
    told = []
    if by_trial:
        told.append(f"micro-batches of {_listed(by_trial)} were timed in their trial alone")
    if not_run:
        told.append(f"micro-batches of {_listed(not_run)} were left out")
    return f"{found.curve_seconds:g} seconds were too few to time all sizes: {', '.join(told)}."


def _listed(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _scattered(found: TuningResult) -> str | None:
    """Where single updates of the chosen size differ so much that sizes can hardly be compared."""
    chosen = found.plan.micro_batch_size
    here = next((row for row in found.sizes if row.batch_size == chosen), None)
    if here is None:
        return None
    low, high = here.samples_per_second_low, here.samples_per_second_high
    if low is None or high is None:
        return None
    if (high - low) / 2 <= _WILD * here.samples_per_second:
        return None
    return (
        f"Single updates of {chosen:,} ran at {low:,.0f} to {high:,.0f} samples/s; on a quieter machine another size may "
        "be the fastest."
    )


def _drifted(found: TuningResult) -> str | None:
    drifts = [_clear_drift(point) for point in found.curve if point.drift is not None]
    drift = statistics.median(drifts) if drifts else 0.0
    if drift <= _SPREAD:
        return None
    return f"Timings drifted by {share(drift)} while sizes were timed; something else may use this device."


def _clear_drift(point: CurvePoint) -> float:
    """How far two visits to a size are apart; nothing, where chance may have done it."""
    off = abs((point.drift or 1.0) - 1)
    return off if off > (point.drift_error or 0.0) else 0.0


def _out_of_time(found: TuningResult) -> str | None:
    if found.time_limit is None:
        return None
    if found.latency_limit is not None:
        return f"The search stopped at time_limit={found.time_limit:g} seconds: larger sizes may answer in time too."
    return (
        f"The search stopped at time_limit={found.time_limit:g} seconds: "
        f"{found.largest_fit:,} is the largest verified so far, more may fit."
    )


def _not_sought(found: TuningResult) -> str | None:
    if found.bound is None or found.largest_fit < found.bound.batch_size:
        return None
    if _all_at_once(found):
        return None  # that says it
    return f"Largest fit not sought: {found.bound.reason}."


def _refused(found: TuningResult) -> str | None:
    sizes = _refused_sizes(found)
    if not sizes or found.last_samples in sizes:
        return None
    return f"The workload itself refused batch_size={max(sizes)}; its own error, not memory, bounds it from below."


def _fails_at_end(found: TuningResult) -> str | None:
    """Where an epoch ends with a micro-batch that is known to be refused, and no plan avoids it."""
    left = found.last_samples
    if left not in _refused_sizes(found):
        return None
    return (
        f"Training will fail at the end of an epoch: its last micro-batch has {left} sample{'s' if left != 1 else ''}, "
        "which the workload itself refused. Leave it out, with drop_last=True of the loader."
    )


def _refused_sizes(found: TuningResult) -> list[int]:
    return [
        trial.batch_size
        for trial in latest_by_size(found.trials)
        if trial.outcome is Outcome.REFUSED
    ]


def _uneven(found: TuningResult) -> str | None:
    look = found.look
    if look is None or look.is_even:
        return None
    if look.read == look.among:
        return f"Samples differ in size. Trials ran the largest of all {look.read:,}, and times are theirs."
    there = "" if look.among is None else f" of {look.among:,}"
    return (
        f"Samples differ in size. Trials ran the largest of the {look.read:,}{there} that were looked at, and times are "
        "theirs; one that is larger still needs more memory: make it in worst_case."
    )


def _crowded(found: TuningResult) -> str | None:
    bound = found.bound
    if found.foreign <= _MUCH * found.total:
        return None
    if bound is not None and found.largest_fit >= bound.batch_size:
        return None  # it was not memory that kept the search from going higher
    return (
        f"Others hold {format_bytes(found.foreign)} of this device's {format_bytes(found.total)}; "
        "what fits changes when they come or go."
    )


def _fallback(found: TuningResult) -> str | None:
    return f"Memory is read from {found.source}." if " because " in found.source else None


def waiting(loading: Loading | None) -> str | None:
    """Where training waited for data, for long enough that it is not chance."""
    if loading is None or loading.share <= _WAITING:
        return None
    if loading.wait_seconds + loading.step_seconds < _TELLING:
        return None
    return f"Data loading took {share(loading.share)} of the time: more workers before more batch."


_STEADY: Final = 16  # samples below which statistics of a batch are unsteady
_WORTH: Final = 2  # times the best accumulation: less is within what an estimate can tell


def batch_norm(norms: BatchNorms, plan: BatchPlan) -> tuple[str, ...]:
    """What layers that normalise by the batch see of an update that is accumulated."""
    if plan.accumulate_grad_batches == 1:
        return ()
    of_ranks = plan.micro_batch_size * plan.world_size
    counted = (
        (norms.alone, "BatchNorm", plan.micro_batch_size),
        (norms.together, "SyncBatchNorm", of_ranks),
    )
    return tuple(_statistics(layers, kind, seen, plan) for layers, kind, seen in counted if layers)


def _statistics(layers: int, kind: str, seen: int, plan: BatchPlan) -> str:
    use = "layer uses" if layers == 1 else "layers use"
    samples = "sample" if seen == 1 else "samples"
    told = f"{layers} {kind} {use} the statistics of {seen:,} {samples}, not {plan.effective_batch_size:,}"
    if seen >= _STEADY:
        return f"{told}."
    return (
        f"{told}, and {'its' if layers == 1 else 'their'} running averages move {plan.accumulate_grad_batches:,} times "
        f"per update. Micro-batches of {_STEADY} or more, or GroupNorm, are steadier."
    )


def not_additive(splitting: Splitting, plan: BatchPlan) -> str:
    """What a loss does that is no mean over samples."""
    whole, parts = plan.effective_batch_size, plan.accumulate_grad_batches
    if splitting.is_sum:
        return (
            f"The loss adds its samples up instead of averaging them: accumulated over {parts:,} micro-batches, its "
            f"gradient is 1/{parts:,} of that of one batch of {whole:,}."
        )
    return (
        f"Splitting a batch of {splitting.samples} changed its gradient by {share(splitting.change)}: the loss compares "
        "samples with each other, or averages over something else, such as tokens. Accumulating does not reproduce a "
        f"batch of {whole:,}: use larger micro-batches, or divide sums by what all of an update holds."
    )


def not_tested(seconds: float) -> str:
    """That it is not known whether a batch can be split, since so many seconds were over."""
    return f"time_limit={seconds:g} seconds left no time to test whether micro-batches give the gradient of one batch."


def usual_learning_rate(rule: LearningRateRule, batches: float) -> str:
    """What an optimizer usually wants where the effective batch is multiplied by so much."""
    factor = rule.factor(batches)
    times = f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"  # noqa: PLR2004 -- two digits at least
    return f"{rule.optimizer} usually wants about ×{times} the learning rate for that ({rule.rule} rule)."


def stretched_schedule(
    scheduler: str, updates: int | None, before: BatchPlan, plan: BatchPlan
) -> str | None:
    """What becomes of a learning-rate schedule that counts updates; `updates` is its length, where that is known."""
    then, now = before.effective_batch_size, plan.effective_batch_size
    if then == now:
        return None
    if updates is None:
        return (
            f"{scheduler} counts updates, each of {now:,} samples now instead of {then:,}; a length taken from "
            "trainer.estimated_stepping_batches would follow."
        )
    return (
        f"{scheduler} counts updates: its {updates:,} steps now cover {updates * now:,} samples instead of "
        f"{updates * then:,}."
    )


def accumulation_costs(plan: BatchPlan, best: float, optimizer_share: float) -> str | None:
    """Where a plan accumulates much more than is best for the time to the same loss, `best`: an estimate.

    `optimizer_share` is that of the optimizer in an update of one micro-batch.
    """
    best = max(1.0, best)
    if plan.accumulate_grad_batches <= _WORTH * best:
        return None
    return (
        f"Accumulating more than ×{best:.0f} would likely cost time: all it saves is optimizer steps, "
        f"{share(optimizer_share)} of an update that does not accumulate."
    )


def never_stepped() -> str:
    """What trials lack in which gradients were computed, and no optimizer of torch's stepped."""
    return (
        "Trials computed gradients, but no torch.optim optimizer stepped in them: what its state would hold is not in "
        "the peak, and an update may take longer than was timed. Where something else changes the weights, all is well."
    )


def ignores_accumulate(plan: BatchPlan) -> str | None:
    """What becomes of a plan in a loop whose optimizer stepped as often as there were backward passes."""
    times = plan.accumulate_grad_batches
    if times == 1:
        return None
    return (
        f"Asked to accumulate, the loop still stepped its optimizer after every backward pass: where each is one "
        f"micro-batch, an update has {plan.effective_batch_size // times:,} samples instead of "
        f"{plan.effective_batch_size:,}, and an epoch {times:,} times as many updates. Step after `accumulate` of them."
    )


def by_hand(plan: BatchPlan) -> str | None:
    """What is left to a module that optimises by hand."""
    if plan.accumulate_grad_batches == 1:
        return None
    return (
        f"This module optimises by hand: to reach {plan.effective_batch_size:,} samples per update its training_step "
        f"has to step every {plan.accumulate_grad_batches:,} micro-batches. It was tried as it steps now."
    )


def repeated_closures(plan: BatchPlan) -> str | None:
    """What becomes of the gradients of an optimizer that evaluates its closure several times in a step."""
    if plan.accumulate_grad_batches == 1:
        return None
    return (
        "LBFGS evaluates the last micro-batch of an update several times, and Lightning adds up the gradients of all "
        "evaluations: give a target_batch_size that fits at once."
    )


def last_window(plan: BatchPlan, micro_batches: int, samples: int) -> str | None:
    """How Lightning weights the last update of an epoch: of so many micro-batches, the last of so many samples."""
    whole, size = plan.accumulate_grad_batches, plan.micro_batch_size
    told = []
    if micro_batches < whole:
        made = f"{micro_batches:,} micro-batch{'es' if micro_batches > 1 else ''}"
        told.append(
            f"The last update of an epoch is made of {made} instead of {whole:,}, and Lightning still divides by "
            f"{whole:,}: its gradient is {100 * micro_batches / whole:.3g} % of what it should be"
        )
    if samples < size and micro_batches > 1:
        told.append(
            f"The last micro-batch of an epoch has {samples:,} of {size:,} samples, and Lightning counts it as a full one: "
            f"its samples weigh {size / samples:.3g} times as much as others"
        )
    return f"{'. '.join(told)}; repair_last_window=True corrects it." if told else None


def share(part: float) -> str:
    """A share for a sentence, "18 %": two digits of a small one."""
    percent = 100 * part
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"  # noqa: PLR2004 -- two digits
