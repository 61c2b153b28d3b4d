"""Parts of the random configurations of soak.py: networks, data, batches and callbacks."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections import UserDict
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

try:
    pl = importlib.import_module("pytorch_lightning")
except ModuleNotFoundError:
    pl = importlib.import_module("lightning.pytorch")
loggers = importlib.import_module(f"{pl.__name__}.loggers.logger")

CLASSES = 4
TOKENS = 20

# Networks


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 12)
        self.cell = kind(12, 16, batch_first=True, num_layers=2, dropout=0.1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.cell(self.embed(x))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


class Tied(nn.Module):
    """A network whose last layer has the weights of its first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 24)
        self.body = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU())
        self.decode = nn.Linear(24, TOKENS)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(self.body(self.embed(x).mean(1)))[:, :CLASSES]


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(TOKENS, 32)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x):
        return self.head(self.embed(x))


def mlp():
    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, CLASSES))


def dropout():
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, CLASSES))


def batch_norm():
    return nn.Sequential(nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, CLASSES))


def frozen():
    net = nn.Sequential(nn.Linear(12, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, CLASSES))
    net[0].requires_grad_(False)
    return net


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, CLASSES),
    )


# By name: the kind of data, and a function that makes the network
NETWORKS = {
    "mlp": ("rows", mlp),
    "dropout": ("rows", dropout),
    "batch norm": ("rows", batch_norm),
    "frozen": ("rows", frozen),
    "convolutions": ("pictures", convolutions),
    "lstm": ("tokens", lambda: Recurrent(nn.LSTM)),
    "gru": ("tokens", lambda: Recurrent(nn.GRU)),
    "attention": ("tokens", Attention),
    "tied": ("tokens", Tied),
    "bag": ("tokens", Bag),
}

# Data


class Samples(Dataset):
    """Samples of one kind, with noise of one source of random numbers."""

    def __init__(self, kind, length, noise):
        generator = torch.Generator().manual_seed(5)
        if kind == "tokens":
            self.x = torch.randint(0, TOKENS, (length, 7), generator=generator)
        else:
            shape = {"rows": (12,), "pictures": (2, 6, 6)}[kind]
            self.x = torch.randn((length, *shape), generator=generator)
        self.y = torch.randint(0, CLASSES, (length,), generator=generator)
        self.noise = noise
        self.own = np.random.default_rng(7)
        self.reads = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads += 1
        shift = self._shift()
        x = self.x[index]
        if x.is_floating_point():
            return x + shift, self.y[index], index
        return (x + int(TOKENS * shift)) % TOKENS, self.y[index], index

    def _shift(self):
        return {
            "none": float,
            "torch": lambda: torch.rand(()).item(),
            "numpy": np.random.rand,
            "random": random.random,
            "own": self.own.random,
        }[self.noise]()


class Stream(IterableDataset):
    """A stream without a length, shared among workers."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.samples[index] for index in range(start, len(self.samples), step))


class Blocks(Sampler):
    """A batch sampler of its own: shuffled blocks of neighbours."""

    def __init__(self, length, batch_size):
        self.length, self.batch_size = length, batch_size

    def __len__(self):
        return self.length // self.batch_size

    def __iter__(self):
        for block in torch.randperm(len(self)).tolist():
            yield list(range(block * self.batch_size, (block + 1) * self.batch_size))


# Batches


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor
    count: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.count = len(self.x)


@dataclasses.dataclass(frozen=True)
class Fixed:
    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor

    def to(self, device, non_blocking=False):
        return Fixed(self.x.to(device), self.y.to(device), self.index.to(device))


class Holder:
    def __init__(self, x, y, index):
        self.x, self.y, self.index = x, y, index

    def to(self, device, non_blocking=False):
        self.x, self.y, self.index = self.x.to(device), self.y.to(device), self.index.to(device)
        return self


class Encoding(UserDict):
    """A mapping that is no dict, with an attribute beside its items."""

    def __init__(self, items, ids):
        super().__init__(items)
        self.ids = ids

    def to(self, device, non_blocking=False):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


BATCHES = {
    "tuple": lambda x, y, index: (x, y, index),
    "list": lambda x, y, index: [x, y, index],
    "dict": lambda x, y, index: {"x": x, "y": y, "index": index},
    "named tuple": Named,
    "dataclass": Fields,
    "frozen dataclass": Fixed,
    "object": Holder,
    "encoding": lambda x, y, index: Encoding({"x": x, "y": y, "index": index}, index.tolist()),
    "strings": lambda x, y, index: {
        "x": x,
        "y": y,
        "names": [f"sample {i}" for i in index.tolist()],
    },
    "nested": lambda x, y, index: {"in": [x], "out": {"y": y, "more": (index, "text")}},
}


class Collate:
    """Make a batch of one type."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, samples):
        xs, ys, indices = zip(*samples, strict=True)
        return BATCHES[self.kind](torch.stack(xs), torch.stack(ys), torch.tensor(indices))


def parts_of(batch, kind):
    """Return the inputs, labels and indices of each single batch of a combined one."""
    if isinstance(batch, dict) and "first" in batch:
        return [part for each in batch.values() for part in parts_of(each, kind)]
    if isinstance(batch, list) and kind != "list":
        return [part for each in batch for part in parts_of(each, kind)]
    if kind == "list" and isinstance(batch[0], list):
        return [part for each in batch for part in parts_of(each, kind)]
    if kind in {"tuple", "list"}:
        return [Named(*batch)]
    if kind in {"dict", "encoding"}:
        return [Named(batch["x"], batch["y"], batch["index"])]
    if kind == "strings":
        numbers = [int(name.split()[1]) for name in batch["names"]]
        return [Named(batch["x"], batch["y"], torch.tensor(numbers))]
    if kind == "nested":
        return [Named(batch["in"][0], batch["out"]["y"], batch["out"]["more"][0])]
    return [Named(batch.x, batch.y, batch.index)]


# Callbacks


class Hooks(pl.Callback):
    """Record the hooks of a callback, in their order."""

    def __init__(self):
        self.calls = []


def _recorded(name):
    def hook(self, *_, **__):
        self.calls.append(name)

    return hook


for _name in dir(pl.Callback):
    if _name.startswith("on_"):
        setattr(Hooks, _name, _recorded(_name))


class Average(pl.Callback):
    """A moving average of the weights, as many projects have one of their own."""

    def __init__(self):
        self.shadow = {}

    def on_train_start(self, trainer, pl_module):
        self.shadow = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for key, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, 0.1)


class Writer(pl.Callback):
    """Write what the step needs, just before it: into the batch, or beside it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weight = 1 + 0.01 * batch_idx
        if isinstance(batch, dict) and "x" in batch:
            batch["weight"] = weight
        pl_module.weight_of_batch = weight


class Rows(loggers.Logger):
    """Keep the logged metrics, except those of the report."""

    name = "rows"
    version = 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        kept = {key: value for key, value in metrics.items() if "autobatch" not in key}
        if kept:
            self.rows.append((step, kept))

    def log_hyperparams(self, *_, **__):
        """Keep none: those of the report are among them."""


# The module


class Module(pl.LightningModule):
    """A module that records its steps, with state of every kind that a trial could change."""

    def __init__(self, drawn, batch_size, loaders):
        super().__init__()
        self.drawn = drawn
        self.loaders = loaders
        self.automatic_optimization = drawn.optimizer != "two"
        self.net = NETWORKS[drawn.network][1]()
        self.size_in_code = batch_size
        if drawn.named == "attribute":
            self.batch_size = batch_size
        if drawn.named == "hyperparameter":
            self.save_hyperparameters({"batch_size": batch_size})
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.noise = torch.Generator().manual_seed(11)
        self.steps = []
        self.hooks = []

    def training_step(self, batch, batch_idx):
        if not self.automatic_optimization:
            self._two_updates(batch, batch_idx)
            return None
        loss = self._loss(batch, batch_idx)
        self._record(batch, batch_idx, loss)
        return loss

    def validation_step(self, batch, batch_idx):
        parts = parts_of(batch, self.drawn.batch)
        loss = sum(F.cross_entropy(self._logits(part.x), part.y) for part in parts)
        self.log("val", loss, batch_size=len(parts[0].y))

    def configure_optimizers(self):
        rate = 1e-3 * self._named_size if self.drawn.scales_rate else 1e-2
        parameters = [each for each in self.parameters() if each.requires_grad]
        if self.drawn.optimizer == "two":
            half = len(parameters) // 2
            return [
                torch.optim.AdamW(parameters[:half], rate),
                torch.optim.SGD(parameters[half:], rate, momentum=0.9),
            ]
        optimizer = {
            "sgd": lambda: torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True),
            "adamw": lambda: torch.optim.AdamW(parameters, rate),
            "adagrad": lambda: torch.optim.Adagrad(parameters, rate),
            "rmsprop": lambda: torch.optim.RMSprop(parameters, rate, momentum=0.5),
            "lbfgs": lambda: torch.optim.LBFGS(parameters, rate, max_iter=2, history_size=2),
        }[self.drawn.optimizer]()
        return self._with_schedule(optimizer)

    def train_dataloader(self):
        in_code = self.drawn.named == "nothing"
        return self.loaders.train(self.size_in_code if in_code else self._named_size)

    def val_dataloader(self):
        return self.loaders.validation()

    def on_fit_start(self):
        self.weight_of_fit = 1.0

    def on_train_batch_start(self, batch, batch_idx):
        self.hooks.append("on_train_batch_start")

    def on_before_optimizer_step(self, optimizer):
        self.hooks.append("on_before_optimizer_step")

    def on_train_epoch_end(self):
        self.hooks.append("on_train_epoch_end")

    @property
    def _named_size(self):
        if self.drawn.named == "attribute":
            return self.batch_size
        if self.drawn.named == "hyperparameter":
            return self.hparams.batch_size
        return self.drawn.own_size

    def _with_schedule(self, optimizer):
        rates = torch.optim.lr_scheduler
        if self.drawn.schedule == "none":
            return optimizer
        if self.drawn.schedule == "plateau":
            plateau = rates.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "loss_epoch"},
            }
        if self.drawn.schedule == "one cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            # Not every optimizer has a momentum to cycle
            schedule = rates.OneCycleLR(optimizer, 2e-2, total_steps=steps, cycle_momentum=False)
        elif self.drawn.schedule == "cosine":
            schedule = rates.CosineAnnealingLR(optimizer, T_max=10)
        else:
            schedule = rates.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _two_updates(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self._loss(batch, batch_idx)
            self.manual_backward(loss)
            if (batch_idx + 1) % self.drawn.every == 0:
                self.clip_gradients(optimizer, gradient_clip_val=0.5)
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        self._record(batch, batch_idx, loss)

    def _loss(self, batch, batch_idx):
        if self.drawn.writes:
            self._write_into(batch)
        loss = torch.zeros((), dtype=self.dtype) * self.weight_of_fit
        for part in parts_of(batch, self.drawn.batch):
            self.seen = self.seen + len(part.y)
            noise = 0.01 * torch.rand((), generator=self.noise) + 0.01 * np.random.rand()
            logits = self._logits(part.x) + noise.to(self.dtype)
            loss = loss + F.cross_entropy(logits, part.y)
        if "writer" in self.drawn.callbacks:
            loss = loss * self.weight_of_batch
        if self.drawn.reads_trainer:
            loss = loss * (1 + batch_idx / self.trainer.num_training_batches)
            loss = loss + len(self.trainer.callbacks) * 0 + self.trainer.current_epoch
        return loss

    def _logits(self, x):
        return self.net(x.to(self.dtype) if x.is_floating_point() else x)

    def _write_into(self, batch):
        part = parts_of(batch, self.drawn.batch)[0]
        if part.x.is_floating_point():
            part.x.mul_(1.01)
        if isinstance(batch, Holder):
            batch.x = torch.cat([batch.x, batch.x])
            batch.y, batch.index = batch.y.repeat(2), batch.index.repeat(2)
        if isinstance(batch, dict) and "x" in batch:
            batch["more"] = batch["x"] * 2

    def _record(self, batch, batch_idx, loss):
        parts = parts_of(batch, self.drawn.batch)
        optimizers = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.steps.append(
            {
                "sizes": [len(part.index) for part in parts],
                "indices": [part.index.tolist() for part in parts],
                "inputs": [part.x.double().sum().item() for part in parts],
                "loss": loss.item(),
                "rate": first.param_groups[0]["lr"],
                "batch_idx": batch_idx,
                "global_step": self.global_step,
                "epoch": self.current_epoch,
                "is_last": self.trainer.is_last_batch,
            }
        )
        options = {"batch_size": len(parts[0].index), "on_step": True, "on_epoch": True}
        self.log("loss", loss.detach(), **options)
