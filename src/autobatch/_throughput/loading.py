"""Time spent waiting for the data loader."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Loading:
    """Waiting for data, beside the steps it is for: measured.

    Args:
        wait_seconds: Seconds spent waiting for the next batch, of all that were measured.
        step_seconds: Seconds between, in which steps ran.
        batches: How many batches that was.
    """

    wait_seconds: float
    step_seconds: float
    batches: int

    @property
    def share(self) -> float:
        """Share of the time that was spent waiting, 0 to 1."""
        whole = self.wait_seconds + self.step_seconds
        return self.wait_seconds / whole if whole else 0.0


@dataclass(slots=True)
class Waited:
    """Waiting for data, as it is counted.

    Args:
        seconds: Spent in it so far.
        batches: That came of it.
    """

    seconds: float = 0.0
    batches: int = 0


@contextlib.contextmanager
def loading_watch(clock: Callable[[], float]) -> Iterator[Waited]:
    """Count what every DataLoader of this process makes its reader wait while the body runs.

    A clock that waits for queued work keeps the device's own time out of the count; one that does not counts that as
    well where reading a batch waits for the device.
    """
    from torch.utils.data import dataloader

    # Private in torch 2.13: the class that every DataLoader's iterator extends, and where all of them fetch
    kind: Any = dataloader._BaseDataLoaderIter  # noqa: SLF001 -- there is no public place
    fetch = kind.__next__
    waited = Waited()
    depth = 0  # a data set may read another loader

    def timed(iterator: Any) -> Any:
        nonlocal depth
        if depth:
            return fetch(iterator)
        depth += 1
        began = clock()
        try:
            batch = fetch(iterator)
        finally:
            depth -= 1
            waited.seconds += clock() - began
        waited.batches += 1
        return batch

    kind.__next__ = timed
    try:
        yield waited
    finally:
        kind.__next__ = fetch
