"""Gradients of a micro-batch that may fail: noted before, undone after, made in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autobatch.lightning._survival.state import NotUndoneError

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
        self._done: Sequence[torch.Tensor] = ()  # left out of this backward pass
        self._are_none = False  # all gradients, when it began
        self._adds_twice = False  # more than once to a gradient, in parts
        # When it began: parameters, their gradients, and the versions of those that were there
        self._noted: list[torch.Tensor] = []
        self._before: list[torch.Tensor | None] = []
        self._versions: list[int] = []

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters of the optimizer."""
        return [each for group in self._optimizer.param_groups for each in group["params"]]

    def expect_none(self) -> None:
        """Take it as noted that gradients are missing: they were reset just now."""
        self._are_none = True

    def note(self, *_: object) -> None:
        """Note all gradients as the backward pass begins."""
        if self._are_none:
            return
        # Lists rather than pairs: no object for each parameter while nothing fails
        self._noted = self._others(self._done) if self._done else self.parameters
        self._before = [each.grad for each in self._noted]
        self._versions = [each._version for each in self._before if each is not None]

    def fail(self, loss: torch.Tensor, *, is_own: bool) -> None:
        """Note a backward pass that failed, of the user's `backward` or of one loss."""
        self._adds_twice = is_own or _is_reentrant(loss)

    def forget(self) -> None:
        """Forget a backward pass that has ended."""
        self._are_none = False
        self._noted, self._before, self._versions = [], [], []

    def undo(self) -> list[torch.Tensor]:
        """Undo a failed backward pass where that is free, and return the parameters done.

        Raises:
            NotUndoneError: Some of them may be done in part, or were changed by a hook as well.
        """
        pairs = zip(filter(torch.is_tensor, self._before), self._versions, strict=False)
        is_twice = any(before._version > version + 1 for before, version in pairs)
        changed = self._changed()
        for parameter, before in changed:
            if before is None:
                parameter.grad = None
        done = [parameter for parameter, before in changed if before is not None]
        if is_twice:
            raise NotUndoneError("gradients of earlier micro-batches were changed more than once")
        if done and self._adds_twice:
            raise NotUndoneError("its backward pass may add to an accumulated gradient in parts")
        return done

    def add(
        self,
        loss: torch.Tensor,
        done: Sequence[torch.Tensor],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        """Run the backward pass of a piece, without effect on parameters that are done."""
        self._done = done
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

    def _others(self, done: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        left_out = set(map(id, done))
        return [each for each in self.parameters if id(each) not in left_out]

    def _changed(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Forget the gradients noted, and return those that have changed with their parameters."""
        versions = iter(self._versions)
        if self._are_none:
            self._noted = self.parameters
            self._before = [None] * len(self._noted)
        changed = [
            (parameter, before)
            for parameter, before in zip(self._noted, self._before, strict=True)
            if (before is not None and before._version != next(versions))
            or parameter.grad is not before
        ]
        self.forget()
        return changed


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


def _is_reentrant(loss: torch.Tensor) -> bool:
    """Return whether a backward pass runs others, as reentrant checkpoints do."""
    found, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        found.add(node)
        left += [each for each, _ in node.next_functions]
    return False
