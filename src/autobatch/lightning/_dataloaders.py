"""Change the batch size of a Trainer's loaders, check that they follow, and restore them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from autobatch._plan import ceil_div
from autobatch._trials.batches import leaves, map_leaves
from autobatch._trials.reachable import LARGE, attributes_of
from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError, FixedBatchSizeError
from autobatch.lightning._batch_size import (
    batch_size_change,
    batch_size_of,
    changed_batch_size,
    is_writable,
    sampler_of,
)
from autobatch.lightning._compat import (
    Imported,
    combination_mode,
    patched,
    requires_distributed_sampler,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch.lightning._batch_size import BatchSizeChange, SetBatchSize
    from autobatch.lightning._trainer import CombinedLoader


# Batches of an epoch, from those of each loader, by the mode of a CombinedLoader
_EPOCH_LENGTH: Final[dict[str, Callable[[Sequence[Any]], Any]]] = {
    "max_size_cycle": max,
    "max_size": max,
    "min_size": min,
    "sequential": sum,
}


def checked_setter(set_batch_size: SetBatchSize | None) -> SetBatchSize | None:
    """Return `set_batch_size`; `ValueError` if it is not a function."""
    if set_batch_size is None or callable(set_batch_size):
        return set_batch_size
    raise ValueError(
        f"set_batch_size={set_batch_size!r} cannot be called; "
        "give a function of a DataLoader and a batch size."
    )


class Loaders:
    """The loaders of one data source of a Trainer, as one object with a batch size.

    The batch size counts samples of the first loader; the others keep their proportion to it. A
    hook of the module or the datamodule makes new loaders each time.

    Args:
        trainer: The Trainer.
        source: Gives the loaders: a `_DataLoaderSource` of one of the loops of Lightning 2.6.
        mode: Mode of the CombinedLoader if there are several loaders without one.
        setter: The user's `set_batch_size`.

    Raises:
        FixedBatchSizeError: The batch size of one of them cannot be changed.
    """

    def __init__(
        self,
        trainer: Any,
        source: Any,
        *,
        mode: str,
        setter: SetBatchSize | None = None,
    ) -> None:
        combined_loader = Imported.COMBINED_LOADER.of(trainer)
        given = source.dataloader()
        is_combined = isinstance(given, combined_loader)
        self._combined = given if is_combined else combined_loader(given, mode)
        for loader in self._combined.flattened:
            problem = _problem_found_by_changing(loader, setter)
            if problem:
                raise FixedBatchSizeError(
                    f"AutoBatch cannot change the batch size of this loader: {problem}. "
                    "Use a plain DataLoader(dataset, batch_size=…), or leave AutoBatch out."
                )
        self.each: tuple[DataLoader[Any], ...] = tuple(self._combined.flattened)
        self.own_sizes: tuple[int, ...] = tuple(_own_size(loader, setter) for loader in self.each)
        self.setter = setter
        # Ranks among which Lightning will distribute the samples of each loader
        self.shards = tuple(
            int(trainer.world_size) if requires_distributed_sampler(trainer, loader) else 1
            for loader in self.each
        )
        self._world_size = int(trainer.world_size)

    @property
    def batch_size(self) -> int:
        """Batch size of the first loader."""
        return self.own_sizes[0]

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch of the first loader, which may have fewer in all."""
        samples = samples_of(self.each[0], self.shards[0])
        return min(self.batch_size, samples or self.batch_size)

    def sizes_at(self, batch_size: int) -> tuple[int, ...]:
        """Return the batch size of each loader for one of the first."""
        first = self.own_sizes[0]
        return tuple(max(1, round(own * batch_size / first)) for own in self.own_sizes)

    @property
    def is_sequential(self) -> bool:
        """True if a step takes a batch of one loader at a time, and not of all."""
        return len(self.each) > 1 and combination_mode(self._combined) == "sequential"

    @property
    def samples(self) -> int | None:
        """Samples of the first loader in an epoch, over all ranks; None for a stream."""
        samples = samples_of(self.each[0], self.shards[0])
        if samples is None:
            return None
        if self.shards[0] > 1:  # padded to the same length on each rank
            return len(sampler_of(self.each[0]))
        return samples * self._world_size

    def batches(self, batch_size: int) -> int | None:
        """Return the batches of each rank in an epoch at a batch size; None if unknown."""
        lengths = [
            _batches_of(loader, size, shards, self.setter)
            for loader, size, shards in zip(
                self.each, self.sizes_at(batch_size), self.shards, strict=True
            )
        ]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        return int(self.epoch_length(known))

    @contextmanager
    def at(self, batch_size: int) -> Iterator[CombinedLoader]:
        """Change the batch sizes to those for one of the first loader while the body runs."""
        with ExitStack() as stack:
            for loader, size in zip(self.each, self.sizes_at(batch_size), strict=True):
                stack.enter_context(changed_batch_size(loader, size, self.setter))
            yield self._combined

    def epoch_length(self, lengths: Sequence[int | float]) -> int | float:
        """Return the batches of an epoch, from those of each loader."""
        length: int | float = _EPOCH_LENGTH[combination_mode(self._combined)](lengths)
        return length

    def samples_in(self, batches: int, batch_size: int) -> int | None:
        """Return the samples of all ranks in a number of batches of an epoch."""
        full = batches * batch_size * self._world_size
        if len(self.each) > 1 or self.samples is None:
            return full
        return min(self.samples, full)

    def structured(self, parts: Sequence[Any]) -> Any:
        """Return one value for each loader, in the containers of the loaders."""
        rest = iter(parts)

        def next_part(leaf: Any) -> Any:
            return next(rest) if isinstance(leaf, DataLoader) else leaf

        return map_leaves(next_part, self._combined.iterables)

    def capture_order(self, snapshot: Snapshot) -> None:
        """Let a snapshot restore the order of the data."""
        for loader in self.each:
            capture_order(loader, snapshot)


class Rebatched:
    """Gives every loader that a Trainer asks for another batch size, from `start` until `undo`.

    Loaders are changed in place, which keeps their sampler, shuffling, workers and class. A loader
    that was passed by the user has its own batch size again after `undo`.

    Args:
        source: Gives the Trainer its loaders.
        batch_sizes: One for each loader.
        setter: The user's `set_batch_size`.
    """

    def __init__(
        self,
        source: Any,
        batch_sizes: Sequence[int],
        setter: SetBatchSize | None = None,
    ) -> None:
        self.setter = setter
        self._batch_sizes = batch_sizes
        self._changes: list[BatchSizeChange] = []
        self._original_dataloader: Callable[[], Any] = source.dataloader
        # Lightning 2.6 gets all loaders by this method
        self._patch = patched(source, dataloader=self._dataloader)

    def start(self) -> None:
        """Change the loaders that the Trainer asks for from now on."""
        self._patch.apply()

    def undo(self) -> None:
        """Restore the source and the batch sizes of the loaders; again after an interrupt."""
        self._patch.restore()
        while self._changes:
            self._changes[-1].restore()
            self._changes.pop()

    def check(self, loaders: Loaders) -> None:
        """Read one batch of indices of each loader; `AutobatchError` if its size is another.

        Not with a `set_batch_size`, which may count in another unit and was checked before.
        """
        if self.setter is not None:
            return
        for loader, size in zip(loaders.each, self._batch_sizes, strict=True):
            found = _first_batch_size(loader)
            samples = samples_of(loader, 1)
            if found != min(size, samples or found):
                raise AutobatchError(
                    f"The loader still makes batches of {found} after its batch size was set to "
                    f"{size}; AutoBatch cannot tune it."
                )

    def check_used(self, used: Any) -> None:
        """Refuse a loader that Lightning made again at its old batch size, as for several ranks."""
        if self.setter is not None:
            return
        for loader, size in zip(_dataloaders_in(used), self._batch_sizes, strict=False):
            if _problem_of(loader, None) is None and batch_size_of(loader) != size:
                raise AutobatchError(
                    f"Lightning made the training loader, a {type(loader).__name__}, again with "
                    f"batches of {batch_size_of(loader)} instead of {size}: its __init__ does not "
                    "take the size as batch_size. Rename that argument to batch_size, or pass the "
                    "loader to fit."
                )

    def _dataloader(self) -> Any:
        given = self._original_dataloader()
        for loader, size in zip(_dataloaders_in(given), self._batch_sizes, strict=False):
            if _problem_of(loader, self.setter) is None and not self._is_changed(loader):
                self._changes.append(batch_size_change(loader, size, self.setter))
                self._changes[-1].make()
        return given

    def _is_changed(self, loader: DataLoader[Any]) -> bool:
        return any(change.loader is loader and change.holds for change in self._changes)


def _dataloaders_in(given: Any) -> list[DataLoader[Any]]:
    """Return the loaders in any containers, in the order of a CombinedLoader."""
    found = leaves(getattr(given, "iterables", given))
    return [leaf for leaf in found if isinstance(leaf, DataLoader)]


# One loader


def capture_order(loader: DataLoader[Any], snapshot: Snapshot) -> None:
    """Let a snapshot restore the order of the data: samplers, their counters and generators.

    Counters of the data set as well: without a length, Lightning 2.6 reads the first batch when it
    sets up the loader.
    """
    samplers = (loader.batch_sampler, loader.sampler, sampler_of(loader))
    snapshot.capture_light(*(each for each in samplers if each is not None))
    if loader.num_workers == 0:
        snapshot.capture_light(*_nested(loader.dataset))
    if loader.generator is not None:
        snapshot.capture(loader.generator)


def _nested(dataset: Any) -> list[Any]:
    """Return a data set and those that it holds in attributes, alone or in lists."""
    found = {id(dataset): dataset}
    pending = [dataset]
    while pending:
        for value in (attributes_of(pending.pop()) or {}).values():
            parts = value if isinstance(value, (list, tuple)) and len(value) <= LARGE else [value]
            new = [part for part in parts if isinstance(part, Dataset) and id(part) not in found]
            found.update((id(part), part) for part in new)
            pending.extend(new)
    return list(found.values())


def take_iterator(loader: DataLoader[Any]) -> Any:
    """Take the iterator that keeps persistent workers: the next iteration starts new ones.

    The workers end with it. Its attribute has no public name (torch 2.13).
    """
    iterator = vars(loader).get("_iterator")
    vars(loader).update(_iterator=None)
    return iterator


def is_empty(loader: object) -> bool:
    """Return True for a loader without any data."""
    return isinstance(loader, DataLoader) and samples_of(loader, 1) == 0


def samples_of(loader: DataLoader[Any], shards: int) -> int | None:
    """Return the samples of one rank per epoch; None for a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    samples = len(sampler_of(loader))
    batches, size = _length_of(loader.batch_sampler), _size_of(loader.batch_sampler)
    # A batch sampler may draw samples many times, or parts of them; the last batch may be short
    if batches and size and not (batches - 1) * size < samples <= batches * size:
        samples = batches * size
    return ceil_div(samples, shards)


def _own_size(loader: DataLoader[Any], setter: SetBatchSize | None) -> int:
    """Return the batch size; with a setter, which may count in another unit, of the first batch."""
    if setter is None:
        return batch_size_of(loader)
    with _order_restored(loader):
        return _first_batch_size(loader)


def _first_batch_size(loader: DataLoader[Any]) -> int:
    """Return the number of samples in the first batch, from its indices alone."""
    return len(next(iter(loader.batch_sampler)))  # type: ignore[arg-type]  # _problem_of checks


def _batches_of(
    loader: DataLoader[Any], batch_size: int, shards: int, setter: SetBatchSize | None
) -> int | None:
    """Return the batches of one rank per epoch at another batch size; None if unknown."""
    samples = samples_of(loader, shards)
    if _length_of(loader.batch_sampler) is None or samples is None:
        return None
    if shards > 1:
        drops = getattr(loader.batch_sampler, "drop_last", False)
        return samples // batch_size if drops else ceil_div(samples, batch_size)
    with changed_batch_size(loader, batch_size, setter):
        return _length_of(loader.batch_sampler)


def _problem_of(loader: object, setter: SetBatchSize | None) -> str | None:
    """Return a reason why the batch size of this object cannot be changed."""
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not a DataLoader"
    batch_sampler, sampler = loader.batch_sampler, sampler_of(loader)
    if batch_sampler is None:
        return "it has batch_size=None"
    if setter is None and not isinstance(getattr(batch_sampler, "batch_size", None), int):
        return (
            f"its batch sampler, a {type(batch_sampler).__name__}, has no batch_size "
            "(set_batch_size may change it)"
        )
    if setter is None and not is_writable(batch_sampler):
        return (
            f"the batch_size of its batch sampler, a {type(batch_sampler).__name__}, cannot be set "
            "(set_batch_size may set what it is computed from)"
        )
    if not isinstance(loader.dataset, IterableDataset) and not hasattr(sampler, "__len__"):
        return f"its sampler, a {type(sampler).__name__}, has no length"
    return None


def _problem_found_by_changing(loader: Any, setter: SetBatchSize | None) -> str | None:
    """Change the batch size and restore it, and return a reason why the batches do not follow."""
    problem = _problem_of(loader, setter)
    if problem is not None:
        return problem
    if setter is not None:
        return _setter_problem(loader, setter)
    return _batch_sampler_problem(loader)


def _batch_sampler_problem(loader: DataLoader[Any]) -> str | None:
    """Return a problem of a batch sampler of a class of the user's."""
    sampler = loader.batch_sampler
    if type(sampler) is BatchSampler:
        return None
    wanted = 1 if batch_size_of(loader) > 1 else 2
    with _order_restored(loader):
        batches = _length_of(sampler)
        with changed_batch_size(loader, wanted, None):
            found = _first_batch_size(loader)
            is_constant = batches == _length_of(sampler)
    name = type(sampler).__name__
    if batches is not None and is_constant and batches > 1:
        return f"its batch sampler, a {name}, has {batches} batches at any batch_size"
    if found == wanted:
        return None
    return f"its batch sampler, a {name}, makes batches of {found} when its batch_size is {wanted}"


def _length_of(sampler: Any) -> int | None:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _size_of(batch_sampler: Any) -> int | None:
    """Return the size of the batches of a user's batch sampler; None of torch's own."""
    size = getattr(batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and type(batch_sampler) is not BatchSampler else None


def _setter_problem(loader: DataLoader[Any], setter: SetBatchSize) -> str | None:
    """Return a problem of a `set_batch_size` that does not change the batches."""
    own = _own_size(loader, setter)
    found = _first_batch_at(loader, own, setter)
    found_at_double = _first_batch_at(loader, 2 * own, setter)
    samples = samples_of(loader, 1)
    if found != found_at_double or (samples is not None and samples <= found):
        return None
    return (
        f"set_batch_size leaves its first batch at {found} samples, both at {own} and at {2 * own}"
    )


def _first_batch_at(loader: DataLoader[Any], batch_size: int, setter: SetBatchSize) -> int:
    with _order_restored(loader), changed_batch_size(loader, batch_size, setter):
        return _first_batch_size(loader)


@contextmanager
def _order_restored(loader: DataLoader[Any]) -> Iterator[None]:
    with Snapshot() as snapshot:
        capture_order(loader, snapshot)
        yield
