"""JSON names with units, and the kind of each number."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
)

from autobatch._latency import Latency
from autobatch._plan import BatchPlan
from autobatch._trials import Trial

if TYPE_CHECKING:
    from autobatch._report.tradeoff import EffectiveRow

# What a field is counted in, where its name does not say it
_UNITS: Final = {
    **dict.fromkeys(("budget", "foreign", "peak", "resident", "total"), "bytes"),
    **dict.fromkeys(("low", "high"), "samples"),
}
# Of the numbers at the top of a report; settings are what was asked
KINDS: Final = {
    "budget_bytes": "derived",
    "dataset_size": "measured",
    "device": "measured",
    "knee": "measured",
    "largest_fit": "measured",
    "search_seconds": "measured",
    "smallest_failing": "measured",
    "validation_batch_size": "measured",
}
# Of a row of effective batches, what is estimated and not worked out from measured times
_ESTIMATED: Final = (
    "relative_updates",
    "relative_samples",
    "relative_time",
    "relative_time_low",
    "relative_time_high",
    "useful_samples_per_second",
)


def _named(field: str) -> str:
    """The name of a field in JSON, where a reader has no documentation at hand: with its unit."""
    return f"{field}_{_UNITS[field]}" if field in _UNITS else field


_FIELDS: Final = {_named(field): field for field in _UNITS}


def written(record: Any, kind: str) -> dict[str, Any]:
    """One of the frozen dataclasses in JSON; its kind says where its numbers come from."""
    named = {_named(name): value for name, value in asdict(record).items()}
    return {**named, "kind": kind}


def _read(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    return {_FIELDS.get(name, str(name)): value for name, value in record.items() if name != "kind"}


def row_written(row: EffectiveRow) -> dict[str, Any]:
    """A row of effective batches, what is estimated apart."""
    fields = written(row, "derived")
    estimated = {name: fields.pop(name) for name in _ESTIMATED}
    if row.relative_updates is None:
        return fields
    return {**fields, "to_same_loss": {**estimated, "kind": "estimated"}}


def _sound(record: Any) -> Any:
    if record is not None and not all(
        0 <= value < math.inf for value in asdict(record).values() if isinstance(value, float)
    ):
        raise ValueError("numbers that are measured are finite, and none is below 0")
    return record


def _sound_trial(trial: Trial) -> Trial:
    seconds = (trial.step_seconds or 0.0, trial.optimizer_seconds or 0.0)
    if min(trial.batch_size, trial.accumulate) < 1 or not all(
        0 <= second < math.inf for second in seconds
    ):
        raise ValueError("a trial has counts of 1 or more and times of 0 or more")
    return replace(trial, profile=())


def _sound_plan(plan: BatchPlan) -> BatchPlan:
    if min(plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size) < 1:
        raise ValueError("a plan has counts of 1 or more")
    return plan


def _sound_latency(latency: Latency) -> Latency:
    seconds = (
        latency.p50_seconds,
        latency.p90_seconds,
        latency.p99_seconds,
        latency.at_percentile_seconds,
    )
    if min(latency.batch_size, latency.calls) < 1 or not all(
        0 < second < math.inf for second in seconds
    ):
        raise ValueError("a latency has counts of 1 or more and times above 0")
    return latency


ATrial = Annotated[
    Trial,
    BeforeValidator(_read),
    AfterValidator(_sound_trial),
    PlainSerializer(lambda t: {k: v for k, v in written(t, "measured").items() if k != "profile"}),
]
APlan = Annotated[
    BatchPlan,
    AfterValidator(_sound_plan),
    PlainSerializer(
        lambda p: written(p, "derived") | {"effective_batch_size": p.effective_batch_size}
    ),
]
MEASURED = (
    BeforeValidator(_read),
    AfterValidator(_sound),
    PlainSerializer(lambda record: written(record, "measured"), when_used="unless-none"),
)
ALatency = Annotated[
    Latency,
    AfterValidator(_sound_latency),
    PlainSerializer(
        lambda each: written(each, "measured") | {"samples_per_second": each.samples_per_second}
    ),
]
FROZEN = ConfigDict(
    frozen=True,
    alias_generator=AliasGenerator(
        validation_alias=lambda field: AliasChoices(_named(field), field),
        serialization_alias=_named,
    ),
)
