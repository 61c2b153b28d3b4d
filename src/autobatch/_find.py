"""find(): tune any PyTorch loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from autobatch._accumulation import batch_norms
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._report.accumulation_notes import (
    batch_norm,
    ignores_accumulate,
    never_stepped,
    stays_changed,
)
from autobatch._report.tradeoff import common_rule
from autobatch._settings import Settings, checked_verbose
from autobatch._trials.captured import is_generator
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.reachable import Watched, has_state_dict, reachable
from autobatch._trials.snapshot import Snapshot, restorable
from autobatch._tune import checked_search, known_plan, tune, versions
from autobatch.errors import AutobatchError
from autobatch.sinks import log, progress
from autobatch.testing import named_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import Task, TuningReport
    from autobatch._report.result import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._search import Search
    from autobatch._trials.time_limit import TimeLimit

_TRAINABLE: Final = (torch.nn.Module, torch.optim.Optimizer)
# Classes whose steps wait for other ranks
_SYNCHRONIZING_WRAPPERS: Final = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}


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
            accepted too. In a `torch.distributed` job every rank calls `find`, and the workload
            runs the model itself, not its DistributedDataParallel.
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
            settled. 0: no timing; the largest sizes are taken. None: at most 20.
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
    is_verbose = checked_verbose(verbose)
    restored = _restorable(restore)
    reached = [each for each in reachable(workload) if _has_state(each.value)]
    model_device = _device_of_model(*restored, *(each.value for each in reached))
    probe = detect(named_device(device), model_device)
    began = probe.clock()
    with (
        current_ranks() as ranks,
        ranks.abort_together(),
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        progress(verbose=is_verbose and ranks.rank == 0) as shown,
    ):
        is_training = latency_limit is None
        # A device that the user named is not compared with that of the model
        on_first_use = _FirstUse(
            probe, optimizers, None if device else model_device, ranks, is_training=is_training
        )
        trainable = [each.value for each in reached if isinstance(each.value, _TRAINABLE)]
        if ranks.world_size > 1:
            _check_not_synchronizing(*trainable)
        snapshot.capture(*restored, *trainable)
        snapshot.capture_if_possible(
            each for each in reached if not isinstance(each.value, _TRAINABLE)
        )
        if is_training:
            optimizers.look_at(*restored, *trainable)
        context = TrialContext(
            probe=probe,
            began=began,
            budget=MemoryBudget(probe, settings.memory_limit),
            snapshot=snapshot,
            optimizers=optimizers,
            on_first_use=partial(snapshot.at_first_forward, on_first_use),
            ranks=ranks,
            progress=shown,
        )
        with snapshot.at_first_step(on_first_use):
            report = tune(
                PlainLoop(
                    workload,
                    can_accumulate,
                    settings,
                    context,
                    Watched(workload, restored),
                ),
                settings,
                context,
                checked_search(search),
                known=known_plan(plan, settings, world_size=ranks.world_size),
            )
    if ranks.rank == 0:
        log(report)
    return report


@dataclass(frozen=True, slots=True)
class PlainLoop:
    """A training loop, or a function that answers a batch, as the subject of a tuning run.

    Args:
        function: The function of the user, in any of the accepted forms.
        can_accumulate: Whether it has a parameter `accumulate`.
        settings: Validated arguments of the run.
        context: Resources of the trials.
        watched: Variables of the user that are not restored.
    """

    function: Callable[..., Any]
    can_accumulate: bool
    settings: Settings
    context: TrialContext
    watched: Watched

    start_batch_size: ClassVar = 8
    own_batch_size: ClassVar = None
    accumulate: ClassVar = 1
    previous_plan: ClassVar = None

    @property
    def task(self) -> Task:
        return "train" if self.settings.latency_limit is None else "answer"

    @property
    def name(self) -> str:
        return _name_of(self.function)

    @property
    def environment(self) -> dict[str, str]:
        return versions()

    @property
    def max_samples_per_update(self) -> int | None:
        return self.settings.dataset_size

    def workload(self, batch_size: int, accumulate: int) -> Iterator[Any]:
        """Run a generator to its end, or a plain function again and again, one step each time."""
        options = {"accumulate": accumulate} if self.can_accumulate else {}
        while True:
            result = self.function(batch_size, **options)
            if isinstance(result, Iterator):
                yield from result
                return
            yield None

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:  # noqa: ARG002 -- any plan
        return self.settings.dataset_size

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the rest of the data set; with several ranks the loop divides it as it likes."""
        samples = self.settings.dataset_size
        if samples is None or self.context.ranks.world_size > 1:
            return None
        return samples % batch_size or batch_size

    def learning_rate_rule(self) -> LearningRateRule | None:
        """Return the rule of the optimizers that have stepped and are still alive."""
        alive = self.context.snapshot.alive
        return common_rule([thing for thing in alive if isinstance(thing, torch.optim.Optimizer)])

    def largest_samples(self) -> Look | None:
        """Return None: the loop makes its own batches."""
        return None

    def planned_seconds(self, sample_seconds: float) -> float | None:  # noqa: ARG002
        """Return None: the loop ends when it likes."""
        return None

    def has_batch_norm(self) -> bool:
        return self.task == "train" and bool(batch_norms(self.context.snapshot.alive))

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        """Return notes on missing optimizer steps or accumulation, and on what stays changed."""
        optimizers = self.context.optimizers
        changed = sorted({*self.watched.changed(), *self.context.snapshot.unrestored})
        found = (
            stays_changed(changed) if changed else None,
            never_stepped() if optimizers.never_stepped else None,
            ignores_accumulate(plan) if optimizers.steps_every_pass else None,
        )
        return tuple(note for note in found if note)

    def plan_notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:  # noqa: ARG002
        """Return notes on BatchNorm; a model that the workload makes itself is gone by now."""
        return batch_norm(batch_norms(self.context.snapshot.alive), plan)


def accepts_accumulate(workload: Callable[..., Any]) -> bool:
    """Return whether a workload has a parameter `accumulate`; refuse objects of other forms."""
    if isinstance(workload, torch.nn.Module) or not callable(workload):
        raise ValueError(
            f"workload={type(workload).__name__} is not a training loop; give a function of the "
            "batch size."
        )
    call = getattr(workload, "__call__", None)  # noqa: B004 -- of an object
    inner = workload.func if isinstance(workload, partial) else workload
    if any(map(_is_asynchronous, (inner, call))):
        raise ValueError(
            f"workload={_name_of(inner)} is asynchronous; give a plain function or generator "
            "function."
        )
    try:
        signature = inspect.signature(workload)
    except (TypeError, ValueError):  # some builtins have none
        return False
    has_accumulate = "accumulate" in signature.parameters
    try:
        signature.bind(1, **({"accumulate": 1} if has_accumulate else {}))
    except TypeError as error:
        raise ValueError(
            f"workload={_name_of(workload)} is not callable as train(batch_size) or "
            f"train(batch_size, accumulate): {error}."
        ) from None
    return has_accumulate


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _is_asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _restorable(restore: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(restore, (list, tuple)):
        raise ValueError(f"restore={type(restore).__name__} is not a list; write restore=[…].")
    for thing in restore:
        if not restorable(thing):
            raise ValueError(
                f"restore holds a {type(thing).__name__}, which has no state_dict and "
                "load_state_dict; leave it out, or give an object that has them."
            )
    return restore


def _has_state(thing: object) -> bool:
    """Return True for models, optimizers, schedulers, scalers, averages and generators."""
    return isinstance(thing, _TRAINABLE) or has_state_dict(thing) or is_generator(thing)


def _device_of_model(*things: Any) -> torch.device:
    """Return the device of the first model among these, or else CUDA if there is any."""
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            parameter = next(thing.parameters(), None)
            if parameter is not None:
                return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_not_synchronizing(*things: Any) -> None:
    """Refuse modules whose steps would wait for a rank that is out of memory."""
    for name in {kind.__name__ for thing in things for kind in type(thing).__mro__}:
        if name in _SYNCHRONIZING_WRAPPERS:
            raise AutobatchError(
                f"The workload runs a {name}, whose steps wait for other ranks: a rank "
                "that runs out of memory would hang them. Let the workload run the wrapped module "
                "(model.module)."
            )


@dataclass(frozen=True, slots=True)
class _FirstUse:
    """Called with every module and optimizer when it is used for the first time.

    Args:
        probe: The device.
        optimizers: Counts optimizer steps and backward passes.
        model_device: The device that the probe was chosen by; None if the user chose it.
        ranks: The processes that train together.
        is_training: Whether the workload trains.
    """

    probe: MemoryProbe
    optimizers: OptimizerWatch
    model_device: torch.device | None
    ranks: Ranks
    is_training: bool

    def __call__(self, thing: object) -> None:
        self.probe.attach(thing)
        if not isinstance(thing, torch.nn.Module):
            return
        if self.ranks.world_size > 1:
            _check_not_synchronizing(thing)
        parameter = next(thing.parameters(), None)
        if parameter is None:
            return
        if self.is_training and torch.is_grad_enabled():
            self.optimizers.expected |= any(p.requires_grad for p in thing.parameters())
            self.optimizers.look_at(thing)
        if self.model_device is not None and parameter.device.type != self.model_device.type:
            raise AutobatchError(
                f"The model is on {parameter.device}, but the memory of {self.probe.name} is "
                f'measured; pass device="{parameter.device}".'
            )
