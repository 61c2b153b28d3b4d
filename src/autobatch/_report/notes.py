"""Notes of a report: one function per note, which returns None unless its trigger is met."""

from __future__ import annotations

import statistics
from textwrap import shorten
from typing import TYPE_CHECKING, Final

from autobatch import _settings
from autobatch._memory import format_bytes
from autobatch._plan import ceil_div
from autobatch._report.accumulation_notes import usual_learning_rate
from autobatch._report.latency import latency_notes
from autobatch._report.tradeoff import updates_per_epoch
from autobatch._report.units import counted, duration, percent
from autobatch._throughput import latest_by_size, trial_of
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._report.result import RunDetails, Survived
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


def notes(report: TuningReport, run: RunDetails) -> tuple[str, ...]:
    """Return all notes on a tuning run, the most important first."""
    found = (
        # The plan itself
        _not_run(report),
        _fails_at_end(report, run),
        *run.trial_notes,
        _deviation(report, run),
        _out_of_time(report, run),
        # Training with the plan
        _changed(report, run.before),
        _short_epoch(report),
        _all_at_once(report, run),
        *(latency_notes(report, run.unfinished) if run.unfinished else ()),
        *run.plan_notes,
        # Other sizes
        _past_knee(report),
        _tight(report),
        _fragmented(report, run),
        _uneven(report),
        _crowded(report, run),
        _unreached(report, run),
        _not_sought(report, run),
        _refused(report, run),
        # Quality of the measurements
        _scattered(report),
        _drifted(report),
        _fallback(report),
    )
    return tuple(note for note in found if note)


def _not_run(report: TuningReport) -> str | None:
    if not report.as_if:
        return None
    return (
        f"Not run on {report.devices} devices: one process stood for all, with collectives that "
        "communicate nothing. Memory that the communication library takes, such as the buffers of "
        "NCCL, is not counted, and speed was not measured."
    )


def _fails_at_end(report: TuningReport, run: RunDetails) -> str | None:
    samples = run.last_samples
    if samples is None or samples not in _refusals(report):
        return None
    return (
        "Training will fail at the end of an epoch: its last micro-batch has "
        f"{counted(samples, 'sample')}, which the workload itself refused. "
        "Leave it out with drop_last=True of the loader."
    )


def _refusals(report: TuningReport) -> dict[int, Trial]:
    """Return the latest trial of each size for which the workload raised an error of its own."""
    trials = latest_by_size(report.trials)
    return {trial.batch_size: trial for trial in trials if trial.outcome is Outcome.REFUSED}


def _deviation(report: TuningReport, run: RunDetails) -> str | None:
    target, got = report.settings.target_batch_size, report.plan.effective_batch_size
    if target is None or target == got:
        return None
    reason = _reason_for_deviation(report, run, target)
    return f"Asked for {target:,} samples per update, got {got:,}: {reason}."


def _reason_for_deviation(report: TuningReport, run: RunDetails, target: int) -> str:
    plan, samples = report.plan, report.dataset_size
    if samples is not None and plan.effective_batch_size <= samples < target:
        return f"an epoch has no more than {samples:,} samples"
    share, rest = divmod(target, plan.world_size)
    if rest:
        return f"{target:,} is not divisible by {plan.world_size} ranks"
    largest = max(1, min(report.largest_fit or 0, share))
    micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share // micro > 2 * ceil_div(share, largest):
        return (
            f"exact would take {share // micro:,} micro-batches of {micro:,} instead of "
            f"{plan.accumulate_grad_batches:,} of {plan.micro_batch_size:,}"
        )
    if run.last_samples is not None and 1 in _refusals(report):
        return (
            f"with {target:,}, an epoch would end with a single sample, which the workload "
            "refused; drop_last=True of the loader leaves it out"
        )
    return "no plan that gives it exactly was verified"


def _out_of_time(report: TuningReport, run: RunDetails) -> str | None:
    limit = report.settings.time_limit
    if limit is None or not run.is_out_of_time:
        return None
    rest = f"{report.largest_fit or 0:,} is the largest verified so far, more may fit"
    if report.settings.latency_limit is not None:
        rest = "larger sizes may answer in time too"
    return f"The search stopped at time_limit={limit:g} seconds: {rest}."


def _changed(report: TuningReport, before: BatchPlan | None) -> str | None:
    plan, samples = report.plan, report.dataset_size
    if before is None:
        return None
    sentences = []
    old, new = before.effective_batch_size, plan.effective_batch_size
    # Before and after, a whole epoch in one update is no change either
    if old != new and (samples is None or min(old, new) < samples):
        updates = ""
        if samples is not None:
            now, then = (updates_per_epoch(each, samples) for each in (plan, before))
            updates = f": {counted(now, 'update')} per epoch instead of {then:,}"
        sentences.append(f"The effective batch goes from {old:,} to {new:,}{updates}.")
        if report.learning_rate is not None:
            most = max(old, new) if samples is None else samples
            ratio = min(new, most) / min(old, most)
            sentences.append(usual_learning_rate(report.learning_rate, ratio))
    if before.accumulate_grad_batches not in (1, plan.accumulate_grad_batches):
        has_target = report.settings.target_batch_size is not None
        sentences.append(
            f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer is "
            f"overridden with {plan.accumulate_grad_batches}"
            f"{' to reach target_batch_size' if has_target else ''}."
        )
    return " ".join(sentences) or None


def _short_epoch(report: TuningReport) -> str | None:
    samples, update = report.dataset_size, report.plan.effective_batch_size
    if samples is None or samples >= update:
        return None
    return (
        f"The epoch ({samples:,} samples) is smaller than the effective batch ({update:,}): "
        "each epoch performs one smaller update."
    )


def _all_at_once(report: TuningReport, run: RunDetails) -> str | None:
    plan, samples = report.plan, report.dataset_size
    if report.task != "train" or report.settings.target_batch_size is not None or samples is None:
        return None
    if plan.effective_batch_size != samples or plan.accumulate_grad_batches > 1:
        return None
    # A note on the changed effective batch size has the number of updates already
    updates = ": it performs one update" if _changed(report, run.before) is None else ""
    return (
        f"All {samples:,} samples of an epoch fit at once{updates}. "
        "Set target_batch_size for smaller batches and more updates."
    )


def _past_knee(report: TuningReport) -> str | None:
    settings, size = report.settings, report.plan.micro_batch_size
    if settings.latency_limit is not None or settings.target_batch_size is not None:
        return None
    if settings.prefer == "fast":
        return None  # a smaller one as fast would have been taken, unless this is the user's own
    speeds = {row.batch_size: row.samples_per_second for row in report.sizes}
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
    gain = ", which gives more updates of the same samples" if report.task == "train" else ""
    return f"{size:,} fits, and is about as fast as {min(as_fast):,}{gain}."


def _tight(report: TuningReport) -> str | None:
    trial, total = trial_of(report.trials, report.plan.micro_batch_size), report.device.total
    available = total - report.device.foreign
    peak = trial.peak if trial and trial.fits else None
    if peak is None or peak < (1 - _TIGHT) * available:
        return None
    return (
        f"Only {format_bytes(max(0, available - peak))} of {format_bytes(total)} to spare: "
        "longer inputs, or other processes on this device, may not fit. "
        "A lower memory_limit leaves more."
    )


def _fragmented(report: TuningReport, run: RunDetails) -> str | None:
    size = report.largest_fit or 0
    trial = trial_of(report.trials, size)
    if trial is None or trial.peak is None or not trial.allocated or _reached_bound(report, run):
        return None
    if trial.peak < _FRAGMENTED * trial.allocated or trial.allocated <= trial.resident:
        return None
    most = size * (trial.peak - trial.resident) // (trial.allocated - trial.resident)
    return (
        f"{format_bytes(trial.peak - trial.allocated)} of {format_bytes(trial.peak)} at {size:,} "
        f"are fragments. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may fit up to {most:,}, "
        "an estimate from the bytes in use."
    )


def _uneven(report: TuningReport) -> str | None:
    look = report.look
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


def _crowded(report: TuningReport, run: RunDetails) -> str | None:
    device = report.device
    if device.foreign <= _CROWDED * device.total or _reached_bound(report, run):
        return None
    return (
        f"Other processes hold {format_bytes(device.foreign)} of this device's "
        f"{format_bytes(device.total)}; the largest fit changes when they start or stop."
    )


def _reached_bound(report: TuningReport, run: RunDetails) -> bool:
    return run.bound is not None and (report.largest_fit or 0) >= run.bound.batch_size


def _unreached(report: TuningReport, run: RunDetails) -> str | None:
    if not run.unreached:
        return None
    fitting = {trial.batch_size for trial in latest_by_size(report.trials) if trial.fits}
    parts = []
    if in_trials := sorted(fitting.intersection(run.unreached)):
        parts.append(f"micro-batches of {_listed(in_trials)} were timed in their trials only")
    if never := sorted(set(run.unreached) - fitting):
        parts.append(f"micro-batches of {_listed(never)} were left out")
    is_default = report.settings.timing_seconds is None
    is_share = is_default and run.curve_seconds < _settings.TIMING_SECONDS
    is_decided = report.settings.prefer == "largest" and report.settings.target_batch_size is None
    most = "the time of the search" if is_decided else "a tenth of the planned training"
    share = f", {most}," if is_share else ""
    limit = f"{run.curve_seconds:.3g} seconds{share}"
    return f"{limit} were too few to time all sizes: {', '.join(parts)}."


def _listed(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _not_sought(report: TuningReport, run: RunDetails) -> str | None:
    if run.bound is None or not _reached_bound(report, run) or _all_at_once(report, run):
        return None
    return f"Largest fit not sought: {run.bound.reason}."


def _refused(report: TuningReport, run: RunDetails) -> str | None:
    refused = _refusals(report)
    if not refused or run.last_samples in refused:
        return None
    texts = [trial.error or "unknown error" for trial in refused.values()]
    first_of_class = {text.partition(":")[0]: text for text in reversed(texts)}
    errors = (
        shorten(text, _MOST_OF_ERROR, placeholder=" …")
        for text in reversed(first_of_class.values())
    )
    return (
        f"The workload itself raised an error at batch_size={_listed(list(refused))}, so only "
        f"sizes that ran are used ({'; '.join(errors)})."
    )


def _scattered(report: TuningReport) -> str | None:
    size = report.plan.micro_batch_size
    row = next((row for row in report.sizes if row.batch_size == size), None)
    if row is None or row.samples_per_second_low is None or row.samples_per_second_high is None:
        return None
    low, high = row.samples_per_second_low, row.samples_per_second_high
    if (high - low) / 2 <= _SCATTERED * row.samples_per_second:
        return None
    return (
        f"Single updates of {row.batch_size:,} ran at {low:,.0f} to {high:,.0f} samples/s; "
        "on a quieter machine another size may be the fastest."
    )


def _drifted(report: TuningReport) -> str | None:
    drifts = [_significant_drift(point) for point in report.curve if point.drift is not None]
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


def _fallback(report: TuningReport) -> str | None:
    source = report.device.source
    return f"Memory is read from {source}." if " because " in source else None


def waiting(loading: Loading | None) -> str | None:
    """Note training that waited for data."""
    if loading is None or loading.share <= _WAITING:
        return None
    if loading.wait_seconds + loading.step_seconds < _LEAST_MEASURED:
        return None
    share = percent(loading.share)
    return f"Data loading took {share} of the time: raise num_workers before the batch size."


def survived(events: Sequence[Survived], plan: BatchPlan) -> str | None:
    """Note training that ran out of memory, with a plan of the same batch that would have fitted."""
    if not events:
        return None
    size = min(event.piece_size for event in events)
    micro_batches = plan.micro_batch_size * plan.accumulate_grad_batches
    fitting = max((each for each in range(1, size + 1) if micro_batches % each == 0), default=1)
    times = "once" if len(events) == 1 else f"{len(events):,} times"
    lost = duration(sum(event.lost_seconds for event in events))
    return (
        f"Training ran out of memory {times} and went on in pieces, which took {lost}. "
        f"Micro-batches of {fitting:,} × {micro_batches // fitting:,} would have fitted."
    )
