"""Tune a loop of Hugging Face accelerate with autobatch.find()."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator

accelerator = Accelerator(cpu=True)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
adamw = torch.optim.AdamW(network.parameters())
decay = torch.optim.lr_scheduler.ExponentialLR(adamw, gamma=0.99)
model, optimizer, scheduler = accelerator.prepare(network, adamw, decay)


def train(batch_size, accumulate):
    """Train without end at this micro-batch size, and yield after each optimizer step."""
    accelerator.gradient_accumulation_steps = accumulate
    loader = accelerator.prepare(DataLoader(data, batch_size, shuffle=True, drop_last=True))
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
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
