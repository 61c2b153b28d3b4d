"""Trainings under strategies that shard, tuned and with the same numbers written by hand.

Each rank saves its results. A rank that hangs writes where it is, and ends.

torchrun --nproc-per-node 2 strategy_cases.py DIRECTORY CASE …        a case is KIND/NAME, such as fsdp2/tuned
python strategy_cases.py DIRECTORY CASE …                             the Trainer starts the other rank
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

import autobatch
from autobatch import _settings
from autobatch._distributed.sharding import local_part
from autobatch._throughput import curve
from autobatch.testing import SimulatedAccelerator
from lightning_here import data, pl, quiet_trainer
from torchrun import save_results

RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
LONGEST = 300  # seconds of all cases
TARGET = 64
# Bytes with room for less than the target at once
CAPACITY = {
    "fsdp2": 85_000,
    "fsdp2 bf16": 64_000,
    "tp": 60_000,
    "fsdp2 and tp": 60_000,
    "fsdp1": 100_000,
    "ddp": 100_000,
    "ddp gathers": 100_000,
    "ddp static": 100_000,
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inp = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.out(x)


class Model(pl.LightningModule):
    def __init__(self, kind="ddp"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = Net()
        self.record = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x).float(), y)
        self.log("loss", loss, sync_dist=True)
        self.record.append((len(x), loss.item(), self.global_step))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("validated", F.cross_entropy(self.net(x).float(), y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.trainer.model.parameters(), lr=1e-2)


class Sharded(Model):
    """Shards itself, as `ModelParallelStrategy` asks for."""

    def configure_model(self):
        if any(hasattr(each, "placements") for each in self.parameters()):
            return
        if self.kind in ("tp", "fsdp2 and tp"):
            tensor = importlib.import_module("torch.distributed.tensor.parallel")
            plan = {"up": tensor.ColwiseParallel(), "down": tensor.RowwiseParallel()}
            for block in self.net.blocks:
                tensor.parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
        if self.kind == "tp":
            return
        fsdp = importlib.import_module("torch.distributed.fsdp")
        options = {"mesh": self.device_mesh["data_parallel"]}
        if self.kind == "fsdp2 bf16":
            options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in self.net.blocks:
            fsdp.fully_shard(block, **options)
        fsdp.fully_shard(self.net, **options)


class Gathers(Model):
    """Calls collectives of its own in a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return loss + 0 * mean


class FsdpOnCpu(pl.strategies.FSDPStrategy):
    """`FSDPStrategy` without a GPU.

    Lightning 2.6 refuses the class itself there, but no class derived from it, and names no device,
    without which torch 2.13 asks for an accelerator.
    """

    def _setup_model(self, model):
        fsdp = importlib.import_module("torch.distributed.fsdp")
        return fsdp.FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


def strategy(kind):
    waits = timedelta(seconds=60)
    if kind.startswith("ddp"):
        return pl.strategies.DDPStrategy(timeout=waits, static_graph=kind == "ddp static")
    if kind == "fsdp1":
        return FsdpOnCpu(auto_wrap_policy={Block}, timeout=waits)
    data, tensor = {"tp": (1, 2), "fsdp2 and tp": (2, 2)}.get(kind, (2, 1))
    return pl.strategies.ModelParallelStrategy(data, tensor, timeout=waits)


def model(kind):
    if kind in ("ddp", "ddp static", "fsdp1"):
        return Model(kind)
    return Gathers() if kind == "ddp gathers" else Sharded(kind)


def trainer(kind, *callbacks, **options):
    # torch 2.13 cannot clip DTensors together with other tensors, or with those of another mesh;
    # Lightning 2.6 refuses to clip by the norm under FSDP1
    clip = None if kind.endswith("tp") else 0.05
    options = {
        "max_epochs": 1,
        "devices": 4 if kind == "fsdp2 and tp" else 2,
        "strategy": strategy(kind),
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": "value" if kind == "fsdp1" else "norm",
        **options,
    }
    return quiet_trainer(*callbacks, **options)


def loader(batch_size=4, samples=128):
    return DataLoader(data(samples), batch_size, shuffle=samples > 32)


def tuner(device, timing_seconds=None):
    if not isinstance(device, SimulatedAccelerator):
        device = SimulatedAccelerator(device)
    return autobatch.AutoBatch(
        target_batch_size=TARGET,
        device=device,
        memory_limit=1.0,
        steps_per_trial=1,
        timing_seconds=timing_seconds,
    )


def shards(state):
    """Return copies of the tensors of a state, of a sharded one the part of this rank."""
    return tree_map_only(torch.Tensor, lambda each: local_part(each).detach().clone(), state)


def left_by(fitted, module):
    """Return what a training leaves behind on this rank."""
    return {
        "record": module.record,
        "weights": [shards(each) for each in fitted.strategy.model.parameters()],
        "optimizer": [shards(each.state_dict()) for each in fitted.optimizers],
        "metrics": {name: value.item() for name, value in fitted.callback_metrics.items()},
        "global_step": fitted.global_step,
        "random": torch.get_rng_state(),
    }


def trained(kind, *callbacks, batch_size=4, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    module = model(kind)
    fitted = trainer(kind, *callbacks, **options)
    fitted.fit(module, loader(batch_size), loader(16, 32), ckpt_path=ckpt_path)
    return left_by(fitted, module)


def tuned(kind, device=None, timing_seconds=None):
    """Train twice: tuned, and with the same numbers written by hand."""
    callback = tuner(device or CAPACITY[kind], timing_seconds)
    left = trained(kind, callback)
    return {"tuned": left, "by hand": by_hand(kind, callback.report.plan), **found(callback)}


def by_hand(kind, plan, **options):
    accumulate = plan.accumulate_grad_batches
    return trained(
        kind, batch_size=plan.micro_batch_size, accumulate_grad_batches=accumulate, **options
    )


def found(callback):
    report = callback.report
    plan = report.plan
    return {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size),
        "trials": [(trial.batch_size, str(trial.outcome), trial.peak) for trial in report.trials],
        "budget": report.budget,
        "curve": [point.batch_size for point in report.curve],
        "validation": report.validation_batch_size,
        "notes": report.notes,
    }


def scarce(kind):
    """The second rank has less memory; there is time to time sizes."""
    return tuned(kind, SimulatedAccelerator(CAPACITY[kind] - 5_000 * RANK), timing_seconds=30)


def failing(kind):
    """Rank 1 runs out of memory at one allocation of its first trial, and rank 0 never does."""
    device = SimulatedAccelerator(CAPACITY[kind])
    device.ledger.refuse_at = Random(kind).randrange(1, 120) if RANK == 1 else None
    return tuned(kind, device)


class Explodes(Sharded):
    """Its own error, on one rank alone and in the middle of a trial."""

    explodes = True

    def training_step(self, batch, batch_idx):
        if self.explodes and RANK == 1 and len(self.record) == 1:
            self.net.blocks[0](batch[0])  # in the middle of a forward pass
            raise ZeroDivisionError("mine")
        return super().training_step(batch, batch_idx)


def exploding(kind):
    pl.seed_everything(1, verbose=False)
    module, fitted = Explodes(kind), trainer(kind)
    try:
        tuner(CAPACITY[kind]).tune(fitted, module, loader())
    except (ZeroDivisionError, autobatch.AutobatchError) as error:
        raised = f"{type(error).__name__}: {error}"
        notes = getattr(error, "__notes__", [])
    module.explodes = False
    fitted.fit(module, loader(16))  # collectives are in step
    return {"error": raised, "notes": notes, "steps": fitted.global_step}


def resumed(kind, directory):
    """Go on from a checkpoint, tuned and with the same numbers written by hand."""
    results = {}
    callback, path = tuner(CAPACITY[kind]), Path(directory) / "last.ckpt"
    pl.seed_everything(1, verbose=False)
    first = trainer(kind, callback)
    first.fit(model(kind), loader())
    first.save_checkpoint(path)
    plan = callback.report.plan
    again = tuner(CAPACITY[kind])
    results["tuned"] = trained(kind, again, max_epochs=2, ckpt_path=path)
    results["by hand"] = by_hand(kind, plan, max_epochs=2, ckpt_path=path)
    return {**results, **found(again), "first": found(callback)["plan"]}


def refused(kind):
    with pytest.raises(autobatch.AutobatchError) as refusal:
        tuner(CAPACITY[kind]).tune(trainer(kind), model(kind), loader())
    return str(refusal.value)


CASES = {
    "tuned": tuned,
    "refused": refused,
    "scarce": scarce,
    "failing": failing,
    "exploding": exploding,
}


def main(directory, *names):
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    _settings.TIMING_SECONDS = 0.1  # enough for a few visits
    curve._TURN_SECONDS, curve._MAX_TURNS = 0.05, 1  # each size is timed once
    cases = CASES | {"resumed": lambda kind: resumed(kind, directory)}

    def run(case):
        kind, _, name = case.partition("/")
        return cases[name](kind)

    save_results(directory, names, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
