"""Tensors of objects, and the storages that hold their bytes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def tensors_of(objects: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors of modules, gradients, optimizer states and containers."""
    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            for parameter in thing.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
            yield from thing.buffers()
        elif isinstance(thing, torch.optim.Optimizer):
            yield from tensors_of(tree_leaves(list(thing.state.values())))
        else:
            yield from (leaf for leaf in tree_leaves(thing) if isinstance(leaf, torch.Tensor))


def address_of(storage: torch.UntypedStorage) -> int:
    """Address of a storage, the same for all its handles; torch 2.13 has no public name for it."""
    return int(storage._cdata)


def storages_of(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor: several if it wraps others or is sparse, none if opaque."""
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter) and hasattr(kind, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):  # a DTensor names its mesh as well
                yield from storages_of(inner)
    elif torch.nn.parameter.is_lazy(tensor):
        return  # no memory yet
    elif tensor.layout is torch.strided:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # functorch wrappers and opaque tensors have no storage
        yield storage
    elif tensor.layout is torch.sparse_coo:
        yield from storages_of(tensor._indices())
        yield from storages_of(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from storages_of(tensor.crow_indices())
        yield from storages_of(tensor.col_indices())
        yield from storages_of(tensor.values())


def is_divided(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor, a class that takes seconds to import and then exists."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def storages_in(values: Any) -> Iterator[torch.UntypedStorage]:
    # Operators take and return tensors, and lists of them: faster than a walk of any tree
    if isinstance(values, torch.Tensor):
        yield from storages_of(values)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from storages_in(value)


def sizes_in(values: Any) -> dict[int, int]:
    """Bytes of each storage by its address."""
    return {address_of(storage): storage.nbytes() for storage in storages_in(values)}
