"""Tune a loop that shards its model over the ranks of a job.

torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator

dist.init_process_group("gloo")  # "nccl" on GPUs
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" on GPUs
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())


def train(batch_size, accumulate):
    """Train without end at this micro-batch size, and yield after each optimizer step."""
    loader = DataLoader(data, batch_size, sampler=DistributedSampler(data))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for i, (images, labels) in enumerate(batches, start=1):
        (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            yield


# Every rank calls it, and all get the same plan
report = autobatch.find(
    train,
    target_batch_size=512,
    dataset_size=len(data),
    device=SimulatedAccelerator("640KiB"),  # leave this out on a GPU
)
if dist.get_rank() == 0:
    print(report)

plan = report.plan
steps = train(plan.micro_batch_size, plan.accumulate_grad_batches)
for _ in range(10):
    next(steps)
dist.destroy_process_group()
