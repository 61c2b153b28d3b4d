"""Trials of a module that steps a scheduler which ends with training."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_here import Model, data, pl, quiet_trainer, tuner
from sameness import same


class StepsItself(Model):
    """Manual optimization with a OneCycleLR of as many steps as training has."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rates = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        return [optimizer], [scheduler]

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        optimizer.step()
        scheduler.step()
        self.rates.append(scheduler.get_last_lr())


def test_training_equals_training_by_hand():
    def trained(batch_size, *callbacks):
        pl.seed_everything(1, verbose=False)
        model = StepsItself()
        trainer = quiet_trainer(*callbacks, max_steps=5, max_epochs=-1)
        trainer.fit(model, DataLoader(data(), batch_size, shuffle=True))
        return model, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler

    callback = tuner(target_batch_size=None)
    model, optimizer, scheduler = trained(4, callback)
    size = callback.report.plan.micro_batch_size
    by_hand, by_hand_optimizer, by_hand_scheduler = trained(size)

    assert model.sizes == [size] * 5
    assert model.rates == by_hand.rates
    assert same(model.state_dict(), by_hand.state_dict())
    assert same(optimizer.state_dict(), by_hand_optimizer.state_dict())
    assert type(scheduler) is torch.optim.lr_scheduler.OneCycleLR
    assert scheduler.last_epoch == by_hand_scheduler.last_epoch == 5
