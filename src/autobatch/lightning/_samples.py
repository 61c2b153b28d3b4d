"""Data for trials: from the user's data set and collate function, read once."""

from __future__ import annotations

from functools import cached_property
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset

from autobatch._ledger import unobserved

if TYPE_CHECKING:
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
            return self._loader.collate_fn(
                list(islice(cycle(self._samples), batch_size))
            )

    @cached_property
    def _samples(self) -> list[Any]:
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset):
            # In a worker always: here, what a stream has given would be missing in training
            return next(iter(self._reader(batch_size=_LOOK)))
        length = len(dataset)  # type: ignore[arg-type]  # a map-style data set
        look = min(_LOOK, length)
        indices = [index * length // look for index in range(look)]
        if self._loader.num_workers:
            return next(iter(self._reader(batch_sampler=[indices])))
        self._snapshot.capture_light(*_layers(dataset))
        if hasattr(dataset, "__getitems__"):
            return list(dataset.__getitems__(indices))
        return [dataset[index] for index in indices]

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


def _layers(dataset: Any) -> list[Any]:
    """A data set, and those that it wraps: Subset, ConcatDataset and their like."""
    inner = [
        getattr(dataset, "dataset", None),
        *(getattr(dataset, "datasets", None) or ()),
    ]
    return [
        dataset,
        *(layer for part in inner if part is not None for layer in _layers(part)),
    ]
