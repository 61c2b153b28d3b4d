"""The AutoBatch callback."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._distributed import stopping_together
from autobatch._estimate.device import target_gpu
from autobatch._loaders.samples import NoDataError, checked_worst_case
from autobatch._prior_plan import known_plan
from autobatch._settings import Settings, checked_function, checked_switch, checked_verbose
from autobatch._tune import checked_search
from autobatch._undo import Undo
from autobatch.errors import AutobatchError, FixedBatchSizeError
from autobatch.lightning._attribute import BatchSizeAttribute, check_attribute, checked_name
from autobatch.lightning._checks import (
    check,
    check_alone,
    check_latency,
    check_launcher,
    check_lightning,
    check_survival,
    check_trainer,
    checked_epochs,
    checked_keep,
    checked_survival,
    why_idle,
)
from autobatch.lightning._compat import data_source, load_late_checkpoint
from autobatch.lightning._estimating import estimate_training
from autobatch.lightning._evaluation import STAGES, before_data, loaders_for
from autobatch.lightning._package import Callback, Imported
from autobatch.lightning._resources import CallbackArguments
from autobatch.lightning._resume import Checkpoint, kept_plan
from autobatch.lightning._run import Results, Run, begin_and_restore, show
from autobatch.lightning._tuned_training import TunedTraining
from autobatch.lightning._tuning_evaluation import tune_evaluation
from autobatch.testing import named_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch.utils.data import DataLoader

    from autobatch._estimate import Estimate
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._report.result import Survived
    from autobatch._search import Search
    from autobatch.lightning._evaluation import Stage


_log = logging.getLogger("autobatch")


class AutoBatch(Callback):  # type: ignore[misc]  # a class made at run time
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
            search. "keep", for `on_out_of_memory="split"` alone, tunes nothing: batch size and
            accumulation stay as they are.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        timing_seconds: Further seconds for timing sizes, which ends as soon as the choice is
            settled. 0: no timing; the largest sizes are taken. None: at most 20, a tenth of the
            training that the Trainer plans, and half the time of the search if speed does not
            decide (`prefer="largest"` without a target).
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
        self._results = Results()
        self.reports = self._results.reports
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
        self._arguments = CallbackArguments(
            settings=settings,
            known_plan=known_plan(None if keeps else plan, settings),
            search=checked_search(search),
            device=named_device(device),
            worst_case=checked_worst_case(worst_case),
            repairs=checked_switch(
                "repair_last_window",
                repair_last_window,
                "True to weight the last update of an epoch by its samples, or False to leave it "
                "as Lightning makes it",
            ),
            batch_arg_name=checked_name(batch_arg_name),
            set_batch_size=checked_function(
                "set_batch_size", set_batch_size, "a function of a DataLoader and a batch size"
            ),
            retune_at_epochs=checked_epochs(retune_at_epochs),
            evaluates=checked_switch(
                "evaluate",
                evaluate,
                "True to tune validate, test and predict, or False to leave them as they are",
            )
            or latency_limit is not None,
            verbose=checked_verbose(verbose),
            survives=survives,
            keeps=keeps,
        )
        self._only_tunes = False
        self._estimates: Callable[..., Estimate] | None = None  # instead of tuning
        self._estimated: Estimate | None = None
        self._run = Run()
        self._training: TunedTraining | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: without that of a run, which belongs to one Trainer."""
        return {**vars(self), "_run": Run(), "_training": None}

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
        loaders = loaders_for(method, train_dataloaders, val_dataloaders, dataloaders)
        self.reports.pop(method, None)
        self._begin(trainer, method, model, loaders, datamodule)
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
        with Undo() as undo, undo:
            undo.add(partial(setattr, self, "_estimates", None))
            self._estimated = None
            self._estimates = partial(
                estimate_training, target=target_gpu(device), calibrate=calibrate
            )
            self._begin(trainer, "fit", model, (train_dataloaders, None), datamodule)
        if self._estimated is None:
            raise AutobatchError("Nothing was estimated: fit ended before its first batch.")
        return self._estimated

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start a new run, and let an evaluation be tuned when its loop sets up its data.

        Move to the front, so that other callbacks see the tuned loader and optimizers.
        """
        # Without the checkpoint of the previous run: LearningRateFinder loads one that it saved
        # itself
        self._run = Run()
        if stage != "fit" and not (self._arguments.evaluates or self._only_tunes):
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
        """Note that the run resumes, and if its checkpoint was written between epochs."""
        self._run.checkpoint = Checkpoint.of(checkpoint, max_steps=trainer.max_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan of a checkpoint, with which a resumed run continues after one trial."""
        if state_dict and self._run.checkpoint is not None:
            self._run.checkpoint = self._run.checkpoint.with_state(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the run can be tuned, tune it, and make the Trainer train with the plan."""
        if self._arguments.survives:
            check_survival(trainer, pl_module)
        reason = why_idle(trainer)
        if reason or self._arguments.keeps:
            self._stay_idle(reason or 'plan="keep" tunes nothing')
            return
        if late := load_late_checkpoint(trainer):
            self.on_load_checkpoint(trainer, pl_module, late)
            self.load_state_dict((late.get("callbacks") or {}).get(self.state_key, {}))
        check(trainer, pl_module, self._run.checkpoint)
        if self._run.checkpoint is not None:
            arguments = self._arguments
            self._run.checkpoint.check_effective(arguments.settings, arguments.known_plan)
        check_attribute(pl_module, self._arguments.batch_arg_name)
        training = TunedTraining(trainer, pl_module, self._arguments, self._run, self._results)
        try:
            with stopping_together():
                if self._estimates is not None:
                    self._estimated = self._estimates(trainer, pl_module, self._arguments)
                elif self._only_tunes:
                    self.reports["fit"] = training.tune(None).report
                else:
                    training.begin(training.tune(self._results.last_fit))
                    self._training = training
        except NoDataError:
            self._stay_idle("there is nothing to train on")
            return
        self._end_if_only_tuning(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the report beside the logs, now that the loggers have created their directory."""
        if self._arguments.keeps:
            kept = kept_plan(trainer)
            if self._run.checkpoint is not None:
                self._run.checkpoint.check_kept(kept)
            self._results.kept = kept
        if self._arguments.survives:
            self._run.survive(trainer, self._arguments.device)
        if self._training is not None:
            self._training.start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count samples from here; waiting for the first batch of an epoch does not count."""
        self._run.timer.interrupt()
        if self._run.window is not None:
            self._run.window.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the time and the samples of a batch, and look at memory after the first step."""
        self._run.timer.start_batch(trainer)
        if self._run.window is not None:
            self._run.window.start_batch(trainer, batch, batch_idx)
        if self._training is not None:
            self._training.look_after_first_step()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Weight the gradients accumulated before the last micro-batch of an epoch."""
        if self._run.window is not None:
            self._run.window.before_backward(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Weight the gradients of the last window of an epoch."""
        if self._run.window is not None:
            self._run.window.before_step(trainer, optimizer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Do not count validation as waiting for the loader."""
        self._run.timer.interrupt()
        if self._arguments.survives:
            self._run.begin_evaluation(trainer, self._arguments.device)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the steps of later trials alone."""
        self._run.end_evaluation()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Let testing go on when memory runs out in it."""
        if self._arguments.survives:
            self._run.begin_evaluation(trainer, self._arguments.device)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Do not count a checkpoint as waiting for the loader."""
        self._run.timer.interrupt()

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and its device for the checkpoint, in plain numbers and text."""
        if self._results.kept is not None:
            return Checkpoint.state_of_kept(self._results.kept)
        trained = self._results.trained
        return {} if trained is None else Checkpoint.state_of(trained)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the report with the measurements made while training."""
        self._run.timer.stop()
        if self._run.survival is not None:
            plan = self._training.plan if self._training is not None else None
            self.survived = self._run.survival.end(plan)
        if self._training is not None:
            self._training.end(self.survived)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the batch size of the user's loader."""
        self._undo_run()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the batch size of the user's loader, and note an optimizer step left halfway."""
        if self._run.survival is not None:
            self._run.survival.note_half_step(exception)
        self._undo_run()

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
        self.reports[stage.name] = tuned.report
        self._end_if_only_tuning(trainer)
        self._run.rebatch(stage.name, data_source(stage.loop_of(trainer)), tuned.sizes).start()
        if tuned.is_changed:
            attribute = BatchSizeAttribute(module, name)
            self._run.changes.add(attribute.restore)
            attribute.set(tuned.sizes[0].batch_size)
        show(tuned.report, trainer, sinks.console, verbose=self._arguments.verbose)

    def _begin(
        self, trainer: Any, method: str, model: Any, loaders: Sequence[Any], datamodule: Any
    ) -> None:
        """Run a method of the Trainer, which ends when it is tuned; restore all state."""
        check_launcher(trainer)
        with Undo() as undo, undo:
            undo.add(partial(setattr, self, "_only_tunes", False))
            self._only_tunes = True
            begin_and_restore(self, self._undo_run, trainer, method, model, loaders, datamodule)

    def _end_if_only_tuning(self, trainer: Any) -> None:
        """End the run as Lightning's own tuner does, which leaves the Trainer finished."""
        if self._only_tunes:
            raise Imported.TUNER_EXIT.of(trainer)

    def _stay_idle(self, reason: str) -> None:
        if self._only_tunes:
            raise AutobatchError(f"Nothing was tuned: {reason}.")
        _log.info("%s: the batch size is left as it is", reason)

    def _undo_run(self) -> None:
        self._run.undo()
        self._training = None
