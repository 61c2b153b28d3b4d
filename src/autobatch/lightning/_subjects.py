"""Training and evaluation in a Trainer as subjects of a tuning run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch._accumulation import batch_norms
from autobatch._report.accumulation_notes import never_stepped
from autobatch._report.result import SubjectNotes
from autobatch._report.tradeoff import common_rule, unwrapped
from autobatch._subject import Baseline, Description, Inference, versions
from autobatch.lightning._accumulation import SplittingTest, last_samples, update_notes
from autobatch.lightning._compat import data_parallel_size
from autobatch.lightning._estimating import traceable_step
from autobatch.lightning._package import package_of
from autobatch.lightning._trainer_notes import copy_note, prefetch_note, rows_note, schedule_notes

if TYPE_CHECKING:
    from autobatch._memory.estimate.tracer import TrainingStep
    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._settings import Settings
    from autobatch._trials.time_limit import TimeLimit
    from autobatch._trials.workload import Workload
    from autobatch.lightning._dataloaders import Loaders
    from autobatch.lightning._evaluation import Stage
    from autobatch.lightning._resources import CallbackArguments, TrialResources
    from autobatch.lightning._trainer_notes import TrainerLimits
    from autobatch.lightning._training import TrainingSteps


@dataclass(frozen=True, slots=True)
class LightningTraining:
    """A Lightning fit as the subject of a tuning run."""

    workload: TrainingSteps
    trainer: Any  # the Trainer, on new loops
    module: Any
    arguments: CallbackArguments
    resources: TrialResources
    limits: TrainerLimits  # arguments of the Trainer that count batches or steps

    @property
    def loaders(self) -> Loaders:
        return self.resources.loaders

    @property
    def task(self) -> Task:
        return "train"

    @property
    def baseline(self) -> Baseline:
        """Lightning steps at the end of an epoch, and in manual optimization the module steps."""
        return Baseline(
            start_batch_size=self.loaders.batch_size,
            own_batch_size=self.loaders.batch_size,
            can_accumulate=True,
            accumulate=self.trainer.accumulate_grad_batches,
            max_samples_per_update=self.loaders.samples,
            plan=self.limits.before if self.module.automatic_optimization else None,
        )

    def describe(self) -> Description:
        optimizers = self.trainer.optimizers
        names = " + ".join(_class_name(unwrapped(each)) for each in optimizers)
        name = f"{_class_name(self.module)} · {names} · {self.trainer.precision}"
        rule, look = common_rule(optimizers), self.resources.samples.look
        return Description(name, _environment(self.trainer), rule, look)

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        return self.limits.samples(plan)

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the samples in the last micro-batch of an epoch, if all ranks have the same.

        Ranks have to make the same choice; with a data set of its own on each, their epochs may end
        differently.
        """
        if data_parallel_size(self.trainer) > 1 and self.loaders.shards[0] == 1:
            return None
        return last_samples(self.trainer, self.loaders, batch_size)

    def traceable_step(self, accumulate: int) -> TrainingStep:
        return traceable_step(self.trainer, self.module, self.resources.samples, accumulate)

    def planned_seconds(self, sample_seconds: float) -> float | None:
        return self.limits.planned_seconds(sample_seconds)

    def has_batch_norm(self) -> bool:
        return bool(batch_norms(self.module.modules()))

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:
        has_attribute = self.resources.attribute.exists
        memory_limit = self.arguments.settings.memory_limit
        splits = SplittingTest(
            self.trainer, self.module, self.workload, self.resources, memory_limit
        )
        return SubjectNotes(
            trials=(never_stepped(),) if self.resources.context.optimizers.never_stepped else (),
            plan=(
                *splits.notes(plan, time_limit),
                *schedule_notes(
                    self.trainer, self.limits.before, plan, has_attribute=has_attribute
                ),
                *update_notes(self.trainer, self.loaders, plan, repaired=self.arguments.repairs),
                *self.limits.notes(plan),
                *self._data_notes(plan),
            ),
        )

    def _data_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        devices = self.trainer.num_devices
        sizes = self.loaders.sizes_at(plan.micro_batch_size)
        found = (
            rows_note(self.resources.samples.rows_each, plan.micro_batch_size),
            copy_note(self.resources.copied_bytes, devices),
            *(
                prefetch_note(loader, size, nbytes, devices)
                for loader, size, nbytes in zip(
                    self.loaders.each, sizes, self.resources.samples.bytes_each, strict=False
                )
            ),
        )
        return tuple(note for note in found if note)


@dataclass(frozen=True, slots=True)
class LightningEvaluation(Inference):
    """A Lightning validation, test or prediction as the subject of a tuning run."""

    workload: Workload
    trainer: Any  # the Trainer, on new loops
    stage: Stage
    settings: Settings
    resources: TrialResources
    start_batch_size: int  # the first to try

    @property
    def loaders(self) -> Loaders:
        return self.resources.loaders

    @property
    def task(self) -> Task:
        return self.stage.name

    @property
    def baseline(self) -> Baseline:
        return Baseline(self.start_batch_size, self.loaders.batch_size)

    def describe(self) -> Description:
        module, precision = self.trainer.lightning_module, self.trainer.precision
        name = f"{_class_name(module)} · {self.stage.name} · {precision}"
        return Description(name, _environment(self.trainer), look=self.resources.samples.look)

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        return self.settings.dataset_size

    def planned_seconds(self, sample_seconds: float) -> float | None:
        samples, ranks = self.settings.dataset_size, data_parallel_size(self.trainer)
        return None if samples is None else sample_seconds * samples / ranks

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:
        """Return a note on the meaning of a call with several loaders."""
        if self.settings.latency_limit is None or len(self.loaders.each) == 1:
            return SubjectNotes()
        note = (
            f"A call is one batch of each of the {len(self.loaders.each)} loaders, one after the "
            "other; batch sizes are those of the first."
        )
        return SubjectNotes(plan=(note,))


def _class_name(thing: object) -> str:
    return type(thing).__name__


def _environment(trainer: Any) -> dict[str, str]:
    lightning = importlib.import_module(package_of(trainer).partition(".")[0])
    return {**versions(), lightning.__name__: lightning.__version__}
