"""The order in which a loader gives its data: captured, and restored."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from autobatch._loaders.remaking import sampler_of
from autobatch._trials.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator


def capture_order(loader: DataLoader[Any], snapshot: Snapshot) -> None:
    """Let a snapshot restore the order of the data: samplers, their counters and generators.

    Counters of the data set as well: without a length, Lightning 2.6 reads the first batch when it
    sets up the loader.
    """
    samplers = (loader.batch_sampler, loader.sampler, sampler_of(loader))
    snapshot.capture_values(*(each for each in samplers if each is not None))
    if loader.num_workers == 0:
        snapshot.capture_light(*layers(loader.dataset))
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
