"""AutoBatch: a thin callback, no algorithm."""

from __future__ import annotations

import importlib
import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._doors import checked_search, known_plan, versions
from autobatch._plan import BatchPlan
from autobatch._probes import detect
from autobatch._report import Settings, TuningReport
from autobatch._snapshot import Snapshot
from autobatch._trial import OptimizerWatch
from autobatch._tune import Job, tune
from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.lightning._apply import (
    BeforeOptimizers,
    apply,
    apply_between_epochs,
    check_name,
)
from autobatch.lightning._checks import check, check_lightning
from autobatch.lightning._counts import Counts
from autobatch.lightning._known import (
    Checkpoint,
    Here,
    Known,
    of_checkpoint,
    of_last_fit,
)
from autobatch.lightning._loaders import (
    Rebatched,
    batch_size_of,
    batches_of,
    capture_order,
    is_empty,
    requested,
    samples_of,
)
from autobatch.lightning._milestones import Milestones, checked_epochs
from autobatch.lightning._samples import Samples
from autobatch.lightning._scratch import scratch
from autobatch.lightning._steps import Steps, package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._memory import MemoryProbe
    from autobatch._search import Search

__all__ = ["AutoBatch"]

_log = logging.getLogger("autobatch")


def _callback_class() -> type:
    """The Callback of the Lightning package in use; of each that is installed, where none is imported yet.

    `lightning.pytorch` and `pytorch_lightning` are two packages, and neither knows the other's class.
    """
    packages = ("lightning.pytorch", "pytorch_lightning")
    imported = [package for package in packages if package in sys.modules]
    found = []
    for package in imported or packages:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "AutoBatch needs Lightning, and neither package is installed: pip install "
            '"lightning-autobatch[lightning]", or "[pytorch-lightning]" for the other name.'
        )
    return type("Callback", tuple(found), {})


if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = _callback_class()


class AutoBatch(_Callback):  # type: ignore[misc]  # a class made at run time
    """Finds the batch size that fits, reaches the effective batch by accumulation, and reports what it costs.

    Add it to a Trainer; nothing else changes. When `fit` starts it tries batch sizes on the real model, data and
    precision, gives everything back, and sets the batch size of the training loader and the accumulation. Training
    then is what it would have been with those two numbers written by hand.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; overrides an accumulation set in the
            Trainer. None: the largest micro-batch that fits, and the Trainer's accumulation stays.
        memory_limit: A float up to 1.0 is a share of the device, less what others hold. An int is bytes, and so is
            text such as "10GiB": what this process may hold, if others leave that much.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a search.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        search: Which size to try next; `GuidedBisection()` unless told otherwise.
        device: Where memory is read: a name such as "cuda:1", or a probe. None: where the model is.
        batch_arg_name: The attribute or hyperparameter of the module or datamodule that names the batch size, if any.
        retune_at_epochs: Epochs at whose start it tunes anew, for the same effective batch: where a callback such as
            BackboneFinetuning lets more of the model train.

    Raises:
        ValueError: An argument is not what it should be.
        AutobatchError: At `fit`, where the run is one that can not be tuned; nothing has been changed then.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AutoBatch(target_batch_size=256)])  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        target_batch_size: int | None = None,
        memory_limit: float | str = 0.9,
        max_micro_batch_size: int | None = None,
        plan: BatchPlan | str | Path | None = None,
        steps_per_trial: int = 3,
        time_limit: float | None = 300,
        search: Search | None = None,
        device: str | MemoryProbe | None = None,
        batch_arg_name: str = "batch_size",
        retune_at_epochs: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        self._settings = Settings.checked(
            target_batch_size=target_batch_size,
            memory_limit=memory_limit,
            max_micro_batch_size=max_micro_batch_size,
            steps_per_trial=steps_per_trial,
            time_limit=time_limit,
            dataset_size=None,
        )
        self._known = known_plan(plan, self._settings, world_size=1)
        self._search = checked_search(search)
        self._device = device
        self._batch_arg_name = batch_arg_name
        self._milestones = Milestones(checked_epochs(retune_at_epochs))
        # Of the fit before, or of `tune`, and then of this fit's start
        self._first: TuningReport | None = None
        self._checkpoint: Checkpoint | None = None
        self._rebatched: Rebatched | None = None
        self._before = BeforeOptimizers()

    def tune(
        self,
        trainer: Any,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
    ) -> TuningReport:
        """Tune without training, and change nothing: the Trainer, the model and the loaders stay as they are.

        Args:
            trainer: A Trainer, with this callback or without.
            model: What it would train.
            train_dataloaders: As for `Trainer.fit`, and so are the next two.
            val_dataloaders: Not looked at yet.
            datamodule: Where the loaders come from, instead.

        Returns:
            The report, whose `plan` can be written by hand or given to `AutoBatch(plan=…)`.

        Raises:
            AutobatchError: The run is one that can not be tuned.
        """
        callbacks = trainer.callbacks
        only = _TuneOnly(self)
        trainer.callbacks = [only, *(each for each in callbacks if each is not self)]
        with Snapshot() as snapshot:
            # What fit does before it comes to the trials: the hooks that make loaders and optimizers
            snapshot.capture_light(model, datamodule)
            if isinstance(train_dataloaders, DataLoader):
                capture_order(train_dataloaders, snapshot)
            try:
                trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            finally:
                trainer.callbacks = callbacks
        if only.report is None:
            raise AutobatchError(
                "Nothing was tuned: fit ended before it started to train."
            )
        return only.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go first, so that callbacks which look at the loader or the optimizers see the tuned ones."""
        others = (callback for callback in trainer.callbacks if callback is not self)
        trainer.callbacks = [self, *others]
        # LearningRateFinder loads what it saved itself: nothing of that concerns the next fit
        self._checkpoint = None
        if stage == "fit":
            check_lightning(trainer)
            self._before.watch(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tune, and let the Trainer train with what was found."""
        if trainer.fast_dev_run or trainer.limit_train_batches == 0:
            _log.info("nothing will be trained: the batch size is left as it is")
            return
        check(trainer, pl_module, self._checkpoint)
        if is_empty(trainer.fit_loop._data_source.instance):
            _log.info("there is nothing to train on: the batch size is left as it is")
            return
        self._check_target_of_checkpoint()
        check_name(pl_module, self._batch_arg_name)
        report = self._tune(trainer, pl_module, self._known_at_start)
        self._rebatched = apply(
            report.plan, trainer, pl_module, self._batch_arg_name, self._before
        )
        self.report = self._first = report
        sinks.console(report)

    def state_dict(self) -> dict[str, Any]:
        """The plan and the device it was verified on, in plain numbers and text: it travels in the checkpoint."""
        return {} if self.report is None else Checkpoint.state_of(self.report)

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Look whether the checkpoint was written within an epoch."""
        self._checkpoint = Checkpoint.of(checkpoint, max_steps=trainer.max_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan of a checkpoint: a resumed run goes on with it, after one trial that verifies it."""
        if state_dict and self._checkpoint is not None:
            self._checkpoint = self._checkpoint.with_state(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the report beside the logs, now that the loggers have made their directory."""
        if self._rebatched is not None:
            self._milestones.watch(trainer, partial(self._retune, trainer, pl_module))
        self._write(trainer)

    def _write(self, trainer: Any) -> None:
        if self.report is None or not trainer.loggers or not trainer.log_dir:
            return
        try:
            sinks.json_file(Path(trainer.log_dir) / "autobatch.json")(self.report)
        except OSError as error:
            _log.warning("the report could not be written: %s", error)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def _retune(self, trainer: Any, module: Any) -> None:
        """Tune anew in the middle of training, for the effective batch it began with."""
        if self.report is None or self._first is None or self._rebatched is None:
            return
        target = self._first.plan.effective_batch_size
        note = f"Tuned anew at epoch {trainer.current_epoch}, for the effective batch of {target}."
        report = self._tune(trainer, module, lambda *_: Known(target=target, note=note))
        if report.plan != self.report.plan:
            self._rebatched = apply_between_epochs(
                report.plan, trainer, module, self._batch_arg_name, self._rebatched
            )
        self.report = report
        sinks.console(report)
        self._write(trainer)

    def _known_at_start(self, job: Job, here: Here, settings: Settings) -> Known:
        if self._checkpoint is not None and (
            self._known is None or self._checkpoint.plan is not None
        ):
            return of_checkpoint(self._checkpoint, here, settings)
        if self._known is not None:
            return self._known_to_user()
        return of_last_fit(self._first, job, here, settings)

    def _known_to_user(self, *_: Any) -> Known:
        return Known(self._known)

    def _tune(
        self,
        trainer: Any,
        module: Any,
        known_at: Callable[[Job, Here, Settings], Known],
    ) -> TuningReport:
        probe = detect(self._device, module.device)
        # The loops know neither of these two while scratch ones stand for them
        counted = partial(
            Counts, trainer, trainer.max_steps, validates=trainer.enable_validation
        )
        with (
            Snapshot() as snapshot,
            OptimizerWatch(probe.clock) as optimizers,
            sinks.progress() as shown,
            scratch(trainer),
        ):
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            snapshot.capture(
                module, *trainer.optimizers, *schedulers, *([scaler] if scaler else [])
            )
            # Hooks that make the loader may change the module and the datamodule
            snapshot.capture_light(trainer.datamodule)
            loader = requested(trainer.fit_loop._data_source)
            optimizers.expected = True
            counts = counted(
                batches=partial(batches_of, loader),
                samples=partial(_samples_trained, trainer, loader),
                before=BatchPlan(
                    batch_size_of(loader), trainer.accumulate_grad_batches
                ),
            )
            job = _job(trainer, module, loader, Samples(loader, snapshot), counts)
            settings = self._settings.model_copy(
                update={"dataset_size": samples_of(loader)}
            )
            here = Here.of(probe.name, probe.read().total, job.world_size)
            report = _verified_or_searched(
                known_at(job, here, settings),
                job,
                settings,
                partial(
                    tune,
                    probe=probe,
                    search=self._search,
                    snapshot=snapshot,
                    optimizers=optimizers,
                    first_touch=nullcontext,  # the module and its optimizers are known
                    shown=shown,
                ),
            )
            counts.check(report.plan)
            return report

    def _check_target_of_checkpoint(self) -> None:
        target, checkpoint = self._settings.target_batch_size, self._checkpoint
        if target is None or checkpoint is None or checkpoint.plan is None:
            return
        effective = checkpoint.plan.effective_batch_size
        if target not in (effective, checkpoint.target):
            raise AutobatchError(
                f"The checkpoint was trained with {effective} samples per update, and "
                f"target_batch_size={target} asks for another number: a resumed run goes on with its plan."
            )

    def _undo(self) -> None:
        self._milestones.forget()
        self._before.forget()
        if self._rebatched is not None:
            self._rebatched.undo()
            self._rebatched = None


class _TuneOnly(_Callback):  # type: ignore[misc]  # a class made at run time
    """Leaves `fit` once the report is there, by the way that Lightning 2.6 keeps for its own tuner."""

    def __init__(self, tuner: AutoBatch) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        self._tuner = tuner

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check_lightning(trainer)
        check(trainer, pl_module, None)
        tuner = self._tuner
        report = tuner._tune(trainer, pl_module, tuner._known_to_user)
        self.report = tuner.report = tuner._first = report
        exceptions = importlib.import_module(
            f"{package_of(trainer)}.utilities.exceptions"
        )
        raise exceptions._TunerExitException


def _verified_or_searched(
    known: Known,
    job: Job,
    settings: Settings,
    run: Callable[..., TuningReport],
) -> TuningReport:
    """The report about a plan that is known, where one trial verifies it; else about one that a search found."""
    note = known.note
    if known.plan is not None:
        try:
            return run(_noted(job, note), settings, known=known.plan)
        except DoesNotFitError as error:
            if known.refusal is not None:
                raise AutobatchError(known.refusal) from error
            if note is None:  # the user's own
                raise
            note = f"Searched anew, since a micro-batch of {known.plan.micro_batch_size} does not fit any more."
    if known.target is not None:
        settings = settings.model_copy(update={"target_batch_size": known.target})
    return run(_noted(job, note), settings, known=None)


def _noted(job: Job, note: str | None) -> Job:
    remarks = job.remarks
    if note is None or remarks is None:
        return job
    return replace(job, remarks=lambda plan: (note, *remarks(plan)))


def _samples_trained(trainer: Any, loader: Any, plan: BatchPlan) -> int | None:
    """What an epoch leaves after `drop_last` and `limit_train_batches`, which counts batches."""
    samples, batches = samples_of(loader), batches_of(loader, plan.micro_batch_size)
    if samples is None or batches is None:
        return samples
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(samples, batches * plan.micro_batch_size) or None


def _job(
    trainer: Any, module: Any, loader: Any, samples: Samples, counts: Counts
) -> Job:
    package = package_of(trainer)
    lightning = importlib.import_module(package.partition(".")[0])
    parts = (
        type(module).__name__,
        type(trainer.optimizers[0]).__name__,
        str(trainer.precision),
    )
    return Job(
        workload=Steps(trainer, samples),
        can_accumulate=True,
        start=batch_size_of(loader),
        world_size=1,
        accumulate=trainer.accumulate_grad_batches,
        samples_trained=counts.samples,
        remarks=counts.remarks,
        before=counts.before,
        subject=" · ".join(parts),
        environment={**versions(), lightning.__name__: lightning.__version__},
    )
