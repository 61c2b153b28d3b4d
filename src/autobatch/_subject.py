"""Subject: what is being tuned, and a plain loop as one."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

import torch

from autobatch._accumulation import batch_norms
from autobatch._report.accumulation_notes import (
    batch_norm,
    ignores_accumulate,
    never_stepped,
    stays_changed,
)
from autobatch._report.result import SubjectNotes
from autobatch._report.tradeoff import common_rule

if TYPE_CHECKING:
    from autobatch._memory.estimate.tracer import TrainingStep
    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._report.result import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._settings import Settings
    from autobatch._trials.context import TrialContext
    from autobatch._trials.time_limit import TimeLimit
    from autobatch._trials.watched import Watched
    from autobatch._trials.workload import Workload


@dataclass(frozen=True, slots=True)
class Baseline:
    """Batch size and accumulation of the user, before tuning."""

    start_batch_size: int  # the first size to try
    own_batch_size: int | None = None  # the user's own; None if it is not known
    can_accumulate: bool = False
    accumulate: int = 1  # micro-batches per update without a target
    max_samples_per_update: int | None = None  # those of an epoch; None: no limit
    plan: BatchPlan | None = None  # trained with until now; None if it is not known


@dataclass(frozen=True, slots=True)
class Description:
    """Facts about a subject for the report."""

    name: str
    environment: dict[str, str]  # versions, by name
    learning_rate: LearningRateRule | None = None  # None if no rule is known
    look: Look | None = None  # samples scanned for the largest ones; None if none were


class Subject(Protocol):
    """A workload to tune: a plain loop, or training or evaluation in a Trainer.

    Properties and `describe` are called at any time, other methods only after a trial.
    """

    @property
    def workload(self) -> Workload:
        """Generator function that yields after every optimizer step, or answered batch."""

    @property
    def task(self) -> Task:
        """The use of the batches: "train", or a kind of inference."""

    @property
    def baseline(self) -> Baseline:
        """Batch size and accumulation before tuning."""

    def describe(self) -> Description:
        """Return facts for the report."""

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        """Return the samples that an epoch trains on with a plan; None if that is not known."""

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the samples in the last micro-batch of each rank in an epoch; None: not known."""

    def planned_seconds(self, sample_seconds: float) -> float | None:
        """Return the seconds of all steps to come on a rank, at the seconds of one sample."""

    def has_batch_norm(self) -> bool:
        """Return True if the model is trained with the statistics of each micro-batch."""

    def traceable_step(self, accumulate: int) -> TrainingStep | None:
        """Return the step to predict memory of, with so many micro-batches; None if it is opaque.

        Raises:
            UntraceableError: The step does what a trace cannot follow.
        """

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:
        """Return notes on a plan; measure for them only as far as there is time."""


class Inference:
    """The part of a subject that is the same for every evaluation in a Trainer."""

    __slots__ = ()

    def last_micro_batch(self, batch_size: int) -> int | None:  # noqa: ARG002
        return None

    def has_batch_norm(self) -> bool:
        return False

    def traceable_step(self, accumulate: int) -> None:
        """Return None: an evaluation has no training step."""

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:  # noqa: ARG002
        return SubjectNotes()


@dataclass(frozen=True, slots=True)
class PlainLoop:
    """A training loop, or a function that answers a batch, as the subject of a tuning run."""

    function: Callable[..., Any]  # of the user, in any of the accepted forms
    can_accumulate: bool  # it has a parameter `accumulate`
    settings: Settings
    context: TrialContext
    watched: Watched  # variables of the user that are not restored

    @property
    def task(self) -> Task:
        return "train" if self.settings.latency_limit is None else "answer"

    @property
    def baseline(self) -> Baseline:
        return Baseline(
            start_batch_size=8,
            can_accumulate=self.can_accumulate,
            max_samples_per_update=self.settings.dataset_size,
        )

    def describe(self) -> Description:
        """Return the rule of the optimizers that have stepped and are still alive, and versions."""
        alive = self.context.snapshot.alive
        optimizers = [thing for thing in alive if isinstance(thing, torch.optim.Optimizer)]
        return Description(_name_of(self.function), versions(), common_rule(optimizers))

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
        if samples is None or self.context.ranks.replicas > 1:
            return None
        return samples % batch_size or batch_size

    def traceable_step(self, accumulate: int) -> TrainingStep | None:  # noqa: ARG002
        """Return None: the loop makes tensors and takes steps in its own way."""
        return None

    def planned_seconds(self, sample_seconds: float) -> float | None:  # noqa: ARG002
        """Return None: the loop ends when it likes."""
        return None

    def has_batch_norm(self) -> bool:
        return self.task == "train" and bool(batch_norms(self.context.snapshot.alive))

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> SubjectNotes:  # noqa: ARG002
        """Return notes on what stays changed, missing steps or accumulation, and BatchNorm.

        A model that the workload makes itself is gone by now.
        """
        optimizers, snapshot = self.context.optimizers, self.context.snapshot
        changed = sorted({*self.watched.changed(), *snapshot.unrestored})
        found = (
            stays_changed(changed) if changed else None,
            never_stepped() if optimizers.never_stepped else None,
            ignores_accumulate(plan) if optimizers.steps_every_pass else None,
        )
        of_trials = tuple(note for note in found if note)
        return SubjectNotes(of_trials, batch_norm(batch_norms(snapshot.alive), plan))


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


def version_of(package: str) -> str:
    """Return a version; "not installed", also where only the sources are on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and CUDA, for the report."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**found, "cuda": torch.version.cuda} if torch.version.cuda else found
