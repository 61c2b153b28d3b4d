"""Apply a plan to a Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch._trials.snapshot import Snapshot
from autobatch.lightning._attribute import FormerBatchSize, set_batch_size_attribute
from autobatch.lightning._compat import data_source, forget_combined_loader, patched
from autobatch.lightning._dataloaders import Loaders, Rebatched, capture_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        undo.callback(FormerBatchSize(module, batch_arg_name).restore)
        set_batch_size_attribute(module, batch_arg_name, plan.micro_batch_size)
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
    restore_start: Callable[[], bool],
) -> Rebatched:
    """Make this Trainer continue with another plan in the epoch that starts now.

    Optimizers and schedulers stay: they hold the state of training. Lightning asks for the loader
    again, as with `reload_dataloaders_every_n_epochs`; one that was passed to `fit` is the same,
    and the order of its data continues; in the first epoch, `restore_start` restores the state
    from which the loader starts, and returns False in a later one. After an error the user's loader has its own batch size
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
            loader = data_source(fit_loop).instance
            if not restore_start() and isinstance(loader, DataLoader):
                # Lightning 2.6 starts the loader when it sets it up, and in any epoch but the first
                # again when the epoch runs
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
    # A schedule that needs its length has set up the loader already
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
