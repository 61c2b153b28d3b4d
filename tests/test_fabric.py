"""Loops of Lightning's Fabric, tuned by find()."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from sameness import same

NAME = next(filter(importlib.util.find_spec, ("lightning", "lightning_fabric")), None)
if NAME is None:
    pytest.skip("needs Fabric", allow_module_level=True)
fabric = importlib.import_module("lightning.fabric" if NAME == "lightning" else NAME)


class Loop:
    """A loop as Fabric's documentation writes it, which records losses."""

    def __init__(self, precision):
        self.fabric = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
        self.fabric.seed_everything(3, verbose=False)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16)
        )
        self.model, self.optimizer = self.fabric.setup(
            model, torch.optim.AdamW(model.parameters(), lr=1e-2)
        )
        generator = torch.Generator().manual_seed(1)
        self.data = TensorDataset(
            torch.randn(500, 32, generator=generator),
            torch.randint(0, 16, (500,), generator=generator),
        )
        self.losses = []

    def train(self, batch_size, accumulate):
        loader = self.fabric.setup_dataloaders(DataLoader(self.data, batch_size, shuffle=True))
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for i, (inputs, labels) in enumerate(batches, start=1):
            is_last = i % accumulate == 0
            with self.fabric.no_backward_sync(self.model, enabled=not is_last):
                loss = F.cross_entropy(self.model(inputs), labels) / accumulate
                self.fabric.backward(loss)
            self.losses.append(loss.item())
            if is_last:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
                yield

    def result(self, plan, updates):
        """Train with a plan; return losses and weights."""
        self.losses = []
        steps = self.train(plan.micro_batch_size, plan.accumulate_grad_batches)
        for _ in itertools.islice(steps, updates):
            pass
        return self.losses, list(self.model.state_dict().values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_after_tuning_equals_the_plan_by_hand(precision):
    loop = Loop(precision)
    device = SimulatedAccelerator(120_000)
    report = autobatch.find(
        loop.train,
        target_batch_size=160,
        device=device,
        timing_seconds=0,
        max_micro_batch_size=40,
    )
    trained = loop.result(report.plan, updates=6)

    by_hand = Loop(precision).result(report.plan, updates=6)

    assert report.plan.accumulate_grad_batches > 1
    assert report.plan.effective_batch_size == 160
    assert same(trained, by_hand)


def test_the_scaler_of_a_fabric_is_restored():
    """Fabric makes one on CUDA only: this one is set by hand, and steps in every trial."""
    loop = Loop("32-true")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    loop.fabric._strategy.precision.scaler = scaler
    lazy = torch.zeros(1, requires_grad=True)
    unused = torch.optim.SGD([lazy])

    def train(batch_size, accumulate):
        for _ in loop.train(batch_size, accumulate):
            scale(loop.fabric, lazy.sum() * 2, unused)
            yield

    autobatch.find(
        train, device=SimulatedAccelerator(120_000), timing_seconds=0, max_micro_batch_size=16
    )

    assert scaler.get_scale() == 2.0**10
    assert not scaler._per_optimizer_states


def scale(fabric, loss, optimizer):
    scaler = fabric._strategy.precision.scaler
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
