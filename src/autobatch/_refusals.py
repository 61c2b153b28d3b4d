"""Why a tuning run ends without a plan, each in a sentence or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch._memory import format_bytes
from autobatch._trial import Outcome
from autobatch.errors import AutobatchError, DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory import MemoryReading
    from autobatch._plan import BatchPlan
    from autobatch._settings import Settings
    from autobatch._trial import Trial

__all__ = [
    "can_not_accumulate",
    "different_plans",
    "fits_no_more",
    "no_room",
    "nothing_fits",
    "size_is_not_used",
    "target_too_small",
]


def target_too_small(target: int, world_size: int) -> ValueError:
    """Ranks would have nothing to do."""
    return ValueError(
        f"target_batch_size={target} is less than one sample for each of the {world_size} ranks; "
        f"give {world_size} or more."
    )


def different_plans(plans: Sequence[BatchPlan]) -> AutobatchError:
    """Ranks did not agree."""
    return AutobatchError(
        f"Ranks chose different plans: {plans}. Please report this; training with them would not be sound."
    )


def no_room(
    settings: Settings, device: str, reading: MemoryReading, budget: int
) -> DoesNotFitError:
    """The budget is spent before any trial."""
    return DoesNotFitError(
        f"memory_limit={settings.memory_limit!r} leaves a budget of {format_bytes(max(0, budget))} on "
        f"{device}, where others hold {format_bytes(reading.foreign)} and this process already "
        f"holds {format_bytes(reading.reserved)}. Free memory on the device, or raise memory_limit."
    )


def nothing_fits(
    trials: Sequence[Trial], budget: int, device: str, time_limit: float | None
) -> DoesNotFitError:
    """No size was found; `time_limit` is what ended the search, where it did."""
    tried = "; ".join(
        _told(trial, budget) for trial in sorted(trials, key=lambda t: t.batch_size)
    )
    if time_limit is not None:
        return DoesNotFitError(
            f"No batch size was found to fit within time_limit={time_limit:g} seconds: {tried}. "
            "Raise time_limit."
        )
    return DoesNotFitError(
        f"No batch size fits the budget of {format_bytes(budget)} on {device}: {tried}. "
        "Free memory on the device, raise memory_limit, or shrink the model."
    )


def fits_no_more(plan: BatchPlan, trial: Trial, budget: int) -> DoesNotFitError:
    """The trial that should have verified a known plan did not."""
    return DoesNotFitError(
        f"plan={plan} does not fit any more: {_told(trial, budget)}. Leave plan out to search anew."
    )


def can_not_accumulate(plan: BatchPlan, target: int | None) -> ValueError:
    """A plan takes more passes per update than the workload can make; `target` asked for it, or the plan itself."""
    asked = f"plan={plan}" if target is None else f"target_batch_size={target}"
    return ValueError(
        f"{asked} takes {plan.accumulate_grad_batches} micro-batches of "
        f"{plan.micro_batch_size} per update, and this workload can not accumulate: write it as "
        "`def train(batch_size, accumulate):`, dividing each loss by `accumulate` and yielding after each "
        "optimizer step, or give a target that fits at once."
    )


def size_is_not_used(one: Trial, other: Trial) -> ValueError:
    """Two sizes far apart did the very same."""
    return ValueError(
        f"The workload allocated the very same memory at batch_size={one.batch_size} and at "
        f"batch_size={other.batch_size}; it must make micro-batches of the size it is given, "
        "and where the data set is smaller than that, name its length in dataset_size."
    )


def _told(trial: Trial, budget: int) -> str:
    if trial.outcome is Outcome.OVER_BUDGET and trial.peak is not None:
        return (
            f"batch_size={trial.batch_size} peaked at {format_bytes(trial.peak)}, over the budget of "
            f"{format_bytes(budget)}"
        )
    how = "was refused" if trial.outcome is Outcome.REFUSED else "ran out of memory"
    said = f" ({trial.error})" if trial.error else ""
    return f"batch_size={trial.batch_size} {how}{said}"
