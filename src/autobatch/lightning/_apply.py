"""Apply a plan to a Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch.utils.data import DataLoader

from autobatch._loaders.epochs import capture_order, take_iterator
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo, patched
from autobatch.lightning._attribute import BatchSizeAttribute
from autobatch.lightning._compat import combined_loader, data_source, forget_combined_loader
from autobatch.lightning._reads import BatchSizeReads

if TYPE_CHECKING:
    from weakref import ReferenceType

    from autobatch._plan import BatchPlan
    from autobatch.lightning._dataloaders import Rebatched
    from autobatch.lightning._trainer import Trainer


@dataclass(frozen=True, slots=True)
class Application:
    """A plan, and the state of a Trainer that changes with it."""

    plan: BatchPlan
    trainer: Trainer
    module: Any
    batch_arg_name: str  # attribute or hyperparameter that names the batch size
    rebatched: Rebatched  # gives the loaders their batch sizes; `undo` restores the user's loader
    before_optimizers: BeforeOptimizers

    def before_training(self) -> None:
        """Make this Trainer train with the plan; restore everything after an error.

        Optimizers and schedulers are created again if `configure_optimizers` read the batch size,
        the accumulation or the length of the loader. They then start from the random state in which
        they were created the first time.
        """
        trainer, before = self.trainer, self.before_optimizers
        with Undo() as undo:
            accumulate = trainer.accumulate_grad_batches
            undo.add(partial(setattr, trainer, "accumulate_grad_batches", accumulate))
            self._rebatch(undo)
            if before.read_the_plan:
                before.restore()
            before.forget()
            attribute = BatchSizeAttribute(self.module, self.batch_arg_name)
            undo.add(attribute.restore)
            attribute.set(self.plan.micro_batch_size)
            if before.read_the_plan:
                before.create_again(trainer)
            undo.pop_all()  # all went well: the plan stays, and `Run.undo` restores the loaders

    def between_epochs(self, before_data: StateBefore) -> None:
        """Make this Trainer continue with the plan in the epoch that starts now.

        After the first step optimizers and schedulers stay: they hold the state of training.
        Lightning asks for the loader again, as with `reload_dataloaders_every_n_epochs`; one that
        was passed to `fit` is the same, and the order of its data continues. In the first epoch
        `before_data` restores the state in which the loader was started. After an error the user's
        loader has its own batch size again, and training ends.
        """
        trainer, fit_loop = self.trainer, self.trainer.fit_loop
        with Undo() as undo:
            self._rebatch(undo)
            attribute = BatchSizeAttribute(self.module, self.batch_arg_name)
            attribute.set(self.plan.micro_batch_size)
            with Snapshot() as snapshot:
                if trainer.global_step == 0 and self.before_optimizers.read_the_plan:
                    self.before_optimizers.create_again(trainer)
                source = data_source(fit_loop)
                if before_data.restore():
                    _end_persistent_workers(trainer)
                elif isinstance(source.instance, DataLoader):
                    source.dataloader()  # gives the loader its new size, before it is captured
                    # Lightning 2.6 starts the loader when it sets it up, and in any epoch but the
                    # first again when the epoch runs
                    capture_order(source.instance, snapshot)
                forget_combined_loader(fit_loop)
                fit_loop.setup_data()
            if trainer.progress_bar_callback is not None:
                # The progress bar has read the number of batches already
                trainer.progress_bar_callback.on_train_epoch_start(trainer, self.module)
            undo.pop_all()

    def _rebatch(self, undo: Undo) -> None:
        undo.add(self.rebatched.undo)
        self.rebatched.start()
        if self.module.automatic_optimization:  # otherwise the module accumulates
            self.trainer.accumulate_grad_batches = self.plan.accumulate_grad_batches


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

    def _watch(self, patch: patched) -> None:
        self._patch = patch
        patch.apply()

    def _capture(self, trainer: Trainer, *objects: Any) -> None:
        """Capture objects, the order of the data, and random numbers."""
        self._snapshot = Snapshot().__enter__()
        self._snapshot.capture_small_values(*objects)
        if isinstance(loader := data_source(trainer.fit_loop).instance, DataLoader):
            capture_order(loader, self._snapshot)


class BeforeData(StateBefore):
    """State of random numbers, loader and datamodule before the training loop sets up its data.

    Lightning 2.6 starts the loader there. With another batch size in the first epoch it is started
    again, and has to draw the same random numbers.
    """

    def watch(self, trainer: Trainer) -> None:
        """Capture the state when the loop sets up its data for the first time."""
        self.forget()
        loop = trainer.fit_loop
        set_up = loop.setup_data

        def capture_and_set_up() -> None:
            if self._snapshot is None and combined_loader(loop) is None:
                self._capture(trainer, trainer.datamodule)
            set_up()

        self._watch(patched(loop, setup_data=capture_and_set_up))


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
            self._capture(trainer, trainer.lightning_module, trainer.datamodule)
            with BatchSizeReads(trainer, batch_arg_name) as reads:
                created = create(*arguments)
            # A schedule that needs its length has set up the loader already
            self.read_the_plan = reads.happened or combined_loader(trainer.fit_loop) is not None
            self._created = list(map(ref, trainer.optimizers))
            return created

        self._watch(patched(trainer.strategy, setup_optimizers=capture_and_create))

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
