"""What accumulation, and another batch than before, do besides: to layers, losses, learning rates and schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from autobatch._equivalence import BatchNorms, Splitting
    from autobatch._learning_rate import LearningRateRule
    from autobatch._plan import BatchPlan

__all__ = [
    "accumulation_costs",
    "batch_norm",
    "by_hand",
    "ignores_accumulate",
    "last_window",
    "never_stepped",
    "not_additive",
    "not_tested",
    "repeated_closures",
    "share",
    "stretched_schedule",
    "usual_learning_rate",
]

_STEADY: Final = 16  # samples below which statistics of a batch are unsteady
_WORTH: Final = (
    2  # times the best accumulation: less is within what an estimate can tell
)


def batch_norm(norms: BatchNorms, plan: BatchPlan) -> tuple[str, ...]:
    """What layers that normalise by the batch see of an update that is accumulated."""
    if plan.accumulate_grad_batches == 1:
        return ()
    of_ranks = plan.micro_batch_size * plan.world_size
    counted = (
        (norms.alone, "BatchNorm", plan.micro_batch_size),
        (norms.together, "SyncBatchNorm", of_ranks),
    )
    return tuple(
        _statistics(layers, kind, seen, plan)
        for layers, kind, seen in counted
        if layers
    )


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


def accumulation_costs(
    plan: BatchPlan, best: float, optimizer_share: float
) -> str | None:
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
