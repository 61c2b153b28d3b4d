"""A curve as something to train: as a loop, and as a module with its loader."""

from __future__ import annotations

import contextlib

import pytorch_lightning as pl
import torch
from contestants import Log
from curves import Device
from torch.utils.data import DataLoader, Dataset

STEPS_AFTER = 300


class OnPaper:
    """Training on a device on paper."""

    def __init__(self, curve, share):
        self.curve = curve
        self.ends = curve.ends
        self.probe = Device(curve, share)
        self.log = Log()

    def clock(self):
        return self.probe.now

    def as_a_device(self):
        """Return the context for a search that does not use the probe: the device itself is limited."""
        return contextlib.nullcontext()

    def start(self):
        """Start again with a new model and optimizer."""
        self.log.begun += 1
        self.probe.start()

    def train(self, batch_size, accumulate=1):
        """A training loop, which yields after each update."""
        while True:
            self.step(batch_size, accumulate)
            yield batch_size

    def step(self, size, passes=1):
        size = min(size, self.ends)  # a loader has no more
        with self.log.step(size, passes):
            self.probe.step(size, passes)

    def module(self):
        return _Module(self)

    def loader(self, batch_size):
        return DataLoader(_Numbers(self.ends), batch_size, collate_fn=_as_it_is)

    def survives(self, size):
        """Return the number of successful steps out of 300, with the other process unchanged."""
        after = Device(self.curve, 1.0)
        after.capacity = self.probe.capacity
        after.foreign = self.probe.foreign
        after.random.seed(1000 + self.curve.seed)
        after.start()
        for step in range(STEPS_AFTER):
            try:
                after.step(size)
            except torch.OutOfMemoryError:
                return step
        return STEPS_AFTER


class _Numbers(Dataset):
    """As many samples as are asked for, which take no time to read."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return torch.tensor(index)

    def __getitems__(self, indices):
        return torch.empty(len(indices))


def _as_it_is(samples):
    return samples if isinstance(samples, torch.Tensor) else torch.stack(samples)


class _Module(pl.LightningModule):
    def __init__(self, work):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batch_size = 8
        self._work = lambda: work  # trials restore what a module holds, except in functions

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return self._work().loader(self.batch_size)

    def on_train_start(self):
        self._work().start()

    def training_step(self, batch):
        self._work().step(len(batch))
        return self.weight.sum() * 0
