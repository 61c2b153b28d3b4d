"""Random configurations of soak.py: drawn from a seed, and trained with and without AutoBatch."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from soak_parts import (
    NETWORKS,
    Average,
    Blocks,
    Collate,
    Hooks,
    Module,
    Rows,
    Samples,
    Stream,
    Writer,
    pl,
)
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

import autobatch
from autobatch.testing import SimulatedAccelerator

combined = importlib.import_module(f"{pl.__name__}.utilities.combined_loader")

PASSED = {
    "plain": 2,
    "shuffled": 4,
    "drop_last": 2,
    "one worker": 1,
    "two workers": 1,
    "persistent workers": 1,
    "own generator": 2,
    "weighted": 2,
    "subset": 1,
    "batch sampler": 2,
    "own batch sampler": 2,
    "subclass": 1,
    "stream": 2,
    "stream, one worker": 1,
    "concatenated": 1,
    "dict of two": 2,
    "list of two": 1,
    "shortest of two": 2,
}
MADE = {"hook": 4, "datamodule": 4, "datamodule with attribute": 2}
WORKERS = {"one worker": 1, "two workers": 2, "persistent workers": 2, "stream, one worker": 1}


@dataclass(frozen=True)
class Drawn:
    """One configuration."""

    seed: int
    network: str
    optimizer: str
    schedule: str
    precision: str
    loader: str
    batch: str
    noise: str
    named: str
    callbacks: tuple[str, ...]
    own_size: int
    length: int
    every: int
    validates: bool
    scales_rate: bool
    reads_trainer: bool
    writes: bool
    room: int  # samples beside the weights
    trainer: dict[str, Any] = field(default_factory=dict)
    tuner: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        options = ", ".join(f"{key}={value!r}" for key, value in self.trainer.items())
        tuner = ", ".join(f"{key}={value!r}" for key, value in self.tuner.items())
        words = [self.network, self.optimizer, self.schedule, self.precision, self.loader]
        words += [f"{self.batch} batches", f"noise of {self.noise}", *self.callbacks]
        flags = ("validates", "scales_rate", "reads_trainer", "writes")
        words += [flag for flag in flags if getattr(self, flag)]
        return f"{'; '.join(words)}; Trainer({options}); AutoBatch({tuner})"


def draw(seed, *, workers=True):
    """Return the configuration of a seed; without worker processes if they cost too much."""
    source = random.Random(seed)  # noqa: S311
    chance = source.random
    loaders = {**PASSED, **MADE}
    if not workers:
        loaders = {name: weight for name, weight in loaders.items() if name not in WORKERS}
    optimizer = _one_of(source, sgd=3, adamw=4, adagrad=1, rmsprop=1, lbfgs=1, two=2)
    loader = source.choices([*loaders], [*loaders.values()])[0]
    schedules = {"none": 3, "one cycle": 2, "cosine": 1, "plateau": 1, "warm-up": 1}
    schedule = source.choices([*schedules], [*schedules.values()])[0]
    return Drawn(
        seed=seed,
        network=source.choice([*NETWORKS]),
        optimizer=optimizer,
        schedule="none" if optimizer == "two" else schedule,
        precision=source.choices(
            ["32-true", "bf16-mixed", "64-true", "bf16-true", "16-true"], [6, 2, 2, 1, 1]
        )[0],
        loader=loader,
        batch=source.choices(
            [
                "tuple",
                "list",
                "dict",
                "named tuple",
                "dataclass",
                "frozen dataclass",
                "object",
                "encoding",
                "strings",
                "nested",
            ],
            [4, 1, 3, 1, 1, 1, 2, 1, 1, 1],
        )[0],
        noise=source.choice(["none", "none", "torch", "numpy", "random", "own"]),
        named=source.choice(["nothing", "attribute", "hyperparameter"]),
        callbacks=tuple(_callbacks(source, optimizer)),
        own_size=source.choice([2, 3, 4, 8]),
        length=source.choice([60, 98, 128, 150]),
        every=source.choice([1, 2]),
        validates=chance() < 0.4,
        scales_rate=chance() < 0.3,
        reads_trainer=chance() < 0.25,
        writes=chance() < 0.2,
        room=source.choice([6, 15, 40, 100]),
        trainer=_trainer_options(source, optimizer, loader),
        tuner=_tuner_options(source),
    )


def train(drawn, plan=None, *, tunes=False):
    """Train a configuration: tuned, or with the numbers of a plan or its own; return a record."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in (pl.__name__, "autobatch"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        return _trained(drawn, plan, Path(folder), tunes=tunes)


def _one_of(source, **weights):
    return source.choices([*weights], [*weights.values()])[0]


def _callbacks(source, optimizer):
    chances = {
        "checkpoint": 0.2,
        "stopping": 0.15,
        "rates": 0.2,
        "own average": 0.15,
        "weight averaging": 0.1,
        "noise scale": 0.1,
        "writer": 0.2,
        "swa": 0.05,
    }
    drawn = [name for name, chance in chances.items() if source.random() < chance]
    if optimizer in {"two", "lbfgs"}:
        drawn = [name for name in drawn if name not in {"noise scale", "swa"}]
    return drawn


def _trainer_options(source, optimizer, loader):
    options = {"max_epochs": source.choice([1, 2, 3])}
    has_no_length = loader.startswith("stream")
    chance = source.random
    if optimizer != "two":
        if chance() < 0.3:
            options["gradient_clip_val"] = source.choice([0.05, 0.5])
            options["gradient_clip_algorithm"] = source.choice(["norm", "value"])
        options["accumulate_grad_batches"] = source.choice([1, 1, 1, 2, 3])
    if chance() < 0.25:
        options["limit_train_batches"] = source.choice(
            [3, 7] if has_no_length else [0.5, 0.8, 3, 7]
        )
    if chance() < 0.25:
        options["val_check_interval"] = source.choice([1, 2] if has_no_length else [0.25, 0.5, 2])
    if chance() < 0.2:
        options["max_steps"] = source.choice([1, 5, 12])
    if chance() < 0.2:
        options["reload_dataloaders_every_n_epochs"] = 1
    if chance() < 0.1:
        options["check_val_every_n_epoch"] = 2
    if chance() < 0.1:
        options["overfit_batches"] = 4
    if chance() < 0.2:
        options["min_epochs"] = 1
    options["num_sanity_val_steps"] = source.choice([0, 2])
    options["log_every_n_steps"] = source.choice([1, 3])
    return options


def _tuner_options(source):
    options = {"steps_per_trial": source.choice([1, 2, 3])}
    target = source.choice([None, 12, 24, 48, 60])
    if target is not None:
        options["target_batch_size"] = target
    if source.random() < 0.3:
        options["max_micro_batch_size"] = source.choice([5, 12, 30])
    if source.random() < 0.3:
        options["search"] = autobatch.Bisection()
    if source.random() < 0.3:
        options["prefer"] = "largest"
    return options


class Loaders:
    """Makes the loaders of a configuration at any batch size."""

    def __init__(self, drawn):
        self.drawn = drawn
        self.samples = self._samples(drawn.length)
        self.validated = self._samples(20)

    def train(self, size):
        make = {
            "dict of two": lambda: {"first": self._loader(size), "second": self._other(size)},
            "list of two": lambda: [self._loader(size), self._other(size)],
            "shortest of two": lambda: combined.CombinedLoader(
                {"first": self._loader(size), "second": self._other(size)}, "min_size"
            ),
        }.get(self.drawn.loader)
        return make() if make else self._loader(size)

    def validation(self):
        if not self.drawn.validates:
            return []
        return DataLoader(self.validated, 5, collate_fn=Collate(self.drawn.batch))

    def _samples(self, length):
        return Samples(NETWORKS[self.drawn.network][0], length, self.drawn.noise)

    def _other(self, size):
        """The second loader, whose batches are half as large; it keeps that proportion."""
        own = max(1, self.drawn.own_size // 2)
        size = max(1, round(own * size / self.drawn.own_size))
        return DataLoader(
            self._samples(self.drawn.length // 3), size, collate_fn=Collate(self.drawn.batch)
        )

    def _loader(self, size):
        kind, samples = self.drawn.loader, self.samples
        options = {"collate_fn": Collate(self.drawn.batch), "num_workers": WORKERS.get(kind, 0)}
        if kind == "plain":
            return DataLoader(samples, size, **options)
        if kind == "drop_last":
            return DataLoader(samples, size, shuffle=True, drop_last=True, **options)
        if kind == "persistent workers":
            return DataLoader(samples, size, shuffle=True, persistent_workers=True, **options)
        if kind == "own generator":
            generator = torch.Generator().manual_seed(3)
            return DataLoader(samples, size, shuffle=True, generator=generator, **options)
        if kind == "weighted":
            weights = WeightedRandomSampler([1.0 + i % 3 for i in range(len(samples))], 90)
            return DataLoader(samples, size, sampler=weights, **options)
        if kind == "subset":
            half = Subset(samples, range(0, len(samples), 2))
            return DataLoader(half, size, shuffle=True, **options)
        if kind == "concatenated":
            both = ConcatDataset([samples, self._samples(30)])
            return DataLoader(both, size, shuffle=True, **options)
        if kind == "batch sampler":
            batches = BatchSampler(RandomSampler(samples), size, drop_last=False)
            return DataLoader(samples, batch_sampler=batches, **options)
        if kind == "own batch sampler":
            return DataLoader(samples, batch_sampler=Blocks(len(samples), size), **options)
        if kind == "subclass":
            return Subclass(samples, "mine", size, **options)
        if kind.startswith("stream"):
            return DataLoader(Stream(samples), size, **options)
        return DataLoader(samples, size, shuffle=True, **options)


class Subclass(DataLoader):
    """A loader with arguments of its own."""

    def __init__(self, samples, name, batch_size, **options):
        super().__init__(samples, batch_size, shuffle=True, **options)
        self.name = name


class Data(pl.LightningDataModule):
    def __init__(self, loaders, size, *, has_attribute):
        super().__init__()
        self.loaders = loaders
        if has_attribute:
            self.batch_size = size
        else:
            self.save_hyperparameters({"batch_size": size})

    def train_dataloader(self):
        own = self.batch_size if hasattr(self, "batch_size") else self.hparams.batch_size
        return self.loaders.train(own)

    def val_dataloader(self):
        return self.loaders.validation()


def _trained(drawn, plan, folder, *, tunes):
    size = plan.micro_batch_size if plan else drawn.own_size
    pl.seed_everything(drawn.seed, verbose=False)
    loaders = Loaders(drawn)
    module = Module(drawn, size, loaders)
    callbacks = _made(drawn, folder)
    tuner = _tuner(drawn, module) if tunes else None
    options = dict(drawn.trainer)
    if plan and drawn.optimizer != "two":
        options["accumulate_grad_batches"] = plan.accumulate_grad_batches
    rows = Rows()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=rows,
        enable_checkpointing="checkpoint" in drawn.callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=drawn.precision,
        callbacks=[*callbacks.values(), *([tuner] if tuner else [])],
        **options,
    )
    if drawn.loader in MADE and drawn.loader != "hook":
        has_attribute = drawn.loader == "datamodule with attribute"
        trainer.fit(module, datamodule=Data(loaders, size, has_attribute=has_attribute))
    elif drawn.loader == "hook":
        trainer.fit(module)
    else:
        trainer.fit(module, loaders.train(size), loaders.validation())
    record = _record(module, trainer, callbacks, rows)
    return record, tuner.report.plan if tuner else plan


def _tuner(drawn, module):
    device = SimulatedAccelerator(_capacity(drawn, module))
    # Time enough for a few sizes: what is compared is training, not the choice
    return autobatch.AutoBatch(
        device=device, time_limit=30, timing_seconds=0.05, verbose=False, **drawn.tuner
    )


def _capacity(drawn, module):
    """Return the bytes of a device with room for the weights and about `room` samples."""
    outputs = []

    def keep(_, __, output):
        outputs.extend(each for each in _tensors(output) if each.is_floating_point())

    with torch.random.fork_rng(devices=[]):
        hooks = [each.register_forward_hook(keep) for each in module.modules()]
        module.net.eval()(module.loaders.samples.x[:1])
        module.net.train()
    for hook in hooks:
        hook.remove()
    weights = sum(each.numel() for each in module.parameters())
    sample = sum(each.numel() for each in outputs)
    wide = 2 if drawn.precision == "64-true" else 1
    return wide * (24 * weights + 16 * sample * drawn.room) + 20_000


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for each in tree for tensor in _tensors(each)]
    return []


def _made(drawn, folder):
    make = {
        "checkpoint": lambda: pl.callbacks.ModelCheckpoint(
            dirpath=folder / "checkpoints", every_n_train_steps=3, save_top_k=-1
        ),
        "stopping": lambda: pl.callbacks.EarlyStopping(
            "loss_epoch" if drawn.optimizer != "two" else "loss",
            patience=1,
            min_delta=0.5,
            strict=False,
            check_on_train_epoch_end=True,
        ),
        "rates": lambda: pl.callbacks.LearningRateMonitor("step"),
        "own average": Average,
        "weight averaging": pl.callbacks.EMAWeightAveraging,
        "noise scale": lambda: autobatch.NoiseScale(every=1, split_every=3),
        "writer": Writer,
        "swa": lambda: pl.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    }
    return {"hooks": Hooks(), **{name: make[name]() for name in drawn.callbacks}}


def _record(module, trainer, callbacks, rows):
    checkpoints = sorted(Path(trainer.default_root_dir).rglob("*.ckpt"))
    saved = [torch.load(path, weights_only=False) for path in checkpoints]
    compared = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")
    noise = callbacks.get("noise scale")
    return {
        "steps": module.steps,
        "hooks": module.hooks,
        "hooks of a callback": callbacks["hooks"].calls,
        "weights": module.state_dict(),
        "seen": module.seen,
        "random state of the module": module.noise.get_state(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": dict(trainer.callback_metrics),
        "logged": rows.rows,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": trainer.num_training_batches,
        "accumulation": trainer.accumulate_grad_batches,
        "loops": trainer.fit_loop.state_dict(),
        "hyperparameters": dict(module.hparams),
        "reads": module.loaders.samples.reads,
        "checkpoints": [path.name for path in checkpoints],
        "saved": [{key: each[key] for key in compared} for each in saved],
        "average": getattr(callbacks.get("own average"), "shadow", None),
        "noise scale": noise and noise.reading,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "random": random.getstate(),
    }
