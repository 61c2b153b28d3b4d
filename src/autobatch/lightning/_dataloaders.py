"""Change the batch size of a Trainer's loaders, check that they follow, and restore them."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autobatch._loaders.batch_size import (
    LoaderSize,
    batch_size_change,
    batch_size_of,
    changed_batch_size,
    is_writable,
)
from autobatch._loaders.epochs import batches_of, length_of, order_restored, samples_of
from autobatch._loaders.remaking import Remaking, arguments_left_open, remade_parts, sampler_of
from autobatch._trials.batches import leaves, map_leaves
from autobatch._undo import patched
from autobatch.errors import AutobatchError, FixedBatchSizeError
from autobatch.lightning._compat import (
    combination_mode,
    data_parallel_size,
    requires_distributed_sampler,
)
from autobatch.lightning._package import Imported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch._loaders.batch_size import BatchSizeChange, SetBatchSize
    from autobatch.lightning._trainer import CombinedLoader


# Batches of an epoch, from those of each loader, by the mode of a CombinedLoader
_EPOCH_LENGTH: Final[dict[str, Callable[[Sequence[Any]], Any]]] = {
    "max_size_cycle": max,
    "max_size": max,
    "min_size": min,
    "sequential": sum,
}

_COMPARED: Final = 8  # batches of indices of a loader and of one made again
_PLAIN: Final = "use a plain DataLoader(dataset, batch_size=…)"
_SETTER: Final = "pass set_batch_size, a function of a loader and a batch size that sets it"


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
        self, trainer: Any, source: Any, *, mode: str, setter: SetBatchSize | None = None
    ) -> None:
        combined_loader = Imported.COMBINED_LOADER.of(trainer)
        # As the loops do, so that the arguments of loaders made in a hook are saved
        given = Imported.REQUEST_LOADERS.of(trainer)(source)
        self._is_kept = given is source.instance  # for all epochs; a hook makes new loaders
        is_combined = isinstance(given, combined_loader)
        self._combined = given if is_combined else combined_loader(given, mode)
        self.each: tuple[DataLoader[Any], ...] = tuple(self._combined.flattened)
        # For each loader the function that sets its size; None for in place
        self.setters = tuple(_way_to_change(loader, setter) for loader in self.each)
        self.own_sizes = tuple(map(_own_size, self.each, self.setters))
        # Ranks among which Lightning will distribute the samples of each loader
        self._replicas = data_parallel_size(trainer)
        self.shards = tuple(
            self._replicas if requires_distributed_sampler(trainer, loader) else 1
            for loader in self.each
        )
        self._lengths: dict[int, tuple[int, ...] | None] = {}  # of each loader, by batch size

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
        first = self.own_sizes[0]
        return tuple(max(1, round(own * batch_size / first)) for own in self.own_sizes)

    def check_later_epochs(self) -> None:
        """Refuse parts that would have to be made again, and change themselves in an epoch."""
        for loader, setter in zip(self.each, self.setters, strict=True):
            if self._is_kept and isinstance(setter, Remaking) and _changes_itself(loader):
                part, *_ = remade_parts(loader)
                raise FixedBatchSizeError(
                    "retune_at_epochs cannot change the batch size of this loader in a later "
                    f"epoch: a {type(part).__name__} has other batches after an epoch than one "
                    f"that is made again; {_SETTER}, or make the loader in train_dataloader."
                )

    @property
    def is_sequential(self) -> bool:
        return len(self.each) > 1 and combination_mode(self._combined) == "sequential"

    @property
    def samples(self) -> int | None:
        """Samples of the first loader in an epoch, over all ranks; None for a stream."""
        samples = samples_of(self.each[0], self.shards[0])
        if samples is None:
            return None
        if self.shards[0] > 1:  # padded to the same length on each rank
            return len(sampler_of(self.each[0]))
        return samples * self._replicas

    def sized(self, batch_size: int) -> tuple[LoaderSize, ...]:
        """Return the size of each loader for one of the first, with the way to set it."""
        return tuple(map(LoaderSize, self.sizes_at(batch_size), self.setters))

    def batches(self, batch_size: int) -> int | None:
        """Return the batches of each rank in an epoch at a batch size; None if unknown."""
        lengths = self.lengths(batch_size)
        return None if lengths is None else int(self.epoch_length(lengths))

    def lengths(self, batch_size: int) -> tuple[int, ...] | None:
        """Return the batches of each loader on a rank at a batch size; None if one is unknown."""
        if batch_size not in self._lengths:
            sized = zip(self.each, self.sized(batch_size), self.shards, strict=True)
            lengths = [batches_of(*each) for each in sized]
            known = tuple(length for length in lengths if length is not None)
            self._lengths[batch_size] = known if len(known) == len(lengths) else None
        return self._lengths[batch_size]

    @contextmanager
    def at(self, batch_size: int) -> Iterator[CombinedLoader]:
        """Change the batch sizes to those for one of the first loader while the body runs."""
        with ExitStack() as stack:
            for loader, size in zip(self.each, self.sized(batch_size), strict=True):
                stack.enter_context(changed_batch_size(loader, size.batch_size, size.setter))
            yield self._combined

    def epoch_length(self, lengths: Sequence[int | float]) -> int | float:
        """Return the batches of an epoch, from those of each loader."""
        length: int | float = _EPOCH_LENGTH[combination_mode(self._combined)](lengths)
        return length

    def samples_in(self, batches: int, batch_size: int) -> int | None:
        """Return the samples of all ranks in a number of batches of an epoch."""
        full = batches * batch_size * self._replicas
        if len(self.each) > 1 or self.samples is None:
            return full
        return min(self.samples, full)

    def structured(self, parts: Sequence[Any]) -> Any:
        rest = iter(parts)

        def next_part(leaf: Any) -> Any:
            return next(rest) if isinstance(leaf, DataLoader) else leaf

        return map_leaves(next_part, self._combined.iterables)


class Rebatched:
    """Gives every loader that a Trainer asks for another batch size, from `start` until `undo`.

    Loaders are changed in place, which keeps their sampler, shuffling, workers and class. A loader
    that was passed by the user has its own batch size again after `undo`.

    Args:
        source: Gives the Trainer its loaders.
        sizes: One for each loader.
    """

    def __init__(self, source: Any, sizes: Sequence[LoaderSize]) -> None:
        self._sizes = sizes
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

    def check_used(self, used: Any) -> None:
        """Refuse a loader that Lightning made again at its old batch size, as for several ranks."""
        for loader, size in zip(_dataloaders_in(used), self._sizes, strict=False):
            is_in_place = size.setter is None and not _problem_of(loader, None)
            if is_in_place and batch_size_of(loader) != size.batch_size:
                raise AutobatchError(
                    f"Lightning made the training loader, a {type(loader).__name__}, again with "
                    f"batches of {batch_size_of(loader)} instead of {size.batch_size}: its "
                    "__init__ does not take the size as batch_size. Rename that argument to "
                    "batch_size, or pass the loader to fit."
                )

    def _dataloader(self) -> Any:
        given = self._original_dataloader()
        for loader, size in zip(_dataloaders_in(given), self._sizes, strict=False):
            if not (_problem_of(loader, size.setter) or self._is_changed(loader)):
                self._changes.append(batch_size_change(loader, size.batch_size, size.setter))
                self._changes[-1].make()
        return given

    def _is_changed(self, loader: DataLoader[Any]) -> bool:
        return any(change.loader is loader and change.holds for change in self._changes)


def _dataloaders_in(given: Any) -> list[DataLoader[Any]]:
    """Return the loaders in any containers, in the order of a CombinedLoader."""
    found = leaves(getattr(given, "iterables", given))
    return [leaf for leaf in found if isinstance(leaf, DataLoader)]


# One loader


def _own_size(loader: DataLoader[Any], setter: SetBatchSize | None) -> int:
    """Return the batch size; with a user's setter, which may count otherwise, of a first batch."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(size, int) and (setter is None or isinstance(setter, Remaking)):
        return size
    with order_restored(loader):
        return _first_batch_size(loader)


def _first_batch_size(loader: DataLoader[Any]) -> int:
    """Return the number of samples in the first batch, from its indices alone."""
    return len(next(iter(loader.batch_sampler)))  # type: ignore[arg-type]  # _problem_of checks


def _way_to_change(loader: Any, setter: SetBatchSize | None) -> SetBatchSize | None:
    """Return the function that sets the batch size: the user's, a `Remaking`, None for in place.

    Raises:
        FixedBatchSizeError: There is none.
    """
    if setter is None and isinstance(loader, DataLoader) and _has_to_be_made_again(loader):
        return Remaking()
    problem = _problem_of(loader, setter)
    if problem is None and setter is None:
        problem = _batch_sampler_problem(loader)
    if problem is None:
        return setter
    raise FixedBatchSizeError(
        f"AutoBatch cannot change the batch size of this loader: {problem}, or leave AutoBatch out."
    )


def _problem_of(loader: object, setter: SetBatchSize | None) -> str | None:
    """Return a reason why the batch size of this object cannot be set, and what to do."""
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not a DataLoader; {_PLAIN}"
    batch_sampler, sampler = loader.batch_sampler, sampler_of(loader)
    if batch_sampler is None:
        return f"it has batch_size=None; {_PLAIN}"
    name = type(batch_sampler).__name__
    if setter is None and not isinstance(getattr(batch_sampler, "batch_size", None), int):
        return f"its batch sampler, a {name}, has no batch_size; {_SETTER}"
    if setter is None and not is_writable(batch_sampler):
        return f"the batch_size of its batch sampler, a {name}, cannot be set; {_SETTER}"
    if not isinstance(loader.dataset, IterableDataset) and not hasattr(sampler, "__len__"):
        return f"its sampler, a {type(sampler).__name__}, has no length; give it a __len__"
    return None


def _batch_sampler_problem(loader: DataLoader[Any]) -> str | None:
    """Return a problem of a batch sampler of a class of the user's, and what to do."""
    sampler = loader.batch_sampler
    if type(sampler) is BatchSampler:
        return None
    wanted = 1 if batch_size_of(loader) > 1 else 2
    with order_restored(loader):
        batches = length_of(sampler)
        with changed_batch_size(loader, wanted, None):
            found = _first_batch_size(loader)
            is_constant = batches == length_of(sampler)
    problem = None
    if batches is not None and is_constant and batches > 1:
        problem = f"has {batches} batches at any batch_size"
    elif found != wanted:
        problem = f"makes batches of {found} when its batch_size is {wanted}"
    return problem and f"its batch sampler, a {type(sampler).__name__}, {problem}; {_SETTER}"


def _has_to_be_made_again(loader: DataLoader[Any]) -> bool:
    """Check that parts of a loader have to be made again for another size, and can be, exactly.

    They can if they are the same when made again at the own size, and no argument is open.
    """
    parts = remade_parts(loader)
    if not parts or loader.batch_sampler is None:
        return False
    own = _own_size(loader, Remaking())
    sizes = (own, 2 * own + 1, max(1, own // 2))
    try:
        made = [_drawn_at(loader, size, Remaking()) for size in sizes]
        if made[0] != _drawn(loader):
            return False
        for name in arguments_left_open(loader):
            without = [_drawn_at(loader, size, Remaking(name)) for size in sizes]
            if without[0] == made[0] and without != made:
                return False
    except Exception:  # whatever the classes of the user do not take
        return False
    try:
        is_same = made == [_drawn_at(loader, size, None) for size in sizes]
    except Exception:  # a size that cannot be set, or a sampler that has to be made again
        return True
    return not is_same or loader in parts


def _changes_itself(loader: DataLoader[Any]) -> bool:
    """Check that a batch sampler draws otherwise after an epoch than when it is made again."""
    own, batches = _own_size(loader, Remaking()), loader.batch_sampler
    with order_restored(loader):
        if batches is not None:
            deque(batches, maxlen=0)
        return _drawn(loader) != _drawn_at(loader, own, Remaking())


def _drawn_at(loader: DataLoader[Any], batch_size: int, setter: SetBatchSize | None) -> str:
    with changed_batch_size(loader, batch_size, setter):
        return _drawn(loader)


def _drawn(loader: DataLoader[Any]) -> str:
    """Return the number of batches of a batch sampler and the first ones, as words."""
    with order_restored(loader):
        batches: Any = loader.batch_sampler
        return repr([length_of(batches), *islice(batches, _COMPARED)])
