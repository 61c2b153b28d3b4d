"""Plans known from a checkpoint or the previous fit."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from autobatch._plan import BatchPlan
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._report import TuningReport
    from autobatch._settings import Settings
    from autobatch._subject import Subject


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """What to verify before a search, or instead of one.

    Args:
        plan: A plan to verify by one trial; None: search at once.
        target: The effective batch a search has to reach; None: what the user asked for.
        refusal: What a person is told where the plan does not fit and nothing else may be trained; None: search.
        note: What the report says of it.
    """

    plan: BatchPlan | None = None
    target: int | None = None
    refusal: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceId:
    """The device a run trains on, as far as a plan depends on it."""

    device: str
    total: int  # bytes
    world_size: int

    @classmethod
    def of(cls, name: str, total: int, world_size: int) -> DeviceId:
        """Another device of the same make will do: its index is left out."""
        return cls(re.sub(r" \(cuda:\d+\)$", "", name), total, world_size)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint tells of the run that goes on from it.

    Args:
        between_epochs: Whether no epoch is left half done.
        plan: What it was trained with; None where it was trained without AutoBatch.
        target: The effective batch that was asked for.
        device: Where that was; None where an older version of autobatch wrote it.
        total: Bytes of that device.
    """

    between_epochs: bool
    plan: BatchPlan | None = None
    target: int | None = None
    device: str | None = None
    total: int | None = None

    @classmethod
    def of(cls, checkpoint: dict[str, Any], *, max_steps: int) -> Checkpoint:
        """Read the progress of Lightning 2.6's loops, by the rule by which its `_FitLoop` goes on with an epoch.

        A run that counts steps goes on with the last epoch even where that was finished.
        """
        loops = checkpoint.get("loops") or {}
        progress = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current")
        if progress is None or max_steps != -1:
            return cls(between_epochs=False)
        ready, started = progress["ready"], progress["started"]
        return cls(between_epochs=ready == started == progress["processed"])

    def with_state(self, state: dict[str, Any]) -> Checkpoint:
        """Add what `state_of` wrote, as far as that is there."""
        plan = BatchPlan(
            state["micro_batch_size"],
            state["accumulate_grad_batches"],
            state["world_size"],
        )
        return replace(
            self,
            plan=plan,
            target=state.get("target_batch_size", plan.effective_batch_size),
            device=state.get("device"),
            total=state.get("device_bytes"),
        )

    @staticmethod
    def state_of(report: TuningReport) -> dict[str, Any]:
        """The plan and where it was verified, in plain numbers and text: it travels in the checkpoint."""
        here = _here(report)
        return {
            **asdict(report.plan),
            "target_batch_size": report.settings.target_batch_size,
            "device": here.device,
            "device_bytes": here.total,
        }

    def check_target(self, settings: Settings) -> None:
        """Refuse an effective batch that is not the one it was trained with."""
        target = settings.target_batch_size
        if target is None or self.plan is None:
            return
        effective = self.plan.effective_batch_size
        if target not in (effective, self.target):
            raise AutobatchError(
                f"The checkpoint was trained with {effective} samples per update, and "
                f"target_batch_size={target} asks for another number: a resumed run goes on with its plan."
            )

    def was_on(self, here: DeviceId) -> bool:
        """Whether it was trained on such a device; where it does not say, one trial will."""
        if self.plan is None or self.plan.world_size != here.world_size:
            return False
        return self.device is None or (self.device, self.total) == (
            here.device,
            here.total,
        )


def known_at_start(
    own: BatchPlan | None,
    checkpoint: Checkpoint | None,
    last: TuningReport | None,
    job: Subject,
    here: DeviceId,
    settings: Settings,
) -> PriorPlan:
    """What is known when a fit starts: the checkpoint's plan before the user's own, and that before the last fit's."""
    if checkpoint is not None and (own is None or checkpoint.plan is not None):
        return _of_checkpoint(checkpoint, here, settings)
    if own is not None:
        return PriorPlan(own)
    return _of_last_fit(last, job, here, settings)


def _of_checkpoint(checkpoint: Checkpoint, here: DeviceId, settings: Settings) -> PriorPlan:
    """What a resumed run goes on with: its plan, or another of the same effective batch where that may be."""
    plan = checkpoint.plan
    if plan is None:
        return PriorPlan(
            note="The checkpoint was trained without AutoBatch: its batch size is not known."
        )
    effective = plan.effective_batch_size
    if not checkpoint.between_epochs:
        return _kept(plan, here)
    if not checkpoint.was_on(here) or not _allowed(plan, settings):
        return PriorPlan(
            target=effective,
            note=f"Tuned anew for the checkpoint's effective batch of {effective:,}: it was trained with "
            f"{_told(plan)}{_where(checkpoint, here)}.",
        )
    return PriorPlan(
        plan,
        target=effective,
        note="Resumed: one trial verified the checkpoint's plan.",
    )


def _of_last_fit(
    report: TuningReport | None, job: Subject, here: DeviceId, settings: Settings
) -> PriorPlan:
    """The plan of the fit before, where that was asked the same about the same kind of module, data and device."""
    if report is None:
        return PriorPlan()
    same = report.subject == job.name and report.settings == settings and _here(report) == here
    kept = (
        settings.target_batch_size is not None
        or report.plan.accumulate_grad_batches == job.accumulate
    )
    if not same or not kept:
        return PriorPlan()
    return PriorPlan(report.plan, note="One trial verified the plan that was found before.")


def _kept(plan: BatchPlan, here: DeviceId) -> PriorPlan:
    refusal = (
        f"The checkpoint was written within an epoch, which can only be finished with {_told(plan)}, and on "
        f"{here.world_size} × {here.device} that does not fit"
    )
    way_out = (
        "Free memory on the device, raise memory_limit, or resume from a checkpoint that was written between epochs "
        "(of a Trainer without max_steps)."
    )
    if plan.world_size != here.world_size:
        raise AutobatchError(f"{refusal}: it was trained on {plan.world_size}. {way_out}")
    return PriorPlan(
        plan,
        refusal=f"{refusal}. {way_out}",
        note="Resumed within an epoch: one trial verified the checkpoint's plan.",
    )


def _here(report: TuningReport) -> DeviceId:
    device = report.device
    return DeviceId.of(device.name, device.total, report.plan.world_size)


def _allowed(plan: BatchPlan, settings: Settings) -> bool:
    bounds = (settings.max_micro_batch_size, settings.dataset_size)
    return all(bound is None or plan.micro_batch_size <= bound for bound in bounds)


def _told(plan: BatchPlan) -> str:
    return f"micro-batches of {plan.micro_batch_size:,} × {plan.accumulate_grad_batches:,}"


def _where(checkpoint: Checkpoint, here: DeviceId) -> str:
    if checkpoint.was_on(here) or checkpoint.plan is None:
        return ""
    device = checkpoint.device or here.device
    return f" on {checkpoint.plan.world_size} × {device}"
