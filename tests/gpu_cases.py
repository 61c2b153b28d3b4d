"""Cases that need a process of their own: settings read once, and errors that end a CUDA context.

python gpu_cases.py allocator|identity|ddp|assertion cuda|paper     prints JSON in the last line
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import _settings
from gpu_place import on_cuda, on_paper
from sameness import same

RETRIES = "num_alloc_retries"


def training(place, model, optimizer):
    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                loss = model(place.samples(batch_size)).square().mean()
                (loss / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train


def trained_on(place, train, report):
    """Train 200 steps (20 on paper) within the budget; return the out-of-memory errors."""
    probe, plan = place.probe, report.plan
    before = torch.cuda.memory_stats(0)
    loop = train(plan.micro_batch_size, plan.accumulate_grad_batches)
    probe.release()
    with probe.limited(report.budget), contextlib.closing(loop):
        for _ in range(200 if place.is_real else 20):
            next(loop)
        probe.clock()
    after = torch.cuda.memory_stats(0)
    more = {name: after[name] - before[name] for name in ("num_ooms", RETRIES)}
    print(
        f"trained with {plan}: {probe.read().peak / report.budget:.1%} of the budget, "
        f"{more[RETRIES]} allocations repeated"
    )
    return more["num_ooms"]


def allocator(place):
    """Search and train with the allocator selected by the environment."""
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))
    report = autobatch.find(train, device=place.probe, memory_limit=place.bytes(1))
    return {
        "backend": torch.cuda.get_allocator_backend() if place.is_real else "paper",
        "expandable": has_expandable_segments(place),
        "found": report.plan.micro_batch_size,
        "budget": report.budget,
        "trials": [(trial.batch_size, str(trial.outcome), trial.peak) for trial in report.trials],
        "ooms": trained_on(place, train, report),
        "share": place.probe._allocator_share(),
    }


def has_expandable_segments(place):
    """Return True if torch's allocator uses expandable segments; not every platform has them."""
    if not place.is_real or torch.cuda.get_allocator_backend() != "native":
        return False
    segments = torch.cuda.memory_snapshot()
    return any(segment.get("is_expandable") for segment in segments)


def lightning():
    for name in ("pytorch_lightning", "lightning.pytorch"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise SystemExit("needs Lightning")


def lightning_model(pl):
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(16, 256),
                nn.BatchNorm1d(256),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Linear(256, 4),
            )
            self.losses = []

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.detach().cpu())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    return Model()


def fitted(place, plan, callback, **options):
    pl = lightning()
    pl.seed_everything(1, verbose=False)
    model = lightning_model(pl)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(480, 16, generator=generator)
    data = TensorDataset(x, x[:, :4].argmax(1))
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "gpu" if place.is_real else "cpu",
            "devices": 1,
            "callbacks": [callback] if callback else [],
            "accumulate_grad_batches": plan.accumulate_grad_batches,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(model, DataLoader(data, plan.micro_batch_size, shuffle=True))
    cuda = torch.cuda.get_rng_state() if place.is_real else None
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return {
        "losses": model.losses,
        "weights": weights,
        "numbers": torch.get_rng_state(),
        "cuda numbers": cuda,
    }


def identity(place):
    """Compare training after tuning with training by the same two numbers set manually."""
    torch.use_deterministic_algorithms(mode=True)
    plan = autobatch.BatchPlan(24, 5)
    tuner = autobatch.AutoBatch(target_batch_size=120, max_micro_batch_size=24, device=place.probe)
    options = {"deterministic": True}
    tuned = fitted(place, autobatch.BatchPlan(4), tuner, **options)
    found = tuner.report.plan
    manual = fitted(place, found, None, **options)
    return {
        "differs": [name for name in tuned if not same(tuned[name], manual[name])],
        "effective": found.effective_batch_size,
        "target": plan.effective_batch_size,
        "updates": len(tuned["losses"]) // found.accumulate_grad_batches,
    }


def ddp(place):
    """Tune and train one process in DistributedDataParallel; NCCL on a GPU."""
    pl = lightning()
    backend = "nccl" if place.is_real else "gloo"
    strategy = importlib.import_module(f"{pl.__name__}.strategies").DDPStrategy(
        process_group_backend=backend
    )
    tuner = autobatch.AutoBatch(target_batch_size=120, max_micro_batch_size=24, device=place.probe)
    used = {}

    class Watch(pl.Callback):
        def on_train_start(self, trainer, module):
            used["backend"] = torch.distributed.get_backend()
            used["wrapped"] = type(trainer.model).__name__

    result = fitted(
        place,
        autobatch.BatchPlan(4),
        tuner,
        strategy=strategy,
        callbacks=[tuner, Watch()],
    )
    plan = tuner.report.plan
    torch.distributed.destroy_process_group()
    return {
        **used,
        "effective": plan.effective_batch_size,
        "ranks": plan.world_size,
    } | {"steps": len(result["losses"])}


def assertion(place):
    """Use an index out of range: on a GPU a device-side assert, after which the context is lost."""
    model = nn.Embedding(10, 4).to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(batch_size):
        while True:
            indices = torch.full((batch_size,), 10, device=place.device)
            model(indices).sum().backward()
            optimizer.step()
            yield

    autobatch.find(train, device=place.probe)


CASES = {case.__name__: case for case in (allocator, identity, ddp, assertion)}


def main(case, kind):
    warnings.simplefilter("ignore")
    _settings.TIMING_SECONDS = 0.0
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        on_cuda() if kind == "cuda" else on_paper(monkeypatch) as place,
    ):
        result = CASES[case](place)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
