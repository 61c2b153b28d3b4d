"""One micro-batch of automatic optimization: run as a whole, or in pieces."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from autobatch._undo import patched
from autobatch.lightning._compat import (
    backward_of,
    go_on_logging,
    is_redirected,
    is_synchronized_in_step,
    run_closure,
    training_step_result,
    zero_grad_of,
)
from autobatch.lightning._survival.gradients import LocalGradients, SynchronizedGradients
from autobatch.lightning._survival.halves import is_sum
from autobatch.lightning._survival.pieces import shown
from autobatch.lightning._survival.state import NotUndoneError

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Iterator, Sequence

    from torch.nn.parallel import DistributedDataParallel

    from autobatch.lightning._survival.pieces import Pieces
    from autobatch.lightning._survival.state import Kept
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
        wrapper: DistributedDataParallel around the module, if any.
        clears: No gradient is there when a backward pass begins after zero_grad.
        closure: Of Lightning, which runs it as a whole.
        arguments: Of `training_step`.
        optimizer: The optimizer.
        index: Of the batch in its epoch.
    """

    def __init__(
        self,
        trainer: Trainer,
        wrapper: DistributedDataParallel | None,
        clears: bool,  # noqa: FBT001 -- the others come from Lightning, by position
        closure: Any,
        arguments: OrderedDict[str, Any],
        optimizer: Any,
        index: int,
    ) -> None:
        self.batch = arguments["batch"]
        self._trainer = trainer
        self._closure = closure
        self._arguments = arguments
        self._optimizer = optimizer
        self._index = index
        self._wrapper = wrapper
        self._clears = clears
        if wrapper is not None and wrapper.require_backward_grad_sync:
            self.gradients: LocalGradients = SynchronizedGradients(optimizer, wrapper)
        else:
            self.gradients = LocalGradients(optimizer)
        self._stage = _Stage.FORWARD
        self._is_reset = False  # zero_grad was called
        self._is_announced = False  # on_before_backward was called
        self._is_begun = False  # what DistributedDataParallel does before the forward pass
        self._result: Any = None  # of the last piece
        self.pieces: Pieces | None = None  # if it was run in pieces

    def run_whole(self) -> Any:
        """Run it as Lightning does, and return its `ClosureResult`."""
        return run_closure(self._closure, self._begin_backward)

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
        self.gradients.finish(done)

    def run_piece(self, piece: Any, weight: float, done: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Run a piece, add its gradients but for parameters that are done, and return its outputs.

        Args:
            piece: Some rows of the batch.
            weight: Factor of the loss.
            done: Parameters that hold the gradient of these samples already.
        """
        self._stage = _Stage.FORWARD
        self.gradients.forget()
        if self._result is not None:
            go_on_logging(self._trainer)
        arguments = copy.copy(self._arguments)
        arguments["batch"] = piece
        with torch.enable_grad():
            with shown(self._trainer, self.batch, piece):  # hooks after it log for the whole
                result = training_step_result(self._trainer.fit_loop.epoch_loop, arguments)
            self._zero_grad()
            self._stage = _Stage.BACKWARD
            if backward_of(self._closure) is not None and result.closure_loss is not None:
                loss = weight * self._announced(result.closure_loss)
                self.gradients.add(loss, done, self._run_backward_of_piece)
        result.closure_loss, self._result = None, result
        return {**result.extra, "loss": result.loss}

    def undo(self) -> list[torch.Tensor]:
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
            getattr(each, "_post_accumulate_grad_hooks", None) for each in self.gradients.parameters
        ):
            raise NotUndoneError("its gradients are used in the backward pass")
        return self.gradients.undo()

    def is_sum(self, kept: Kept) -> bool | None:
        """Compare the gradients of a few samples and of their halves."""
        return is_sum(self._trainer, kept, self._index, self.gradients.parameters)

    def finish(self, outputs: dict[str, Any], pieces: Pieces) -> Any:
        """End the backward pass of the pieces, and return the result of the whole micro-batch."""
        self.pieces = pieces
        result, loss = self._result, outputs.pop("loss")
        if backward_of(self._closure) is not None and loss is not None:
            self._trainer.precision_plugin.post_backward(loss, self._trainer.lightning_module)
        result.loss, result.extra = loss, outputs
        return result

    def _zero_grad(self) -> None:
        """Reset gradients, if that is due and was not done before."""
        reset = zero_grad_of(self._closure)
        if reset is not None and not self._is_reset:
            self._stage, self._is_reset = _Stage.ZERO_GRAD, True
            reset()

    def _begin_backward(self) -> None:
        self._zero_grad()
        if self._is_reset and self._clears:
            self.gradients.expect_none()
        self._stage, self._is_announced = _Stage.BACKWARD, True

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
