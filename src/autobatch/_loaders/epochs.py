"""Samples and batches of one loader in an epoch, and the order of its data."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from autobatch._loaders.batch_size import changed_batch_size
from autobatch._loaders.remaking import sampler_of
from autobatch._plan import ceil_div
from autobatch._trials.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._loaders.batch_size import LoaderSize


def samples_of(loader: DataLoader[Any], shards: int) -> int | None:
    """Return the samples of one rank per epoch; None for a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    samples = len(sampler_of(loader))
    batches, size = length_of(loader.batch_sampler), _size_of(loader.batch_sampler)
    # A batch sampler may draw samples many times, or parts of them; the last batch may be short
    if batches and size and not (batches - 1) * size < samples <= batches * size:
        samples = batches * size
    return ceil_div(samples, shards)


def batches_of(loader: DataLoader[Any], size: LoaderSize, shards: int) -> int | None:
    """Return the batches of one rank per epoch at another batch size; None if unknown."""
    samples = samples_of(loader, shards)
    if length_of(loader.batch_sampler) is None or samples is None:
        return None
    if shards > 1:
        drops = getattr(loader.batch_sampler, "drop_last", False)
        return samples // size.batch_size if drops else ceil_div(samples, size.batch_size)
    with changed_batch_size(loader, size.batch_size, size.setter):
        return length_of(loader.batch_sampler)


def length_of(sampler: Any) -> int | None:
    """Return the length of a sampler; None if it has none."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _size_of(batch_sampler: Any) -> int | None:
    """Return the size of the batches of a user's batch sampler; None of torch's own."""
    size = getattr(batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and type(batch_sampler) is not BatchSampler else None


def capture_order(loader: DataLoader[Any], snapshot: Snapshot) -> None:
    """Let a snapshot restore the order of the data: samplers, their counters and generators.

    Counters of the data set as well: without a length, Lightning 2.6 reads the first batch when it
    sets up the loader.
    """
    samplers = (loader.batch_sampler, loader.sampler, sampler_of(loader))
    snapshot.capture_values(*(each for each in samplers if each is not None))
    if loader.num_workers == 0:
        snapshot.capture_small_values(*layers(loader.dataset))
    if loader.generator is not None:
        snapshot.capture(loader.generator)


def layers(dataset: Any) -> list[Any]:
    """Return a data set, its transforms, and the data sets it wraps, as Subset does."""
    attributes = getattr(dataset, "__dict__", {}).values()  # a plain list has none
    parts = [part for part in attributes if hasattr(part, "__dict__")]
    inner = [*parts, *(getattr(dataset, "datasets", None) or ())]
    wrapped = [part for part in inner if isinstance(part, Dataset)]
    return [dataset, *parts, *(layer for part in wrapped for layer in layers(part))]


def take_iterator(loader: DataLoader[Any]) -> Any:
    """Take the iterator that keeps persistent workers: the next iteration starts new ones.

    The workers end with it. Its attribute has no public name (torch 2.13).
    """
    iterator = vars(loader).get("_iterator")
    vars(loader).update(_iterator=None)
    return iterator


@contextmanager
def order_restored(loader: DataLoader[Any]) -> Iterator[None]:
    with Snapshot() as snapshot:
        capture_order(loader, snapshot)
        yield
