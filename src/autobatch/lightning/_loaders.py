"""Change the batch size of the loaders that a Trainer asks for, and prove it by reading one batch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import DataLoader

from autobatch.errors import AutobatchError
from autobatch.lightning._loader import (
    FixedBatchSizeError,
    Resized,
    SetBatchSize,
    batch_size_of,
    batches_of,
    capture_order,
    disobedience,
    first_batch,
    indifference,
    own_size,
    problem_of,
    rebatched,
    sampler_of,
    samples_of,
    shards_of,
)
from autobatch.lightning._package import package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._snapshot import Snapshot

__all__ = ["Loaders", "Rebatched"]

_LENGTH_OF_EPOCH: Final[dict[str, Callable[[list[int]], int]]] = {
    "max_size_cycle": max,
    "max_size": max,
    "min_size": min,
    "sequential": sum,
}


class Loaders:
    """The loaders that a Trainer's data source gives, one or several, as one thing with a batch size.

    That batch size counts samples of the first; the others keep their proportion to it. A hook of the module or the
    datamodule makes new loaders each time it is asked.

    Args:
        trainer: The Trainer.
        source: What it asks for loaders: Lightning 2.6 has a `_DataLoaderSource` for each of its loops.
        mode: How it combines several that come without a CombinedLoader around them.
        setter: The user's own way to give one another batch size.

    Raises:
        FixedBatchSizeError: The batch size of one of them can not be changed.
    """

    def __init__(
        self,
        trainer: Any,
        source: Any,
        *,
        mode: str,
        setter: SetBatchSize | None = None,
    ) -> None:
        module = f"{package_of(trainer)}.utilities.combined_loader"
        combined = importlib.import_module(module).CombinedLoader
        given = source.dataloader()
        self._combined = given if isinstance(given, combined) else combined(given, mode)
        for loader in self._combined.flattened:
            problem = problem_of(loader, setter) or (
                disobedience(loader) if setter is None else indifference(loader, setter)
            )
            if problem:
                raise FixedBatchSizeError(
                    f"AutoBatch can not change the batch size of this loader: {problem}. Use a plain "
                    "DataLoader(dataset, batch_size=…), or leave AutoBatch out."
                )
        self.each: tuple[DataLoader[Any], ...] = tuple(self._combined.flattened)
        self.own_sizes: tuple[int, ...] = tuple(
            own_size(loader, setter) for loader in self.each
        )
        self._setter = setter
        # Among how many ranks the samples of each are dealt out
        self.shards = tuple(shards_of(trainer, loader) for loader in self.each)
        self._world_size = int(trainer.world_size)

    @property
    def batch_size(self) -> int:
        """What the first of them has."""
        return self.own_sizes[0]

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch that the first of them makes, which may have fewer in all."""
        samples = samples_of(self.each[0], self.shards[0])
        return min(self.batch_size, samples or self.batch_size)

    def sizes_at(self, batch_size: int) -> tuple[int, ...]:
        """What each has when the first has this."""
        first = self.own_sizes[0]
        return tuple(max(1, round(own * batch_size / first)) for own in self.own_sizes)

    @property
    def is_sequential(self) -> bool:
        """Whether a step takes from one loader at a time, rather than from all."""
        return len(self.each) > 1 and self._combined._mode == "sequential"

    @property
    def samples(self) -> int | None:
        """Samples of the first that all ranks see in an epoch; None where its data set is a stream."""
        samples = samples_of(self.each[0], self.shards[0])
        if samples is None:
            return None
        if self.shards[0] > 1:  # padded to the same length on each rank
            return len(sampler_of(self.each[0]))
        return samples * self._world_size

    def batches(self, batch_size: int) -> int | None:
        """Batches of each rank in an epoch, at this batch size; None where that is not known."""
        lengths = [
            batches_of(loader, size, shards, self._setter)
            for loader, size, shards in zip(
                self.each, self.sizes_at(batch_size), self.shards, strict=True
            )
        ]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        return _LENGTH_OF_EPOCH[self._combined._mode](known)

    def samples_in(self, batches: int, batch_size: int) -> int | None:
        """Samples that all ranks see in so many batches of an epoch."""
        many = batches * batch_size * self._world_size
        if len(self.each) > 1 or self.samples is None:
            return many
        return min(self.samples, many)

    def structured(self, parts: Sequence[Any]) -> Any:
        """What is given for each loader, in the containers that hold the loaders."""
        applying = importlib.import_module("lightning_utilities.core.apply_func")
        rest = iter(parts)
        return applying.apply_to_collection(
            self._combined.iterables, DataLoader, lambda _: next(rest)
        )

    def capture_order(self, snapshot: Snapshot) -> None:
        """Let a snapshot give back what decides the order of the data."""
        for loader in self.each:
            capture_order(loader, snapshot)

    def first_batches(self) -> tuple[int, ...]:
        """Samples in the first batch of each."""
        return tuple(map(first_batch, self.each))


class Rebatched:
    """Gives every loader that a Trainer asks for another batch size, until it is undone.

    Loaders are changed in place, which keeps their sampler, shuffling, workers and class. A loader that was passed in
    is the user's: it has its own size again after `undo`.

    Args:
        source: What the Trainer asks for loaders.
        batch_sizes: For each of them.
        setter: The user's own way to give one another batch size.
    """

    def __init__(
        self,
        source: Any,
        batch_sizes: Sequence[int],
        setter: SetBatchSize | None = None,
    ) -> None:
        self.setter = setter
        self._source = source
        self._batch_sizes = batch_sizes
        self._resized: list[Resized] = []
        # The instance's attribute hides the class's method: Lightning 2.6 asks its `_DataLoaderSource` for every loader.
        self._ask: Callable[[], Any] = source.dataloader
        source.dataloader = self._dataloader

    def undo(self) -> None:
        """Give the loaders their own size again, and let the source answer for itself."""
        self._source.__dict__.pop("dataloader", None)
        while self._resized:
            self._resized.pop().undo()

    def check(self, loaders: Loaders) -> None:
        """Read one batch of indices back; `AutobatchError` where it is not of the size that was set.

        A setter of the user's may mean something else by a size: that it obeys has been seen.
        """
        if self.setter is not None:
            return
        for loader, size in zip(loaders.each, self._batch_sizes, strict=True):
            got = first_batch(loader)
            samples = samples_of(loader, 1)
            if got != min(size, samples or got):
                raise AutobatchError(
                    f"The loader still makes batches of {got} after its batch size was set to {size}; AutoBatch can "
                    "not tune it."
                )

    def check_used(self, used: Any) -> None:
        """Refuse what Lightning made anew without the size that was set, as it may for several ranks."""
        if self.setter is not None:
            return
        for loader, size in zip(_flat(used), self._batch_sizes, strict=False):
            if problem_of(loader, None) is None and batch_size_of(loader) != size:
                raise AutobatchError(
                    f"Lightning made the training loader, a {type(loader).__name__}, anew with batches of "
                    f"{batch_size_of(loader)} instead of {size}: its __init__ does not take the size as batch_size. Call "
                    "the argument that, or pass the loader to fit."
                )

    def _dataloader(self) -> Any:
        given = self._ask()
        for loader, size in zip(_flat(given), self._batch_sizes, strict=False):
            if problem_of(loader, self.setter) is None and not self._holds(loader):
                self._resized.append(rebatched(loader, size, self.setter))
        return given

    def _holds(self, loader: DataLoader[Any]) -> bool:
        return any(each.loader is loader and each.holds() for each in self._resized)


def _flat(given: Any) -> list[Any]:
    """The loaders in any containers, in the order that a CombinedLoader gives them."""
    if isinstance(given, DataLoader):
        return [given]
    applying = importlib.import_module("lightning_utilities.core.apply_func")
    found: list[Any] = []
    applying.apply_to_collection(
        getattr(given, "iterables", given), DataLoader, found.append
    )
    return found
