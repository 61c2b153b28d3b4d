"""Training runs in which memory runs out at a chosen allocation, and the same written by hand."""

from __future__ import annotations

import contextlib
import gc
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch._memory.ledger import Ledger
from lightning_here import pl, quiet_trainer
from networks import Residual

torchmetrics = importlib.import_module("torchmetrics")

SAMPLES = 6  # of a micro-batch: the second piece of an odd half differs in size from the first
SPLIT = {"plan": "keep", "on_out_of_memory": "split", "verbose": False}


def perceptron(norm, dropout):
    first = [nn.Linear(16, 8), *([nn.BatchNorm1d(8)] if norm else [])]
    middle = [nn.ReLU(), *([nn.Dropout(0.3)] if dropout else [])]
    last = [nn.Linear(8, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 4)]
    return nn.Sequential(*first, *middle, *last)


class Transformer(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.into = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.layer(self.into(x.view(-1, 4, 4))).mean(1))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Residual(1, 4, 1)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.body(x.view(-1, 1, 4, 4)).mean((2, 3)))


NETWORKS = {
    "norm and dropout": lambda: perceptron(norm=True, dropout=True),
    "deterministic": lambda: perceptron(norm=False, dropout=False),
    "transformer": Transformer,
    "transformer without dropout": lambda: Transformer(0.0),
    "residual": Images,
}


class Trained(pl.LightningModule):
    """A network with a metric and logged values."""

    def __init__(self, network="norm and dropout", optimizer=torch.optim.AdamW, rate=0.05):
        super().__init__()
        torch.manual_seed(3)
        self.net = NETWORKS[network]()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.kind = optimizer
        self.rate = rate
        self.seen = 0
        self.sizes = []

    def loss(self, x, y):
        self.logits = self.net(x)  # also kept as an attribute
        return F.cross_entropy(self.logits, y)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += len(x)
        self.sizes.append(len(x))
        loss = self.loss(x, y)
        self.accuracy(self.logits.detach(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=self.rate)


def windows(count, accumulate, dtype=torch.float32, seed=5):
    """Return batches of accumulation windows that all have the same samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(accumulate * SAMPLES, 16, generator=generator, dtype=dtype)
    return TensorDataset(x.repeat(count, 1), x[:, :4].argmax(1).repeat(count))


class Refusing(pl.Callback):
    """Refuses allocations in the forward and backward pass of one micro-batch of each window.

    Args:
        position: The micro-batch in its window.
        accumulate: Micro-batches of a window.
        refusals: Of each window the numbers of allocations to refuse, each counted from the one
            before; windows without are left alone.
    """

    def __init__(self, position, accumulate, refusals):
        self.position, self.accumulate, self.refusals = position, accumulate, refusals
        self.ledger = Ledger()  # of the last of these micro-batches
        self.allocations = []  # of the micro-batch in each window
        self.gradients = []  # of each window, before they are clipped
        self.rows = []  # all values that the Trainer shows after each batch
        self._pending = []
        self._watch = contextlib.ExitStack()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        window, position = divmod(batch_idx, self.accumulate)
        torch.manual_seed(100 + position)
        if position == self.position:
            self._pending = list(self.refusals[window]) if window < len(self.refusals) else []
            # Without storages of earlier ones: a new one at the address of such would not count
            self.ledger = Ledger()
            self.ledger._refusal = self._refusal
            self._watch.enter_context(self.ledger.watching(None, 0))
            self._refuse_next()

    def on_after_backward(self, *_):
        self._end()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append(gradients_of(module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        values = {name: value.item() for name, value in trainer.logged_metrics.items()}
        self.rows.append(values | {"output": outputs["loss"].item()})
        assert self.ledger.refuse_at is None  # all refusals were met

    def on_exception(self, *_):
        self._watch.close()

    def _end(self):
        if self.ledger.allocations:
            self.allocations.append(self.ledger.allocations)
            self.ledger.allocations = 0
        self._watch.close()

    def _refuse_next(self):
        at = self._pending.pop(0) if self._pending else None
        self.ledger.refuse_at = None if at is None else self.ledger.allocations + at

    def _refusal(self, wanted):
        self._refuse_next()
        return torch.OutOfMemoryError("CUDA out of memory. (injected)")


def gradients_of(module):
    return {
        name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None
    }


@dataclass(frozen=True)
class Run:
    """A training that has ended."""

    module: Any
    trainer: Any
    refusing: Refusing
    survived: tuple[Any, ...]

    @property
    def optimizer_state(self):
        return self.trainer.optimizers[0].state_dict()["state"]


def trained(
    module,
    refusals=(),
    *,
    position=0,
    accumulate=1,
    count=None,
    callbacks=(),
    dtype=torch.float32,
    seed=5,
    **options,
):
    """Train as many windows as there are refusals, or `count`."""
    callback = autobatch.AutoBatch(**SPLIT)
    refusing = Refusing(position, accumulate, refusals)
    trainer = quiet_trainer(
        callback,
        *callbacks,
        refusing,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        **options,
    )
    data = windows(count or len(refusals), accumulate, dtype, seed)
    trainer.fit(module, DataLoader(data, batch_size=SAMPLES))
    return Run(module, trainer, refusing, callback.survived)


def allocations(module, **options):
    """Return the number of allocations of one micro-batch, once values have been logged."""
    return trained(module, count=2, **options).refusing.allocations[1]


def by_hand(
    module, pieces, *, accumulate=1, count=1, autocast=None, scale=1.0, dtype=torch.float32, seed=5
):
    """Train in plain PyTorch; return the optimizer and the gradients before each step.

    Args:
        module: The module.
        pieces: Sizes of the pieces of a micro-batch, by its position in the window.
        accumulate: Micro-batches of a window.
        count: Number of windows.
        autocast: Type of 16 bits, if any.
        scale: Factor of the loss in the backward pass.
        dtype: Type of the data.
        seed: Seed of the data.
    """
    optimizer = module.configure_optimizers()
    x, y = windows(1, accumulate, dtype, seed).tensors
    gradients = []
    for _ in range(count):
        optimizer.zero_grad()
        for position in range(accumulate):
            torch.manual_seed(100 + position)
            at = position * SAMPLES
            for size in pieces.get(position, [SAMPLES]):
                with torch.autocast(
                    "cpu", dtype=autocast or torch.bfloat16, enabled=bool(autocast)
                ):
                    loss = module.loss(x[at : at + size], y[at : at + size]) / accumulate
                (loss * (size / SAMPLES) * scale).backward()
                at += size
        for each in module.parameters():
            if each.grad is not None:
                each.grad /= scale
        gradients.append(gradients_of(module))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return optimizer, gradients


@contextlib.contextmanager
def quick_collections():
    """Let garbage be collected among new objects only: a recovery collects it each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
