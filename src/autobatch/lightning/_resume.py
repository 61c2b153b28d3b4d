"""Plans known from a checkpoint or the previous fit."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from torch.nn.parameter import is_lazy

from autobatch._loaders.epochs import samples_of
from autobatch._memory import format_bytes
from autobatch._plan import BatchPlan
from autobatch._prior_plan import PriorPlan, in_words, other_update
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import data_parallel_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from autobatch._report import TuningReport
    from autobatch._settings import Settings
    from autobatch.lightning._resources import Tuned
    from autobatch.lightning._subjects import LightningTraining
    from autobatch.lightning._trainer import Trainer


_COUNTS: Final = ("micro_batch_size", "accumulate_grad_batches", "world_size")  # of a plan
_MOST: Final = 2**31  # of each


def fingerprint_of(job: LightningTraining) -> str:
    """Return a digest of model, optimizers, precision and data, as far as memory depends on them.

    Training changes the values of parameters and buffers, but not their shapes. With several ranks,
    all have to be as they were.
    """
    digest = hashlib.sha256()
    for line in _description(job):
        digest.update(f"{line}\n".encode())
    return " ".join(job.resources.context.ranks.gather(digest.hexdigest()))


def _description(job: LightningTraining) -> Iterator[object]:
    yield job.describe().name
    yield job.module  # printed with the settings of its layers, such as strides
    tensors: Iterator[tuple[str, torch.Tensor]] = chain(
        job.module.named_parameters(), job.module.named_buffers()
    )
    for name, tensor in tensors:
        shape = None if is_lazy(tensor) else tuple(tensor.shape)
        yield name, shape, tensor.dtype, tensor.requires_grad
    for loader, batch_size in zip(job.loaders.each, job.loaders.own_sizes, strict=True):
        yield type(loader), type(loader.dataset), samples_of(loader, 1), batch_size
    yield job.resources.samples.bytes_each


@dataclass(frozen=True, slots=True)
class DeviceId:
    """The device a run trains on, as far as a plan depends on it."""

    device: str
    total: int  # bytes
    world_size: int

    @classmethod
    def of(cls, name: str, total: int, world_size: int) -> DeviceId:
        """Return the device without its index: devices of one model are equivalent."""
        return cls(re.sub(r" \(cuda:\d+\)$", "", name), total, world_size)

    def beside(self, here: DeviceId) -> str:
        """Return its name, with the memory of both devices if they differ in nothing else."""
        if self.device != here.device or self.total == here.total:
            return self.device
        before, now = format_bytes(self.total), format_bytes(here.total)
        return f"{self.device} of {before}, and this one has {now}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, as far as a resumed run depends on it."""

    between_epochs: bool  # True if no epoch is unfinished
    # The plan it was trained with; None if it was trained without AutoBatch
    plan: BatchPlan | None = None
    target: int | None = None  # the effective batch size of the settings
    # None if an older version of autobatch wrote the checkpoint
    trained_on: DeviceId | None = None
    kept: BatchPlan | None = None  # the numbers of a run with plan="keep"

    @classmethod
    def of(cls, checkpoint: dict[str, Any], *, max_steps: int) -> Checkpoint:
        """Read the progress of the loops as `_FitLoop` of Lightning 2.6 does.

        A run with `max_steps` resumes the last epoch even if that was finished.
        """
        loops = checkpoint.get("loops") or {}
        progress = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current")
        if progress is None or max_steps != -1:
            return cls(between_epochs=False)
        ready, started = progress["ready"], progress["started"]
        return cls(between_epochs=ready == started == progress["processed"])

    def with_state(self, state: dict[str, Any]) -> Checkpoint:
        """Add the values that `state_of` or `state_of_kept` wrote; older versions wrote fewer.

        Raises:
            AutobatchError: The checkpoint holds a plan that no run can have.
        """
        source = state["kept"] if isinstance(state.get("kept"), dict) else state
        counts: dict[str, Any] = {name: source.get(name) for name in _COUNTS}
        for name, count in counts.items():
            if type(count) is not int or not 1 <= count <= _MOST:
                raise AutobatchError(
                    f"The plan of AutoBatch in the checkpoint is broken: {name}={count!r} is no "
                    "count. Resume from another checkpoint, or train without AutoBatch."
                )
        plan = BatchPlan(**counts)
        if "kept" in state:
            return replace(self, kept=plan)
        target = state.get("target_batch_size", plan.effective_batch_size)
        device, total, trained_on = state.get("device"), state.get("device_bytes"), None
        if isinstance(device, str) and isinstance(total, int):
            trained_on = DeviceId(device, total, plan.world_size)
        target = target if type(target) is int else None
        return replace(self, plan=plan, target=target, trained_on=trained_on)

    @staticmethod
    def state_of(report: TuningReport) -> dict[str, Any]:
        """Return the plan and its device for the checkpoint, in plain numbers and text."""
        here = _device_of(report)
        return {
            **asdict(report.plan),
            "target_batch_size": report.settings.target_batch_size,
            "device": here.device,
            "device_bytes": here.total,
        }

    @staticmethod
    def state_of_kept(kept: BatchPlan) -> dict[str, Any]:
        """Return the numbers of a run with plan="keep" for the checkpoint."""
        return {"kept": asdict(kept)}

    def check_effective(self, settings: Settings, own: BatchPlan | None) -> None:
        """Raise `AutobatchError` if settings or plan ask for another effective batch size."""
        if self.plan is None:
            return
        effective, target = self.plan.effective_batch_size, settings.target_batch_size
        if own is not None and own.effective_batch_size != effective:
            asked = f"plan={own} has {own.effective_batch_size}"
        elif target not in (None, effective, self.target):
            asked = f"target_batch_size={target} asks for another number"
        else:
            return
        raise other_update(effective, asked)

    def check_kept(self, kept: BatchPlan | None) -> None:
        """Raise `AutobatchError` if an epoch would be finished with other numbers than its own."""
        plan = self.plan or self.kept
        if plan is None or kept is None or plan == kept or self.between_epochs:
            return
        trained, here = plan.world_size, kept.world_size
        ranks = "" if trained == here else f" on {here} ranks instead of {trained}"
        raise AutobatchError(
            f"{_finished_with(plan)}, and plan='keep' leaves {in_words(kept)}{ranks}. Set the "
            "numbers of the checkpoint by hand, or leave plan='keep' out."
        )

    def was_on(self, here: DeviceId) -> bool:
        """Return whether it was trained on such a device; for an unknown one a trial decides."""
        is_same_job = self.plan is not None and self.plan.world_size == here.world_size
        return is_same_job and self.trained_on in (None, here)


def kept_plan(trainer: Trainer) -> BatchPlan | None:
    """Return the numbers that loader and Trainer have; None if loaders may vary in batch size."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    if not isinstance(size, int):
        return None
    return BatchPlan(size, trainer.accumulate_grad_batches, data_parallel_size(trainer))


@dataclass(frozen=True, slots=True)
class KnownPlans:
    """Plans that may be known before a search."""

    in_training: PriorPlan | None = None  # to tune again in the middle of training
    own: BatchPlan | None = None  # the user's
    checkpoint: Checkpoint | None = None
    last: Tuned | None = None

    def prior(
        self, job: LightningTraining, fingerprint: str, here: DeviceId, settings: Settings
    ) -> PriorPlan:
        """Return the plan of the checkpoint, else of the user, else of the previous fit.

        Between epochs another one of the user comes before that of the checkpoint.
        """
        if self.in_training is not None:
            return self.in_training
        own, checkpoint = self.own, self.checkpoint
        if checkpoint is None:
            last = _of_last_fit(self.last, job, fingerprint, here, settings)
            return last if own is None else PriorPlan(own)
        may_change = checkpoint.plan is None or checkpoint.between_epochs
        if own not in (None, checkpoint.plan) and may_change:
            return PriorPlan(own)
        return _of_checkpoint(checkpoint, own, here, settings)


def _of_checkpoint(
    checkpoint: Checkpoint, own: BatchPlan | None, here: DeviceId, settings: Settings
) -> PriorPlan:
    """Return the plan of the checkpoint; between epochs it may change."""
    plan = checkpoint.plan
    if plan is None:
        return PriorPlan(
            note="The checkpoint was trained without AutoBatch: its batch size is not known."
        )
    if not checkpoint.between_epochs:
        return _within_epoch(plan, own, here)
    if not checkpoint.was_on(here):
        device = (checkpoint.trained_on or here).beside(here)
        return PriorPlan.tuned_again(plan, f" on {plan.world_size} × {device}")
    bounds = (settings.max_micro_batch_size, settings.dataset_size)
    if any(bound is not None and plan.micro_batch_size > bound for bound in bounds):
        return PriorPlan.tuned_again(plan, "")
    return PriorPlan.resumed(plan)


def _of_last_fit(
    last: Tuned | None, job: LightningTraining, fingerprint: str, here: DeviceId, settings: Settings
) -> PriorPlan:
    """Return the plan of the previous fit, if settings, module, data and device are the same."""
    if last is None or last.fingerprint != fingerprint:
        return PriorPlan()
    report = last.report
    same = report.settings == settings and _device_of(report) == here
    kept = (
        settings.target_batch_size is not None
        or report.plan.accumulate_grad_batches == job.trainer.accumulate_grad_batches
    )
    if not same or not kept:
        return PriorPlan()
    return PriorPlan(report.plan, note="One trial verified the plan that was found before.")


def _within_epoch(plan: BatchPlan, own: BatchPlan | None, here: DeviceId) -> PriorPlan:
    refusal = f"{_finished_with(plan)}, and on {here.world_size} × {here.device} that does not fit"
    way_out = (
        "Free memory on the device, raise memory_limit, or resume from a checkpoint that was "
        "written between epochs (of a Trainer without max_steps)."
    )
    if plan.world_size != here.world_size:
        raise AutobatchError(f"{refusal}: it was trained on {plan.world_size}. {way_out}")
    note = "Resumed within an epoch: one trial verified the checkpoint's plan."
    if own not in (None, plan):
        note += f" plan={own} can only begin with an epoch."
    return PriorPlan(plan, refusal=f"{refusal}. {way_out}", note=note)


def _finished_with(plan: BatchPlan) -> str:
    return (
        "The checkpoint was written within an epoch, which can only be finished with "
        f"{in_words(plan)}"
    )


def _device_of(report: TuningReport) -> DeviceId:
    device = report.device
    return DeviceId.of(device.name, device.total, report.plan.world_size)
