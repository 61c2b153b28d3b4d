"""One tuning run in a Trainer."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from autobatch import sinks
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._plan import BatchPlan
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import known_plan, tune
from autobatch.errors import AutobatchError, DoesNotFitError, FixedBatchSizeError
from autobatch.lightning._accumulation import SplittingTest, batches_trained, check_repairable
from autobatch.lightning._attribute import (
    batch_size_restored,
    has_batch_size_attribute,
    set_batch_size_attribute,
)
from autobatch.lightning._beside import (
    BesideTraining,
    bytes_of_callbacks,
    tensors_of_callbacks,
)
from autobatch.lightning._compat import data_source
from autobatch.lightning._dataloaders import Loaders
from autobatch.lightning._evaluation import VALIDATION, EvaluationSteps
from autobatch.lightning._hooks import users_callbacks
from autobatch.lightning._isolation import on_new_loops, without_collectives
from autobatch.lightning._resume import DeviceId, PriorPlan, fingerprint_of
from autobatch.lightning._shown import show_validation
from autobatch.lightning._subjects import LightningEvaluation, LightningTraining
from autobatch.lightning._trainer_notes import TrainerLimits, checked_copy_bytes
from autobatch.lightning._training import TrainingSteps
from autobatch.lightning._trial_data import NoDataError, Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch._memory import MemoryProbe
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch.lightning._batch_size import LoaderSize, SetBatchSize
    from autobatch.lightning._evaluation import Stage


# (subject, fingerprint, device, settings) -> the plan that is known before a search
KnownAt: TypeAlias = "Callable[[LightningTraining, str, DeviceId, Settings], PriorPlan]"


@dataclass(frozen=True, slots=True)
class CallbackArguments:
    """Arguments of a callback.

    Args:
        settings: Validated arguments.
        search: Strategy that proposes batch sizes.
        device: The device whose memory is read; None: the device of the module.
        worst_case: Makes the largest batch of a size; None to scan the data set for it.
        repairs: Whether the last accumulation window of an epoch is corrected.
        batch_arg_name: Name of the batch size in the module or its datamodule.
        set_batch_size: Sets the batch size of a loader; None for the default way.
        verbose: Whether progress and report are printed.
    """

    settings: Settings
    search: Search
    device: str | MemoryProbe | None
    worst_case: Callable[[int], Any] | None
    repairs: bool
    batch_arg_name: str
    set_batch_size: SetBatchSize | None
    verbose: bool


@dataclass(frozen=True, slots=True)
class Tuned:
    """Result of a tuning run.

    Args:
        report: The report.
        sizes: Of each loader.
        own_sizes: The ones they had.
        fingerprint: Of the model and the data, in training.
        validation_sizes: Of each validation loader; None if they stay as they are.
        held_by_callbacks: Bytes on the device that callbacks held in trials; None if their hooks
            ran in trials, so that peaks count all that they make.
    """

    report: TuningReport
    sizes: tuple[LoaderSize, ...]
    own_sizes: tuple[LoaderSize, ...]
    fingerprint: str = ""
    validation_sizes: tuple[LoaderSize, ...] | None = None
    held_by_callbacks: int | None = None

    @property
    def beside(self) -> BesideTraining | None:
        """Memory of callbacks that training is compared with."""
        plan = self.report.plan
        peaks = [t.peak for t in self.report.trials if t.batch_size == plan.micro_batch_size]
        if self.held_by_callbacks is None or not peaks or peaks[-1] is None:
            return None
        return BesideTraining(self.held_by_callbacks, peaks[-1], self.report.budget)

    @property
    def is_changed(self) -> bool:
        """True if a loader gets another batch size."""
        return self.sizes != self.own_sizes


def tune_training(
    trainer: Any,
    module: Any,
    arguments: CallbackArguments,
    known_at: KnownAt,
    trained: BatchPlan | None,
    start_hooks: Sequence[str],
) -> Tuned:
    """Find a plan for training, and a validation batch size that fits beside it; restore all state.

    Args:
        trainer: The Trainer.
        module: The module.
        arguments: Arguments of the callback.
        known_at: Gives the plan that is known before a search.
        trained: The plan that was trained with until now; None for that of loader and Trainer.
        start_hooks: Hooks of the module that training has still to call before its first batch.

    Raises:
        AutobatchError: A loader's batch size cannot be changed, or an argument of the Trainer
            excludes the plan.
        DoesNotFitError: No batch size fits.
    """
    if arguments.repairs:
        check_repairable(trainer, module)
    validates = trainer.enable_validation
    with (
        batch_size_restored(module, arguments.batch_arg_name) as former,
        trial_resources(trainer, module, arguments, None) as resources,
        ExitStack() as ends,
    ):
        context, loaders = resources.context, resources.loaders
        accumulate = trainer.accumulate_grad_batches
        limits = TrainerLimits(
            trainer,
            trainer.max_steps,
            trainer.max_epochs,
            validates=validates,
            batches=loaders.batches,
            samples=partial(_samples_trained, trainer, loaders),
            before=trained or BatchPlan(loaders.batch_size, accumulate, trainer.world_size),
        )
        samples = ends.enter_context(
            Samples(loaders, context.snapshot, module.device, arguments.worst_case)
        )
        samples.check()
        set_attribute = partial(set_batch_size_attribute, module, arguments.batch_arg_name)
        workload = TrainingSteps(
            trainer, loaders, samples, set_attribute, start_hooks, context.snapshot
        )
        splits = SplittingTest(
            trainer,
            module,
            samples,
            workload,
            context.probe,
            arguments.settings.memory_limit,
            context.snapshot,
            context.ranks,
        )
        subject = LightningTraining(
            workload=workload,
            trainer=trainer,
            module=module,
            batch_arg_name=arguments.batch_arg_name,
            repairs_last_window=arguments.repairs,
            loaders=loaders,
            samples=samples,
            limits=limits,
            splits=splits,
            context=context,
            accumulate=accumulate,
            copied_bytes=resources.copied_bytes,
        )
        settings = arguments.settings.model_copy(update={"dataset_size": loaders.samples})
        context.optimizers.expected = True
        if not module.automatic_optimization:
            # In manual optimization, the module may never step
            context.optimizers.look_at(module)
        fingerprint = fingerprint_of(subject)
        known = known_at(subject, fingerprint, _device_id(trainer, context), settings)
        planned = known.plan.effective_batch_size if known.plan else None
        workload.target = known.target or planned or settings.target_batch_size
        report = verify_or_search(known, subject, settings, context, arguments.search)
        limits.check(report.plan)
        samples.check_size(report.plan.micro_batch_size)
        tuned = Tuned(
            report,
            loaders.sized(report.plan.micro_batch_size),
            loaders.sized(loaders.batch_size),
            fingerprint,
            held_by_callbacks=None if workload.runs_callbacks else bytes_of_callbacks(trainer),
        )
        if not validates:
            return tuned
        # Validation keeps the size that its hook gives it before the plan is applied
        former.restore()
        return _with_validation(tuned, subject, arguments)


def tune_evaluation(trainer: Any, module: Any, arguments: CallbackArguments, stage: Stage) -> Tuned:
    """Find the largest batch for validation, testing or prediction; restore all state.

    With a target the run is about training: the loaders keep their batch size if it fits.

    Raises:
        AutobatchError: A loader's batch size cannot be changed.
        DoesNotFitError: No batch size fits.
    """
    name = arguments.batch_arg_name
    with (
        batch_size_restored(module, name) as former,
        trial_resources(trainer, module, arguments, stage) as resources,
        ExitStack() as ends,
    ):
        context, loaders = resources.context, resources.loaders
        settings = _without_target(arguments.settings, loaders.samples)
        samples = ends.enter_context(
            Samples(loaders, context.snapshot, module.device, arguments.worst_case)
        )
        samples.check()
        own_sizes = loaders.sized(loaders.batch_size)
        steps = EvaluationSteps(trainer, loaders, samples, stage, None, context.snapshot)

        def evaluate(batch_size: int, accumulate: int) -> Iterator[None]:
            former.restore()
            if batch_size != loaders.largest_batch:
                set_batch_size_attribute(module, name, batch_size)
            yield from steps(batch_size, accumulate)

        subject = LightningEvaluation(
            evaluate,
            trainer,
            module,
            stage,
            settings,
            loaders,
            samples,
            loaders.batch_size,
        )
        if arguments.settings.target_batch_size is not None:
            report = _own_or_smaller(subject, context, arguments.search)
            return Tuned(report, _own_or_smaller_sizes(loaders, report), own_sizes)
        report = tune(subject, settings, context, arguments.search, known=None)
        samples.check_size(report.plan.micro_batch_size)
        return Tuned(report, loaders.sized(report.plan.micro_batch_size), own_sizes)


@dataclass(frozen=True, slots=True)
class TrialResources:
    """Resources of the trials in a Trainer.

    Args:
        context: Of the trials of any workload.
        loaders: The loaders of training, or of a stage.
        copied_bytes: Bytes of the copy of all state that is kept on the host.
    """

    context: TrialContext
    loaders: Loaders
    copied_bytes: int


@contextmanager
def trial_resources(
    trainer: Any, module: Any, arguments: CallbackArguments, stage: Stage | None
) -> Iterator[TrialResources]:
    """Capture all state that trials may change, and isolate the Trainer; restore it at the end."""
    probe = detect(arguments.device, module.device)
    began = probe.clock()
    with (
        current_ranks() as ranks,
        ranks.abort_together(),
        without_collectives(trainer),
        Snapshot() as before_hooks,
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        sinks.progress(verbose=arguments.verbose and ranks.rank == 0) as shown,
        on_new_loops(trainer),
    ):
        shown.begin("reading batches", None)
        # Hooks that make the loaders may change the module and the datamodule, which every trial
        # has to see
        before_hooks.capture_light(module, trainer.datamodule)
        loaders = _asked_for(trainer, arguments, stage)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scalers = [] if scaler is None else [scaler]
        captured = (module, *trainer.optimizers, *schedulers, *scalers)
        copied_bytes, *_ = ranks.gather(checked_copy_bytes(captured, trainer.num_devices))
        snapshot.capture(*captured)
        # Callbacks are silent, but a step may change their attributes
        snapshot.capture_light(trainer.datamodule, *users_callbacks(trainer))
        context = TrialContext(
            probe=probe,
            began=began,
            budget=MemoryBudget(probe, arguments.settings.memory_limit),
            snapshot=snapshot,
            optimizers=optimizers,
            on_first_use=nullcontext,  # the module and its optimizers are captured already
            ranks=ranks,
            progress=shown,
        )
        for tensors in tensors_of_callbacks(trainer).values():
            probe.attach(*tensors)
        yield TrialResources(context, loaders, copied_bytes)


def _asked_for(trainer: Any, arguments: CallbackArguments, stage: Stage | None) -> Loaders:
    """Return the loaders of a stage, or of training; validation shows its own then."""
    if stage is not None:
        return Loaders(trainer, data_source(stage.loop_of(trainer)), mode="sequential")
    source, setter = data_source(trainer.fit_loop), arguments.set_batch_size
    loaders = Loaders(trainer, source, mode="max_size_cycle", setter=setter)
    show_validation(trainer)
    return loaders


def _device_id(trainer: Any, context: TrialContext) -> DeviceId:
    """Return the device of rank 0: all ranks have to make the same choice."""
    total = context.probe.read().total
    here = DeviceId.of(context.probe.name, total, trainer.world_size)
    return context.ranks.gather(here)[0]


def verify_or_search(
    known: PriorPlan,
    subject: LightningTraining,
    settings: Settings,
    context: TrialContext,
    search: Search,
) -> TuningReport:
    """Return the report on a known plan if one trial verifies it, or else on a search."""
    note = known.note
    if note is None:  # the user's own
        known_plan(known.plan, settings, world_size=context.ranks.world_size)
    if known.plan is not None:
        noted = replace(subject, first_note=note)
        try:
            return tune(noted, settings, context, search, known=known.plan)
        except DoesNotFitError as error:
            if known.refusal is not None:
                raise AutobatchError(known.refusal) from error
            if note is None:
                raise
            note = (
                f"Searched again, since a micro-batch of {known.plan.micro_batch_size:,} does not "
                "fit any more."
            )
    if known.target is not None:
        settings = settings.model_copy(update={"target_batch_size": known.target})
    noted = replace(subject, first_note=note)
    return tune(noted, settings, context, search, known=None)


def _with_validation(
    tuned: Tuned, training: LightningTraining, arguments: CallbackArguments
) -> Tuned:
    """Return the result with the validation batch size that fits beside the state of training."""
    trainer, context = training.trainer, training.context
    source = data_source(trainer.fit_loop.epoch_loop.val_loop)
    try:
        loaders = Loaders(trainer, source, mode="sequential")
    except FixedBatchSizeError as error:
        return replace(tuned, report=_noted(tuned.report, f"Validation was not tried: {error}"))
    plan = tuned.report.plan
    context.progress.begin_part("validation")
    train = partial(training.workload, plan.micro_batch_size, plan.trial_accumulation)
    try:
        with Samples(loaders, context.snapshot, training.module.device) as samples:
            samples.check()
            subject = LightningEvaluation(
                EvaluationSteps(trainer, loaders, samples, VALIDATION, train, context.snapshot),
                trainer,
                training.module,
                VALIDATION,
                arguments.settings.model_copy(update={"timing_seconds": 0.0, "prefer": "largest"}),
                loaders,
                samples,
                loaders.batch_size,
            )
            found = _own_or_smaller(subject, context, arguments.search)
    except NoDataError:
        return tuned
    except FixedBatchSizeError as error:
        return replace(tuned, report=_noted(tuned.report, f"Validation was not tried: {error}"))
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"Training fits, but validation does not beside it. {error}"
        ) from error
    size, own = found.plan.micro_batch_size, loaders.largest_batch
    seconds, before = context.seconds(), tuned.report.search_seconds
    report = tuned.report.model_copy(
        update={
            "validation_batch_size": size,
            "search_seconds": seconds,
            "validation_seconds": seconds - before,
        }
    )
    if size != own:
        report = _noted(
            report,
            f"Validation runs batches of {size:,} instead of {own:,}: more do not fit beside "
            "training.",
        )
    elif not has_batch_size_attribute(training.module, arguments.batch_arg_name):
        return replace(tuned, report=report)
    sizes = _own_or_smaller_sizes(loaders, found)
    return replace(tuned, report=report, validation_sizes=sizes)


def _own_or_smaller(
    subject: LightningEvaluation, context: TrialContext, search: Search
) -> TuningReport:
    """Return the report on the loaders' own size if one trial shows that it fits, or else below."""
    own = subject.loaders.largest_batch
    settings = subject.settings.model_copy(
        update={"target_batch_size": None, "max_micro_batch_size": None, "dataset_size": None}
    )
    plan = BatchPlan(own, world_size=context.ranks.world_size)
    subject = replace(subject, settings=settings)
    try:
        return tune(subject, settings, context, search, known=plan)
    except DoesNotFitError:
        if own == 1:
            raise
    smaller = settings.model_copy(update={"max_micro_batch_size": own - 1})
    below = replace(subject, settings=smaller, start_batch_size=max(1, own // 2))
    return tune(below, smaller, context, search, known=None)


def _own_or_smaller_sizes(loaders: Loaders, report: TuningReport) -> tuple[LoaderSize, ...]:
    size = report.plan.micro_batch_size
    return loaders.sized(loaders.batch_size if size == loaders.largest_batch else size)


def _without_target(settings: Settings, dataset_size: int | None) -> Settings:
    return settings.model_copy(update={"target_batch_size": None, "dataset_size": dataset_size})


def _noted(report: TuningReport, note: str) -> TuningReport:
    return report.model_copy(update={"notes": (*report.notes, note)})


def _samples_trained(trainer: Any, loaders: Loaders, plan: BatchPlan) -> int | None:
    """Return the samples of an epoch under `drop_last` and `limit_train_batches`."""
    batches = batches_trained(trainer, loaders, plan.micro_batch_size)
    if batches is None:
        return loaders.samples
    return loaders.samples_in(batches, plan.micro_batch_size) or None
