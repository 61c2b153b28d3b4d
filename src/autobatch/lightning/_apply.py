"""Apply a plan to a Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import (
    combined_loader,
    data_source,
    forget_combined_loader,
    hyperparameters,
    patched,
)
from autobatch.lightning._dataloaders import Loaders, Rebatched, capture_order, take_iterator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._plan import BatchPlan
    from autobatch.lightning._batch_size import SetBatchSize
    from autobatch.lightning._trainer import Trainer


def apply(
    plan: BatchPlan,
    trainer: Trainer,
    module: Any,
    batch_arg_name: str,
    batch_sizes: Sequence[int],
    before_optimizers: BeforeOptimizers,
    setter: SetBatchSize | None,
) -> Rebatched:
    """Make this Trainer train with a plan.

    `undo` of the result restores the batch size of the user's loader.

    Optimizers and schedulers are created again, since their learning rates and lengths may depend
    on the batch size. They start from the random state in which they were created the first time.

    Args:
        plan: The plan.
        trainer: The Trainer.
        module: The module.
        batch_arg_name: Attribute or hyperparameter that names the batch size.
        batch_sizes: Batch size of each loader.
        before_optimizers: The state from before the optimizers were created.
        setter: The user's function that sets the batch size of a loader.

    Raises:
        AutobatchError: A loader does not follow. Loader, accumulation and attributes are restored
            then, as after any other error.
    """
    with ExitStack() as undo:
        rebatched = Rebatched(data_source(trainer.fit_loop), batch_sizes, setter)
        undo.callback(rebatched.undo)
        _check_sizes(rebatched, trainer, module)
        undo.callback(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        _set_accumulation(plan, trainer, module)
        before_optimizers.restore()
        for holder in _holders(module, batch_arg_name):
            undo.callback(holder.set, holder.value)
            holder.set(plan.micro_batch_size)
        _recreate_optimizers(trainer)
        undo.pop_all()  # all went well: `undo` is the caller's now
    return rebatched


def apply_between_epochs(
    plan: BatchPlan,
    trainer: Trainer,
    module: Any,
    batch_arg_name: str,
    batch_sizes: Sequence[int],
    former: Rebatched,
) -> Rebatched:
    """Make this Trainer continue with another plan in the epoch that starts now.

    Optimizers and schedulers stay: they hold the state of training. Lightning asks for the loader
    again, as with `reload_dataloaders_every_n_epochs`; one that was passed to `fit` is the same,
    and the order of its data continues. After an error the user's loader has its own batch size
    again, and training ends.
    """
    fit_loop = trainer.fit_loop
    former.undo()
    with ExitStack() as undo:
        rebatched = Rebatched(data_source(fit_loop), batch_sizes, former.setter)
        undo.callback(rebatched.undo)
        _check_sizes(rebatched, trainer, module)
        _set_accumulation(plan, trainer, module)
        set_batch_size_attribute(module, batch_arg_name, plan.micro_batch_size)
        with Snapshot() as snapshot:
            # Lightning 2.6 starts the loader when it sets it up, and again when the epoch runs
            loader = data_source(fit_loop).instance
            if isinstance(loader, DataLoader):
                capture_order(loader, snapshot)
            forget_combined_loader(fit_loop)
            fit_loop.setup_data()
        if trainer.progress_bar_callback is not None:
            # The progress bar has read the number of batches already
            trainer.progress_bar_callback.on_train_epoch_start(trainer, module)
        undo.pop_all()
    return rebatched


def _check_sizes(rebatched: Rebatched, trainer: Trainer, module: Any) -> None:
    with Snapshot() as snapshot:
        # Training asks the hook of the module for the loader again: this call must leave no trace
        snapshot.capture_light(module, trainer.datamodule)
        source = data_source(trainer.fit_loop)
        loaders = Loaders(trainer, source, mode="max_size_cycle", setter=rebatched.setter)
        loaders.capture_order(snapshot)
        rebatched.check(loaders)


def _set_accumulation(plan: BatchPlan, trainer: Trainer, module: Any) -> None:
    if module.automatic_optimization:  # with manual optimization, the module accumulates
        trainer.accumulate_grad_batches = plan.accumulate_grad_batches


def _recreate_optimizers(trainer: Trainer) -> None:
    """Call `configure_optimizers` as `Strategy.setup` of Lightning 2.6 does, at the new size."""
    # A schedule that needs its length has set up the loader already, and started its workers: they
    # start again from the restored random state
    for loader in getattr(combined_loader(trainer.fit_loop), "flattened", ()):
        if isinstance(loader, DataLoader):
            take_iterator(loader)
    forget_combined_loader(trainer.fit_loop)
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.setup_precision_plugin()


class BeforeOptimizers:
    """State of module, datamodule and loader just before the Trainer creates its optimizers.

    A schedule that asks for its length makes Lightning set up the loader and draw random numbers
    before any callback runs. When it is created again it has to start from the same state.
    """

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._patch: patched | None = None

    def watch(self, trainer: Trainer) -> None:
        """Capture the state when `Strategy.setup` of Lightning 2.6 creates the optimizers."""
        self.forget()
        create = trainer.strategy.setup_optimizers

        def capture_and_create(*arguments: Any) -> Any:
            self.forget()
            self._snapshot = Snapshot().__enter__()
            self._snapshot.capture_light(trainer.lightning_module, trainer.datamodule)
            loader = data_source(trainer.fit_loop).instance
            if isinstance(loader, DataLoader):
                capture_order(loader, self._snapshot)
            return create(*arguments)

        self._patch = patched(trainer.strategy, setup_optimizers=capture_and_create)
        self._patch.__enter__()

    def restore(self) -> None:
        """Restore the state that was captured, and drop it."""
        if self._snapshot is not None:
            self._snapshot.restore()
        self.forget()

    def forget(self) -> None:
        """Drop the state that was captured, and capture none."""
        if self._patch is not None:
            self._patch.restore()
            self._patch = None
        if self._snapshot is not None:
            self._snapshot.forget()
            self._snapshot = None


def set_batch_size_attribute(module: Any, name: str, batch_size: int) -> None:
    """Set the batch size in all attributes and hyperparameters of this name."""
    for holder in _holders(module, name):
        holder.set(batch_size)


def has_batch_size_attribute(module: Any, name: str) -> bool:
    """Return whether the module or its datamodule holds the batch size under this name."""
    return bool(_holders(module, name))


def checked_name(batch_arg_name: str) -> str:
    """Return the name; `ValueError` if it cannot be one."""
    if isinstance(batch_arg_name, str) and batch_arg_name.isidentifier():
        return batch_arg_name
    raise ValueError(
        f"batch_arg_name={batch_arg_name!r} is no name; give that of an attribute or "
        "hyperparameter."
    )


def check_name(module: Any, name: str) -> None:
    """Raise `AutobatchError` if nothing has this name; the default one may be missing."""
    if name != "batch_size" and not has_batch_size_attribute(module, name):
        raise AutobatchError(
            f"batch_arg_name={name!r} is no attribute or hyperparameter of the module or its "
            "datamodule."
        )


@dataclass
class _Holder:
    """An attribute of an object, or an entry of its hyperparameters, that holds the batch size."""

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
    """Return all places of the module and its datamodule that hold a value of this name."""
    holders = []
    for owner in (module, module.trainer.datamodule):
        if hasattr(owner, name) and not _is_read_only(owner, name):
            holders.append(_Holder(owner, name))
        holders += [_Holder(each, name) for each in hyperparameters(owner) if name in each]
    return holders


def _is_read_only(owner: Any, name: str) -> bool:
    attribute = getattr(type(owner), name, None)
    return isinstance(attribute, property) and attribute.fset is None
