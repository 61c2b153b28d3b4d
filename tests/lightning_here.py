"""The Lightning package that is installed, and a quiet Trainer of it; where there is none, what imports this is skipped."""

from __future__ import annotations

import importlib

import pytest


def installed(package):
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return False
    return True


HERE = [name for name in ("pytorch_lightning", "lightning.pytorch") if installed(name)]
if not HERE:
    pytest.skip("Lightning is not installed", allow_module_level=True)
pl = importlib.import_module(HERE[0])


def quiet_trainer(*callbacks, **options):
    quiet = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})
