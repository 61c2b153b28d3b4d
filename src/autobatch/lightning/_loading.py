"""Time a fit spends waiting for its loader."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._throughput.loading import Loading

if TYPE_CHECKING:
    from collections.abc import Callable

_WARM_UP: Final = 3  # batches that are not counted: kernels are chosen, workers have read ahead
_MOST: Final = 200  # batches to measure
_LEAST: Final = 10  # batches that tell something


class DataLoaderTimer:
    """Times the first batches of a fit: how long the loader is waited for, and how long the rest takes.

    Counted is the time from one batch to the next within an epoch, without what comes between them on its own account
    (validation, a checkpoint, a new epoch and its workers). On a GPU the wait counts only where the queue had run empty
    by its end: asked of an event, so that nothing is held up. Where it did, all of that wait counts, though the queue
    may have emptied halfway through. That part has run on no GPU yet.

    Args:
        clock: Seconds, on the host.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seen = 0
        self._waited = self._seconds = 0.0
        self._counted = 0
        self._wait = 0.0  # for the batch that comes next
        self._began: float | None = None  # the batch that runs
        self._fetcher: Any = None
        self._former: tuple[Any, Any] = (None, None)

    @property
    def loading(self) -> Loading | None:
        """What was measured; None where it was too little to tell."""
        if self._counted < _LEAST:
            return None
        return Loading(self._waited, self._seconds - self._waited, self._counted)

    def start_batch(self, trainer: Any) -> None:
        """A batch has come: count the time since the one before."""
        now = self._clock()
        if self._began is not None and self._seen > _WARM_UP:
            self._waited += self._wait
            self._seconds += now - self._began
            self._counted += 1
        self._seen += 1
        self._began, self._wait = now, 0.0
        if self._counted >= _MOST:
            self.stop()
        else:
            self._watch(trainer)

    def interrupt(self) -> None:
        """Something else comes before the next batch: do not count it."""
        self._began = None

    def stop(self) -> None:
        """Watch no longer; what was measured stays."""
        self.interrupt()
        if self._fetcher is not None:
            fetcher, self._fetcher = self._fetcher, None
            fetcher._start_profiler, fetcher._stop_profiler = self._former

    def _watch(self, trainer: Any) -> None:
        """Stand between the loop and its loader, where Lightning 2.6 has its profiler stand, set anew each epoch."""
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is None or fetcher._start_profiler == self._before_fetch:
            return
        self._fetcher = fetcher
        self._former = fetcher._start_profiler, fetcher._stop_profiler
        self._device = trainer.strategy.root_device
        fetcher._start_profiler, fetcher._stop_profiler = (
            self._before_fetch,
            self._after_fetch,
        )

    def _before_fetch(self) -> None:
        self._former[0]()
        self._is_busy = _queue(self._device)
        self._asked = self._clock()

    def _after_fetch(self) -> None:
        took = self._clock() - self._asked
        if not self._is_busy():
            self._wait += took
        self._former[1]()


def _queue(device: torch.device) -> Callable[[], bool]:
    """Whether what is queued on a device now is still running, at any later time."""
    if device.type != "cuda":
        return lambda: False
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return lambda: not event.query()
