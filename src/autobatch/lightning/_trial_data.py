"""Batches for trials: the largest samples, collated."""

from __future__ import annotations

import copy
import heapq
import time
from collections.abc import Sized
from functools import cached_property
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from autobatch._memory.ledger import unobserved
from autobatch._report.result import Look
from autobatch._trials.batches import map_leaves
from autobatch.lightning._batch_size import sampler_of
from autobatch.lightning._dataloaders import capture_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from autobatch._trials.snapshot import Snapshot
    from autobatch.lightning._dataloaders import Loaders

# Samples are read up to either limit
_MAX_READ: Final = 1000  # samples
_MAX_SECONDS: Final = 5.0
_READ_AT_ONCE: Final = 16  # samples between two looks at the clock
_LARGEST_KEPT: Final = 64  # samples; larger batches repeat them
_FIRST_KEPT: Final = 32  # samples in their own order, of any size
_SIZE_DEPTH: Final = 4  # nested containers that count for the size of a sample


def checked_worst_case(
    worst_case: Callable[[int], Any] | None,
) -> Callable[[int], Any] | None:
    """Return `worst_case`; `ValueError` if it is not a function."""
    if worst_case is None or callable(worst_case):
        return worst_case
    raise ValueError(
        f"worst_case={worst_case!r} cannot be called; "
        "give a function of a batch size that returns a batch."
    )


class Samples:
    """Batches of any size, collated from the largest samples of the loaders' data sets.

    Samples are read as the loader reads them. With workers a worker process reads, and the data set
    of this process stays as it is. Otherwise this process reads, and the snapshot restores the
    attributes and generators of the data set.

    Args:
        loaders: The loaders.
        snapshot: Restores everything that reading changes.
        worst_case: The user's function for the largest batch of a size; nothing is read then.
    """

    def __init__(
        self,
        loaders: Loaders,
        snapshot: Snapshot,
        worst_case: Callable[[int], Any] | None = None,
    ) -> None:
        self._loaders = loaders
        self._sources = [_Source(loader, snapshot) for loader in loaders.each]
        self._worst_case = worst_case
        self._worst_case_data: dict[int, int] = {}  # amount of data by batch size

    def batches(self, batch_size: int) -> Sequence[Any]:
        """Return the batches that steps take in turn: one, or one of each sequential loader."""
        with unobserved(), torch.no_grad():
            if self._worst_case is not None:
                batch = self._worst_case(batch_size)
                self._check_growth(batch_size, batch)
                return [batch]
            sizes = self._loaders.sizes_at(batch_size)
            parts = [source.batch(size) for source, size in zip(self._sources, sizes, strict=True)]
        if self._loaders.is_sequential:
            return parts
        return [self._loaders.structured(parts)]

    def ordinary(self, batch_size: int) -> Any:
        """Return a batch of samples in reading order, each once; None if too few were read."""
        with unobserved(), torch.no_grad():
            if self._worst_case is not None:
                return self._worst_case(batch_size)
            sizes = self._loaders.sizes_at(batch_size)
            parts = [
                source.ordinary(size) for source, size in zip(self._sources, sizes, strict=True)
            ]
        if any(part is None for part in parts):
            return None
        return self._loaders.structured(parts)

    @property
    def bytes_each(self) -> tuple[int, ...]:
        """Size of the largest sample of each loader; empty with a `worst_case`."""
        if self._worst_case is not None:
            return ()
        return tuple(source.bytes_each for source in self._sources)

    def _check_growth(self, batch_size: int, batch: Any) -> None:
        data = _data_size(batch, _SIZE_DEPTH)
        self._worst_case_data[batch_size] = data
        for other, other_data in self._worst_case_data.items():
            if other != batch_size and other_data == data:
                raise ValueError(
                    f"worst_case made as much data for {batch_size} samples as for {other}; "
                    "it has to make a batch of the size it is called with."
                )

    @property
    def look(self) -> Look | None:
        """Number and sizes of the samples read, over all loaders; None with a `worst_case`."""
        if self._worst_case is not None:
            return None
        found = [source.look for source in self._sources]
        known = [each.among for each in found if each.among is not None]
        return Look(
            read=sum(each.read for each in found),
            among=sum(known) if len(known) == len(found) else None,
            is_even=all(each.is_even for each in found),
        )


class _Source:
    """Samples of one loader."""

    def __init__(self, loader: DataLoader[Any], snapshot: Snapshot) -> None:
        self._loader = loader
        self._snapshot = snapshot

    def batch(self, batch_size: int) -> Any:
        """Return the largest samples, collated by the loader's function."""
        samples = self._largest.samples
        if batch_size > len(samples) and self._loader.collate_fn is default_collate:
            batch = repeated(self._collated(samples), len(samples), batch_size)
            if batch is not None:
                return batch
        return self._collated(islice(cycle(samples), batch_size))

    def ordinary(self, batch_size: int) -> Any:
        """Return the first samples, collated; None if fewer were read."""
        first = self._largest.first[:batch_size]
        return self._collated(first) if len(first) == batch_size else None

    def _collated(self, samples: Iterable[Any]) -> Any:
        self._snapshot.capture_light(self._loader.collate_fn)
        # Copies, since a collate function may take its samples apart
        return self._loader.collate_fn([_copied(sample, _alias) for sample in samples])

    @property
    def bytes_each(self) -> int:
        return max((_data_size(each, _SIZE_DEPTH) for each in self._largest.samples), default=0)

    @property
    def look(self) -> Look:
        return Look(self._largest.read, self._total, self._largest.is_even)

    @cached_property
    def _total(self) -> int | None:
        if isinstance(self._loader.dataset, IterableDataset):
            return None
        sampler = sampler_of(self._loader)
        return len(sampler) if isinstance(sampler, Sized) else None

    @cached_property
    def _largest(self) -> _LargestSamples:
        largest = _LargestSamples()
        began = time.monotonic()
        for chunk in self._chunks():
            largest.add(chunk)
            if largest.read >= _MAX_READ or time.monotonic() - began > _MAX_SECONDS:
                break
        return largest

    def _chunks(self) -> Iterator[list[Any]]:
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset):
            # Always in a worker: samples of a stream that this process reads are lost to training
            yield from self._worker(batch_size=_READ_AT_ONCE)
            return
        capture_order(self._loader, self._snapshot)
        indices = _spread(list(islice(self._indices(), _MAX_READ)))
        chunks = [indices[at : at + _READ_AT_ONCE] for at in range(0, len(indices), _READ_AT_ONCE)]
        if self._loader.num_workers:
            yield from self._worker(batch_sampler=chunks)
            return
        self._snapshot.capture_light(*_layers(dataset))
        for chunk in chunks:
            if hasattr(dataset, "__getitems__"):
                yield list(dataset.__getitems__(chunk))
            else:
                yield [dataset[index] for index in chunk]

    def _indices(self) -> Iterable[Any]:
        """Return indices spread over the data set, or the first of a user's sampler."""
        batches = self._loader.batch_sampler
        sampler = sampler_of(self._loader)
        if type(batches) is not BatchSampler:
            return chain.from_iterable(batches or ())
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler  # type: ignore[no-any-return]  # an iterable of indices
        length = len(sampler.data_source)
        if length <= _MAX_READ:
            return range(length)
        return (at * length // _MAX_READ for at in range(_MAX_READ))

    def _worker(self, **batches: Any) -> DataLoader[Any]:
        """Return a loader of lists of samples with one worker process."""
        return DataLoader(
            self._loader.dataset,
            **batches,
            num_workers=1,
            collate_fn=list,
            worker_init_fn=self._loader.worker_init_fn,
            multiprocessing_context=self._loader.multiprocessing_context,
            generator=torch.Generator(),
        )


class _Sized(NamedTuple):
    """A sample that was read; the largest compares highest, and then the first that was read."""

    size: int
    order: int  # 0, -1, -2, ...
    sample: Any


class _LargestSamples:
    """The largest samples that were read, the largest first; of the same size the first ones."""

    def __init__(self) -> None:
        self.read = 0
        self.is_even = True  # all of one size so far
        self.first: list[Any] = []
        self._heap: list[_Sized] = []  # no two are equal: samples are not compared

    def add(self, samples: Iterable[Any]) -> None:
        for sample in samples:
            entry = _Sized(_data_size(sample, _SIZE_DEPTH), -self.read, sample)
            self.is_even &= not self._heap or entry.size == self._heap[0].size
            self.read += 1
            if len(self.first) < _FIRST_KEPT:
                entry = _cloned(entry)
                self.first.append(entry.sample)
                heapq.heappush(self._heap, entry)  # which keeps more than the first
            elif len(self._heap) < _LARGEST_KEPT:
                heapq.heappush(self._heap, _cloned(entry))
            elif entry[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, _cloned(entry))

    @property
    def samples(self) -> list[Any]:
        return [entry.sample for entry in sorted(self._heap, reverse=True)]


def _cloned(entry: _Sized) -> _Sized:
    """Clone the tensors of an entry: a tensor from a worker holds an open file."""
    return entry._replace(sample=_copied(entry.sample, torch.Tensor.clone))


def _spread(indices: list[Any]) -> list[Any]:
    """Reorder indices so that any first part of them is spread over the whole."""
    bits = max(1, (len(indices) - 1).bit_length())
    order = sorted(range(len(indices)), key=lambda at: int(f"{at:0{bits}b}"[::-1], base=2))
    return [indices[at] for at in order]


def _data_size(sample: Any, depth: int) -> int:
    """Return the amount of data in a sample: bytes of tensors and arrays, characters, numbers."""
    if isinstance(sample, torch.Tensor):
        return sample.numel() * sample.element_size()
    nbytes = getattr(sample, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(sample, (str, bytes)):
        return len(sample)
    parts = _contents(sample)
    if depth == 0 or parts is None:
        return 1
    return sum(_data_size(part, depth - 1) for part in parts)


def _contents(sample: Any) -> Iterable[Any] | None:
    """Return the parts of a container or the attributes of an object; None for a plain value."""
    if isinstance(sample, dict):
        return sample.values()
    if isinstance(sample, (list, tuple)):
        return sample
    return vars(sample).values() if hasattr(sample, "__dict__") else None


def _copied(sample: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a sample in containers of its own, with copies of its tensors."""

    def copy_leaf(leaf: Any) -> Any:
        return copy_tensor(leaf) if isinstance(leaf, torch.Tensor) else copy.copy(leaf)

    return map_leaves(copy_leaf, sample, is_leaf=_is_copied_whole)


def _is_copied_whole(part: Any) -> bool:
    """Check for a class that may do more than hold parts, as a dataclass or TensorDict."""
    return not isinstance(part, (dict, list)) and type(part) is not tuple


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor of the same storage, ten times as fast as a copy of a plain tensor.

    Large batches are many samples.
    """
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    has_more = (
        tensor.requires_grad
        or tensor.__dict__
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
    )
    if is_plain and not has_more:
        view = tensor.storage_offset(), tensor.size(), tensor.stride()
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *view)
    return copy.copy(tensor)


def _layers(dataset: Any) -> list[Any]:
    """Return a data set, its transforms, and the data sets it wraps, as Subset does."""
    attributes = getattr(dataset, "__dict__", {}).values()  # a plain list has none
    parts = [part for part in attributes if hasattr(part, "__dict__")]
    inner = [*parts, *(getattr(dataset, "datasets", None) or ())]
    wrapped = [part for part in inner if isinstance(part, Dataset)]
    return [dataset, *parts, *(layer for part in wrapped for layer in _layers(part))]


def repeated(batch: Any, samples: int, batch_size: int) -> Any:
    """Repeat the samples of a collated batch up to a batch size; None if that is not possible.

    The result is the batch that collating the repeated samples would give. Collating takes time
    for each sample, and repeating next to none.

    Args:
        batch: A batch made by `torch.utils.data.default_collate` (torch 2.13).
        samples: Number of samples in it.
        batch_size: Number of samples in the result.
    """

    def repeat_leaf(leaf: Any) -> Any:
        if type(leaf) is torch.Tensor and leaf.layout is torch.strided and leaf.dim():
            if len(leaf) == samples:
                return leaf[torch.arange(batch_size) % samples]
        elif type(leaf) in (list, tuple):
            if not leaf:
                return leaf
            if len(leaf) == samples and all(isinstance(entry, (str, bytes)) for entry in leaf):
                return type(leaf)(islice(cycle(leaf), batch_size))
        raise _NotRepeatableError

    try:
        return map_leaves(repeat_leaf, batch)
    except _NotRepeatableError:
        # However deep it is, the loader's own function has to collate the whole batch
        return None


class _NotRepeatableError(Exception):
    """A leaf without one entry for each sample."""
