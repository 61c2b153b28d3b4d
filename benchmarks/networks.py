"""Real networks as something to train, on an accelerator of which every tensor byte is counted."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from contestants import Log, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from autobatch.testing import SimulatedAccelerator

STEPS_AFTER = 300
CLASSES = 10
SAMPLES = 20_000  # in the data set: more than fit


class Perceptron(nn.Sequential):
    """4.0 M parameters."""

    sample = (64,)

    def __init__(self):
        widths = (64, 1440, 1440, 1440)
        layers = [
            layer
            for inside, outside in itertools.pairwise(widths)
            for layer in (
                nn.Linear(inside, outside),
                nn.LayerNorm(outside),
                nn.GELU(),
                nn.Dropout(0.1),
            )
        ]
        super().__init__(*layers, nn.Linear(1440, CLASSES))


class Residual(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])
        self.short = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.short(x))


class ResNet(nn.Module):
    """4.4 M parameters, on images of 24 x 24."""

    sample = (3, 24, 24)

    def __init__(self):
        super().__init__()
        widths = (3, 40, 80, 160, 320)
        blocks = [
            block
            for inside, outside in itertools.pairwise(widths)
            for block in (
                Residual(inside, outside, 2),
                Residual(outside, outside, 1),
            )
        ]
        self.stem = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images):
        return self.head(self.stem(images / 255).mean((2, 3)))


class Transformer(nn.Module):
    """4.6 M parameters, most of them in its embedding; attention over 256 tokens."""

    sample = (256,)
    vocabulary = 32_768
    recomputes = False

    def __init__(self):
        super().__init__()
        width, length = 128, self.sample[0]
        self.tokens = nn.Embedding(self.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        hidden = self.tokens(tokens) + self.positions
        for layer in self.layers:
            if self.recomputes and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return self.head(hidden.mean(1))


class Short(Transformer):
    """0.6 M parameters, over 32 tokens."""

    sample = (32,)
    vocabulary = 2048


class Checkpointed(Transformer):
    """The same with activation checkpointing: activations are computed again in the backward pass."""

    recomputes = True


class Recurrent(nn.Module):
    """5.7 M parameters: an LSTM of two layers, over 16 tokens."""

    sample = (16,)
    vocabulary = 2000

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(self.vocabulary, 256)
        self.lstm = nn.LSTM(256, 608, 2, batch_first=True)
        self.head = nn.Linear(608, CLASSES)

    def forward(self, tokens):
        return self.head(self.lstm(self.tokens(tokens))[0][:, -1])


@dataclass(frozen=True)
class Kind:
    """A network, and the size that shall be the largest that fits: the capacity is made for it."""

    name: str
    make: type
    true: int


KINDS = (
    Kind("MLP", Perceptron, 1000),
    Kind("ResNet", ResNet, 80),
    Kind("transformer", Transformer, 30),
    Kind("LSTM", Recurrent, 64),
    Kind("checkpointed", Checkpointed, 40),
)
QUICK = (Kind("transformer", Short, 30),)


def data_of(make):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    shape = (SAMPLES, *make.sample)
    if hasattr(make, "vocabulary"):
        return torch.randint(make.vocabulary, shape, generator=generator), labels
    if len(make.sample) > 1:  # images
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return images, labels
    return torch.randn(shape, generator=generator), labels


class Training:
    """A network and its optimizer, and a loop that trains them."""

    def __init__(self, make, data):
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.data = data

    def update(self, size, passes):
        for at in range(passes):
            rows = slice(at * size, (at + 1) * size)
            inputs, labels = (each[rows].clone() for each in self.data)
            loss = F.cross_entropy(self.model(inputs), labels)
            if at == 0:
                self.optimizer.zero_grad()  # as Lightning does
            (loss / passes).backward()
        self.optimizer.step()


def peak_of(make, data, size):
    """Bytes that training at a size takes, once the optimizer has its state."""
    accelerator = SimulatedAccelerator("1TiB")
    with accelerator.limited(2**40):
        training = Training(make, data)
        for _ in range(2):
            training.update(size, 1)
    return accelerator.read().peak


def peak_in_a_trainer(make, data, size):
    """The same in Lightning's Trainer, which reads a batch ahead."""
    accelerator = SimulatedAccelerator("1TiB")
    module = _Module(make, data, Log())
    module.batch_size = size
    accelerator.attach(module)
    with accelerator.limited(2**40):
        trainer(max_steps=3).fit(module)
    return accelerator.read().peak


class _Bare:
    """The same accelerator without visible single allocations, as on CUDA."""

    def __init__(self, accelerator):
        self._accelerator = accelerator

    def __getattr__(self, name):
        return getattr(self._accelerator, name)

    @contextlib.contextmanager
    def limited(self, budget):
        with self._accelerator.limited(budget):
            yield None


class Real:
    """Training of a network on a simulated accelerator."""

    ends = SAMPLES

    def __init__(self, kind, data, budget, share, *, is_bare=False):
        self.kind, self._data, self._budget = kind, data, budget
        self.log = Log()
        self.accelerator = SimulatedAccelerator(-int(-budget // share))
        self.probe = _Bare(self.accelerator) if is_bare else self.accelerator
        self._training = None

    def clock(self):
        return time.process_time()

    @contextlib.contextmanager
    def as_a_device(self):
        with self.accelerator.limited(self._budget):
            yield

    def start(self):
        """Start again with a new model and optimizer."""
        self.log.begun += 1
        self._training = None  # the old one dies first
        self._training = Training(self.kind.make, self._data)

    @property
    def train(self):
        """A training loop, which yields after each update."""
        if self._training is None:
            self._training = Training(self.kind.make, self._data)
        log, own = self.log, self._training
        model, optimizer = own.model, own.optimizer  # in sight of find()

        def train(batch_size, accumulate=1):
            training = self._training
            while True:
                with log.step(batch_size, accumulate):
                    training.update(batch_size, accumulate)
                yield batch_size
                del training
                training = self._training

        train.trains = (model, optimizer)
        return train

    def module(self):
        module = _Module(self.kind.make, self._data, self.log)
        self.accelerator.attach(module)
        return module

    def loader(self, batch_size):
        return _loader(self._data, batch_size)

    def survives(self, size, seconds):
        """Return the number of successful steps of a new training: up to 300, as time allows, at least 3."""
        began, capacity = time.perf_counter(), self.accelerator.capacity
        accelerator = SimulatedAccelerator(capacity)
        with accelerator.limited(capacity):
            training = Training(self.kind.make, self._data)
            for step in range(STEPS_AFTER):
                if step >= 3 and time.perf_counter() - began > seconds:
                    return step
                try:
                    training.update(size, 1)
                except torch.OutOfMemoryError:
                    return -1 - step
        return STEPS_AFTER


def _loader(data, batch_size):
    return DataLoader(TensorDataset(*data), batch_size)


class _Module(pl.LightningModule):
    def __init__(self, make, data, log):
        super().__init__()
        torch.manual_seed(0)
        self.network = make()
        self.batch_size = 8
        self._seen = lambda: (log, data)  # trials restore what a module holds, not in functions

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-4)

    def train_dataloader(self):
        return _loader(self._seen()[1], self.batch_size)

    def on_train_start(self):
        self._seen()[0].begun += 1

    def training_step(self, batch):
        inputs, labels = batch
        with self._seen()[0].step(len(labels)):
            return F.cross_entropy(self.network(inputs), labels)
