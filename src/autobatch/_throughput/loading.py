"""Time spent waiting for the data loader."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Loading:
    """Time spent waiting for data during training steps: measured.

    Args:
        wait_seconds: Seconds spent waiting for the next batch.
        step_seconds: Seconds spent in steps.
        batches: Number of batches.
    """

    wait_seconds: float
    step_seconds: float
    batches: int

    def __add__(self, other: Loading) -> Loading:
        return Loading(
            self.wait_seconds + other.wait_seconds,
            self.step_seconds + other.step_seconds,
            self.batches + other.batches,
        )

    @property
    def share(self) -> float:
        """Share of the time spent waiting, 0 to 1."""
        total = self.wait_seconds + self.step_seconds
        return self.wait_seconds / total if total else 0.0


@contextlib.contextmanager
def loading_watch(clock: Callable[[], float]) -> Iterator[Waited]:
    """Time the DataLoaders that this thread begins to iterate in the body.

    A workload may create its loaders anywhere, so the public `DataLoader.__iter__` is replaced for
    the duration of the body; it returns an iterator that is timed until the body ends. Iterators
    of other threads, and those created before, are left alone.

    With a clock that waits for queued work, time of the device is not counted as waiting; with any
    other clock it is, if reading a batch waits for the device.
    """
    from torch.utils.data import DataLoader

    waited = Waited(clock)
    begin_iteration = DataLoader.__iter__

    def begin_timed_iteration(loader: DataLoader[Any]) -> Any:
        batches = begin_iteration(loader)
        return _TimedIterator(batches, waited) if waited.is_counting else batches

    with Undo() as undo:
        undo.add(waited.stop)
        undo.add(partial(setattr, DataLoader, "__iter__", begin_iteration))
        DataLoader.__iter__ = begin_timed_iteration  # type: ignore[method-assign] # restored
        yield waited


class Waited:
    """Seconds that one thread has spent waiting for batches, and the number of batches."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self.batches = 0
        self._clock = clock
        self._thread: int | None = threading.get_ident()
        self._is_reading = False

    @property
    def is_counting(self) -> bool:
        """Return True in the thread that is timed, until the watch ends."""
        return self._thread == threading.get_ident()

    def forget(self) -> None:
        """Count from here."""
        self.seconds, self.batches = 0.0, 0

    def stop(self) -> None:
        self._thread = None

    def read(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and count the time it takes."""
        if self._is_reading or not self.is_counting:  # a dataset may read another loader
            return next(batches)
        self._is_reading = True
        began = self._clock()
        try:
            batch = next(batches)
        finally:
            self._is_reading = False
            self.seconds += self._clock() - began
        self.batches += 1
        return batch


class _TimedIterator:
    """Iterator of a DataLoader whose reads are timed; all else is passed on to the original."""

    def __init__(self, batches: Any, waited: Waited) -> None:
        self._batches = batches
        self._waited = waited

    def __iter__(self) -> _TimedIterator:
        return self

    def __next__(self) -> Any:
        return self._waited.read(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":  # a copy that is not initialised yet
            raise AttributeError(name)
        return getattr(self._batches, name)
