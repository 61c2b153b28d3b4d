"""Training steps of a Trainer as a workload, and the way of a batch to the device."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._report.tradeoff import unwrapped
from autobatch._undo import patched
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import (
    before_batch_transfer,
    build_step_kwargs,
    call_strategy_hook,
    data_parallel_size,
    logger_connector,
    stepping_by,
    training_step_result,
)
from autobatch.lightning._hooks import Hooks
from autobatch.lightning._package import Imported
from autobatch.lightning._shown import training_shown

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Generator, Iterator, Sequence

    from autobatch.lightning._resources import TrialResources
    from autobatch.lightning._trainer import ManualOptimization, Trainer

# Micro-batches in which every optimizer of a module with manual optimization has to step once
_FIRST_STEPS_WITHIN: Final = 32
# Epochs that on_train_batch_start may end in a row before a window is complete
_ENDED_EPOCHS: Final = 100


class TrainingSteps:
    """Optimizer steps of a Trainer at any batch size, with its precision, clipping and hooks.

    A batch takes the path of `_TrainingEpochLoop.advance` in Lightning 2.6, without schedulers,
    logging and validation. The Trainer shows what it shows in training at that size.

    Args:
        trainer: The Trainer, on new loops.
        resources: Loaders, batches, and the attribute of the batch size, which a step may read.
        start_hooks: Hooks that training has still to call before its first batch.
    """

    def __init__(
        self, trainer: Trainer, resources: TrialResources, start_hooks: Sequence[str]
    ) -> None:
        self.target: int | None = None  # samples per update in training; None without a target
        self._trainer = trainer
        self._resources = resources
        self._hooks = Hooks(trainer, start_hooks, "on_train_batch", resources.context.snapshot)
        self._accumulate = trainer.accumulate_grad_batches
        # Progress from which every trial starts
        self._epochs = copy.deepcopy(trainer.fit_loop.epoch_progress)
        self._progress = trainer.fit_loop.epoch_loop.state_dict()

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:
        """Yield after each optimizer step."""
        with (
            self.shown(batch_size, accumulate) as windows,
            _optimizers_to_step(self._trainer.optimizers) as waiting,
        ):
            batches = self._resources.samples.batches(batch_size)
            for attempt in self._hooks.attempts():
                with attempt:
                    windows.restart()
                    self.start()
                    self._micro_batch(batches, windows)
            self._complete(batches, windows)
            while waiting and not self._is_automatic and windows.taken < _FIRST_STEPS_WITHIN:
                # Some optimizers step every few micro-batches only, and need their memory then
                self._update(batches, windows)
            while True:
                yield
                self._update(batches, windows)

    @contextlib.contextmanager
    def shown(self, batch_size: int, accumulate: int) -> Iterator[_Windows]:
        """Let the Trainer show the values of training at a batch size; yield its windows.

        In manual optimization the module accumulates: Lightning's number stays as it is.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        self._resources.attribute.set(batch_size)
        trained = self._trained_accumulation(batch_size, accumulate)
        shown = trained if self._is_automatic else trainer.accumulate_grad_batches
        with (
            training_shown(trainer, self._resources.loaders, batch_size) as batches,
            patched(trainer, accumulate_grad_batches=shown, should_stop=trainer.should_stop),
        ):
            windows = _Windows(batches, trained, accumulate)
            # Not by the counters of the loop: a window must not close at the end of an epoch
            with stepping_by(loop, windows.is_open):
                yield windows

    def start(self) -> None:
        """Reset the progress to the start of a trial, and call the hooks before a first batch."""
        fit_loop = self._trainer.fit_loop
        fit_loop.epoch_progress = copy.deepcopy(self._epochs)
        fit_loop.epoch_loop.load_state_dict(self._progress)
        fit_loop.epoch_loop.restarting = False
        self._hooks.start()

    def loss(self, batch: Any) -> Any:
        """Run `training_step` alone on a batch on the device, and return its loss.

        None if the module skips the batch. In `shown`, after `start`.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        loop.batch_progress.current.ready = 1
        logger_connector(trainer).on_batch_start(batch)
        self._hooks.before_batch(batch, 0)
        result = training_step_result(loop, build_step_kwargs(loop, batch, 0))
        logger_connector(trainer).on_batch_end()
        return result.closure_loss

    @property
    def runs_callbacks(self) -> bool:
        """True if trials run hooks of callbacks, since steps need them."""
        return self._hooks.with_callbacks

    @property
    def _is_automatic(self) -> bool:
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _trained_accumulation(self, batch_size: int, accumulate: int) -> int:
        """Return the micro-batches per update of training, if a trial runs this many."""
        if accumulate == 1 or not self._is_automatic:
            return accumulate
        if self.target is None:
            return max(accumulate, self._accumulate)
        return max(
            accumulate, round(self.target / (batch_size * data_parallel_size(self._trainer)))
        )

    def _update(self, batches: Iterator[Any], windows: _Windows) -> None:
        self._micro_batch(batches, windows)
        self._complete(batches, windows)

    def _complete(self, batches: Iterator[Any], windows: _Windows) -> None:
        """Run micro-batches until the optimizer has stepped."""
        while windows.position:
            self._micro_batch(batches, windows)

    def _micro_batch(self, batches: Iterator[Any], windows: _Windows) -> None:
        """Run the next micro-batch, in a new epoch if `on_train_batch_start` ends this one."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batch = on_device(trainer, next(batches), 0)
        while not self._starts(batch, windows):
            windows.end_epoch()
            trainer.fit_loop.epoch_progress.increment_by(1)
            self._hooks.call("on_train_epoch_start")
            batch = on_device(trainer, next(batches), 0)
        index = windows.index
        loop.batch_progress.increment_started()
        arguments = build_step_kwargs(loop, batch, index)
        if self._is_automatic:
            outputs = loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            outputs = _run_manual_optimization(loop.manual_optimization, arguments)
        loop.batch_progress.increment_processed()
        self._hooks.after_batch(outputs, batch, index)
        logger_connector(trainer).on_batch_end()
        loop.batch_progress.increment_completed()
        windows.advance()

    def _starts(self, batch: Any, windows: _Windows) -> bool:
        """Start a micro-batch; False if `on_train_batch_start` leaves it out."""
        trainer, index = self._trainer, windows.index
        check_terminated(trainer)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.ready = index
        progress.is_last_batch = index + 1 == windows.batches
        progress.increment_ready()
        logger_connector(trainer).on_batch_start(batch)
        return bool(self._hooks.before_batch(batch, index) != -1)


@dataclass
class _Windows:
    """Accumulation windows of a trial, numbered as in an epoch of training.

    A trial runs two micro-batches of a longer window of training: the first and the last.

    Args:
        batches: Batches of an epoch; infinite for a stream.
        accumulate: Micro-batches of a window in training.
        in_trial: Micro-batches of a window in the trial.
    """

    batches: int | float
    accumulate: int
    in_trial: int
    window: int = 0
    position: int = 0  # of the next micro-batch in its window
    taken: int = 0  # micro-batches since the trial began
    ended_epochs: int = 0  # since the last complete window

    @property
    def index(self) -> int:
        """Index of the next micro-batch in its epoch."""
        position = self.position if self.is_open() else self.accumulate - 1
        index = self.window * self.accumulate + position
        return index if self.batches == inf else min(index, max(0, int(self.batches) - 1))

    def is_open(self) -> bool:
        """Return whether the optimizer does not step after this micro-batch."""
        return self.position + 1 < self.in_trial

    def advance(self) -> None:
        """Count a micro-batch; a window that would not fit into the epoch begins a new one."""
        self.taken += 1
        self.position += 1
        if self.position < self.in_trial:
            return
        self.window, self.position, self.ended_epochs = self.window + 1, 0, 0
        if (self.window + 1) * self.accumulate > self.batches:
            self.window = 0

    def end_epoch(self) -> None:
        """Begin a new epoch before this one has ended."""
        self.ended_epochs += 1
        if self.ended_epochs > _ENDED_EPOCHS:
            raise AutobatchError(
                f"on_train_batch_start returned -1 in {_ENDED_EPOCHS} epochs before the optimizer "
                "stepped, so no batch size can be tried. Return -1 after an update, or leave "
                "AutoBatch out."
            )
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self.window = self.position = 0


def _run_manual_optimization(loop: ManualOptimization, arguments: OrderedDict[str, Any]) -> Any:
    try:
        return loop.run(arguments)
    except BaseException:
        # Lightning 2.6 removes its hooks from the optimizers only if the step succeeds
        loop.on_run_end()
        raise


@contextlib.contextmanager
def _optimizers_to_step(optimizers: list[Any]) -> Iterator[set[int]]:
    """Yield the ids of optimizers that have not stepped yet; the set shrinks in the body."""
    optimizers = [unwrapped(optimizer) for optimizer in optimizers]  # a wrapper may have no hooks
    waiting = set(map(id, optimizers))
    hooks = [
        optimizer.register_step_post_hook(lambda stepped, *_: waiting.discard(id(stepped)))
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    try:
        yield waiting
    finally:
        for hook in hooks:
            hook.remove()


def check_terminated(trainer: Trainer) -> None:
    """End the run after SIGTERM, as the loops do: the handler of Lightning 2.6 only notes it."""
    if trainer.received_sigterm:
        raise Imported.TERMINATED.of(trainer)


def on_device(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Prepare a batch for a step as the loops of Lightning 2.6 do."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(trainer.lightning_module, batch, dataloader_idx)
    return call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx)
