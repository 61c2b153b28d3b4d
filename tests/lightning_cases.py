"""Training runs to compare: tuned by AutoBatch, and with the same two numbers written by hand.

python lightning_cases.py tuned results.pt plans.json
python lightning_cases.py by-hand results.pt plans.json
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    random_split,
)

from lightning_here import pl, quiet_trainer


class Noisy(Dataset):
    """Data with its own random numbers, and a count of reads."""

    def __init__(self, length=600):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(length, 16, generator=generator)
        self.y = self.x[:, :4].argmax(1)
        self.noise = np.random.default_rng(7)
        self.reads = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads += 1
        shift = self.noise.normal() + random.random() + torch.rand(()).item()
        return self.x[index] + 0.01 * shift, self.y[index], index


class Model(pl.LightningModule):
    """A module with all kinds of state that a trial could change."""

    def __init__(self, batch_size=4, schedule="step", source="passed", workers=0):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, 4),
        )
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.noise = torch.Generator().manual_seed(11)
        self.record = []
        self.hooks = []
        self.data = Noisy()
        self.hard_coded = 4

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.seen = self.seen + len(x)
        x = x + 0.1 * torch.rand(x.shape, generator=self.noise) + 0.01 * np.random.rand()
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        rate = self.optimizers().param_groups[0]["lr"]
        self.record.append((len(x), index.tolist(), loss.item(), rate, batch_idx, self.global_step))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4 * self.hparams.batch_size)
        if self.hparams.schedule == "step":
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        else:
            total = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=int(total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self):
        size = self.hard_coded if self.hparams.source == "hook without" else self.hparams.batch_size
        return DataLoader(self.data, size, shuffle=True, num_workers=self.hparams.workers)

    def on_train_start(self):
        self.hooks.append("train start")

    def on_train_batch_start(self, batch, batch_idx):
        self.hooks.append("batch start")

    def on_train_epoch_end(self):
        self.hooks.append("epoch end")


class Stream(IterableDataset):
    """A stream of samples from a generator that cannot go back."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


class Blocks(Sampler):
    """A custom batch sampler: shuffled blocks of neighbours."""

    def __init__(self, length, batch_size):
        self.length = length
        self.batch_size = batch_size
        self.random = np.random.default_rng(3)

    def __iter__(self):
        starts = np.arange(0, self.length - self.batch_size + 1, self.batch_size)
        for start in self.random.permutation(starts).tolist():
            yield list(range(start, start + self.batch_size))

    def __len__(self):
        return self.length // self.batch_size


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.batch_size = batch_size
        self.data = Noisy()
        self.random = np.random.default_rng(1)
        self.generator = torch.Generator().manual_seed(4)

    def train_dataloader(self):
        """Draw a random split, and its order from the same generator."""
        drawn = Subset(self.data, self.random.permutation(600)[:500].tolist())
        part, _ = random_split(drawn, [480, 20], generator=self.generator)
        return DataLoader(
            part,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=self.generator,
        )


class ByHand(Model):
    """Two networks, each with its own optimizer and schedule, under manual optimization."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False
        self.maker = nn.Linear(4, 16)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        critic, maker = self.optimizers()
        self.seen = self.seen + len(x)
        noise = 0.1 * torch.rand((len(x), 4), generator=self.noise)
        with_label = F.one_hot(y, 4) + noise

        self.toggle_optimizer(maker)
        fooled = -self.net(self.maker(with_label))[:, 0].mean()
        self.manual_backward(fooled)
        maker.step()
        maker.zero_grad()
        self.untoggle_optimizer(maker)

        self.toggle_optimizer(critic)
        loss = F.cross_entropy(self.net(x), y)
        loss = loss + 0.1 * self.net(self.maker(with_label).detach())[:, 0].mean()
        self.manual_backward(loss)
        if (batch_idx + 1) % 3 == 0:
            self.clip_gradients(critic, gradient_clip_val=0.5)
            critic.step()
            critic.zero_grad()
            self.lr_schedulers()[0].step()
        self.untoggle_optimizer(critic)

        if self.trainer.is_last_batch:
            self.lr_schedulers()[1].step()
        self.log("loss", loss, on_step=True, on_epoch=True)
        rate = critic.param_groups[0]["lr"]
        self.record.append((len(x), index.tolist(), loss.item(), rate, batch_idx, self.global_step))

    def configure_optimizers(self):
        critic = torch.optim.AdamW(self.net.parameters(), 1e-4 * self.hparams.batch_size)
        maker = torch.optim.SGD(self.maker.parameters(), 1e-2, momentum=0.9)
        rates = torch.optim.lr_scheduler
        return [critic, maker], [
            rates.StepLR(critic, 3),
            rates.ExponentialLR(maker, 0.5),
        ]


class Quasi(Model):
    """A module with LBFGS, which evaluates its closure several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(
            self.parameters(), 1e-2, max_iter=3, history_size=2, line_search_fn=None
        )


class Plateau(Model):
    """A schedule over epochs, and another over a metric of training."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)
        rates = torch.optim.lr_scheduler
        waits = rates.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return [optimizer], [
            {"scheduler": waits, "monitor": "loss_epoch"},
            {"scheduler": rates.ExponentialLR(optimizer, 0.7), "interval": "epoch"},
        ]


class Frozen(Model):
    """A module whose head alone is trained."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        head = [part for part in self.parameters() if part.requires_grad]
        return torch.optim.Adam(head, 1e-4 * self.hparams.batch_size)


class Compilable(Model):
    """A module without `self.log`, which torch 2.13 cannot compile in Lightning 2.6."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        self.seen = self.seen + len(x)
        return F.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.record.append((len(batch[0]), outputs["loss"].item(), self.global_step))


class PartlyCompiled(Model):
    """A module with a compiled network."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.net = torch.compile(self.net, backend="eager")


def half():
    """Mixed precision of 16 bits; its first scale is far too large."""
    plugins = importlib.import_module(f"{pl.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    return plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)


CASES = {
    "passed": {},
    "batch sampler": {"source": "batch sampler"},
    "stream": {"source": "stream"},
    "hook": {"source": "hook"},
    "hook without": {"source": "hook without"},
    "one cycle": {"schedule": "one cycle"},
    "one cycle, hook": {"schedule": "one cycle", "source": "hook"},
    "one cycle, workers": {"schedule": "one cycle", "workers": 1},
    "one cycle, own generator": {"schedule": "one cycle", "generator": True},
    "one cycle, datamodule": {"schedule": "one cycle", "source": "datamodule"},
    "clipped": {"trainer": {"gradient_clip_val": 0.5}},
    "bf16": {"trainer": {"precision": "bf16-mixed"}},
    "limited": {"trainer": {"limit_train_batches": 0.5, "reload_dataloaders_every_n_epochs": 1}},
    "by hand": {"model": ByHand, "by hand": True},
    "lbfgs": {"model": Quasi},
    "plateau": {"model": Plateau, "trainer": {"max_epochs": 4}},
    "frozen": {"model": Frozen},
    "fp16": {"plugin": half, "trainer": {"max_epochs": 3}},
    "clipped by value": {
        "trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    },
    "compiled": {"model": Compilable, "compiled": True},
    "compiled part": {"model": PartlyCompiled},
}
# One of each kind of step also times the sizes: enough for a few visits
TIMED = {"passed", "one cycle, workers", "by hand", "lbfgs", "fp16", "compiled"}


def run(case, plan):
    """Train one case: tuned without a plan, else with its numbers written by hand."""
    options = {
        "schedule": "step",
        "source": "passed",
        "workers": 0,
        "generator": False,
        "model": Model,
        "by hand": False,
        "plugin": None,
        "compiled": False,
        "trainer": {},
    } | CASES[case]
    callbacks = []
    if plan is None:
        import autobatch
        from autobatch.testing import SimulatedAccelerator

        tuner = autobatch.AutoBatch(
            target_batch_size=120,
            device=SimulatedAccelerator("450KiB"),
            search=autobatch.Bisection(resolution=0.5),
            steps_per_trial=2,
            timing_seconds=0.2 if case in TIMED else 0.0,
        )
        callbacks = [tuner]
    micro, accumulate = plan or (4, 1)
    pl.seed_everything(1, verbose=False)
    model = options["model"](micro, options["schedule"], options["source"], options["workers"])
    model.hard_coded = micro
    trainer = quiet_trainer(
        *callbacks,
        # With manual optimization the module accumulates, if it does
        accumulate_grad_batches=1 if options["by hand"] else accumulate,
        plugins=options["plugin"] and options["plugin"](),
        **options["trainer"],
    )
    if options["source"] == "datamodule":
        trainer.fit(model, datamodule=Data(micro))
    elif options["source"] == "batch sampler":
        trainer.fit(model, DataLoader(model.data, batch_sampler=Blocks(len(model.data), micro)))
    elif options["source"] == "stream":
        trainer.fit(model, DataLoader(Stream(model.data), micro))
    elif options["source"] == "passed":
        generator = torch.Generator().manual_seed(2) if options["generator"] else None
        workers = options["workers"]
        loader = DataLoader(
            model.data, micro, shuffle=True, num_workers=workers, generator=generator
        )
        fitted = torch.compile(model, backend="eager") if options["compiled"] else model
        trainer.fit(fitted, loader)
    else:
        trainer.fit(model)
    result = {
        "record": model.record,
        "hooks": model.hooks,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "seen": model.seen,
        "noise": model.noise.get_state(),
        "reads": model.data.reads,
        "global_step": trainer.global_step,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": list(random.getstate()[1]),
    }
    if plan is not None:
        return result, plan
    found = tuner.report.plan
    result["trials"] = [(trial.batch_size, str(trial.outcome)) for trial in tuner.report.trials]
    return result, (found.micro_batch_size, found.accumulate_grad_batches)


def main(mode, results, plans):
    warnings.simplefilter("ignore")
    importlib.import_module("torch._dynamo")  # or else the first step imports it
    gc.freeze()  # a search collects after each trial: not what imports made
    known = json.loads(Path(plans).read_text()) if mode == "by-hand" else dict.fromkeys(CASES)
    done = {case: run(case, plan) for case, plan in known.items()}
    torch.save({case: result for case, (result, _) in done.items()}, results)
    if mode == "tuned":
        Path(plans).write_text(json.dumps({case: plan for case, (_, plan) in done.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
