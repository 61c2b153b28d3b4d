"""One tuning run for training in a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch._plan import BatchPlan
from autobatch._tune import tune
from autobatch.lightning._accumulation import SplittingTest, check_repairable
from autobatch.lightning._beside import bytes_of_callbacks
from autobatch.lightning._compat import data_parallel_size
from autobatch.lightning._resources import CallbackArguments, Tuned, trial_resources
from autobatch.lightning._resume import DeviceId, fingerprint_of
from autobatch.lightning._subjects import LightningTraining
from autobatch.lightning._trainer_notes import TrainerLimits
from autobatch.lightning._training import TrainingSteps
from autobatch.lightning._tuning_evaluation import with_validation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials.context import TrialContext
    from autobatch.lightning._resume import KnownPlans


def tune_training(
    trainer: Any,
    module: Any,
    arguments: CallbackArguments,
    known_plans: KnownPlans,
    trained: BatchPlan | None,
    start_hooks: Sequence[str],
) -> Tuned:
    """Find a plan for training, and a validation batch size that fits beside it; restore all state.

    Args:
        trainer: The Trainer.
        module: The module.
        arguments: Arguments of the callback.
        known_plans: Plans that may be known before a search.
        trained: The plan that was trained with until now; None for that of loader and Trainer.
        start_hooks: Hooks of the module that training has still to call before its first batch.

    Raises:
        AutobatchError: A loader's batch size cannot be changed, or an argument of the Trainer
            excludes the plan.
        DoesNotFitError: No batch size fits.
    """
    if arguments.repairs:
        check_repairable(trainer, module)
    with trial_resources(trainer, module, arguments, None) as resources:
        context, loaders = resources.context, resources.loaders
        accumulate = trainer.accumulate_grad_batches
        own_plan = BatchPlan(loaders.batch_size, accumulate, data_parallel_size(trainer))
        limits = TrainerLimits(trainer, loaders, trained or own_plan, trainer.global_step)
        workload = TrainingSteps(trainer, resources, start_hooks)
        splits = SplittingTest(
            trainer, module, workload, resources, arguments.settings.memory_limit
        )
        subject = LightningTraining(
            workload, trainer, module, arguments, resources, limits, splits, accumulate
        )
        settings = arguments.settings.model_copy(update={"dataset_size": loaders.samples})
        context.optimizers.expected = True
        if not module.automatic_optimization:
            # In manual optimization, the module may never step
            context.optimizers.look_at(module)
        fingerprint = fingerprint_of(subject)
        device = _device_id(trainer, context)
        known = known_plans.prior(subject, fingerprint, device, settings)
        planned = known.plan.effective_batch_size if known.plan else None
        workload.target = known.effective_batch_size or planned or settings.target_batch_size
        report = tune(subject, settings, context, arguments.search, known)
        limits.check(report.plan)
        resources.samples.check_size(report.plan.micro_batch_size)
        tuned = Tuned(
            report,
            loaders.sized(report.plan.micro_batch_size),
            loaders.sized(loaders.batch_size),
            fingerprint,
            held_by_callbacks=None if workload.runs_callbacks else bytes_of_callbacks(trainer),
        )
        if not trainer.enable_validation:
            return tuned
        # Validation keeps the size that its hook gives it before the plan is applied
        resources.attribute.restore()
        return with_validation(tuned, subject, arguments)


def _device_id(trainer: Any, context: TrialContext) -> DeviceId:
    """Return the device of rank 0: all ranks have to make the same choice."""
    total = context.probe.read().total
    here = DeviceId.of(context.probe.name, total, data_parallel_size(trainer))
    return context.ranks.gather(here)[0]
