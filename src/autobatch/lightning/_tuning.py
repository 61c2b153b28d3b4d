"""One tuning run in a Trainer."""

from __future__ import annotations

import importlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from autobatch import _settings, sinks
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._plan import BatchPlan
from autobatch._report.accumulation_notes import never_stepped
from autobatch._report.tradeoff import common_rule
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import known_plan, tune, versions
from autobatch.errors import AutobatchError, DoesNotFitError, FixedBatchSizeError
from autobatch.lightning._accumulation import (
    SplittingTest,
    batches_trained,
    check_repairable,
    last_samples,
    update_notes,
)
from autobatch.lightning._apply import is_named, name_batch_size
from autobatch.lightning._compat import data_source, package_of
from autobatch.lightning._dataloaders import Loaders
from autobatch.lightning._isolation import apart, scratch
from autobatch.lightning._resume import DeviceId, PriorPlan
from autobatch.lightning._trainer_notes import (
    TrainerLimits,
    ahead,
    copied,
    room_for_copy,
    schedules,
)
from autobatch.lightning._trial_data import Samples
from autobatch.lightning._workloads import VALIDATION, EvaluationSteps, TrainingSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch._memory import MemoryProbe
    from autobatch._report import Task, TuningReport
    from autobatch._report.result import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch._subject import Subject
    from autobatch._trials.time_limit import TimeLimit
    from autobatch._trials.workload import Workload
    from autobatch.lightning._batch_size import SetBatchSize
    from autobatch.lightning._workloads import Stage


# (subject, device, settings) -> the plan that is known before a search
KnownAt: TypeAlias = "Callable[[Subject, DeviceId, Settings], PriorPlan]"


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
    """

    settings: Settings
    search: Search
    device: str | MemoryProbe | None
    worst_case: Callable[[int], Any] | None
    repairs: bool
    batch_arg_name: str
    set_batch_size: SetBatchSize | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """Result of a tuning run.

    Args:
        report: The report.
        batch_sizes: Batch size of each loader.
        validation_sizes: Batch size of each validation loader; None if they stay as they are.
    """

    report: TuningReport
    batch_sizes: tuple[int, ...]
    validation_sizes: tuple[int, ...] | None = None


def tune_training(
    trainer: Any,
    module: Any,
    arguments: CallbackArguments,
    known_at: KnownAt,
    trained: BatchPlan | None,
) -> Tuned:
    """Find a plan for training, and a validation batch size that fits beside it; restore all state.

    `trained` is the plan that was trained with until now; None for that of loader and Trainer.

    Raises:
        AutobatchError: A loader's batch size cannot be changed, or an argument of the Trainer
            excludes the plan.
        DoesNotFitError: No batch size fits.
    """
    if arguments.repairs:
        check_repairable(trainer, module)
    # Read now: scratch loops, which replace the Trainer's own while trials run, have none of these
    validates = trainer.enable_validation
    validation = data_source(trainer.fit_loop.epoch_loop.val_loop)
    max_steps = trainer.max_steps
    with trial_context(trainer, module, arguments) as (context, copied_bytes):
        loaders = Loaders(
            trainer,
            data_source(trainer.fit_loop),
            mode="max_size_cycle",
            setter=arguments.set_batch_size,
        )
        accumulate = trainer.accumulate_grad_batches
        limits = TrainerLimits(
            trainer,
            max_steps,
            validates=validates,
            batches=loaders.batches,
            samples=partial(_samples_trained, trainer, loaders),
            before=trained or BatchPlan(loaders.batch_size, accumulate, trainer.world_size),
        )
        samples = Samples(loaders, context.snapshot, arguments.worst_case)
        set_name = partial(name_batch_size, module, arguments.batch_arg_name)
        workload = TrainingSteps(trainer, samples, set_name)
        splits = SplittingTest(
            trainer,
            module,
            samples,
            workload,
            set_name,
            context.probe,
            arguments.settings.memory_limit,
            context.snapshot,
            context.ranks,
        )
        subject = LightningTraining(
            workload=workload,
            trainer=trainer,
            module=module,
            arguments=arguments,
            loaders=loaders,
            samples=samples,
            limits=limits,
            splits=splits,
            context=context,
            accumulate=accumulate,
            copied_bytes=copied_bytes,
        )
        settings = arguments.settings.model_copy(update={"dataset_size": loaders.samples})
        context.optimizers.expected = True
        if not module.automatic_optimization:
            # Lightning steps in automatic optimization; a user may forget to
            context.optimizers.look_at(module)
        known = known_at(subject, _device_id(trainer, context), settings)
        report = verify_or_search(known, subject, settings, context, arguments.search)
        limits.check(report.plan)
        tuned = Tuned(report, loaders.sizes_at(report.plan.micro_batch_size))
        if not validates:
            return tuned
        # A hook may make validation batches of the size in the named attribute
        set_name(report.plan.micro_batch_size)
        return _with_validation(tuned, subject, validation)


def tune_evaluation(trainer: Any, module: Any, arguments: CallbackArguments, stage: Stage) -> Tuned:
    """Find the largest batch for validation, testing or prediction; restore all state.

    With a target the run is about training: the loaders keep their batch size if it fits.

    Raises:
        AutobatchError: A loader's batch size cannot be changed.
        DoesNotFitError: No batch size fits.
    """
    with trial_context(trainer, module, arguments) as (context, _):
        loaders = Loaders(trainer, data_source(stage.loop_of(trainer)), mode="sequential")
        settings = _without_target(arguments.settings, loaders.samples)
        samples = Samples(loaders, context.snapshot, arguments.worst_case)
        subject = LightningEvaluation(
            EvaluationSteps(trainer, samples, stage, None),
            trainer,
            module,
            stage,
            settings,
            loaders,
            samples,
            loaders.batch_size,
        )
        curve_seconds = _settings.DEFAULTS.curve_seconds
        if arguments.settings.target_batch_size is not None:
            report = _own_or_smaller(subject, context, arguments.search, curve_seconds)
            return Tuned(report, _own_or_smaller_sizes(loaders, report))
        report = tune(
            subject, settings, context, arguments.search, known=None, curve_seconds=curve_seconds
        )
        return Tuned(report, loaders.sizes_at(report.plan.micro_batch_size))


@dataclass(frozen=True, slots=True)
class LightningTraining:
    """A Lightning fit as the subject of a tuning run.

    Args:
        workload: Runs training steps.
        trainer: The Trainer, on scratch loops.
        module: The module to train.
        arguments: Arguments of the callback.
        loaders: The training loaders.
        samples: Makes the batches.
        limits: Arguments of the Trainer that count batches or steps.
        splits: Tests for a split batch with another gradient.
        context: Resources of the trials.
        accumulate: Accumulation of the Trainer.
        copied_bytes: Bytes of the copy of all state that is kept on the host.
        first_note: A note on the plan that was known before; None if there is none.
    """

    workload: TrainingSteps
    trainer: Any
    module: Any
    arguments: CallbackArguments
    loaders: Loaders
    samples: Samples
    limits: TrainerLimits
    splits: SplittingTest
    context: TrialContext
    accumulate: int
    copied_bytes: int
    first_note: str | None = None

    can_accumulate: ClassVar = True

    @property
    def task(self) -> Task:
        return "train"

    @property
    def name(self) -> str:
        optimizers = " + ".join(_class_name(each) for each in self.trainer.optimizers)
        return f"{_class_name(self.module)} · {optimizers} · {self.trainer.precision}"

    @property
    def environment(self) -> dict[str, str]:
        return _environment(self.trainer)

    @property
    def start_batch_size(self) -> int:
        return self.loaders.batch_size

    @property
    def max_samples_per_update(self) -> int | None:
        """Samples of an epoch: Lightning steps at its end, whatever the accumulation."""
        return self.loaders.samples

    @property
    def previous_plan(self) -> BatchPlan | None:
        """The plan until now; None in manual optimization, where the module defines its updates."""
        return self.limits.before if self.module.automatic_optimization else None

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        return self.limits.samples(plan)

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the samples in the last micro-batch of an epoch, if all ranks have the same.

        Ranks have to choose alike; with a data set of its own on each, their epochs may end
        differently.
        """
        if self.trainer.world_size > 1 and self.loaders.shards[0] == 1:
            return None
        return last_samples(self.trainer, self.loaders, batch_size)

    def learning_rate_rule(self) -> LearningRateRule | None:
        return common_rule(self.trainer.optimizers)

    def largest_samples(self) -> Look | None:
        return self.samples.look

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        return (never_stepped(),) if self.context.optimizers.never_stepped else ()

    def plan_notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:
        has_name = is_named(self.module, self.arguments.batch_arg_name)
        return (
            *((self.first_note,) if self.first_note else ()),
            *self.splits.notes(plan, time_limit),
            *schedules(self.trainer, self.limits.before, plan, is_named=has_name),
            *update_notes(self.trainer, self.loaders, plan, repaired=self.arguments.repairs),
            *self.limits.remarks(plan),
            *self._host_notes(plan),
        )

    def _host_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        devices = self.trainer.num_devices
        sizes = self.loaders.sizes_at(plan.micro_batch_size)
        found = (
            copied(self.copied_bytes, devices),
            *(
                ahead(loader, size, nbytes, devices)
                for loader, size, nbytes in zip(
                    self.loaders.each, sizes, self.samples.bytes_each, strict=False
                )
            ),
        )
        return tuple(note for note in found if note)


@dataclass(frozen=True, slots=True)
class LightningEvaluation:
    """A Lightning validation, test or prediction as the subject of a tuning run.

    Args:
        workload: Runs evaluation steps.
        trainer: The Trainer, on scratch loops.
        module: The module to evaluate.
        stage: The kind of evaluation.
        settings: Validated arguments of the run.
        loaders: The loaders of the stage.
        samples: Makes the batches.
        start_batch_size: The first batch size to try.
    """

    workload: Workload
    trainer: Any
    module: Any
    stage: Stage
    settings: Settings
    loaders: Loaders
    samples: Samples
    start_batch_size: int

    can_accumulate: ClassVar = False
    accumulate: ClassVar = 1
    max_samples_per_update: ClassVar = None
    previous_plan: ClassVar = None

    @property
    def task(self) -> Task:
        return self.stage.name

    @property
    def name(self) -> str:
        return f"{_class_name(self.module)} · {self.stage.name} · {self.trainer.precision}"

    @property
    def environment(self) -> dict[str, str]:
        return _environment(self.trainer)

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        return self.settings.dataset_size

    def last_micro_batch(self, batch_size: int) -> int | None:
        return None

    def learning_rate_rule(self) -> LearningRateRule | None:
        return None

    def largest_samples(self) -> Look | None:
        return self.samples.look

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        return ()

    def plan_notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:
        """Return a note on the meaning of a call with several loaders."""
        if self.settings.latency_limit is None or len(self.loaders.each) == 1:
            return ()
        note = (
            f"A call is one batch of each of the {len(self.loaders.each)} loaders, one after the "
            "other; batch sizes are those of the first."
        )
        return (note,)


@contextmanager
def trial_context(
    trainer: Any, module: Any, arguments: CallbackArguments
) -> Iterator[tuple[TrialContext, int]]:
    """Capture all state that trials may change, and isolate the Trainer; restore it at the end.

    Yields the resources of the trials, and the bytes of the copy that is kept on the host.
    """
    probe = detect(arguments.device, module.device)
    with (
        current_ranks() as ranks,
        ranks.abort_together(),
        apart(trainer),
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        sinks.progress() as shown,
        scratch(trainer),
    ):
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scalers = [] if scaler is None else [scaler]
        captured = (module, *trainer.optimizers, *schedulers, *scalers)
        copied_bytes, *_ = ranks.gather(room_for_copy(captured, trainer.num_devices))
        snapshot.capture(*captured)
        # Hooks that make the loaders may change the module and the datamodule
        snapshot.capture_light(trainer.datamodule)
        context = TrialContext(
            probe=probe,
            budget=MemoryBudget(probe, arguments.settings.memory_limit),
            snapshot=snapshot,
            optimizers=optimizers,
            first_touch=nullcontext,  # the module and its optimizers are captured already
            ranks=ranks,
            progress=shown,
        )
        yield context, copied_bytes


def _device_id(trainer: Any, context: TrialContext) -> DeviceId:
    """Return the device of rank 0: all ranks have to decide alike."""
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
    note, curve_seconds = known.note, _settings.DEFAULTS.curve_seconds
    if note is None:  # the user's own
        known_plan(known.plan, settings, world_size=context.ranks.world_size)
    if known.plan is not None:
        noted = replace(subject, first_note=note)
        try:
            return tune(
                noted, settings, context, search, known=known.plan, curve_seconds=curve_seconds
            )
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
    return tune(noted, settings, context, search, known=None, curve_seconds=curve_seconds)


def _with_validation(tuned: Tuned, training: LightningTraining, source: Any) -> Tuned:
    """Return the result with the validation batch size that fits beside the state of training."""
    trainer, arguments, context = training.trainer, training.arguments, training.context
    try:
        loaders = Loaders(trainer, source, mode="sequential")
    except FixedBatchSizeError as error:
        return replace(tuned, report=_noted(tuned.report, f"Validation was not tried: {error}"))
    plan = tuned.report.plan
    samples = Samples(loaders, context.snapshot, None)
    train = partial(training.workload, plan.micro_batch_size, plan.trial_accumulation)
    subject = LightningEvaluation(
        EvaluationSteps(trainer, samples, VALIDATION, train),
        trainer,
        training.module,
        VALIDATION,
        arguments.settings,
        loaders,
        samples,
        loaders.batch_size,
    )
    try:
        found = _own_or_smaller(subject, context, arguments.search, curve_seconds=0.0)
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"Training fits, but validation does not beside it. {error}"
        ) from error
    size, own = found.plan.micro_batch_size, loaders.largest_batch
    report = tuned.report.model_copy(update={"validation_batch_size": size})
    if size == own:
        return replace(tuned, report=report)
    note = (
        f"Validation runs batches of {size:,} instead of {own:,}: more do not fit beside training."
    )
    return replace(tuned, report=_noted(report, note), validation_sizes=loaders.sizes_at(size))


def _own_or_smaller(
    subject: LightningEvaluation, context: TrialContext, search: Search, curve_seconds: float
) -> TuningReport:
    """Return the report on the loaders' own size if one trial shows that it fits, or else below."""
    own = subject.loaders.largest_batch
    settings = subject.settings.model_copy(
        update={"target_batch_size": None, "max_micro_batch_size": None, "dataset_size": None}
    )
    plan = BatchPlan(own, world_size=context.ranks.world_size)
    subject = replace(subject, settings=settings)
    try:
        return tune(subject, settings, context, search, known=plan, curve_seconds=curve_seconds)
    except DoesNotFitError:
        if own == 1:
            raise
    smaller = settings.model_copy(update={"max_micro_batch_size": own - 1})
    below = replace(subject, settings=smaller, start_batch_size=max(1, own // 2))
    return tune(below, smaller, context, search, known=None, curve_seconds=curve_seconds)


def _own_or_smaller_sizes(loaders: Loaders, report: TuningReport) -> tuple[int, ...]:
    size = report.plan.micro_batch_size
    return loaders.own_sizes if size == loaders.largest_batch else loaders.sizes_at(size)


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


def _class_name(thing: object) -> str:
    return type(thing).__name__


def _environment(trainer: Any) -> dict[str, str]:
    lightning = importlib.import_module(package_of(trainer).partition(".")[0])
    return {**versions(), lightning.__name__: lightning.__version__}
