"""A StopIteration of the user passes as it is, with a note that names the batch size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from finding import perceptron, state_of, unchanged
from lightning_here import Model, data, quiet_trainer, tuner
from networks import training


def raising(count, at):
    if next(count) >= at:
        raise StopIteration("mine")


def check(caught):
    assert caught.value.args == ("mine",)
    assert caught.value.__cause__ is None
    assert any("autobatch was trying batch_size=" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("is_generator", [True, False])
def test_of_a_workload(at, is_generator):
    model, optimizer = perceptron()
    before, count = state_of(model, optimizer), itertools.count(1)

    def generator(batch_size, accumulate):
        for _ in training(model, optimizer)(batch_size, accumulate):
            raising(count, at)
            yield

    def function(batch_size, accumulate):
        next(training(model, optimizer)(batch_size, accumulate))
        raising(count, at)

    with pytest.raises(StopIteration) as caught:
        autobatch.find(generator if is_generator else function, device=SimulatedAccelerator("1MiB"))

    check(caught)
    assert unchanged(before, state_of(model, optimizer))


def test_of_a_function_that_answers():
    net = nn.Linear(16, 4)
    count = itertools.count(1)

    def answer(batch_size):
        net(torch.ones(batch_size, 16))
        raising(count, 3)

    with pytest.raises(StopIteration) as caught:
        autobatch.find(answer, latency_limit=10.0, device=SimulatedAccelerator("1MiB"))

    check(caught)


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_of_a_step_in_a_trainer(method):
    class Stops(Model):
        def training_step(self, batch, batch_idx):
            raise StopIteration("mine")

        validation_step = training_step

    target = 120 if method == "fit" else None
    trainer = quiet_trainer(tuner(target_batch_size=target, evaluate=method != "fit"))

    with pytest.raises(StopIteration) as caught:
        getattr(trainer, method)(Stops(), DataLoader(data(), 4))

    check(caught)


def test_within_noise_scale():
    model, optimizer = perceptron()

    with (
        pytest.raises(StopIteration, match="mine"),
        autobatch.noise_scale(model, micro_batch_size=8),
    ):
        next(training(model, optimizer)(8, 2))
        raise StopIteration("mine")


def test_of_a_step_on_half_a_batch_does_not_end_training():
    class Stops(Model):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) < 4:
                raise StopIteration("mine")
            return super().training_step(batch, batch_idx)

    noise, model = autobatch.NoiseScale(split_every=1), Stops()

    quiet_trainer(noise, max_epochs=1).fit(model, DataLoader(data(80), 4))

    assert len(model.sizes) == 20
    assert "StopIteration: mine" in noise.reading.reason


def test_a_runtime_error_of_the_user_stays_one():
    model, optimizer = perceptron()

    def train(batch_size):
        next(training(model, optimizer)(batch_size, 1))
        raise RuntimeError("no data") from StopIteration()

    with pytest.raises(RuntimeError, match="no data"):
        autobatch.find(train, device=SimulatedAccelerator("1MiB"))
