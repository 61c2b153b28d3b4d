"""Sizes to try once the workload has refused one: those that are likely to run.

A workload refuses a size by an error of its own. One that does so mostly takes multiples of some
size, its divisors, or only a few samples, so that memory alone cannot guide the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._trials import refused_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial

_MAX_REFUSALS: Final = 6  # sizes


def next_multiple(trials: Sequence[Trial], high: int) -> int | None:
    """Return an untried size related to the first one that ran; None to end.

    The largest size that fits is doubled. Where that fails, the size half-way is tried, and where
    it was refused, also its double.
    """
    refused, tried = refused_sizes(trials), {trial.batch_size for trial in trials}
    if len(refused) >= _MAX_REFUSALS:
        return None
    fits = [trial.batch_size for trial in trials if trial.fits]
    good = max(fits, default=0)
    failed = [size for size in tried - refused if size > good]  # for lack of memory
    below = min(failed, default=high + 1)
    if fits:
        sizes = _above(good, fits[0])
    elif failed:
        own = trials[0].batch_size
        low = max((size for size in refused if size < below), default=0)
        divisors = (size for size in range(below // 2, 0, -1) if own % size == 0)
        sizes = [*divisors, (low + below) // 2]
    else:
        own = trials[0].batch_size
        sizes = [2 * own, 4 * own, 1]
    untried = (size for size in sizes if good < size < below and size not in tried)
    return next((size for size in untried if size <= high), None)


def _above(good: int, base: int) -> list[int]:
    doubled = base
    while doubled <= good:
        doubled *= 2
    half_way = 3 * doubled // 4
    return [doubled, *([] if half_way % base else [half_way]), 2 * doubled]
