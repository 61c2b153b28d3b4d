"""Add AutoBatch to an existing Trainer: the largest batch size that fits, and the effective batch size you want."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator


class Digits(pl.LightningModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        # This depends on the batch size, so AutoBatch builds the optimizer again after tuning.
        return torch.optim.AdamW(self.parameters(), lr=1e-4 * self.hparams.batch_size**0.5)

    def train_dataloader(self):
        digits = load_digits()
        data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
        return DataLoader(data, batch_size=self.hparams.batch_size, shuffle=True)


tuner = autobatch.AutoBatch(
    target_batch_size=512,
    device=SimulatedAccelerator("2MiB"),  # leave this out on a GPU
)
trainer = pl.Trainer(
    max_epochs=2,
    callbacks=[tuner],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
)
model = Digits()
trainer.fit(model)

assert tuner.report is not None
assert model.hparams.batch_size == tuner.report.plan.micro_batch_size
assert trainer.accumulate_grad_batches == tuner.report.plan.accumulate_grad_batches
