"""What both doors check before they tune, and tell of where they are."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autobatch._plan import BatchPlan
from autobatch._report import TuningReport
from autobatch._search import GuidedBisection

if TYPE_CHECKING:
    from autobatch._search import Search
    from autobatch._settings import Settings

__all__ = ["checked_search", "known_plan", "versions"]


def known_plan(
    plan: BatchPlan | str | Path | None, settings: Settings, *, world_size: int | None
) -> BatchPlan | None:
    """The plan that was given, read from its report where a path was; refused where it says something else than asked.

    A `world_size` of None is one that is not known yet.
    """
    if plan is None:
        return None
    if settings.latency_limit is not None:
        raise ValueError(
            f"plan={str(plan)!r} is verified, and latency_limit={settings.latency_limit:g} asks for a search; give one "
            "of the two."
        )
    if isinstance(plan, (str, Path)):
        report = TuningReport.read(plan)
        if report.task != "train":
            raise ValueError(
                f"plan={str(plan)!r} is a report about {report.task}, which trains nothing; give one of a training."
            )
        plan = report.plan
    if not isinstance(plan, BatchPlan):
        raise ValueError(
            f"plan={plan!r} is not a plan; give a BatchPlan, or the path of a report."
        )
    counts = (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size)
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"plan={plan} must hold whole numbers of 1 or more.")
    if world_size not in (None, plan.world_size):
        raise ValueError(
            f"plan={plan} is for {plan.world_size} ranks, and {world_size} train here."
        )
    most = settings.max_micro_batch_size
    if most is not None and plan.micro_batch_size > most:
        raise ValueError(
            f"plan={plan} has micro-batches of {plan.micro_batch_size}, and max_micro_batch_size={most} allows no more."
        )
    asked = settings.target_batch_size
    if asked is not None and asked != plan.effective_batch_size:
        raise ValueError(
            f"plan={plan} gives {plan.effective_batch_size} samples per update, and target_batch_size={asked} asks "
            "for another number: give one of the two."
        )
    return plan


def checked_search(search: Search | None) -> Search:
    """The search that was asked for, or the default one; refused where it can not propose."""
    if search is None:
        return GuidedBisection()
    if isinstance(search, type) or not callable(getattr(search, "propose", None)):
        raise ValueError(
            f"search={search!r} can not propose sizes; give an object such as Bisection()."
        )
    return search


def versions() -> dict[str, str]:
    """What a reader of the report may want to know about where it was made."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**found, "cuda": torch.version.cuda} if torch.version.cuda else found
