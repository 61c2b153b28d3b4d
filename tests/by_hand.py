"""A training by AutoBatch, and the same with its two numbers written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import QUICK, pl, quiet_trainer
from sameness import same

X = torch.randn(240, 16, generator=torch.Generator().manual_seed(5))
Y = X[:, :4].argmax(1)
OWN = 5  # does not divide the target: another size has to be taken
PAIRS = torch.utils.data.TensorDataset(X, Y)


class Recorded(pl.LightningModule):
    """Records the number of samples and the sum of the inputs of every step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        self.sizes = []
        self.seen = []

    def pair(self, batch):
        return batch

    def training_step(self, batch, batch_idx):
        x, y = self.pair(batch)
        self.sizes.append(len(y))
        self.seen.append(x.double().sum().item())
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@dataclass(frozen=True)
class Compared:
    """Both modules after training, and the report of the one that was tuned."""

    tuned: Any
    by_hand: Any
    report: autobatch.TuningReport

    def check(self, *, rows=1):
        """Assert that both received the same data and came out the same to the bit.

        A sample of the loader is a number of rows of a batch.
        """
        assert self.tuned.sizes == self.by_hand.sizes
        assert self.tuned.seen == self.by_hand.seen
        assert same(self.tuned.state_dict(), self.by_hand.state_dict())
        assert rows * self.report.plan.micro_batch_size == max(self.tuned.sizes) != rows * OWN


def compared(make_loader, module=Recorded, *, own=OWN, callbacks=list, trainer=None, **options):
    """Train with AutoBatch from an own batch size, and again with the numbers of its plan.

    `make_loader` is called with a batch size, `module` and `callbacks` without arguments.
    """
    options = {
        "target_batch_size": 24,
        "max_micro_batch_size": 12,
        "device": SimulatedAccelerator("900KiB"),
        **QUICK,
        **options,
    }
    tuner = autobatch.AutoBatch(**options)
    tuned = _fitted(partial(make_loader, own), module, [tuner, *callbacks()], trainer or {})
    plan = tuner.report.plan
    numbers = {"accumulate_grad_batches": plan.accumulate_grad_batches}
    loader = partial(make_loader, plan.micro_batch_size)
    by_hand = _fitted(loader, module, callbacks(), {**(trainer or {}), **numbers})
    return Compared(tuned, by_hand, tuner.report)


def _fitted(make_loader, module, callbacks, options):
    pl.seed_everything(3, verbose=False)
    made, loader = module(), make_loader()
    quiet_trainer(*callbacks, **options).fit(made, loader)
    return made
