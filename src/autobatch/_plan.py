"""BatchPlan: micro-batch × accumulation × ranks, and its choice for a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from autobatch._throughput import StepTimes
from autobatch._trials import is_selective, refused_sizes, trial_accumulation
from autobatch._trials.runner import per_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from autobatch._throughput import CurvePoint
    from autobatch._throughput.curve import Throughput
    from autobatch._throughput.preference import Preference, SampleTime
    from autobatch._trials import Trial
    from autobatch._trials.runner import TrialRunner

# Trials at most that confirm plans whose micro-batch the search did not run
MAX_CONFIRMATIONS: Final = 2

# An exact effective batch may take up to this many times the fewest micro-batches
_MAX_EXTRA_PASSES: Final = 2


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """An effective batch as micro-batch × accumulation × ranks.

    Args:
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        world_size: Ranks that train on different data.

    Example:
        >>> BatchPlan(micro_batch_size=32, accumulate_grad_batches=8).effective_batch_size
        256
    """

    micro_batch_size: int
    accumulate_grad_batches: int = 1
    world_size: int = 1

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer update, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size

    @property
    def trial_accumulation(self) -> int:
        """Micro-batches per update in a trial that verifies this plan."""
        return trial_accumulation(self.accumulate_grad_batches)


def choose_plan(
    runner: TrialRunner,
    throughput: Throughput,
    last_micro_batch: Callable[[int], int | None],
    preference: Preference | None,
) -> BatchPlan:
    """Choose a plan once the search is over; run the micro-batch of the best plan if need be.

    Only a size that was run and fits is chosen: the largest without a preference.

    Raises:
        DoesNotFitError: No batch size fits.
        ValueError: The target needs accumulation, and the workload cannot accumulate.
    """
    choice = _Choice(runner, throughput.curve, dict(throughput.unrecorded), last_micro_batch)
    target = runner.accumulation.target
    if preference is None:
        return choice.largest()
    return choice.fast(preference) if target is None else choice.for_target(target, preference)


def check_can_accumulate(plan: BatchPlan, runner: TrialRunner) -> None:
    """Refuse a plan with accumulation for a workload that cannot accumulate."""
    if plan.accumulate_grad_batches == 1 or runner.accumulation.is_supported:
        return
    target = runner.settings.target_batch_size
    cause = f"plan={plan}" if target is None else f"target_batch_size={target}"
    raise ValueError(
        f"{cause} takes {plan.accumulate_grad_batches} micro-batches of {plan.micro_batch_size} "
        "per update, and this workload cannot accumulate: write it as "
        "`def train(batch_size, accumulate):`, dividing each loss by `accumulate` and yielding "
        "after each optimizer step, or give a target that fits at once."
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """The choice of a plan among the sizes that were run."""

    runner: TrialRunner
    curve: Sequence[CurvePoint]
    unrecorded: dict[int, Sequence[Trial]]  # results of all ranks, by batch size
    # Samples in the last micro-batch of each rank in an epoch, by size; None if that is not known
    last_micro_batch: Callable[[int], int | None]

    def largest(self) -> BatchPlan:
        """Return the largest micro-batch that fits and does not end an epoch with an error."""
        self.runner.check_any_fits()
        size = self.runner.fitting[-1]
        self._run_end_of_epoch(size)
        if is_selective(self.runner.trials):
            while self._run_end_of_epoch(self._usable[-1]):
                pass  # if it was refused, another size is the largest usable one
        elif not self._ends_well(size):
            below = next(filter(self._ends_well, range(size - 1, 0, -1)), size)
            if below not in self.runner.fitting and self.runner.check_time_for(below):
                self.runner.run(below, is_timed=True)
        return self._plan(self._usable[-1])

    def fast(self, preference: Preference) -> BatchPlan:
        """Return the preferred micro-batch of those about as fast as the fastest."""
        self.runner.check_any_fits()
        while plans := self._fast_plans(preference):
            if self._run_end_of_epoch(plans[0].micro_batch_size):
                continue
            if self._is_verified(plans[0]):
                return plans[0]
            if not self._run_micro_batch(plans[0]):
                break
        if preference.own_size in self._usable:  # nothing was timed: it is the size that is known
            return self._plan(preference.own_size)
        return self.largest()

    def _fast_plans(self, preference: Preference) -> list[BatchPlan]:
        """Return the timed micro-batches about as fast as the fastest, the preferred one first."""
        failed = {trial.batch_size for trial in self.runner.trials if not trial.fits}
        sizes = {point.batch_size for point in self.curve} - failed
        plans = [self._plan(size) for size in preference.order(sizes) if self._is_usable(size)]
        return fast_plans(plans, StepTimes.undisturbed(self.curve), preference)

    def for_target(self, target: int, preference: Preference) -> BatchPlan:
        """Return the best plan whose micro-batch was run with the accumulation of training."""
        self._confirm(target, preference)
        self.runner.check_any_fits()
        verified = filter(self._is_verified, self._candidates(target, preference))
        plan = next(verified, None) or self._nearest(target)
        check_can_accumulate(plan, self.runner)
        return plan

    def _confirm(self, target: int, preference: Preference) -> None:
        """Run the best plan's micro-batch; if another plan is the best then, run that one too.

        At most `MAX_CONFIRMATIONS` times; a micro-batch that the search ran is not run again.
        """
        left = MAX_CONFIRMATIONS
        while left:
            failed = {trial.batch_size for trial in self.runner.trials if not trial.fits}
            found = self._candidates(target, preference)
            plans = [plan for plan in found if plan.micro_batch_size not in failed]
            if plans and self._run_end_of_epoch(plans[0].micro_batch_size):
                continue
            if not plans or self._is_verified(plans[0]) or not self._run_micro_batch(plans[0]):
                return
            left -= 1

    def _run_micro_batch(self, plan: BatchPlan) -> bool:
        """Record a trial of the plan's micro-batch if there is time for it."""
        check_can_accumulate(plan, self.runner)
        size = plan.micro_batch_size
        if size in self.unrecorded:
            self.runner.record(self.unrecorded.pop(size))
            return True
        if not self.runner.check_time_for(size):
            return False
        self.runner.run(size, is_timed=True, accumulate=plan.trial_accumulation)
        return True

    def _candidates(self, target: int, preference: Preference) -> tuple[BatchPlan, ...]:
        if not self.runner.fitting:
            return ()
        # The few steps of a trial are no measure of speed
        times = StepTimes.undisturbed(self.curve)
        largest = self.runner.fitting[-1]
        plans = candidates(target, self._world_size, largest, times, self._is_usable, preference)
        if is_selective(self.runner.trials):
            plans = self._exact_first(plans, target)
        if self.runner.accumulation.is_supported:
            return plans
        # Speed is no reason to accumulate for a workload that cannot
        return tuple(plan for plan in plans if plan.accumulate_grad_batches == 1) or plans

    def _exact_first(self, plans: Iterable[BatchPlan], target: int) -> tuple[BatchPlan, ...]:
        """Return exact plans before others, also with many micro-batches of a size that ran."""
        samples = per_rank(target, self._world_size)
        exact = (plan for plan in plans if plan.effective_batch_size == samples * plan.world_size)
        ran = (
            BatchPlan(size, samples // size, self._world_size)
            for size in reversed(self._usable)
            if samples % size == 0
        )
        return tuple(dict.fromkeys((*exact, *ran, *plans)))

    def _nearest(self, target: int) -> BatchPlan:
        usable = self._usable
        plan = nearest(target, self._world_size, usable)
        if self._is_verified(plan):
            return plan
        # A trial without accumulation does not verify a plan with it: gradients stay allocated
        accumulated = [
            trial.batch_size
            for trial in self.runner.trials
            if trial.fits and trial.accumulate > 1 and trial.batch_size in usable
        ]
        return nearest(target, self._world_size, accumulated or usable)

    def _is_verified(self, plan: BatchPlan) -> bool:
        return any(
            trial.fits
            and trial.batch_size == plan.micro_batch_size
            and trial.accumulate >= plan.trial_accumulation
            for trial in self.runner.trials
        )

    def _run_end_of_epoch(self, batch_size: int) -> bool:
        """Run the last micro-batch of an epoch of this size, if the workload may refuse it.

        It may be a single sample, of which BatchNorm may need two, or any size, if the workload
        has refused others. Return True if a trial was run, which may change the choice.
        """
        last, trials = self.last_micro_batch(batch_size), self.runner.trials
        if last is None or not (last == 1 or is_selective(trials)):
            return False
        if last == batch_size or any(trial.batch_size == last for trial in trials):
            return False
        if not self.runner.check_time_for(last):
            return False
        self.runner.run(last, is_timed=True, accumulate=1)
        return True

    def _is_usable(self, batch_size: int) -> bool:
        trials = (self.runner.merge(results) for results in self.unrecorded.values())
        return batch_size not in refused_sizes([*self.runner.trials, *trials]) and self._ends_well(
            batch_size
        )

    def _ends_well(self, batch_size: int) -> bool:
        """Return False if an epoch ends with a micro-batch that the workload refuses."""
        return self.last_micro_batch(batch_size) not in refused_sizes(self.runner.trials)

    @property
    def _usable(self) -> list[int]:
        """The sizes that fit and end well; all that fit if none does, which a note reports."""
        fitting = self.runner.fitting
        return [size for size in fitting if self._ends_well(size)] or fitting

    def _plan(self, batch_size: int) -> BatchPlan:
        """Return the plan of a micro-batch without a target."""
        return BatchPlan(batch_size, self.runner.accumulation.default, self._world_size)

    @property
    def _world_size(self) -> int:
        return self.runner.accumulation.replicas


def candidates(
    target: int,
    world_size: int,
    largest: int,
    times: StepTimes,
    usable: Callable[[int], bool],
    preference: Preference,
) -> tuple[BatchPlan, ...]:
    """Return plans that reach the target with usable micro-batches, the best first.

    Exact plans come first: those with a micro-batch about as fast as the fastest size, the
    preferred one first, or else those with at most twice the fewest micro-batches per update.
    Without any, plans give the nearest effective batch.
    """
    samples = per_rank(target, world_size)
    largest = min(largest, samples)
    most = _MAX_EXTRA_PASSES * ceil_div(samples, largest)
    sizes = [size for size in range(largest, 0, -1) if samples % size == 0 and usable(size)]
    ordered = sorted(preference.order(sizes), reverse=True)
    exact = [BatchPlan(size, samples // size, world_size) for size in ordered]
    timed = {size: max(1, round(samples / size)) for size in times.sizes if size <= samples}
    fastest = min(times.by_size(timed).values(), key=attrgetter("seconds"), default=None)
    fast = fast_plans(exact, times, preference, fastest)
    plans = [plan for plan in exact if plan in fast or plan.accumulate_grad_batches <= most]
    first = (fast or fast_plans(plans, times, preference))[:1]
    if plans:
        # If nothing was timed, those with the fewest micro-batches come first
        seconds = {plan: time.seconds for plan, time in _timed(plans, times).items()}
        others = sorted(plans, key=lambda plan: seconds.get(plan, math.inf))
        return tuple(dict.fromkeys((*first, *others)))
    sizes = [size for size in range(largest, ceil_div(samples, most) - 1, -1) if usable(size)]
    return tuple(
        sorted(
            _plans_near(target, world_size, sizes, most),
            key=lambda plan: (_distance(plan, target), plan.accumulate_grad_batches),
        )
    )


def fast_plans(
    plans: Sequence[BatchPlan],
    times: StepTimes,
    preference: Preference,
    fastest: SampleTime | None = None,
) -> list[BatchPlan]:
    """Return the plans about as fast as the fastest size, the preferred one first.

    The fastest size is that of these plans if none is given.
    """
    timed = _timed(plans, times)
    fastest = fastest or min(timed.values(), key=attrgetter("seconds"), default=None)
    if fastest is None:
        return []
    fast = {
        plan.micro_batch_size: plan for plan, time in timed.items() if not time.is_slow(fastest)
    }
    return [fast[size] for size in preference.order(fast)]


def _timed(plans: Iterable[BatchPlan], times: StepTimes) -> dict[BatchPlan, SampleTime]:
    """Return the time per sample of the plans whose micro-batch was timed."""
    known = {
        plan: times.per_sample(plan.micro_batch_size, plan.accumulate_grad_batches)
        for plan in plans
    }
    return {plan: time for plan, time in known.items() if time is not None}


def nearest(target: int, world_size: int, sizes: Iterable[int]) -> BatchPlan:
    """Return the plan closest to the target with one of these micro-batches, or the largest.

    No plan takes more than twice as many micro-batches per update as the largest size needs.
    """
    samples, sizes = per_rank(target, world_size), sorted(sizes)
    most = _MAX_EXTRA_PASSES * max(1, round(samples / sizes[-1]))
    return min(
        _plans_near(target, world_size, sizes, most),
        key=lambda plan: (_distance(plan, target), -plan.micro_batch_size),
    )


def _plans_near(
    target: int, world_size: int, sizes: Iterable[int], most: int
) -> Iterator[BatchPlan]:
    """Yield the plan of each size that comes near a target, with at most so many micro-batches."""
    samples = per_rank(target, world_size)
    for size in sizes:
        accumulate = max(1, round(samples / size))
        if accumulate <= most:
            yield BatchPlan(size, accumulate, world_size)


def _distance(plan: BatchPlan, target: int) -> int:
    return abs(plan.effective_batch_size - target)


def ceil_div(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up."""
    return -(-numerator // denominator)
