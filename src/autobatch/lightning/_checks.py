"""Refuse runs that cannot be tuned, before anything is touched."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from autobatch._distributed.sharding import check_can_rest
from autobatch._loaders.epochs import samples_of
from autobatch._report.tradeoff import unwrapped
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import averages_models, data_source, start_method
from autobatch.lightning._hooks import overrides
from autobatch.lightning._package import TESTED, missing_name, package, package_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autobatch._settings import Settings
    from autobatch.lightning._resume import Checkpoint
    from autobatch.lightning._trainer import Strategy, Trainer


def check_trainer(trainer: Any) -> None:
    """Raise `ValueError` for anything but a Trainer."""
    if not package_of(trainer):
        raise ValueError(f"trainer={trainer!r} is not a Trainer; give the one to tune for.")


def check_alone(callback: Any, callbacks: Iterable[Any]) -> None:
    """Raise `AutobatchError` for several callbacks of the class of one of them."""
    found = sum(isinstance(each, type(callback)) for each in callbacks)
    if found > 1:
        raise AutobatchError(
            f"The Trainer has {found} AutoBatch callbacks, and each would set the batch size; "
            "leave one of them in its callbacks."
        )


def check_lightning(trainer: Trainer) -> None:
    """Raise `AutobatchError` if this Lightning lacks a name that AutoBatch uses."""
    missing = missing_name(trainer)
    if missing is not None:
        name = package_of(trainer).partition(".")[0]
        raise AutobatchError(
            f"{name} {sys.modules[name].__version__} has no {missing} where AutoBatch looks for "
            f"it: AutoBatch was tested with Lightning {TESTED}. Install one of these, or train "
            "without AutoBatch."
        )


def check_latency(settings: Settings, method: str) -> None:
    """Raise `AutobatchError` for a latency limit in training."""
    if method == "fit" and settings.latency_limit is not None:
        raise AutobatchError(
            f"latency_limit={settings.latency_limit:g} is for validate, test and predict, which "
            "answer batches; fit trains: give it an AutoBatch without."
        )


def checked_epochs(epochs: Iterable[int]) -> frozenset[int]:
    """Return the epochs to tune at; `ValueError` if they are not whole numbers of 1 or more."""
    is_list = not isinstance(epochs, (str, bytes)) and hasattr(epochs, "__iter__")
    if not is_list or any(type(epoch) is not int or epoch < 1 for epoch in epochs):
        raise ValueError(
            f"retune_at_epochs={epochs!r} is not a list of epochs; give whole numbers of 1 or "
            "more, such as [5]: epoch 0 is tuned before it starts."
        )
    return frozenset(epochs)


def checked_survival(on_out_of_memory: object) -> bool:
    """Return True if training survives out of memory; `ValueError` for other values."""
    if on_out_of_memory not in ("raise", "split"):
        raise ValueError(
            f'on_out_of_memory={on_out_of_memory!r} is unknown; give "split" to run a micro-batch '
            'that runs out of memory again in pieces, or "raise" to let training end.'
        )
    return on_out_of_memory == "split"


def checked_keep(plan: object, *, survives: bool, **others: object) -> bool:
    """Return True for `plan="keep"`; `ValueError` with an argument that asks for another plan."""
    if plan != "keep":
        return False
    given = next((f"{name}={value!r}" for name, value in others.items() if value), None)
    if given is not None:
        raise ValueError(
            f"plan='keep' leaves batch size and accumulation as they are in the Trainer, and "
            f"{given} changes them; give one of the two."
        )
    if not survives:
        raise ValueError(
            "plan='keep' tunes nothing, and on_out_of_memory='raise' changes nothing in training; "
            'give on_out_of_memory="split", or leave AutoBatch out.'
        )
    return True


def check_survival(trainer: Trainer, module: Any) -> None:
    """Raise `AutobatchError` where a micro-batch cannot be undone and run again in pieces."""
    for problem in _against_survival(trainer, module):
        raise AutobatchError(
            f'on_out_of_memory="split" cannot repeat the micro-batches of this run: {problem}; '
            "leave it out."
        )


def _against_survival(trainer: Trainer, module: Any) -> Iterator[str]:
    strategies = package(trainer).strategies
    if not module.automatic_optimization:
        yield "with manual optimization (automatic_optimization=False), training_step steps itself"
    strategy = trainer.strategy
    if isinstance(strategy, strategies.DDPStrategy):
        yield from _against_survival_on_ranks(strategy, module)
    elif not isinstance(strategy, strategies.SingleDeviceStrategy):
        yield f"{type(strategy).__name__} makes ranks wait for each other in every pass"
    if any(isinstance(unwrapped(each), torch.optim.LBFGS) for each in trainer.optimizers):
        yield "LBFGS evaluates a batch several times in a step"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the iterator of the loader"


def _against_survival_on_ranks(strategy: Strategy, module: Any) -> Iterator[str]:
    wrapper = strategy.model
    if any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules()):
        yield "SyncBatchNorm makes ranks wait for each other in the forward pass"
    if getattr(wrapper, "static_graph", False) or getattr(wrapper, "mixed_precision", None):
        yield "DistributedDataParallel has static_graph or mixed_precision"
    if overrides(module, "backward"):
        yield "the module overrides backward, and ranks share its hooks"


def check_launcher(trainer: Trainer) -> None:
    """Raise `AutobatchError` if training runs in processes that return nothing to this one."""
    method = start_method(trainer.strategy)
    if method != "popen":
        raise AutobatchError(
            f"The Trainer's strategy starts its processes by {method}, and results found in them "
            'do not come back. Tune with strategy="ddp", or with one device.'
        )


def why_idle(trainer: Trainer) -> str | None:
    """Return the reason why the Trainer will not train; None if it will."""
    is_over = trainer.max_epochs == 0 or trainer.max_steps == 0
    if trainer.fast_dev_run or trainer.limit_train_batches == 0 or is_over:
        return "nothing will be trained"
    loader = data_source(trainer.fit_loop).instance
    if isinstance(loader, DataLoader) and samples_of(loader, 1) == 0:
        return "there is nothing to train on"
    return None


def check(trainer: Trainer, module: Any, checkpoint: Checkpoint | None) -> None:
    """Raise `AutobatchError` for a Trainer or module that AutoBatch does not support.

    `checkpoint` is the one that the run resumes from, if it holds anything of callbacks.
    """
    for problem in _problems(trainer, module, checkpoint):
        raise AutobatchError(
            f"AutoBatch does not tune this run yet: {problem}; train it without AutoBatch."
        )
    check_can_rest([trainer.strategy.model])


def _problems(trainer: Trainer, module: Any, checkpoint: Checkpoint | None) -> Iterator[str]:
    callbacks = package(trainer).callbacks
    yield from _against_strategy(trainer)
    if any(type(each).__name__ == "ZeroRedundancyOptimizer" for each in trainer.optimizers):
        yield "a ZeroRedundancyOptimizer makes ranks wait for each other in every step"
    if module.automatic_optimization and len(trainer.optimizers) != 1:
        yield f"it has {len(trainer.optimizers)} optimizers, not one"
    scheduler = callbacks.GradientAccumulationScheduler
    if any(isinstance(each, scheduler) for each in trainer.callbacks):
        yield (
            "a GradientAccumulationScheduler sets the accumulation (without it, target_batch_size "
            "names the batch that the plan accumulates to)"
        )
    if any(isinstance(callback, callbacks.BatchSizeFinder) for callback in trainer.callbacks):
        yield "a BatchSizeFinder looks for the batch size as well"
    validation = data_source(trainer.fit_loop.epoch_loop.val_loop).instance
    training = data_source(trainer.fit_loop).instance
    if isinstance(validation, DataLoader) and validation is training:
        yield "one loader serves training and validation"
    if trainer.ckpt_path is not None and checkpoint is None:
        yield f"it resumes from {trainer.ckpt_path}, which holds no state of callbacks"
    elif checkpoint and checkpoint.plan is None and not checkpoint.between_epochs:
        yield (
            f"it resumes within an epoch from {trainer.ckpt_path}, which holds no plan of "
            "AutoBatch, so that the size of its batches is unknown"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the iterator of the loader"


def _against_strategy(trainer: Trainer) -> Iterator[str]:
    strategies, strategy = package(trainer).strategies, trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, strategies.DeepSpeedStrategy):
        yield (
            f"{name} takes both numbers from the config of DeepSpeed, where you can write "
            "train_micro_batch_size_per_gpu and gradient_accumulation_steps by hand"
        )
    elif strategy.handles_gradient_accumulation:
        yield (
            f"its strategy, {name}, sets the accumulation itself, and a plan cannot change it "
            "(with another strategy the plan sets the accumulation)"
        )
    elif not isinstance(
        strategy,
        (
            strategies.SingleDeviceStrategy,
            strategies.DDPStrategy,
            strategies.FSDPStrategy,
            strategies.ModelParallelStrategy,
        ),
    ):
        yield (
            f"{name} is not one of the strategies whose steps it can try: a single device, DDP, "
            "FSDP and ModelParallelStrategy"
        )
    elif getattr(strategy.model, "static_graph", False):
        yield "static_graph=True makes DistributedDataParallel count the passes of trials as well"
    if averages_models(strategy):
        yield "its strategy averages models in optimizer steps (model_averaging_period)"
