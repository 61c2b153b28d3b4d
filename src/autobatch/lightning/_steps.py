"""A workload that drives Lightning's own optimisation path."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._memory import is_oom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.lightning._samples import Samples

__all__ = ["Steps", "package_of"]


def package_of(trainer: Any) -> str:
    """The Lightning package this Trainer comes from: "lightning.pytorch" or "pytorch_lightning"."""
    modules = (
        kind.__module__ for kind in type(trainer).__mro__ if kind.__name__ == "Trainer"
    )
    return next(name for name in map(_root, modules) if name)


def _root(module: str) -> str:
    return next(
        (
            name
            for name in ("lightning.pytorch", "pytorch_lightning")
            if module.startswith(name)
        ),
        "",
    )


_BATCH_HOOK: Final = "on_train_batch_start"
_START_HOOKS: Final = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    _BATCH_HOOK,
)


# Micro-batches granted until every optimizer of a module that optimises by hand has stepped
_PATIENCE: Final = 32


class Steps:
    """Optimizer steps of a Trainer at any batch size: precision, clipping, closures and hooks are the real ones.

    A batch goes the way it goes in Lightning 2.6's `_TrainingEpochLoop.advance`, without what belongs to an epoch:
    callbacks, batch hooks, schedulers, logging and validation.
    """

    def __init__(self, trainer: Any, samples: Samples) -> None:
        self._trainer = trainer
        self._samples = samples
        applying = importlib.import_module("lightning_utilities.core.apply_func")
        self._copied = applying.apply_to_collection
        self._call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
        self._prepares = False  # whether the module's start hooks have to run first

    def __call__(self, batch_size: int, accumulate: int) -> Iterator[None]:
        """Yield after each optimizer step."""
        if self._is_automatic:
            # By hand it is the module that accumulates: the Trainer's number would only disturb the bookkeeping
            self._trainer.accumulate_grad_batches = accumulate
        self._trainer.fit_loop.epoch_loop.batch_progress.reset()
        batch = self._samples.batch(batch_size)
        with _waiting(self._trainer.optimizers) as waiting:
            self._first_micro_batch(batch)
            first = 1
            while waiting and not self._is_automatic and first < _PATIENCE:
                # Some step every few micro-batches only, and need their memory then
                self._micro_batch(batch, first)
                first += 1
        for index in count(first):
            if index % accumulate == 0:
                yield
            self._micro_batch(batch, index)

    @property
    def _is_automatic(self) -> bool:
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _first_micro_batch(self, batch: Any) -> None:
        """Start a trial, and find out whether a step needs what the module's start hooks make.

        They are left out otherwise: what they do outside of the module could not be taken back.
        """
        if not self._prepares:
            try:
                self._micro_batch(batch, 0)
            except Exception as error:
                if is_oom(error) or not self._overridden_hooks():
                    raise
                self._prepares = True
                self._trainer.fit_loop.epoch_loop.batch_progress.reset()
            else:
                return
        for hook in self._overridden_hooks():
            if hook != _BATCH_HOOK:
                self._call._call_lightning_module_hook(self._trainer, hook)
        self._micro_batch(batch, 0)

    def _overridden_hooks(self) -> list[str]:
        kind = importlib.import_module(package_of(self._trainer)).LightningModule
        own = type(self._trainer.lightning_module)
        return [
            hook
            for hook in _START_HOOKS
            if getattr(own, hook, None) is not getattr(kind, hook)
        ]

    def _micro_batch(self, batch: Any, index: int) -> None:
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batch = self._on_device(batch)
        loop.batch_progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)  # `self.log` needs it
        if self._prepares:
            hook = self._call._call_lightning_module_hook
            hook(trainer, _BATCH_HOOK, batch, index)
        loop.batch_progress.increment_started()
        arguments = loop._build_kwargs(OrderedDict(), batch, index)
        if self._is_automatic:
            loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            _run_by_hand(loop.manual_optimization, arguments)
        loop.batch_progress.increment_processed()
        trainer._logger_connector.on_batch_end()
        loop.batch_progress.increment_completed()

    def _on_device(self, batch: Any) -> Any:
        trainer = self._trainer
        if trainer.strategy.root_device.type == "cpu":
            # Where the transfer copies nothing, a copy stands for it: a step may write into its batch.
            batch = self._copied(batch, torch.Tensor, torch.clone)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(
            batch, dataloader_idx=0
        )
        return self._call._call_strategy_hook(
            trainer, "batch_to_device", batch, dataloader_idx=0
        )


def _run_by_hand(loop: Any, arguments: OrderedDict[str, Any]) -> None:
    try:
        loop.run(arguments)
    except BaseException:
        # Lightning 2.6 takes what it hooked into the optimizers out again only where the step succeeds
        loop.on_run_end()
        raise


@contextmanager
def _waiting(optimizers: list[Any]) -> Iterator[set[int]]:
    """The optimizers that have not stepped yet, by their ids: kept up to date while the body runs."""
    waiting = set(map(id, optimizers))
    hooks = [
        optimizer.register_step_post_hook(
            lambda stepped, *_: waiting.discard(id(stepped))
        )
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    try:
        yield waiting
    finally:
        for hook in hooks:
            hook.remove()
