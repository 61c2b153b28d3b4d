"""A plan that is known before a search: given, read from a report, or of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch._plan import BatchPlan
from autobatch._report import TuningReport
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._settings import Settings
    from autobatch.errors import DoesNotFitError


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """A plan to verify before a search, or instead of one."""

    plan: BatchPlan | None = None  # to verify by one trial; None: search at once
    # Samples per update that a search has to reach; None: those of the settings
    effective_batch_size: int | None = None
    # The error if the plan does not fit and no other plan may be trained; None: search
    refusal: str | None = None
    note: str | None = None  # the note in the report; None: the plan is the user's own

    @classmethod
    def resumed(cls, plan: BatchPlan) -> PriorPlan:
        """Return the plan of a checkpoint between epochs, to verify."""
        note = "Resumed: one trial verified the checkpoint's plan."
        return cls(plan, effective_batch_size=plan.effective_batch_size, note=note)

    @classmethod
    def tuned_again(cls, plan: BatchPlan, place: str) -> PriorPlan:
        """Return the request for a search, for the update of a checkpoint from another place."""
        effective = plan.effective_batch_size
        note = (
            f"Tuned again for the checkpoint's effective batch of {effective:,}: it was trained "
            f"with {in_words(plan)}{place}."
        )
        return cls(effective_batch_size=effective, note=note)

    def applied_to(self, settings: Settings, world_size: int) -> Settings:
        """Return the settings to tune with; refuse a plan of the user that they exclude."""
        if self.plan is not None and self.note is None:
            check_against(self.plan, settings, world_size)
        if self.plan is not None or self.effective_batch_size is None:
            return settings
        return settings.model_copy(update={"target_batch_size": self.effective_batch_size})

    def after(self, failure: DoesNotFitError) -> PriorPlan:
        """Return the request for a search, after a trial in which the plan did not fit."""
        if self.refusal is not None:
            raise AutobatchError(self.refusal) from failure
        if self.plan is None or self.note is None:
            raise failure
        note = (
            f"Searched again, since a micro-batch of {self.plan.micro_batch_size:,} does not fit "
            "any more."
        )
        return PriorPlan(effective_batch_size=self.effective_batch_size, note=note)


def known_plan(plan: BatchPlan | str | Path | None, settings: Settings) -> BatchPlan | None:
    """Return the given plan, from its report if it is a path; refuse one that settings exclude."""
    if plan is None:
        return None
    if settings.latency_limit is not None:
        given = plan if isinstance(plan, BatchPlan) else repr(str(plan))
        raise ValueError(
            f"plan={given} is verified, and latency_limit={settings.latency_limit:g} asks "
            "for a search; give one of the two."
        )
    if plan == "keep":
        raise ValueError(
            "plan='keep' is for AutoBatch alone, which can leave the batch size as it is; give a "
            "BatchPlan, or the path of a report."
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
    check_against(plan, settings, None)
    return plan


def in_words(plan: BatchPlan) -> str:
    """Return the micro-batches of an update, for a sentence."""
    return f"micro-batches of {plan.micro_batch_size:,} × {plan.accumulate_grad_batches:,}"


def other_update(effective: int, asked: str) -> AutobatchError:
    """Return the error of a resumed run that asks for another effective batch size."""
    return AutobatchError(
        f"The checkpoint was trained with {effective} samples per update, and {asked}: a resumed "
        "run goes on with its plan."
    )


def check_against(plan: BatchPlan, settings: Settings, world_size: int | None) -> None:
    """Refuse a plan that the settings, or the number of ranks, exclude; None: not known yet."""
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
