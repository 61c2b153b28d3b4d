"""Callbacks of a `transformers.Trainer`; importing this module imports transformers."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from transformers import TrainerCallback

from autobatch import sinks
from autobatch._report import logged
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._report import TuningReport

    Part: TypeAlias = Callable[[TuningReport, Any], None]
    _Callback: type = object
else:
    _Callback = TrainerCallback

_log = logging.getLogger("autobatch")


class LeftError(BaseException):
    """Ends `train` before its first step; `except Exception` does not catch it."""


class Leave(_Callback):  # type: ignore[misc]  # a class of transformers
    """Ends `train` once everything is prepared, before any other callback knows of it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise LeftError


class ReportLogger(_Callback):  # type: ignore[misc]  # a class of transformers
    """Logs the report when training begins, after the Trainer's own callbacks have begun.

    It goes, on rank zero, into the log history, to the Trainer's integrations and beside its
    checkpoints. A failure is logged, and stops nothing. Random numbers that an integration draws
    meanwhile do not change training.

    Args:
        trainer: The Trainer.
        report: The report, with whose plan it trains.
    """

    def __init__(self, trainer: Any, report: TuningReport) -> None:
        self._trainer = trainer
        self._report = report

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer, report = self._trainer, self._report
        if not trainer.state.is_world_process_zero:
            return
        folder, handler = Path(trainer.args.output_dir), trainer.callback_handler
        values = logged.plan_values(report)
        trainer.state.log_history.append({**values, "step": trainer.state.global_step})
        with Snapshot():
            _try(
                "The Trainer", handler.on_log, trainer.args, trainer.state, trainer.control, values
            )
            _try(folder.name, _write, report, folder)
            for callback in handler.callbacks:
                name = type(callback).__name__
                for part in _OF_KIND.get(name, ()):
                    _try(name, part, report, callback)


def _try(name: str, part: Callable[..., Any], *arguments: Any) -> None:
    """Call a function; log its exception, if any."""
    try:
        part(*arguments)
    except Exception as error:
        reason = plain(f"{type(error).__name__}: {error}")
        _log.warning("%s did not take all of the report: %s", name, reason)


def _write(report: TuningReport, folder: Path) -> None:
    sinks.json_file(folder / "autobatch.json")(report)
    sinks.markdown_file(folder / "autobatch.md")(report)


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
    _write(report, Path(importlib.import_module("wandb").run.dir))


_OF_KIND: Final[dict[str, tuple[Part, ...]]] = {
    "TensorBoardCallback": (_text, _curve),
    "WandbCallback": (_run_files, _table, _summary),
}
