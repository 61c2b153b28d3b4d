"""Subject: what is being tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._plan import BatchPlan
    from autobatch._report import Task
    from autobatch._report.notes import Look
    from autobatch._report.tradeoff import LearningRateRule
    from autobatch._trials.runner import TimeLimit
    from autobatch._trials.workload import Workload


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing to be tuned.

    Args:
        workload: A training loop that yields after every optimizer step.
        can_accumulate: Whether it takes an accumulation.
        start: The first size to try.
        accumulate: The accumulation that stays where no target is asked for.
        before: What was trained with until now, where that is known.
        samples_trained: Samples that an epoch trains on with a plan, where it is not the whole data set.
        update_at_most: Samples that one update can have, where it can not go on into the next epoch.
        last_samples: Samples in the last micro-batch that each rank trains on in an epoch, at a size.
        remarks: What a person should be told of a plan besides, where there may be something; given the time left
            to find out.
        doubts: What trials have shown that makes them another thing than training with a plan, asked once they have run.
        task: What a report says is done with the batches.
        subject: What a report calls it.
        environment: Versions, for the report.
        look: How far was looked for the largest samples, asked once trials have run.
        curve_seconds: The most that timing the speed curve may take; 0 for none.
        learning_rate: How the learning rate of its optimizer goes with the batch, asked once trials have run.
    """

    workload: Workload
    can_accumulate: bool
    start: int
    accumulate: int
    before: BatchPlan | None
    samples_trained: Callable[[BatchPlan], int | None] | None
    update_at_most: int | None
    last_samples: Callable[[int], int | None] | None
    remarks: Callable[[BatchPlan, TimeLimit], tuple[str, ...]] | None
    doubts: Callable[[BatchPlan], tuple[str, ...]] | None
    task: Task
    subject: str
    environment: dict[str, str]
    look: Callable[[], Look | None] | None
    curve_seconds: float
    learning_rate: Callable[[], LearningRateRule | None] | None
