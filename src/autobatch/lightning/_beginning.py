"""Begin a method of a Trainer for a callback that ends it before its first batch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch._loaders.epochs import capture_order
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo, patched
from autobatch.lightning._isolation import silenced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def begin_and_restore(
    trainer: Any,
    method: str,
    model: Any,
    loaders: Sequence[Any],
    datamodule: Any,
    callback: Any,
    undo_run: Callable[[], None],
) -> None:
    """Run a method of the Trainer until a callback ends it; restore all state.

    Args:
        trainer: The Trainer.
        method: Name of the method.
        model: The module.
        loaders: Loaders, as the method takes them.
        datamodule: A datamodule, instead of loaders.
        callback: The callback; others of its class in the Trainer stay out of it.
        undo_run: Undoes the changes of the callback, if an interrupt kept it from doing so.
    """
    others = [each for each in trainer.callbacks if not isinstance(each, type(callback))]
    # Entered twice: an interrupt between the body and the inner exit still meets the outer one
    with Undo() as undo, undo:
        snapshot = undo.enter_context(Snapshot())
        undo.enter_context(silenced(trainer))
        # Before the trials run the hooks that make loaders and optimizers, and `setup` of callbacks
        snapshot.capture_light(model, datamodule, *others)
        for loader in loaders:
            if isinstance(loader, DataLoader):
                capture_order(loader, snapshot)
                # Lightning sets one where `seed_everything` was called with `workers=True`
                undo.enter_context(patched(loader, worker_init_fn=loader.worker_init_fn))
        undo.add(partial(setattr, trainer, "callbacks", trainer.callbacks))
        undo.add(undo_run)
        trainer.callbacks = [callback, *others]
        getattr(trainer, method)(model, *loaders, datamodule=datamodule)
