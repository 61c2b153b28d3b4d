"""Tune a loop of Lightning's Fabric with autobatch.find()."""

from __future__ import annotations

import itertools

import torch
from lightning_fabric import Fabric  # with the package `lightning`: lightning.fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator

fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters()))


def train(batch_size, accumulate):
    """Train without end at this micro-batch size, and yield after each optimizer step."""
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size, shuffle=True))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for i, (images, labels) in enumerate(batches, start=1):
        is_accumulating = i % accumulate != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = nn.functional.cross_entropy(model(images), labels)
            fabric.backward(loss / accumulate)
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield


report = autobatch.find(
    train,
    target_batch_size=512,
    dataset_size=len(data),
    device=SimulatedAccelerator("1MiB"),  # leave this out on a GPU
)
print(report)

plan = report.plan
steps = train(plan.micro_batch_size, plan.accumulate_grad_batches)
for _ in range(10):
    next(steps)
