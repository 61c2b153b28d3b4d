"""The report in the log history of a Trainer, in its integrations and beside its checkpoints."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from autobatch import sinks
from autobatch._report import logged
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._report import TuningReport

    Part: TypeAlias = Callable[[TuningReport, Any], None]

_log = logging.getLogger("autobatch")


def log_report(report: TuningReport, trainer: Any) -> None:
    """Write the report, now that the integrations of the Trainer have begun, on rank zero.

    A failure is logged, and stops nothing. Random numbers that an integration draws meanwhile do
    not change training.
    """
    if not trainer.state.is_world_process_zero:
        return
    folder, handler = Path(trainer.args.output_dir), trainer.callback_handler
    values = logged.plan_values(report)
    trainer.state.log_history.append({**values, "step": trainer.state.global_step})
    with Snapshot():
        _try("The Trainer", partial(handler.on_log, trainer.args, trainer.state, trainer.control))(
            values
        )
        _try(folder.name, sinks.json_file(folder / "autobatch.json"))(report)
        _try(folder.name, sinks.markdown_file(folder / "autobatch.md"))(report)
        for callback in handler.callbacks:
            for part in _OF_KIND.get(type(callback).__name__, ()):
                _try(type(callback).__name__, part)(report, callback)


def _try(name: str, part: Callable[..., Any]) -> Callable[..., None]:
    """Return a function that logs the exception of another, if any."""

    def log_failure(*arguments: Any) -> None:
        try:
            part(*arguments)
        except Exception as error:
            reason = plain(f"{type(error).__name__}: {error}")
            _log.warning("%s did not take all of the report: %s", name, reason)

    return log_failure


def _text(report: TuningReport, callback: Any) -> None:
    callback.tb_writer.add_text("autobatch/report", sinks.to_markdown(report))


def _curve(report: TuningReport, callback: Any) -> None:
    for size, values in logged.curve(report).items():
        for name, value in values.items():
            callback.tb_writer.add_scalar(name, value, size)


def _table(report: TuningReport, _: Any) -> None:
    logged.log_sizes(report, importlib.import_module("wandb").run)


def _summary(report: TuningReport, _: Any) -> None:
    importlib.import_module("wandb").run.summary.update(logged.summary(report))


def _run_files(report: TuningReport, _: Any) -> None:
    """Write the report into the directory whose files W&B keeps with the run."""
    folder = Path(importlib.import_module("wandb").run.dir)
    sinks.json_file(folder / "autobatch.json")(report)
    sinks.markdown_file(folder / "autobatch.md")(report)


_OF_KIND: Final[dict[str, tuple[Part, ...]]] = {
    "TensorBoardCallback": (_text, _curve),
    "WandbCallback": (_run_files, _table, _summary),
}
