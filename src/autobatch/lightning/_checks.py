"""Refuse runs that cannot be tuned, before anything is touched."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import DataLoader

from autobatch.errors import AutobatchError
from autobatch.lightning._compat import package_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._settings import Settings
    from autobatch.lightning._resume import Checkpoint

_TESTED: Final = "2.6.0 to 2.6.6"
# What AutoBatch uses of a Trainer that Lightning does not promise to keep
_PRIVATE: Final = (
    "_data_connector._requires_distributed_sampler",
    "_logger_connector.on_batch_end",
    "_logger_connector.on_batch_start",
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
    "fit_loop._data_source.dataloader",
    "fit_loop._data_source.instance",
    "fit_loop.advance",
    "fit_loop.epoch_loop._build_kwargs",
    "fit_loop.epoch_loop.automatic_optimization._training_step",
    "fit_loop.epoch_loop.automatic_optimization.run",
    "fit_loop.epoch_loop.batch_progress.increment_ready",
    "fit_loop.epoch_loop.val_loop._data_source.instance",
    "fit_loop.max_batches",
    "fit_loop.restarted_mid_epoch",
    "fit_loop.restarted_on_epoch_end",
    "fit_loop.setup_data",
    "lightning_module._on_before_batch_transfer",
    "predict_loop._build_step_args_from_hook_kwargs",
    "strategy.setup_optimizers",
    "strategy.setup_precision_plugin",
    "validate_loop._build_step_args_from_hook_kwargs",
    "validate_loop._data_source.dataloader",
    "validate_loop.setup_data",
)
_PRIVATE_MODULES: Final = (
    ("loggers.logger", "DummyLogger"),
    ("trainer.call", "_call_lightning_module_hook"),
    ("trainer.call", "_call_strategy_hook"),
    ("utilities.exceptions", "_TunerExitException"),
)


def check_lightning(trainer: Any) -> None:
    """Raise `AutobatchError` where this Lightning lacks what AutoBatch needs of its inside."""
    package = package_of(trainer)
    missing = [name for name in _PRIVATE if not _has(trainer, name)] + [
        f"{module}.{name}"
        for module, name in _PRIVATE_MODULES
        if not _has(_module(f"{package}.{module}"), name)
    ]
    if missing:
        name = package.partition(".")[0]
        version = importlib.import_module(name).__version__
        raise AutobatchError(
            f"{name} {version} has no {missing[0]} where AutoBatch looks for it: AutoBatch was tested with Lightning "
            f"{_TESTED}. Install one of these, or train without AutoBatch."
        )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _has(owner: Any, path: str) -> bool:
    try:
        attrgetter(path)(owner)
    except AttributeError:
        return False
    return True


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
