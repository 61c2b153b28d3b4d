"""Learning-rate schedules that count updates, and what they cover with another batch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from autobatch._cautions import stretched_schedule

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan

__all__ = ["schedules"]


def schedules(
    trainer: Any, before: BatchPlan, plan: BatchPlan, *, is_named: bool
) -> tuple[str, ...]:
    """What schedules that step with every update cover with a plan, where that is not what they covered.

    A schedule that took its length from `estimated_stepping_batches` has made Lightning 2.6 set the training loader
    up before `fit` starts, which is how it is told: with the plan it is made anew, and covers the same data. One that
    may have computed its length from the batch size, where that is named, is told without a number.
    """
    if trainer.fit_loop._combined_loader is not None:
        return ()
    if not trainer.lightning_module.automatic_optimization:
        return ()
    told = (
        stretched_schedule(
            type(config.scheduler).__name__,
            None if is_named else _updates(config),
            before,
            plan,
        )
        for config in trainer.lr_scheduler_configs
        if config.interval == "step"
    )
    return tuple(dict.fromkeys(note for note in told if note))


def _updates(config: Any) -> int | None:
    length = _length(config.scheduler)
    return None if length is None else length * config.frequency


def _length(scheduler: Any) -> int | None:
    """Steps after which a scheduler is through; None where it never is, or does not say."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = _length(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        return max(scheduler.milestones, default=None)
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        # As the schedules of Hugging Face's transformers are made
        made = [each for each in scheduler.lr_lambdas if isinstance(each, partial)]
        known = [each.keywords.get("num_training_steps") for each in made]
        return next((each for each in known if isinstance(each, int)), None)
    for name in ("total_steps", "T_max", "total_iters"):
        length = getattr(scheduler, name, None)
        if isinstance(length, int):
            return length
    return None
