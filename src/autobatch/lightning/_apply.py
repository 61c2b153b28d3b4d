"""A plan put into a Trainer: its loaders, its accumulation, the attributes that name its batch size."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autobatch._snapshot import Snapshot
from autobatch.lightning._loaders import Rebatched, capture_order, requested
from autobatch.lightning._steps import package_of

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan

__all__ = ["apply"]


def apply(plan: BatchPlan, trainer: Any, module: Any, batch_arg_name: str) -> Rebatched:
    """Let this Trainer train with the plan; `undo` on what is returned gives the user's loader its own size again.

    Optimizers and schedulers are made anew, since their learning rates and lengths may be built from the batch size.
    The random state stays as it is. `AutobatchError` where the loader does not follow, with nothing changed.
    """
    with Snapshot() as random_state:
        rebatched = Rebatched(trainer.fit_loop._data_source, plan.micro_batch_size)
        try:
            capture_order(requested(trainer.fit_loop._data_source), random_state)
            rebatched.check()
        except BaseException:
            rebatched.undo()
            raise
        trainer.accumulate_grad_batches = plan.accumulate_grad_batches
        _name_batch_size(module, batch_arg_name, plan.micro_batch_size)
        _remake_optimizers(trainer)
    return rebatched


def _name_batch_size(module: Any, name: str, batch_size: int) -> None:
    """Set the attribute or hyperparameter wherever the module or its datamodule has one, also as it is logged."""
    parsing = importlib.import_module(f"{package_of(module.trainer)}.utilities.parsing")
    if parsing.lightning_hasattr(module, name):
        parsing.lightning_setattr(module, name, batch_size)
    for owner in (module, module.trainer.datamodule):
        logged = getattr(
            owner, "_hparams_initial", None
        )  # Lightning 2.6 logs what it kept at the start
        if logged is not None and name in logged:
            logged[name] = batch_size


def _remake_optimizers(trainer: Any) -> None:
    """Call `configure_optimizers` again, as `Strategy.setup` of Lightning 2.6 does, on a loader of the new size."""
    trainer.fit_loop._combined_loader = (
        None  # made early if a schedule asked for its length
    )
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.setup_precision_plugin()
