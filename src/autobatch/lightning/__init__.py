"""AutoBatch: a thin callback, no algorithm."""

from __future__ import annotations

import importlib
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._doors import checked_search, known_plan
from autobatch._report import Settings, TuningReport
from autobatch._snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._apply import (
    BeforeOptimizers,
    apply,
    apply_between_epochs,
    check_name,
)
from autobatch.lightning._checks import check, check_lightning
from autobatch.lightning._evaluations import STAGES
from autobatch.lightning._known import (
    Checkpoint,
    Here,
    Known,
    of_checkpoint,
    of_last_fit,
)
from autobatch.lightning._loaders import (
    Rebatched,
    capture_order,
    checked_setter,
    is_empty,
)
from autobatch.lightning._loggers import log_report
from autobatch.lightning._milestones import Milestones, checked_epochs
from autobatch.lightning._package import package_of
from autobatch.lightning._run import Asked, tune_evaluation, tune_training
from autobatch.lightning._samples import checked_worst_case
from autobatch.lightning._scratch import silenced
from autobatch.lightning._windows import WindowRepair, check_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._search import Search
    from autobatch._tune import Job
    from autobatch.lightning._run import Tuned

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
        repair_last_window: Whether the last update of an epoch, which may be of fewer samples than the others, gets
            the gradient of the mean loss over its samples; Lightning by itself makes it too small. For losses that
            are means over the batch.
        worst_case: A function that makes the largest batch of so many samples that a step may meet, on the host and
            as the loader would collate it. None: trials run the largest of up to 1,000 samples, or of those that
            5 seconds suffice to read.
        set_batch_size: A function of a training loader and a batch size that sets it, for batch samplers that go by
            something else, such as a budget of tokens: it may take `n` for its own measure of about `n` samples, by
            assigning attributes of the loader or its samplers, which are given back after `fit`. Trials run `n` of
            the largest samples as ever. None: the `batch_size` of the batch sampler is set.
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
        repair_last_window: bool = False,
        worst_case: Callable[[int], Any] | None = None,
        set_batch_size: Callable[[DataLoader[Any], int], None] | None = None,
        retune_at_epochs: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        settings = Settings.checked(
            target_batch_size=target_batch_size,
            memory_limit=memory_limit,
            max_micro_batch_size=max_micro_batch_size,
            steps_per_trial=steps_per_trial,
            time_limit=time_limit,
            dataset_size=None,
        )
        self._known = known_plan(plan, settings, world_size=None)
        self._asked = Asked(
            settings=settings,
            search=checked_search(search),
            device=device,
            worst_case=checked_worst_case(worst_case),
            repairs=check_switch(repair_last_window),
            set_batch_size=checked_setter(set_batch_size),
        )
        self._batch_arg_name = batch_arg_name
        self._milestones = Milestones(checked_epochs(retune_at_epochs))
        # Of the fit before, or of `tune`, and then of this fit's start
        self._first: TuningReport | None = None
        self._trained: TuningReport | None = None  # what training goes by
        self._checkpoint: Checkpoint | None = None
        self._rebatched: dict[str, Rebatched] = {}  # by what they serve
        self._window: WindowRepair | None = None
        self._before = BeforeOptimizers()

    def tune(
        self,
        trainer: Any,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        method: str = "fit",
    ) -> TuningReport:
        """Tune without training, and change nothing: the Trainer, the model and the loaders stay as they are.

        Args:
            trainer: A Trainer, with this callback or without.
            model: What it would train.
            train_dataloaders: As for `Trainer.fit`.
            val_dataloaders: As for `Trainer.fit`.
            datamodule: Where the loaders come from, instead.
            dataloaders: As for `Trainer.validate`, `Trainer.test` and `Trainer.predict`.
            method: "fit", "validate", "test" or "predict": what the Trainer would be asked to do.

        Returns:
            The report, whose `plan` can be written by hand or given to `AutoBatch(plan=…)`.

        Raises:
            ValueError: There is no such method, or it does not take the loaders that were given.
            AutobatchError: The run is one that can not be tuned.
        """
        loaders = _given(method, train_dataloaders, val_dataloaders, dataloaders)
        callbacks = trainer.callbacks
        only = _TuneOnly(self)
        trainer.callbacks = [only, *(each for each in callbacks if each is not self)]
        with Snapshot() as snapshot, silenced(trainer):
            # What comes before the trials: the hooks that make loaders and optimizers, and `setup` of callbacks
            others = (each for each in callbacks if each is not self)
            snapshot.capture_light(model, datamodule, *others)
            for loader in loaders:
                if isinstance(loader, DataLoader):
                    capture_order(loader, snapshot)
            try:
                getattr(trainer, method)(model, *loaders, datamodule=datamodule)
            finally:
                trainer.callbacks = callbacks
                only.forget()
        if only.report is None:
            raise AutobatchError(
                f"Nothing was tuned: {method} ended before it came to its first batch."
            )
        return only.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go first, so that callbacks which look at the loader or the optimizers see the tuned ones."""
        others = (callback for callback in trainer.callbacks if callback is not self)
        trainer.callbacks = [self, *others]
        # LearningRateFinder loads what it saved itself: nothing of that concerns the next fit
        self._checkpoint = None
        check_lightning(trainer)
        if stage == "fit":
            self._before.watch(trainer)
        else:
            _before_data(trainer, stage, partial(self._evaluate, trainer, stage))

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
        tuned = tune_training(trainer, pl_module, self._asked, self._known_at_start)
        self._rebatched["train"] = apply(
            tuned.report.plan,
            trainer,
            pl_module,
            self._batch_arg_name,
            tuned.batch_sizes,
            self._before,
            self._asked.set_batch_size,
        )
        self._resize_validation(trainer, tuned)
        self._watch_windows(tuned.report)
        self._first = self._trained = tuned.report
        self._tell(trainer, tuned.report)

    def state_dict(self) -> dict[str, Any]:
        """The plan and the device it was verified on, in plain numbers and text: it travels in the checkpoint."""
        return {} if self._trained is None else Checkpoint.state_of(self._trained)

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
        if "train" in self._rebatched:
            self._milestones.watch(trainer, partial(self._retune, trainer, pl_module))
        if self.report is not None:
            log_report(self.report, trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count its samples, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.start_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Weight the gradients so far, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_backward(trainer)

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Any
    ) -> None:
        """Weight all gradients, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_step(trainer, optimizer)

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
        if self._trained is None or self._first is None:
            return
        target = self._first.plan.effective_batch_size
        note = f"Tuned anew at epoch {trainer.current_epoch}, for the effective batch of {target}."
        tuned = tune_training(
            trainer, module, self._asked, lambda *_: Known(target=target, note=note)
        )
        if tuned.report.plan != self._trained.plan:
            self._rebatched["train"] = apply_between_epochs(
                tuned.report.plan,
                trainer,
                module,
                self._batch_arg_name,
                tuned.batch_sizes,
                self._rebatched["train"],
            )
            self._watch_windows(tuned.report)
        self._trained = tuned.report
        self._tell(trainer, tuned.report)
        log_report(tuned.report, trainer)

    def _evaluate(self, trainer: Any, stage: str) -> None:
        """Tune before validation, testing or prediction asks for its loaders."""
        if trainer.fast_dev_run:
            return
        tuned = tune_evaluation(
            trainer, trainer.lightning_module, self._asked, STAGES[stage]
        )
        source = getattr(trainer, STAGES[stage].loop)._data_source
        self._rebatched[stage] = Rebatched(source, tuned.batch_sizes)
        self._tell(trainer, tuned.report)

    def _watch_windows(self, report: TuningReport) -> None:
        if self._asked.repairs:
            self._window = WindowRepair(report.plan.micro_batch_size)

    def _resize_validation(self, trainer: Any, tuned: Tuned) -> None:
        if tuned.validation_sizes is None:
            return
        val_loop = trainer.fit_loop.epoch_loop.val_loop
        self._rebatched["validation"] = Rebatched(
            val_loop._data_source, tuned.validation_sizes
        )

    def _tell(self, trainer: Any, report: TuningReport) -> None:
        self.report = report
        if trainer.is_global_zero:
            sinks.log(report)
            sinks.console(report)

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

    def _check_target_of_checkpoint(self) -> None:
        target, checkpoint = self._asked.settings.target_batch_size, self._checkpoint
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
        self._window = None
        while self._rebatched:
            self._rebatched.popitem()[1].undo()


class _TuneOnly(_Callback):  # type: ignore[misc]  # a class made at run time
    """Leaves `fit` once the report is there, by the way that Lightning 2.6 keeps for its own tuner."""

    def __init__(self, tuner: AutoBatch) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        self._tuner = tuner
        self._forget: Callable[[], None] = lambda: None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        check_lightning(trainer)
        if stage != "fit":
            self._forget = _before_data(
                trainer, stage, partial(self._evaluate, trainer, stage)
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check(trainer, pl_module, None)
        tuner = self._tuner
        tuned = tune_training(trainer, pl_module, tuner._asked, tuner._known_to_user)
        tuner._first = tuned.report
        self._leave(trainer, tuned.report)

    def forget(self) -> None:
        """Let the Trainer's loop be what it was."""
        self._forget()

    def _evaluate(self, trainer: Any, stage: str) -> None:
        asked = self._tuner._asked
        module = trainer.lightning_module
        tuned = tune_evaluation(trainer, module, asked, STAGES[stage])
        self._leave(trainer, tuned.report)

    def _leave(self, trainer: Any, report: TuningReport) -> None:
        self.report = self._tuner.report = report
        exceptions = importlib.import_module(
            f"{package_of(trainer)}.utilities.exceptions"
        )
        raise exceptions._TunerExitException


def _before_data(
    trainer: Any, stage: str, act: Callable[[], None]
) -> Callable[[], None]:
    """Act before the loop of a stage sets its data up: the first moment at which the model is on its device.

    What hides the method of the loops of Lightning 2.6 goes with the call, or by what is returned.
    """
    loop = getattr(trainer, STAGES[stage].loop)
    set_up = type(loop).setup_data

    def forget() -> None:
        vars(loop).pop("setup_data", None)

    def act_and_set_up() -> None:
        forget()
        # The loop has switched gradients off; trials have to switch them for themselves
        with torch.inference_mode(mode=False), torch.enable_grad():
            act()
        set_up(loop)

    loop.setup_data = act_and_set_up
    return forget


def _given(
    method: str, train_dataloaders: Any, val_dataloaders: Any, dataloaders: Any
) -> tuple[Any, ...]:
    """The loaders that a method of the Trainer takes, in its order."""
    if method == "fit":
        if dataloaders is not None:
            raise ValueError(
                "dataloaders are for validate, test and predict; give fit its train_dataloaders."
            )
        return (train_dataloaders, val_dataloaders)
    if method not in STAGES:
        raise ValueError(
            f"method={method!r} is none of a Trainer's; give 'fit', 'validate', 'test' or 'predict'."
        )
    if train_dataloaders is not None or val_dataloaders is not None:
        raise ValueError(
            f"train_dataloaders and val_dataloaders are for fit; give {method} its dataloaders."
        )
    return (dataloaders,)
