"""Subject: what is being tuned, and a plain loop as one."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from autobatch._accumulation import batch_norms
from autobatch._report.accumulation_notes import (
    batch_norm,
    ignores_accumulate,
    never_stepped,
    stays_changed,
)
from autobatch._report.tradeoff import common_rule

if TYPE_CHECKING:
    from autobatch._memory.estimate.tracer import TrainingStep
    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._report.result import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._settings import Settings
    from autobatch._trials.context import TrialContext
    from autobatch._trials.reachable import Watched
    from autobatch._trials.time_limit import TimeLimit
    from autobatch._trials.workload import Workload


class Subject(Protocol):
    """A workload to tune: a plain loop, or training or evaluation in a Trainer.

    Methods are called only after trials have run, properties at any time.
    """

    @property
    def workload(self) -> Workload:
        """Generator function that yields after every optimizer step, or answered batch."""

    @property
    def task(self) -> Task:
        """The use of the batches: "train", or a kind of inference."""

    @property
    def name(self) -> str:
        """Name for the report."""

    @property
    def environment(self) -> dict[str, str]:
        """Versions for the report."""

    @property
    def start_batch_size(self) -> int:
        """The first batch size to try."""

    @property
    def own_batch_size(self) -> int | None:
        """The user's own batch size; None if it is not known."""

    @property
    def can_accumulate(self) -> bool:
        """True if the workload can accumulate gradients."""

    @property
    def accumulate(self) -> int:
        """Micro-batches per update without a target."""

    @property
    def max_samples_per_update(self) -> int | None:
        """Samples of an epoch, which no update exceeds; None: no limit."""

    @property
    def previous_plan(self) -> BatchPlan | None:
        """The plan that was trained with until now; None if that is not known."""

    def samples_per_epoch(self, plan: BatchPlan) -> int | None:
        """Return the samples that an epoch trains on with a plan; None if that is not known."""

    def last_micro_batch(self, batch_size: int) -> int | None:
        """Return the samples in the last micro-batch of each rank in an epoch; None: not known."""

    def learning_rate_rule(self) -> LearningRateRule | None:
        """Return how the learning rate scales with the batch; None if no rule is known."""

    def largest_samples(self) -> Look | None:
        """Return how many samples were scanned for the largest ones; None if none were."""

    def traceable_step(self, accumulate: int) -> TrainingStep | None:
        """Return the step to predict memory of, with so many micro-batches; None if it is opaque.

        Raises:
            UntraceableError: The step does what a trace cannot follow.
        """

    def planned_seconds(self, sample_seconds: float) -> float | None:
        """Return the seconds of all steps to come on a rank, at the seconds of one sample."""

    def has_batch_norm(self) -> bool:
        """Return True if the model is trained with the statistics of each micro-batch."""

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        """Return notes on differences between the trials and training with a plan."""

    def plan_notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:
        """Return notes on a plan; measure for them only as far as there is time."""


class NotedSubject(Subject, Protocol):
    """A subject, by a dataclass, whose report begins with a note on a plan that was known."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def first_note(self) -> str | None:
        """The note; None if there is none."""


class Inference:
    """The part of a subject that is the same for every evaluation in a Trainer."""

    __slots__ = ()

    can_accumulate: ClassVar = False
    accumulate: ClassVar = 1
    max_samples_per_update: ClassVar = None
    previous_plan: ClassVar = None

    def last_micro_batch(self, batch_size: int) -> int | None:  # noqa: ARG002
        return None

    def learning_rate_rule(self) -> LearningRateRule | None:
        return None

    def traceable_step(self, accumulate: int) -> None:
        """Return None: an evaluation has no training step."""

    def has_batch_norm(self) -> bool:
        return False

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:  # noqa: ARG002
        return ()


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
        if samples is None or self.context.ranks.replicas > 1:
            return None
        return samples % batch_size or batch_size

    def learning_rate_rule(self) -> LearningRateRule | None:
        """Return the rule of the optimizers that have stepped and are still alive."""
        alive = self.context.snapshot.alive
        return common_rule([thing for thing in alive if isinstance(thing, torch.optim.Optimizer)])

    def largest_samples(self) -> Look | None:
        """Return None: the loop makes its own batches."""
        return None

    def traceable_step(self, accumulate: int) -> TrainingStep | None:  # noqa: ARG002
        """Return None: the loop makes tensors and takes steps in its own way."""
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


def own_version() -> str:
    """Return the version of autobatch; "not installed" where only its sources are on the path."""
    try:
        return version("lightning-autobatch")
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and CUDA, for the report."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**found, "cuda": torch.version.cuda} if torch.version.cuda else found
