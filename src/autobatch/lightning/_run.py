"""One run of a Trainer, its beginning, and the results of a callback, which outlive it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._loaders.epochs import capture_order
from autobatch._memory.detect import detect
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo, patched
from autobatch.lightning._apply import BeforeData, BeforeOptimizers
from autobatch.lightning._dataloaders import Rebatched
from autobatch.lightning._isolation import silenced
from autobatch.lightning._loading import DataLoaderTimer
from autobatch.lightning._survival import Survival
from autobatch.lightning._survival.evaluation import EvaluationSurvival

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._loaders.batch_size import LoaderSize
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch.lightning._accumulation import LastWindowCorrection
    from autobatch.lightning._resources import Tuned
    from autobatch.lightning._resume import Checkpoint
    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")


@dataclass
class Run:
    """State of one run of a Trainer, from `setup` to `teardown`."""

    checkpoint: Checkpoint | None = None  # the checkpoint that the run resumes from
    # Loaders with another batch size, by what they serve: "train", "validation", or a stage
    loaders: dict[str, Rebatched] = field(default_factory=dict)
    # Corrects the last window of each epoch, if the user wants that
    window: LastWindowCorrection | None = None
    timer: DataLoaderTimer = field(default_factory=DataLoaderTimer)
    before_optimizers: BeforeOptimizers = field(default_factory=BeforeOptimizers)
    before_data: BeforeData = field(default_factory=BeforeData)
    # Runs micro-batches that run out of memory again, if the user wants that
    survival: Survival | None = None
    # The same for batches of validation and testing
    evaluation: EvaluationSurvival | None = None
    # Loaders, methods of the loops and attributes that are changed until `undo`
    changes: Undo = field(default_factory=Undo)

    def rebatch(self, served: str, source: Any, sizes: Sequence[LoaderSize]) -> Rebatched:
        """Return loaders with other batch sizes, to be started; former ones are undone."""
        if served in self.loaders:
            self.loaders[served].undo()
        self.loaders[served] = Rebatched(source, sizes)
        self.changes.add(self.loaders[served].undo)
        return self.loaders[served]

    def survive(self, trainer: Trainer, device: str | MemoryProbe | None) -> None:
        """Let training go on when memory runs out in it."""
        probe = detect(device, trainer.lightning_module.device)
        self.survival = Survival(trainer, probe)
        for patch in self.survival.patches():
            self.replace(patch)

    def replace(self, patch: patched) -> None:
        """Replace a method of a loop until `undo`."""
        self.changes.add(patch.restore)
        patch.apply()

    def begin_evaluation(self, trainer: Trainer, device: str | MemoryProbe | None) -> None:
        """Run batches of validation or testing that run out of memory again, until its end."""
        if self.evaluation is None:
            probe = detect(device, trainer.lightning_module.device)
            self.evaluation = EvaluationSurvival(trainer, probe)
        self.evaluation.start()

    def end_evaluation(self) -> None:
        """Leave the steps of validation alone: those of trials may fail."""
        if self.evaluation is not None:
            self.evaluation.end()

    def undo(self) -> None:
        """Stop measuring, and undo all changes; a second call completes one that was interrupted."""
        self.before_optimizers.forget()
        self.before_data.forget()
        self.timer.stop()
        self.end_evaluation()
        self.window = self.survival = self.evaluation = None
        self.changes.close()
        self.loaders.clear()


def before_epochs(
    trainer: Trainer, before_hooks: Callable[[], None], after_hooks: Callable[[], None]
) -> patched:
    """Return a patch that acts before and after the hooks `on_train_epoch_start` of each epoch.

    `before_hooks` runs before all of them and `after_hooks` after; neither if a checkpoint resumes
    within the epoch. A hook of AutoBatch itself would run in between.
    """
    loop = trainer.fit_loop

    def acting(act: Callable[[], None], method: Callable[[], None]) -> Callable[[], None]:
        def act_and_go_on() -> None:
            if not (loop.restarted_mid_epoch or loop.restarted_on_epoch_end):
                act()
            method()

        return act_and_go_on

    return patched(
        loop,
        on_advance_start=acting(before_hooks, loop.on_advance_start),
        advance=acting(after_hooks, loop.advance),
    )


def begin_and_restore(
    callback: Any,
    undo_run: Callable[[], None],
    trainer: Any,
    method: str,
    model: Any,
    loaders: Sequence[Any],
    datamodule: Any,
) -> None:
    """Run a method of the Trainer until a callback ends it; restore all state.

    Other callbacks of its class stay out of it. `undo_run` undoes the changes of the callback, if
    an interrupt kept it from doing so.
    """
    others = [each for each in trainer.callbacks if not isinstance(each, type(callback))]
    # Entered twice: an interrupt between the body and the inner exit still meets the outer one
    with Undo() as undo, undo:
        snapshot = undo.enter_context(Snapshot())
        undo.enter_context(silenced(trainer))
        # Before the trials run the hooks that make loaders and optimizers, and `setup` of callbacks
        snapshot.capture_small_values(model, datamodule, *others)
        for loader in loaders:
            if isinstance(loader, DataLoader):
                capture_order(loader, snapshot)
                # Lightning sets one where `seed_everything` was called with `workers=True`
                undo.enter_context(patched(loader, worker_init_fn=loader.worker_init_fn))
        undo.add(partial(setattr, trainer, "callbacks", trainer.callbacks))
        undo.add(undo_run)
        trainer.callbacks = [callback, *others]
        getattr(trainer, method)(model, *loaders, datamodule=datamodule)


@dataclass
class Results:
    """Results of all runs of a callback; a copy of the callback has them too."""

    # The last report of each method of the Trainer
    reports: dict[str, TuningReport] = field(default_factory=dict)
    # The report with the plan that training follows, or has followed
    trained: TuningReport | None = None
    last_fit: Tuned | None = None  # the previous fit, or the last `tune` for one
    kept: BatchPlan | None = None  # batch size and accumulation of a fit with plan="keep"

    def train_with(self, report: TuningReport) -> None:
        """Keep the report of training, or the same one with more in it."""
        self.trained = self.reports["fit"] = report


def show(report: TuningReport, trainer: Trainer, sink: sinks.Sink, *, verbose: bool) -> None:
    """Log a report and print it by a sink if wanted, on rank zero."""
    if not trainer.is_global_zero:
        return
    sinks.log(report)
    if not verbose:
        return
    try:
        sink(report)
    except Exception as error:  # standard output may be closed, or its disk full
        level = logging.DEBUG if sink is sinks.completed_on_console else logging.WARNING
        _log.log(level, "The report could not be printed: %s", plain(repr(error)))
