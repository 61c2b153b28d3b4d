"""One tuning run in a Trainer."""

from __future__ import annotations

import importlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from autobatch import sinks
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._plan import BatchPlan
from autobatch._report.notes import never_stepped
from autobatch._report.tradeoff import common_rule
from autobatch._subject import Subject
from autobatch._throughput import curve
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import known_plan, tune, versions
from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.lightning._accumulation import (
    Splits,
    batches_trained,
    check_repairable,
    last_samples,
    told,
)
from autobatch.lightning._apply import is_named, name_batch_size
from autobatch.lightning._compat import data_source, package_of
from autobatch.lightning._dataloaders import FixedBatchSizeError, Loaders
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
    from collections.abc import Callable, Generator, Iterator

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch.lightning._batch_size import SetBatchSize
    from autobatch.lightning._workloads import Stage


# (job, where it runs, settings) -> what is known before a search
KnownAt: TypeAlias = "Callable[[Subject, DeviceId, Settings], PriorPlan]"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning run comes to.

    Args:
        report: All of it.
        batch_sizes: Of each loader.
        validation_sizes: Of each validation loader, where they can not stay as they are.
    """

    report: TuningReport
    batch_sizes: tuple[int, ...]
    validation_sizes: tuple[int, ...] | None = None


def tune_training(
    trainer: Any,
    module: Any,
    asked: Asked,
    known_at: KnownAt,
    trained: BatchPlan | None,
) -> Tuned:
    """Find the plan to train with, and a size at which validation fits beside it; leave everything as it was.

    `trained` is what it was trained with until now, where that is not what loader and Trainer say.

    Raises:
        AutobatchError: A loader's batch size can not be changed, or an argument of the Trainer rules the plan out.
        DoesNotFitError: No batch size fits.
    """
    if asked.repairs:
        check_repairable(trainer, module)
    # The loops know none of these three while scratch ones stand for them
    validates = trainer.enable_validation
    validation = data_source(trainer.fit_loop.epoch_loop.val_loop)
    counted = partial(TrainerLimits, trainer, trainer.max_steps, validates=validates)
    with workbench(trainer, module, asked) as bench:
        loaders = Loaders(
            trainer,
            data_source(trainer.fit_loop),
            mode="max_size_cycle",
            setter=asked.set_batch_size,
        )
        accumulate = trainer.accumulate_grad_batches
        counts = counted(
            batches=loaders.batches,
            samples=partial(_samples_trained, trainer, loaders),
            before=trained or BatchPlan(loaders.batch_size, accumulate, trainer.world_size),
        )
        samples = Samples(loaders, bench.snapshot, asked.worst_case)
        named = partial(name_batch_size, module, asked.batch_arg_name)
        steps = TrainingSteps(trainer, samples, named)
        splits = Splits(
            trainer,
            module,
            samples,
            steps,
            named,
            bench.probe,
            asked.settings.memory_limit,
            bench.snapshot,
            bench.ranks,
        )
        has_name = is_named(module, asked.batch_arg_name)
        job = Subject(
            workload=steps,
            can_accumulate=True,
            start=loaders.batch_size,
            accumulate=accumulate,
            samples_trained=counts.samples,
            update_at_most=loaders.samples,
            # Ranks have to choose alike; where each has a data set of its own, their epochs may end differently
            last_samples=partial(last_samples, trainer, loaders)
            if trainer.world_size == 1 or loaders.shards[0] > 1
            else None,
            remarks=lambda plan, deadline: (
                *splits.told(plan, deadline),
                *schedules(trainer, counts.before, plan, is_named=has_name),
                *told(trainer, loaders, plan, repaired=asked.repairs),
                *counts.remarks(plan),
                *_about_the_host(trainer, loaders, samples, bench, plan),
            ),
            doubts=lambda _: (never_stepped(),) if bench.optimizers.never_stepped else (),
            # By hand, updates are the module's affair
            before=counts.before if module.automatic_optimization else None,
            task="train",
            subject=_subject(module, " + ".join(map(_name, trainer.optimizers)), trainer.precision),
            environment=_environment(trainer),
            look=lambda: samples.look,
            curve_seconds=curve.SECONDS,
            learning_rate=lambda: common_rule(trainer.optimizers),
        )
        settings = asked.settings.model_copy(update={"dataset_size": loaders.samples})
        bench.optimizers.expected = True
        if not module.automatic_optimization:
            bench.optimizers.look_at(module)  # Lightning steps, a user may not
        report = verified_or_searched(
            known_at(job, bench.here(trainer), settings), job, settings, bench
        )
        counts.check(report.plan)
        tuned = Tuned(report, loaders.sizes_at(report.plan.micro_batch_size))
        if not validates:
            return tuned
        # A hook may make validation batches of the size it finds there
        named(report.plan.micro_batch_size)
        return _with_validation(tuned, trainer, module, asked, bench, validation, steps)


def tune_evaluation(trainer: Any, module: Any, asked: Asked, stage: Stage) -> Tuned:
    """Find the largest batch for validation, testing or prediction; leave everything as it was.

    Where an effective batch is asked for, tuning is about training: the loaders keep their size if that fits.

    Raises:
        AutobatchError: A loader's batch size can not be changed.
        DoesNotFitError: No batch size fits.
    """
    with workbench(trainer, module, asked) as bench:
        source = data_source(stage.loop_of(trainer))
        loaders = Loaders(trainer, source, mode="sequential")
        settings = _without_target(asked.settings, loaders.samples)
        job = _evaluation_job(
            trainer,
            module,
            loaders,
            bench,
            stage,
            settings=settings,
            worst_case=asked.worst_case,
        )
        if asked.settings.target_batch_size is None:
            report = bench.run(job, settings, known=None)
            sizes = loaders.sizes_at(report.plan.micro_batch_size)
        else:
            report = _own_or_smaller(job, settings, loaders, bench)
            sizes = _own_or_smaller_sizes(loaders, report)
        return Tuned(report, sizes)


def _with_validation(
    tuned: Tuned,
    trainer: Any,
    module: Any,
    asked: Asked,
    bench: Workbench,
    source: Any,
    steps: TrainingSteps,
) -> Tuned:
    """What was tuned, with the size at which validation fits beside the state that training keeps."""
    try:
        loaders = Loaders(trainer, source, mode="sequential")
    except FixedBatchSizeError as error:
        return replace(tuned, report=_told(tuned.report, f"Validation was not tried: {error}"))
    plan = tuned.report.plan
    job = _evaluation_job(
        trainer,
        module,
        loaders,
        bench,
        VALIDATION,
        settings=asked.settings,
        after=partial(steps, plan.micro_batch_size, min(2, plan.accumulate_grad_batches)),
    )
    try:
        found = _own_or_smaller(job, _without_target(asked.settings, None), loaders, bench)
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
    return replace(tuned, report=_told(report, note), validation_sizes=loaders.sizes_at(size))


def _own_or_smaller(
    job: Subject, settings: Settings, loaders: Loaders, bench: Workbench
) -> TuningReport:
    """The report about the loaders' own size, where one trial shows that it fits; else about the largest below."""
    own = loaders.largest_batch
    unbound = settings.model_copy(update={"max_micro_batch_size": None, "dataset_size": None})
    plan = BatchPlan(own, world_size=bench.ranks.world_size)
    try:
        return bench.run(job, unbound, known=plan)
    except DoesNotFitError:
        if own == 1:
            raise
    smaller = unbound.model_copy(update={"max_micro_batch_size": own - 1})
    return bench.run(replace(job, start=max(1, own // 2)), smaller, known=None)


def _own_or_smaller_sizes(loaders: Loaders, report: TuningReport) -> tuple[int, ...]:
    size = report.plan.micro_batch_size
    return loaders.own_sizes if size == loaders.largest_batch else loaders.sizes_at(size)


def _evaluation_job(
    trainer: Any,
    module: Any,
    loaders: Loaders,
    bench: Workbench,
    stage: Stage,
    *,
    settings: Settings,
    after: Callable[[], Generator[Any]] | None = None,
    worst_case: Callable[[int], Any] | None = None,
) -> Subject:
    samples = Samples(loaders, bench.snapshot, worst_case)
    return Subject(
        workload=EvaluationSteps(trainer, samples, stage, after),
        can_accumulate=False,
        start=loaders.batch_size,
        accumulate=1,
        samples_trained=None,
        update_at_most=None,
        last_samples=None,
        remarks=lambda *_: _about_rounds(loaders, settings),
        doubts=None,
        before=None,
        task=stage.name,
        subject=_subject(module, stage.name, trainer.precision),
        environment=_environment(trainer),
        look=lambda: samples.look,
        # Beside training it is only asked whether it fits
        curve_seconds=0.0 if after else curve.SECONDS,
        learning_rate=None,
    )


def _about_rounds(loaders: Loaders, settings: Settings) -> tuple[str, ...]:
    """What a call is, where several loaders take turns."""
    if settings.latency_limit is None or len(loaders.each) == 1:
        return ()
    note = (
        f"A call is one batch of each of the {len(loaders.each)} loaders, one after the other; batch sizes are those "
        "of the first."
    )
    return (note,)


def _without_target(settings: Settings, dataset_size: int | None) -> Settings:
    return settings.model_copy(update={"target_batch_size": None, "dataset_size": dataset_size})


def _told(report: TuningReport, note: str) -> TuningReport:
    return report.model_copy(update={"notes": (*report.notes, note)})


def _samples_trained(trainer: Any, loaders: Loaders, plan: BatchPlan) -> int | None:
    """What an epoch leaves after `drop_last` and `limit_train_batches`, which counts batches."""
    batches = batches_trained(trainer, loaders, plan.micro_batch_size)
    if batches is None:
        return loaders.samples
    return loaders.samples_in(batches, plan.micro_batch_size) or None


def _about_the_host(
    trainer: Any, loaders: Loaders, samples: Samples, bench: Workbench, plan: BatchPlan
) -> tuple[str, ...]:
    """What a person should know of the host's memory with a plan."""
    sizes = loaders.sizes_at(plan.micro_batch_size)
    notes = (
        copied(bench.copied, trainer.num_devices),
        *(
            ahead(loader, size, nbytes, trainer.num_devices)
            for loader, size, nbytes in zip(loaders.each, sizes, samples.bytes_each, strict=False)
        ),
    )
    return tuple(note for note in notes if note)


def _subject(module: Any, *parts: object) -> str:
    return " · ".join(map(str, (_name(module), *parts)))


def _name(thing: object) -> str:
    return type(thing).__name__


def _environment(trainer: Any) -> dict[str, str]:
    lightning = importlib.import_module(package_of(trainer).partition(".")[0])
    return {**versions(), lightning.__name__: lightning.__version__}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a callback was asked for.

    Args:
        settings: As checked at the door.
        search: Which size to try next.
        device: Where memory is read; None: where the model is.
        worst_case: Makes the largest batch of a size, where the user knows it.
        repairs: Whether the last window of an epoch is repaired.
        batch_arg_name: What the module or its datamodule calls the batch size.
        set_batch_size: Gives a loader another batch size, where the user has a way of their own.
    """

    settings: Settings
    search: Search
    device: str | MemoryProbe | None
    worst_case: Callable[[int], Any] | None
    repairs: bool
    batch_arg_name: str
    set_batch_size: SetBatchSize | None


@dataclass(frozen=True, slots=True)
class Workbench:
    """What trials of one run share.

    Args:
        snapshot: Gives back what they change.
        optimizers: Counts and times optimizer steps.
        probe: The device.
        ranks: Who tries together.
        search: Which size to try next.
        shown: Where progress is shown.
        copied: Bytes of the copy that is kept on the host.
    """

    snapshot: Snapshot
    optimizers: OptimizerWatch
    probe: MemoryProbe
    ranks: Ranks
    search: Search
    shown: sinks.Progress
    copied: int

    def run(self, job: Subject, settings: Settings, *, known: BatchPlan | None) -> TuningReport:
        """Tune one job here."""
        return tune(
            job,
            settings,
            known=known,
            probe=self.probe,
            search=self.search,
            snapshot=self.snapshot,
            optimizers=self.optimizers,
            first_touch=nullcontext,  # the module and its optimizers are known
            shown=self.shown,
            ranks=self.ranks,
        )

    def here(self, trainer: Any) -> DeviceId:
        """Where this runs, in the words of rank 0: all of them have to decide alike."""
        total = self.probe.read().total
        here = DeviceId.of(self.probe.name, total, trainer.world_size)
        return self.ranks.gather(here)[0]


@contextmanager
def workbench(trainer: Any, module: Any, asked: Asked) -> Iterator[Workbench]:
    """Capture what trials may change, and keep all else away from them; at the end everything is given back."""
    probe = detect(asked.device, module.device)
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
        copied_here, *_ = ranks.gather(room_for_copy(captured, trainer.num_devices))
        snapshot.capture(*captured)
        # Hooks that make the loaders may change the module and the datamodule
        snapshot.capture_light(trainer.datamodule)
        yield Workbench(snapshot, optimizers, probe, ranks, asked.search, shown, copied_here)


def verified_or_searched(
    known: PriorPlan, job: Subject, settings: Settings, bench: Workbench
) -> TuningReport:
    """The report about a plan that is known, where one trial verifies it; else about one that a search found."""
    note = known.note
    if note is None:  # the user's own
        known_plan(known.plan, settings, world_size=bench.ranks.world_size)
    if known.plan is not None:
        try:
            return bench.run(_noted(job, note), settings, known=known.plan)
        except DoesNotFitError as error:
            if known.refusal is not None:
                raise AutobatchError(known.refusal) from error
            if note is None:
                raise
            note = f"Searched anew, since a micro-batch of {known.plan.micro_batch_size:,} does not fit any more."
    if known.target is not None:
        settings = settings.model_copy(update={"target_batch_size": known.target})
    return bench.run(_noted(job, note), settings, known=None)


def _noted(job: Subject, note: str | None) -> Subject:
    remarks = job.remarks
    if note is None or remarks is None:
        return job
    return replace(job, remarks=lambda *given: (note, *remarks(*given)))
