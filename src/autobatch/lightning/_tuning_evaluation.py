"""One tuning run for evaluation: alone, or beside training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch._loaders.samples import NoDataError, Samples
from autobatch._plan import BatchPlan
from autobatch._prior_plan import PriorPlan
from autobatch._tune import tune
from autobatch.errors import DoesNotFitError, FixedBatchSizeError
from autobatch.lightning._compat import data_source
from autobatch.lightning._dataloaders import Loaders
from autobatch.lightning._evaluation import VALIDATION, EvaluationSteps
from autobatch.lightning._resources import CallbackArguments, Tuned, trial_resources
from autobatch.lightning._subjects import LightningEvaluation, LightningTraining

if TYPE_CHECKING:
    from autobatch._loaders.batch_size import LoaderSize
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch.lightning._evaluation import Stage


def tune_evaluation(trainer: Any, module: Any, arguments: CallbackArguments, stage: Stage) -> Tuned:
    """Find the largest batch for validation, testing or prediction; restore all state.

    With a target the run is about training: the loaders keep their batch size if it fits.

    Raises:
        AutobatchError: A loader's batch size cannot be changed.
        DoesNotFitError: No batch size fits.
    """
    with trial_resources(trainer, module, arguments, stage.loop_of(trainer)) as resources:
        loaders = resources.loaders
        settings = arguments.settings.model_copy(
            update={"target_batch_size": None, "dataset_size": loaders.samples}
        )
        own, steps = loaders.batch_size, EvaluationSteps(trainer, resources, stage, None)
        subject = LightningEvaluation(steps, trainer, stage, settings, resources, own)
        if arguments.settings.target_batch_size is None:
            report = tune(subject, settings, resources.context, arguments.search, PriorPlan())
            resources.samples.check_size(report.plan.micro_batch_size)
            sizes = loaders.sized(report.plan.micro_batch_size)
        else:
            report = _own_or_smaller(subject, arguments.search)
            sizes = _own_or_smaller_sizes(loaders, report)
        return Tuned(report, sizes, is_changed=sizes != loaders.sized(own))


def with_validation(tuned: Tuned, training: LightningTraining) -> Tuned:
    """Return the result with the validation batch size that fits beside the state of training."""
    context = training.resources.context
    context.progress.begin_part("validation")
    try:
        loaders, found = _beside_training(training, tuned.report.plan)
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
    elif not training.resources.attribute.exists:
        return replace(tuned, report=report)
    sizes = _own_or_smaller_sizes(loaders, found)
    return replace(tuned, report=report, validation_sizes=sizes)


def _beside_training(training: LightningTraining, plan: BatchPlan) -> tuple[Loaders, TuningReport]:
    """Return the validation loaders, and the report on their batches beside an update of a plan."""
    trainer, context = training.trainer, training.resources.context
    loaders = Loaders(trainer, data_source(trainer.fit_loop.epoch_loop.val_loop), mode="sequential")
    with Samples(loaders, context.snapshot, training.module.device) as samples:
        samples.check()
        resources = replace(training.resources, loaders=loaders, samples=samples)
        train = partial(training.workload, plan.micro_batch_size, plan.trial_accumulation)
        steps = EvaluationSteps(trainer, resources, VALIDATION, train)
        arguments = training.arguments
        settings = arguments.settings.model_copy(
            update={"timing_seconds": 0.0, "prefer": "largest"}
        )
        own = loaders.batch_size
        subject = LightningEvaluation(steps, trainer, VALIDATION, settings, resources, own)
        return loaders, _own_or_smaller(subject, arguments.search)


def _own_or_smaller(subject: LightningEvaluation, search: Search) -> TuningReport:
    """Return the report on the loaders' own size if one trial shows that it fits, or else below."""
    own, context = subject.loaders.largest_batch, subject.resources.context
    settings = subject.settings.model_copy(
        update={"target_batch_size": None, "max_micro_batch_size": None, "dataset_size": None}
    )
    plan = BatchPlan(own, world_size=context.ranks.replicas)
    subject = replace(subject, settings=settings)
    try:
        return tune(subject, settings, context, search, PriorPlan(plan))
    except DoesNotFitError:
        if own == 1:
            raise
    smaller = settings.model_copy(update={"max_micro_batch_size": own - 1})
    below = replace(subject, settings=smaller, start_batch_size=max(1, own // 2))
    return tune(below, smaller, context, search, PriorPlan())


def _own_or_smaller_sizes(loaders: Loaders, report: TuningReport) -> tuple[LoaderSize, ...]:
    size = report.plan.micro_batch_size
    return loaders.sized(loaders.batch_size if size == loaders.largest_batch else size)


def _noted(report: TuningReport, note: str) -> TuningReport:
    return report.model_copy(update={"notes": (*report.notes, note)})
