"""From the largest micro-batch that fits to the batch the optimizer should see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    target: int, world_size: int, largest: int, pace: Pace
) -> tuple[BatchPlan, ...]:
    """Plans that reach the target with micro-batches up to the largest, the one to take first.

    Exact ones where exactness is cheap, of these first the smallest micro-batch within 5 % of the fastest; else the
    nearest effective batch in the fewest passes.
    """
    samples = per_rank(target, world_size)
    most = _CHEAP * math.ceil(samples / largest)
    smallest = math.ceil(samples / min(most, samples))
    sizes = range(min(largest, samples), min(smallest, largest) - 1, -1)
    exact = [
        BatchPlan(size, samples // size, world_size)
        for size in sizes
        if samples % size == 0
    ]
    if exact:
        return tuple(_by_speed(exact, pace))
    near = (
        BatchPlan(size, max(1, round(samples / size)), world_size) for size in sizes
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


def _by_speed(plans: list[BatchPlan], pace: Pace) -> list[BatchPlan]:
    """Smallest micro-batch within reach of the fastest first, then the others from the fastest on."""
    seconds = {
        plan: pace.update(plan.micro_batch_size, plan.accumulate_grad_batches)
        for plan in plans
    }
    timed = {plan: value for plan, value in seconds.items() if value is not None}
    if not timed:
        return sorted(plans, key=lambda plan: plan.accumulate_grad_batches)
    best = min(timed.values())
    fast = [plan for plan, value in timed.items() if best / value >= _FAST_ENOUGH]
    first = min(fast, key=lambda plan: plan.micro_batch_size)
    rest = sorted(
        (plan for plan in plans if plan != first),
        key=lambda plan: timed.get(plan, math.inf),
    )
    return [first, *rest]
