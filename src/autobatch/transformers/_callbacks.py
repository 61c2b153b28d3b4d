"""Callbacks of a `transformers.Trainer`; importing this module imports transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = TrainerCallback


class LeftError(BaseException):
    """Ends `train` before its first step; `except Exception` does not catch it."""


class Leave(_Callback):  # type: ignore[misc]  # a class of transformers
    """Ends `train` once everything is prepared, before any other callback knows of it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise LeftError
