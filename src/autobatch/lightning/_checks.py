"""What AutoBatch can not tune is refused here, before anything is touched."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from autobatch.errors import AutobatchError
from autobatch.lightning._steps import package_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check"]


def check(trainer: Any, module: Any) -> None:
    """Raise `AutobatchError` with one sentence where this Trainer or module is more than AutoBatch handles."""
    for problem in _problems(trainer, module):
        raise AutobatchError(
            f"AutoBatch does not tune this run yet: {problem}; train it without AutoBatch."
        )


def _problems(trainer: Any, module: Any) -> Iterator[str]:
    package = package_of(trainer)
    strategies = importlib.import_module(f"{package}.strategies")
    callbacks = importlib.import_module(f"{package}.callbacks")
    if trainer.world_size > 1 or not isinstance(
        trainer.strategy, strategies.SingleDeviceStrategy
    ):
        yield f"it trains on {trainer.world_size} device(s) with {type(trainer.strategy).__name__}, not on a single one"
    if not module.automatic_optimization:
        yield "the module optimises by hand (automatic_optimization=False)"
    if len(trainer.optimizers) != 1:
        yield f"it has {len(trainer.optimizers)} optimizers, not one"
    if any(
        isinstance(callback, callbacks.GradientAccumulationScheduler)
        for callback in trainer.callbacks
    ):
        yield "a GradientAccumulationScheduler sets the accumulation"
    if trainer.overfit_batches:
        yield f"overfit_batches={trainer.overfit_batches} replaces the training loader"
    if trainer.ckpt_path is not None:
        yield f"it resumes from the checkpoint {trainer.ckpt_path}"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the iterator of the loader"
