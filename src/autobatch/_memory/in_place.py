"""Sums that PyTorch writes into one of their terms, and allocates only under a dispatch mode."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from types import FrameType

# The function that runs autograd has no public name in torch 2.13
_RUN_BACKWARD: Final = torch.autograd.graph._engine_run_backward.__code__  # noqa: SLF001
# Modules whose frames stand between an operator and the call that led to it
_BETWEEN: Final = (
    __name__,
    "autobatch._memory.ledger",
    "autobatch._memory.estimate.recorder",
    "torch._dynamo.eval_frame",
    "torch._compile",
)


class InPlaceSums:
    """Recognises sums of gradients in autograd, and of product and bias in a linear layer.

    Both are written out of place if `isTensorSubclassLike`, which is true under a dispatch mode
    (torch 2.13, input_buffer.cpp and Linear.cpp). A product and a sum of the same instruction of
    Python are those of one call in C++.
    """

    def __init__(self) -> None:
        self._product: tuple[int, int] | None = None  # frame and instruction

    def recognises(self, func: Any) -> bool:
        """Return True if an operator is such a sum; to be called for every operator, in order."""
        if func is torch.ops.aten.mm.default:
            caller = _caller()
            self._product = id(caller), caller.f_lasti
        if func is not torch.ops.aten.add.Tensor:
            return False
        caller = _caller()
        is_of_autograd = caller.f_code is _RUN_BACKWARD
        return is_of_autograd or (id(caller), caller.f_lasti) == self._product


def _caller() -> FrameType:
    """Return the frame whose call led to the present operator."""
    frame = sys._getframe(1)  # noqa: SLF001 -- as inspect does
    while frame.f_globals.get("__name__") in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame
