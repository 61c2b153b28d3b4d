"""A workload that drives Lightning's own optimisation path."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._memory import is_oom
from autobatch.lightning._package import package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from autobatch.lightning._samples import Samples

__all__ = ["StartHooks", "Steps", "on_device"]


_START_HOOKS: Final = ("on_fit_start", "on_train_start", "on_train_epoch_start")


class StartHooks:
    """The module's hooks at the start of a run, which trials call only where a step fails without what they make.

    They are left out otherwise: what they do outside of the module could not be taken back.

    Args:
        trainer: The Trainer.
        names: Those that are called once, in their order.
        batch: The one that is called before each batch.
    """

    def __init__(self, trainer: Any, names: Sequence[str], batch: str) -> None:
        self._trainer = trainer
        self._names = names
        self._batch = batch
        self._call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
        self._are_needed = False

    def first(self, step: Callable[[], None]) -> None:
        """Take the first step of a trial, with what it needs."""
        if not self._are_needed:
            try:
                step()
            except Exception as error:
                if is_oom(error) or not self._overridden(*self._names, self._batch):
                    raise
                self._are_needed = True
            else:
                return
        self.before_run()
        step()

    def before_run(self) -> None:
        """Call what belongs before a run, where a first step has shown that it is needed."""
        for hook in self._overridden(*self._names) if self._are_needed else ():
            self._call._call_lightning_module_hook(self._trainer, hook)

    def before_batch(self, *arguments: Any) -> None:
        """Call what belongs before a batch, where that is needed."""
        if self._are_needed:
            hook = self._call._call_lightning_module_hook
            hook(self._trainer, self._batch, *arguments)

    def _overridden(self, *names: str) -> list[str]:
        kind = importlib.import_module(package_of(self._trainer)).LightningModule
        own = type(self._trainer.lightning_module)
        return [
            name
            for name in names
            if getattr(own, name, None) is not getattr(kind, name)
        ]


def on_device(trainer: Any, batch: Any, dataloader_idx: int) -> Any:
    """A batch made ready for a step, as the loops of Lightning 2.6 do it."""
    if trainer.strategy.root_device.type == "cpu":
        # Where the transfer copies nothing, a copy stands for it: a step may write into its batch.
        applying = importlib.import_module("lightning_utilities.core.apply_func")
        batch = applying.apply_to_collection(batch, torch.Tensor, torch.clone)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(
        batch, dataloader_idx=dataloader_idx
    )
    call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
    return call._call_strategy_hook(
        trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx
    )


# Micro-batches granted until every optimizer of a module that optimises by hand has stepped
_PATIENCE: Final = 32


class Steps:
    """Optimizer steps of a Trainer at any batch size: precision, clipping, closures and hooks are the real ones.

    A batch goes the way it goes in Lightning 2.6's `_TrainingEpochLoop.advance`, without what belongs to an epoch:
    callbacks, batch hooks, schedulers, logging and validation.

    Args:
        trainer: The Trainer.
        samples: Makes the batches.
        named: Told the batch size before the first step, since a step may look at the attribute that names it.
    """

    def __init__(
        self, trainer: Any, samples: Samples, named: Callable[[int], None]
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._named = named
        self._hooks = StartHooks(trainer, _START_HOOKS, "on_train_batch_start")

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:
        """Yield after each optimizer step."""
        if self._is_automatic:
            # By hand it is the module that accumulates: the Trainer's number would only disturb the bookkeeping
            self._trainer.accumulate_grad_batches = accumulate
        self._named(batch_size)
        batches = cycle(self._samples.batches(batch_size))
        begin = partial(self._begin, next(batches))
        with _waiting(self._trainer.optimizers) as waiting:
            self._hooks.first(begin)
            taken = 1
            while waiting and not self._is_automatic and taken < _PATIENCE:
                # Some step every few micro-batches only, and need their memory then
                self._micro_batch(next(batches), taken)
                taken += 1
        for index in count(taken):
            if index % accumulate == 0:
                yield
            self._micro_batch(next(batches), index)

    def loss(self, batch: Any) -> Any:
        """What `training_step` makes of a batch that is on the device, as automatic optimisation calls it, and no more.

        None where the module says that there is nothing to learn from it. A trial has run before.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        loop.batch_progress.reset()
        self._hooks.before_run()
        trainer._logger_connector.on_batch_start(batch)  # `self.log` needs it
        self._hooks.before_batch(batch, 0)
        arguments = loop._build_kwargs(OrderedDict(), batch, 0)
        result = loop.automatic_optimization._training_step(arguments)
        trainer._logger_connector.on_batch_end()
        return result.closure_loss

    @property
    def _is_automatic(self) -> bool:
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _begin(self, batch: Any) -> None:
        self._trainer.fit_loop.epoch_loop.batch_progress.reset()
        self._micro_batch(batch, 0)

    def _micro_batch(self, batch: Any, index: int) -> None:
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batch = on_device(trainer, batch, 0)
        loop.batch_progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)  # `self.log` needs it
        self._hooks.before_batch(batch, index)
        loop.batch_progress.increment_started()
        arguments = loop._build_kwargs(OrderedDict(), batch, index)
        if self._is_automatic:
            loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            _run_by_hand(loop.manual_optimization, arguments)
        loop.batch_progress.increment_processed()
        trainer._logger_connector.on_batch_end()
        loop.batch_progress.increment_completed()


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
