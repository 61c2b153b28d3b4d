"""A module that validates, tests and predicts, and a callback that tunes it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import QUICK, pl


def data(length=240):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def loader(batch_size, length=240):
    return DataLoader(data(length), batch_size)


class Model(pl.LightningModule):
    """A module with a given memory per sample, which records the sizes of real batches."""

    def __init__(self, kib=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.kib = kib
        self.trained, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.trained.append(len(x))
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert self.trainer.evaluating or self.trainer.sanity_checking
        x, y = batch
        self.evaluated.append((dataloader_idx, len(x)))
        room = torch.empty(len(x), self.kib, 256)
        self.log("val_loss", F.cross_entropy(self.net(x), y) + 0 * room.shape[0])

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        assert not self.training
        self.evaluated.append((dataloader_idx, len(batch[0])))
        room = torch.empty(len(batch[0]), self.kib, 256)
        return self.net(batch[0]) + 0 * room.shape[0]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    @property
    def sizes(self):
        return {size for _, size in self.evaluated}


class Data(pl.LightningDataModule):
    """One batch size for all loaders; `validated` counts samples of validation for each of it."""

    def __init__(self, batch_size=4, validated=1):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(self.hparams.batch_size)

    def val_dataloader(self):
        # Lightning's predict refuses a hook that passes it by position
        return DataLoader(data(), batch_size=self.hparams.validated * self.hparams.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def tuner(capacity="256KiB", **options):
    return autobatch.AutoBatch(
        **{
            "target_batch_size": 24,
            "device": SimulatedAccelerator(capacity),
            "evaluate": True,
            **QUICK,
            **options,
        }
    )
