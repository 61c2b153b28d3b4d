"""BatchPlan: micro-batch × accumulation × ranks, and the choice among the plans that reach a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._throughput import StepTimes
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from autobatch._throughput.curve import Speed
    from autobatch._trials import Trial
    from autobatch._trials.runner import TrialHistory

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
    pace: StepTimes,
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
        BatchPlan(size, max(1, round(samples / size)), world_size) for size in sizes if usable(size)
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
    plans = (BatchPlan(size, max(1, round(samples / size)), world_size) for size in sizes)
    return min(
        (plan for plan in plans if plan.accumulate_grad_batches <= most),
        key=lambda plan: (_off(plan, target), -plan.micro_batch_size),
    )


def _off(plan: BatchPlan, target: int) -> int:
    return abs(plan.effective_batch_size - target)


def _as_fast_as_any(plans: Iterable[BatchPlan], samples: int, pace: StepTimes) -> list[BatchPlan]:
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
        if (seconds := _plan_seconds(plan, pace)) is not None and _FAST_ENOUGH * seconds <= least
    ]


def _plan_seconds(plan: BatchPlan, pace: StepTimes) -> float | None:
    return _sample_seconds(plan.micro_batch_size, plan.accumulate_grad_batches, pace)


def _sample_seconds(size: int, accumulate: int, pace: StepTimes) -> float | None:
    """Seconds per sample, the share of the optimizer step included."""
    seconds = pace.update(size, accumulate)
    return None if seconds is None else seconds / (size * accumulate)


def _by_speed(plans: list[BatchPlan], pace: StepTimes) -> tuple[BatchPlan, ...]:
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
    fast: list[BatchPlan], plans: list[BatchPlan], pace: StepTimes
) -> tuple[BatchPlan, ...]:
    first = min(fast, key=lambda plan: plan.micro_batch_size)
    others = [plan for plan in dict.fromkeys(plans) if plan != first]

    def seconds(plan: BatchPlan) -> float:
        known = _plan_seconds(plan, pace)
        return math.inf if known is None else known

    return (first, *sorted(others, key=seconds))


# Trials at most for plans whose micro-batch the search did not run
CONFIRMATIONS: Final = 2


@dataclass(frozen=True, slots=True)
class Choice:
    """The choice of a plan once the search is over. No size is chosen that was not run and fits.

    Args:
        record: What every rank saw so far.
        speed: What was timed besides.
        world_size: Ranks that train together.
        in_time: Whether there is time for a trial of a size.
        attempt: Runs a trial of a size, with so many micro-batches per update, for the record.
        check: Refuses a plan that the workload can not train with.
        can_accumulate: Whether the workload takes an accumulation; where it does not, speed is no reason for one.
        last_samples: Samples in the last micro-batch that each rank trains on in an epoch; None where not known.
    """

    record: TrialHistory
    speed: Speed
    world_size: int
    in_time: Callable[[int], bool]
    attempt: Callable[[int, int], Trial]
    check: Callable[[BatchPlan], None]
    can_accumulate: bool
    last_samples: Callable[[int], int | None]

    def largest(self, accumulate: int) -> BatchPlan | None:
        """The largest micro-batch that fits and that an epoch can be trained with to its end; None where none fits."""
        size = max(self.record.fitting, default=1)
        self._try_last_of(size)
        if not self._ends_well(size):
            below = next(filter(self._ends_well, range(size - 1, 0, -1)), size)
            if below not in self.record.fitting and self.in_time(below):
                self.attempt(below, min(2, accumulate))
        if not self._sound:
            return None
        return BatchPlan(self._sound[-1], accumulate, self.world_size)

    def towards(self, target: int) -> BatchPlan | None:
        """The best plan for a target of those whose micro-batch was run as training will; None where none fits."""
        self._confirm(target)
        if not self._sound:
            return None
        verified = filter(self._is_verified, self._candidates(target))
        plan = next(verified, None) or self._nearest(target)
        self.check(plan)
        return plan

    def _confirm(self, target: int) -> None:
        """Run the micro-batch of the best plan, where the search did not; then look which is the best now."""
        left = CONFIRMATIONS
        while left:
            failed = {trial.batch_size for trial in self._trials if not trial.fits}
            plans = [
                plan for plan in self._candidates(target) if plan.micro_batch_size not in failed
            ]
            if plans and self._try_last_of(plans[0].micro_batch_size):
                continue
            if not plans or self._is_verified(plans[0]) or not self._run(plans[0]):
                return
            left -= 1

    def _run(self, plan: BatchPlan) -> bool:
        """Put its micro-batch on the record, if there is time for it."""
        self.check(plan)
        size = plan.micro_batch_size
        if size in self.speed.aside:
            self.record.keep(self.speed.aside.pop(size))
            return True
        if not self.in_time(size):
            return False
        self.attempt(size, min(2, plan.accumulate_grad_batches))
        return True

    def _candidates(self, target: int) -> tuple[BatchPlan, ...]:
        if not self.record.fitting:
            return ()
        pace = StepTimes.of(self._trials, self.speed.curve)
        largest = self.record.fitting[-1]
        plans = candidates(target, self.world_size, largest, pace, self._ends_well)
        if self.can_accumulate:
            return plans
        return tuple(p for p in plans if p.accumulate_grad_batches == 1) or plans

    def _nearest(self, target: int) -> BatchPlan:
        sound = self._sound
        plan = nearest(target, self.world_size, sound)
        if self._is_verified(plan):
            return plan
        # Run without accumulation alone, where gradients do not outlive their micro-batch
        accumulated = [
            trial.batch_size
            for trial in self._trials
            if trial.fits and trial.accumulate > 1 and trial.batch_size in sound
        ]
        return nearest(target, self.world_size, accumulated or sound)

    def _is_verified(self, plan: BatchPlan) -> bool:
        pattern = min(2, plan.accumulate_grad_batches)
        return any(
            trial.fits and trial.batch_size == plan.micro_batch_size and trial.accumulate >= pattern
            for trial in self._trials
        )

    def _try_last_of(self, size: int) -> bool:
        """Run one sample, where that is what an epoch of this size ends with: layers may need two for a variance."""
        if size == 1 or self.last_samples(size) != 1 or not self.in_time(1):
            return False
        if any(trial.batch_size == 1 for trial in self._trials):
            return False
        self.attempt(1, 1)
        return True

    def _ends_well(self, size: int) -> bool:
        """Whether an epoch of this size does not end with a micro-batch that the workload is known to refuse."""
        return self.last_samples(size) not in {
            trial.batch_size for trial in self._trials if trial.outcome is Outcome.REFUSED
        }

    @property
    def _sound(self) -> list[int]:
        """The sizes that fit and end well; where none does, what fits: a note tells of it."""
        fitting = self.record.fitting
        return [size for size in fitting if self._ends_well(size)] or fitting

    @property
    def _trials(self) -> list[Trial]:
        return self.record.trials
