"""Trainings by several processes on the CPU, tuned and with the same numbers written by hand.

Each rank saves its results.

python ddp_cases.py DIRECTORY launched         Lightning starts the second process
torchrun --nproc-per-node 2 ddp_cases.py DIRECTORY CASE …
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import _distributed, _settings
from autobatch._distributed import current_ranks
from autobatch.testing import PaperDevice, SimulatedAccelerator
from lightning_here import data as samples
from lightning_here import pl, quiet_trainer
from torchrun import save_results

torchmetrics = importlib.import_module("torchmetrics")

RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
NODES = int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def data(length=600):
    return TensorDataset(*samples(length).tensors, torch.arange(length))


class Model(pl.LightningModule):
    def __init__(self, batch_size=4, source="passed"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 4),
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.record = []
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, y, index = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.record.append((index.tolist(), loss.item(), self.global_step))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4 * self.hparams.batch_size)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self):
        return DataLoader(data(), self.hparams.batch_size, shuffle=True)


class Synchronised(Model):
    """Waits for other ranks in a step, in as many ways as Lightning and torch offer."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        gathered = self.all_gather(loss.detach())
        assert gathered.shape == (self.trainer.world_size,)
        self.accuracy.compute()
        self.trainer.strategy.barrier()
        assert self.trainer.strategy.broadcast(RANK) in (0, RANK)
        assert self.trainer.strategy.reduce_boolean_decision(decision=True)
        dist.all_reduce(loss.detach())
        return loss


class Explodes(Model):
    """Its own error, on one rank alone and in the middle of a trial."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.steps == 1:
            raise ZeroDivisionError("mine")
        return super().training_step(batch, batch_idx)


class Contrastive(Model):
    """Compares samples with each other, and on one rank takes whole batches alone."""

    def __init__(self, whole_on):
        super().__init__()
        self.net = nn.Linear(16, 4)
        self.whole_on = whole_on

    def training_step(self, batch, batch_idx):
        x, _, _ = batch
        if self.whole_on == RANK and len(x) < 16:
            raise RuntimeError("half a batch")
        z = F.normalize(self.net(x))
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def trainer(*callbacks, **options):
    strategy = pl.strategies.DDPStrategy(timeout=timedelta(seconds=60))
    job = {"devices": 2 // NODES, "num_nodes": NODES, "strategy": strategy}
    return quiet_trainer(*callbacks, **job, **options)


def tuner(capacities=("500KiB", "500KiB"), device=None, **options):
    return autobatch.AutoBatch(
        **{
            "target_batch_size": 240,
            "device": device or SimulatedAccelerator(capacities[RANK]),
            "steps_per_trial": 2,
            "verbose": False,
            **options,
        }
    )


def loader(batch_size=4):
    return DataLoader(data(), batch_size, shuffle=True)


def trained(model, callback=None, plan=None):
    """Return the state that a training leaves behind."""
    fitted = trainer(*([callback] if callback else []))
    if plan:
        fitted.accumulate_grad_batches = plan.accumulate_grad_batches
    micro = plan.micro_batch_size if plan else 4
    fitted.fit(model, loader(micro) if model.hparams.source == "passed" else None)
    return {
        "record": model.record,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": fitted.optimizers[0].state_dict(),
        "metrics": {name: value.item() for name, value in fitted.callback_metrics.items()},
        "global_step": fitted.global_step,
        "random": torch.get_rng_state(),
    }


def compared(source, capacities=("500KiB", "500KiB")):
    """Train twice: tuned, and with the same numbers written by hand."""
    pl.seed_everything(1, verbose=False)
    # Ranks that differ in memory time the sizes as well: enough for a few visits
    seconds = 0.2 if capacities[0] != capacities[1] else 0.0
    callback = tuner(capacities, timing_seconds=seconds)
    tuned = trained(Model(source=source), callback)
    plan = callback.report.plan
    pl.seed_everything(1, verbose=False)
    by_hand = trained(Model(plan.micro_batch_size, source), plan=plan)
    return {"tuned": tuned, "by hand": by_hand, **found(callback)}


def found(callback):
    plan = callback.report.plan
    return {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size),
        "trials": [(trial.batch_size, str(trial.outcome)) for trial in callback.report.trials],
        "budget": callback.report.budget,
    }


class Validated(Model):
    """Validates too, in batches that do not fit, and says so to a logger."""

    def __init__(self, batch_size=4, validation=400):
        super().__init__(batch_size)
        self.validation = validation
        self.sizes = []

    def validation_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        room = torch.empty(len(batch[0]), 1024)
        self.log("room", float(room.shape[1]), sync_dist=True)

    def val_dataloader(self):
        return DataLoader(data(), self.validation)


def everything(directory):
    """Validation, a logger, checkpoints, a test, and a second fit."""

    def run(sizes, *callbacks, **options):
        pl.seed_everything(1, verbose=False)
        model = Validated(*sizes)
        logger = pl.loggers.CSVLogger(directory, version=len(callbacks))
        fitted = trainer(*callbacks, logger=logger, enable_checkpointing=True, **options)
        fitted.fit(model, loader(model.hparams.batch_size))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return fitted, {
            "record": model.record,
            "weights": weights,
            "sizes": list(model.sizes),
            "random": torch.get_rng_state(),
        }

    callback = tuner()
    fitted, tuned = run((), callback)
    report = callback.report
    plan = report.plan
    sizes = (plan.micro_batch_size, report.validation_batch_size)
    _, written = run(sizes, accumulate_grad_batches=plan.accumulate_grad_batches)
    path = fitted.strategy.broadcast(fitted.checkpoint_callback.best_model_path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    again = trainer(callback)
    again.fit(Validated(), loader())
    return {
        "tuned": tuned,
        "by hand": written,
        **found(callback),
        "validation": report.validation_batch_size,
        "trials of the second fit": len(callback.report.trials),
        "saved": saved["AutoBatch"]["micro_batch_size"],
        "files": sorted(file.name for file in Path(fitted.logger.log_dir).iterdir()),
    }


def failing(allocations):
    """Rank 1 runs out of memory at an allocation, rank 0 never does."""
    plans = {}
    for allocation in allocations:
        device = SimulatedAccelerator("500KiB")
        if RANK == 1:
            device.ledger.refuse_at = allocation
        callback = tuner(device=device)
        callback.tune(trainer(), Model(), loader())
        plans[allocation] = found(callback)
    return plans


def synchronised():
    callback = tuner(target_batch_size=None)
    callback.tune(trainer(), Synchronised(), loader())
    return found(callback)


def exploding():
    model = Explodes()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        tuner().tune(trainer(), model, loader())
    except (ZeroDivisionError, autobatch.AutobatchError) as error:
        same = all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        return {"error": f"{type(error).__name__}: {error}", "unchanged": same}
    return {"error": None}


class RefusesToLoad(Model):
    """Its own error on one rank, when it is asked for the loader after the trials."""

    def train_dataloader(self):
        applies = any(frame.name == "before_training" for frame in traceback.extract_stack())
        if RANK == 1 and applies:
            raise ZeroDivisionError("mine")
        return super().train_dataloader()


def refusing():
    """Rank 1 fails while the plan is applied; collectives are out of step then, so it comes last."""
    _distributed._WAIT_FOR_READERS = timedelta(
        seconds=1
    )  # rank 0 waits in a collective of Lightning
    try:
        trainer(tuner()).fit(RefusesToLoad(source="hook"))
    except (ZeroDivisionError, autobatch.AutobatchError) as error:
        return f"{type(error).__name__}: {error}"


def uneven():
    """`find` with shards of different lengths around the target."""
    device = PaperDevice("1MiB", per_sample=2000)
    lengths = (230, 250)
    report = autobatch.find(
        device.workload, target_batch_size=240, dataset_size=lengths[RANK], device=device
    )
    return report.plan, [note for note in report.notes if "not sought" in note]


def missing():
    """Only one rank has the callback, and ends; the other one waits for it until then."""
    _distributed._LONGEST_WAIT = timedelta(seconds=2)
    callbacks = [tuner()] if RANK == 0 else []
    try:
        trainer(*callbacks).fit(Model(), loader())
    except (RuntimeError, autobatch.AutobatchError) as error:
        return str(error)


def aborting():
    """Let rank 1 fail in a gather, between two, after the last, and nested; return all errors."""

    def fail(error):
        if RANK == 1:
            raise error
        return RANK

    def in_a_gather(ranks):
        ranks.gather(fail(autobatch.DoesNotFitError("no room")))

    def between_gathers(ranks):
        ranks.gather(RANK)
        fail(ZeroDivisionError("mine"))
        ranks.gather(RANK)
        ranks.gather(RANK)

    def after_the_last_gather(ranks):
        ranks.gather(RANK)
        fail(ZeroDivisionError("mine"))

    def raised(ranks, act):
        try:
            with ranks.abort_together():
                act(ranks)
        except (ZeroDivisionError, autobatch.AutobatchError) as error:
            return f"{type(error).__name__}: {error}"

    with current_ranks() as ranks:
        outcome = {
            act.__name__.replace("_", " "): raised(ranks, act)
            for act in (in_a_gather, between_gathers, after_the_last_gather)
        }
        with ranks.abort_together():
            outcome["nested"] = [raised(ranks, in_a_gather), tuple(ranks.gather(RANK))]
        return {**outcome, "afterwards": tuple(ranks.gather(RANK))}


def splitting():
    """Return the notes of both ranks if one of them cannot test its loss."""
    told = {}
    for rank in (0, 1):
        callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(16, 4, 2))
        callback.tune(trainer(), Contrastive(rank), loader())
        told[rank] = callback.report.notes
    return told


def standalone():
    """`find` in a job that is there already, with a model that no one has wrapped."""
    model = nn.Linear(16, 256)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                (model(torch.ones(batch_size, 16)).mean() / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    device = SimulatedAccelerator(("500KiB", "200KiB")[RANK])
    report = autobatch.find(train, target_batch_size=2000, device=device)

    def selective(batch_size, accumulate):
        if RANK == 1 and 512 % batch_size:
            raise AssertionError("the queue takes whole batches")
        yield from train(batch_size, accumulate)

    plan = report.plan
    return {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size),
        "effective": plan.effective_batch_size,
        "selective": autobatch.find(selective, target_batch_size=240, device=device).plan,
    }


class KnownNoise(pl.LightningModule):
    """The loss -w·x has the gradient -x: the noise scale of this data is 6 / (6 * 0.25) = 4."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))

    def training_step(self, batch, batch_idx):
        return self(batch[0])

    def forward(self, x):
        return -(x @ self.w).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def noise():
    """Measure the noise scale on two ranks, in a Trainer and in a plain loop."""
    readings, weights = {}, {}
    x = 0.5 + torch.randn(8 * 200, 6, generator=torch.Generator().manual_seed(7))
    for name, accumulate in (("ranks", 1), ("accumulated", 2), ("unwatched", 2)):
        pl.seed_everything(1, verbose=False)
        callback = autobatch.NoiseScale(every=1)
        watching = [] if name == "unwatched" else [callback]
        model = KnownNoise()
        batches = DataLoader(TensorDataset(x), 8, shuffle=True)
        trainer(*watching, accumulate_grad_batches=accumulate).fit(model, batches)
        readings[name] = callback.reading
        weights[name] = model.w.detach().clone()
    model = nn.parallel.DistributedDataParallel(KnownNoise())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    generator = torch.Generator().manual_seed(RANK)
    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as watch:
        for _ in range(200):
            model(0.5 + torch.randn(8, 6, generator=generator)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    with autobatch.noise_scale(model.module, micro_batch_size=8) as unwrapped:
        readings["unwrapped"] = unwrapped.reading
    return {**readings, "plain": watch.reading, "weights": weights}


def answering():
    """`find` within a limit on latency, with a device that is twice as slow on the second rank."""
    seconds = (1e-4, 2e-4)[RANK]
    paper = PaperDevice("1MiB", seconds_per_step=0, seconds_per_sample=seconds)
    report = autobatch.find(
        lambda batch_size: paper.workload(batch_size, 1),
        latency_limit=0.0101,
        device=paper,
    )
    plan = report.plan
    return {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size),
        "latencies": report.latencies,
    }


CASES = {
    "noise": noise,
    "launched": lambda: compared("passed"),
    "passed": lambda: compared("passed"),
    "hook": lambda: compared("hook"),
    "less memory": lambda: compared("passed", ("500KiB", "330KiB")),
    "failing": lambda: failing([5, 45, 110]),
    "synchronised": synchronised,
    "exploding": exploding,
    "splitting": splitting,
    "aborting": aborting,
    "standalone": standalone,
    "answering": answering,
    "uneven": uneven,
    "refusing": refusing,
    "missing": missing,
}


def main(directory, *names):
    _settings.TIMING_SECONDS = 0.0
    cases = CASES | {"everything": lambda: everything(directory)}
    save_results(directory, names, lambda name: cases[name]())


if __name__ == "__main__":
    main(*sys.argv[1:])
