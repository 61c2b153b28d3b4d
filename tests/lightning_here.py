"""The installed Lightning package, a quiet Trainer and a small module; tests skip without one."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator


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

# Of arguments that most laws do not depend on: searches take a third less time
QUICK = {"steps_per_trial": 2, "verbose": False}


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


def data(length=600):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


class Model(pl.LightningModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        self.sizes = []
        self.validated = []
        self.explode_at = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if len(self.sizes) == self.explode_at:
            raise ZeroDivisionError("mine")
        self.sizes.append(len(x))
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def tuner(**options):
    return autobatch.AutoBatch(
        **{
            "target_batch_size": 120,
            "device": SimulatedAccelerator("450KiB"),
            **QUICK,
            **options,
        }
    )


def plain():
    return DataLoader(data(), batch_size=4)
