"""The AutoBatch callback."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._report.notes import waiting
from autobatch._settings import Settings
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import checked_search, known_plan
from autobatch.errors import AutobatchError
from autobatch.lightning._accumulation import LastWindowCorrection, check_switch
from autobatch.lightning._apply import (
    BeforeOptimizers,
    apply,
    apply_between_epochs,
    check_name,
    checked_name,
)
from autobatch.lightning._checks import check, check_answers, check_launcher, check_lightning
from autobatch.lightning._compat import callback_class, package_of
from autobatch.lightning._dataloaders import (
    FixedBatchSizeError,
    Rebatched,
    capture_order,
    checked_setter,
    is_empty,
)
from autobatch.lightning._isolation import silenced
from autobatch.lightning._loading import DataLoaderTimer
from autobatch.lightning._loggers import log_report, refresh_report
from autobatch.lightning._noise_scale import NoiseScale
from autobatch.lightning._resume import Checkpoint, PriorPlan, known_at_start
from autobatch.lightning._trial_data import checked_worst_case
from autobatch.lightning._tuning import CallbackArguments, tune_evaluation, tune_training
from autobatch.lightning._workloads import STAGES, before_data, loaders_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch.lightning._tuning import Tuned
    from autobatch.lightning._workloads import Stage


_log = logging.getLogger("autobatch")


if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = callback_class()


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
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit. Timing sizes
            has up to 20 seconds of its own.
        search: Which size to try next; `GuidedBisection()` unless told otherwise.
        device: Where memory is read: a name such as "cuda:1", or a probe. None: where the model is.
        latency_limit: For `validate`, `test` and `predict`: seconds within which a step has to answer a batch, the
            copy to the device included. The steps are timed one by one, and the largest batch that is answered in
            time is taken.
        percentile: So many percent of the steps have to be answered in time; None: 99. Only with `latency_limit`.
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
        latency_limit: float | None = None,
        percentile: float | None = None,
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
            latency_limit=latency_limit,
            percentile=percentile,
        )
        self._known = known_plan(plan, settings, world_size=None)
        self._asked = CallbackArguments(
            settings=settings,
            search=checked_search(search),
            device=device,
            worst_case=checked_worst_case(worst_case),
            repairs=check_switch(repair_last_window),
            batch_arg_name=checked_name(batch_arg_name),
            set_batch_size=checked_setter(set_batch_size),
        )
        self._milestones = Milestones(checked_epochs(retune_at_epochs))
        self._last: TuningReport | None = None  # of the fit before, or of `tune`
        self._first: TuningReport | None = None  # of this fit, at its start
        self._trained: TuningReport | None = None  # what training goes by now
        self._checkpoint: Checkpoint | None = None
        self._rebatched: dict[str, Rebatched] = {}  # by what they serve
        self._window: LastWindowCorrection | None = None
        self._wait = DataLoaderTimer()
        self._before = BeforeOptimizers()
        self._before_data: list[Callable[[], None]] = []  # what undoes a watch
        self._only_tunes = False

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
        check_answers(self._asked.settings, method)
        check_launcher(trainer)
        loaders = loaders_for(method, train_dataloaders, val_dataloaders, dataloaders)
        callbacks = trainer.callbacks
        others = [each for each in callbacks if each is not self]
        trainer.callbacks = [self, *others]
        self.report = self._last = None
        self._only_tunes = True
        with Snapshot() as snapshot, silenced(trainer):
            # What comes before the trials: the hooks that make loaders and optimizers, and `setup` of callbacks
            snapshot.capture_light(model, datamodule, *others)
            for loader in loaders:
                if isinstance(loader, DataLoader):
                    capture_order(loader, snapshot)
            try:
                getattr(trainer, method)(model, *loaders, datamodule=datamodule)
            finally:
                self._only_tunes = False
                self._undo()
                trainer.callbacks = callbacks
        if self.report is None:
            raise AutobatchError(
                f"Nothing was tuned: {method} ended before it came to its first batch."
            )
        return self.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go first, so that callbacks which look at the loader or the optimizers see the tuned ones."""
        check_answers(self._asked.settings, stage)
        others = (callback for callback in trainer.callbacks if callback is not self)
        trainer.callbacks = [self, *others]
        # LearningRateFinder loads what it saved itself: nothing of that concerns the next fit
        self._checkpoint = None
        check_lightning(trainer)
        if stage == "fit":
            self._before.watch(trainer)
        else:
            evaluate = partial(self._evaluate, trainer, STAGES[stage])
            self._before_data.append(before_data(trainer, STAGES[stage], evaluate))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tune, and let the Trainer train with what was found."""
        idle = _idle(trainer)
        if idle and self._only_tunes:
            raise AutobatchError(f"Nothing was tuned: {idle}.")
        if idle:
            _log.info("%s: the batch size is left as it is", idle)
            return
        check(trainer, pl_module, self._checkpoint)
        if self._checkpoint is not None:
            self._checkpoint.check_target(self._asked.settings)
        check_name(pl_module, self._asked.batch_arg_name)
        known_at = partial(known_at_start, self._known, self._checkpoint, self._last)
        tuned = tune_training(
            trainer, pl_module, self._asked, known_at, self._trained_until_now(trainer)
        )
        self._last = tuned.report
        if self._only_tunes:
            self._leave(trainer, tuned.report)
        self._rebatched["train"] = apply(
            tuned.report.plan,
            trainer,
            pl_module,
            self._asked.batch_arg_name,
            tuned.batch_sizes,
            self._before,
            self._asked.set_batch_size,
        )
        self._first = tuned.report
        self._go_on_with(trainer, tuned)

    def state_dict(self) -> dict[str, Any]:
        """The plan and the device it was verified on, in plain numbers and text: it travels in the checkpoint."""
        return {} if self._trained is None else Checkpoint.state_of(self._trained)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look whether the checkpoint was written within an epoch."""
        self._checkpoint = Checkpoint.of(checkpoint, max_steps=trainer.max_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan of a checkpoint: a resumed run goes on with it, after one trial that verifies it."""
        if state_dict and self._checkpoint is not None:
            self._checkpoint = self._checkpoint.with_state(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the report beside the logs, now that the loggers have made their directory."""
        if "train" in self._rebatched:
            self._rebatched["train"].check_used(trainer.train_dataloader)
            self._milestones.watch(trainer, partial(self._retune, trainer, pl_module))
            self._wait = DataLoaderTimer()
        if self.report is not None:
            log_report(self.report, trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here, where the last window of an epoch is repaired."""
        self._wait.interrupt()
        if self._window is not None:
            self._window.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count its samples, where the last window of an epoch is repaired."""
        self._wait.start_batch(trainer)
        if self._window is not None:
            self._window.start_batch(trainer, batch, batch_idx)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Do not take validation for waiting."""
        self._wait.interrupt()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Do not take a checkpoint for waiting."""
        self._wait.interrupt()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Weight the gradients so far, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_backward(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Weight all gradients, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_step(trainer, optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the report with what was measured while it trained."""
        self._wait.stop()
        if self._trained is None or "train" not in self._rebatched:
            return
        noise = next((c for c in trainer.callbacks if isinstance(c, NoiseScale)), None)
        measured = {
            "loading": self._wait.loading,
            "noise": noise.reading if noise else None,
        }
        self.report = self._trained = self._trained.model_copy(update=measured)
        refresh_report(self._trained, trainer)
        if noise is not None:
            self._tell(trainer, self._trained, sinks.completed_on_console)
        elif (note := waiting(self._wait.loading)) and trainer.is_global_zero:
            _log.warning("%s", note)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def _retune(self, trainer: Any, module: Any) -> None:
        """Tune anew in the middle of training, for the effective batch it began with."""
        if self._first is None or self._trained is None:
            return
        target = self._first.plan.effective_batch_size
        note = (
            f"Tuned anew at epoch {trainer.current_epoch}, for the effective batch of {target:,}."
        )
        known = PriorPlan(target=target, note=note)
        tuned = tune_training(trainer, module, self._asked, lambda *_: known, None)
        if tuned.report.plan != self._trained.plan:
            self._rebatched["train"] = apply_between_epochs(
                tuned.report.plan,
                trainer,
                module,
                self._asked.batch_arg_name,
                tuned.batch_sizes,
                self._rebatched["train"],
            )
        self._go_on_with(trainer, tuned)
        log_report(tuned.report, trainer)

    def _go_on_with(self, trainer: Any, tuned: Tuned) -> None:
        """What follows from a plan that was applied."""
        self._trained = tuned.report
        if self._asked.repairs:
            self._window = LastWindowCorrection(tuned.report.plan.micro_batch_size)
        if tuned.validation_sizes is not None:
            self._resize_validation(trainer, tuned.validation_sizes)
        self._tell(trainer, tuned.report)

    def _resize_validation(self, trainer: Any, batch_sizes: Sequence[int]) -> None:
        if "validation" in self._rebatched:
            self._rebatched.pop("validation").undo()
        loop = trainer.fit_loop.epoch_loop.val_loop
        self._rebatched["validation"] = Rebatched(loop._data_source, batch_sizes)
        loop._combined_loader = None  # in the middle of training there is one

    def _evaluate(self, trainer: Any, stage: Stage) -> None:
        """Tune before validation, testing or prediction asks for its loaders."""
        if trainer.fast_dev_run and not self._only_tunes:
            return
        module = trainer.lightning_module
        try:
            tuned = tune_evaluation(trainer, module, self._asked, stage)
        except FixedBatchSizeError as error:
            if self._only_tunes:
                raise
            _log.warning("%s runs its loaders as they are: %s", stage.name, error)
            return
        if self._only_tunes:
            self._leave(trainer, tuned.report)
        source = getattr(trainer, stage.loop)._data_source
        self._rebatched[stage.name] = Rebatched(source, tuned.batch_sizes)
        self._tell(trainer, tuned.report)

    def _trained_until_now(self, trainer: Any) -> BatchPlan | None:
        """The plan of the fit before, whose accumulation the Trainer still has."""
        plan = self._trained.plan if self._trained else None
        if plan and plan.accumulate_grad_batches == trainer.accumulate_grad_batches:
            return plan
        return None

    def _leave(self, trainer: Any, report: TuningReport) -> None:
        """End what the Trainer was asked for, by the way that Lightning 2.6 keeps for its own tuner."""
        self.report = report
        exceptions = importlib.import_module(f"{package_of(trainer)}.utilities.exceptions")
        raise exceptions._TunerExitException

    def _tell(self, trainer: Any, report: TuningReport, show: sinks.Sink = sinks.console) -> None:
        self.report = report
        if trainer.is_global_zero:
            sinks.log(report)
            show(report)

    def _undo(self) -> None:
        self._milestones.forget()
        self._before.forget()
        self._wait.stop()
        self._window = None
        while self._before_data:
            self._before_data.pop()()
        while self._rebatched:
            self._rebatched.popitem()[1].undo()


def _idle(trainer: Any) -> str | None:
    """Why there is nothing to tune for."""
    over = trainer.max_epochs == 0 or trainer.max_steps == 0
    if trainer.fast_dev_run or trainer.limit_train_batches == 0 or over:
        return "nothing will be trained"
    if is_empty(trainer.fit_loop._data_source.instance):
        return "there is nothing to train on"
    return None


def checked_epochs(epochs: Iterable[int]) -> frozenset[int]:
    """The epochs, or a ValueError that says what they should be."""
    whole = not isinstance(epochs, (str, bytes)) and hasattr(epochs, "__iter__")
    if not whole or any(type(epoch) is not int or epoch < 1 for epoch in epochs):
        raise ValueError(
            f"retune_at_epochs={epochs!r} is not a list of epochs; give whole numbers of 1 or more, such as [5]: "
            "epoch 0 is tuned before it starts."
        )
    return frozenset(epochs)


class Milestones:
    """Watches a Trainer begin its epochs.

    A callback would be too early: the module's own `on_train_epoch_start` comes after those of all callbacks.
    """

    def __init__(self, epochs: frozenset[int]) -> None:
        self._epochs = epochs
        self._loop: Any = None

    def watch(self, trainer: Any, reached: Callable[[], None]) -> None:
        """Call `reached` before such an epoch asks for its first batch, not where a checkpoint lies within it."""
        if not self._epochs:
            return
        self._loop = loop = trainer.fit_loop
        advance = loop.advance

        def look_and_advance() -> None:
            goes_on = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
            if trainer.current_epoch in self._epochs and not goes_on:
                reached()
            advance()

        # The instance's attribute hides the method of Lightning 2.6's `_FitLoop`
        loop.advance = look_and_advance

    def forget(self) -> None:
        """Let the Trainer's loop be what it was."""
        if self._loop is not None:
            vars(self._loop).pop("advance", None)
            self._loop = None
