"""All trials of a run: what every rank saw of each, by the budgets that hold now and on one clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._ranks import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._memory import MemoryProbe
    from autobatch._ranks import Ranks
    from autobatch._trial import Trial

__all__ = ["Record"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of what it did."""

    result: Any
    budget: int  # bytes this rank may hold
    seconds: float  # on this rank's clock


class Record:
    """What was tried so far, the same on every rank.

    Args:
        probe: This rank's device.
        memory_limit: What of it may be held, as the user says it.
        ranks: Who tries together.
    """

    def __init__(
        self, probe: MemoryProbe, memory_limit: float | str, ranks: Ranks
    ) -> None:
        self._probe = probe
        self._ranks = ranks
        self._limit = parse_memory_limit(memory_limit)
        self.reading = probe.read()
        self._own_budget = memory_budget(self.reading, self._limit)
        self._budgets: Sequence[int] = ()  # of each rank
        # Seconds on rank 0's clock, by which all of them decide about time
        self.now = 0.0
        # Of every rank each, in the order they were run
        self._trials: list[Sequence[Trial]] = []

    @property
    def trials(self) -> list[Trial]:
        """All of them, judged by the budgets that hold now."""
        return [self.judged(trials) for trials in self._trials]

    @property
    def fitting(self) -> list[int]:
        """The sizes that ran and fit, in ascending order."""
        return sorted({trial.batch_size for trial in self.trials if trial.fits})

    @property
    def budget(self) -> int:
        """The smallest that a rank has, in bytes."""
        return min(self._budgets)

    def read_budget(self) -> int:
        """This rank's smallest budget so far: others may take memory at any time."""
        self.reading = self._probe.read()
        budget = memory_budget(self.reading, self._limit)
        self._own_budget = min(self._own_budget, budget)
        return self._own_budget

    def begin(self, check: Callable[[], None]) -> None:
        """Let every rank check that it can begin."""
        self.everywhere(check)

    def add(self, run: Callable[[], Trial]) -> Trial:
        """Let every rank run a trial, and keep what they saw."""
        self.keep(self.everywhere(run))
        return self.trials[-1]

    def keep(self, trials: Sequence[Trial]) -> None:
        """Count a trial that every rank has run already."""
        self._trials.append(trials)

    def judged(self, trials: Sequence[Trial]) -> Trial:
        """A trial that every rank has run, as one."""
        return merged(trials, self._budgets)

    def everywhere(self, act: Callable[[], T]) -> list[T]:
        """What every rank's part of it gave; their budgets and rank 0's clock hold from then on."""

        def told() -> _Told:
            result = act()
            return _Told(result, self._own_budget, self._probe.clock())

        said = self._ranks.everywhere(told)
        self._budgets = [each.budget for each in said]
        self.now = said[0].seconds
        return [each.result for each in said]
