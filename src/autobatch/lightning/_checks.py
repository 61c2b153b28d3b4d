"""Refuse runs that cannot be tuned, before anything is touched."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch.errors import AutobatchError
from autobatch.lightning._compat import TESTED, missing_name, package_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._settings import Settings
    from autobatch.lightning._resume import Checkpoint


def check_lightning(trainer: Any) -> None:
    """Raise `AutobatchError` if this Lightning lacks a name that AutoBatch uses."""
    missing = missing_name(trainer)
    if missing is not None:
        name = package_of(trainer).partition(".")[0]
        raise AutobatchError(
            f"{name} {sys.modules[name].__version__} has no {missing} where AutoBatch looks for it: AutoBatch was "
            f"tested with Lightning {TESTED}. Install one of these, or train without AutoBatch."
        )


def check_answers(settings: Settings, method: str) -> None:
    """Raise `AutobatchError` where a limit on latency is to hold for training."""
    if method == "fit" and settings.latency_limit is not None:
        raise AutobatchError(
            f"latency_limit={settings.latency_limit:g} is for validate, test and predict, which answer batches; fit "
            "trains: give it an AutoBatch without."
        )


def check_launcher(trainer: Any) -> None:
    """Raise `AutobatchError` where what is found in other processes does not come back to this one."""
    method = getattr(trainer.strategy, "_start_method", "popen")
    if method != "popen":
        raise AutobatchError(
            f"The Trainer's strategy starts its processes by {method}, and what is found in them does not come back. "
            'Tune with strategy="ddp", or with one device.'
        )


def check(trainer: Any, module: Any, checkpoint: Checkpoint | None) -> None:
    """Raise `AutobatchError` with one sentence where this Trainer or module is more than AutoBatch handles.

    `checkpoint` is what the run goes on from, where it says.
    """
    for problem in _problems(trainer, module, checkpoint):
        raise AutobatchError(
            f"AutoBatch does not tune this run yet: {problem}; train it without AutoBatch."
        )


def _problems(trainer: Any, module: Any, checkpoint: Checkpoint | None) -> Iterator[str]:
    package = package_of(trainer)
    strategies = importlib.import_module(f"{package}.strategies")
    callbacks = importlib.import_module(f"{package}.callbacks")
    strategy = trainer.strategy
    if strategy.handles_gradient_accumulation:
        yield (
            f"its strategy, {type(strategy).__name__}, accumulates by a number of its own that a plan can not "
            "change (with another strategy the plan sets the accumulation)"
        )
    if isinstance(strategy, strategies.DeepSpeedStrategy) or not isinstance(
        strategy, (strategies.SingleDeviceStrategy, strategies.DDPStrategy)
    ):
        yield f"{type(strategy).__name__} makes ranks wait for each other in every forward pass"
    if getattr(strategy, "_model_averaging_period", None) is not None:
        yield "its strategy averages models in optimizer steps (model_averaging_period)"
    if any(
        type(optimizer).__name__ == "ZeroRedundancyOptimizer" for optimizer in trainer.optimizers
    ):
        yield "a ZeroRedundancyOptimizer makes ranks wait for each other in every step"
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
    if any(isinstance(callback, callbacks.BatchSizeFinder) for callback in trainer.callbacks):
        yield "a BatchSizeFinder looks for the batch size as well"
    validation = trainer.fit_loop.epoch_loop.val_loop._data_source.instance
    if isinstance(validation, DataLoader) and validation is (
        trainer.fit_loop._data_source.instance
    ):
        yield "one loader serves training and validation"
    if trainer.ckpt_path is not None and checkpoint is None:
        yield f"it resumes from {trainer.ckpt_path}, which holds nothing of callbacks"
    elif checkpoint and checkpoint.plan is None and not checkpoint.between_epochs:
        yield (
            f"it resumes within an epoch from {trainer.ckpt_path}, which holds no plan of AutoBatch and so does not "
            "tell the size of its batches"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the iterator of the loader"
