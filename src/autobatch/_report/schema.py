"""JSON names with units, limits of numbers, and the kind of each number."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer

from autobatch._latency import Latency
from autobatch._plan import BatchPlan
from autobatch._settings import LONGEST, MOST, SHORTEST
from autobatch._trials import Trial

if TYPE_CHECKING:
    from autobatch._report.tradeoff import EffectiveRow

# Units of fields whose name has none
_UNITS: Final = {
    **dict.fromkeys(
        ("allocated", "budget", "foreign", "peak", "requested", "resident", "total"), "bytes"
    ),
    **dict.fromkeys(("low", "high"), "samples"),  # of a noise scale
}
# Numbers at the top of a report; settings are the user's
KINDS: Final = {
    "budget_bytes": "derived",
    "dataset_size": "measured",
    "device": "measured",
    "knee": "measured",
    "largest_fit": "measured",
    "search_seconds": "measured",
    "smallest_failing": "measured",
    "timing_seconds": "measured",
    "validation_batch_size": "measured",
    "validation_seconds": "measured",
}
# Fields of a row of effective batches that need a noise scale
_ESTIMATED: Final = (
    "relative_updates",
    "relative_samples",
    "relative_time",
    "relative_time_low",
    "relative_time_high",
    "useful_samples_per_second",
)
# Numbers that cannot be zero; no number can be below zero, or so large or small that others which
# are derived from it overflow
_POSITIVE: Final = {
    "accumulate",
    "accumulate_grad_batches",
    "at_percentile_seconds",
    "batch_size",
    "calls",
    "micro_batch_size",
    "p50_seconds",
    "p90_seconds",
    "p99_seconds",
    "world_size",
}


def json_name(field: str) -> str:
    """Return the name of a field in JSON, with its unit."""
    return f"{field}_{_UNITS[field]}" if field in _UNITS else field


# Records are plain dataclasses: pydantic reads them with the configuration of the report
CONFIG: Final = ConfigDict(frozen=True, alias_generator=json_name, populate_by_name=True)


def written(record: Any, kind: str) -> dict[str, Any]:
    """Return a record for JSON; `kind` is measured, derived or estimated."""
    named = {json_name(name): value for name, value in asdict(record).items()}
    return named | {"kind": kind}


def row_written(row: EffectiveRow) -> dict[str, Any]:
    """Return a row of effective batches for JSON, with its estimates in a record of their own."""
    derived = written(row, "derived")
    estimated = {name: derived.pop(name) for name in _ESTIMATED}
    if row.relative_updates is None:
        return derived
    return derived | {"to_same_loss": estimated | {"kind": "estimated"}}


def _checked(record: Any) -> Any:
    for field in fields(record):
        value = getattr(record, field.name)
        if not isinstance(value, (int, float)):
            continue
        most, least = (MOST, 1) if isinstance(value, int) else (LONGEST, SHORTEST)
        is_zero = value == 0 and field.name not in _POSITIVE
        if not (is_zero or least <= value <= most):
            raise ValueError(f"{field.name} is out of range")
    return record


def _written_trial(trial: Trial) -> dict[str, Any]:
    in_json = written(trial, "measured")
    del in_json["profile"]  # one number per allocation
    return in_json


Bytes = Annotated[int, Field(ge=-MOST, le=MOST)]
CHECKED: Final = AfterValidator(_checked)
MEASURED: Final = (CHECKED, PlainSerializer(lambda record: written(record, "measured")))
StoredTrial = Annotated[
    Trial,
    CHECKED,
    AfterValidator(lambda trial: replace(trial, profile=())),
    PlainSerializer(_written_trial),
]
StoredPlan = Annotated[
    BatchPlan,
    CHECKED,
    PlainSerializer(
        lambda plan: written(plan, "derived") | {"effective_batch_size": plan.effective_batch_size}
    ),
]
StoredLatency = Annotated[
    Latency,
    CHECKED,
    PlainSerializer(
        lambda latency: (
            written(latency, "measured") | {"samples_per_second": latency.samples_per_second}
        )
    ),
]
