"""Sizes run one after another: on every rank, as training will run them, while there is time, and undone each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch._choice import CONFIRMATIONS
from autobatch._deadline import Deadline
from autobatch._trial import Outcome, Trial, run_trial
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._job import Job
    from autobatch._ranks import Ranks
    from autobatch._record import Record
    from autobatch._settings import Settings
    from autobatch._snapshot import Snapshot
    from autobatch._workload import Bench
    from autobatch.sinks import Progress

__all__ = ["Attempts"]


class Attempts:
    """The trials of one tuning run, and the time that is left for them.

    Args:
        job: What is tuned.
        settings: What was asked for.
        bench: What trials run on.
        record: What every rank saw so far.
        snapshot: Gives back what a trial changes.
        shown: Where progress is shown.
        ranks: Who tries together.
    """

    deadline: Deadline  # from the beginning on

    def __init__(
        self,
        job: Job,
        settings: Settings,
        bench: Bench,
        record: Record,
        snapshot: Snapshot,
        shown: Progress,
        ranks: Ranks,
    ) -> None:
        self._job, self._settings, self._record = job, settings, record
        self._snapshot, self._shown, self._ranks = snapshot, shown, ranks
        self.bench = bench
        self.target = _within(
            settings.target_batch_size, job.update_at_most, ranks.world_size
        )  # the effective batch to go for; None where none is
        self.out_of_time = False  # whether a size was left out for that

    def begin(self) -> None:
        """Count the time from now on."""
        self.deadline = Deadline(self._settings.time_limit, lambda: self._record.now)

    def attempt(self, size: int, *, accumulate: int | None = None) -> Trial:
        """Run one trial, and put everything back: each starts from the same state."""
        began = self.deadline.spent
        self._show(size)
        pattern = accumulate or self.accumulate_at(size)
        trial = self._record.add(lambda: self.run(size, pattern))
        self._snapshot.restore()
        self.deadline.record(trial.batch_size, self.deadline.spent - began)
        if self._ranks.rank == 0:
            best = max(self._record.fitting, default=None)
            self._shown.tried(trial, best=best, budget=self._record.budget)
        return trial

    def run(self, size: int, accumulate: int) -> Trial:
        """This rank's part of a trial."""
        self.bench.probe.attach(*self._snapshot.alive)
        try:
            return run_trial(
                self._job.workload,
                size,
                accumulate=accumulate,
                steps=self._settings.steps_per_trial,
                bench=self.bench,
            )
        except AutobatchError:
            raise
        except Exception as error:
            if not any(size < trial.batch_size for trial in self._record.trials):
                raise
            # Larger ones ran, or ran out of memory: it is too small for the workload (a single sample and BatchNorm)
            return Trial(
                size, Outcome.REFUSED, accumulate=accumulate, error=repr(error)
            )

    def accumulate_at(self, size: int) -> int:
        """The pattern that training will use: with accumulation, gradients live on through the next micro-batch."""
        if not self._job.can_accumulate:
            return 1
        target = self.target
        if target is None:
            return min(2, self._job.accumulate)
        return 1 if size * self._ranks.world_size >= target else 2

    def before(self, size: int) -> None:
        """Say which size comes now, and tell the probe what is there."""
        self._show(size)
        self.bench.probe.attach(*self._snapshot.alive)

    def _show(self, size: int) -> None:
        if self._ranks.rank == 0:
            self._shown.trying(size)

    def in_time(self, size: int) -> bool:
        """Whether a trial would be over in time, and those that may have to confirm a plan."""
        return self.deadline.allows(size, self._yardstick, self._reserve)

    @property
    def _yardstick(self) -> int | None:
        return (
            self._record.fitting[-1] if self._record.fitting else self.deadline.largest
        )

    @property
    def _reserve(self) -> float:
        """Seconds for the trials that may have to confirm a plan, none of them larger than what ran."""
        if self.target is None or not self._record.fitting:
            return 0.0
        return CONFIRMATIONS * self.deadline.seconds_of(self._record.fitting[-1])

    @property
    def affordable(self) -> int | None:
        """The largest size that there is time for; None where nothing limits it."""
        return self.deadline.affordable(self._yardstick, self._reserve)

    def takes_its_time(self, size: int) -> bool:
        """Whether there is time for one more trial; where there is not, the report tells."""
        allowed = self.deadline.allows(size, self._yardstick, 0.0)
        self.out_of_time = self.out_of_time or not allowed
        return allowed


def _within(target: int | None, most: int | None, world_size: int) -> int | None:
    """The effective batch to go for: what was asked, or as much of it as there is."""
    if target is None or most is None or target <= most:
        return target
    return max(world_size, most - most % world_size)
