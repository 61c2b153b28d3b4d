"""The installed Lightning package."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

_PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def callback_class() -> type:
    """The Callback of the Lightning package in use; of each that is installed, where none is imported yet.

    `lightning.pytorch` and `pytorch_lightning` are two packages, and neither knows the other's class.
    """
    imported = [package for package in _PACKAGES if package in sys.modules]
    found = []
    for package in imported or _PACKAGES:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "AutoBatch needs Lightning, and neither package is installed: pip install "
            '"lightning-autobatch[lightning]", or "[pytorch-lightning]" for the other name.'
        )
    return type("Callback", tuple(found), {})


def package_of(trainer: Any) -> str:
    """The Lightning package this Trainer comes from: "lightning.pytorch" or "pytorch_lightning"."""
    modules = (kind.__module__ for kind in type(trainer).__mro__ if kind.__name__ == "Trainer")
    return next(name for name in map(_root, modules) if name)


def _root(module: str) -> str:
    return next(
        (name for name in _PACKAGES if module.startswith(name)),
        "",
    )
