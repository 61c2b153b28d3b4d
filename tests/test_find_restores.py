from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
from torch import nn

import autobatch
from autobatch.testing import SimulatedAccelerator
from finding import OneGpu, perceptron, state_of, unchanged
from networks import training

MIB, GIB = 2**20, 2**30


def test_training_after_tuning_equals_training_without_tuning():
    def losses(tuned):
        model, optimizer = perceptron()
        if tuned:
            autobatch.find(training(model, optimizer), device=SimulatedAccelerator("1MiB"))
        steps = training(model, optimizer)(16, 2)
        for _ in range(5):
            next(steps)
        return state_of(model, optimizer)

    assert unchanged(losses(tuned=True), losses(tuned=False))


@pytest.mark.parametrize(
    ("error", "at"),
    [
        *((ZeroDivisionError, at) for at in (1, 3)),  # in the first trial
        *((KeyboardInterrupt, at) for at in (1, 3, 9, 14)),
    ],
)
def test_an_error_passes_unchanged_and_state_is_restored(error, at):
    model, optimizer = perceptron()
    before, count = state_of(model, optimizer), itertools.count(1)

    def train(batch_size, accumulate):
        for _ in training(model, optimizer)(batch_size, accumulate):
            if next(count) >= at:
                raise error("mine")
            yield

    with pytest.raises(error, match="mine") as caught:
        autobatch.find(train, device=SimulatedAccelerator("1MiB"))

    assert unchanged(before, state_of(model, optimizer))
    assert "batch_size=" in caught.value.__notes__[0]


def test_state_is_restored_after_an_error_at_a_later_size():
    model, optimizer = perceptron()
    before = state_of(model, optimizer)

    def train(batch_size, accumulate):
        for _ in training(model, optimizer)(batch_size, accumulate):
            if batch_size != 8:
                raise ZeroDivisionError("not mine")
            yield

    report = autobatch.find(train, device=SimulatedAccelerator("1MiB"))

    assert report.plan.micro_batch_size == 8
    assert unchanged(before, state_of(model, optimizer))


class Unrestorable:
    """Fails to load its state once a step has changed it; its attributes cannot be restored."""

    __slots__ = ("steps",)

    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        if state["steps"] != self.steps:
            raise RuntimeError("cannot load")


@pytest.mark.parametrize("fails_at", [8, 16])
def test_an_error_of_the_loop_passes_before_one_of_restoring(fails_at):
    counter = Unrestorable()

    def train(batch_size, accumulate):
        for _ in training(*perceptron())(batch_size, accumulate):
            if batch_size == fails_at:
                counter.steps += 1
                raise ZeroDivisionError("mine")
            yield

    with pytest.raises(ZeroDivisionError, match=r"^mine") as caught:
        autobatch.find(train, device=SimulatedAccelerator("1MiB"), restore=[counter])

    notes = caught.value.__notes__
    assert notes[0] == f"autobatch was trying batch_size={fails_at}"
    assert "could not restore everything: RuntimeError('cannot load')" in notes[1]


def test_arguments_of_a_partial_are_restored():
    model, optimizer = perceptron()
    model.eval()

    def train(model, optimizer, batch_size):
        model.train()  # before its first forward
        yield from training(model, optimizer)(batch_size, 1)

    autobatch.find(
        functools.partial(train, model, optimizer),
        device=SimulatedAccelerator("1MiB"),
        max_micro_batch_size=16,
    )

    assert not model.training


def test_objects_named_in_restore_are_restored():
    model, optimizer = perceptron()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    generator, tensor = torch.Generator().manual_seed(1), torch.zeros(3)
    drawn = generator.get_state()

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            scheduler.step()
            torch.rand(1, generator=generator)
            tensor.add_(1)
            yield

    autobatch.find(
        train,
        device=SimulatedAccelerator("1MiB"),
        restore=[model, scheduler, generator, tensor],
    )

    assert scheduler.last_epoch == 0
    assert torch.equal(generator.get_state(), drawn)
    assert tensor.tolist() == [0, 0, 0]


def test_training_in_another_thread_goes_on():
    """Hooks of torch are global: they see the modules and optimizers of all threads."""

    def linear():
        torch.manual_seed(5)
        model = nn.Linear(16, 4)
        return model, torch.optim.AdamW(model.parameters(), 0.01)

    def step(model, optimizer):
        model(torch.ones(8, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    other, others = linear()
    begun, ended = threading.Event(), threading.Event()

    def train_other():
        while not ended.is_set():
            step(other, others)
            begun.set()

    def train(batch_size, accumulate):
        begun.clear()
        begun.wait()  # the other thread takes a step in every trial
        yield from training(model, optimizer)(batch_size, accumulate)

    thread = threading.Thread(target=train_other)
    thread.start()
    model, optimizer = perceptron()
    before = state_of(model, optimizer)
    try:
        report = autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=16)
    finally:
        ended.set()
        thread.join()
    after = state_of(model, optimizer)

    alone, optimizer_alone = linear()
    steps = int(others.state[other.weight]["step"])
    for _ in range(steps):
        step(alone, optimizer_alone)
    assert steps > len(report.trials) > 1
    assert torch.equal(other.weight, alone.weight)
    assert unchanged(before, after)


def test_the_allocator_cap_of_the_user_is_restored(monkeypatch):
    OneGpu(monkeypatch)
    torch.cuda.set_per_process_memory_fraction(0.7, 0)
    seen = []

    def train(batch_size):
        seen.append(torch.cuda.get_per_process_memory_fraction(0))
        yield
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        autobatch.find(train, device="cuda:0", memory_limit=0.5)

    assert seen[0] < 0.7
    assert torch.cuda.get_per_process_memory_fraction(0) == 0.7


def test_an_optimizer_that_first_steps_late_is_restored():
    torch.manual_seed(0)
    one, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = {id(net): torch.optim.AdamW(net.parameters()) for net in (one, other)}
    nets = {"one": one, "other": other}  # out of sight of the workload's own variables
    before = [parameter.clone() for net in nets.values() for parameter in net.parameters()]

    def train(batch_size):
        for step in itertools.count():
            net = nets["other"] if step % 2 else nets["one"]
            net(torch.randn(batch_size, 4)).square().mean().backward()
            optimizers[id(net)].step()
            optimizers[id(net)].zero_grad()
            yield

    autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)

    after = [parameter for net in nets.values() for parameter in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(optimizer.state for optimizer in optimizers.values())


def test_parameters_outside_of_modules_are_restored():
    def trained(tuned):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(16))
        optimizer = torch.optim.AdamW([weight], lr=0.1)

        def train(batch_size):
            while True:
                (torch.randn(batch_size, 16) @ weight).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                yield

        if tuned:
            autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)
        steps = train(8)
        for _ in range(3):
            next(steps)
        return weight

    assert torch.equal(trained(tuned=True), trained(tuned=False))
