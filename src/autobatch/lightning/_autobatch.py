"""The AutoBatch callback."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._distributed import current_ranks, stopping_together
from autobatch._estimate.device import target_gpu
from autobatch._loaders.order import capture_order
from autobatch._loaders.samples import NoDataError, checked_worst_case
from autobatch._memory.detect import detect
from autobatch._report.known_plan import known_plan
from autobatch._report.notes import survived, waiting
from autobatch._report.units import plain
from autobatch._settings import Settings, checked_verbose
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import checked_search
from autobatch._undo import Undo
from autobatch.errors import AutobatchError, FixedBatchSizeError
from autobatch.lightning._accumulation import LastWindowCorrection, check_switch
from autobatch.lightning._apply import apply, apply_between_epochs
from autobatch.lightning._attribute import (
    FormerBatchSize,
    check_attribute,
    checked_name,
    set_batch_size_attribute,
)
from autobatch.lightning._checks import (
    check,
    check_alone,
    check_latency,
    check_launcher,
    check_lightning,
    check_survival,
    check_trainer,
    checked_epochs,
    checked_evaluate,
    checked_keep,
    checked_survival,
    why_idle,
)
from autobatch.lightning._compat import (
    Imported,
    callback_class,
    data_source,
    forget_combined_loader,
)
from autobatch.lightning._dataloaders import Rebatched, checked_setter
from autobatch.lightning._estimating import estimate_training
from autobatch.lightning._evaluation import STAGES, before_data, loaders_for
from autobatch.lightning._hooks import FIT_START
from autobatch.lightning._loggers import log_report, refresh_report
from autobatch.lightning._noise_scale import NoiseScale
from autobatch.lightning._resources import CallbackArguments
from autobatch.lightning._resume import Checkpoint, PriorPlan, TunedFit, known_at_start
from autobatch.lightning._run import Run, before_epochs
from autobatch.lightning._silence import silenced
from autobatch.lightning._survival import Survival
from autobatch.lightning._tuning import tune_training
from autobatch.lightning._tuning_evaluation import tune_evaluation
from autobatch.testing import named_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from autobatch._estimate import Estimate
    from autobatch._loaders.batch_size import LoaderSize
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._report.result import Survived
    from autobatch._search import Search
    from autobatch.lightning._evaluation import Stage
    from autobatch.lightning._resources import Tuned


_log = logging.getLogger("autobatch")


if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = callback_class()


class AutoBatch(_Callback):  # type: ignore[misc]  # a class made at run time
    """Find the batch size that fits, accumulate to the effective batch size, and report the cost.

    Add it to a Trainer; nothing else changes. When `fit` starts, it tries batch sizes on the real
    model, data and precision, restores everything, and sets the batch size of the training loader
    and the accumulation. Training is then the same as with these two numbers set manually.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; overrides an accumulation
            set in the Trainer. None: as `prefer` says, with the accumulation of the Trainer.
        memory_limit: A float up to 1.0 is a share of the device, less the memory of other
            processes. An int is bytes, and so is text such as "10GiB": the limit of this process,
            if other processes leave that much.
        prefer: Without a target, "fast" takes the smallest micro-batch within 5 % of the fastest
            that fits, or the size of the loader if that is as fast; "largest" takes the largest
            that fits.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a
            search. "keep" tunes nothing: batch size and accumulation stay as they are.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        timing_seconds: Further seconds for timing sizes, which ends as soon as the choice is
            settled. 0: no timing; the largest sizes are taken. None: at most 20, and at most a
            tenth of the training that the Trainer plans.
        search: The search strategy; None: `GuidedBisection()`.
        device: The device whose memory is read: a name such as "cuda:1", "simulated:2GiB" for one
            on the CPU (`autobatch.testing`), or a probe. None: the device of the model.
        latency_limit: For `validate`, `test` and `predict`: seconds within which a step has to
            answer a batch, including the copy to the device. The steps are timed one by one, and
            of the batches answered in time the smallest within 1 % of the most throughput is taken.
        percentile: Percent of the steps that have to be answered in time; None: 99. Only with
            `latency_limit`.
        verbose: Whether the progress of tuning and the report are printed.
        batch_arg_name: The attribute or hyperparameter of the module or datamodule that holds the
            batch size, if any; with dots for one inside of another, such as "data.batch_size".
        repair_last_window: True gives the last update of an epoch, which may have fewer samples
            than the others, the gradient of the mean loss over its samples; Lightning by itself
            makes it too small. For losses that are means over the batch.
        worst_case: A function of a number of samples that returns the largest batch of that many
            samples a step may meet, on the host and collated as by the loader. None: trials run the
            largest of up to 1,000 samples, or of those that can be read in 5 seconds.
        set_batch_size: A function of a training loader and a batch size that sets it, for batch
            samplers with another measure, such as a budget of tokens: it may take `n` for about `n`
            samples, by assigning attributes of the loader or its samplers, which are restored after
            `fit`. Trials run `n` of the largest samples in any case. None: the `batch_size` of the
            batch sampler is set.
        retune_at_epochs: Epochs at whose start it tunes again, for the same effective batch size:
            for callbacks such as BackboneFinetuning, which let more of the model train.
        on_out_of_memory: "split" lets training go on when memory runs out in it: the micro-batch is
            undone, run again in pieces weighted by their samples, and the optimizer steps once.
            "raise" lets training end.
        evaluate: True tunes `validate`, `test` and `predict` of the Trainer too, as `latency_limit`
            does: to the largest batch that fits, or with a target only if their own batch does not.

    Attributes:
        reports: The last report of each method of the Trainer: "fit", "validate", "test" and
            "predict".
        survived: Micro-batches of the last `fit` that ran out of memory and were done in pieces.

    Raises:
        ValueError: An argument has a bad value.
        AutobatchError: At `fit`, if the run cannot be tuned; nothing has been changed then.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AutoBatch(target_batch_size=256)])  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        target_batch_size: int | None = None,
        memory_limit: float | str = 0.9,
        prefer: str = "fast",
        max_micro_batch_size: int | None = None,
        plan: BatchPlan | str | Path | None = None,
        steps_per_trial: int = 3,
        time_limit: float | None = 300,
        timing_seconds: float | None = None,
        search: Search | None = None,
        device: str | MemoryProbe | None = None,
        latency_limit: float | None = None,
        percentile: float | None = None,
        verbose: bool = True,
        batch_arg_name: str = "batch_size",
        repair_last_window: bool = False,
        worst_case: Callable[[int], Any] | None = None,
        set_batch_size: Callable[[DataLoader[Any], int], None] | None = None,
        retune_at_epochs: Sequence[int] = (),
        evaluate: bool = False,
        on_out_of_memory: str = "raise",
    ) -> None:
        super().__init__()
        self.reports: dict[str, TuningReport] = {}
        self.survived: tuple[Survived, ...] = ()
        survives = checked_survival(on_out_of_memory)
        keeps = checked_keep(
            plan,
            survives=survives,
            target_batch_size=target_batch_size,
            max_micro_batch_size=max_micro_batch_size,
            repair_last_window=repair_last_window,
            retune_at_epochs=retune_at_epochs,
        )
        settings = Settings.checked(
            target_batch_size=target_batch_size,
            memory_limit=memory_limit,
            prefer=prefer,
            max_micro_batch_size=max_micro_batch_size,
            steps_per_trial=steps_per_trial,
            time_limit=time_limit,
            timing_seconds=timing_seconds,
            dataset_size=None,
            latency_limit=latency_limit,
            percentile=percentile,
        )
        self._known = known_plan(None if keeps else plan, settings, world_size=None)
        self._epochs = checked_epochs(retune_at_epochs)
        self._arguments = CallbackArguments(
            settings=settings,
            search=checked_search(search),
            device=named_device(device),
            worst_case=checked_worst_case(worst_case),
            repairs=check_switch(repair_last_window),
            batch_arg_name=checked_name(batch_arg_name),
            set_batch_size=checked_setter(set_batch_size),
            retunes=bool(self._epochs),
            verbose=checked_verbose(verbose),
            survives=survives,
            keeps=keeps,
        )
        self._evaluates = checked_evaluate(evaluate) or latency_limit is not None
        self._last: TunedFit | None = None  # of the previous fit, or of `tune`
        self._trained: TuningReport | None = None  # with the plan that training follows
        self._only_tunes = False
        self._estimates: Callable[..., Estimate] | None = None  # instead of tuning
        self._estimated: Estimate | None = None
        self._run = Run()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the state of a run, which belongs to one Trainer."""
        return {**vars(self), "_run": Run()}

    @property
    def report(self) -> TuningReport | None:
        """The report of `fit`; before any `fit`, that of the last evaluation."""
        return self.reports.get("fit") or next(reversed(self.reports.values()), None)

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
        """Tune without training; the Trainer, the model and the loaders stay as they are.

        Args:
            trainer: A Trainer, with this callback or without; another AutoBatch of it does nothing.
            model: The module.
            train_dataloaders: As for `Trainer.fit`.
            val_dataloaders: As for `Trainer.fit`.
            datamodule: A datamodule, instead of loaders.
            dataloaders: As for `Trainer.validate`, `Trainer.test` and `Trainer.predict`.
            method: "fit", "validate", "test" or "predict": the method of the Trainer to tune for.

        Returns:
            The report, whose `plan` can be written in the Trainer or given to `AutoBatch(plan=…)`.

        Raises:
            ValueError: `trainer` is not a Trainer, or has no such method, or it does not take the
                loaders that were given.
            AutobatchError: The run cannot be tuned.
        """
        check_trainer(trainer)
        check_latency(self._arguments.settings, method)
        check_launcher(trainer)
        loaders = loaders_for(method, train_dataloaders, val_dataloaders, dataloaders)
        self.reports.pop(method, None)
        self._begin_only(trainer, method, model, loaders, datamodule)
        if method not in self.reports:
            raise AutobatchError(f"Nothing was tuned: {method} ended before its first batch.")
        return self.reports[method]

    def estimate(
        self,
        trainer: Any,
        model: Any,
        train_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        device: str | int | None = None,
        calibrate: str | Path | None = None,
    ) -> Estimate:
        """Estimate the memory of a training step on a GPU, which need not be there; run no step.

        As `autobatch.estimate`, with the module's own step and optimizer, batches of the loader, and
        Lightning's order of calls. `memory_limit` and `target_batch_size` are those of the callback:
        if one micro-batch does not reach the target, the step accumulates. The Trainer, the model
        and the loaders stay as they are.

        Args:
            trainer: A Trainer with the precision to estimate; `accelerator="cpu"` without a GPU.
            model: The module.
            train_dataloaders: As for `Trainer.fit`.
            datamodule: A datamodule, instead of loaders.
            device: Name of a GPU, such as "H100" or "A100-40GB"; its memory in bytes or as text;
                None or "cuda:1" for one that is present.
            calibrate: The report file of a tuning run of the same step on a GPU: its measured peaks
                correct the estimate and narrow its band.

        Returns:
            The estimate: `.largest`, `.at(n)`, `.untested`; `print` shows it all.

        Raises:
            ValueError: `trainer` is not a Trainer, or `device` is not a known GPU.
            AutobatchError: The memory of the step cannot be estimated.
        """
        check_trainer(trainer)
        check_launcher(trainer)
        loaders = loaders_for("fit", train_dataloaders, None, None)
        with Undo() as undo, undo:
            undo.add(partial(setattr, self, "_estimates", None))
            self._estimated = None
            self._estimates = partial(
                estimate_training, target=target_gpu(device), calibrate=calibrate
            )
            self._begin_only(trainer, "fit", model, loaders, datamodule)
        if self._estimated is None:
            raise AutobatchError("Nothing was estimated: fit ended before its first batch.")
        return self._estimated

    def _begin_only(
        self, trainer: Any, method: str, model: Any, loaders: Sequence[Any], datamodule: Any
    ) -> None:
        """Begin a method of the Trainer and end it before its first batch; restore all state."""
        # Another AutoBatch of the Trainer stays out of it
        others = [each for each in trainer.callbacks if not isinstance(each, AutoBatch)]
        # Entered twice: an interrupt between the body and the inner exit still meets the outer one
        with Undo() as undo, undo:
            snapshot = undo.enter_context(Snapshot())
            undo.enter_context(silenced(trainer))
            # Before the trials run the hooks that make loaders and optimizers, and `setup` of
            # callbacks
            snapshot.capture_light(model, datamodule, *others)
            for loader in loaders:
                if isinstance(loader, DataLoader):
                    capture_order(loader, snapshot)
            undo.add(partial(setattr, trainer, "callbacks", trainer.callbacks))
            undo.add(partial(setattr, self, "_only_tunes", False))
            undo.add(self._undo_run)
            trainer.callbacks = [self, *others]
            self._only_tunes = True
            getattr(trainer, method)(model, *loaders, datamodule=datamodule)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move to the front, so that other callbacks see the tuned loader and optimizers."""
        # Without the checkpoint of the previous run: LearningRateFinder loads one that it saved
        # itself
        self._run = Run()
        if stage != "fit" and not (self._evaluates or self._only_tunes):
            return
        check_alone(self, trainer.callbacks)
        check_latency(self._arguments.settings, stage)
        others = (callback for callback in trainer.callbacks if callback is not self)
        trainer.callbacks = [self, *others]
        check_lightning(trainer)
        if stage == "fit":
            self.survived = ()
            self._run.before_optimizers.watch(trainer, self._arguments.batch_arg_name)
        else:
            evaluate = partial(self._tune_evaluation, trainer, STAGES[stage])
            self._run.replace(before_data(trainer, STAGES[stage], evaluate))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Read from a checkpoint if it was written within an epoch."""
        self._run.checkpoint = Checkpoint.of(checkpoint, max_steps=trainer.max_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan of a checkpoint, with which a resumed run continues after one trial."""
        if state_dict and self._run.checkpoint is not None:
            self._run.checkpoint = self._run.checkpoint.with_state(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and its device for the checkpoint, in plain numbers and text."""
        return {} if self._trained is None else Checkpoint.state_of(self._trained)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tune, and make the Trainer train with the plan."""
        if self._arguments.survives:
            check_survival(trainer, pl_module)
        reason = why_idle(trainer)
        if reason:
            self._stay_idle(reason)
            return
        if self._arguments.keeps:
            self._stay_idle('plan="keep" tunes nothing')
            return
        checkpoint = self._run.checkpoint
        check(trainer, pl_module, checkpoint)
        if checkpoint is not None:
            checkpoint.check_target(self._arguments.settings)
        check_attribute(pl_module, self._arguments.batch_arg_name)
        last = None if self._only_tunes else self._last
        known_at = partial(known_at_start, self._known, checkpoint, last)
        before = self._plan_before(trainer)
        try:
            if self._estimates is not None:
                self._estimated = self._estimates(trainer, pl_module, self._arguments)
                raise Imported.TUNER_EXIT.of(trainer)
            with stopping_together():
                tuned = tune_training(
                    trainer, pl_module, self._arguments, known_at, before, FIT_START
                )
                self._last = TunedFit(tuned.report, tuned.fingerprint)
                if not self._only_tunes:
                    self._apply_at_start(trainer, pl_module, tuned)
        except NoDataError:
            self._stay_idle("there is nothing to train on")
            return
        if self._only_tunes:
            self._end_run(trainer, "fit", tuned.report)
        self._run.first_report = tuned.report
        self._continue_with(trainer, tuned)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the report beside the logs, now that the loggers have created their directory."""
        if self._arguments.survives:
            self._survive(trainer, pl_module)
        if self._run.is_tuned:
            self._run.loaders["train"].check_used(trainer.train_dataloader)
            before_hooks = partial(self._before_hooks, trainer, pl_module)
            after_hooks = partial(self._before_epoch, trainer, pl_module)
            self._run.replace(before_epochs(trainer, before_hooks, after_hooks))
            log_report(self.reports["fit"], trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count samples from the start of the epoch."""
        self._run.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the time and the samples of a batch, and look at memory after the first step."""
        self._run.start_batch(trainer, batch, batch_idx)
        if self._run.steps_before is not None and trainer.global_step > self._run.steps_before:
            self._run.steps_before = None
            self._look_beside(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Do not count validation as waiting for the loader."""
        self._run.timer.interrupt()
        if self._arguments.survives:
            self._run.begin_evaluation(trainer, detect(self._arguments.device, pl_module.device))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the steps of later trials alone."""
        self._run.end_evaluation()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Let testing go on when memory runs out in it."""
        if self._arguments.survives:
            self._run.begin_evaluation(trainer, detect(self._arguments.device, pl_module.device))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Do not count a checkpoint as waiting for the loader."""
        self._run.timer.interrupt()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Weight the gradients accumulated before the last micro-batch of an epoch."""
        if self._run.window is not None:
            self._run.window.before_backward(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Weight the gradients of the last window of an epoch."""
        if self._run.window is not None:
            self._run.window.before_step(trainer, optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the report with the measurements made while training."""
        self._run.timer.stop()
        if self._run.survival is not None:
            self._end_survival(trainer, self._run.survival)
        if self._trained is None or not self._run.is_tuned:
            return
        loading = self._run.timer.loading
        noise = next((c for c in trainer.callbacks if isinstance(c, NoiseScale)), None)
        measured = {
            "loading": loading,
            "noise": noise.reading if noise else None,
            "survived": self.survived,
        }
        self.reports["fit"] = self._trained = self._trained.model_copy(update=measured)
        refresh_report(self._trained, trainer)
        if noise is not None:
            self._show(trainer, "fit", sinks.completed_on_console)
        elif (note := waiting(loading)) and trainer.is_global_zero:
            _log.warning("%s", note)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the batch size of the user's loader."""
        self._undo_run()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the batch size of the user's loader."""
        if self._run.survival is not None:
            self._run.survival.note_half_step(exception)
        self._undo_run()

    def _apply_at_start(self, trainer: Any, module: Any, tuned: Tuned) -> None:
        """Apply a plan before training begins."""
        self._run.before_data.watch(trainer)
        apply(
            tuned.report.plan,
            trainer,
            module,
            self._arguments.batch_arg_name,
            self._rebatched(trainer, tuned),
            self._run.before_optimizers,
        )

    def _survive(self, trainer: Any, module: Any) -> None:
        """Let training go on when memory runs out in it."""
        probe = detect(self._arguments.device, module.device)
        size = getattr(trainer.train_dataloader, "batch_size", None)
        self._run.survival = Survival(trainer, probe, size if isinstance(size, int) else None)
        self._run.replace(self._run.survival.patch())

    def _end_survival(self, trainer: Any, survival: Survival) -> None:
        with current_ranks() as ranks:
            of_ranks = ranks.gather(tuple(survival.events))
        self.survived = tuple(sorted(itertools.chain(*of_ranks), key=lambda event: event.step))
        plan = self._trained.plan if self._trained and self._run.is_tuned else survival.plan
        if (note := survived(self.survived, plan)) and trainer.is_global_zero:
            _log.warning("%s", note)

    def _undo_run(self) -> None:
        self._run.undo()

    def _before_hooks(self, trainer: Any, module: Any) -> None:
        """Tune again before the first epoch if callbacks hold memory already that trials lacked.

        What hooks of the epoch make of optimizers and schedules comes after these are created
        again.
        """
        if trainer.global_step == 0 and trainer.current_epoch not in self._epochs:
            self._compare(trainer, module)

    def _before_epoch(self, trainer: Any, module: Any) -> None:
        """Tune again where the user wants it, or where callbacks hold memory that trials lacked."""
        run, epoch = self._run, trainer.current_epoch
        if run.is_to_compare or epoch in self._epochs:
            self._compare(trainer, module)
            run.is_to_compare, run.steps_before = False, trainer.global_step
        run.before_data.forget()

    def _compare(self, trainer: Any, module: Any) -> None:
        epoch, beside = trainer.current_epoch, self._run.beside
        excess = beside.excess(trainer) if beside is not None else None
        if excess or epoch in self._epochs:
            reason = f"Tuned again at epoch {epoch}, for the effective batch of"
            self._retune(trainer, module, f"{excess} {reason}" if excess else reason)

    def _look_beside(self, trainer: Any) -> None:
        """Warn if callbacks hold memory since the first step that makes training run out of it."""
        if self._trained is None or self._run.beside is None:
            return
        if excess := self._run.beside.excess(trainer):
            self._run.is_to_compare = True
            note = f"{excess} The next epoch is tuned again, if training reaches it."
            _log.warning("%s", note)
            notes = (*self._trained.notes, note)
            update = {"notes": notes}
            self.reports["fit"] = self._trained = self._trained.model_copy(update=update)
            refresh_report(self._trained, trainer)

    def _stay_idle(self, reason: str) -> None:
        if self._only_tunes:
            raise AutobatchError(f"Nothing was tuned: {reason}.")
        _log.info("%s: the batch size is left as it is", reason)

    def _retune(self, trainer: Any, module: Any, reason: str) -> None:
        """Tune again in the middle of training, for the effective batch size it started with."""
        if self._run.first_report is None or self._trained is None:
            return
        target = self._run.first_report.plan.effective_batch_size
        known = PriorPlan(target=target, note=f"{reason} {target:,}.")
        with stopping_together():
            try:
                tuned = tune_training(trainer, module, self._arguments, lambda *_: known, None, ())
            except FixedBatchSizeError as error:
                # A sampler that was made again, and has changed itself since: its plan still holds
                _log.warning("Training continues with its plan. %s", error)
                return
            if tuned.report.plan != self._trained.plan:
                self._run.loaders["train"].undo()
                apply_between_epochs(
                    tuned.report.plan,
                    trainer,
                    module,
                    self._arguments.batch_arg_name,
                    self._rebatched(trainer, tuned),
                    self._run.before_optimizers,
                    self._run.before_data.restore,
                )
        self._continue_with(trainer, tuned)
        log_report(tuned.report, trainer)

    def _continue_with(self, trainer: Any, tuned: Tuned) -> None:
        """Train with a plan that was applied."""
        self._trained = tuned.report
        self._run.beside = tuned.beside
        if self._arguments.repairs:
            self._run.window = LastWindowCorrection(tuned.report.plan.micro_batch_size)
        if tuned.validation_sizes is not None:
            self._resize_validation(trainer, tuned.validation_sizes)
        self.reports["fit"] = tuned.report
        self._show(trainer, "fit", self._sink_for(tuned.report))

    def _resize_validation(self, trainer: Any, sizes: Sequence[LoaderSize]) -> None:
        if "validation" in self._run.loaders:
            self._run.loaders["validation"].undo()
        loop = trainer.fit_loop.epoch_loop.val_loop
        rebatched = self._run.loaders["validation"] = Rebatched(data_source(loop), sizes)
        rebatched.start()
        forget_combined_loader(loop)  # in the middle of training the loop has one

    def _tune_evaluation(self, trainer: Any, stage: Stage) -> None:
        """Tune before validation, testing or prediction asks for its loaders."""
        if trainer.fast_dev_run and not self._only_tunes:
            return
        module, name = trainer.lightning_module, self._arguments.batch_arg_name
        check_attribute(module, name)
        try:
            tuned = tune_evaluation(trainer, module, self._arguments, stage)
        except NoDataError:
            self._stay_idle("there is no data")
            return
        except FixedBatchSizeError as error:
            if self._only_tunes:
                raise
            _log.warning("%s runs its loaders as they are: %s", stage.name, error)
            return
        if self._only_tunes:
            self._end_run(trainer, stage.name, tuned.report)
        source = data_source(stage.loop_of(trainer))
        rebatched = self._run.loaders[stage.name] = Rebatched(source, tuned.sizes)
        rebatched.start()
        if tuned.is_changed:
            self._run.attribute = FormerBatchSize(module, name)
            set_batch_size_attribute(module, name, tuned.sizes[0].batch_size)
        self.reports[stage.name] = tuned.report
        self._show(trainer, stage.name, sinks.console)

    def _rebatched(self, trainer: Any, tuned: Tuned) -> Rebatched:
        """Return the training loaders of a plan; the run undoes them from now on."""
        rebatched = Rebatched(data_source(trainer.fit_loop), tuned.sizes)
        self._run.loaders["train"] = rebatched
        return rebatched

    def _plan_before(self, trainer: Any) -> BatchPlan | None:
        """Return the plan of the previous fit, if the Trainer still has its accumulation."""
        plan = self._trained.plan if self._trained else None
        if plan and plan.accumulate_grad_batches == trainer.accumulate_grad_batches:
            return plan
        return None

    def _end_run(self, trainer: Any, method: str, report: TuningReport) -> None:
        """End the run as Lightning's own tuner does, which leaves the Trainer finished."""
        self.reports[method] = report
        raise Imported.TUNER_EXIT.of(trainer)

    def _sink_for(self, report: TuningReport) -> sinks.Sink:
        """Return the sink of a report: a run that goes on with a known plan has shown it before."""
        checkpoint = self._run.checkpoint
        is_resumed = (
            checkpoint is not None and checkpoint.plan == report.plan and len(report.trials) == 1
        )
        return sinks.resumed_on_console if is_resumed else sinks.console

    def _show(self, trainer: Any, method: str, show: sinks.Sink) -> None:
        if not trainer.is_global_zero:
            return
        report = self.reports[method]
        sinks.log(report)
        if not self._arguments.verbose:
            return
        try:
            show(report)
        except Exception as error:  # standard output may be closed, or its disk full
            level = logging.DEBUG if show is sinks.completed_on_console else logging.WARNING
            _log.log(level, "The report could not be printed: %s", plain(repr(error)))
