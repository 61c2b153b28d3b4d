"""Callbacks of a `transformers.Trainer`; importing this module imports transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from autobatch.transformers._logging import log_report

if TYPE_CHECKING:
    from autobatch._report import TuningReport

    _Callback: type = object
else:
    _Callback = TrainerCallback


class LeftError(BaseException):
    """Ends `train` before its first step; `except Exception` does not catch it."""


class Leave(_Callback):  # type: ignore[misc]  # a class of transformers
    """Ends `train` once everything is prepared, before any other callback knows of it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise LeftError


class ReportLogger(_Callback):  # type: ignore[misc]  # a class of transformers
    """Logs the report when training begins, after the Trainer's own callbacks have begun.

    Args:
        trainer: The Trainer.
        report: The report, with whose plan it trains.
    """

    def __init__(self, trainer: Any, report: TuningReport) -> None:
        self._trainer = trainer
        self._report = report

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        log_report(self._report, self._trainer)
