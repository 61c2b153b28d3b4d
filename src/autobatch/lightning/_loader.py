"""One loader: the size of its batches, whether it takes another, and what an epoch of it holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autobatch._snapshot import Snapshot
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FixedBatchSizeError",
    "Resized",
    "SetBatchSize",
    "batch_size_of",
    "batches_of",
    "capture_order",
    "checked_setter",
    "disobedience",
    "first_batch",
    "indifference",
    "is_empty",
    "own_size",
    "problem_of",
    "rebatched",
    "sampler_of",
    "samples_of",
    "shards_of",
]

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


class FixedBatchSizeError(AutobatchError):
    """A loader whose batch size can not be changed."""


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


def disobedience(loader: DataLoader[Any]) -> str | None:
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


def indifference(loader: DataLoader[Any], setter: SetBatchSize) -> str | None:
    """What is wrong with a loader whose batches the user's setter does not change."""
    own = own_size(loader, setter)
    one, two = (_first_batch_at(loader, size, setter) for size in (own, 2 * own))
    samples = samples_of(loader, 1)
    if one != two or (samples is not None and samples <= one):
        return None
    return f"set_batch_size leaves its first batch at {one} samples, be it asked for {own} or for {2 * own}"


def _first_batch_at(
    loader: DataLoader[Any], batch_size: int, setter: SetBatchSize
) -> int:
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


def rebatched(
    loader: DataLoader[Any], batch_size: int, setter: SetBatchSize | None
) -> Resized:
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
