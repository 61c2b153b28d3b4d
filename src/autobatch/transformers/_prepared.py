"""A Trainer that has prepared training, and has not begun it."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from autobatch._distributed.sharding import bring_to_rest
from autobatch._undo import patched
from autobatch.errors import AutobatchError
from autobatch.transformers._compat import gradient_state_restored, without_memory_tracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._trials.snapshot import Snapshot


@contextmanager
def prepared(trainer: Any, before: Snapshot) -> Iterator[None]:
    """Let `trainer.train()` prepare everything, and end it before its first step.

    Wrapped model, optimizer, schedule, precision and gradient checkpointing are those of training
    in the body.

    Args:
        trainer: The Trainer.
        before: Restores whatever that has changed.
    """
    from autobatch.transformers._callbacks import Leave, LeftError

    bring_to_rest([trainer.model])  # an evaluation may have left parameters gathered
    before.capture_light(trainer, trainer.accelerator, trainer.callback_handler)
    before.capture_beside_parameters(trainer.model)
    before.capture(*(each for each in (trainer.optimizer, trainer.lr_scheduler) if each))
    handler = trainer.callback_handler
    with ExitStack() as stack:
        stack.enter_context(without_memory_tracker(trainer))
        stack.enter_context(patched(handler, callbacks=[Leave(), *handler.callbacks]))
        stack.enter_context(gradient_state_restored(trainer))
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
