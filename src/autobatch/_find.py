"""find(): tune any PyTorch loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._accumulation import batch_norms
from autobatch._distributed import current_ranks
from autobatch._memory.detect import detect
from autobatch._report.notes import batch_norm, ignores_accumulate, never_stepped
from autobatch._report.tradeoff import common_rule
from autobatch._settings import Settings
from autobatch._subject import Subject
from autobatch._throughput import curve
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot, restorable
from autobatch._tune import checked_search, known_plan, tune, versions
from autobatch.errors import AutobatchError
from autobatch.sinks import log, progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._search import Search
    from autobatch._trials.runner import TimeLimit

_START: Final = 8  # the first size tried where no loader names one
_WAITING: Final = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}


def find(
    workload: Callable[..., Any],
    *,
    target_batch_size: int | None = None,
    memory_limit: float | str = 0.9,
    max_micro_batch_size: int | None = None,
    plan: BatchPlan | str | Path | None = None,
    steps_per_trial: int = 3,
    time_limit: float | None = 300,
    search: Search | None = None,
    device: str | MemoryProbe | None = None,
    latency_limit: float | None = None,
    percentile: float | None = None,
    restore: Sequence[Any] = (),
    dataset_size: int | None = None,
) -> TuningReport:
    """Find the batch size that fits, how to reach the effective batch, and what it costs, for any PyTorch loop.

    Every module whose forward runs and every optimizer that steps is given back as it was, and so is the random
    state. What happens to a model before its first forward can not be seen: name the model in `restore`.

    Args:
        workload: `train(batch_size, accumulate)`, a generator function that trains at the given micro-batch size and
            yields after each optimizer step. Without the parameter `accumulate`, plans of one micro-batch per update
            are possible only. A plain function that runs one step will do as well. It may yield how many samples
            its last micro-batch had. In a `torch.distributed` job every rank calls `find`, and the workload runs
            the model itself, not its DistributedDataParallel.
        target_batch_size: Samples per optimizer update, over all ranks. None: the largest micro-batch that fits.
        memory_limit: A float up to 1.0 is a share of the device, less what others hold. An int is bytes, and so is
            text such as "10GiB": what this process may hold, if others leave that much.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a search.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit. Timing sizes
            has up to 20 seconds of its own.
        search: Which size to try next; `GuidedBisection()` unless told otherwise.
        device: Where memory is read: a name such as "cuda:1", or a probe. None: where the model is.
        latency_limit: For inference: seconds within which a batch has to be answered. The workload then is
            `answer(batch_size)`, a function that answers one batch, or a generator function that yields after each;
            its calls are timed one by one, and the largest batch that is answered in time is taken.
        percentile: So many percent of the calls have to be answered in time; None: 99. Only with `latency_limit`.
        restore: Further objects to give back as they were: schedulers, scalers, generators, anything with
            `state_dict` and `load_state_dict`.
        dataset_size: Samples per epoch; bounds the search and gives updates per epoch.

    Returns:
        The report: `report.plan`, `report.trials`, `report.budget`; `print(report)` shows it all.

    Raises:
        ValueError: An argument is not what it should be, or the workload can not do what the plan needs.
        DoesNotFitError: Not even one sample fits the budget, or is answered within `latency_limit`.
        ShortTrialError: The workload ended before a trial was through.
        ProbeError: The device can not be read.

    Example:
        >>> import autobatch
        >>> from autobatch.testing import PaperDevice
        >>> paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)
        >>> report = autobatch.find(paper.workload, device=paper, target_batch_size=1024)
        >>> report.plan
        BatchPlan(micro_batch_size=256, accumulate_grad_batches=4, world_size=1)
    """
    loop = _Loop.checked(workload)
    settings = Settings.checked(
        target_batch_size=target_batch_size,
        memory_limit=memory_limit,
        max_micro_batch_size=max_micro_batch_size,
        steps_per_trial=steps_per_trial,
        time_limit=time_limit,
        dataset_size=dataset_size,
        latency_limit=latency_limit,
        percentile=percentile,
    )
    things = _restorable(restore)
    home = _home_of(workload, things)
    probe = detect(device, home)
    job = Subject(
        workload=loop.run,
        can_accumulate=loop.takes_accumulate,
        start=_START,
        accumulate=1,
        before=None,
        samples_trained=None,
        update_at_most=dataset_size,
        last_samples=None,
        remarks=None,
        doubts=None,
        look=None,
        curve_seconds=curve.SECONDS,
        learning_rate=None,
        task="train" if latency_limit is None else "answer",
        subject=loop.name,
        environment=versions(),
    )
    with (
        current_ranks() as ranks,
        ranks.abort_together(),
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        progress() as shown,
    ):
        touched = partial(
            _touched,
            probe=probe,
            optimizers=optimizers,
            home=None if device else home,
            ranks=ranks,
            trains=latency_limit is None,
        )
        trainable = _trainable(workload)
        if ranks.world_size > 1:
            _check_waits_for_none(*trainable)
        snapshot.capture(*things, *trainable)
        if latency_limit is None:
            optimizers.look_at(*things, *trainable)
        with snapshot.at_first_step(touched):
            report = tune(
                replace(
                    job,
                    last_samples=partial(_last_samples, dataset_size, ranks),
                    remarks=partial(_remarks, snapshot),
                    doubts=partial(_doubts, optimizers),
                    learning_rate=partial(_rule, snapshot),
                ),
                settings,
                known=known_plan(plan, settings, world_size=ranks.world_size),
                probe=probe,
                search=checked_search(search),
                snapshot=snapshot,
                optimizers=optimizers,
                first_touch=partial(snapshot.at_first_forward, touched),
                shown=shown,
                ranks=ranks,
            )
    if ranks.rank == 0:
        log(report)
    return report


@dataclass(frozen=True, slots=True)
class _Loop:
    """A user's function, whichever of the accepted forms it has."""

    function: Callable[..., Any]
    takes_accumulate: bool

    @classmethod
    def checked(cls, function: Callable[..., Any]) -> _Loop:
        if isinstance(function, torch.nn.Module) or not callable(function):
            raise ValueError(
                f"workload={type(function).__name__} is no training loop; give a function of the batch size."
            )
        called = getattr(function, "__call__", None)  # noqa: B004 -- of an object
        inner = function.func if isinstance(function, partial) else function
        if any(map(_is_asynchronous, (inner, called))):
            raise ValueError(
                f"workload={cls(inner, False).name} is asynchronous; give a plain function or generator function."
            )
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins do not tell
            return cls(function, takes_accumulate=False)
        loop = cls(function, "accumulate" in signature.parameters)
        try:
            signature.bind(1, **loop.options(1))
        except TypeError as error:
            raise ValueError(
                f"workload={loop.name} can not be called as train(batch_size) or train(batch_size, accumulate): {error}."
            ) from None
        return loop

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def options(self, accumulate: int) -> dict[str, int]:
        return {"accumulate": accumulate} if self.takes_accumulate else {}

    def run(self, batch_size: int, accumulate: int) -> Iterator[Any]:
        """One start of it: a generator's steps, or a plain function over and over, one step each time."""
        while True:
            result = self.function(batch_size, **self.options(accumulate))
            if isinstance(result, Iterator):
                yield from result
                return
            yield None


def _is_asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _restorable(restore: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(restore, (list, tuple)):
        raise ValueError(f"restore={type(restore).__name__} is not a list; write restore=[…].")
    for thing in restore:
        if not restorable(thing):
            raise ValueError(
                f"restore holds a {type(thing).__name__}, which has no state_dict and load_state_dict; leave it out, "
                "or give an object that has them."
            )
    return restore


def _trainable(workload: Callable[..., Any]) -> list[Any]:
    """Models and optimizers in sight of the workload: captured now, before it does anything to them."""
    kinds = (torch.nn.Module, torch.optim.Optimizer)
    return [thing for thing in _reachable(workload) if isinstance(thing, kinds)]


def _remarks(snapshot: Snapshot, plan: BatchPlan, _: TimeLimit) -> tuple[str, ...]:
    """What its layers do with a plan; a model that a workload makes for itself is gone by now."""
    return batch_norm(batch_norms(snapshot.alive), plan)


def _doubts(optimizers: OptimizerWatch, plan: BatchPlan) -> tuple[str, ...]:
    """What its updates lack."""
    told = (
        never_stepped() if optimizers.never_stepped else None,
        ignores_accumulate(plan) if optimizers.steps_every_pass else None,
    )
    return tuple(note for note in told if note)


def _last_samples(dataset_size: int | None, ranks: Ranks, batch_size: int) -> int | None:
    """What is left for the last micro-batch of an epoch; how it is dealt out among ranks is the loop's affair."""
    if dataset_size is None or ranks.world_size > 1:
        return None
    return dataset_size % batch_size or batch_size


def _rule(snapshot: Snapshot) -> LearningRateRule | None:
    """That of the optimizers that have stepped, as far as they live."""
    return common_rule(
        thing for thing in snapshot.alive if isinstance(thing, torch.optim.Optimizer)
    )


def _home_of(workload: Callable[..., Any], things: Sequence[Any]) -> torch.device:
    """Where the model is, as far as the workload shows one; else CUDA where there is any."""
    for thing in (*things, *_reachable(workload)):
        if isinstance(thing, torch.nn.Module):
            parameter = next(thing.parameters(), None)
            if parameter is not None:
                return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _reachable(workload: Callable[..., Any]) -> list[Any]:
    """What the function's own variables hold: closures, globals, and the object it is a method of."""
    inner = workload.func if isinstance(workload, partial) else workload
    function = inspect.unwrap(inner)
    owner = getattr(function, "__self__", None)
    try:
        names = inspect.getclosurevars(getattr(function, "__func__", function))
    except (TypeError, ValueError):  # not a python function, or a variable yet to come
        return [owner, *getattr(workload, "__dict__", {}).values()]
    given = (*workload.args, *workload.keywords.values()) if isinstance(workload, partial) else ()
    own = [value for each in (owner, workload) for value in getattr(each, "__dict__", {}).values()]
    return [*names.nonlocals.values(), *names.globals.values(), *given, *own]


def _check_waits_for_none(*things: Any) -> None:
    """A step that waits for other ranks would wait for ever where one of them is out of memory."""
    for kind in (kind for thing in things for kind in type(thing).__mro__):
        if kind.__name__ in _WAITING:
            raise AutobatchError(
                f"The workload runs a {kind.__name__}, whose steps wait for other ranks, also for one that is out of "
                "memory; let it run the model that this wraps."
            )


def _touched(
    thing: object,
    probe: MemoryProbe,
    optimizers: OptimizerWatch,
    home: torch.device | None,
    ranks: Ranks,
    *,
    trains: bool,
) -> None:
    """A module or an optimizer shows itself for the first time."""
    probe.attach(thing)
    if not isinstance(thing, torch.nn.Module):
        return
    if ranks.world_size > 1:
        _check_waits_for_none(thing)
    parameter = next(thing.parameters(), None)
    if parameter is None:
        return
    if trains and torch.is_grad_enabled():
        optimizers.expected |= any(p.requires_grad for p in thing.parameters())
        optimizers.look_at(thing)
    if home is not None and parameter.device.type != home.type:
        raise ValueError(
            f"The model is on {parameter.device}, while the memory of {probe.name} is watched; pass "
            f'device="{parameter.device}".'
        )
