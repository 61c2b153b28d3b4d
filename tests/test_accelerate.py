"""Loops of accelerate, tuned by find()."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
import torch

import autobatch
from autobatch.testing import SimulatedAccelerator
from sameness import same

pytest.importorskip("accelerate")

from accelerate import Accelerator
from tqdm import tqdm

from accelerate_loops import Loop, reset

TUNING = {"timing_seconds": 0, "max_micro_batch_size": 40}


@pytest.fixture(autouse=True)
def _new_process():
    reset()
    yield
    reset()


def tuned(loop, target, **options):
    device = SimulatedAccelerator(120_000)
    return autobatch.find(loop.train, target_batch_size=target, device=device, **TUNING | options)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16"}, {"clips": True}],
    ids=["32", "bf16", "clipping"],
)
def test_training_after_tuning_equals_the_plan_by_hand(options):
    loop = Loop(**options)
    report = tuned(loop, 160)
    trained = loop.result(report.plan, updates=8)

    reset()
    by_hand = Loop(**options).result(report.plan, updates=8)

    assert report.plan.accumulate_grad_batches > 1
    assert same(trained, by_hand)
    assert report.plan.micro_batch_size * report.plan.accumulate_grad_batches == 160


def test_the_accelerator_is_as_before():
    loop = Loop()
    accelerator = loop.accelerator
    state = accelerator.gradient_state
    before = [accelerator.step, accelerator._dataloaders.copy(), repr(state), vars(state).copy()]

    tuned(loop, 160)

    after = [accelerator.step, accelerator._dataloaders, repr(state), vars(state)]
    assert after == before
    assert state.active_dataloader is None


def test_a_loader_made_before_continues_where_it_was():
    loop = Loop()
    validation = loop.accelerator.prepare(torch.utils.data.DataLoader(loop.data, 50))
    assert len(list(validation)) == 10

    def train(batch_size, accumulate):
        for _ in loop.train(batch_size, accumulate):
            assert sum(1 for _ in validation) == 10
            yield

    report = autobatch.find(
        train, target_batch_size=64, device=SimulatedAccelerator(240_000), **TUNING
    )

    assert report.plan.effective_batch_size == 64
    assert validation.iteration == 1


def test_an_error_restores_the_accelerator():
    loop = Loop()
    count = itertools.count()

    def train(batch_size, accumulate):
        for _ in loop.train(batch_size, accumulate):
            if next(count) >= 1:
                raise ZeroDivisionError
            yield

    with pytest.raises(ZeroDivisionError) as caught:
        autobatch.find(train, target_batch_size=160, device=SimulatedAccelerator(120_000), **TUNING)

    assert caught.value.__notes__[0].startswith("autobatch was trying batch_size=")
    assert loop.accelerator.step == 0
    assert loop.accelerator._dataloaders == []
    assert loop.accelerator.gradient_state.active_dataloader is None


class Recording(Accelerator):
    """A user's subclass, with a counter of its own."""

    calls = 0

    def backward(self, loss, **options):
        self.calls += 1
        super().backward(loss, **options)


def test_an_accelerator_of_the_users_class_is_restored():
    loop = Loop(accelerator=Recording(cpu=True))

    tuned(loop, 160)

    assert (loop.accelerator.step, loop.accelerator.calls) == (0, 0)


def test_an_accelerator_made_by_the_loop_trains_the_plan():
    def train(batch_size, accumulate):
        loop = Loop()
        records.append(loop.record)
        yield from loop.train(batch_size, accumulate)

    records = []
    device = SimulatedAccelerator(220_000)  # holds the data as well
    plan = autobatch.find(train, target_batch_size=160, device=device, **TUNING).plan
    steps = train(plan.micro_batch_size, plan.accumulate_grad_batches)
    deque(itertools.islice(steps, 8), maxlen=0)

    reset()
    assert same(records[-1], Loop().result(plan, updates=8)[0])


@pytest.mark.parametrize("is_barred", [False, True])
def test_a_model_made_after_free_memory_trains_the_plan(is_barred):
    """As the examples of accelerate shrink a batch: all is made again for each size."""

    def train(batch_size, accumulate):
        accelerator.free_memory()
        loop = Loop(accelerator=accelerator)
        records.append(loop.record)
        steps = loop.train(batch_size, accumulate)
        yield from tqdm(steps, disable=None) if is_barred else steps

    def trained(plan):
        steps = train(plan.micro_batch_size, plan.accumulate_grad_batches)
        deque(itertools.islice(steps, 8), maxlen=0)
        return records[-1]

    records, accelerator = [], Accelerator(cpu=True)
    device = SimulatedAccelerator(220_000)
    plan = autobatch.find(train, target_batch_size=160, device=device, **TUNING).plan
    after_tuning = trained(plan)
    reset()
    accelerator = Accelerator(cpu=True)

    assert same(after_tuning, trained(plan))
    assert len(after_tuning) > 8
