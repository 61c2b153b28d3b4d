"""What a person should be told about this plan, each with its trigger."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from autobatch._cautions import share, usual_learning_rate
from autobatch._memory import format_bytes
from autobatch._throughput import settled
from autobatch._tradeoff import updates_per_epoch
from autobatch._trial import Outcome

if TYPE_CHECKING:
    from autobatch._curve import CurvePoint
    from autobatch._findings import Findings
    from autobatch._loading import Loading
    from autobatch._plan import BatchPlan

__all__ = ["notes", "waiting"]

_MUCH: Final = (
    0.1  # share of a device's memory held by others that a person should hear of
)
_TIGHT: Final = (
    0.05  # share of what others leave of a device below which little more fits
)
_SPREAD: Final = 0.05  # speeds no further apart are alike: timings tell no more
_WILD: Final = (
    0.3  # of its median, that a speed reaches up and down: others of it are noise
)
_WAITING: Final = (
    0.1  # share of the time beyond which more workers help more than a larger batch
)
_TELLING: Final = 0.5  # seconds that have to be measured: less is a busy moment


def notes(found: Findings) -> tuple[str, ...]:
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


def _deviation(found: Findings) -> str | None:
    asked, got = found.target_batch_size, found.plan.effective_batch_size
    if asked is None or asked == got:
        return None
    return f"Asked for {asked:,} samples per update, got {got:,}: {_why_not_exact(found, asked)}."


def _why_not_exact(found: Findings, asked: int) -> str:
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


def _changed(found: Findings) -> str | None:
    before, plan, samples = found.before, found.plan, found.dataset_size
    if before is None:
        return None
    then, now = before.effective_batch_size, plan.effective_batch_size
    # All of an epoch, then as now, is no change either
    if then == now or (samples is not None and min(then, now) >= samples):
        return _overridden(before, plan)
    told = [
        f"The effective batch goes from {then:,} to {now:,}{_updates(found, before)}."
    ]
    if found.learning_rate is not None:
        most = max(then, now) if samples is None else samples
        batches = min(now, most) / min(then, most)
        told.append(usual_learning_rate(found.learning_rate, batches))
    if (gives_way := _overridden(before, plan)) is not None:
        told.append(gives_way)
    return " ".join(told)


def _updates(found: Findings, before: BatchPlan) -> str:
    if found.dataset_size is None:
        return ""
    now, then = (
        updates_per_epoch(each, found.dataset_size) for each in (found.plan, before)
    )
    return f": {now:,} update{'s' if now > 1 else ''} per epoch instead of {then:,}"


def _overridden(before: BatchPlan, plan: BatchPlan) -> str | None:
    if before.accumulate_grad_batches in (1, plan.accumulate_grad_batches):
        return None
    return (
        f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer gives "
        f"way to {plan.accumulate_grad_batches}, for the target."
    )


def _short_epoch(found: Findings) -> str | None:
    samples, update = found.dataset_size, found.plan.effective_batch_size
    if samples is None or samples >= update:
        return None
    return (
        f"An epoch of {samples:,} samples is less than one update of {update:,}: every epoch makes one update, "
        "of what there is."
    )


def _all_at_once(found: Findings) -> str | None:
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


def _past_knee(found: Findings) -> str | None:
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


def _tight(found: Findings) -> str | None:
    """Where the plan takes nearly all that there is: a budget below that leaves room by itself."""
    size = found.plan.micro_batch_size
    peaks = [t.peak for t in settled(found.trials) if t.batch_size == size and t.fits]
    room = found.total - found.foreign
    if not peaks or peaks[0] is None or peaks[0] < (1 - _TIGHT) * room:
        return None
    return (
        f"Only {format_bytes(max(0, room - peaks[0]))} of {format_bytes(found.total)} to spare: longer inputs, or "
        "others on this device, may not fit. A lower memory_limit leaves more."
    )


def _unreached(found: Findings) -> str | None:
    """Where the time of the curve ran out, and which sizes that leaves with less than the others, or with nothing."""
    if not found.unreached:
        return None
    tried = {trial.batch_size for trial in settled(found.trials) if trial.fits}
    by_trial, not_run = (
        [size for size in sorted(found.unreached) if (size in tried) is known]
        for known in (True, False)
    )
    told = []
    if by_trial:
        told.append(
            f"micro-batches of {_listed(by_trial)} were timed in their trial alone"
        )
    if not_run:
        told.append(f"micro-batches of {_listed(not_run)} were left out")
    return f"{found.curve_seconds:g} seconds were too few to time all sizes: {', '.join(told)}."


def _listed(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _scattered(found: Findings) -> str | None:
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


def _drifted(found: Findings) -> str | None:
    drifts = [_clear_drift(point) for point in found.curve if point.drift is not None]
    drift = statistics.median(drifts) if drifts else 0.0
    if drift <= _SPREAD:
        return None
    return f"Timings drifted by {share(drift)} while sizes were timed; something else may use this device."


def _clear_drift(point: CurvePoint) -> float:
    """How far two visits to a size are apart; nothing, where chance may have done it."""
    off = abs((point.drift or 1.0) - 1)
    return off if off > (point.drift_error or 0.0) else 0.0


def _out_of_time(found: Findings) -> str | None:
    if found.time_limit is None:
        return None
    if found.latency_limit is not None:
        return f"The search stopped at time_limit={found.time_limit:g} seconds: larger sizes may answer in time too."
    return (
        f"The search stopped at time_limit={found.time_limit:g} seconds: "
        f"{found.largest_fit:,} is the largest verified so far, more may fit."
    )


def _not_sought(found: Findings) -> str | None:
    if found.bound is None or found.largest_fit < found.bound.batch_size:
        return None
    if _all_at_once(found):
        return None  # that says it
    return f"Largest fit not sought: {found.bound.reason}."


def _refused(found: Findings) -> str | None:
    sizes = _refused_sizes(found)
    if not sizes or found.last_samples in sizes:
        return None
    return f"The workload itself refused batch_size={max(sizes)}; its own error, not memory, bounds it from below."


def _fails_at_end(found: Findings) -> str | None:
    """Where an epoch ends with a micro-batch that is known to be refused, and no plan avoids it."""
    left = found.last_samples
    if left not in _refused_sizes(found):
        return None
    return (
        f"Training will fail at the end of an epoch: its last micro-batch has {left} sample{'s' if left != 1 else ''}, "
        "which the workload itself refused. Leave it out, with drop_last=True of the loader."
    )


def _refused_sizes(found: Findings) -> list[int]:
    return [
        trial.batch_size
        for trial in settled(found.trials)
        if trial.outcome is Outcome.REFUSED
    ]


def _uneven(found: Findings) -> str | None:
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


def _crowded(found: Findings) -> str | None:
    bound = found.bound
    if found.foreign <= _MUCH * found.total:
        return None
    if bound is not None and found.largest_fit >= bound.batch_size:
        return None  # it was not memory that kept the search from going higher
    return (
        f"Others hold {format_bytes(found.foreign)} of this device's {format_bytes(found.total)}; "
        "what fits changes when they come or go."
    )


def _fallback(found: Findings) -> str | None:
    return (
        f"Memory is read from {found.source}." if " because " in found.source else None
    )


def waiting(loading: Loading | None) -> str | None:
    """Where training waited for data, for long enough that it is not chance."""
    if loading is None or loading.share <= _WAITING:
        return None
    if loading.wait_seconds + loading.step_seconds < _TELLING:
        return None
    return f"Data loading took {share(loading.share)} of the time: more workers before more batch."
