"""Resources of the trials in a Trainer."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._distributed import current_ranks
from autobatch._distributed.sharding import bring_to_rest
from autobatch._memory.detect import detect
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import patched
from autobatch.errors import AutobatchError
from autobatch.transformers._compat import gradient_state_restored, without_memory_tracker

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
        _prepared(trainer, before),
        Snapshot() as snapshot,
    ):
        shown.begin("reading batches", None)
        snapshot.capture_small_values(trainer)
        snapshot.capture(trainer.model, trainer.optimizer)
        budget = MemoryBudget(probe, settings.memory_limit)
        capturing = nullcontext  # model and optimizer are captured already
        yield TrialContext(probe, began, budget, snapshot, optimizers, capturing, ranks, shown)


@contextmanager
def _prepared(trainer: Any, before: Snapshot) -> Iterator[None]:
    """Let `trainer.train()` prepare everything, and end it before its first step.

    Wrapped model, optimizer, schedule, precision and gradient checkpointing are those of training
    in the body.

    Args:
        trainer: The Trainer.
        before: Restores whatever that has changed.
    """
    from autobatch.transformers._callbacks import Leave, LeftError

    bring_to_rest([trainer.model])  # an evaluation may have left parameters gathered
    before.capture_small_values(trainer, trainer.accelerator, trainer.callback_handler)
    before.capture_beside_parameters(trainer.model)
    before.capture(*(each for each in (trainer.optimizer, trainer.lr_scheduler) if each))
    handler = trainer.callback_handler
    with (
        without_memory_tracker(trainer),
        patched(handler, callbacks=[Leave(), *handler.callbacks]),
        gradient_state_restored(trainer),
    ):
        try:
            trainer.train()
        except LeftError as left:
            left.__traceback__ = None  # whose frames hold the loader
        else:
            raise AutobatchError("The Trainer ended before its first step: nothing is to be tuned.")
        try:
            yield
        finally:
            # Cycles hold the wrapped model: its hooks on parameters would run beside the next ones
            gc.collect()
