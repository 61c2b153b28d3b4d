"""Time a fit spends waiting for its loader."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import torch

from autobatch._throughput.loading import Loading
from autobatch.lightning._compat import data_fetcher, fetch_profiler, patched_fetch_profiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._undo import patched
    from autobatch.lightning._trainer import Trainer

_WARM_UP: Final = 3  # batches before the first that counts: kernels are chosen, workers read ahead
_MOST: Final = 200  # batches to measure
_LEAST: Final = 10  # batches, below which the measurement is not reported


class DataLoaderTimer:
    """Measure the waiting time for the loader, and the rest, in the first batches of a fit.

    The time from one batch to the next within an epoch counts, unless something else comes between
    them (validation, a checkpoint, a new epoch and its workers). On a GPU a wait counts only if all
    queued work was finished at its end; an event shows this without holding up the device. All of
    that wait counts then, although the queue may have become empty in the middle of it.

    Args:
        clock: Seconds, on the host.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seen = 0  # batches
        self._counted = 0  # batches
        self._waited = self._seconds = 0.0  # of the batches that count
        self._wait = 0.0  # for the next batch
        self._began: float | None = None  # start of the current batch; None if it does not count
        self._patch: patched | None = None

    @property
    def loading(self) -> Loading | None:
        """The measurement; None if it is of too few batches."""
        if self._counted < _LEAST:
            return None
        return Loading(self._waited, self._seconds - self._waited, self._counted)

    def start_batch(self, trainer: Trainer) -> None:
        """Count the time since the previous batch."""
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
        """Do not count the time until the next batch: something else takes part of it."""
        self._began = None

    def stop(self) -> None:
        """Stop measuring, and keep the measurement."""
        self.interrupt()
        if self._patch is not None:
            self._patch.restore()
            self._patch = None

    def _watch(self, trainer: Trainer) -> None:
        """Replace the profiler calls around a fetch; Lightning 2.6 sets them in each epoch."""
        fetcher = data_fetcher(trainer.fit_loop)
        if fetcher is None or fetch_profiler(fetcher)[0] == self._before_fetch:
            return
        self._former = fetch_profiler(fetcher)
        self._device = trainer.strategy.root_device
        self._patch = patched_fetch_profiler(fetcher, self._before_fetch, self._after_fetch)
        self._patch.apply()

    def _before_fetch(self) -> None:
        self._former[0]()
        self._is_busy = _pending_work(self._device)
        self._asked = self._clock()

    def _after_fetch(self) -> None:
        took = self._clock() - self._asked
        if not self._is_busy():
            self._wait += took
        self._former[1]()


def _pending_work(device: torch.device) -> Callable[[], bool]:
    """Return a function that tests whether the work that is queued on a device now still runs."""
    if device.type != "cuda":
        return lambda: False
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return lambda: not event.query()
