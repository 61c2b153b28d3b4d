"""The report in TensorBoard, CSV, W&B and MLflow."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from autobatch import sinks
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot
from autobatch.lightning._compat import package_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._report import TuningReport

    Part: TypeAlias = Callable[[TuningReport, Any, Any], None]

_log = logging.getLogger("autobatch")


def log_report(report: TuningReport, trainer: Any) -> None:
    """Give every logger of a Trainer what its kind can hold of the report; a failure is told, and stops nothing.

    Only rank zero does. Random numbers that a logger draws meanwhile are not missing in training.
    """
    _log_parts(report, trainer, frozenset(), logging.WARNING)


def refresh_report(report: TuningReport, trainer: Any) -> None:
    """Write a report that was completed over the one that was logged, where a logger keeps it whole."""
    # What a logger does not take, it has been said of the first
    _log_parts(report, trainer, _ONCE, logging.DEBUG)


def _log_parts(report: TuningReport, trainer: Any, left_out: frozenset[Part], level: int) -> None:
    if not trainer.is_global_zero:
        return
    with Snapshot():
        for logger in trainer.loggers:
            tried = (
                _try(part, report, logger, trainer)
                for part in _parts(logger, trainer)
                if part not in left_out
            )
            failures = [error for error in tried if error is not None]
            if failures:
                _log.log(
                    level,
                    "%s did not take all of the report: %s",
                    type(logger).__name__,
                    plain(f"{type(failures[0]).__name__}: {failures[0]}"),
                )


def _try(part: Part, report: TuningReport, logger: Any, trainer: Any) -> Exception | None:
    """Log one part; what went wrong, if anything."""
    try:
        part(report, logger, trainer)
    except Exception as error:
        return error
    return None


def _parts(logger: Any, trainer: Any) -> tuple[Part, ...]:
    """What a logger of this kind gets; the classes are those of the Lightning package in use."""
    kinds = importlib.import_module(f"{package_of(trainer)}.loggers")
    return next(
        (parts for kind, parts in _OF_KIND.items() if isinstance(logger, getattr(kinds, kind))),
        _OF_OTHERS,
    )


# Hyperparameters


def _values(report: TuningReport) -> dict[str, int]:
    plan = report.plan
    return {
        "autobatch/batch_size": plan.micro_batch_size,
        "autobatch/accumulate_grad_batches": plan.accumulate_grad_batches,
        "autobatch/effective_batch_size": plan.effective_batch_size,
    }


def _hyperparameters(report: TuningReport, logger: Any, trainer: Any) -> None:
    """Beside the user's own, of which none is logged again: some loggers take each name once."""
    if trainer.enable_autolog_hparams:
        logger.log_hyperparams(_values(report))


def _hyperparameters_first(report: TuningReport, logger: Any, trainer: Any) -> None:
    """As the others, for a logger whose first hyperparameters are its last."""
    if not trainer.enable_autolog_hparams:
        return
    if logger.hparams:
        # TensorBoard shows what a run logs first; a second time would only repeat the placeholder of its metric
        logger.hparams.update(_values(report))
    else:
        logger.log_hyperparams(_values(report))
    # Lightning 2.6 has written the file, and writes none that is there
    saving = importlib.import_module(f"{package_of(trainer)}.core.saving")
    path = os.path.join(logger.log_dir, logger.NAME_HPARAMS_FILE)  # noqa: PTH118 -- may be a URL
    saving.save_hparams_to_yaml(path, logger.hparams)


# Files


def _files(report: TuningReport, logger: Any, _: Any) -> None:
    """Beside the logs, or at least where the logger saves what it saves, if that is a directory."""
    directory = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if not isinstance(directory, str | os.PathLike):
        return
    _write(report, os.fspath(directory))


def _run_files(report: TuningReport, logger: Any, _: Any) -> None:
    """In the directory whose files W&B keeps with the run."""
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
    # Lightning's own loggers write wherever fsspec can
    remote = importlib.import_module("fsspec")
    with remote.open(f"{directory}/autobatch.json", "w", encoding="utf-8") as file:
        file.write(report.to_json() + "\n")
    with remote.open(f"{directory}/autobatch.md", "w", encoding="utf-8") as file:
        file.write(sinks.to_markdown(report))


# Tables, curves and text


def _text(report: TuningReport, logger: Any, trainer: Any) -> None:
    text = sinks.to_markdown(report)
    logger.experiment.add_text("autobatch/report", text, trainer.global_step)


def _curve(report: TuningReport, logger: Any, _: Any) -> None:
    """Speed and memory over the micro-batch, which stands where a step of training would."""
    for row in report.sizes:
        values: dict[str, float] = {"autobatch/samples_per_second": row.samples_per_second}
        if row.peak is not None:
            values["autobatch/peak_bytes"] = row.peak
        logger.log_metrics(values, step=row.batch_size)


def _table(report: TuningReport, logger: Any, _: Any) -> None:
    """The sizes as they stand in the JSON of a report, in the row that training logs next: no step is used up."""
    rows = json.loads(report.to_json())["sizes"]
    if not rows:
        return
    table = importlib.import_module("wandb").Table(
        columns=list(rows[0]), data=[list(row.values()) for row in rows]
    )
    logger.experiment.log({"autobatch/sizes": table}, commit=False)


def _summary(report: TuningReport, logger: Any, _: Any) -> None:
    chosen = [row for row in report.sizes if row.batch_size == report.plan.micro_batch_size]
    values = {
        "largest_fit": report.largest_fit,
        "search_seconds": report.search_seconds,
        "samples_per_second": chosen[0].samples_per_second if chosen else None,
        "peak_bytes": chosen[0].peak if chosen else None,
    }
    logger.experiment.summary.update(
        {f"autobatch/{name}": value for name, value in values.items() if value is not None}
    )


_OF_KIND: Final[dict[str, tuple[Part, ...]]] = {
    "TensorBoardLogger": (_hyperparameters_first, _files, _text, _curve),
    "WandbLogger": (_hyperparameters, _run_files, _table, _summary),
    "MLFlowLogger": (_hyperparameters, _artifacts, _curve),
}
_OF_OTHERS: Final[tuple[Part, ...]] = (_hyperparameters, _files)
# What a logger would have twice
_ONCE: Final = frozenset({_hyperparameters, _hyperparameters_first, _curve, _table})
