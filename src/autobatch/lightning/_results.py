"""Results of a callback, which outlive the run of the Trainer that made them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch import sinks
from autobatch._report.units import plain

if TYPE_CHECKING:
    from autobatch._report import TuningReport
    from autobatch.lightning._resume import TunedFit
    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")


@dataclass
class Results:
    """Results of all runs of a callback; a copy of the callback has them too.

    Args:
        reports: The last report of each method of the Trainer.
        trained: The report with the plan that training follows, or has followed.
        last_fit: The previous fit, or the last `tune` for one.
    """

    reports: dict[str, TuningReport] = field(default_factory=dict)
    trained: TuningReport | None = None
    last_fit: TunedFit | None = None

    def train_with(self, report: TuningReport) -> None:
        """Keep the report of training, or the same one with more in it."""
        self.trained = self.reports["fit"] = report


def show(report: TuningReport, trainer: Trainer, sink: sinks.Sink, *, verbose: bool) -> None:
    """Log a report and print it by a sink if wanted, on rank zero."""
    if not trainer.is_global_zero:
        return
    sinks.log(report)
    if not verbose:
        return
    try:
        sink(report)
    except Exception as error:  # standard output may be closed, or its disk full
        level = logging.DEBUG if sink is sinks.completed_on_console else logging.WARNING
        _log.log(level, "The report could not be printed: %s", plain(repr(error)))
