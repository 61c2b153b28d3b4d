"""Batches for trials: the largest samples, collated."""

from __future__ import annotations

import copy
import heapq
import time
from collections.abc import MutableMapping, Sized
from functools import cached_property
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any, Final

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
from autobatch._report.notes import Look
from autobatch.lightning._dataloaders import capture_order, sampler_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from autobatch._trials.snapshot import Snapshot
    from autobatch.lightning._dataloaders import Loaders


# How far to look for the largest samples
_MOST: Final = 1000  # samples
_SECONDS: Final = 5.0
_KEPT: Final = 64  # samples kept of those; larger batches repeat them
_FIRST: Final = 32  # samples kept as they came, of whatever size
_CHUNK: Final = 16  # samples read at once
_DEEP: Final = 4  # containers within containers that are looked into for a sample's size


def checked_worst_case(
    worst_case: Callable[[int], Any] | None,
) -> Callable[[int], Any] | None:
    """What was given, refused where it can not make a batch."""
    if worst_case is None or callable(worst_case):
        return worst_case
    raise ValueError(
        f"worst_case={worst_case!r} can not be called; give a function of a batch size that returns a batch."
    )


class Samples:
    """Batches of any size, collated from the largest samples of the loaders' data sets.

    Samples are read the way the loader reads: in a worker process where it has workers, so that the data set of this
    process stays as it is; else here, where the snapshot gives the data set's own attributes and generators back.

    Args:
        loaders: Whose data.
        snapshot: Gives back what reading changes.
        worst_case: The user's own word for the largest batch of a size, instead of a look.
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
        self._made: dict[int, int] = {}  # size of what that made, by batch size

    def batches(self, batch_size: int) -> Sequence[Any]:
        """What steps get on the host, one after another and over again: one batch, or one of each loader in turn."""
        with unobserved(), torch.no_grad():
            if self._worst_case is not None:
                batch = self._worst_case(batch_size)
                self._check_grows(batch_size, batch)
                return [batch]
            sizes = self._loaders.sizes_at(batch_size)
            parts = [source.batch(size) for source, size in zip(self._sources, sizes, strict=True)]
        if self._loaders.is_sequential:
            return parts
        return [self._loaders.structured(parts)]

    def ordinary(self, batch_size: int) -> Any:
        """A batch of samples as they come, large and small, each of them once; None where too few were read."""
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
        """Of the largest sample of each loader; nothing where the user has said what is largest."""
        if self._worst_case is not None:
            return ()
        return tuple(source.bytes_each for source in self._sources)

    def _check_grows(self, batch_size: int, batch: Any) -> None:
        self._made[batch_size] = size = _size(batch, _DEEP)
        for other, made in self._made.items():
            if other != batch_size and made == size:
                raise ValueError(
                    f"worst_case made as much data for {batch_size} samples as for {other}; it has to make a batch of "
                    "as many as it is asked for."
                )

    @property
    def look(self) -> Look | None:
        """What the look found, over all loaders; None where the user has said what is largest."""
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
    """One loader's samples."""

    def __init__(self, loader: DataLoader[Any], snapshot: Snapshot) -> None:
        self._loader = loader
        self._snapshot = snapshot

    def batch(self, batch_size: int) -> Any:
        """The largest samples, as the loader would collate them."""
        samples = self._largest.samples
        if batch_size > len(samples) and self._loader.collate_fn is default_collate:
            batch = tiled(self._collated(samples), len(samples), batch_size)
            if batch is not None:
                return batch
        return self._collated(islice(cycle(samples), batch_size))

    def ordinary(self, batch_size: int) -> Any:
        """Samples as they were read; None where those were fewer."""
        first = self._largest.first[:batch_size]
        return self._collated(first) if len(first) == batch_size else None

    def _collated(self, samples: Iterable[Any]) -> Any:
        self._snapshot.capture_light(self._loader.collate_fn)
        # Copies, since a collate function may take its samples apart
        return self._loader.collate_fn([_unshared(sample) for sample in samples])

    @property
    def bytes_each(self) -> int:
        return max((_size(each, _DEEP) for each in self._largest.samples), default=0)

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
    def _largest(self) -> _Largest:
        largest = _Largest()
        began = time.monotonic()
        for chunk in self._chunks():
            largest.add(chunk)
            if largest.read >= _MOST or time.monotonic() - began > _SECONDS:
                break
        return largest

    def _chunks(self) -> Iterator[list[Any]]:
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset):
            # In a worker always: here, what a stream has given would be missing in training
            yield from self._reader(batch_size=_CHUNK)
            return
        capture_order(self._loader, self._snapshot)
        indices = _scattered(list(islice(self._indices(), _MOST)))
        chunks = [indices[at : at + _CHUNK] for at in range(0, len(indices), _CHUNK)]
        if self._loader.num_workers:
            yield from self._reader(batch_sampler=chunks)
            return
        self._snapshot.capture_light(*_layers(dataset))
        for chunk in chunks:
            if hasattr(dataset, "__getitems__"):
                yield list(dataset.__getitems__(chunk))
            else:
                yield [dataset[index] for index in chunk]

    def _indices(self) -> Iterable[Any]:
        """Which samples to read: spread over the data set, or the first that a sampler of the user's names."""
        batches = self._loader.batch_sampler
        sampler = sampler_of(self._loader)
        if type(batches) is not BatchSampler:
            return chain.from_iterable(batches or ())
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler  # type: ignore[no-any-return]  # an iterable of indices
        length = len(sampler.data_source)
        return (at * length // _MOST for at in range(_MOST)) if length > _MOST else range(length)

    def _reader(self, **batches: Any) -> DataLoader[Any]:
        """One worker process that reads lists of samples."""
        return DataLoader(
            self._loader.dataset,
            **batches,
            num_workers=1,
            collate_fn=list,
            worker_init_fn=self._loader.worker_init_fn,
            multiprocessing_context=self._loader.multiprocessing_context,
            generator=torch.Generator(),
        )


class _Largest:
    """The largest samples seen, the largest first; of equally large ones those seen first."""

    def __init__(self) -> None:
        self.read = 0
        self.is_even = True  # all of one size so far
        self.first: list[Any] = []
        self._heap: list[tuple[int, int, Any]] = []

    def add(self, samples: Iterable[Any]) -> None:
        for sample in samples:
            entry = (_size(sample, _DEEP), -self.read, sample)
            self.is_even &= not self._heap or entry[0] == self._heap[0][0]
            self.read += 1
            if len(self.first) < _FIRST:
                entry = _held(entry)
                self.first.append(entry[2])
                heapq.heappush(self._heap, entry)  # it keeps more than those
            elif len(self._heap) < _KEPT:
                heapq.heappush(self._heap, _held(entry))
            elif entry[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, _held(entry))

    @property
    def samples(self) -> list[Any]:
        return [sample for *_, sample in sorted(self._heap, key=lambda e: e[:2])][::-1]


def _held(entry: tuple[int, int, Any]) -> tuple[int, int, Any]:
    """The entry with tensors of its own: what comes from a worker holds an open file for each."""
    size, order, sample = entry
    return size, order, _unshared(sample, torch.Tensor.clone)


def _scattered(indices: list[Any]) -> list[Any]:
    """The same in another order, so that any first part of it is spread over the whole."""
    bits = max(1, (len(indices) - 1).bit_length())
    order = sorted(range(len(indices)), key=lambda at: int(f"{at:0{bits}b}"[::-1], base=2))
    return [indices[at] for at in order]


def _size(sample: Any, depth: int) -> int:
    """How much data a sample holds, in a measure of its own: bytes of tensors and arrays, characters, numbers."""
    if isinstance(sample, torch.Tensor):
        return sample.numel() * sample.element_size()
    nbytes = getattr(sample, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if depth == 0:
        return 1
    if isinstance(sample, dict):
        return sum(_size(part, depth - 1) for part in sample.values())
    if isinstance(sample, (list, tuple)):
        return sum(_size(part, depth - 1) for part in sample)
    if hasattr(sample, "__dict__"):
        return sum(_size(part, depth - 1) for part in vars(sample).values())
    return 1


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same storage; copying one costs ten times as much, and large batches are many samples."""
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    has_more = (
        tensor.requires_grad
        or tensor.__dict__
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
    )
    if is_plain and not has_more:
        where = tensor.storage_offset(), tensor.size(), tensor.stride()
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *where)
    return copy.copy(tensor)


def _unshared(sample: Any, copied: Callable[[torch.Tensor], torch.Tensor] = _alias) -> Any:
    """A sample in containers of its own; what they contain is shared, but for tensors as `copied` has it."""
    if isinstance(sample, dict):
        unshared = copy.copy(sample)
        unshared.update((key, _unshared(part, copied)) for key, part in sample.items())
        return unshared
    if isinstance(sample, list):
        return [_unshared(part, copied) for part in sample]
    if type(sample) is tuple:
        return tuple(_unshared(part, copied) for part in sample)
    if isinstance(sample, torch.Tensor):
        return copied(sample)
    return copy.copy(sample)


def _layers(dataset: Any) -> list[Any]:
    """A data set, those that it wraps (Subset, ConcatDataset and their like), and its transforms."""
    held = getattr(dataset, "__dict__", {}).values()  # a plain list has none
    parts = [part for part in held if hasattr(part, "__dict__")]
    inner = [*parts, *(getattr(dataset, "datasets", None) or ())]
    wrapped = [part for part in inner if isinstance(part, Dataset)]
    return [dataset, *parts, *(layer for part in wrapped for layer in _layers(part))]


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
