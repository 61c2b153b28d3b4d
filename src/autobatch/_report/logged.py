"""Parts of a report that loggers of any trainer can hold."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._report import TuningReport


@dataclass(frozen=True, slots=True)
class LoggedSize:
    """Throughput and memory of one micro-batch size, under their names in loggers."""

    batch_size: int
    values: dict[str, float]


def plan_values(report: TuningReport) -> dict[str, int]:
    """Return the numbers of the plan."""
    plan = report.plan
    return {
        "autobatch/batch_size": plan.micro_batch_size,
        "autobatch/accumulate_grad_batches": plan.accumulate_grad_batches,
        "autobatch/effective_batch_size": plan.effective_batch_size,
    }


def curve(report: TuningReport) -> Iterator[LoggedSize]:
    """Yield throughput and memory of each size, which takes the place of the training step."""
    for row in report.sizes:
        values: dict[str, float] = {"autobatch/samples_per_second": row.samples_per_second}
        if row.peak is not None:
            values["autobatch/peak_bytes"] = row.peak
        yield LoggedSize(row.batch_size, values)


def log_sizes(report: TuningReport, run: Any) -> None:
    """Log the sizes of the JSON report in a run of W&B, without a step of its own."""
    rows: list[dict[str, Any]] = json.loads(report.to_json())["sizes"]
    if rows:
        data = [list(row.values()) for row in rows]
        table = importlib.import_module("wandb").Table(columns=list(rows[0]), data=data)
        run.log({"autobatch/sizes": table}, commit=False)


def summary(report: TuningReport) -> dict[str, float]:
    """Return the numbers of a run by which runs are compared."""
    chosen = [row for row in report.sizes if row.batch_size == report.plan.micro_batch_size]
    values = {
        "largest_fit": report.largest_fit,
        "search_seconds": report.search_seconds,
        "samples_per_second": chosen[0].samples_per_second if chosen else None,
        "peak_bytes": chosen[0].peak if chosen else None,
    }
    return {f"autobatch/{name}": value for name, value in values.items() if value is not None}
