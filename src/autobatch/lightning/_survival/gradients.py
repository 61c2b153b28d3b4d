"""Gradients of a micro-batch that may fail: noted before, undone after, made in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn.parallel import DistributedDataParallel


class LocalGradients:
    """Gradients of the parameters of an optimizer, to which this process alone adds.

    Parameters that were *done* before an attempt failed hold the gradient of its samples, added to
    those of earlier micro-batches. They are left out when the samples are run again.

    No gradient is copied. Autograd counts each change in `_version`: a gradient that was missing
    is removed again, and a parameter whose gradient has changed is done.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # Parameters, their gradients when the backward pass began, and the versions of these
        self._noted: list[tuple[torch.Tensor, torch.Tensor | None, int]] = []

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters of the optimizer."""
        return [each for group in self._optimizer.param_groups for each in group["params"]]

    def watch(self, loss: torch.Tensor) -> None:
        """Note all gradients when the backward pass of a loss begins."""
        # When autograd begins, and not now: hooks before a backward pass may scale gradients
        loss.register_hook(self._note)

    def forget(self) -> None:
        """Forget a backward pass that succeeded."""
        self._noted = []

    def undo(self) -> list[torch.Tensor]:
        """Undo a failed backward pass where that is free, and return the parameters done."""
        changed = self._changed()
        for parameter, before in changed:
            if before is None:
                parameter.grad = None
        return [parameter for parameter, before in changed if before is not None]

    def add(
        self,
        loss: torch.Tensor,
        done: Sequence[torch.Tensor],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        """Run the backward pass of a piece, without effect on parameters that are done."""
        loss.register_hook(lambda _: self._note(done=done))
        aside = [(each, each.grad) for each in done]
        try:
            for each in done:
                each.grad = None
            backward(loss)
        finally:
            for each, gradient in aside:
                each.grad = gradient

    def finish(self, done: Sequence[torch.Tensor]) -> None:
        """End the backward pass of a micro-batch in pieces."""

    def _note(self, _: Any = None, done: Sequence[torch.Tensor] = ()) -> None:
        self._noted = [
            (each, grad := each.grad, 0 if grad is None else grad._version)
            for each in self._others(done)
        ]

    def _others(self, done: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        left_out = set(map(id, done))
        return [each for each in self.parameters if id(each) not in left_out]

    def _changed(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Forget the gradients noted, and return those that have changed with their parameters."""
        noted, self._noted = self._noted, []
        return [
            (parameter, before)
            for parameter, before, version in noted
            if parameter.grad is not before or (before is not None and before._version != version)
        ]


class SynchronizedGradients(LocalGradients):
    """Gradients that DistributedDataParallel reduces over ranks in this backward pass.

    Other ranks wait in the same reduction and do not learn of a failure: this rank computes the rest
    of its own gradient, and then finishes the reduction. Its buckets have taken the gradient of each
    parameter that had changed when the attempt failed, so that all of these are done.

    Args:
        optimizer: The optimizer.
        wrapper: DistributedDataParallel around the module.
    """

    def __init__(self, optimizer: Any, wrapper: DistributedDataParallel) -> None:
        super().__init__(optimizer)
        self._wrapper = wrapper
        self._added: dict[int, torch.Tensor] = {}  # parameters with a gradient of the pieces

    def undo(self) -> list[torch.Tensor]:
        return [parameter for parameter, _ in self._changed()]

    def add(
        self,
        loss: torch.Tensor,
        done: Sequence[torch.Tensor],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        # Not by a backward pass: hooks of the reducer may wait for gradients
        rest = [each for each in self._others(done) if each.requires_grad]
        made = torch.autograd.grad(loss, rest, allow_unused=True)
        pairs = [(each, one) for each, one in zip(rest, made, strict=True) if one is not None]
        # Memory that this needs is asked for before any gradient is changed
        fresh = [one.clone() if each.grad is None else one for each, one in pairs]
        for (each, _), one in zip(pairs, fresh, strict=True):
            if each.grad is None:
                each.grad = one
            else:
                each.grad.add_(one)
            self._added[id(each)] = each

    def finish(self, done: Sequence[torch.Tensor]) -> None:
        """Hand over the gradients: a backward pass of zeros fires the hooks of the reducer."""
        rest = list(self._added.values())
        roots = [each.view_as(each) for each in rest]
        zeros = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in rest]
        if not done:  # no hook has fired
            unused = self._wrapper.find_unused_parameters
            self._wrapper.reducer.prepare_for_backward(roots if unused else [])
        torch.autograd.backward(roots, zeros)
