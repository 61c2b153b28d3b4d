"""What AutoBatch can not tune is refused here, before anything is touched."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch.errors import AutobatchError
from autobatch.lightning._steps import package_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._plan import BatchPlan

__all__ = ["check"]


def check(trainer: Any, module: Any, resumed: BatchPlan | None) -> None:
    """Raise `AutobatchError` with one sentence where this Trainer or module is more than AutoBatch handles.

    `resumed` is the plan that came with the checkpoint, where there is one.
    """
    for problem in _problems(trainer, module, resumed):
        raise AutobatchError(
            f"AutoBatch does not tune this run yet: {problem}; train it without AutoBatch."
        )


def _problems(trainer: Any, module: Any, resumed: BatchPlan | None) -> Iterator[str]:
    package = package_of(trainer)
    strategies = importlib.import_module(f"{package}.strategies")
    callbacks = importlib.import_module(f"{package}.callbacks")
    if trainer.strategy.handles_gradient_accumulation:
        yield (
            f"its strategy, {type(trainer.strategy).__name__}, accumulates by a number of its own that a plan can not "
            "change (with another strategy the plan sets the accumulation)"
        )
    if trainer.world_size > 1 or not isinstance(
        trainer.strategy, strategies.SingleDeviceStrategy
    ):
        yield f"it trains on {trainer.world_size} device(s) with {type(trainer.strategy).__name__}, not on a single one"
    if module.automatic_optimization and len(trainer.optimizers) != 1:
        yield f"it has {len(trainer.optimizers)} optimizers, not one"
    if any(
        isinstance(callback, callbacks.GradientAccumulationScheduler)
        for callback in trainer.callbacks
    ):
        yield (
            "a GradientAccumulationScheduler sets the accumulation (without it, target_batch_size names the batch "
            "that the plan accumulates to)"
        )
    if any(
        isinstance(callback, callbacks.BatchSizeFinder)
        for callback in trainer.callbacks
    ):
        yield "a BatchSizeFinder looks for the batch size as well"
    validation = trainer.fit_loop.epoch_loop.val_loop._data_source.instance
    if isinstance(validation, DataLoader) and validation is (
        trainer.fit_loop._data_source.instance
    ):
        yield "one loader serves training and validation"
    if isinstance(trainer.val_check_interval, int):
        yield f"val_check_interval={trainer.val_check_interval} counts micro-batches"
    if trainer.overfit_batches:
        yield f"overfit_batches={trainer.overfit_batches} replaces the training loader"
    if trainer.ckpt_path is not None and resumed is None:
        yield f"it resumes from {trainer.ckpt_path}, which holds no plan of AutoBatch"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the iterator of the loader"
