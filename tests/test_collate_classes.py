"""Loaders whose collate function is a class."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_here import Model, data, pl, quiet_trainer, tuner
from sameness import same


class Stacked:
    """A batch, made of samples by its own `__init__`."""

    def __init__(self, samples):
        self.x = torch.stack([x for x, _ in samples])
        self.y = torch.stack([y for _, y in samples])


class Reads(Model):
    def training_step(self, batch, batch_idx):
        if isinstance(batch, list):
            batch = Stacked(batch)
        self.sizes.append(len(batch.x))
        return F.cross_entropy(self.net(batch.x), batch.y)


@pytest.mark.parametrize("collate", [list, Stacked])
def test_training_receives_batches_of_the_plan(collate):
    def trained(batch_size, *callbacks, accumulate=1):
        pl.seed_everything(1, verbose=False)
        model = Reads()
        loader = DataLoader(data(), batch_size, collate_fn=collate, shuffle=True)
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
        quiet_trainer(*callbacks, **options).fit(model, loader)
        return model

    callback = tuner()
    tuned = trained(4, callback)
    plan = callback.report.plan
    by_hand = trained(plan.micro_batch_size, accumulate=plan.accumulate_grad_batches)

    assert plan.effective_batch_size == 120
    assert set(tuned.sizes) == {plan.micro_batch_size}
    assert len(tuned.sizes) == 600 // plan.micro_batch_size
    assert same(tuned.state_dict(), by_hand.state_dict())
