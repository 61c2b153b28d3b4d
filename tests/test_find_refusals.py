from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import autobatch
from autobatch import BatchPlan
from autobatch.testing import PaperDevice, SimulatedAccelerator
from finding import OneGpu, perceptron, state_of, tuned, unchanged
from networks import training


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target_batch_size": 0}, "target_batch_size=0"),
        ({"target_batch_size": -3}, "target_batch_size=-3"),
        ({"target_batch_size": True}, "target_batch_size=True"),
        ({"target_batch_size": 2.5}, "target_batch_size=2.5"),
        ({"target_batch_size": "64"}, "target_batch_size='64'"),
        ({"max_micro_batch_size": 0}, "max_micro_batch_size=0"),
        ({"steps_per_trial": 0}, "steps_per_trial=0"),
        ({"steps_per_trial": 1.5}, "steps_per_trial=1.5"),
        ({"time_limit": 0}, "time_limit=0"),
        ({"time_limit": "soon"}, "time_limit='soon'"),
        ({"dataset_size": -1}, "dataset_size=-1"),
        ({"memory_limit": 0}, "memory_limit=0"),
        ({"memory_limit": 1.5}, "memory_limit=1.5"),
        ({"memory_limit": 1}, "memory_limit=1 .*1.0"),
        ({"memory_limit": "lots"}, "memory_limit='lots'"),
        ({"device": "tpu:9"}, "device='tpu:9'"),
        ({"device": "cuda:7"}, "device='cuda:7'"),
        ({"device": "simulated"}, "device='simulated' names no amount of memory; give it after"),
        ({"device": "simulated:lots"}, "device='simulated:lots' names no amount of memory"),
        ({"device": "simulated:8"}, "device='simulated:8' names no amount .* with its unit"),
        ({"device": SimulatedAccelerator}, "device="),
        ({"plan": "no/such/report.json"}, "no/such/report.json"),
        ({"plan": "keep"}, "plan='keep' is for AutoBatch alone"),
        ({"plan": 32}, "plan=32"),
        ({"plan": BatchPlan(0)}, "plan="),
        ({"plan": BatchPlan(8, 1, 2)}, "2 ranks"),
        ({"plan": BatchPlan(8), "target_batch_size": 64}, "target_batch_size=64"),
        ({"plan": BatchPlan(64), "max_micro_batch_size": 8}, "max_micro_batch_size=8"),
        ({"search": autobatch.Bisection}, "search="),
        ({"search": "bisection"}, "search='bisection'"),
        ({"restore": nn.Linear(1, 1)}, "restore=Linear"),
        ({"restore": ["a name"]}, "restore holds a str"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_before_anything_runs(arguments, sentence):
    started = []

    with pytest.raises(ValueError, match=sentence) as caught:
        autobatch.find(
            started.append,
            **{"device": PaperDevice(10), **arguments},
        )

    assert "\n" not in str(caught.value)
    assert not started


async def asynchronous(batch_size):
    pass


@pytest.mark.parametrize(
    "workload",
    [
        None,
        3,
        lambda: None,
        lambda a, b, c: None,
        nn.Linear(1, 1),
        asynchronous,
        functools.partial(asynchronous),
    ],
)
def test_a_workload_without_a_batch_size_parameter_is_refused(workload):
    with pytest.raises(ValueError, match="workload="):
        autobatch.find(workload, device=PaperDevice(10))


def test_a_plan_the_workload_cannot_follow_is_refused_and_state_restored():
    model, optimizer = perceptron()
    before = state_of(model, optimizer)

    def train(batch_size):
        yield from training(model, optimizer)(batch_size, 1)

    with pytest.raises(ValueError, match=r"def train\(batch_size, accumulate\)"):
        autobatch.find(train, device=SimulatedAccelerator("256KiB"), target_batch_size=4096)

    assert unchanged(before, state_of(model, optimizer))


def test_a_workload_that_does_nothing_is_refused():
    with pytest.raises(ValueError, match="allocated no memory at all"):
        autobatch.find(lambda batch_size: None, device=SimulatedAccelerator("1MiB"))


def test_a_yielded_number_that_is_no_sample_count_is_refused():
    def train(batch_size):
        yield from itertools.count(1)

    with pytest.raises(ValueError, match="yielded 1, 2, 3"):
        autobatch.find(train, device=PaperDevice(10))


def test_a_refused_small_size_does_not_hide_that_nothing_fits():
    model, optimizer = perceptron()

    with pytest.raises(
        autobatch.DoesNotFitError,
        match=r"batch_size=1 was refused .*Expected more than 1 value",
    ):
        autobatch.find(training(model, optimizer), device=SimulatedAccelerator("50KiB"))


def test_the_error_lists_the_trials_if_nothing_fits():
    device = PaperDevice(100, fixed=200)

    with pytest.raises(
        autobatch.DoesNotFitError, match=r"No batch size fits .*batch_size=1 ran out"
    ):
        autobatch.find(device.workload, device=device)


def test_a_full_device_is_refused_before_anything_runs():
    device = PaperDevice(1000, foreign=950)

    with pytest.raises(
        autobatch.DoesNotFitError, match=r"memory_limit=0\.9 leaves a budget of 0 B"
    ):
        autobatch.find(device.workload, device=device)

    assert not device.sizes_run


def test_a_target_below_one_sample_per_rank_is_refused():
    device = PaperDevice(1000)

    with pytest.raises(ValueError, match=r"target_batch_size=2 .* 4 ranks"):
        tuned(device, world_size=4, target_batch_size=2)

    assert not device.sizes_run


def test_a_model_on_another_device_is_refused(monkeypatch):
    OneGpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def train(batch_size):
        nn.Linear(2, 2)(torch.zeros(batch_size, 2))

    with pytest.raises(autobatch.AutobatchError, match='device="cpu"'):
        autobatch.find(train)
