"""Parts of a report that loggers of any trainer can hold."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

from autobatch._throughput import row_of

if TYPE_CHECKING:
    from autobatch._report import TuningReport


def plan_values(report: TuningReport) -> dict[str, int]:
    """Return the numbers of the plan."""
    plan = report.plan
    return {
        "autobatch/batch_size": plan.micro_batch_size,
        "autobatch/accumulate_grad_batches": plan.accumulate_grad_batches,
        "autobatch/effective_batch_size": plan.effective_batch_size,
    }


def curve(report: TuningReport) -> dict[int, dict[str, float]]:
    """Return throughput and memory by micro-batch size, which stands for the training step."""
    return {
        row.batch_size: {
            "autobatch/samples_per_second": row.samples_per_second,
            **({} if row.peak is None else {"autobatch/peak_bytes": row.peak}),
        }
        for row in report.sizes
    }


def log_sizes(report: TuningReport, run: Any) -> None:
    """Log the sizes of the JSON report in a run of W&B, without a step of its own."""
    rows: list[dict[str, Any]] = json.loads(report.to_json())["sizes"]
    if rows:
        data = [list(row.values()) for row in rows]
        table = importlib.import_module("wandb").Table(columns=list(rows[0]), data=data)
        run.log({"autobatch/sizes": table}, commit=False)


def summary(report: TuningReport) -> dict[str, float]:
    """Return the numbers of a run by which runs are compared."""
    chosen = row_of(report.sizes, report.plan.micro_batch_size)
    values = {
        "largest_fit": report.largest_fit,
        "search_seconds": report.search_seconds,
        "samples_per_second": chosen.samples_per_second if chosen else None,
        "peak_bytes": chosen.peak if chosen else None,
    }
    return {f"autobatch/{name}": value for name, value in values.items() if value is not None}
