"""Private names of transformers 5.24 and accelerate 1.14, each behind one function."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from autobatch._distributed.sharding import is_sharded
from autobatch._undo import Undo, patched
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

TESTED: Final = "5.24"
_NAMES: Final = (
    "_train_batch_size",
    "_clip_grad_norm",
    "_get_grad_norm",
    "get_batch_samples",
    "_wrap_model",
    "_defer_fsdp_gradient_reduction",
)


def check_version(trainer: Any) -> None:
    """Raise `AutobatchError` if this transformers lacks a name that tuning uses."""
    missing = [name for name in _NAMES if not hasattr(trainer, name)]
    if missing:
        raise AutobatchError(
            f"The Trainer of transformers {sys.modules['transformers'].__version__} has no "
            f"{missing[0]}: autobatch was tested with transformers {TESTED}. Install that version, "
            "or set the batch size manually."
        )


@contextmanager
def shown(trainer: Any, batch_size: int, accumulate: int) -> Iterator[None]:
    """Let a Trainer and its arguments show a batch size and an accumulation in the body."""
    arguments = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
    }
    with patched(trainer.args, **arguments), patched(trainer, _train_batch_size=batch_size):
        yield


def shown_to_evaluation(trainer: Any, batch_size: int) -> patched:
    """Let the arguments of a Trainer show a batch size of evaluation in the body.

    A loader with persistent workers would be kept for the next evaluation.
    """
    arguments = {"per_device_eval_batch_size": batch_size, "dataloader_persistent_workers": False}
    return patched(trainer.args, **arguments)


def set_evaluation_size(trainer: Any, batch_size: int) -> None:
    """Set the batch size of evaluation, and forget the loaders kept from before."""
    trainer.args.per_device_eval_batch_size = batch_size
    vars(trainer).pop("_eval_dataloaders", None)


def model_to_evaluate(trainer: Any) -> Any:
    """Return the model that `evaluation_loop` runs during training, in evaluation mode."""
    model = trainer._wrap_model(trainer.model, training=False)
    for each in (model, trainer.optimizer):
        if callable(getattr(each, "eval", None)):  # an optimizer without schedule has it
            each.eval()
    return model


def set_plan(trainer: Any, batch_size: int, accumulate: int) -> None:
    """Set the two numbers of a plan; a Trainer reads the batch size from its arguments only once.

    One process trains on one device, so that both batch sizes are the same.
    """
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = batch_size
    trainer.args.gradient_accumulation_steps = accumulate


def unprepared_loaders(trainer: Any) -> patched:
    """Let a Trainer make loaders of all data in the body, not yet divided among the ranks.

    A prepared loader enters itself into the state of accelerate as soon as it is iterated.
    """

    def unchanged(*objects: Any, **_: Any) -> Any:
        return objects if len(objects) > 1 else objects[0]

    return patched(trainer.accelerator, prepare=unchanged)


def gradient_state_restored(trainer: Any) -> Undo:
    """Restore after the body whether gradients are synchronized, which one process has once."""
    state = trainer.accelerator.gradient_state
    undo = Undo()
    undo.add(partial(state._set_sync_gradients, state.sync_gradients))
    return undo


def synchronize(trainer: Any, *, is_last: bool) -> None:
    """Let accelerate's optimizer step, and unscale gradients, only after the last micro-batch."""
    trainer.accelerator.gradient_state._set_sync_gradients(is_last)


def gradients_kept(trainer: Any) -> AbstractContextManager[None]:
    """Let a backward pass in the body leave gradients on this rank, as before the last micro-batch.

    Accelerate does not wrap a model that transformers has sharded itself.
    """
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    if is_sharded(trainer.model):
        deferring: AbstractContextManager[None] = trainer._defer_fsdp_gradient_reduction()
    else:
        deferring = trainer.accelerator.no_sync(model=trainer.model_wrapped)
    return deferring


def clip_gradients(trainer: Any, model: Any) -> None:
    """Clip gradients and compute their norm, as before every step."""
    norm = trainer._clip_grad_norm(model) if trainer.args.max_grad_norm > 0 else None
    trainer._get_grad_norm(model, grad_norm=norm)


def without_memory_tracker(trainer: Any) -> patched:
    """Let `train` start no thread that watches memory in the body."""
    idle = SimpleNamespace(start=lambda: None, stop_and_update_metrics=lambda *_: None)
    return patched(trainer, _memory_tracker=idle)
