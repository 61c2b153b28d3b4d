"""A batch as torch's own collate function makes it, repeated to a larger one."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["tiled"]


def tiled(batch: Any, samples: int, batch_size: int) -> Any:
    """What collating its samples over and over again, up to a batch size, would give; None where that is not known.

    Collating takes time for each sample; repeating what was collated takes next to none.

    Args:
        batch: What `torch.utils.data.default_collate` (torch 2.13) made of them.
        samples: How many it was made of.
        batch_size: How many it should be.
    """
    try:
        return _tiled(batch, samples, batch_size)
    except _UnknownError:
        # However deep it was met, the loader's own function has to do all of it
        return None


class _UnknownError(Exception):
    """Something that is not known to be one entry for each sample."""


def _tiled(part: Any, samples: int, batch_size: int) -> Any:
    def each(parts: Iterable[Any]) -> list[Any]:
        return [_tiled(one, samples, batch_size) for one in parts]

    kind = type(part)
    if kind is torch.Tensor and part.layout is torch.strided and part.dim():
        if len(part) != samples:
            raise _UnknownError
        return part[torch.arange(batch_size) % samples]
    if isinstance(part, MutableMapping):
        whole = copy.copy(part)
        whole.update(zip(part, each(part.values()), strict=True))
        return whole
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return kind(*each(part))
    if kind not in (list, tuple):
        raise _UnknownError
    if part and all(isinstance(entry, (str, bytes)) for entry in part):
        if len(part) != samples:
            raise _UnknownError
        return kind(islice(cycle(part), batch_size))
    return kind(each(part))
