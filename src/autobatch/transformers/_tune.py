"""tune(): find batch size and accumulation for a `transformers.Trainer`, and set them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._loaders.samples import Samples, checked_worst_case
from autobatch._plan import BatchPlan
from autobatch._prior_plan import PriorPlan, known_plan
from autobatch._settings import Settings, checked_verbose
from autobatch._tune import checked_search
from autobatch._tune import tune as tune_subject
from autobatch.testing import named_device
from autobatch.transformers._checks import check
from autobatch.transformers._compat import set_plan
from autobatch.transformers._data import TrainerLoaders
from autobatch.transformers._resources import trial_context
from autobatch.transformers._resume import Checkpoint
from autobatch.transformers._subject import TrainerTraining
from autobatch.transformers._training import TrainerSteps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from autobatch._memory import MemoryProbe
    from autobatch._report import TuningReport
    from autobatch._search import Search


def tune(
    trainer: Any,
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
    verbose: bool = True,
    worst_case: Callable[[int], Any] | None = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    apply: bool = True,
) -> TuningReport:
    """Find the batch sizes that fit for a `transformers.Trainer`, and set the plan in it.

    Call it before `trainer.train()`. It lets `train` prepare model, optimizer, precision and
    gradient checkpointing, runs trials with the Trainer's own steps instead of training, and
    restores everything. Training is then the same as with `per_device_train_batch_size` and
    `gradient_accumulation_steps` of the plan written by hand.

    Args:
        trainer: A Trainer of transformers, or of a subclass such as TRL's SFTTrainer. In a
            `torch.distributed` job every rank calls `tune`.
        target_batch_size: Samples per optimizer update, over all ranks; overrides the accumulation
            in the arguments. None: as `prefer` says, with that accumulation.
        memory_limit: A float up to 1.0 is a share of the device, less the memory of other
            processes. An int is bytes, and so is text such as "10GiB": the limit of this process,
            if other processes leave that much.
        prefer: Without a target, "fast" takes the smallest micro-batch within 5 % of the fastest
            that fits, or the size in the arguments if that is as fast; "largest" takes the largest
            that fits.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a
            search.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        timing_seconds: Further seconds for timing sizes, which ends as soon as the choice is
            settled. 0: no timing; the largest sizes are taken. None: at most 20, a tenth of the
            training that the Trainer plans, and half the time of the search if speed does not
            decide (`prefer="largest"` without a target).
        search: The search strategy; None: `GuidedBisection()`.
        device: The device whose memory is read: a name such as "cuda:1", "simulated:2GiB" for one
            on the CPU (`autobatch.testing`), or a probe. None: the device of the Trainer.
        verbose: Whether the progress of tuning and the report are printed.
        worst_case: A function of a number of samples that returns the largest batch of that many
            samples a step may meet, on the host and collated. None: trials run the largest of up to
            1,000 samples, or of those that can be read in 5 seconds.
        resume_from_checkpoint: As for `trainer.train`: the run goes on with the plan of the
            checkpoint, which one trial verifies.
        apply: Whether the two arguments are set, and the report is logged when training begins;
            False only reports.

    Returns:
        The report: `report.plan`, `report.trials`, `report.budget`; `print(report)` shows it all.

    Raises:
        ValueError: An argument is wrong.
        AutobatchError: This Trainer cannot be tuned; nothing has been changed then.
        DoesNotFitError: Not even one sample fits the budget.

    Example:
        >>> report = autobatch.transformers.tune(trainer, target_batch_size=256)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    settings = Settings.checked(
        target_batch_size=target_batch_size,
        memory_limit=memory_limit,
        prefer=prefer,
        max_micro_batch_size=max_micro_batch_size,
        steps_per_trial=steps_per_trial,
        time_limit=time_limit,
        timing_seconds=timing_seconds,
        dataset_size=None,
    )
    known = PriorPlan(known_plan(plan, settings))
    strategy, is_verbose = checked_search(search), checked_verbose(verbose)
    largest_batch, named = checked_worst_case(worst_case), named_device(device)
    check(trainer)
    checkpoint = None
    if resume_from_checkpoint:
        checkpoint = Checkpoint.named(resume_from_checkpoint, trainer.args.output_dir)
    with trial_context(trainer, settings, named, is_verbose=is_verbose) as context:
        ranks = context.ranks
        if checkpoint is not None:
            known = checkpoint.prior_plan(settings, ranks.replicas)
        context.optimizers.expected = True
        loader = TrainerLoaders.of_training(trainer)
        settings = settings.model_copy(update={"dataset_size": loader.samples})
        planned = known.plan.effective_batch_size if known.plan else None
        target = known.effective_batch_size or planned or settings.target_batch_size
        with Samples(loader, context.snapshot, trainer.args.device, largest_batch) as samples:
            workload = TrainerSteps(trainer, samples, target)
            args = trainer.args
            before = BatchPlan(loader.batch_size, args.gradient_accumulation_steps, args.world_size)
            subject = TrainerTraining(workload, trainer, loader, context, before)
            report = tune_subject(subject, settings, context, strategy, known)
    if apply:
        _apply(report, trainer)
    if ranks.rank == 0:
        sinks.log(report)
        if is_verbose:
            sinks.console(report)
    return report


def _apply(report: TuningReport, trainer: Any) -> None:
    """Set the plan in the arguments, and log the report of the latest tuning run."""
    from autobatch.transformers._callbacks import ReportLogger

    set_plan(trainer, report.plan.micro_batch_size, report.plan.accumulate_grad_batches)
    trainer.remove_callback(ReportLogger)
    trainer.add_callback(ReportLogger(trainer, report))
