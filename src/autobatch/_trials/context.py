"""Resources that all trials of a tuning run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autobatch._memory import memory_budget, parse_memory_limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._trials import Trial
    from autobatch._trials.optimizers import OptimizerWatch
    from autobatch._trials.snapshot import Snapshot


class Progress(Protocol):
    """A display of a tuning run: its phase, the batch size that runs, and what is left."""

    def begin_part(self, part: str) -> None:
        """Name the part of the run that the next phases belong to."""

    def begin(self, phase: str, seconds: float | None) -> None:
        """Show that a phase begins that may take these seconds; None: no limit."""

    def trying(self, batch_size: int) -> None:
        """Show that a batch size begins to run."""

    def stepped(self) -> None:
        """Show that it still runs; called after each step."""

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:
        """Take note of a trial, the largest size that fits so far, and the budget in bytes."""


class MemoryBudget:
    """Bytes that this process may hold: the smallest budget so far.

    Other processes may take memory at any time.
    """

    def __init__(self, probe: MemoryProbe, memory_limit: float | str) -> None:
        self._probe = probe
        self._limit = parse_memory_limit(memory_limit)
        self.restart()

    def restart(self) -> None:
        """Read the budget, and forget smaller ones from before."""
        self.reading = self._probe.read()
        self.nbytes = memory_budget(self.reading, self._limit)

    def read(self) -> int:
        self.reading = self._probe.read()
        self.nbytes = min(self.nbytes, memory_budget(self.reading, self._limit))
        return self.nbytes


@dataclass(frozen=True, slots=True)
class TrialContext:
    """Resources that all trials of a tuning run share."""

    probe: MemoryProbe
    began: float  # reading of the probe's clock when tuning began
    budget: MemoryBudget
    snapshot: Snapshot  # restores all state that a trial changes
    optimizers: OptimizerWatch
    # Around a first step: captures modules that were not captured yet
    capturing_new_modules: Callable[[], AbstractContextManager[None]]
    ranks: Ranks  # the processes that run each trial together
    progress: Progress

    def seconds(self) -> float:
        """Return the seconds of rank 0 since tuning began; every rank calls it."""
        first, *_ = self.ranks.gather(self.probe.clock() - self.began)
        return first
