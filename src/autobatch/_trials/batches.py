"""Walk through the containers of a batch: its leaves, its rows, some of its samples."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sized
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Neither torch.utils._pytree nor apply_to_collection of lightning_utilities serves: the first takes
# dataclasses and mappings of other classes for leaves, the second shows leaves of given types only,
# and both take a list of strings apart, which is one leaf with a row for each sample.

_PLAIN: Final = (int, float, complex, bool, str, bytes, type(None))


def leaves(batch: Any) -> Iterator[Any]:
    """Yield everything in the containers of a batch; a list of plain values is one leaf."""
    parts = _parts(batch)
    if parts is None:
        yield batch
        return
    for part in parts:
        yield from leaves(part)


def map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    """Return a batch in containers of its own, with `change(leaf)` in place of each leaf."""
    parts = _parts(batch)
    if parts is None:
        return change(batch)
    return _rebuilt(batch, [map_leaves(change, part) for part in parts])


def row_counts(batch: Any) -> set[int]:
    """Return the number of rows of every tensor: the samples of the batch, if all agree."""
    tensors = (leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor))
    return {len(tensor) for tensor in tensors if tensor.ndim}


def sample_counts(batch: Any) -> list[int | None]:
    """Return the samples of a batch by each way to count them; None where one does not apply.

    These are the batch size that the batch itself gives, as those of graphs and TensorDicts, the
    rows of its tensors if all agree, and its length, as for a list of samples.
    """
    rows = row_counts(batch)
    own: Any = getattr(batch, "num_graphs", None) or getattr(batch, "batch_size", None)
    if isinstance(own, tuple) and own:
        own = own[0]
    return [
        own if isinstance(own, int) else None,
        rows.pop() if len(rows) == 1 else None,
        len(batch) if isinstance(batch, Sized) and getattr(batch, "ndim", None) != 0 else None,
    ]


def rows_of_each(counts: list[int | None], samples: int) -> int:
    """Return the rows of each of the samples, from the `sample_counts` of their batch.

    It is 1 if the batch itself gives its size, as graphs do, or if the rows do not divide evenly.
    """
    own, rows, _ = counts
    if own is not None or not rows or rows % samples:
        return 1
    return rows // samples


def listed(counts: set[int]) -> str:
    """Return numbers of rows as words: "3, 4", or "no"."""
    return ", ".join(map(str, sorted(counts))) or "no"


class NotDividedError(Exception):
    """A batch that cannot be divided, or a module not measured in parts; with the reason."""


def divisible_samples(batch: Any) -> int:
    """Return the samples of a batch of tensors in plain containers, each with a row per sample.

    Raises:
        NotDividedError: The batch cannot be divided.
    """
    known = (torch.Tensor, *_PLAIN)
    if not all(isinstance(leaf, known) or is_plain_list(leaf) for leaf in leaves(batch)):
        raise NotDividedError("its batches are not of tensors in plain containers")
    tensors = (leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor))
    if any(each.is_nested or each.layout is not torch.strided for each in tensors):
        raise NotDividedError("its batches have sparse or nested tensors")
    counts = row_counts(batch)
    if len(counts) != 1:
        raise NotDividedError(f"the tensors in its batches have {listed(counts)} rows")
    (samples,) = counts
    if samples < 2:  # noqa: PLR2004 -- two halves
        raise NotDividedError("its batches are of one sample")
    return samples


def cut(batch: Any, samples: int, rows: slice) -> Any:
    """Return some rows of a batch of `samples`, in copies: a step may write into its tensors."""
    views = view(batch, samples, rows)
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, views)


def view(batch: Any, samples: int, rows: slice) -> Any:
    """Return some rows of a batch of `samples`, in the same memory."""

    def view_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[rows] if leaf.ndim else leaf
        return leaf[rows] if is_plain_list(leaf) and len(leaf) == samples else leaf

    return map_leaves(view_leaf, batch)


def is_plain_list(value: Any) -> bool:
    """Check for a list or tuple of numbers and texts, such as the names of the samples."""
    is_list = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
    return is_list and all(isinstance(each, _PLAIN) for each in value)


def _parts(batch: Any) -> Sequence[Any] | None:
    """Return the contents of a container; None for a leaf."""
    if isinstance(batch, torch.Tensor):
        return None  # at once: abstract classes take their time
    if isinstance(batch, (list, tuple)):
        if batch and isinstance(batch[0], torch.Tensor):
            return batch
        return None if is_plain_list(batch) else batch
    if isinstance(batch, MutableMapping):
        return list(batch.values())
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, name) for name in _field_names(batch)]
    return None


def _field_names(batch: Any) -> list[str]:
    """Return the fields of a dataclass that have a value."""
    return [field.name for field in fields(batch) if hasattr(batch, field.name)]


def _rebuilt(container: Any, parts: Sequence[Any]) -> Any:
    """Return a container of the same kind with other contents.

    No constructor runs: it may take other arguments, or change the contents a second time.
    """
    if isinstance(container, tuple):
        kind = type(container)
        # Results of torch, as of `max`, are made by their constructor alone
        return kind(parts) if hasattr(kind, "n_fields") else tuple.__new__(kind, parts)
    if isinstance(container, list):
        items = copy.copy(container)
        items[:] = parts
        return items
    if isinstance(container, MutableMapping):
        # A copy keeps a default factory and attributes; item by item, since ModelOutput of
        # transformers refuses update()
        mapping = copy.copy(container)
        if not isinstance(mapping, dict):  # the copy may share the dict that holds its items
            inner = vars(mapping)
            inner.update({name: {**each} for name, each in inner.items() if type(each) is dict})
        for key, part in zip(container, parts, strict=True):
            mapping[key] = part
        return mapping
    record = copy.copy(container)
    for name, part in zip(_field_names(container), parts, strict=True):
        object.__setattr__(record, name, part)  # of a frozen one as well
    return record
