"""Loops of Lightning's Fabric, tuned by find()."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import autobatch
from autobatch.testing import SimulatedAccelerator
from sameness import same

if not (find_spec("lightning") or find_spec("lightning_fabric")):
    pytest.skip("needs Fabric", allow_module_level=True)

from fabric_loops import Loop


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_after_tuning_equals_the_plan_by_hand(precision):
    loop = Loop(precision)
    device = SimulatedAccelerator(120_000)
    report = autobatch.find(
        loop.train,
        target_batch_size=160,
        device=device,
        timing_seconds=0,
        max_micro_batch_size=40,
    )
    trained = loop.result(report.plan, updates=6)

    by_hand = Loop(precision).result(report.plan, updates=6)

    assert report.plan.accumulate_grad_batches > 1
    assert report.plan.effective_batch_size == 160
    assert same(trained, by_hand)


def test_the_scaler_of_a_fabric_is_restored():
    """Fabric makes one on CUDA only: this one is set by hand, and steps in every trial."""
    loop = Loop("32-true")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    loop.fabric._strategy.precision.scaler = scaler
    lazy = torch.zeros(1, requires_grad=True)
    unused = torch.optim.SGD([lazy])

    def train(batch_size, accumulate):
        for _ in loop.train(batch_size, accumulate):
            scale(loop.fabric, lazy.sum() * 2, unused)
            yield

    autobatch.find(
        train, device=SimulatedAccelerator(120_000), timing_seconds=0, max_micro_batch_size=16
    )

    assert scaler.get_scale() == 2.0**10
    assert not scaler._per_optimizer_states


def scale(fabric, loss, optimizer):
    scaler = fabric._strategy.precision.scaler
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
