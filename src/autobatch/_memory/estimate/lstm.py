"""cuDNN's LSTM on fake CPU tensors: its allocations, in order, without values.

After ATen/native/cudnn/RNN.cpp and cudnn/RNNUtils of torch 2.13. What cuDNN asks for is a guess,
fitted to one network of two layers on an H200: the reserve that the backward pass reads, and the
workspace of each of its calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory.estimate.scratch import Gpu

_GATES: Final = 4
_RANDOM_STATE: Final = 24  # bytes per resident thread: measured for dropout on an H200


class CudnnLstm:
    """Replacement of `torch._VF.lstm`; it keeps the state of cuDNN's dropout, one per process."""

    def __init__(self, gpu: Gpu) -> None:
        self._threads = gpu.multiprocessors * gpu.threads
        self._random_state: torch.Tensor | None = None

    def __call__(
        self,
        inputs: torch.Tensor,
        state: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        has_biases: bool,  # noqa: ARG002, FBT001 -- the signature of torch
        layers: int,
        dropout: float,
        train: bool,  # noqa: FBT001
        bidirectional: bool,  # noqa: FBT001
        batch_first: bool,  # noqa: FBT001
    ) -> Any:
        is_cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_cast else inputs.dtype
        if dropout and train and self._random_state is None:
            nbytes = _RANDOM_STATE * self._threads
            self._random_state = inputs.new_empty(nbytes, dtype=torch.uint8)
        x, *state = (each.to(dtype) for each in (inputs, *state))
        x = x.transpose(0, 1) if batch_first else x
        width = state[0].size(-1) * (1 + bidirectional)
        output, *state = _Lstm.apply(x, *state, layers, width, train, *weights)  # type: ignore[no-untyped-call]
        return (output.transpose(0, 1) if batch_first else output), *state


class _Lstm(torch.autograd.Function):
    """Layers with the time first, in the precision of the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        layers: int,
        width: int,
        train: bool,  # noqa: FBT001
        *weights: torch.Tensor,
    ) -> Any:
        numel = sum(weight.numel() for weight in weights)
        # Weights in another precision lie in one copy
        flat = None if weights[0].dtype is x.dtype else x.new_empty(numel)
        copied = x.contiguous()
        states = x.shape[:-1].numel() * width
        ctx.workspace = _GATES * layers * states
        output = x.new_empty((*x.shape[:-1], width))
        h_n, c_n = torch.empty_like(h), torch.empty_like(c)
        workspace = x.new_empty(ctx.workspace)
        # Gates and cell of each layer, and what dropout leaves between layers
        reserve = x.new_empty((6 * layers - 1) * states if train else 0)
        del copied, workspace
        ctx.save_for_backward(x, h, c, output, reserve, flat)
        ctx.weights = [(weight.shape, weight.dtype) for weight in weights]
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        x, h, c, *_ = ctx.saved_tensors
        copies = x.contiguous(), gradient.contiguous()
        of_inputs = [x.new_empty(x.shape), torch.empty_like(h), torch.empty_like(c)]
        workspace = x.new_empty(ctx.workspace)
        del workspace, copies
        of_weights: list[torch.Tensor | None] = [None] * len(ctx.weights)
        if any(ctx.needs_input_grad[6:]):
            copied = x.contiguous()
            flat = x.new_zeros(sum(shape.numel() for shape, _ in ctx.weights))
            workspace = x.new_empty(ctx.workspace)
            del workspace, copied
            parts = flat.split([shape.numel() for shape, _ in ctx.weights])
            of_weights = [
                part.view(shape).to(dtype)
                for part, (shape, dtype) in zip(parts, ctx.weights, strict=True)
            ]
        return *of_inputs, None, None, None, *of_weights
