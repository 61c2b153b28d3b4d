"""Training loops with Lightning's Fabric, for tests."""

from __future__ import annotations

import importlib
import importlib.util
import itertools

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

is_whole = importlib.util.find_spec("lightning") is not None
fabric = importlib.import_module("lightning.fabric" if is_whole else "lightning_fabric")


class Loop:
    """A loop as Fabric's documentation writes it, which records losses."""

    def __init__(self, precision="32-true", **options):
        options = {"devices": 1, **options}
        self.fabric = fabric.Fabric(accelerator="cpu", precision=precision, **options)
        self.fabric.launch()
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
