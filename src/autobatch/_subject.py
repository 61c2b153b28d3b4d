"""Subject: what is being tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._report.result import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._trials.time_limit import TimeLimit
    from autobatch._trials.workload import Workload


class Subject(Protocol):
    """A workload to tune: a plain loop, a Lightning fit, or a Lightning evaluation.

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

    def planned_seconds(self, sample_seconds: float) -> float | None:
        """Return the seconds of all steps to come on a rank, at the seconds of one sample."""

    def has_batch_norm(self) -> bool:
        """Return True if the model is trained with the statistics of each micro-batch."""

    def trial_notes(self, plan: BatchPlan) -> tuple[str, ...]:
        """Return notes on differences between the trials and training with a plan."""

    def plan_notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:
        """Return notes on a plan; measure for them only as far as there is time."""
