"""Notice a workload that ignores its batch size, by its memory."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from autobatch._trials import Trial

# Identical allocations at this many times the batch size: the workload ignores it. Some round it
_IGNORED_FACTOR: Final = 2
# Allocations of a step of which identity shows something
_FEWEST: Final = 2


def check_size_is_used(trials: Iterable[Trial]) -> None:
    """Raise ValueError if trials of one size allocated the same as those of another."""
    smaller: list[Trial] = []
    for trial in sorted(trials, key=lambda each: each.batch_size):
        if trial.peak is None or len(trial.profile) < _FEWEST:
            continue
        for other in smaller:
            is_larger = trial.batch_size >= _IGNORED_FACTOR * other.batch_size
            if is_larger and _allocate_the_same(trial, other):
                raise ValueError(
                    "Memory use was identical at "
                    f"batch_size={other.batch_size} and at batch_size={trial.batch_size}, so the "
                    "workload seems to ignore its batch size. It must make micro-batches of the "
                    "given size; if the data set is smaller than that, give its length in "
                    "dataset_size."
                )
        smaller.append(trial)


def _allocate_the_same(one: Trial, other: Trial) -> bool:
    """Compare peaks, and the last steps from the beginning, byte by byte.

    The last step alone may be a partial batch, of as many samples at two sizes.
    """
    trials, steps = (one, other), sorted((_step(one), _step(other)), key=len)
    if one.accumulate == other.accumulate:
        rises = {(trial.peak or 0) - trial.resident for trial in trials}
        return len(rises) == len({*steps}) == 1
    # The peak under accumulation has gradients besides: it has to be that of the last step
    is_last = all(max(trial.profile) == trial.peak for trial in trials)
    return is_last and _has_micro_batches_more(*steps)


def _has_micro_batches_more(short: Sequence[int], long: Sequence[int]) -> bool:
    """Return True for a step that is another one with some allocations between two of them.

    These are later micro-batches of the update, after the first and before the optimizer.
    """
    start, end = _common(short, long), _common(short[::-1], long[::-1])
    return len(long) > len(short) and start >= _FEWEST and start + end >= len(short)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _step(trial: Trial) -> tuple[int, ...]:
    """Return the bytes after each allocation of the last step, over those after the first."""
    first, *_ = trial.profile
    return tuple(nbytes - first for nbytes in trial.profile)
