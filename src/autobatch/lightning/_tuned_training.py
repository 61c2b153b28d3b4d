"""Training with a plan, from the tuning at its start to the last update of its report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._distributed import stopping_together
from autobatch._plan import BatchPlan
from autobatch._prior_plan import PriorPlan
from autobatch._report.notes import waiting
from autobatch._tune import tune
from autobatch.errors import FixedBatchSizeError
from autobatch.lightning._accumulation import LastWindowCorrection, check_repairable
from autobatch.lightning._apply import Application
from autobatch.lightning._beside import bytes_of_callbacks, excess_of_callbacks
from autobatch.lightning._compat import data_parallel_size, data_source, forget_combined_loader
from autobatch.lightning._hooks import FIT_START
from autobatch.lightning._loggers import log_report, refresh_report
from autobatch.lightning._noise_scale import NoiseScale
from autobatch.lightning._resources import CallbackArguments, Tuned, trial_resources
from autobatch.lightning._resume import DeviceId, KnownPlans, fingerprint_of
from autobatch.lightning._run import Results, Run, before_epochs, show
from autobatch.lightning._subjects import LightningTraining
from autobatch.lightning._trainer_notes import TrainerLimits
from autobatch.lightning._training import TrainingSteps
from autobatch.lightning._tuning_evaluation import with_validation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._loaders.batch_size import LoaderSize
    from autobatch._report import TuningReport
    from autobatch._report.result import Survived
    from autobatch._trials.context import TrialContext

_log = logging.getLogger("autobatch")


@dataclass(eq=False, repr=False)
class TunedTraining:
    """Training of one `fit` with a plan, which is tuned again when callbacks change training."""

    trainer: Any
    module: Any
    arguments: CallbackArguments
    run: Run  # changes to the Trainer, which are undone at its end
    results: Results  # takes the reports
    _target: int = 0  # the effective batch size of the first plan
    # Memory of callbacks in trials, as `Tuned.held_by_callbacks`. Training may exceed it: it is
    # compared before an epoch, and after the first update of that epoch
    _callback_bytes_in_trials: int | None = None
    _compare_at_next_epoch: bool = True
    _compare_after_step: int | None = None  # updates before that one; None: not any more

    @property
    def plan(self) -> BatchPlan:
        return self._report.plan

    def tune(self, last_fit: Tuned | None) -> Tuned:
        """Find a plan, by one trial if a checkpoint, the user or the previous fit has one."""
        known = KnownPlans(
            own=self.arguments.known_plan, checkpoint=self.run.checkpoint, last=last_fit
        )
        self.results.last_fit = self._find_plan(known, self._plan_before(), FIT_START)
        return self.results.last_fit

    def _find_plan(
        self, known_plans: KnownPlans, before: BatchPlan | None, start_hooks: Sequence[str]
    ) -> Tuned:
        """Find a plan, and a validation batch size that fits beside it; restore all state.

        `before` is the plan until now, None for that of loader and Trainer; `start_hooks` are those
        that training has still to call before its first batch.

        Raises:
            AutobatchError: A loader's batch size cannot be changed, or an argument of the Trainer
                excludes the plan.
            DoesNotFitError: No batch size fits.
        """
        trainer, module, arguments = self.trainer, self.module, self.arguments
        if arguments.repairs:
            check_repairable(trainer, module)
        with trial_resources(trainer, module, arguments, None) as resources:
            context, loaders = resources.context, resources.loaders
            if before is None:
                accumulate, ranks = trainer.accumulate_grad_batches, data_parallel_size(trainer)
                before = BatchPlan(loaders.batch_size, accumulate, ranks)
            limits = TrainerLimits(trainer, loaders, before, trainer.global_step)
            workload = TrainingSteps(trainer, resources, start_hooks)
            subject = LightningTraining(workload, trainer, module, arguments, resources, limits)
            settings = arguments.settings.model_copy(update={"dataset_size": loaders.samples})
            context.optimizers.expected = True
            if not module.automatic_optimization:
                # In manual optimization, the module may never step
                context.optimizers.look_at(module)
            fingerprint = fingerprint_of(subject)
            known = known_plans.prior(subject, fingerprint, _device_id(trainer, context), settings)
            planned = known.plan.effective_batch_size if known.plan else None
            workload.target = known.effective_batch_size or planned or settings.target_batch_size
            report = tune(subject, settings, context, arguments.search, known)
            limits.check(report.plan)
            size = report.plan.micro_batch_size
            resources.samples.check_size(size)
            tuned = Tuned(
                report,
                loaders.sized(size),
                fingerprint=fingerprint,
                held_by_callbacks=None if workload.runs_callbacks else bytes_of_callbacks(trainer),
            )
            if not trainer.enable_validation:
                return tuned
            # Validation keeps the size that its hook gives it before the plan is applied
            resources.attribute.restore()
            return with_validation(tuned, subject)

    def begin(self, tuned: Tuned) -> None:
        """Apply the plan before training begins."""
        self.run.before_data.watch(self.trainer)
        self._application(tuned).before_training()
        self._target = tuned.report.plan.effective_batch_size
        self._continue_with(tuned)

    def start(self) -> None:
        """Look at each epoch from now on, and log the report: loggers have directories now."""
        self.run.loaders["train"].check_used(self.trainer.train_dataloader)
        self.run.replace(before_epochs(self.trainer, self._before_hooks, self._before_epoch))
        log_report(self._report, self.trainer)

    def look_after_first_step(self) -> None:
        """Warn if callbacks hold memory since the first step that makes training run out of it."""
        before = self._compare_after_step
        if before is None or self.trainer.global_step <= before:
            return
        self._compare_after_step = None
        if excess := self._excess():
            self._compare_at_next_epoch = True
            note = f"{excess} The next epoch is tuned again, if training reaches it."
            _log.warning("%s", note)
            self._complete_report({"notes": (*self._report.notes, note)})

    def end(self, survived: tuple[Survived, ...]) -> None:
        """Complete the report with the measurements made while training."""
        trainer, loading = self.trainer, self.run.timer.loading
        noise = next((c for c in trainer.callbacks if isinstance(c, NoiseScale)), None)
        reading = noise.reading if noise else None
        self._complete_report({"loading": loading, "noise": reading, "survived": survived})
        if noise is not None:
            self._show(sinks.completed_on_console)
        elif (note := waiting(loading)) and trainer.is_global_zero:
            _log.warning("%s", note)

    def _application(self, tuned: Tuned) -> Application:
        trainer, plan, name = self.trainer, tuned.report.plan, self.arguments.batch_arg_name
        rebatched = self.run.rebatch("train", data_source(trainer.fit_loop), tuned.sizes)
        before = self.run.before_optimizers
        return Application(plan, trainer, self.module, name, rebatched, before)

    def _plan_before(self) -> BatchPlan | None:
        """Return the plan of the previous fit, if the Trainer still has its accumulation."""
        plan = self.results.trained.plan if self.results.trained else None
        if plan and plan.accumulate_grad_batches == self.trainer.accumulate_grad_batches:
            return plan
        return None

    def _before_hooks(self) -> None:
        """Tune again before the first epoch if callbacks hold memory already that trials lacked.

        Before the hooks of the epoch, which may change optimizers and schedules: these are created
        again here.
        """
        if self.trainer.global_step == 0 and not self._is_wanted:
            self._retune_if_needed()

    def _before_epoch(self) -> None:
        """Tune again where the user wants it, or where callbacks hold memory that trials lacked."""
        if self._compare_at_next_epoch or self._is_wanted:
            self._retune_if_needed()
            self._compare_at_next_epoch = False
            self._compare_after_step = self.trainer.global_step
        self.run.before_data.forget()

    @property
    def _is_wanted(self) -> bool:
        return self.trainer.current_epoch in self.arguments.retune_at_epochs

    def _retune_if_needed(self) -> None:
        excess = self._excess()
        if excess or self._is_wanted:
            epoch = self.trainer.current_epoch
            reason = f"Tuned again at epoch {epoch}, for the effective batch of"
            self._retune(f"{excess} {reason}" if excess else reason)

    def _excess(self) -> str | None:
        if self._callback_bytes_in_trials is None:
            return None
        return excess_of_callbacks(self.trainer, self._callback_bytes_in_trials, self._report)

    def _retune(self, reason: str) -> None:
        """Tune again in the middle of training, for the effective batch size it started with."""
        prior = PriorPlan(effective_batch_size=self._target, note=f"{reason} {self._target:,}.")
        known = KnownPlans(in_training=prior)
        with stopping_together():
            try:
                tuned = self._find_plan(known, None, ())
            except FixedBatchSizeError as error:
                # A sampler that was made again, and has changed itself since: its plan still holds
                _log.warning("Training continues with its plan. %s", error)
                return
            if tuned.report.plan != self.plan:
                self._application(tuned).between_epochs(self.run.before_data)
        self._continue_with(tuned)
        log_report(tuned.report, self.trainer)

    def _continue_with(self, tuned: Tuned) -> None:
        """Train with a plan that was applied."""
        self.results.train_with(tuned.report)
        self._callback_bytes_in_trials = tuned.held_by_callbacks
        if self.arguments.repairs:
            self.run.window = LastWindowCorrection(tuned.report.plan.micro_batch_size)
        if tuned.validation_sizes is not None:
            self._resize_validation(tuned.validation_sizes)
        self._show(self._sink_for(tuned.report))

    def _resize_validation(self, sizes: Sequence[LoaderSize]) -> None:
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        self.run.rebatch("validation", data_source(loop), sizes).start()
        forget_combined_loader(loop)  # in the middle of training the loop has one

    def _sink_for(self, report: TuningReport) -> sinks.Sink:
        """Return the sink of a report: a run that goes on with a known plan has shown it before."""
        checkpoint = self.run.checkpoint
        is_resumed = (
            checkpoint is not None and checkpoint.plan == report.plan and len(report.trials) == 1
        )
        return sinks.resumed_on_console if is_resumed else sinks.console

    @property
    def _report(self) -> TuningReport:
        return self.results.reports["fit"]

    def _complete_report(self, values: dict[str, Any]) -> None:
        self.results.train_with(self._report.model_copy(update=values))
        refresh_report(self._report, self.trainer)

    def _show(self, sink: sinks.Sink) -> None:
        show(self._report, self.trainer, sink, verbose=self.arguments.verbose)


def _device_id(trainer: Any, context: TrialContext) -> DeviceId:
    """Return the device of rank 0: all ranks have to make the same choice."""
    total = context.probe.read().total
    here = DeviceId.of(context.probe.name, total, data_parallel_size(trainer))
    return context.ranks.gather(here)[0]
