"""What a person should be told about this plan, each with its trigger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch._memory import format_bytes
from autobatch._tradeoff import settled, updates_per_epoch
from autobatch._trial import Outcome

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan
    from autobatch._trial import Trial

__all__ = [
    "Bound",
    "Findings",
    "Look",
    "by_hand",
    "last_window",
    "notes",
    "repeated_closures",
    "tightest_bound",
]

_MUCH = 0.1  # share of a device's memory held by others that a person should hear of


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
class Findings:
    """What a tuning run found, as far as a note could be about it.

    Args:
        plan: What was chosen.
        trials: All trials, in the order they were run.
        target_batch_size: The effective batch that was asked for, if one was.
        bound: What kept the search from going higher, if anything did.
        time_limit: Seconds, if the search was stopped because of them; otherwise None.
        source: Where memory is read; a fallback gives its reason, "… because …".
        total: What the device has, in bytes.
        foreign: What others hold of it, in bytes.
        before: What was trained with until now, where that is known.
        dataset_size: Samples per epoch, where that is known.
        remarks: Sentences from where the tuning was asked for.
        look: How far was looked for the largest samples, where that was done.
    """

    plan: BatchPlan
    trials: tuple[Trial, ...]
    target_batch_size: int | None
    bound: Bound | None
    time_limit: float | None
    source: str
    total: int
    foreign: int
    before: BatchPlan | None
    dataset_size: int | None
    remarks: tuple[str, ...]
    look: Look | None

    @property
    def largest_fit(self) -> int:
        """The largest micro-batch that was run and fits."""
        return max(
            (trial.batch_size for trial in settled(self.trials) if trial.fits),
            default=0,
        )


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
        bounds.append(Bound(share, f"{what} needs no more than {share} at once"))
    if max_micro_batch_size is not None:
        what = f"max_micro_batch_size={max_micro_batch_size}"
        bounds.append(Bound(max_micro_batch_size, f"{what} allows no more"))
    if dataset_size is not None:
        share = dataset_size // world_size
        what = f"{dataset_size:,} samples{_on(world_size)}"
        bounds.append(Bound(share, f"an epoch of {what} has no more"))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)


def notes(found: Findings) -> tuple[str, ...]:
    """All that a person should be told, what matters most first."""
    told = (
        _deviation(found),
        _changed(found),
        _overridden(found),
        _short_epoch(found),
        *found.remarks,
        _out_of_time(found),
        _not_sought(found),
        _refused(found),
        _uneven(found),
        _crowded(found),
        _fallback(found),
    )
    return tuple(note for note in told if note)


def _deviation(found: Findings) -> str | None:
    asked, got = found.target_batch_size, found.plan.effective_batch_size
    if asked is None or asked == got:
        return None
    return f"Asked for {asked} samples per update, got {got}: {_why_not_exact(found, asked)}."


def _why_not_exact(found: Findings, asked: int) -> str:
    got, samples = found.plan.effective_batch_size, found.dataset_size
    if samples is not None and got <= samples < asked:
        return f"an epoch has no more than {samples:,} samples"
    share, rest = divmod(asked, found.plan.world_size)
    if rest:
        return f"{asked} does not divide by {found.plan.world_size} ranks"
    largest = max(1, min(found.largest_fit, share))
    micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share // micro > 2 * -(-share // largest):
        return (
            f"exact would take {share // micro} micro-batches of {micro} instead of "
            f"{found.plan.accumulate_grad_batches} of {found.plan.micro_batch_size}"
        )
    return "no plan that gives it exactly was verified"


def _changed(found: Findings) -> str | None:
    before, plan = found.before, found.plan
    if before is None or before.effective_batch_size == plan.effective_batch_size:
        return None
    change = (
        f"The effective batch goes from {before.effective_batch_size} to "
        f"{plan.effective_batch_size}"
    )
    if found.dataset_size is None:
        return f"{change}."
    samples = found.dataset_size
    if min(before.effective_batch_size, plan.effective_batch_size) >= samples:
        return None  # all of an epoch, then as now
    now, then = updates_per_epoch(plan, samples), updates_per_epoch(before, samples)
    return f"{change}: {now:,} update{'s' if now > 1 else ''} per epoch instead of {then:,}."


def _overridden(found: Findings) -> str | None:
    before = found.before
    if before is None or before.accumulate_grad_batches in (
        1,
        found.plan.accumulate_grad_batches,
    ):
        return None
    return (
        f"accumulate_grad_batches={before.accumulate_grad_batches} of the Trainer gives "
        f"way to {found.plan.accumulate_grad_batches}, for the target."
    )


def _short_epoch(found: Findings) -> str | None:
    samples, update = found.dataset_size, found.plan.effective_batch_size
    if samples is None or samples >= update:
        return None
    return (
        f"An epoch of {samples:,} samples is less than one update of {update:,}: every epoch makes one update, "
        "of what there is."
    )


def _out_of_time(found: Findings) -> str | None:
    if found.time_limit is None:
        return None
    return (
        f"The search stopped at time_limit={found.time_limit:g} seconds: "
        f"{found.largest_fit} is the largest verified so far, more may fit."
    )


def _not_sought(found: Findings) -> str | None:
    if found.bound is None or found.largest_fit < found.bound.batch_size:
        return None
    return f"Largest fit not sought: {found.bound.reason}."


def _refused(found: Findings) -> str | None:
    sizes = [
        trial.batch_size
        for trial in settled(found.trials)
        if trial.outcome is Outcome.REFUSED
    ]
    if not sizes:
        return None
    return f"The workload itself refused batch_size={max(sizes)}; its own error, not memory, bounds it from below."


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
    if found.foreign <= _MUCH * found.total:
        return None
    return (
        f"Others hold {format_bytes(found.foreign)} of this device's {format_bytes(found.total)}; "
        "what fits changes when they come or go."
    )


def _fallback(found: Findings) -> str | None:
    return (
        f"Memory is read from {found.source}." if " because " in found.source else None
    )


# What a door alone knows


def by_hand(plan: BatchPlan) -> str | None:
    """What is left to a module that optimises by hand."""
    if plan.accumulate_grad_batches == 1:
        return None
    return (
        f"This module optimises by hand: to reach {plan.effective_batch_size} samples per update its training_step "
        f"has to step every {plan.accumulate_grad_batches} micro-batches. It was tried as it steps now."
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
        made = f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"
        told.append(
            f"The last update of an epoch is made of {made} instead of {whole}, and Lightning still divides by "
            f"{whole}: its gradient is {100 * micro_batches / whole:.3g} % of what it should be"
        )
    if samples < size and micro_batches > 1:
        told.append(
            f"The last micro-batch of an epoch has {samples} of {size} samples, and Lightning counts it as a full one: "
            f"its samples weigh {size / samples:.3g} times as much as others"
        )
    return f"{'. '.join(told)}; repair_last_window=True corrects it." if told else None


def _on(world_size: int) -> str:
    return f" on {world_size} ranks" if world_size > 1 else ""
