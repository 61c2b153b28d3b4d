"""Notes of a report: one function per note, which returns None unless its trigger is met."""

from __future__ import annotations

import statistics
from textwrap import shorten
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes
from autobatch._plan import ceil_div
from autobatch._report.accumulation_notes import usual_learning_rate
from autobatch._report.tradeoff import updates_per_epoch
from autobatch._report.units import counted, percent

if TYPE_CHECKING:
    from autobatch._report.result import TuningResult
    from autobatch._throughput import CurvePoint
    from autobatch._throughput.loading import Loading
    from autobatch._trials import Trial

_CROWDED: Final = 0.1  # share of device memory held by other processes that is worth a note
_TIGHT: Final = 0.05  # share of available memory; with less to spare, little more fits
_FRAGMENTED: Final = 1.10  # reserved over allocated bytes; with less, little more would fit
_SAME_SPEED: Final = 0.05  # relative difference of speeds within the noise of their timing
_SCATTERED: Final = 0.3  # relative spread of single updates that hides differences of sizes
_WAITING: Final = 0.1  # share of time spent on data that more workers would save
_MOST_OF_ERROR: Final = 160  # characters
_LEAST_MEASURED: Final = 0.5  # seconds; data loading over less time is noise


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
        _fragmented(result),
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
    if result.prefer == "fast":
        return None  # a smaller one as fast would have been taken, unless this is the user's own
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


def _fragmented(result: TuningResult) -> str | None:
    """Note memory that is reserved and not in use, if memory limits the search."""
    size = result.largest_fit
    trial = next((trial for trial in result.fitting if trial.batch_size == size), None)
    if trial is None or trial.peak is None or not trial.allocated or _reached_bound(result):
        return None
    if trial.peak < _FRAGMENTED * trial.allocated or trial.allocated <= trial.resident:
        return None
    most = size * (trial.peak - trial.resident) // (trial.allocated - trial.resident)
    return (
        f"{format_bytes(trial.peak - trial.allocated)} of {format_bytes(trial.peak)} at {size:,} "
        f"are fragments. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may fit up to {most:,}, "
        "an estimate from the bytes in use."
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
    limit = f"{result.curve_seconds:.3g} seconds"
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
    first_of_class = {_class_of(trial): trial for trial in reversed(result.refusals)}
    errors = "; ".join(
        shorten(trial.error or "unknown error", _MOST_OF_ERROR, placeholder=" …")
        for trial in reversed(first_of_class.values())
    )
    return (
        f"The workload itself raised an error at batch_size={_listed(result.refused)}, so only "
        f"sizes that ran are used ({errors})."
    )


def _class_of(trial: Trial) -> str:
    return (trial.error or "").partition(":")[0]


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
    return f"Data loading took {share} of the time: raise num_workers before the batch size."
