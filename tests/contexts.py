"""Resources of trials, as find() and AutoBatch make them."""

from __future__ import annotations

import contextlib

from autobatch._distributed import SingleProcess
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch.sinks import progress


class FixedBudget:
    """A budget in bytes that no memory reading changes; a function gives another one each time."""

    def __init__(self, nbytes):
        self._read = nbytes if callable(nbytes) else lambda: nbytes

    def read(self):
        return self._read()


class IdenticalRanks:
    """Ranks that all have the values of this one."""

    rank = 0

    as_if = None

    def __init__(self, world_size):
        self.world_size = self.replicas = world_size

    def gather(self, value):
        return [value] * self.world_size

    def abort_together(self):
        return contextlib.nullcontext()

    def dry(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def trial_context(probe, *, budget=None, memory_limit=0.9, ranks=None):
    with (
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        progress() as shown,
    ):
        yield TrialContext(
            probe=probe,
            began=probe.clock(),
            budget=MemoryBudget(probe, memory_limit) if budget is None else FixedBudget(budget),
            snapshot=snapshot,
            optimizers=optimizers,
            capturing_new_modules=contextlib.nullcontext,
            ranks=ranks or SingleProcess(),
            progress=shown,
        )
