"""A plan put into a Trainer: its loaders, its accumulation, the attributes that name its batch size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch._snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._loaders import Rebatched, capture_order, requested

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan

__all__ = ["apply", "check_name"]


def apply(plan: BatchPlan, trainer: Any, module: Any, batch_arg_name: str) -> Rebatched:
    """Let this Trainer train with the plan; `undo` on what is returned gives the user's loader its own size again.

    Optimizers and schedulers are made anew, since their learning rates and lengths may be built from the batch size.
    The random state stays as it is. Whatever fails, nothing has been changed then; `AutobatchError` where the loader
    does not follow.
    """
    with ExitStack() as undo:
        rebatched = Rebatched(trainer.fit_loop._data_source, plan.micro_batch_size)
        undo.callback(rebatched.undo)
        with Snapshot() as snapshot:
            # A hook is asked for the loader here and again by training: it must not see that it was
            snapshot.capture_light(module, trainer.datamodule)
            capture_order(requested(trainer.fit_loop._data_source), snapshot)
            rebatched.check()
        undo.callback(
            setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches
        )
        trainer.accumulate_grad_batches = plan.accumulate_grad_batches
        for holder in _holders(module, batch_arg_name):
            undo.callback(holder.set, holder.value)
            holder.set(plan.micro_batch_size)
        with Snapshot():
            _remake_optimizers(trainer)
        undo.pop_all()  # all went well: `undo` is the caller's now
    return rebatched


def check_name(module: Any, name: str) -> None:
    """Refuse the name of a batch size that was asked for and is nowhere; the usual one may be missing."""
    if name != "batch_size" and not _holders(module, name):
        raise AutobatchError(
            f"batch_arg_name={name!r} is no attribute or hyperparameter of the module or its datamodule."
        )


@dataclass
class _Holder:
    """A place that names the batch size: an attribute of an object, or an entry of hyperparameters."""

    owner: Any
    name: str

    @property
    def value(self) -> Any:
        if isinstance(self.owner, dict):
            return self.owner[self.name]
        return getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


def _holders(module: Any, name: str) -> list[_Holder]:
    """Wherever the module or its datamodule has it, and where it is logged from."""
    holders = []
    for owner in (module, module.trainer.datamodule):
        if hasattr(owner, name) and not _is_read_only(owner, name):
            holders.append(_Holder(owner, name))
        # Lightning 2.6 logs what it kept at the start
        for kept in ("_hparams", "_hparams_initial"):
            hyperparameters = getattr(owner, kept, None)
            if hyperparameters is not None and name in hyperparameters:
                holders.append(_Holder(hyperparameters, name))
    return holders


def _is_read_only(owner: Any, name: str) -> bool:
    attribute = getattr(type(owner), name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _remake_optimizers(trainer: Any) -> None:
    """Call `configure_optimizers` again, as `Strategy.setup` of Lightning 2.6 does, on a loader of the new size."""
    # Made early, if a schedule asked for its length
    trainer.fit_loop._combined_loader = None
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.setup_precision_plugin()
