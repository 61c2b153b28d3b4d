"""Change the batch size of a training loader, and prove it by reading one batch."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autobatch._snapshot import Snapshot
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Rebatched",
    "batch_size_of",
    "batches_of",
    "capture_order",
    "is_empty",
    "requested",
    "sampler_of",
    "samples_of",
]


def requested(source: Any) -> DataLoader[Any]:
    """The training loader that the Trainer's data source gives, refused where its batch size can not be changed.

    A hook of the module or the datamodule makes a new one each time it is asked.
    """
    loader = source.dataloader()
    problem = _problem(loader) or _disobedience(loader)
    if problem:
        raise AutobatchError(
            f"AutoBatch can not change the batch size of this training loader yet: {problem}. Use a plain "
            "DataLoader(dataset, batch_size=…), or train without AutoBatch."
        )
    return loader  # type: ignore[no-any-return]  # a DataLoader: _problem has looked


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Its batch size, which a batch sampler of the user's keeps to itself."""
    return int(loader.batch_sampler.batch_size)  # type: ignore[union-attr]  # _problem has looked


def is_empty(loader: object) -> bool:
    """Whether a loader that was passed has no data at all."""
    return isinstance(loader, DataLoader) and samples_of(loader) == 0


def samples_of(loader: DataLoader[Any]) -> int | None:
    """Samples per epoch; None where the data set is a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    return len(sampler_of(loader))


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What names the samples: beneath a batch sampler of the user's, torch's own `loader.sampler` does not."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def batches_of(loader: DataLoader[Any], batch_size: int) -> int | None:
    """Batches per epoch at another batch size; None where that is not known."""
    if not isinstance(loader.batch_sampler, Sized) or samples_of(loader) is None:
        return None
    own = batch_size_of(loader)
    _resize(loader, batch_size)
    try:
        return len(loader.batch_sampler)
    finally:
        _resize(loader, own)


def capture_order(loader: DataLoader[Any], snapshot: Snapshot) -> None:
    """Let a snapshot give back what decides the order of the data: samplers, their counters and generators."""
    samplers = (loader.batch_sampler, loader.sampler, sampler_of(loader))
    snapshot.capture_light(*(each for each in samplers if each is not None))
    if loader.generator is not None:
        snapshot.capture(loader.generator)


def _problem(loader: object) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not one DataLoader"
    sampler = loader.batch_sampler
    if sampler is None:
        return "it has batch_size=None"
    if not isinstance(getattr(sampler, "batch_size", None), int):
        return f"its batch sampler, a {type(sampler).__name__}, has no batch_size"
    if not isinstance(loader.dataset, IterableDataset) and not hasattr(
        sampler_of(loader), "__len__"
    ):
        return f"its sampler, a {type(sampler_of(loader)).__name__}, has no length"
    return None


def _disobedience(loader: DataLoader[Any]) -> str | None:
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
            got = _one_batch(loader)
            other = len(sampler) if isinstance(sampler, Sized) else None
        finally:
            _resize(loader, own)
    name = type(sampler).__name__
    if length is not None and length == other and length > 1:
        return f"its batch sampler, a {name}, says {length} batches at any batch_size"
    if got == wanted:
        return None
    return f"its batch sampler, a {name}, makes batches of {got} when its batch_size is {wanted}"


def _one_batch(loader: DataLoader[Any]) -> int:
    """Samples in the first batch, by its indices alone."""
    return len(next(iter(loader.batch_sampler)))  # type: ignore[arg-type]  # _problem has looked


@dataclass
class _Resized:
    loader: DataLoader[Any]
    batch_size: int  # its own


class Rebatched:
    """Gives every training loader that a Trainer asks for another batch size, until it is undone.

    Loaders are changed in place, which keeps their sampler, shuffling, workers and class. A loader that was passed to
    `fit` is the user's: it has its own size again after `undo`.
    """

    def __init__(self, source: Any, batch_size: int) -> None:
        self._source = source
        self._batch_size = batch_size
        self._resized: list[_Resized] = []
        # The instance's attribute hides the class's method: Lightning 2.6 asks its `_DataLoaderSource` for every loader.
        self._ask: Callable[[], Any] = source.dataloader
        source.dataloader = self._dataloader

    def undo(self) -> None:
        """Give the loaders their own size again, and let the source answer for itself."""
        self._source.__dict__.pop("dataloader", None)
        for resized in self._resized:
            _resize(resized.loader, resized.batch_size)
        self._resized.clear()

    def check(self) -> None:
        """Read one batch of indices back; `AutobatchError` where it is not of the size that was set."""
        loader = requested(self._source)
        got = _one_batch(loader)
        if got != min(self._batch_size, samples_of(loader) or got):
            raise AutobatchError(
                f"The training loader still makes batches of {got} after its batch size was set to "
                f"{self._batch_size}; AutoBatch can not tune it."
            )

    def _dataloader(self) -> Any:
        loader = self._ask()
        if _problem(loader) is None and batch_size_of(loader) != self._batch_size:
            self._resized.append(_Resized(loader, batch_size_of(loader)))
            _resize(loader, self._batch_size)
        return loader


def _resize(loader: DataLoader[Any], batch_size: int) -> None:
    loader.batch_sampler.batch_size = batch_size  # type: ignore[union-attr]  # _problem has looked
    if loader.batch_size is not None:
        # DataLoader refuses plain assignment once it is made; iteration goes by the batch sampler.
        object.__setattr__(loader, "batch_size", batch_size)
