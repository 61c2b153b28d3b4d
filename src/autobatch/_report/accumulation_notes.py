"""Notes on side effects of accumulation, and on optimizer steps in trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._report.units import counted, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._accumulation import BatchNorms, Splitting
    from autobatch._plan import BatchPlan

_STEADY_BATCH: Final = 16  # samples; statistics of smaller batches are noisy
_MOST_NAMES: Final = 5  # in a note
_FAR_ABOVE_BEST: Final = 2  # times the best accumulation: the accuracy of its estimate


def batch_norm(norms: BatchNorms, plan: BatchPlan) -> tuple[str, ...]:
    """Note layers that normalize over a micro-batch instead of the effective batch."""
    if plan.accumulate_grad_batches == 1:
        return ()
    samples = plan.micro_batch_size
    kinds = (
        (norms.alone, "BatchNorm", samples),
        (norms.together, "SyncBatchNorm", samples * plan.world_size),
    )
    return tuple(_statistics(*each, plan) for each in kinds if each[0])


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


def accumulation_costs(plan: BatchPlan, best: float, optimizer_share: float) -> str | None:
    """Note a plan that accumulates far more than is estimated to be best.

    `optimizer_share` is the share of the optimizer in an update of one micro-batch.
    """
    best = max(1.0, best)  # below 1, accumulation costs time
    if plan.accumulate_grad_batches <= _FAR_ABOVE_BEST * best:
        return None
    return (
        f"Accumulating more than ×{best:.0f} would likely cost time: it only saves optimizer "
        f"steps, {percent(optimizer_share)} of an update without accumulation."
    )


# Optimizer steps in trials


def stays_changed(names: Sequence[str]) -> str:
    """Note variables of a loop that trials changed and that are not restored."""
    shown, more = ", ".join(names[:_MOST_NAMES]), len(names) - _MOST_NAMES
    return (
        f"Trials changed {shown}{f' and {more:,} more' if more > 0 else ''}, and find() cannot "
        "restore that: set it back before training if the loop reads it."
    )


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
        "The loop stepped its optimizer after every backward pass in spite of `accumulate`: if "
        f"each is one micro-batch, an update has {whole // times:,} samples instead of {whole:,}, "
        f"and an epoch {times:,} times as many updates. Step after `accumulate` backward passes."
    )
