"""Helpers of the tests of find()."""

from __future__ import annotations

from math import inf

import torch

import autobatch
from autobatch._memory import memory_budget
from autobatch._prior_plan import PriorPlan
from autobatch._subject import PlainLoop
from autobatch._trials.measure import run_trial
from autobatch._trials.watched import Watched
from autobatch._trials.workload import SizedWorkload
from autobatch._tune import tune
from autobatch.report import Settings
from contexts import IdenticalRanks, trial_context
from networks import Perceptron
from nvml_standin import Card, FakeGpu

MIB, GIB = 2**20, 2**30


def perceptron():
    torch.manual_seed(0)
    model = Perceptron()
    return model, torch.optim.AdamW(model.parameters())


def state_of(model, optimizer):
    return [
        *(value.clone() for value in model.state_dict().values()),
        model.noise.get_state(),
        torch.get_rng_state(),
        torch.tensor(model.training),
        torch.tensor(len(model.sizes)),
        torch.tensor(len(optimizer.state)),
        torch.tensor([parameter.grad is None for parameter in model.parameters()]),
    ]


def unchanged(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def accepted(workload, size, device):
    """Return whether a size runs on a device within all of its memory."""
    budget = memory_budget(device.read(), 1.0)
    with trial_context(device, budget=budget) as context:
        return run_trial(
            SizedWorkload(workload, size, accumulate=1, may_be_refused=False),
            steps=2,
            is_timed=True,
            deadline=inf,
            context=context,
        ).fits


class OneGpu:
    """A simulated GPU of 10 GiB, on which a training step holds 10 MiB per sample."""

    def __init__(self, monkeypatch, others=0):
        card = Card("4b2f8c1e-0000-0000-0000-000000000000", total=10 * GIB, others=others)
        self.gpu = FakeGpu(cards=(card,)).install(monkeypatch)

    def train(self, batch_size):
        while True:
            with self.gpu.holding(0, batch_size * 10 * MIB):
                pass
            yield


def tuned(device, *, world_size, **settings):
    """Tune a loop as one of several identical ranks."""
    options = dict.fromkeys(Settings.model_fields) | {
        "memory_limit": 0.9,
        "steps_per_trial": 2,
        "percentile": None,
        "prefer": "largest",
    }
    checked = Settings.checked(**options | settings)
    with trial_context(device, ranks=IdenticalRanks(world_size)) as context:
        return tune(
            PlainLoop(device.workload, True, checked, context, Watched(device.workload, ())),
            checked,
            context,
            autobatch.GuidedBisection(),
            PriorPlan(),
        )
