"""Gradients of a micro-batch that may fail: noted before, undone after, made in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch


class LocalGradients:
    """Gradients of the parameters of an optimizer, to which this process alone adds.

    Parameters that were *done* before an attempt failed hold the gradient of its samples, added to
    those of earlier micro-batches. They are left out when the samples are run again.

    No gradient is copied. Autograd counts each change in `_version`: a gradient that was missing
    is removed again, and a parameter whose gradient has changed is done.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._noted: list[tuple[torch.Tensor, torch.Tensor | None, int | None]] = []

    def watch(self, loss: torch.Tensor) -> None:
        """Note all gradients when the backward pass of a loss begins."""
        # When autograd begins, and not now: hooks before a backward pass may scale gradients
        loss.register_hook(lambda _: self._note(self._parameters))

    def forget(self) -> None:
        """Forget a backward pass that succeeded."""
        self._noted = []

    def undo(self) -> list[torch.Tensor]:
        """Undo a failed backward pass where that is free, and return the parameters done."""
        changed, self._noted = self._changed(), []
        for parameter, before in changed:
            if before is None:
                parameter.grad = None
        return [parameter for parameter, before in changed if before is not None]

    def add(
        self, loss: torch.Tensor, done: Sequence[torch.Tensor], run: Callable[[torch.Tensor], None]
    ) -> None:
        """Run the backward pass of a piece, without effect on parameters that are done."""
        left_out = set(map(id, done))
        rest = [each for each in self._parameters if id(each) not in left_out]
        loss.register_hook(lambda _: self._note(rest))
        aside = [(each, each.grad) for each in done]
        try:
            for each in done:
                each.grad = None
            run(loss)
        finally:
            for each, gradient in aside:
                each.grad = gradient

    def _note(self, parameters: Iterable[torch.Tensor]) -> None:
        self._noted = [
            (each, gradient, None if gradient is None else gradient._version)
            for each in parameters
            for gradient in [each.grad]
        ]

    def _changed(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return parameters whose gradient is not the one noted, and the one that was."""
        return [
            (parameter, before)
            for parameter, before, version in self._noted
            if parameter.grad is not before or (before is not None and before._version != version)
        ]
