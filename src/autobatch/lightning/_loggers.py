"""The report in TensorBoard, CSV, W&B and MLflow."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from autobatch import sinks
from autobatch._report import logged
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot
from autobatch.lightning._package import Imported, package

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._report import TuningReport
    from autobatch.lightning._trainer import Trainer

    Part: TypeAlias = Callable[[TuningReport, Any, Any], None]

_log = logging.getLogger("autobatch")


def log_report(report: TuningReport, trainer: Trainer) -> None:
    """Write to each logger of a Trainer the parts of the report that it can hold, on rank zero.

    A failure is logged, and stops nothing. Random numbers that a logger draws meanwhile do not
    change training.
    """
    _log_parts(report, trainer, frozenset(), logging.WARNING)


def refresh_report(report: TuningReport, trainer: Trainer) -> None:
    """Write a completed report over the first one, in loggers that keep whole reports."""
    # The first report has logged a warning about each failure already
    _log_parts(report, trainer, _ONCE, logging.DEBUG)


def _log_parts(
    report: TuningReport, trainer: Trainer, omitted: frozenset[Part], level: int
) -> None:
    if not trainer.is_global_zero:
        return
    with Snapshot():
        for logger in trainer.loggers:
            failures = []
            for part in _parts(logger, trainer):
                if part in omitted:
                    continue
                try:
                    part(report, logger, trainer)
                except Exception as error:
                    failures.append(plain(f"{type(error).__name__}: {error}"))
            if failures:
                name = type(logger).__name__
                _log.log(level, "%s did not take all of the report: %s", name, failures[0])


def _parts(logger: Any, trainer: Trainer) -> tuple[Part, ...]:
    """Return the parts of the report for a logger of this kind."""
    kinds = package(trainer).loggers
    return next(
        (parts for kind, parts in _OF_KIND.items() if isinstance(logger, getattr(kinds, kind))),
        _OF_OTHER_KINDS,
    )


# Hyperparameters


def _hyperparameters(report: TuningReport, logger: Any, trainer: Trainer) -> None:
    """Log the plan alone, since some loggers take each hyperparameter once."""
    if trainer.enable_autolog_hparams:
        logger.log_hyperparams(logged.plan_values(report))


def _hyperparameters_first(report: TuningReport, logger: Any, trainer: Trainer) -> None:
    """Log the plan in a logger whose first hyperparameters are its last."""
    if not trainer.enable_autolog_hparams:
        return
    if logger.hparams:
        # TensorBoard shows the first hyperparameters of a run; a second time repeats the
        # placeholder of its metric
        logger.hparams.update(logged.plan_values(report))
    else:
        logger.log_hyperparams(logged.plan_values(report))
    # Lightning 2.6 has written the file by now, and does not overwrite it
    path = os.path.join(logger.log_dir, logger.NAME_HPARAMS_FILE)  # noqa: PTH118 -- may be a URL
    Imported.SAVE_HPARAMS.of(trainer)(path, logger.hparams)


# Files


def _files(report: TuningReport, logger: Any, _: Any) -> None:
    """Write the report beside the logs, if the logger has a directory."""
    directory = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if isinstance(directory, str | os.PathLike):
        _write(report, os.fspath(directory))


def _run_files(report: TuningReport, logger: Any, _: Any) -> None:
    """Write the report into the directory whose files W&B keeps with the run."""
    _write(report, logger.experiment.dir)


def _artifacts(report: TuningReport, logger: Any, _: Any) -> None:
    client, run = logger.experiment, logger.run_id
    client.log_text(run, report.to_json() + "\n", "autobatch.json")
    client.log_text(run, sinks.to_markdown(report), "autobatch.md")


def _write(report: TuningReport, directory: str) -> None:
    if "://" not in directory:
        sinks.json_file(Path(directory) / "autobatch.json")(report)
        sinks.markdown_file(Path(directory) / "autobatch.md")(report)
        return
    # Lightning's own loggers write to URLs with fsspec
    remote = importlib.import_module("fsspec")
    for suffix, text in (("json", report.to_json() + "\n"), ("md", sinks.to_markdown(report))):
        with remote.open(f"{directory}/autobatch.{suffix}", "w", encoding="utf-8") as file:
            file.write(text)


# Tables, curves and text


def _text(report: TuningReport, logger: Any, trainer: Trainer) -> None:
    text = sinks.to_markdown(report)
    logger.experiment.add_text("autobatch/report", text, trainer.global_step)


def _curve(report: TuningReport, logger: Any, _: Any) -> None:
    """Log throughput and memory over the micro-batch size, in place of the training step."""
    for size, values in logged.curve(report).items():
        logger.log_metrics(values, step=size)


def _table(report: TuningReport, logger: Any, _: Any) -> None:
    logged.log_sizes(report, logger.experiment)


def _summary(report: TuningReport, logger: Any, _: Any) -> None:
    logger.experiment.summary.update(logged.summary(report))


_OF_KIND: Final[dict[str, tuple[Part, ...]]] = {
    "TensorBoardLogger": (_hyperparameters_first, _files, _text, _curve),
    "WandbLogger": (_hyperparameters, _run_files, _table, _summary),
    "MLFlowLogger": (_hyperparameters, _artifacts, _curve),
}
_OF_OTHER_KINDS: Final[tuple[Part, ...]] = (_hyperparameters, _files)
# Parts that a completed report does not change
_ONCE: Final = frozenset({_hyperparameters, _hyperparameters_first, _curve, _table})
