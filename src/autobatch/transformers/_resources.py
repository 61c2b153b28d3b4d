"""Resources of the trials in a Trainer."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch.transformers._prepared import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._memory import MemoryProbe
    from autobatch._settings import Settings


@contextmanager
def trial_context(
    trainer: Any, settings: Settings, device: MemoryProbe | None, *, is_verbose: bool
) -> Iterator[TrialContext]:
    """Prepare training, capture all state that trials may change, and restore it at the end."""
    probe = detect(device, trainer.args.device)
    began = probe.clock()
    with (
        current_ranks() as ranks,
        ranks.abort_together(),
        Snapshot() as before,
        OptimizerWatch(probe.clock) as optimizers,
        sinks.progress(verbose=is_verbose and ranks.rank == 0) as shown,
        prepared(trainer, before),
        Snapshot() as snapshot,
    ):
        shown.begin("reading batches", None)
        snapshot.capture_light(trainer)
        snapshot.capture(trainer.model, trainer.optimizer)
        yield TrialContext(
            probe=probe,
            began=began,
            budget=MemoryBudget(probe, settings.memory_limit),
            snapshot=snapshot,
            optimizers=optimizers,
            capturing_new_modules=nullcontext,  # model and optimizer are captured already
            ranks=ranks,
            progress=shown,
        )
