"""Everything that tuning could leave behind, as one inventory to take before and after it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
)
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import data, pl
from lightning_here import quiet_trainer as trainer
from sameness import same

torchmetrics = pytest.importorskip("torchmetrics")

METHODS = ("fit", "validate", "test", "predict")


# Module, data and logger


class Part(nn.Module):
    """A submodule with state in plain attributes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.BatchNorm1d(256), nn.Dropout())
        self.count = 0
        self.history = [0.5]

    def forward(self, x):
        self.count += 1
        self.history.append(float(self.count))
        return self.net(x)


class Rich(pl.LightningModule):
    """A module whose steps change every kind of state."""

    def __init__(self, fired, explode_at=None):
        super().__init__()
        self.save_hyperparameters({"batch_size": 4})
        self.body, self.head = Part(), nn.Linear(256, 4)
        self.metric = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("rebound", torch.zeros(3), persistent=False)
        self.number, self.text = 1, "none"
        self.numbers, self.queue = [1, 2], deque([3], maxlen=4)
        self.table, self.members = {"a": [1]}, {1}
        self.pair = ([1], 2)
        self.array = np.zeros(3)
        self.tensor = torch.zeros(2)
        self.generators = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            random.Random(1),
        )
        self.world = SimpleNamespace(fired=fired, explode_at=explode_at, steps=0)

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self._step(batch)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self._step(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _step(self, batch):
        x, y = batch
        self._change(x)
        loss = F.cross_entropy(self.head(torch.relu(self.body(x))), y)
        self.metric.update(loss.detach())
        if self.trainer.state.fn != "predict":
            self.log("loss", loss, on_epoch=True)
            self.log("metric", self.metric)
        self.world.steps += 1
        if self.world.explode_at and self.world.steps == 5:
            raise self.world.explode_at("mine")
        return loss

    def _change(self, x):
        noise = torch.rand(3, generator=self.generators[0])
        noise = noise + self.generators[1].random() + self.generators[2].random()
        noise = noise + np.random.rand() + random.random() + torch.rand(())
        self.seen += len(x)
        self.rebound = self.rebound + noise
        self.number += 1
        self.text = "some"
        self.new = "attribute"
        self.numbers.append(self.number)
        self.queue.append(self.number)
        self.table["a"].append(self.number)
        self.table[self.number] = x
        self.members.add(self.number)
        self.pair[0].append(self.number)
        self.array += 1
        self.tensor.add_(1)
        self.head.register_forward_hook(lambda *_: None)
        self.head.bias.requires_grad_(self.number % 2 == 0)
        self.body.net[2].train(self.number % 2 == 0)
        if self.head.weight.requires_grad:
            self.head.weight.register_hook(lambda gradient: gradient)
        if self.trainer.datamodule is not None:
            self.trainer.datamodule.seen.append(len(x))


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.random, self.generator = np.random.default_rng(2), torch.Generator()
        self.seen, self.made = [], 0

    def train_dataloader(self):
        self.made += 1
        chosen = self.random.permutation(600)[:200].tolist()
        return DataLoader(
            torch.utils.data.Subset(data(), chosen),
            self.hparams.batch_size,
            shuffle=True,
            generator=self.generator,
        )

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Recording(pl.loggers.logger.Logger):
    """A logger that keeps all of its calls."""

    name = version = "mine"

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def experiment(self):
        self.calls.append("experiment")
        return self

    def log_metrics(self, *arguments):
        self.calls.append("metrics")

    def log_hyperparams(self, *arguments):
        self.calls.append("hyperparameters")

    def finalize(self, status):
        self.calls.append(status)


# Hooks that do not begin with "on_"
NAMED = (
    "setup",
    "teardown",
    "prepare_data",
    "configure_callbacks",
    "configure_optimizers",
    "optimizer_step",
    "lr_scheduler_step",
)


def hooked(kind, fired):
    """Return a class whose hooks record their calls outside of restored state."""

    def telling(name):
        original = getattr(kind, name)

        def hook(self, *arguments, **options):
            fired.append(name)
            return original(self, *arguments, **options)

        return hook

    names = [
        name
        for name in dir(kind)
        if name in NAMED or (name.startswith("on_") and callable(getattr(kind, name)))
    ]
    return type(kind.__name__, (kind,), {name: telling(name) for name in names})


@dataclass
class Run:
    """Trainer, module, data and callbacks of one run, and the hooks that were called."""

    folder: Path
    source: str = "passed"
    explode_at: type | None = None
    hooks: list[str] = field(default_factory=list)
    callback_hooks: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.model = hooked(Rich, self.hooks)(self.hooks, self.explode_at)
        self.model.head.weight.grad = torch.ones_like(self.model.head.weight)
        self.model.body.net[1].eval()
        self.generator = torch.Generator().manual_seed(3)
        self.loader = DataLoader(data(), 4, shuffle=True, generator=self.generator)
        self.datamodule = Data()
        self.watcher = hooked(pl.Callback, self.callback_hooks)()
        self.profiler = pl.profilers.SimpleProfiler(dirpath=self.folder, filename="profile")
        self.logger = Recording()
        self.trainer = trainer(
            self.watcher,
            pl.callbacks.EarlyStopping("loss"),
            pl.callbacks.ModelCheckpoint(),
            enable_checkpointing=True,
            logger=self.logger,
            profiler=self.profiler,
            accumulate_grad_batches=3,
            default_root_dir=self.folder,
        )
        self.tuner = autobatch.AutoBatch(
            device=SimulatedAccelerator("450KiB"),
            search=autobatch.Bisection(resolution=0.25),
            target_batch_size=None,
        )

    def tune(self, method="fit"):
        loaders = "train_dataloaders" if method == "fit" else "dataloaders"
        given = (
            {loaders: self.loader} if self.source == "passed" else {"datamodule": self.datamodule}
        )
        return self.tuner.tune(self.trainer, self.model, method=method, **given)


# The inventory


class Same:
    """An object that equals only itself, and stays alive so that its id is not used again."""

    def __init__(self, thing):
        self.thing = thing

    def __eq__(self, other):
        return isinstance(other, type(self)) and self.thing is other.thing

    __hash__ = object.__hash__

    def __repr__(self):
        return f"<{type(self.thing).__name__} at {id(self.thing):x}>"


_PLAIN = (int, float, str, bool, bytes, type(None), torch.device, torch.dtype)


def frozen(value):
    """Return a copy to compare with: content that a trial may change, else identity."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [frozen(item) for item in value]
    if isinstance(value, _PLAIN):
        return value
    return value.copy() if isinstance(value, set) else Same(value)


def each(modules, look):
    return {name: look(module) for name, module in modules.named_modules()}


def parameters(run, look):
    return {name: look(each) for name, each in run.model.named_parameters()}


def attributes(module):
    """Return the attributes that have no item of their own."""
    own = ("_parameters", "_buffers", "_modules", "training")
    return {
        name: frozen(value)
        for name, value in vars(module).items()
        if name not in own and "hooks" not in name
    }


def handlers():
    numbers = sorted(signal.valid_signals())
    return {number: Same(signal.getsignal(number)) for number in numbers}


def global_hooks():
    return [
        frozen(value)
        for owner in (torch_module, torch_optimizer)
        for name, value in sorted(vars(owner).items())
        if name.startswith("_global") and isinstance(value, dict)
    ]


# A new item needs a line here, and one in MUTATIONS
INVENTORY = {
    "parameters": lambda run: parameters(run, frozen),
    "parameter objects": lambda run: parameters(run, Same),
    "gradients": lambda run: parameters(run, lambda p: frozen(p.grad)),
    "requires_grad": lambda run: parameters(run, lambda p: p.requires_grad),
    "tensor hooks": lambda run: parameters(run, lambda p: frozen(p._backward_hooks)),
    "buffers": lambda run: each(run.model, lambda m: frozen(m._buffers)),
    "buffer objects": lambda run: [Same(buffer) for buffer in run.model.buffers()],
    "attributes": lambda run: each(run.model, attributes),
    "training flags": lambda run: each(run.model, lambda m: m.training),
    "module hooks": lambda run: each(
        run.model,
        lambda m: {k: frozen(v) for k, v in vars(m).items() if "hooks" in k},
    ),
    "metric": lambda run: float(run.model.metric.mean_value),
    "global hooks": lambda run: global_hooks(),
    "random state of torch": lambda run: torch.get_rng_state(),
    "random state of numpy": lambda run: repr(np.random.get_state()),
    "random state of python": lambda run: random.getstate(),
    "loops": lambda run: [
        frozen(getattr(run.trainer, f"{name}_loop").state_dict()) for name in METHODS
    ],
    "progress": lambda run: [
        run.trainer.global_step,
        run.trainer.current_epoch,
        run.trainer.should_stop,
    ],
    "restart flags": lambda run: [
        run.trainer.fit_loop.restarting,
        run.trainer.fit_loop.epoch_loop.restarting,
    ],
    "arguments": lambda run: [
        run.trainer.accumulate_grad_batches,
        run.trainer.max_steps,
        run.trainer.max_epochs,
        run.trainer.limit_train_batches,
        run.trainer.limit_val_batches,
        run.trainer.num_sanity_val_steps,
        run.trainer.val_check_interval,
    ],
    "callback_metrics": lambda run: frozen(dict(run.trainer.callback_metrics)),
    "logged_metrics": lambda run: frozen(dict(run.trainer.logged_metrics)),
    "callbacks": lambda run: [Same(each) for each in run.trainer.callbacks],
    "attributes of callbacks": lambda run: [frozen(vars(each)) for each in run.trainer.callbacks],
    "loggers": lambda run: [Same(each) for each in run.trainer.loggers],
    "what was logged": lambda run: list(run.logger.calls),
    "profiler": lambda run: [
        Same(run.trainer.profiler),
        frozen(dict(run.profiler.recorded_durations)),
        frozen(run.profiler.current_actions),
    ],
    "hidden methods": lambda run: [
        name
        for owner in (run.trainer, run.trainer.strategy, run.trainer.fit_loop)
        for name, value in vars(owner).items()
        if callable(getattr(type(owner), name, None)) and callable(value)
    ],
    "DataLoader.__init__": lambda run: Same(DataLoader.__init__),
    "datamodule": lambda run: frozen(vars(run.datamodule)),
    "loader": lambda run: frozen(vars(run.loader)),
    "batch sampler": lambda run: frozen(vars(run.loader.batch_sampler)),
    "sampler": lambda run: frozen(vars(run.loader.sampler)),
    "generator of the loader": lambda run: run.generator.get_state(),
    "data": lambda run: frozen(run.loader.dataset.tensors),
    "files": lambda run: sorted(run.folder.rglob("*")),
    "warnings": lambda run: list(warnings.filters),
    "environment": lambda run: dict(os.environ),
    "signal handlers": lambda run: handlers(),
    "threads": lambda run: [Same(each) for each in threading.enumerate()],
    "processes": lambda run: [each.pid for each in multiprocessing.active_children()],
    "gradients enabled": lambda run: torch.is_grad_enabled(),
    "inference mode": lambda run: torch.is_inference_mode_enabled(),
    "default dtype": lambda run: torch.get_default_dtype(),
    "autocast": lambda run: torch.is_autocast_enabled("cpu"),
    "dispatch modes": lambda run: list(_get_current_dispatch_mode_stack()),
    "function modes": lambda run: list(_get_current_function_mode_stack()),
    "cudnn": lambda run: [
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    ],
    "garbage collector": lambda run: [gc.isenabled(), *gc.get_threshold()],
    "log handlers": lambda run: [
        [Same(each) for each in logging.getLogger(name).handlers]
        for name in (None, "autobatch", "lightning", "lightning.pytorch")
    ],
    "working directory": lambda run: str(Path.cwd()),
}


def inventory(run):
    return {name: look(run) for name, look in INVENTORY.items()}


def changed(before, after):
    return [name for name in INVENTORY if not same(before[name], after[name])]
