"""Change a loader's batch size, verify it, undo it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError, FixedBatchSizeError
from autobatch.lightning._compat import package_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# The user's own way to give a loader another batch size
SetBatchSize: TypeAlias = Callable[[DataLoader[Any], int], None]

_MISSING: Final = object()


def checked_setter(set_batch_size: SetBatchSize | None) -> SetBatchSize | None:
    """What was given, refused where it can not set anything."""
    if set_batch_size is None or callable(set_batch_size):
        return set_batch_size
    raise ValueError(
        f"set_batch_size={set_batch_size!r} can not be called; give a function of a DataLoader and a batch size."
    )


def capture_order(loader: DataLoader[Any], snapshot: Snapshot) -> None:
    """Let a snapshot give back what decides the order of the data: samplers, their counters and generators."""
    samplers = (loader.batch_sampler, loader.sampler, sampler_of(loader))
    snapshot.capture_light(*(each for each in samplers if each is not None))
    if loader.generator is not None:
        snapshot.capture(loader.generator)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What names the samples: beneath a batch sampler of the user's, torch's own `loader.sampler` does not."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def is_empty(loader: object) -> bool:
    """Whether a loader that was passed has no data at all."""
    return isinstance(loader, DataLoader) and samples_of(loader, 1) == 0


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Its batch size, which a batch sampler of the user's keeps to itself."""
    return int(loader.batch_sampler.batch_size)  # type: ignore[union-attr]  # problem_of has looked


def shards_of(trainer: Any, loader: DataLoader[Any]) -> int:
    """Among how many ranks Lightning 2.6 will deal the samples out, where the loader does not do so by itself."""
    if trainer._data_connector._requires_distributed_sampler(loader):
        return int(trainer.world_size)
    return 1


def samples_of(loader: DataLoader[Any], shards: int) -> int | None:
    """Samples of one rank per epoch; None where the data set is a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    return -(-len(sampler_of(loader)) // shards)


def batches_of(
    loader: DataLoader[Any],
    batch_size: int,
    shards: int,
    setter: SetBatchSize | None,
) -> int | None:
    """Batches of one rank per epoch at another batch size; None where that is not known."""
    samples = samples_of(loader, shards)
    if not isinstance(loader.batch_sampler, Sized) or samples is None:
        return None
    if shards > 1:
        drops = getattr(loader.batch_sampler, "drop_last", False)
        return samples // batch_size if drops else -(-samples // batch_size)
    resized = rebatched(loader, batch_size, setter)
    try:
        return len(loader.batch_sampler)
    finally:
        resized.undo()


def problem_of(loader: object, setter: SetBatchSize | None) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not a DataLoader"
    sampler = loader.batch_sampler
    if sampler is None:
        return "it has batch_size=None"
    if setter is None and not isinstance(getattr(sampler, "batch_size", None), int):
        return f"its batch sampler, a {type(sampler).__name__}, has no batch_size (set_batch_size may change it)"
    if not isinstance(loader.dataset, IterableDataset) and not hasattr(
        sampler_of(loader), "__len__"
    ):
        return f"its sampler, a {type(sampler_of(loader)).__name__}, has no length"
    return None


def check_sampler(loader: DataLoader[Any]) -> str | None:
    """What is wrong with a batch sampler that makes its batches by itself, batch size or no."""
    if type(loader.batch_sampler) is BatchSampler:
        return None
    sampler = loader.batch_sampler
    with Snapshot() as snapshot:
        capture_order(loader, snapshot)
        own, wanted = batch_size_of(loader), 1 if batch_size_of(loader) > 1 else 2
        length = len(sampler) if isinstance(sampler, Sized) else None
        _resize(loader, wanted)
        try:
            got = first_batch(loader)
            other = len(sampler) if isinstance(sampler, Sized) else None
        finally:
            _resize(loader, own)
    name = type(sampler).__name__
    if length is not None and length == other and length > 1:
        return f"its batch sampler, a {name}, says {length} batches at any batch_size"
    if got == wanted:
        return None
    return f"its batch sampler, a {name}, makes batches of {got} when its batch_size is {wanted}"


def check_setter(loader: DataLoader[Any], setter: SetBatchSize) -> str | None:
    """What is wrong with a loader whose batches the user's setter does not change."""
    own = own_size(loader, setter)
    one, two = (_first_batch_at(loader, size, setter) for size in (own, 2 * own))
    samples = samples_of(loader, 1)
    if one != two or (samples is not None and samples <= one):
        return None
    return f"set_batch_size leaves its first batch at {one} samples, be it asked for {own} or for {2 * own}"


def _first_batch_at(loader: DataLoader[Any], batch_size: int, setter: SetBatchSize) -> int:
    with Snapshot() as snapshot:
        capture_order(loader, snapshot)
        resized = rebatched(loader, batch_size, setter)
        try:
            return first_batch(loader)
        finally:
            resized.undo()


def own_size(loader: DataLoader[Any], setter: SetBatchSize | None) -> int:
    """The batch size that a loader has; for one whose batch sampler goes by something else, that of its first batch."""
    if setter is None:
        return batch_size_of(loader)
    with Snapshot() as snapshot:
        capture_order(loader, snapshot)
        return first_batch(loader)


def first_batch(loader: DataLoader[Any]) -> int:
    """Samples in the first batch, by its indices alone."""
    return len(next(iter(loader.batch_sampler)))  # type: ignore[arg-type]  # problem_of has looked


@dataclass
class Resized:
    """A loader that was given another batch size."""

    loader: DataLoader[Any]
    undo: Callable[[], None]  # gives it its own size again
    holds: Callable[[], bool]  # whether it still has the other


def rebatched(loader: DataLoader[Any], batch_size: int, setter: SetBatchSize | None) -> Resized:
    """Give a loader another batch size, in a way that can be undone."""
    if setter is not None:
        return _set(loader, batch_size, setter)
    own = batch_size_of(loader)
    _resize(loader, batch_size)
    return Resized(
        loader,
        undo=partial(_resize, loader, own),
        holds=lambda: batch_size_of(loader) == batch_size,
    )


def _set(loader: DataLoader[Any], batch_size: int, setter: SetBatchSize) -> Resized:
    """Let the user's setter act; what it assigned is undone, and nothing else: the order of the data goes on."""
    owners = (loader, loader.batch_sampler, loader.sampler, sampler_of(loader))
    attributes = [vars(owner) for owner in owners if owner is not None]
    before = [{**each} for each in attributes]

    def assigned(now: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
        return [
            (at, name)
            for at, (one, other) in enumerate(zip(attributes, now, strict=True))
            for name in one.keys() | other.keys()
            if one.get(name, _MISSING) is not other.get(name, _MISSING)
        ]

    def undo(names: Sequence[tuple[int, str]]) -> None:
        for at, name in names:
            if name in before[at]:
                attributes[at][name] = before[at][name]
            else:
                attributes[at].pop(name, None)

    try:
        setter(loader, batch_size)
    except BaseException:
        undo(assigned(before))
        raise
    names, after = assigned(before), [{**each} for each in attributes]
    return Resized(
        loader,
        undo=partial(undo, names),
        holds=lambda: not set(names).intersection(assigned(after)),
    )


def _resize(loader: DataLoader[Any], batch_size: int) -> None:
    loader.batch_sampler.batch_size = batch_size  # type: ignore[union-attr]  # problem_of has looked
    if loader.batch_size is not None:
        # DataLoader refuses plain assignment once it is made; iteration goes by the batch sampler.
        object.__setattr__(loader, "batch_size", batch_size)
    for thing in (loader, loader.batch_sampler):
        _note(thing, batch_size)


def _note(thing: Any, batch_size: int) -> None:
    """Change what Lightning 2.6 has noted of a loader that a hook made, and makes it anew from for several ranks."""
    names = getattr(thing, "__pl_saved_arg_names", None)
    if names is None:
        return
    arguments = getattr(thing, "__pl_saved_args")
    if "batch_size" in names:
        at = names.index("batch_size")
        changed = (*arguments[:at], batch_size, *arguments[at + 1 :])
        object.__setattr__(thing, "__pl_saved_args", changed)
    elif "batch_size" in inspect.signature(type(thing).__init__).parameters:
        getattr(thing, "__pl_saved_kwargs")["batch_size"] = batch_size


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
                check_sampler(loader) if setter is None else check_setter(loader, setter)
            )
            if problem:
                raise FixedBatchSizeError(
                    f"AutoBatch can not change the batch size of this loader: {problem}. Use a plain "
                    "DataLoader(dataset, batch_size=…), or leave AutoBatch out."
                )
        self.each: tuple[DataLoader[Any], ...] = tuple(self._combined.flattened)
        self.own_sizes: tuple[int, ...] = tuple(own_size(loader, setter) for loader in self.each)
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
    applying.apply_to_collection(getattr(given, "iterables", given), DataLoader, found.append)
    return found
