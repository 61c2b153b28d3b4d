"""A plan that is known before a search: given, or read from a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autobatch._plan import BatchPlan
from autobatch._report import TuningReport

if TYPE_CHECKING:
    from autobatch._settings import Settings


def known_plan(
    plan: BatchPlan | str | Path | None, settings: Settings, *, world_size: int | None
) -> BatchPlan | None:
    """Return the given plan, read from its report if it is a path; refuse one against `settings`.

    A `world_size` of None is not known yet.
    """
    if plan is None:
        return None
    if settings.latency_limit is not None:
        given = plan if isinstance(plan, BatchPlan) else repr(str(plan))
        raise ValueError(
            f"plan={given} is verified, and latency_limit={settings.latency_limit:g} asks "
            "for a search; give one of the two."
        )
    if isinstance(plan, (str, Path)):
        report = TuningReport.read(plan)
        if report.task != "train":
            raise ValueError(
                f"plan={str(plan)!r} is a report about {report.task}, which trains nothing; give "
                "one of a training."
            )
        plan = report.plan
    if not isinstance(plan, BatchPlan):
        raise ValueError(f"plan={plan!r} is not a plan; give a BatchPlan, or the path of a report.")
    _check_against(plan, settings, world_size)
    return plan


def _check_against(plan: BatchPlan, settings: Settings, world_size: int | None) -> None:
    counts = (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size)
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"plan={plan} must hold whole numbers of 1 or more.")
    if world_size not in (None, plan.world_size):
        raise ValueError(
            f"plan={plan} is for {plan.world_size} ranks, and this job has {world_size}."
        )
    most = settings.max_micro_batch_size
    if most is not None and plan.micro_batch_size > most:
        raise ValueError(
            f"plan={plan} has micro-batches of {plan.micro_batch_size}, and "
            f"max_micro_batch_size={most} allows no more."
        )
    target = settings.target_batch_size
    if target is not None and target != plan.effective_batch_size:
        raise ValueError(
            f"plan={plan} gives {plan.effective_batch_size} samples per update, and "
            f"target_batch_size={target} asks for another number: give one of the two."
        )
