"""Data for trials: from the user's data set and collate function, read once."""

from __future__ import annotations

import copy
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
)

from autobatch._ledger import unobserved
from autobatch.lightning._loaders import capture_order, sampler_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch._snapshot import Snapshot

__all__ = ["Samples"]

_LOOK: Final = 64  # samples read; larger batches repeat them


class Samples:
    """Batches of any size, collated from a few samples of a loader's data set, spread evenly over it.

    They are read the way the loader reads: in a worker process where it has workers, so that the data set of this
    process stays as it is; else here, where the snapshot gives the data set's own attributes and generators back.
    """

    def __init__(self, loader: DataLoader[Any], snapshot: Snapshot) -> None:
        self._loader = loader
        self._snapshot = snapshot

    def batch(self, batch_size: int) -> Any:
        """A batch on the host, as the loader would collate it."""
        with unobserved(), torch.no_grad():
            samples = islice(cycle(self._samples), batch_size)
            self._snapshot.capture_light(self._loader.collate_fn)
            # Copies, since a collate function may take its samples apart
            return self._loader.collate_fn([_unshared(sample) for sample in samples])

    @cached_property
    def _samples(self) -> list[Any]:
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset):
            # In a worker always: here, what a stream has given would be missing in training
            return next(iter(self._reader(batch_size=_LOOK)))
        capture_order(self._loader, self._snapshot)
        indices = list(islice(self._indices(), _LOOK))
        if self._loader.num_workers:
            return next(iter(self._reader(batch_sampler=[indices])))
        self._snapshot.capture_light(*_layers(dataset))
        if hasattr(dataset, "__getitems__"):
            return list(dataset.__getitems__(indices))
        return [dataset[index] for index in indices]

    def _indices(self) -> Iterable[Any]:
        """Which samples to read: spread over the data set, or the first that a sampler of the user's names."""
        batches = self._loader.batch_sampler
        sampler = sampler_of(self._loader)
        if type(batches) is not BatchSampler:
            return chain.from_iterable(batches or ())
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler  # type: ignore[no-any-return]  # an iterable of indices
        length = len(sampler.data_source)
        return range(0, length, max(1, length // _LOOK))

    def _reader(self, **batches: Any) -> DataLoader[Any]:
        """One worker process that reads one list of samples."""
        return DataLoader(
            self._loader.dataset,
            **batches,
            num_workers=1,
            collate_fn=list,
            worker_init_fn=self._loader.worker_init_fn,
            multiprocessing_context=self._loader.multiprocessing_context,
            generator=torch.Generator(),
        )


def _unshared(sample: Any) -> Any:
    """A sample in containers of its own; what they contain is shared."""
    if isinstance(sample, dict):
        unshared = copy.copy(sample)
        unshared.update((key, _unshared(part)) for key, part in sample.items())
        return unshared
    if isinstance(sample, list):
        return [_unshared(part) for part in sample]
    if type(sample) is tuple:
        return tuple(map(_unshared, sample))
    return copy.copy(sample)


def _layers(dataset: Any) -> list[Any]:
    """A data set, those that it wraps (Subset, ConcatDataset and their like), and its transforms."""
    parts = [part for part in vars(dataset).values() if hasattr(part, "__dict__")]
    inner = [*parts, *(getattr(dataset, "datasets", None) or ())]
    wrapped = [part for part in inner if isinstance(part, Dataset)]
    return [dataset, *parts, *(layer for part in wrapped for layer in _layers(part))]
