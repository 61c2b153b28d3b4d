"""Batches of one loader at any size, as its own iteration gives them: of the largest samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from autobatch._loaders.batch_size import changed_batch_size
from autobatch._loaders.epochs import take_iterator
from autobatch._loaders.remaking import Remaking, has_torch_iteration, sampler_of
from autobatch._report.result import Look
from autobatch._trials.batches import rows_of_each, sample_counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._loaders.batch_size import SetBatchSize

# Samples are read up to either limit
_MAX_READ: Final = 1000  # samples
_MAX_SECONDS: Final = 5.0
_READ_AT_ONCE: Final = 16  # samples between two looks at the clock
LARGEST_KEPT: Final = 64  # samples; larger batches repeat them
_MAX_BATCHES: Final = 8  # of which the largest is taken, where a loader makes them its own way
_MAX_BATCHES_SECONDS: Final = 1.0
_MAX_LISTED: Final = 4096  # batches of indices, to choose from over the whole epoch
_SIZE_DEPTH: Final = 4  # nested containers that count for the size of a sample


@dataclass(frozen=True, slots=True)
class Seen:
    """Samples that were read."""

    look: Look  # number and sizes
    bytes_each: int  # size of the largest
    are_collated: bool  # True if batches of any samples can be made


class Reading(Protocol):
    """Reads batches of one loader. That may change the loader and its data."""

    def seen(self) -> Seen:
        """Read some samples for their sizes."""

    def largest(self, batch_size: int) -> Any:
        """Return a batch of the largest samples."""

    def counts(self, batch_size: int) -> list[list[int | None]]:
        """Return the `sample_counts` of some batches; of none where all have the size for sure."""

    def first(self, batch_size: int) -> Any:
        """Return a batch of samples in reading order, each once; None if there are too few."""


def reading_of(loader: DataLoader[Any], setter: SetBatchSize | None) -> Reading:
    """Prepare a loader of which nothing else is to be read, and return the way to read it.

    One worker is enough, and it lives on, since each batch size starts an iteration. Batches are
    not pinned: that needs CUDA, which a forked process cannot use.
    """
    loader.num_workers = min(1, loader.num_workers)
    loader.pin_memory = False
    take_iterator(loader)
    vars(loader).update(persistent_workers=loader.num_workers > 0)  # DataLoader refuses assignment
    if setter is None and has_torch_iteration(loader):
        if isinstance(loader.dataset, IterableDataset):
            return _OfStream(loader)
        if type(loader.batch_sampler) is BatchSampler:
            return _OfDataSet(loader)
    return _AsIterated(loader, setter)


def alike(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a loader of the same class and attributes, but for some.

    `copy.copy` would take it apart as for a pickle, which its class may refuse.
    """
    made = object.__new__(type(loader))
    vars(made).update(vars(loader), **changes)
    return made


class _OfDataSet:
    """Reads samples by their indices; the loader itself makes batches of the largest."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._asked: list[list[Any]] = []  # indices of the batch to make
        self._asking = alike(loader, batch_sampler=self._asked)

    def seen(self) -> Seen:
        sampler = sampler_of(self._loader)
        among = len(sampler) if isinstance(sampler, Sized) else None
        return _seen(self._sizes, among, are_collated=True)

    def largest(self, batch_size: int) -> Any:
        largest = [self._indices[at] for at in _largest(self._sizes)]
        return self._batch(islice(cycle(largest), batch_size))

    def first(self, batch_size: int) -> Any:
        if len(self._sizes) < batch_size:
            return None
        return self._batch(self._indices[:batch_size])

    def counts(self, batch_size: int) -> list[list[int | None]]:
        return []

    def _batch(self, indices: Iterable[Any]) -> Any:
        self._asked[:] = [list(indices)]
        return next(iter(self._asking))

    @cached_property
    def _sizes(self) -> list[int]:
        indices = self._indices
        chunks = [indices[at : at + _READ_AT_ONCE] for at in range(0, len(indices), _READ_AT_ONCE)]
        return _sizes_in(self._loader, self._loader.num_workers, batch_sampler=chunks)

    @cached_property
    def _indices(self) -> list[Any]:
        """Indices spread over the data set, or the first of a user's sampler."""
        sampler = sampler_of(self._loader)
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return _spread(list(islice(sampler, _MAX_READ)))
        length = len(sampler.data_source)
        if length <= _MAX_READ:
            return _spread(list(range(length)))
        return _spread([at * length // _MAX_READ for at in range(_MAX_READ)])


class _OfStream:
    """Reads a stream for its sizes, and again for its largest samples, of which batches are made.

    Sizes are read in a worker, even if the loader has none: a stream may be read once only.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def seen(self) -> Seen:
        return _seen(self._sizes, None, are_collated=True)

    def largest(self, batch_size: int) -> Any:
        return self._batch(self._largest, batch_size)

    def first(self, batch_size: int) -> Any:
        if len(self._sizes) < batch_size:
            return None
        return self._batch(self._of(range(batch_size)), batch_size)

    def counts(self, batch_size: int) -> list[list[int | None]]:
        return []

    def _batch(self, loader: DataLoader[Any], batch_size: int) -> Any:
        with changed_batch_size(loader, batch_size, None):
            for batch in loader:
                return batch
        raise _no_batch(batch_size)

    @cached_property
    def _sizes(self) -> list[int]:
        return _sizes_in(self._loader, 1, batch_size=_READ_AT_ONCE)

    @cached_property
    def _largest(self) -> DataLoader[Any]:
        return self._of(_largest(self._sizes))

    def _of(self, positions: Sequence[int]) -> DataLoader[Any]:
        """Return the loader with some samples of its stream only."""
        return alike(self._loader, dataset=_Repeating(self._loader.dataset, positions))


class _Repeating(IterableDataset[Any]):
    """Samples at some positions of a stream, again and again."""

    def __init__(self, dataset: Any, positions: Sequence[int]) -> None:
        self._dataset = dataset
        self._positions = positions
        self._samples: dict[int, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        if not self._samples:
            wanted = set(self._positions)
            read = enumerate(islice(self._dataset, max(wanted, default=-1) + 1))
            self._samples = {at: sample for at, sample in read if at in wanted}
        kept = [self._samples[at] for at in self._positions if at in self._samples]
        for sample in cycle(kept):
            try:
                yield copy.deepcopy(sample)  # a collate function may take it apart
            except Exception:  # whatever the sample holds, the collate function can handle it
                yield sample


class _AsIterated:
    """Reads batches as the loader makes them, and takes the largest.

    Where only the batch sampler is the user's, its batches of a whole epoch are looked through.
    """

    def __init__(self, loader: DataLoader[Any], setter: SetBatchSize | None) -> None:
        self._loader = loader
        self._setter = setter
        # Of a batch; the user's function may count in another unit
        own = getattr(loader.batch_sampler, "batch_size", None)
        self._own = own if setter is None or isinstance(setter, Remaking) else None

    def seen(self) -> Seen:
        sizes: list[int] = []
        largest = 0
        for batch in _within(self._spread(), _MAX_SECONDS):
            nbytes, counts = data_size(batch), sample_counts(batch)
            samples = next(filter(None, counts), 1)
            samples //= rows_of_each(counts, self._own or samples)
            sizes += [nbytes // samples] * samples
            largest = max(largest, nbytes // samples)
            if len(sizes) >= _MAX_READ:
                break
        return _seen(sizes, None, are_collated=False)

    def largest(self, batch_size: int) -> Any:
        batches = islice(self._batches(batch_size), _MAX_BATCHES)
        largest = max(_within(batches, _MAX_BATCHES_SECONDS), key=data_size, default=None)
        if largest is None:
            raise _no_batch(batch_size)
        return largest

    def first(self, batch_size: int) -> Any:
        return next(self._batches(batch_size), None)

    def counts(self, batch_size: int) -> list[list[int | None]]:
        with changed_batch_size(self._loader, batch_size, self._setter):
            # One more than are counted: the last of an epoch may be short
            batches = islice(self._loader, _MAX_BATCHES + 1)
            counts = [sample_counts(each) for each in _within(batches, _MAX_SECONDS)]
        return counts[:-1]

    def _batches(self, batch_size: int) -> Iterator[Any]:
        with changed_batch_size(self._loader, batch_size, self._setter):
            yield from self._spread()

    def _spread(self) -> DataLoader[Any]:
        is_stream = isinstance(self._loader.dataset, IterableDataset)
        if is_stream or not has_torch_iteration(self._loader):
            return self._loader
        # Not asked for its truth, which may be a length that it does not have
        sampler: Any = self._loader.batch_sampler
        batches = list(islice(sampler, _MAX_LISTED))
        # Samplers that sort by length have their largest batches at one of the ends
        return alike(self._loader, batch_sampler=[*batches[-2:], *_spread(batches[:-2])])


def _no_batch(batch_size: int) -> ValueError:
    return ValueError(f"The loader makes no batch at a batch size of {batch_size}.")


def _sizes_in(loader: DataLoader[Any], workers: int, **batches: Any) -> list[int]:
    """Return the sizes of samples of the data set, read as the loader reads them."""
    chunks = DataLoader(
        loader.dataset,
        **batches,
        num_workers=workers,
        collate_fn=_data_sizes,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    sizes: list[int] = []
    for chunk in _within(chunks, _MAX_SECONDS):
        sizes += chunk
        if len(sizes) >= _MAX_READ:
            break
    return sizes


def _within(parts: Iterable[Any], seconds: float) -> Iterator[Any]:
    """Yield the first part, and more until a time is over."""
    began = time.monotonic()
    for part in parts:
        yield part
        if time.monotonic() - began > seconds:
            return


def _seen(sizes: list[int], among: int | None, *, are_collated: bool) -> Seen:
    look = Look(len(sizes), among, is_even=len(set(sizes)) <= 1)
    return Seen(look, max(sizes, default=0), are_collated)


def _largest(sizes: list[int]) -> list[int]:
    """Return the positions of the largest; of the same size the first ones."""
    return sorted(range(len(sizes)), key=lambda at: -sizes[at])[:LARGEST_KEPT]


def _spread(parts: list[Any]) -> list[Any]:
    """Reorder a list so that any first part of it is spread over the whole."""
    bits = max(1, (len(parts) - 1).bit_length())
    order = sorted(range(len(parts)), key=lambda at: int(f"{at:0{bits}b}"[::-1], base=2))
    return [parts[at] for at in order]


def _data_sizes(samples: Iterable[Any]) -> list[int]:
    return [data_size(sample) for sample in samples]


def data_size(sample: Any, depth: int = _SIZE_DEPTH) -> int:
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
    return sum(data_size(part, depth - 1) for part in parts)


def _contents(sample: Any) -> Iterable[Any] | None:
    """Return the parts of a container or the attributes of an object; None for a plain value."""
    if isinstance(sample, dict):
        return sample.values()
    if isinstance(sample, (list, tuple)):
        return sample
    return vars(sample).values() if hasattr(sample, "__dict__") else None
