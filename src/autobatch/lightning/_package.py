"""Which of the two Lightning packages a Trainer comes from."""

from __future__ import annotations

from typing import Any

__all__ = ["package_of"]


def package_of(trainer: Any) -> str:
    """The Lightning package this Trainer comes from: "lightning.pytorch" or "pytorch_lightning"."""
    modules = (
        kind.__module__ for kind in type(trainer).__mro__ if kind.__name__ == "Trainer"
    )
    return next(name for name in map(_root, modules) if name)


def _root(module: str) -> str:
    return next(
        (
            name
            for name in ("lightning.pytorch", "pytorch_lightning")
            if module.startswith(name)
        ),
        "",
    )
