"""Apply a plan to a Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._dataloaders import Loaders, Rebatched, capture_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._plan import BatchPlan
    from autobatch.lightning._batch_size import SetBatchSize


def apply(
    plan: BatchPlan,
    trainer: Any,
    module: Any,
    batch_arg_name: str,
    batch_sizes: Sequence[int],
    before: BeforeOptimizers,
    setter: SetBatchSize | None,
) -> Rebatched:
    """Let this Trainer train with the plan; `undo` on what is returned gives the user's loader its own size again.

    Optimizers and schedulers are made anew, since their learning rates and lengths may be built from the batch size,
    and from the random state in which they were made first. Where anything fails, loader, accumulation and attributes
    are as they were; `AutobatchError` where a loader does not follow. `batch_sizes` are those of each loader, which
    `setter` sets where the user has a way of their own.
    """
    with ExitStack() as undo:
        rebatched = Rebatched(trainer.fit_loop._data_source, batch_sizes, setter)
        undo.callback(rebatched.undo)
        _check_sizes(rebatched, trainer, module)
        undo.callback(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        if module.automatic_optimization:  # by hand, the module accumulates
            trainer.accumulate_grad_batches = plan.accumulate_grad_batches
        before.restore()
        for holder in _holders(module, batch_arg_name):
            undo.callback(holder.set, holder.value)
            holder.set(plan.micro_batch_size)
        _remake_optimizers(trainer)
        undo.pop_all()  # all went well: `undo` is the caller's now
    return rebatched


def apply_between_epochs(
    plan: BatchPlan,
    trainer: Any,
    module: Any,
    batch_arg_name: str,
    batch_sizes: Sequence[int],
    former: Rebatched,
) -> Rebatched:
    """Let this Trainer go on with another plan, in the epoch that is about to ask for its first batch.

    Optimizers and schedulers stay: they hold what training has made of them. The loader is asked for anew, as
    `reload_dataloaders_every_n_epochs` does; one that was passed to `fit` is the same, with its order where it was.
    Where anything fails, the user's loader has its own size again, and training is over.
    """
    fit_loop = trainer.fit_loop
    former.undo()
    with ExitStack() as undo:
        rebatched = Rebatched(fit_loop._data_source, batch_sizes, former.setter)
        undo.callback(rebatched.undo)
        _check_sizes(rebatched, trainer, module)
        if module.automatic_optimization:  # by hand, the module accumulates
            trainer.accumulate_grad_batches = plan.accumulate_grad_batches
        for holder in _holders(module, batch_arg_name):
            holder.set(plan.micro_batch_size)
        with Snapshot() as snapshot:
            # Lightning 2.6 starts the loader when it sets it up, and once more when the epoch runs
            if isinstance(fit_loop._data_source.instance, DataLoader):
                capture_order(fit_loop._data_source.instance, snapshot)
            fit_loop._combined_loader = None
            fit_loop.setup_data()
        if trainer.progress_bar_callback is not None:
            # It has looked at the number of batches already
            trainer.progress_bar_callback.on_train_epoch_start(trainer, module)
        undo.pop_all()
    return rebatched


def _check_sizes(rebatched: Rebatched, trainer: Any, module: Any) -> None:
    with Snapshot() as snapshot:
        # A hook is asked for the loader here and again by training: it must not see that it was
        snapshot.capture_light(module, trainer.datamodule)
        source = trainer.fit_loop._data_source
        loaders = Loaders(trainer, source, mode="max_size_cycle", setter=rebatched.setter)
        loaders.capture_order(snapshot)
        rebatched.check(loaders)


class BeforeOptimizers:
    """How things were when the Trainer was about to make its optimizers.

    A schedule that asks for its length makes the loader, and draws random numbers, before any callback can look:
    made anew, it has to find what it found the first time.
    """

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None

    def watch(self, trainer: Any) -> None:
        """Look when `Strategy.setup` of Lightning 2.6 comes to the optimizers, the first time."""
        strategy = trainer.strategy
        # What hides the class's own method goes when it was called, or with the next fit
        vars(strategy).pop("setup_optimizers", None)
        make = strategy.setup_optimizers

        def look_and_make(*arguments: Any) -> Any:
            vars(strategy).pop("setup_optimizers", None)
            self._snapshot = Snapshot().__enter__()
            self._snapshot.capture_light(trainer.lightning_module, trainer.datamodule)
            loader = trainer.fit_loop._data_source.instance
            if isinstance(loader, DataLoader):
                capture_order(loader, self._snapshot)
            return make(*arguments)

        strategy.setup_optimizers = look_and_make

    def restore(self) -> None:
        """Give back what was there; what was captured is kept no longer."""
        if self._snapshot is not None:
            self._snapshot.restore()
        self.forget()

    def forget(self) -> None:
        """Let go of what was captured."""
        if self._snapshot is not None:
            self._snapshot.forget()
            self._snapshot = None


def name_batch_size(module: Any, name: str, batch_size: int) -> None:
    """Set it wherever the module or its datamodule has it by this name."""
    for holder in _holders(module, name):
        holder.set(batch_size)


def is_named(module: Any, name: str) -> bool:
    """Whether the module or its datamodule has the batch size by this name."""
    return bool(_holders(module, name))


def checked_name(batch_arg_name: str) -> str:
    """The name, refused where nothing can be called that."""
    if isinstance(batch_arg_name, str) and batch_arg_name.isidentifier():
        return batch_arg_name
    raise ValueError(
        f"batch_arg_name={batch_arg_name!r} is no name; give that of an attribute or hyperparameter."
    )


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
