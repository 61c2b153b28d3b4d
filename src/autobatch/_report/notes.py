"""Notes of a report, each with its trigger."""

from __future__ import annotations

import statistics
from textwrap import shorten
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes, parse_memory_limit
from autobatch._plan import ceil_div
from autobatch._report.latency import latency_notes
from autobatch._report.tradeoff import updates_per_epoch
from autobatch._report.units import counted, duration, factor, listed, percent
from autobatch._throughput import row_of
from autobatch._trials import Outcome, latest_by_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        *_on_plan(report, run),
        *_on_updates(report, run),
        *(latency_notes(report, run.unfinished) if run.unfinished else ()),
        run.prior_note,
        *run.subject_notes.plan,
        *_on_speed(report),
        *_on_memory(report, run),
        *_on_search(report, run),
        *_on_measurements(report),
    )
    return tuple(note for note in found if note)


def _on_plan(report: TuningReport, run: RunDetails) -> Iterator[str]:
    """Note what keeps the plan from being the one that was asked for."""
    limit, target = report.settings.time_limit, report.settings.target_batch_size
    got = report.plan.effective_batch_size
    if report.as_if:
        yield (
            f"Not run on {report.devices} devices: one process stood for all, with collectives "
            "that communicate nothing. Memory that the communication library takes, such as the "
            "buffers of NCCL, is not counted, and speed was not measured."
        )
    if run.last_samples is not None and run.last_samples in _refusals(report):
        yield (
            "Training will fail at the end of an epoch: its last micro-batch has "
            f"{counted(run.last_samples, 'sample')}, which the workload itself refused. "
            "Leave it out with drop_last=True of the loader."
        )
    yield from run.subject_notes.trials
    if target is not None and target != got:
        reason = _reason_for_deviation(report, run, target)
        yield f"Asked for {target:,} samples per update, got {got:,}: {reason}."
    if limit is not None and run.is_out_of_time:
        rest = f"{report.largest_fit or 0:,} is the largest verified so far, more may fit"
        if report.settings.latency_limit is not None:
            rest = "larger sizes may answer in time too"
        yield f"The search stopped at time_limit={limit:g} seconds: {rest}."


def _refusals(report: TuningReport) -> dict[int, Trial]:
    """Return the latest trial of each size for which the workload raised an error of its own."""
    latest = latest_by_size(report.trials)
    return {size: each for size, each in latest.items() if each.outcome is Outcome.REFUSED}


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


def _on_updates(report: TuningReport, run: RunDetails) -> Iterator[str]:
    """Note updates of another number, or of all samples of an epoch."""
    samples, update = report.dataset_size, report.plan.effective_batch_size
    changed = _changed(report, run.before)
    if changed is not None:
        yield changed
    if samples is not None and samples < update:
        yield (
            f"The epoch ({samples:,} samples) is smaller than the effective batch ({update:,}): "
            "each epoch performs one smaller update."
        )
    if _is_at_once(report):
        # A note on the changed effective batch size has the number of updates already
        updates = ": it performs one update" if changed is None else ""
        yield (
            f"All {samples:,} samples of an epoch fit at once{updates}. "
            "Set target_batch_size for smaller batches and more updates."
        )


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
        if (rule := report.learning_rate) is not None:
            most = max(old, new) if samples is None else samples
            change = factor(rule.factor(min(new, most) / min(old, most)))
            sentences.append(
                f"{rule.optimizer} usually wants about {change} the learning rate for that "
                f"({rule.rule} rule)."
            )
    if before.accumulate_grad_batches not in (1, plan.accumulate_grad_batches):
        has_target = report.settings.target_batch_size is not None
        sentences.append(
            f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer is "
            f"overridden with {plan.accumulate_grad_batches}"
            f"{' to reach target_batch_size' if has_target else ''}."
        )
    return " ".join(sentences) or None


def _is_at_once(report: TuningReport) -> bool:
    """Return True if an update trains on all samples of an epoch, and nobody asked for that."""
    is_free = report.task == "train" and report.settings.target_batch_size is None
    plan, samples = report.plan, report.dataset_size
    return is_free and plan.effective_batch_size == samples and plan.accumulate_grad_batches == 1


def _on_speed(report: TuningReport) -> Iterator[str]:
    """Note smaller sizes that are as fast as the largest, which was taken."""
    settings, size = report.settings, report.plan.micro_batch_size
    if settings.latency_limit is not None or settings.target_batch_size is not None:
        return
    if settings.prefer == "fast":
        return  # a smaller one as fast would have been taken, unless this is the user's own
    speeds = {row.batch_size: row.samples_per_second for row in report.sizes}
    smaller = [other for other in speeds if other < size]
    if size not in speeds or not smaller:
        return
    fastest = max(smaller, key=speeds.__getitem__)
    slower = 1 - speeds[size] / speeds[fastest]
    least = (1 - _SAME_SPEED) * speeds[size]
    as_fast = [other for other in smaller if 2 * other <= size and speeds[other] >= least]
    if slower > _SAME_SPEED:
        yield f"{size:,} fits, and is {percent(slower)} slower than {fastest:,}."
    elif as_fast:
        gain = ", which gives more updates of the same samples" if report.task == "train" else ""
        yield f"{size:,} fits, and is about as fast as {min(as_fast):,}{gain}."


def _on_memory(report: TuningReport, run: RunDetails) -> Iterator[str]:
    """Note memory that may not suffice later, and what could leave more."""
    device, look = report.device, report.look
    limit = parse_memory_limit(report.settings.memory_limit)
    if limit > device.total:
        yield (
            f"memory_limit={report.settings.memory_limit!r} is more than the "
            f"{format_bytes(device.total)} of this device: the budget is "
            f"{format_bytes(report.budget)}."
        )
    trial = latest_by_size(report.trials).get(report.plan.micro_batch_size)
    available = device.total - device.foreign
    peak = trial.peak if trial and trial.fits else None
    if peak is not None and peak >= (1 - _TIGHT) * available:
        yield (
            f"Only {format_bytes(max(0, available - peak))} of {format_bytes(device.total)} to "
            "spare: longer inputs, or other processes on this device, may not fit. "
            "A lower memory_limit leaves more."
        )
    if not _reached_bound(report, run):
        yield from _fragments(report)
    if look is not None and not look.is_even:
        among = "" if look.among is None else f" of {look.among:,}"
        read = f"the {look.read:,}{among} that were read"
        larger = "; a larger sample needs more memory: create it in worst_case"
        if look.read == look.among:
            read, larger = f"all {look.read:,}", ""
        yield (
            f"Samples differ in size. Trials ran the largest of {read}, and times are for these"
            f"{larger}."
        )
    if device.foreign > _CROWDED * device.total and not _reached_bound(report, run):
        yield (
            f"Other processes hold {format_bytes(device.foreign)} of this device's "
            f"{format_bytes(device.total)}; the largest fit changes when they start or stop."
        )


def _fragments(report: TuningReport) -> Iterator[str]:
    size = report.largest_fit or 0
    trial = latest_by_size(report.trials).get(size)
    if trial is None or trial.peak is None or not trial.allocated:
        return
    if trial.peak < _FRAGMENTED * trial.allocated or trial.allocated <= trial.resident:
        return
    most = size * (trial.peak - trial.resident) // (trial.allocated - trial.resident)
    yield (
        f"{format_bytes(trial.peak - trial.allocated)} of {format_bytes(trial.peak)} at {size:,} "
        f"are fragments. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may fit up to {most:,}, "
        "an estimate from the bytes in use."
    )


def _reached_bound(report: TuningReport, run: RunDetails) -> bool:
    return run.bound is not None and (report.largest_fit or 0) >= run.bound.batch_size


def _on_search(report: TuningReport, run: RunDetails) -> Iterator[str]:
    """Note sizes that were not timed, not sought, or refused by the workload."""
    if run.unreached:
        yield _unreached(report, run)
    if run.bound is not None and _reached_bound(report, run) and not _is_at_once(report):
        yield f"Largest fit not sought: {run.bound.reason}."
    refused = _refusals(report)
    if refused and run.last_samples not in refused:
        texts = [trial.error or "unknown error" for trial in refused.values()]
        first_of_class = {text.partition(":")[0]: text for text in reversed(texts)}
        errors = (
            shorten(text, _MOST_OF_ERROR, placeholder=" …")
            for text in reversed(first_of_class.values())
        )
        yield (
            f"The workload itself raised an error at batch_size={listed(list(refused))}, so only "
            f"sizes that ran are used ({'; '.join(errors)})."
        )


def _unreached(report: TuningReport, run: RunDetails) -> str:
    limit, settings = run.timing_limit, report.settings
    share = f", {limit.share}," if limit.share else ""
    short = f"{duration(limit.seconds)}{share} did not suffice"
    if not report.curve:
        own, size = run.before, report.plan.micro_batch_size
        is_free = settings.target_batch_size is None and settings.prefer == "fast"
        is_kept = is_free and own is not None and own.micro_batch_size == size
        kept = f", so your own batch size of {size:,} is kept" if is_kept else ""
        return f"No size was timed: {short}{kept}. timing_seconds sets another limit."
    fitting = {size for size, trial in latest_by_size(report.trials).items() if trial.fits}
    parts = []
    if in_trials := sorted(fitting.intersection(run.unreached)):
        parts.append(f"micro-batches of {listed(in_trials)} were timed in their trials only")
    if never := sorted(set(run.unreached) - fitting):
        parts.append(f"micro-batches of {listed(never)} were left out")
    return f"{short} to time all sizes: {', '.join(parts)}."


def _on_measurements(report: TuningReport) -> Iterator[str]:
    """Note measurements that are less accurate than usual."""
    size, source = report.plan.micro_batch_size, report.device.source
    row = row_of(report.sizes, size)
    if row and row.samples_per_second_low is not None and row.samples_per_second_high is not None:
        low, high = row.samples_per_second_low, row.samples_per_second_high
        if (high - low) / 2 > _SCATTERED * row.samples_per_second:
            yield (
                f"Single updates of {size:,} ran at {low:,.0f} to {high:,.0f} samples/s; "
                "on a quieter machine another size may be the fastest."
            )
    drifts = [_significant_drift(point) for point in report.curve if point.drift is not None]
    drift = statistics.median(drifts) if drifts else 0.0
    if drift > _SAME_SPEED:
        yield (
            f"Timings drifted by {percent(drift)} while sizes were timed; other processes may use "
            "this device."
        )
    if " because " in source:
        yield f"Memory is read from {source}."


def _significant_drift(point: CurvePoint) -> float:
    """Return the relative drift of one size, or 0 within its error."""
    drift = abs((point.drift or 1.0) - 1)
    return drift if drift > (point.drift_error or 0.0) else 0.0


def waiting(loading: Loading | None) -> str | None:
    """Note training that waited for data."""
    if loading is None or loading.share <= _WAITING:
        return None
    if loading.wait_seconds + loading.step_seconds < _LEAST_MEASURED:
        return None
    share = percent(loading.share)
    return f"Data loading took {share} of the time: raise num_workers before the batch size."


def survived(events: Sequence[Survived], plan: BatchPlan) -> str | None:
    """Note training that ran out of memory, and a plan of the same batch that would have fitted."""
    if not events:
        return None
    size = min(event.piece_size for event in events)
    micro_batches = plan.micro_batch_size * plan.accumulate_grad_batches
    fitting = max((each for each in range(1, size + 1) if micro_batches % each == 0), default=1)
    times = "once" if len(events) == 1 else f"{len(events):,} times"
    lost = duration(sum(event.lost_seconds for event in events))
    return (
        f"Training ran out of memory {times} and went on in pieces, which took {lost}. "
        f"{micro_batches // fitting:,} micro-batches of {fitting:,} would have fitted."
    )
