"""Which plan to take: of micro-batches that were run, the best; where the best was not, it is run now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._pace import Pace
from autobatch._plan import BatchPlan, candidates, nearest
from autobatch._trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._record import Record
    from autobatch._speed import Speed
    from autobatch._trial import Trial

__all__ = ["CONFIRMATIONS", "Choice"]

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

    record: Record
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
                plan
                for plan in self._candidates(target)
                if plan.micro_batch_size not in failed
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
        pace = Pace.of(self._trials, self.speed.curve)
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
            trial.fits
            and trial.batch_size == plan.micro_batch_size
            and trial.accumulate >= pattern
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
            trial.batch_size
            for trial in self._trials
            if trial.outcome is Outcome.REFUSED
        }

    @property
    def _sound(self) -> list[int]:
        """The sizes that fit and end well; where none does, what fits: a note tells of it."""
        fitting = self.record.fitting
        return [size for size in fitting if self._ends_well(size)] or fitting

    @property
    def _trials(self) -> list[Trial]:
        return self.record.trials
