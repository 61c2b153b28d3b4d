from __future__ import annotations

import itertools

import pytest
import torch

import autobatch
from autobatch import BatchPlan
from autobatch.report import LearningRateRule
from autobatch.testing import SimulatedAccelerator
from finding import perceptron


def test_find_sees_the_optimizers_that_step():
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                layer(torch.randn(batch_size, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, target_batch_size=8, device=SimulatedAccelerator("1MiB"))

    assert report.learning_rate == LearningRateRule("SGD", "linear")


def test_find_notes_batch_norm_under_accumulation():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                net(torch.randn(batch_size, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def told(plan):
        report = autobatch.find(train, plan=plan, device=SimulatedAccelerator("1MiB"))
        return [note for note in report.notes if "BatchNorm" in note]

    assert told(BatchPlan(64, 1)) == []
    (note,) = told(BatchPlan(8, 8))
    assert note.startswith("1 BatchNorm layer uses the statistics of 8 samples, not 64")


def loop(model, optimizer, *, step, after):
    """A training loop with a say in when its optimizer steps, and when it yields."""

    def train(batch_size, accumulate):
        for i in itertools.count(1):
            (model.loss(batch_size) / accumulate).backward()
            if step(i, accumulate):
                optimizer.step()
            if after(i, accumulate):
                optimizer.zero_grad()
                yield

    return train


def each(i, accumulate):
    return True


def last(i, accumulate):
    return i % accumulate == 0


def never(i, accumulate):
    return False


def notes_about(train, **options):
    report = autobatch.find(
        train, device=SimulatedAccelerator("100MiB"), memory_limit=1.0, **options
    )
    about = ("Trials computed gradients", "The loop stepped its optimizer")
    return [note for note in report.notes if note.startswith(about)]


@pytest.mark.parametrize("plan", [BatchPlan(8), BatchPlan(8, 4)])
def test_a_loop_whose_optimizer_never_steps_is_noted(plan):
    model, optimizer = perceptron()

    (note,) = notes_about(loop(model, optimizer, step=never, after=last), plan=plan)

    assert "no torch.optim optimizer stepped in them" in note
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("after", [each, last])
def test_a_loop_that_steps_every_micro_batch_is_noted(after):
    train = loop(*perceptron(), step=each, after=after)

    (note,) = notes_about(train, plan=BatchPlan(8, 4))

    assert "8 samples instead of 32, and an epoch 4 times as many updates" in note
    assert notes_about(train, plan=BatchPlan(8)) == []


def test_a_loop_that_steps_once_per_update_gets_no_note():
    train = loop(*perceptron(), step=last, after=last)

    assert notes_about(train, plan=BatchPlan(8, 4)) == []


def test_an_update_cut_short_by_the_data_gets_no_note():
    data = torch.randn(40, 16)
    model, optimizer = perceptron()

    def train(batch_size, accumulate):
        batches = data.split(batch_size)
        for i, x in enumerate(batches, 1):
            model(x).square().mean().backward()
            if i % accumulate == 0 or i == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                yield len(x) if len(batches) == 1 else None

    assert notes_about(train, target_batch_size=80) == []


def test_one_optimizer_stepping_more_often_gets_no_note():
    model, optimizer = perceptron()
    critic = torch.nn.Linear(4, 1)
    often = torch.optim.SGD(critic.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                critic(torch.randn(batch_size, 4)).mean().backward()
                often.step()
                model.loss(batch_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    assert notes_about(train, plan=BatchPlan(8, 4)) == []


def test_a_loop_without_gradients_gets_no_note():
    model, _ = perceptron()

    def forward(batch_size):
        model.loss(batch_size)

    def answer(batch_size):
        with torch.inference_mode():
            model.loss(batch_size)

    assert notes_about(forward, plan=BatchPlan(8)) == []
    assert notes_about(answer, latency_limit=10.0, max_micro_batch_size=2) == []


def test_a_model_made_by_the_loop_is_watched():
    def train(batch_size, accumulate):
        model, optimizer = perceptron()
        yield from loop(model, optimizer, step=never, after=last)(batch_size, accumulate)

    (note,) = notes_about(train, plan=BatchPlan(8, 4))

    assert note.startswith("Trials computed gradients")
