"""find(): tune any PyTorch loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._distributed import checked_replicas, current_ranks
from autobatch._distributed.sharding import bring_to_rest, check_can_rest, check_no_pipeline
from autobatch._memory.detect import detect
from autobatch._prior_plan import PriorPlan, known_plan
from autobatch._settings import Settings, checked_verbose
from autobatch._subject import PlainLoop, accepts_accumulate
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.reachable import is_generator, reachable, with_state
from autobatch._trials.snapshot import Snapshot
from autobatch._trials.watched import Watched
from autobatch._tune import checked_search, tune
from autobatch.errors import AutobatchError
from autobatch.sinks import log, progress
from autobatch.testing import named_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._search import Search

_TRAINABLE: Final = (torch.nn.Module, torch.optim.Optimizer)


def find(
    workload: Callable[..., Any],
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
    latency_limit: float | None = None,
    percentile: float | None = None,
    verbose: bool = True,
    restore: Sequence[Any] = (),
    dataset_size: int | None = None,
    data_parallel_size: int | None = None,
) -> TuningReport:
    """Find the batch sizes that fit, and a plan to reach the effective batch.

    Everything with a state that the workload reaches by its variables is restored: models,
    optimizers, schedulers, scalers, generators. So are modules whose forward runs, optimizers that
    step, and the random state. The report names other variables that changed.

    Args:
        workload: `train(batch_size, accumulate)`, a generator function that trains at the given
            micro-batch size and yields after each optimizer step. Without the parameter
            `accumulate`, all plans have one micro-batch per update. It may yield the number of
            samples in its last micro-batch. A plain function that runs one step per call is
            accepted too. In a `torch.distributed` job every rank calls `find`; the workload may run
            a model in DistributedDataParallel, FSDP, `fully_shard` or tensor parallelism.
        target_batch_size: Samples per optimizer update, over all ranks. None: as `prefer` says.
        prefer: Without a target, "fast" takes the smallest micro-batch within 5 % of the fastest
            that fits, or the size given by the user if that is as fast; "largest" takes the largest
            that fits.
        memory_limit: A float up to 1.0 is a share of the device, minus the memory of other
            processes. An int is bytes, and so is text such as "10GiB": the most that this process
            may hold, if other processes leave that much.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a
            search.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        timing_seconds: Further seconds for timing sizes, which ends as soon as the choice is
            settled. 0: no timing; the largest sizes are taken. None: at most 20, and at most half
            the time of the search if speed does not decide (`prefer="largest"` without a target).
        search: Strategy that proposes the next size; `GuidedBisection()` by default.
        device: The device whose memory is read: a name such as "cuda:1", "simulated:2GiB" for one
            on the CPU (`autobatch.testing`), or a probe. None: the device of the model.
        latency_limit: For inference: seconds within which a batch has to be answered. The workload
            then is `answer(batch_size)`, a function that answers one batch, or a generator function
            that yields after each; its calls are timed one by one, and of the batches answered in
            time the smallest within 1 % of the most throughput is taken.
        percentile: Percentage of calls that have to be answered in time; None: 99. Only with
            `latency_limit`.
        verbose: Whether standard error shows the progress of tuning.
        restore: Further objects to restore, which the workload does not reach: anything with
            `state_dict` and `load_state_dict`, generators, tensors.
        dataset_size: Samples per epoch; bounds the search and gives updates per epoch.
        data_parallel_size: In a `torch.distributed` job, the number of ranks that train on different
            data. None: as the parameters of the model are divided, or else all ranks.

    Returns:
        The report: `report.plan`, `report.trials`, `report.budget`; `print(report)` shows it all.

    Raises:
        ValueError: An argument is wrong, or the plan needs accumulation and the workload cannot.
        DoesNotFitError: Not even one sample fits the budget, or is answered within `latency_limit`.
        ShortTrialError: The workload ended before the first step of a trial.
        ProbeError: The device cannot be read.

    Example:
        >>> import autobatch
        >>> from autobatch.testing import PaperDevice
        >>> paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)
        >>> report = autobatch.find(paper.workload, device=paper, target_batch_size=1024)
        >>> report.plan
        BatchPlan(micro_batch_size=256, accumulate_grad_batches=4, world_size=1)
    """
    can_accumulate = accepts_accumulate(workload)
    settings = Settings.checked(
        target_batch_size=target_batch_size,
        memory_limit=memory_limit,
        prefer=prefer,
        max_micro_batch_size=max_micro_batch_size,
        steps_per_trial=steps_per_trial,
        time_limit=time_limit,
        timing_seconds=timing_seconds,
        dataset_size=dataset_size,
        latency_limit=latency_limit,
        percentile=percentile,
    )
    prior = PriorPlan(known_plan(plan, settings))
    strategy, is_verbose = checked_search(search), checked_verbose(verbose)
    restored, reached = _restorable(restore), with_state(workload)
    trained = (each.value for each in reached if isinstance(each.value, _TRAINABLE))
    captured = [*restored, *trained]
    modules = [each for each in captured if isinstance(each, torch.nn.Module)]
    is_training = latency_limit is None
    model_device = _device_of_model(modules)
    probe = detect(named_device(device), model_device)
    began = probe.clock()
    check_can_rest(modules)
    check_no_pipeline([each.value for each in reachable(workload)])
    replicas = checked_replicas(data_parallel_size, modules)
    with (
        current_ranks(replicas) as ranks,
        ranks.abort_together(),
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        progress(verbose=is_verbose and ranks.rank == 0) as shown,
    ):
        # A device that the user named is not compared with that of the model
        on_first_use = _FirstUse(
            probe, optimizers, None if device else model_device, is_training=is_training
        )
        bring_to_rest(modules)  # a forward pass before may have left parameters gathered
        snapshot.capture(*captured)
        known = set(map(id, captured))
        snapshot.capture_if_possible([each for each in reached if id(each.value) not in known])
        if is_training:
            optimizers.look_at(*captured)
        budget = MemoryBudget(probe, settings.memory_limit)
        capturing = partial(snapshot.at_first_forward, on_first_use)
        context = TrialContext(probe, began, budget, snapshot, optimizers, capturing, ranks, shown)
        watched = Watched(workload, [*restored, probe])
        subject = PlainLoop(workload, can_accumulate, settings, context, watched)
        with snapshot.at_first_step(on_first_use):
            report = tune(subject, settings, context, strategy, prior)
    if ranks.rank == 0:
        log(report)
    return report


@dataclass(frozen=True, slots=True)
class _FirstUse:
    """Checks and attaches every module and optimizer that a workload uses for the first time."""

    probe: MemoryProbe
    optimizers: OptimizerWatch
    model_device: torch.device | None  # that the probe was chosen by; None if the user chose it
    is_training: bool

    def __call__(self, thing: object) -> None:
        self.probe.attach(thing)
        if not isinstance(thing, torch.nn.Module):
            return
        check_can_rest([thing])
        first = next(thing.parameters(), None)
        if first is None:
            return
        if self.is_training and torch.is_grad_enabled():
            self.optimizers.expected |= any(p.requires_grad for p in thing.parameters())
            self.optimizers.look_at(thing)
        if self.model_device is not None and first.device.type != self.model_device.type:
            raise AutobatchError(
                f"The model is on {first.device}, but the memory of {self.probe.name} is "
                f'measured; pass device="{first.device}".'
            )


def _restorable(restore: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(restore, (list, tuple)):
        raise ValueError(f"restore={type(restore).__name__} is not a list; write restore=[…].")
    for thing in restore:
        is_loadable = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
        if not (is_loadable or isinstance(thing, torch.Tensor) or is_generator(thing)):
            raise ValueError(
                f"restore holds a {type(thing).__name__}, which has no state_dict and "
                "load_state_dict; leave it out, or give an object that has them."
            )
    return restore


def _device_of_model(modules: Sequence[torch.nn.Module]) -> torch.device:
    """Return the device of the first model with parameters, or else CUDA if there is any."""
    parameters = (next(module.parameters(), None) for module in modules)
    device = next((each.device for each in parameters if each is not None), None)
    return device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
