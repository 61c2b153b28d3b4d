"""tune_evaluation(): find the batch size of a Trainer's evaluation, and set it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._loaders.samples import Samples, checked_worst_case
from autobatch._prior_plan import PriorPlan
from autobatch._settings import Settings, checked_verbose
from autobatch._trials.snapshot import Snapshot
from autobatch._tune import checked_search, tune
from autobatch.errors import AutobatchError
from autobatch.testing import named_device
from autobatch.transformers._checks import check
from autobatch.transformers._compat import set_evaluation_size
from autobatch.transformers._data import TrainerLoaders
from autobatch.transformers._evaluation import EvaluationSteps
from autobatch.transformers._resources import trial_context
from autobatch.transformers._subject import TrainerEvaluation
from autobatch.transformers._training import TrainerSteps

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._memory import MemoryProbe
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch._trials.context import TrialContext


def tune_evaluation(
    trainer: Any,
    *,
    memory_limit: float | str = 0.9,
    prefer: str = "fast",
    max_micro_batch_size: int | None = None,
    steps_per_trial: int = 3,
    time_limit: float | None = 300,
    timing_seconds: float | None = None,
    search: Search | None = None,
    device: str | MemoryProbe | None = None,
    verbose: bool = True,
    worst_case: Callable[[int], Any] | None = None,
    apply: bool = True,
) -> TuningReport:
    """Find the batch size of evaluation that fits beside the state of training, and set it.

    Call it after `tune`, and before `trainer.train()`. It runs one update of training with the
    batch size in the arguments, tries the Trainer's own `prediction_step` beside the state of the
    optimizer, and restores everything. Evaluation is then the same as with
    `per_device_eval_batch_size` written by hand.

    With `compute_metrics`, trials hold the predictions that evaluation keeps on the device: of all
    batches, or of `eval_accumulation_steps`. `compute_metrics` itself is not called.

    Args:
        trainer: A Trainer of transformers, or of a subclass, with training and evaluation data.
            With several evaluation data sets, a trial runs a batch of each in turn.
        memory_limit: As for `tune`.
        prefer: "fast" takes the smallest batch within 5 % of the fastest that fits, or the size in
            the arguments if that is as fast; "largest" takes the largest that fits.
        max_micro_batch_size: The largest batch to consider, in samples.
        steps_per_trial: Evaluation batches per trial.
        time_limit: As for `tune`.
        timing_seconds: Further seconds for timing sizes. None: at most 20, and at most a tenth of
            one evaluation.
        search: As for `tune`.
        device: As for `tune`.
        verbose: As for `tune`.
        worst_case: As for `tune`, for evaluation.
        apply: Whether the argument is set; False only reports.

    Returns:
        The report; the batch size is `report.plan.micro_batch_size`.

    Raises:
        ValueError: An argument is wrong.
        AutobatchError: This Trainer cannot be tuned; nothing has been changed then.
        DoesNotFitError: Not even one sample fits the budget.

    Example:
        >>> report = autobatch.transformers.tune_evaluation(trainer)  # doctest: +SKIP
    """
    settings = Settings.checked(
        target_batch_size=None,
        memory_limit=memory_limit,
        prefer=prefer,
        max_micro_batch_size=max_micro_batch_size,
        steps_per_trial=steps_per_trial,
        time_limit=time_limit,
        timing_seconds=timing_seconds,
        dataset_size=None,
    )
    strategy, is_verbose = checked_search(search), checked_verbose(verbose)
    largest_batch, named = checked_worst_case(worst_case), named_device(device)
    check(trainer)
    if not trainer.eval_dataset:
        raise AutobatchError(
            f"eval_dataset={trainer.eval_dataset!r} leaves nothing to evaluate: give the Trainer "
            "its evaluation data, or leave tune_evaluation out."
        )
    with trial_context(trainer, settings, named, is_verbose=is_verbose) as context:
        loaders = TrainerLoaders.of_evaluation(trainer)
        settings = settings.model_copy(update={"dataset_size": loaders.samples})
        _update_once(trainer, context)
        with (
            Snapshot() as snapshot,
            Samples(loaders, snapshot, trainer.args.device, largest_batch) as samples,
        ):
            snapshot.capture_small_values(trainer)
            snapshot.capture(trainer.model, trainer.optimizer)
            subject = TrainerEvaluation(EvaluationSteps(trainer, loaders, samples))
            beside = replace(context, snapshot=snapshot)
            report = tune(subject, settings, beside, strategy, PriorPlan())
    if apply:
        set_evaluation_size(trainer, report.plan.micro_batch_size)
    if context.ranks.rank == 0:
        sinks.log(report)
        if is_verbose:
            sinks.console(report)
    return report


def _update_once(trainer: Any, context: TrialContext) -> None:
    """Run an update of training, so that the optimizer has its state."""
    loader = TrainerLoaders.of_training(trainer)
    with Samples(loader, context.snapshot, trainer.args.device) as samples:
        steps = TrainerSteps(trainer, samples, None)
        try:
            with context.ranks.dry(), closing(steps(loader.batch_size, 1)) as updates:
                next(updates)
        except Exception as error:
            error.add_note("autobatch was training one batch, beside whose state to evaluate")
            raise
