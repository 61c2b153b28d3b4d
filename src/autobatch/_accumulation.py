"""Check that accumulating micro-batches reproduces one large batch: BatchNorm, and two halves."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from autobatch._trials.batches import cut, is_plain_list, leaves
from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# One tensor for each parameter; None if the loss does not depend on it
Gradient: TypeAlias = "Sequence[torch.Tensor | None]"

# A difference counts if it is more than this many times the difference between two gradients of
# the same batch, which is due to random numbers in the step
_TIMES_RANDOM: Final = 3.0


@dataclass(frozen=True, slots=True)
class BatchNorms:
    """Number of layers that normalize with the statistics of the current batch."""

    alone: int  # layers that see one micro-batch of one rank
    together: int  # SyncBatchNorm layers, which see the micro-batches of all ranks

    def __bool__(self) -> bool:
        """Return True if there are any."""
        return self.alone + self.together > 0


@dataclass(frozen=True, slots=True)
class Splitting:
    """Measured difference between the gradient of a batch and the mean gradient of its halves."""

    samples: int
    change: float  # norm of the difference, as a share of the norm of the whole gradient
    is_sum: bool  # the whole gradient is the sum of those of the halves instead


class UndecidedError(Exception):
    """The test of splitting has no result; the message is the reason."""


def batch_norms(parts: Iterable[object]) -> BatchNorms:
    """Count the layers that use batch statistics: in train mode, or without running statistics."""
    layers = [part for part in parts if isinstance(part, _BatchNorm)]
    norms = [each for each in layers if each.training or each.running_mean is None]
    together = sum(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    return BatchNorms(len(norms) - together, together)


@contextmanager
def without_dropout(module: torch.nn.Module) -> Iterator[None]:
    """Turn off dropout in the layers of torch; everything else stays in its mode."""
    with Undo() as undo:
        for part in module.modules():
            if isinstance(part, _DropoutNd):
                undo.add(partial(setattr, part, "training", part.training))
                part.training = False
            elif isinstance(part, (torch.nn.MultiheadAttention, torch.nn.RNNBase)):
                undo.add(partial(setattr, part, "dropout", part.dropout))
                part.dropout = 0.0
        yield


def split_gradient(
    gradient: Callable[[Any], Gradient], batch: Any, samples: int, threshold: float
) -> Splitting | None:
    """Compare gradients by `compare_halves`, in a batch of which every leaf has a row per sample."""
    _check_splittable(batch, samples)
    return compare_halves(gradient, batch, samples, threshold)


def compare_halves(
    gradient: Callable[[Any], Gradient], batch: Any, samples: int, threshold: float
) -> Splitting | None:
    """Compare the gradients of a batch and its halves; leaves without rows stay as they are.

    `gradient` is called three or four times, and two gradients are kept at a time. It may draw
    random numbers: a difference that is not clear of their effect is no result.

    Returns:
        None if the difference is at most `threshold`.

    Raises:
        UndecidedError: A gradient is not finite, or the difference may be random.
    """
    half = samples // 2
    first = cut(batch, samples, slice(0, half))
    second = cut(batch, samples, slice(half, 2 * half))
    both = _sum(gradient(first), gradient(second))
    whole = gradient(cut(batch, samples, slice(None)))
    norm = _distance(whole, whole, 0.0)
    if not 0 < norm < math.inf:
        raise UndecidedError(f"the gradient of {samples} samples has a norm of {norm}")
    change = _distance(whole, both, 0.5) / norm
    if not math.isfinite(change):
        raise UndecidedError("the gradient of half a batch is not finite")
    if change <= threshold:
        return None
    is_sum = _distance(whole, both, 1.0) / norm <= threshold
    del both
    repeated = gradient(cut(batch, samples, slice(None)))
    random = _distance(whole, repeated, 1.0) / norm
    if not _TIMES_RANDOM * random < change:
        raise UndecidedError(
            f"the same batch gave gradients {random:.2g} apart, its halves {change:.2g}"
        )
    return Splitting(samples, change, is_sum)


def _check_splittable(batch: Any, samples: int) -> None:
    """Raise `UndecidedError` for anything in a batch that is not one row for each sample."""
    for leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor):
            has_rows = leaf.dim() > 0 and not leaf.is_nested and len(leaf) == samples
        else:
            parts = leaf if is_plain_list(leaf) else [leaf]
            is_texts = len(parts) == samples and all(isinstance(part, str) for part in parts)
            has_rows = is_texts or all(part is None for part in parts)
        if not has_rows:
            raise UndecidedError(f"a {type(leaf).__name__} in a batch has no {samples} rows")


def _sum(one: Gradient, other: Gradient) -> Gradient:
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def _distance(one: Gradient, other: Gradient, weight: float) -> float:
    """Return the norm of `one - weight * other`; a missing gradient counts as zero."""
    squares = 0.0
    for a, b in zip(one, other, strict=True):
        if a is not None or b is not None:
            left, right = (0 if each is None else each.double() for each in (a, b))
            squares += torch.as_tensor(left - weight * right).square().sum().item()
    return math.sqrt(squares) if math.isfinite(squares) else squares
