"""Check that accumulating micro-batches reproduces one large batch: BatchNorm, and the gradient of two halves."""

from __future__ import annotations

import copy
import math
from collections.abc import MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# Of each parameter; None where the loss does not depend on it
Gradient: TypeAlias = "Sequence[torch.Tensor | None]"

# Times what the same batch changes when it is taken twice: less is the step's own chance
_CLEAR: Final = 3.0


@dataclass(frozen=True, slots=True)
class BatchNorms:
    """Layers that normalise by the batch they see.

    Args:
        alone: Those that see one micro-batch of one rank.
        together: Those that see the micro-batches of all ranks, by SyncBatchNorm.
    """

    alone: int
    together: int

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.alone + self.together > 0


@dataclass(frozen=True, slots=True)
class Splitting:
    """A batch whose gradient is not the mean of those of its halves: measured.

    Args:
        samples: In the batch.
        change: Distance of the two, as a share of the gradient of the whole.
        is_sum: Whether it is the sum of them instead.
    """

    samples: int
    change: float
    is_sum: bool


class UndecidedError(Exception):
    """The test can not tell, and why."""


def batch_norms(parts: Iterable[object]) -> BatchNorms:
    """Count the layers that use the statistics of a batch: those in train mode, or without running ones."""
    norms = [
        part
        for part in parts
        if isinstance(part, _BatchNorm)
        and (part.training or getattr(part, "running_mean", None) is None)
    ]
    together = sum(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    return BatchNorms(len(norms) - together, together)


@contextmanager
def without_dropout(module: torch.nn.Module) -> Iterator[None]:
    """Let no layer of torch's own drop anything; all else stays in its mode."""
    former: list[tuple[Any, str, Any]] = []
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            former.append((part, "training", part.training))
            part.training = False
        elif isinstance(part, (torch.nn.MultiheadAttention, torch.nn.RNNBase)):
            former.append((part, "dropout", part.dropout))
            part.dropout = 0.0
    try:
        yield
    finally:
        for part, name, value in former:
            setattr(part, name, value)


def split_gradient(
    gradient: Callable[[Any], Gradient], batch: Any, samples: int, threshold: float
) -> Splitting | None:
    """How far the mean gradient of two halves is from that of the batch; None where that is below the threshold.

    `gradient` may draw random numbers: where the same batch taken twice differs about as much, nothing is said. It is
    called three or four times, and two gradients are kept at a time.

    Raises:
        UndecidedError: The batch can not be split, or what is measured is no number, or chance.
    """
    half = samples // 2
    first = _cut(batch, samples, slice(0, half))
    second = _cut(batch, samples, slice(half, 2 * half))
    both = _sum(gradient(first), gradient(second))
    whole = gradient(_cut(batch, samples, slice(None)))
    size = _distance(whole, whole, 0.0)
    if not 0 < size < math.inf:
        raise UndecidedError(f"the gradient of {samples} samples has a norm of {size}")
    change = _distance(whole, both, 0.5) / size
    if not math.isfinite(change):
        raise UndecidedError("the gradient of half a batch is no number")
    if change <= threshold:
        return None
    is_sum = _distance(whole, both, 1.0) / size <= threshold
    del both
    again = _distance(whole, gradient(_cut(batch, samples, slice(None))), 1.0) / size
    if not _CLEAR * again < change:
        raise UndecidedError(
            f"the same batch gave gradients {again:.2g} apart, its halves {change:.2g}"
        )
    return Splitting(samples, change, is_sum)


def _cut(batch: Any, samples: int, rows: slice) -> Any:
    """Some samples of a batch, in tensors and containers of their own: a step may write into them."""
    if isinstance(batch, torch.Tensor):
        if batch.is_nested or batch.dim() == 0 or len(batch) != samples:
            raise UndecidedError(
                f"a tensor of shape {tuple(batch.shape)} is not one of {samples} samples"
            )
        return batch[rows].clone()
    if isinstance(batch, MutableMapping):
        cut = copy.copy(batch)
        cut.update({key: _cut(part, samples, rows) for key, part in batch.items()})
        return cut
    if isinstance(batch, list):
        if len(batch) == samples and all(isinstance(part, str) for part in batch):
            return batch[rows]
        return [_cut(part, samples, rows) for part in batch]
    if isinstance(batch, tuple):
        parts = [_cut(part, samples, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if batch is None:
        return None
    raise UndecidedError(f"a {type(batch).__name__} in a batch is not one of {samples} samples")


def _sum(one: Gradient, other: Gradient) -> Gradient:
    return [a if b is None else b if a is None else a + b for a, b in zip(one, other, strict=True)]


def _distance(one: Gradient, other: Gradient, weight: float) -> float:
    """The norm of one gradient less so much of the other."""
    squares = 0.0
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            left = a if a is not None else b
            share = 1.0 if a is not None else weight
            if left is not None:
                squares += share * share * left.double().square().sum().item()
        else:
            squares += (a.double() - weight * b.double()).square().sum().item()
    return math.sqrt(squares) if math.isfinite(squares) else squares
