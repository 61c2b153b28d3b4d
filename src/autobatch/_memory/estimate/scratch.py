"""Scratch memory of CUDA kernels: bytes held while a kernel runs, besides its results.

Formulas read from torch 2.13 (Reduce.cuh, sdp_utils.cpp) and cudnn-frontend 1.2x, and compared with
measurements of an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from autobatch._memory.estimate.allocator import round_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_ACCUMULATOR: Final = 4  # bytes of a partial sum
_LARGEST_INDEX: Final = 2**31 - 1
_WARP: Final = 32
_MAX_THREADS: Final = 512
_VECTOR: Final = 4  # values that a thread loads, or outputs that it sums, at once
_HEAD_OF_CUDNN: Final = 128  # widest attention head


@dataclass(frozen=True, slots=True)
class Gpu:
    """Properties of a GPU that scratch memory depends on; by default those of an H100 or H200."""

    multiprocessors: int = 132
    threads: int = 2048  # resident threads of one of them
    # Whether attention is cuDNN's: on sm_90 and sm_100 from 9.15 on
    has_cudnn_attention: bool = True
    has_flash_attention: bool = True  # whether it has the flash kernel: from sm_80 on
    # Bytes of one of cuBLAS's workspaces; torch takes 32 MiB on sm_90
    cublas_workspace: int = 32 * 2**20

    @property
    def has_bf16(self) -> bool:
        """True from sm_80 on, as for flash attention: torch emulates bf16 on others."""
        return self.has_flash_attention

    @property
    def workspaces(self) -> tuple[int, ...]:
        """Bytes of the workspaces of the main thread and of autograd's, and of other things."""
        return (self.cublas_workspace, self.cublas_workspace, 2**20)


class Axis(NamedTuple):
    """Size and stride of one or more dimensions of a tensor that lie in memory like one."""

    size: int
    stride: int


def attention_scratch(
    operator: str, query: torch.Tensor, dropout: float, gpu: Gpu
) -> tuple[int, ...]:
    """Return the bytes that the backward pass of an attention kernel needs."""
    length, width = query.shape[-2:]
    rows = query.numel() // width
    is_flash = "flash" in operator
    if is_flash:
        suits_cudnn = width <= _HEAD_OF_CUDNN and dropout * 16 == int(dropout * 16)
    else:
        suits_cudnn = query.dtype is not torch.float32
    if gpu.has_cudnn_attention and suits_cudnn:
        return (_ACCUMULATOR * rows * (width + 1),)
    if not is_flash:
        return (_ACCUMULATOR * rows,)
    padded_rows = rows // length * round_up(length, 128)
    padded_width = round_up(width, 32 if width <= _HEAD_OF_CUDNN else 64)
    return _ACCUMULATOR * padded_rows, _ACCUMULATOR * padded_rows * padded_width


def convolution_scratch(arguments: Sequence[Any], *, of_input: bool) -> tuple[int, ...]:
    """Return the bytes that cuDNN needs for one gradient: copies with the channels last.

    A guess: cuDNN does not say which algorithm it takes, and partial sums are left out.
    """
    gradient, inputs, weight, _, stride = arguments[:5]
    groups = arguments[9]
    is_matrix_product = math.prod(weight.shape[2:]) == 1 and set(stride) == {1}
    if inputs.ndim != 4 or inputs.dtype is torch.float32 or groups > 1 or is_matrix_product:  # noqa: PLR2004
        return ()
    if inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous():
        return ()
    return (inputs.nbytes if of_input else inputs.nbytes + gradient.nbytes,)


def axes_of_sum(tensor: torch.Tensor, dims: Iterable[int] | None) -> tuple[int, ...]:
    """Return the numbers that `sum_scratch` needs, for the sum of a tensor over `dims`."""
    if tensor.dtype not in _FLOATS or not tensor.numel():
        return ()
    summed = {dim % tensor.ndim for dim in dims or range(tensor.ndim)}
    axes = [Axis(*axis) for axis in zip(tensor.shape, tensor.stride(), strict=True)]
    order = sorted(range(tensor.ndim), key=lambda dim: dim not in summed)
    numbers = [number for dim in order for number in axes[dim]]
    return (tensor.itemsize, len(summed), *numbers)


def sum_scratch(numbers: Sequence[int], gpu: Gpu) -> tuple[int, ...]:
    """Return the bytes that `gpu_reduce_kernel` needs where blocks share an output.

    Such blocks stage partial sums in global memory, and count in a semaphore who is done.
    """
    itemsize, n_summed, *flat = numbers
    axes = [Axis(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
    summed, kept = _merged(axes[:n_summed]), _merged(axes[n_summed:])
    while _size(summed) * _size(kept) * itemsize > _LARGEST_INDEX:
        _halve_outermost(summed, kept)
    inputs, outputs = _size(summed), _size(kept)
    if inputs == 1:
        return ()
    sums_rows = not kept or summed[0].stride < kept[0].stride
    vector, width, height = _block_shape(summed, kept, sums_rows=sums_rows)
    # Inputs that a block takes at a time, and outputs that it makes
    per_input, per_output = (width, 1) if sums_rows else (1, width)
    shares_rows = _ceil_div(inputs, per_input) >= min(height * 16, 256)
    if not shares_rows:
        return ()
    per_input *= height
    resident = gpu.multiprocessors * (gpu.threads // (width * height))
    grid = _ceil_div(outputs // vector, per_output)
    rounds = _ceil_div(inputs, per_input)
    if rounds < 256 or grid > resident:  # noqa: PLR2004
        return ()
    blocks = max(min(_ceil_div(resident, grid), _ceil_div(rounds, 16)), _ceil_div(rounds, 256))
    if blocks == 1:
        return ()
    staged = outputs * blocks * (1 if sums_rows else width * vector)
    return _ACCUMULATOR * staged, 4 * grid


class _BlockShape(NamedTuple):
    vector: int
    width: int
    height: int


def _block_shape(summed: list[Axis], kept: list[Axis], *, sums_rows: bool) -> _BlockShape:
    """Return the outputs per thread, and the threads of a block along both dimensions."""
    inputs, outputs = _size(summed), _size(kept)
    wide, high = (inputs, outputs) if sums_rows else (outputs, inputs)
    vector = 1
    if (summed if sums_rows else kept)[0].stride == 1:
        if not sums_rows:
            strides = [axis.stride for axis in (*summed, *kept[1:])]
            vector = math.gcd(_VECTOR, kept[0].size, *strides)
            wide //= vector
        elif wide >= 128 and len(summed) == 1:  # noqa: PLR2004
            wide //= _VECTOR
    most = _MAX_THREADS // vector
    wide, high = (min(most, _power_of_two(n)) for n in (wide, high))
    width = min(wide, _WARP)
    height = min(high, most // width)
    return _BlockShape(vector, min(wide, most // height), height)


def _merged(axes: Iterable[Axis]) -> list[Axis]:
    """Return axes from the innermost out, with those that lie in memory like one merged."""
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: axis.stride):
        if axis.size == 1:
            continue
        if merged and axis.stride == math.prod(merged[-1]):
            merged[-1] = Axis(merged[-1].size * axis.size, merged[-1].stride)
        else:
            merged.append(axis)
    return merged


def _halve_outermost(summed: list[Axis], kept: list[Axis]) -> None:
    """Halve the axis of the longest reach, as TensorIterator does beyond 32-bit indices."""
    axes = max((each for each in (summed, kept) if each), key=lambda each: math.prod(each[-1]))
    axes[-1] = Axis(_ceil_div(axes[-1].size, 2), axes[-1].stride)


def _size(axes: Iterable[Axis]) -> int:
    return math.prod(axis.size for axis in axes)


def _power_of_two(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
