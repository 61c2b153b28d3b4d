"""One micro-batch of automatic optimization: run as a whole, or in pieces."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from autobatch._undo import patched
from autobatch.lightning._compat import (
    Imported,
    backward_of,
    is_redirected,
    is_synchronized_in_step,
    training_step_result,
    zero_grad_of,
)
from autobatch.lightning._survival_gradients import LocalGradients, SynchronizedGradients
from autobatch.lightning._survival_loss import is_sum
from autobatch.lightning._survival_merge import DonePieces, show_piece
from autobatch.lightning._survival_state import NotUndoneError

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Iterator, Sequence

    from autobatch.lightning._survival_state import Kept
    from autobatch.lightning._trainer import Trainer


class _Stage(Enum):
    """Part of a micro-batch that runs."""

    FORWARD = auto()
    ZERO_GRAD = auto()
    BACKWARD = auto()


class MicroBatch:
    """A micro-batch: training_step, zero_grad once, and the backward pass with its hooks once.

    Args:
        trainer: The Trainer.
        arguments: Of `training_step`.
        optimizer: The optimizer.
        index: Of the batch in its epoch.
    """

    def __init__(
        self, trainer: Trainer, arguments: OrderedDict[str, Any], optimizer: Any, index: int
    ) -> None:
        self.batch = arguments["batch"]
        self.done = DonePieces()
        self.lost_seconds = 0.0  # in attempts that failed
        self._index = index
        self._parameters: list[torch.Tensor] = [
            each for group in optimizer.param_groups for each in group["params"]
        ]
        self._stage = _Stage.FORWARD
        wrapper = trainer.strategy.model
        self._wrapper = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        if self._wrapper is not None and self._wrapper.require_backward_grad_sync:
            self._gradients: LocalGradients = SynchronizedGradients(self._parameters, self._wrapper)
        else:
            self._gradients = LocalGradients(self._parameters)
        self._trainer = trainer
        self._arguments = arguments
        self._optimizer = optimizer
        self._backward = backward_of(trainer, optimizer)
        self._reset = zero_grad_of(trainer, index, optimizer)
        self._is_announced = False  # on_before_backward was called
        self._is_begun = False  # what DistributedDataParallel does before the forward pass
        self._result: Any = None  # of the last piece

    def run_whole(self) -> Any:
        """Run it as Lightning does, and return its `ClosureResult`."""
        backward = None if self._backward is None else self._run_backward
        loop = self._trainer.fit_loop.epoch_loop
        step = partial(training_step_result, loop, self._arguments)
        return Imported.CLOSURE.of(self._trainer)(step, backward, self._zero_grad).closure()

    @contextmanager
    def in_pieces(self, done: Sequence[torch.Tensor]) -> Iterator[None]:
        """Run pieces in the body, and then finish the backward pass.

        Under DistributedDataParallel they run on the module without it, and what it does before and
        after a forward pass is done once, as by the other ranks.
        """
        wrapper, module = self._wrapper, self._trainer.lightning_module
        if wrapper is None:
            yield
            return
        if not self._is_begun:
            wrapper._pre_forward()
            self._is_begun = True
        # A failed forward pass has not reached this; the next would synchronize buffers otherwise
        wrapper.require_forward_param_sync = wrapper.require_backward_grad_sync
        with patched(self._trainer.strategy, model=module):
            yield
        self._gradients.finish(done)

    def run_piece(
        self, piece: Any, samples: int, weight: float, done: Sequence[torch.Tensor]
    ) -> None:
        """Run a piece, and add its gradients but for parameters that are done.

        Args:
            piece: Some rows of the batch.
            samples: Their number.
            weight: Factor of the loss.
            done: Parameters that hold the gradient of these samples already.
        """
        self._stage = _Stage.FORWARD
        self._gradients.forget()
        show_piece(self._trainer, piece)
        arguments = copy.copy(self._arguments)
        arguments["batch"] = piece
        with torch.enable_grad():
            result = training_step_result(self._trainer.fit_loop.epoch_loop, arguments)
            self._zero_grad()
            self._stage = _Stage.BACKWARD
            if self._backward is not None and result.closure_loss is not None:
                loss = self._announced(weight * result.closure_loss)
                self._gradients.add(loss, done, self._run_backward_of_piece)
        result.closure_loss, self._result = None, result
        self.done.add(samples, {**result.extra, "loss": result.loss}, self._trainer)

    def undo_gradients(self) -> list[torch.Tensor]:
        """Undo the gradients of a failed attempt, and return the parameters done by it.

        Raises:
            NotUndoneError: The attempt has had other effects.
        """
        module = self._trainer.lightning_module
        if self._wrapper is not None:
            if self._stage is _Stage.FORWARD and is_redirected(module) and not self._is_begun:
                raise NotUndoneError("memory ran out in DistributedDataParallel, between ranks")
            if is_synchronized_in_step(self._trainer):
                raise NotUndoneError("self.log of training_step communicates with other ranks")
            self._is_begun = True
        if self._stage is _Stage.ZERO_GRAD:
            raise NotUndoneError("memory ran out while gradients were reset")
        # torch 2.13 has no public name for these hooks; optimizers in the backward pass use them
        if self._stage is _Stage.BACKWARD and any(
            getattr(each, "_post_accumulate_grad_hooks", None) for each in self._parameters
        ):
            raise NotUndoneError("its gradients are used in the backward pass")
        return self._gradients.undo()

    def is_sum(self, kept: Kept) -> bool | None:
        """Compare the gradients of a few samples and of their halves."""
        return is_sum(self._trainer, kept.batch, self._index, self._parameters)

    def finish(self, *, is_sum: bool) -> Any:
        """End the backward pass of the pieces, and return the result of the whole micro-batch."""
        outputs = self.done.merged(sums={"loss"} if is_sum else set())
        result, loss = self._result, outputs.pop("loss")
        if self._backward is not None and loss is not None:
            plugin, module = self._trainer.precision_plugin, self._trainer.lightning_module
            plugin.post_backward(loss, module)
        result.loss, result.extra = loss, outputs
        self.done.merge_logged(self._trainer)
        return result

    def _zero_grad(self) -> None:
        """Reset gradients, if that is due and was not done before."""
        if self._reset is not None:
            self._stage = _Stage.ZERO_GRAD
            reset, self._reset = self._reset, None
            reset()

    def _run_backward(self, loss: torch.Tensor) -> None:
        self._stage, self._is_announced = _Stage.BACKWARD, True
        if loss.requires_grad:
            self._gradients.watch(loss)
        if self._backward is not None:
            self._backward(loss)

    def _announced(self, loss: torch.Tensor) -> Any:
        """Return a scaled loss, and call the hooks before the first backward pass."""
        plugin, module = self._trainer.precision_plugin, self._trainer.lightning_module
        if self._is_announced:
            scaler = getattr(plugin, "scaler", None)
            return loss if scaler is None else scaler.scale(loss)
        self._is_announced = True
        return plugin.pre_backward(loss, module)

    def _run_backward_of_piece(self, loss: torch.Tensor) -> None:
        plugin, module = self._trainer.precision_plugin, self._trainer.lightning_module
        plugin.backward(loss, module, self._optimizer)
