"""Tests of CUDA in a Trainer: see test_gpu.py."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import autobatch
from autobatch._distributed import SingleProcess
from lightning_here import pl, quiet_trainer

# Only where there is a Lightning
from autobatch.lightning import _resources  # isort: skip

MIB = 2**20


class Numbers(Dataset):
    """Indices only: each step creates its samples on the device."""

    def __len__(self):
        return 10_000_000

    def __getitem__(self, index):
        return index


class Module(pl.LightningModule):
    def __init__(self, place):
        super().__init__()
        self.place = place
        self.net = place.network()
        self.sizes = []

    def training_step(self, batch, _):
        self.sizes.append(len(batch))
        return self.net(self.place.samples(len(batch))).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def trainer(place, *callbacks, **options):
    kind = "gpu" if place.is_real else "cpu"
    options = {"max_epochs": 1, "limit_train_batches": 12} | options
    return quiet_trainer(*callbacks, accelerator=kind, devices=1, **options)


class Growing(Dataset):
    """Batches whose size grows until one is half as large again as the memory of the device."""

    def __init__(self, largest):
        self.sizes = [largest * part // 12 for part in range(1, 19)]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return torch.arange(self.sizes[index])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="memory has to run out in training itself"
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_batch_that_grows_beyond_the_device_is_trained_in_pieces(place, precision):
    if not place.is_real:
        pytest.skip("memory has to run out in training itself")
    free, _ = torch.cuda.mem_get_info()
    # A step holds about five tensors of each sample's width
    largest = free // (5 * place.width * (4 if precision == "32-true" else 2))
    survivor = autobatch.AutoBatch(plan="keep", on_out_of_memory="split", verbose=False)
    options = {"precision": precision, "limit_train_batches": 18}
    module = Module(place)

    trainer(place, survivor, **options).fit(module, DataLoader(Growing(largest), batch_size=None))

    assert survivor.survived
    assert sum(module.sizes) == sum(Growing(largest).sizes)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trial_has_the_peak_of_the_same_steps_in_fit(place, accumulate, precision):
    size = place.bytes(1) // (4 * place.width)  # several GiB, many times a segment
    plan = autobatch.BatchPlan(size, accumulate)
    tuner = autobatch.AutoBatch(plan=plan, device=place.probe)
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    loader = DataLoader(Numbers(), size)
    report = tuner.tune(trainer(place, **options), Module(place), loader)
    gc.collect()  # Trainer and module refer to each other
    place.probe.release()
    held = place.probe.read().reserved

    module = Module(place)
    with place.probe.limited(report.budget):
        trainer(place, **options).fit(module, loader)
    peak = place.probe.read().peak

    trial_peak = report.trials[-1].peak
    print(
        f"trial {trial_peak / MIB:.3f} MiB, in a fit {peak / MIB:.3f}, {held / MIB:.3f} held before"
    )
    assert set(module.sizes) == {size}
    # On paper the batches of the loader, on the host, are charged too
    assert trial_peak == pytest.approx(peak, rel=0.01 if place.is_real else 0.03)


class Shards(Module):
    """Shards itself, on the one rank of a job of its own."""

    def configure_model(self):
        fsdp = importlib.import_module("torch.distributed.fsdp")
        if not isinstance(self.net, fsdp.FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[-1], self.net):
                fsdp.fully_shard(layer, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), foreach=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_dry_trial_of_a_sharded_module_has_the_peak_of_a_real_fit(place, accumulate, monkeypatch):
    """With NCCL on a GPU, and with gloo on paper."""
    size = place.bytes(1) // (4 * place.width)
    plan = autobatch.BatchPlan(size, accumulate)
    loader = DataLoader(Numbers(), size)

    def options():
        strategy = pl.strategies.ModelParallelStrategy(1, 1)
        return {
            "strategy": strategy,
            "accumulate_grad_batches": accumulate,
            "use_distributed_sampler": False,  # shuffles all indices, which paper charges
        }

    def dry(*_):  # a job of one rank has no other to wait for: as if it did
        return contextlib.nullcontext(SingleProcess(as_if=1))

    # Lightning leaves rank and address in the environment, which other libraries read
    environment = dict(os.environ)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(_resources, "current_ranks", dry)
            tuner = autobatch.AutoBatch(plan=plan, device=place.probe)
            report = tuner.tune(trainer(place, **options()), Shards(place), loader)
        gc.collect()  # Trainer and module refer to each other
        place.probe.release()
        with place.probe.limited(report.budget):
            trainer(place, **options()).fit(Shards(place), loader)
        peak = place.probe.read().peak
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)

    assert report.trials[-1].peak == pytest.approx(peak, rel=0.01)


def test_a_trainer_trains_with_the_plan(place):
    module = Module(place)
    largest = 64 * (place.width // 64)
    callback = autobatch.AutoBatch(
        target_batch_size=largest, memory_limit=place.bytes(1), device=place.probe
    )
    before = place.probe.read().failures

    trainer(place, callback, precision="bf16-mixed").fit(module, DataLoader(Numbers(), 16))

    plan = callback.report.plan
    assert plan.effective_batch_size == largest
    assert set(module.sizes) == {plan.micro_batch_size}
    refused = sum(not trial.fits for trial in callback.report.trials)
    assert refused or place.probe.read().failures == before
