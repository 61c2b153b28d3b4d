"""Tune a plain PyTorch loop with autobatch.find(), without Lightning."""

from __future__ import annotations

import itertools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters())


def train(batch_size, accumulate):
    """Train without end at this micro-batch size, and yield after each optimizer step."""
    loader = DataLoader(data, batch_size, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for i, (images, labels) in enumerate(batches, start=1):
        (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            yield


report = autobatch.find(
    train,
    target_batch_size=512,
    dataset_size=len(data),
    device=SimulatedAccelerator("2MiB"),  # leave this out on a GPU
)
print(report)

plan = report.plan
steps = train(plan.micro_batch_size, plan.accumulate_grad_batches)
for _ in range(10):
    next(steps)
