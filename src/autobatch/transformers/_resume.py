"""The plan of a checkpoint from which training goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autobatch._plan import BatchPlan
from autobatch._prior_plan import PriorPlan, in_words, other_update
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._settings import Settings

_WAY_OUT = "Resume from a checkpoint that was written between epochs."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, as far as the plan of a resumed run depends on it."""

    folder: Path
    plan: BatchPlan | None  # the plan it was trained with; None if it was trained without autobatch
    between_epochs: bool  # no epoch is unfinished

    @classmethod
    def named(cls, given: str | Path | Literal[True], output_dir: str) -> Checkpoint:
        """Return the checkpoint that `train` would resume from, the last one for True.

        Raises:
            ValueError: There is none.
        """
        from transformers.trainer_utils import get_last_checkpoint

        found = get_last_checkpoint(output_dir) if given is True else str(given)
        file = Path(found or output_dir) / "trainer_state.json"
        if not file.exists():
            raise ValueError(
                f"resume_from_checkpoint={str(given)!r} leads to no checkpoint: there is no {file}."
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        return cls(file.parent, _plan_in(state["log_history"]), float(state["epoch"]).is_integer())

    def prior_plan(self, settings: Settings, world_size: int) -> PriorPlan:
        """Return the plan to verify; between epochs another one may reach the same update.

        Raises:
            AutobatchError: Training cannot go on with the batches that the arguments ask for.
        """
        plan = self.plan
        if plan is None:
            if not self.between_epochs:
                raise AutobatchError(
                    f"{self.folder} was written within an epoch, and holds no plan of autobatch, "
                    f"so that the size of its batches is unknown. {_WAY_OUT}"
                )
            return PriorPlan(
                note="The checkpoint was trained without autobatch: its batch size is not known."
            )
        effective, target = plan.effective_batch_size, settings.target_batch_size
        if target not in (None, effective):
            raise other_update(effective, f"target_batch_size={target} asks for another number")
        if self.between_epochs:
            if plan.world_size != world_size:
                return PriorPlan.tuned_again(plan, f" on {plan.world_size} ranks")
            return PriorPlan.resumed(plan)
        refusal = (
            f"{self.folder} was written within an epoch, which can only be finished with "
            f"{in_words(plan)} on {plan.world_size} ranks, and that is not possible here. {_WAY_OUT}"
        )
        if plan.world_size != world_size:
            raise AutobatchError(refusal)
        note = "Resumed within an epoch: one trial verified the checkpoint's plan."
        return PriorPlan(plan, refusal=refusal, note=note)


def _plan_in(log_history: list[dict[str, Any]]) -> BatchPlan | None:
    """Return the plan of the last report in the log history; None if there is none."""
    names = ("batch_size", "accumulate_grad_batches", "effective_batch_size")
    for entry in reversed(log_history):
        counts = [entry.get(f"autobatch/{name}") for name in names]
        if all(type(count) is int and count > 0 for count in counts):
            size, accumulate, effective = counts
            return BatchPlan(size, accumulate, effective // (size * accumulate))
    return None
