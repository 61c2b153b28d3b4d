"""Apply a plan to a Trainer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch.utils.data import DataLoader

from autobatch._loaders.order import capture_order, take_iterator
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo, patched
from autobatch.lightning._attribute import FormerBatchSize, set_batch_size_attribute
from autobatch.lightning._compat import (
    combined_loader,
    data_source,
    forget_combined_loader,
)
from autobatch.lightning._reads import BatchSizeReads

if TYPE_CHECKING:
    from collections.abc import Callable
    from weakref import ReferenceType

    from autobatch._plan import BatchPlan
    from autobatch.lightning._dataloaders import Rebatched
    from autobatch.lightning._trainer import Trainer


def apply(
    plan: BatchPlan,
    trainer: Trainer,
    module: Any,
    batch_arg_name: str,
    rebatched: Rebatched,
    before_optimizers: BeforeOptimizers,
) -> None:
    """Make this Trainer train with a plan.

    Optimizers and schedulers are created again if `configure_optimizers` read the batch size, the
    accumulation or the length of the loader. They then start from the random state in which they
    were created the first time.

    Args:
        plan: The plan.
        trainer: The Trainer.
        module: The module.
        batch_arg_name: Attribute or hyperparameter that names the batch size.
        rebatched: Gives the loaders their batch sizes; `undo` restores the user's loader.
        before_optimizers: The state from before the optimizers were created.

    Loader, accumulation and attributes are restored after an error.
    """
    with Undo() as undo:
        undo.add(rebatched.undo)
        rebatched.start()
        accumulate = trainer.accumulate_grad_batches
        undo.add(partial(setattr, trainer, "accumulate_grad_batches", accumulate))
        _set_accumulation(plan, trainer, module)
        if before_optimizers.read_the_plan:
            before_optimizers.restore()
        before_optimizers.forget()
        undo.add(FormerBatchSize(module, batch_arg_name).restore)
        set_batch_size_attribute(module, batch_arg_name, plan.micro_batch_size)
        if before_optimizers.read_the_plan:
            before_optimizers.create_again(trainer)
        undo.pop_all()  # all went well: the caller undoes it


def apply_between_epochs(
    plan: BatchPlan,
    trainer: Trainer,
    module: Any,
    batch_arg_name: str,
    rebatched: Rebatched,
    before_optimizers: BeforeOptimizers,
    restore_start: Callable[[], bool],
) -> None:
    """Make this Trainer continue with another plan in the epoch that starts now.

    After the first step optimizers and schedulers stay: they hold the state of training. Lightning
    asks for the loader again, as with `reload_dataloaders_every_n_epochs`; one that was passed to
    `fit` is the same, and the order of its data continues. In the first epoch `restore_start`
    restores the state in which the loader was started; in a later one it returns False. After an
    error the user's loader has its own batch size again, and training ends.
    """
    fit_loop = trainer.fit_loop
    with Undo() as undo:
        undo.add(rebatched.undo)
        rebatched.start()
        _set_accumulation(plan, trainer, module)
        set_batch_size_attribute(module, batch_arg_name, plan.micro_batch_size)
        with Snapshot() as snapshot:
            if trainer.global_step == 0 and before_optimizers.read_the_plan:
                before_optimizers.create_again(trainer)
            source = data_source(fit_loop)
            if restore_start():
                _end_persistent_workers(trainer)
            elif isinstance(source.instance, DataLoader):
                source.dataloader()  # gives the loader its new size, before it is captured
                # Lightning 2.6 starts the loader when it sets it up, and in any epoch but the first
                # again when the epoch runs
                capture_order(source.instance, snapshot)
            forget_combined_loader(fit_loop)
            fit_loop.setup_data()
        if trainer.progress_bar_callback is not None:
            # The progress bar has read the number of batches already
            trainer.progress_bar_callback.on_train_epoch_start(trainer, module)
        undo.pop_all()


def _set_accumulation(plan: BatchPlan, trainer: Trainer, module: Any) -> None:
    if module.automatic_optimization:  # with manual optimization, the module accumulates
        trainer.accumulate_grad_batches = plan.accumulate_grad_batches


def _end_persistent_workers(trainer: Trainer) -> None:
    """Let loaders that are set up start new workers, which draw their seed, as at the start."""
    for loader in getattr(combined_loader(trainer.fit_loop), "flattened", ()):
        if isinstance(loader, DataLoader):
            take_iterator(loader)


class StateBefore:
    """State that is captured when Lightning calls a method, until `forget`."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._patch: patched | None = None

    def restore(self) -> bool:
        """Restore the state; False if none was captured."""
        if self._snapshot is None:
            return False
        self._snapshot.restore()
        return True

    def forget(self) -> None:
        """Drop the state that was captured, and capture none."""
        if self._patch is not None:
            self._patch.restore()
            self._patch = None
        if self._snapshot is not None:
            self._snapshot.forget()
            self._snapshot = None


class BeforeOptimizers(StateBefore):
    """State of module, datamodule and loader just before the Trainer creates its optimizers.

    A schedule that asks for its length makes Lightning set up the loader and draw random numbers
    before any callback runs. When it is created again it has to start from the same state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read_the_plan = False  # in configure_optimizers: batch size, accumulation or length
        self._created: list[ReferenceType[Any]] = []

    def watch(self, trainer: Trainer, batch_arg_name: str) -> None:
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
            with BatchSizeReads(trainer, batch_arg_name) as reads:
                created = create(*arguments)
            # A schedule that needs its length has set up the loader already
            self.read_the_plan = reads.happened or combined_loader(trainer.fit_loop) is not None
            self._created = list(map(ref, trainer.optimizers))
            return created

        self._patch = patched(trainer.strategy, setup_optimizers=capture_and_create)
        self._patch.apply()

    def create_again(self, trainer: Trainer) -> None:
        """Call `configure_optimizers` as `Strategy.setup` of Lightning 2.6 does, at the new size.

        Optimizers that a callback has put in the place of those of the module stay.
        """
        if list(map(ref, trainer.optimizers)) != self._created:
            return
        # A schedule that needs its length has set up the loader already
        _end_persistent_workers(trainer)
        source = data_source(trainer.fit_loop)
        if isinstance(source.instance, DataLoader):
            source.dataloader()  # gives the loader its new size, which was restored with its order
        forget_combined_loader(trainer.fit_loop)
        trainer.strategy.setup_optimizers(trainer)
        trainer.strategy.setup_precision_plugin()
        self._created = list(map(ref, trainer.optimizers))
