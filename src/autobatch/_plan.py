"""From the largest micro-batch that fits to the batch the optimizer should see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from autobatch._pace import Pace

__all__ = ["BatchPlan", "candidates", "nearest", "per_rank"]

# Of the fastest: below the knee a larger micro-batch buys next to nothing
_FAST_ENOUGH: Final = 0.95
# An exact effective batch may cost up to this many times the fewest passes
_CHEAP: Final = 2


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How an effective batch is made: micro-batch × accumulation × ranks.

    Args:
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        world_size: Ranks that train together.

    Example:
        >>> BatchPlan(micro_batch_size=32, accumulate_grad_batches=8).effective_batch_size
        256
    """

    micro_batch_size: int
    accumulate_grad_batches: int = 1
    world_size: int = 1

    @property
    def effective_batch_size(self) -> int:
        """Samples behind one optimizer update, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size


def per_rank(target: int, world_size: int) -> int:
    """Samples of an effective batch that each rank sees, to the nearest whole one."""
    return max(1, round(target / world_size))


def candidates(
    target: int,
    world_size: int,
    largest: int,
    pace: Pace,
    usable: Callable[[int], bool],
) -> tuple[BatchPlan, ...]:
    """Plans that reach the target with usable micro-batches up to the largest, the one to take first.

    Exact ones where exactness is cheap: with a micro-batch within 5 % of the fastest of all sizes, the smallest such
    one first, or in few passes. Else the nearest effective batch in few passes.
    """
    samples = per_rank(target, world_size)
    largest = min(largest, samples)
    most = _CHEAP * math.ceil(samples / largest)
    exact = [
        BatchPlan(size, samples // size, world_size)
        for size in range(largest, 0, -1)
        if samples % size == 0 and usable(size)
    ]
    fast = _as_fast_as_any(exact, samples, pace)
    cheap = [plan for plan in exact if plan.accumulate_grad_batches <= most]
    if fast:
        return _smallest_first(fast, [*fast, *cheap], pace)
    if cheap:
        return _by_speed(cheap, pace)
    sizes = range(largest, math.ceil(samples / most) - 1, -1)
    near = (
        BatchPlan(size, max(1, round(samples / size)), world_size)
        for size in sizes
        if usable(size)
    )
    return tuple(
        sorted(
            (plan for plan in near if plan.accumulate_grad_batches <= most),
            key=lambda plan: (_off(plan, target), plan.accumulate_grad_batches),
        )
    )


def nearest(target: int, world_size: int, sizes: Iterable[int]) -> BatchPlan:
    """The plan closest to the target that uses one of these micro-batches; the largest of those as close.

    No plan may take more than twice the passes that the largest of them needs.
    """
    samples, sizes = per_rank(target, world_size), sorted(sizes)
    most = _CHEAP * max(1, round(samples / sizes[-1]))
    plans = (
        BatchPlan(size, max(1, round(samples / size)), world_size) for size in sizes
    )
    return min(
        (plan for plan in plans if plan.accumulate_grad_batches <= most),
        key=lambda plan: (_off(plan, target), -plan.micro_batch_size),
    )


def _off(plan: BatchPlan, target: int) -> int:
    return abs(plan.effective_batch_size - target)


def _as_fast_as_any(
    plans: Iterable[BatchPlan], samples: int, pace: Pace
) -> list[BatchPlan]:
    """Those that take so many samples within 5 % as fast as any timed size would."""
    paces = [
        _sample_seconds(size, max(1, round(samples / size)), pace)
        for size in pace.sizes
        if size <= samples
    ]
    least = min((each for each in paces if each is not None), default=None)
    if least is None:
        return []
    return [
        plan
        for plan in plans
        if (seconds := _plan_seconds(plan, pace)) is not None
        and _FAST_ENOUGH * seconds <= least
    ]


def _plan_seconds(plan: BatchPlan, pace: Pace) -> float | None:
    return _sample_seconds(plan.micro_batch_size, plan.accumulate_grad_batches, pace)


def _sample_seconds(size: int, accumulate: int, pace: Pace) -> float | None:
    """Seconds per sample, the share of the optimizer step included."""
    seconds = pace.update(size, accumulate)
    return None if seconds is None else seconds / (size * accumulate)


def _by_speed(plans: list[BatchPlan], pace: Pace) -> tuple[BatchPlan, ...]:
    """Smallest micro-batch within 5 % of the fastest of these first, then the others from the fastest on."""
    timed = {plan: _plan_seconds(plan, pace) for plan in plans}
    known = [seconds for seconds in timed.values() if seconds is not None]
    if not known:
        return tuple(sorted(plans, key=lambda plan: plan.accumulate_grad_batches))
    fast = [
        plan
        for plan, seconds in timed.items()
        if seconds is not None and _FAST_ENOUGH * seconds <= min(known)
    ]
    return _smallest_first(fast, plans, pace)


def _smallest_first(
    fast: list[BatchPlan], plans: list[BatchPlan], pace: Pace
) -> tuple[BatchPlan, ...]:
    first = min(fast, key=lambda plan: plan.micro_batch_size)
    others = [plan for plan in dict.fromkeys(plans) if plan != first]

    def seconds(plan: BatchPlan) -> float:
        known = _plan_seconds(plan, pace)
        return math.inf if known is None else known

    return (first, *sorted(others, key=seconds))
