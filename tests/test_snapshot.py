from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import signal
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import autobatch
from autobatch._trials.snapshot import Snapshot
from autobatch.testing import PaperDevice
from networks import Perceptron, training
from sameness import same


def inventory(model, optimizer):
    """All that training may change, copied."""
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "seen": model.seen,
            "sizes": model.sizes,
            "noise": model.noise.get_state(),
            "modes": [module.training for module in model.modules()],
            "frozen": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
        }
    )


def trained():
    torch.manual_seed(0)
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters())
    steps = training(model, optimizer)(8, 1)
    next(steps)
    next(steps)
    model.loss(4).backward()  # gradients are alive
    return model, optimizer


def disturb(model, optimizer):
    steps = training(model, optimizer)(16, 2)
    next(steps)
    model.eval()
    model.layers[0].weight.requires_grad_(False)
    model.extra = torch.zeros(3)
    optimizer.param_groups[0]["lr"] = 17.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    random.random()
    np.random.rand()


def tune(step, *objects):
    """Run a step in trials, which may do anything to these objects."""
    device = PaperDevice(1000, per_sample=10)

    def train(batch_size):
        for _ in device.workload(batch_size, 1):
            step()
            yield

    autobatch.find(train, device=device, restore=objects, max_micro_batch_size=1, verbose=False)


def test_everything_is_restored():
    model, optimizer = trained()
    before, disturbed = inventory(model, optimizer), []

    def step():
        disturb(model, optimizer)
        disturbed.append(not same(before, inventory(model, optimizer)))

    tune(step, model, optimizer)

    assert all(disturbed)
    assert disturbed
    assert same(before, inventory(model, optimizer))
    assert not hasattr(model, "extra")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(error):
    model, optimizer = trained()
    before = inventory(model, optimizer)

    def step():
        disturb(model, optimizer)
        raise error

    with pytest.raises(error):
        tune(step, model, optimizer)

    assert same(before, inventory(model, optimizer))


def test_tensors_stay_the_same_objects():
    model, optimizer = trained()
    buffers = [buffer for name, buffer in model.named_buffers() if name != "seen"]
    parameters, groups = [*model.parameters(), *buffers], optimizer.param_groups[0]
    del buffers

    tune(lambda: disturb(model, optimizer), model, optimizer)

    after = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert after.issuperset(map(id, parameters))
    assert groups is optimizer.param_groups[0]


def test_modules_and_optimizers_out_of_sight_are_captured_at_first_use():
    torch.manual_seed(0)
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters())
    before = inventory(model, optimizer)
    hidden, steps = itertools.repeat((model, optimizer)), []

    def step():
        steps.append(next(training(*next(hidden))(8, 1)))

    tune(step)

    assert len(steps) > 1
    assert same(before, inventory(model, optimizer))


def test_hooks_are_removed():
    hooks = [
        nn.modules.module._global_forward_pre_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ]
    within = []

    tune(lambda: within.append(all(hooks)))

    assert within[0]
    assert not any(hooks)


def test_a_model_of_the_workload_may_die():
    made, alive = [], []

    def step():
        gc.collect()
        alive.extend(each() for each in made if each() is not None)
        model = Perceptron()
        optimizer = torch.optim.AdamW(model.parameters())
        next(training(model, optimizer)(4, 1))
        made.extend(map(weakref.ref, (model, optimizer)))

    tune(step)

    assert len(made) > 2
    assert not alive


def test_buffers_keep_their_storage():
    model, optimizer = trained()
    address = model.layers[1].running_var.data_ptr()

    tune(lambda: disturb(model, optimizer), model, optimizer)

    assert model.layers[1].running_var.data_ptr() == address


def test_earlier_gradients_do_not_stay_on_the_device():
    model, optimizer = trained()
    freed = []

    def step():
        gradient = weakref.ref(model.layers[0].weight.grad)
        optimizer.zero_grad()
        freed.append(gradient() is None)
        model.loss(4).backward()

    tune(step, model, optimizer)

    assert freed
    assert all(freed)
    assert model.layers[0].weight.grad is not None


@pytest.mark.parametrize(
    ("thing", "draw"),
    [
        (torch.Generator(), lambda g: torch.rand(1, generator=g).item()),
        (random.Random(1), lambda g: g.random()),
        (np.random.default_rng(1), lambda g: g.random()),
        (np.random.RandomState(1), lambda g: g.rand()),
    ],
    ids=["torch", "python", "numpy", "old numpy"],
)
def test_generators_are_restored(thing, draw):
    drawn = []

    tune(lambda: drawn.append(draw(thing)), thing)

    assert draw(thing) == drawn[0]
    assert len(set(drawn)) > 1


def test_a_grad_scaler_is_restored_in_the_middle_of_a_step():
    model, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu")

    def step():
        scaler.scale(model.loss(4)).backward()
        scaler.unscale_(optimizer)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tune(step, model, optimizer, scaler)

    scaler.scale(model.loss(4)).backward()
    scaler.unscale_(optimizer)  # would raise if it were remembered
    assert scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_a_scheduler_is_restored():
    _, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)

    before, reached = scheduler.get_last_lr(), []

    def step():
        optimizer.step()
        scheduler.step()
        reached.append(scheduler.get_last_lr())

    tune(step, optimizer, scheduler)

    assert scheduler.last_epoch == 0
    assert scheduler.get_last_lr() == before
    assert before not in reached


def test_light_capture_does_not_restore_data():
    class Data:
        def __init__(self):
            self.reads, self.table, self.rows = 0, torch.zeros(4), list(range(5000))

    data = Data()
    with Snapshot() as snapshot:
        snapshot.capture_small_values(data)
        data.reads += 1
        data.table += 1

    assert data.reads == 0
    assert data.table.tolist() == [1.0] * 4


class Collated:
    """A batch, made of samples by its own `__init__`."""

    calls = 0

    def __init__(self, samples):
        self.samples = samples


@pytest.mark.parametrize("thing", [list, Collated, math, math.sqrt, len, [].append, 3, slice(3)])
def test_what_has_no_attributes_of_its_own_is_left_alone(thing):
    data = Perceptron()
    data.collate = thing
    vars(data)["kinds"] = {"a": thing, "b": [thing]}

    with Snapshot() as snapshot:
        snapshot.capture(data)
        snapshot.capture_small_values(thing, data)
        Collated.calls += 1
        data.kinds = None

    assert data.kinds == {"a": thing, "b": [thing]}
    assert Collated.calls == 1
    Collated.calls = 0


def test_a_failing_object_does_not_keep_others_from_being_restored():
    class Stubborn:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise RuntimeError("never")

    model, optimizer = trained()
    before = inventory(model, optimizer)
    with pytest.raises(RuntimeError, match="never"):
        tune(lambda: disturb(model, optimizer), Stubborn(), model, optimizer)

    assert same(before, inventory(model, optimizer))


@pytest.fixture
def interruptible():
    """Ctrl-C as it is by default: Lightning, having handled one, ignores those that follow."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_until_everything_is_restored():
    model, optimizer = trained()
    before = inventory(model, optimizer)

    class Interrupting:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(lambda: disturb(model, optimizer), Interrupting(), model, optimizer)

    assert same(before, inventory(model, optimizer))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_parameters_first_seen_at_a_step_are_restored_without_gradient():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    hidden = itertools.repeat((weight, optimizer))

    def step():
        weight, optimizer = next(hidden)
        weight.square().sum().backward()
        optimizer.step()

    tune(step)

    assert weight.tolist() == [1, 1, 1]
    assert weight.grad is None
    assert not optimizer.state


def test_an_expanded_buffer_is_restored():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(1, 1).expand(4, 4))
    model.steps = []

    mask = model.mask

    tune(lambda: model.steps.append(1), model)

    assert model.mask is mask
    assert model.steps == []


def test_an_attribute_with_a_state_dict_is_restored():
    """An average of weights, say, that is no module."""

    class Average:
        def __init__(self):
            self.shadow = {"w": torch.zeros(2)}

        def state_dict(self):
            return self.shadow

        def load_state_dict(self, state):
            self.shadow = state

    model = nn.Linear(2, 2)
    model.average = Average()

    tune(lambda: model.average.shadow["w"].add_(1), model)

    assert model.average.shadow["w"].tolist() == [0, 0]
