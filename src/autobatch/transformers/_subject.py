"""Training in a Trainer as the subject of a tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from autobatch._accumulation import batch_norms
from autobatch._report.accumulation_notes import batch_norm, never_stepped
from autobatch._report.result import SubjectNotes
from autobatch._report.tradeoff import common_rule, unwrapped
from autobatch._subject import Baseline, Description, Inference, versions

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._trials.context import TrialContext
    from autobatch._trials.time_limit import TimeLimit
    from autobatch.transformers._data import TrainerLoaders
    from autobatch.transformers._evaluation import EvaluationSteps
    from autobatch.transformers._training import TrainerSteps


@dataclass(frozen=True, slots=True)
class TrainerTraining:
    """Training in a Trainer as the subject of a tuning run."""

    workload: TrainerSteps
    trainer: Any  # the Trainer, with everything prepared
    loader: TrainerLoaders  # the training data
    context: TrialContext
    before: BatchPlan  # the plan of the arguments, outside of trials

    @property
    def task(self) -> Task:
        return "train"

    @property
    def baseline(self) -> Baseline:
        """A Trainer steps at the end of an epoch, whatever the accumulation."""
        return Baseline(
            start_batch_size=self.loader.batch_size,
            own_batch_size=self.loader.batch_size,
            can_accumulate=True,
            accumulate=self.before.accumulate_grad_batches,
            max_samples_per_update=self.loader.samples,
            plan=self.before,
        )

    def describe(self) -> Description:
        trainer = self.trainer
        names = (type(each).__name__ for each in (trainer.model, unwrapped(trainer.optimizer)))
        name, rule = " · ".join((*names, _precision(trainer))), common_rule([trainer.optimizer])
        return Description(name, _environment(), rule, self.workload.samples.look)

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        samples = self.loader.samples
        if samples is None or not self.trainer.args.dataloader_drop_last:
            return samples
        at_once = plan.micro_batch_size * plan.world_size
        return samples // at_once * at_once or None

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the rest of an epoch; accelerate fills it up where there are several ranks."""
        samples, args = self.loader.samples, self.trainer.args
        if samples is None:
            return None
        if args.dataloader_drop_last or args.world_size > 1:
            return batch_size
        return samples % batch_size or batch_size

    def traceable_step(self, accumulate: int) -> None:
        """Return None: the Trainer's own step takes its batches from accelerate."""

    def planned_seconds(self, sample_seconds: float) -> float | None:
        args, before = self.trainer.args, self.before
        if args.max_steps > 0:
            samples: float = args.max_steps * before.effective_batch_size
        elif self.loader.samples is None:
            return None
        else:
            samples = args.num_train_epochs * self.loader.samples
        return samples / before.world_size * sample_seconds

    def has_batch_norm(self) -> bool:
        return bool(batch_norms(self.trainer.model.modules()))

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:
        norms = batch_norms(self.trainer.model.modules())
        return SubjectNotes(
            trials=(never_stepped(),) if self.context.optimizers.never_stepped else (),
            plan=(*batch_norm(norms, plan), *self._counted_updates(plan)),
        )

    def _counted_updates(self, plan: BatchPlan) -> tuple[str, ...]:
        """Return a note if `max_steps` covers more or fewer samples than before."""
        steps, before = self.trainer.args.max_steps, self.before
        now, then = plan.effective_batch_size, before.effective_batch_size
        if steps <= 0 or now == then:
            return ()
        note = (
            f"max_steps={steps:,} counts updates: training ends after {steps * now:,} samples "
            f"instead of {steps * then:,}."
        )
        return (note,)


@dataclass(frozen=True, slots=True)
class TrainerEvaluation(Inference):
    """Evaluation in a Trainer as the subject of a tuning run."""

    workload: EvaluationSteps

    @property
    def task(self) -> Task:
        return "validate"

    @property
    def baseline(self) -> Baseline:
        own = self.workload.loaders.batch_size
        return Baseline(own, own)

    def describe(self) -> Description:
        trainer = self.workload.trainer
        name = f"{type(trainer.model).__name__} · evaluate · {_precision(trainer)}"
        return Description(name, _environment(), look=self.workload.samples.look)

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        return self.workload.loaders.samples

    def planned_seconds(self, sample_seconds: float) -> float | None:
        samples, ranks = self.workload.loaders.samples, self.workload.trainer.args.world_size
        return None if samples is None else sample_seconds * samples / ranks


def _precision(trainer: Any) -> str:
    precision = trainer.accelerator.mixed_precision
    if precision == "no":
        precision = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return str(precision)


def _environment() -> dict[str, str]:
    return {**versions(), **{name: version(name) for name in ("transformers", "accelerate")}}
