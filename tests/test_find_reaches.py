"""find() restores what a loop can reach, without being told, and names what it cannot restore."""

from __future__ import annotations

import functools
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import autobatch
from autobatch._trials.watched import Watched
from autobatch.testing import SimulatedAccelerator
from finding import perceptron, state_of, unchanged
from networks import training
from sameness import same


class Averages:
    """An average of weights that is no module."""

    def __init__(self, model):
        self.model = model
        self.shadow = [each.detach().clone() for each in model.parameters()]
        self.updates = 0

    def update(self):
        self.updates += 1
        for mean, each in zip(self.shadow, self.model.parameters(), strict=True):
            mean.lerp_(each.detach(), 0.1)

    def state_dict(self):
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state):
        self.shadow, self.updates = state["shadow"], state["updates"]


class Nested:
    def __init__(self, **values):
        vars(self).update(values)


class Kit:
    """Everything that a loop steps beside its model and optimizer."""

    def __init__(self):
        self.model, self.optimizer = perceptron()
        self.schedule = lr_scheduler.LambdaLR(self.optimizer, lambda i: 0.99**i)
        self.short = lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=12)
        self.plateau = lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=1)
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        self.average = AveragedModel(self.model)
        self.own = Averages(self.model)
        self.norm = nn.BatchNorm1d(4)
        self.order = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        x = torch.randn(600, 16, generator=torch.Generator().manual_seed(2))
        data = TensorDataset(x)
        self.loader = DataLoader(data, 10, sampler=RandomSampler(data, generator=self.order))

    def step(self):
        self.schedule.step()
        self.short.step()
        self.plateau.step(1.0)
        self.scaler.scale(torch.ones((), requires_grad=True)).backward()
        self.scaler.update(2.0)
        self.average.update_parameters(self.model)
        self.own.update()
        self.norm(torch.randn(8, 4))
        next(iter(self.loader))
        self.python.random()
        self.numpy.random()

    def state(self):
        return [
            state_of(self.model, self.optimizer),
            [self.optimizer.param_groups[0][name] for name in ("lr", "betas")],
            [each.last_epoch for each in (self.schedule, self.short, self.plateau)],
            [each.get_last_lr() for each in (self.schedule, self.short, self.plateau)],
            self.scaler.state_dict(),
            [self.average.state_dict(), self.norm.state_dict(), self.own.state_dict()],
            [self.order.get_state(), self.python.getstate()],
            self.numpy.bit_generator.state,
        ]


def tune(train):
    return autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=64)


def of_closure(kit):
    def train(batch_size, accumulate):
        for _ in training(kit.model, kit.optimizer)(batch_size, accumulate):
            kit.step()
            yield

    return train


def of_containers(kit):
    parts = {"all": [{"model": kit.model, "optimizer": [kit.optimizer]}, kit.step]}

    def train(batch_size, accumulate):
        trained, step = parts["all"]
        loop = training(trained["model"], trained["optimizer"][0])
        for _ in loop(batch_size, accumulate):
            step()
            yield

    return train


def of_class_attributes(kit):
    class Holder:
        inner = Nested(kit=kit)

        @staticmethod
        def train(batch_size, accumulate):
            held = Holder.inner.kit
            for _ in training(held.model, held.optimizer)(batch_size, accumulate):
                held.step()
                yield

    return Holder.train


def of_arguments(kit):
    def train(holder, batch_size, accumulate, *, also):
        for _ in training(also["kit"].model, holder.kit.optimizer)(batch_size, accumulate):
            holder.kit.step()
            yield

    return functools.partial(train, Nested(kit=kit), also={"kit": kit})


def of_functions(kit):
    def after():
        kit.step()

    loop = training(kit.model, kit.optimizer)

    def one_step(batch_size, accumulate, *, loops=(loop,)):
        next(loops[0](batch_size, accumulate))
        after()

    def train(batch_size, accumulate):
        while True:
            yield one_step(batch_size, accumulate)

    return train


class Trainer:
    def __init__(self, kit):
        self.parts = [kit]

    def train(self, batch_size, accumulate):
        (kit,) = self.parts
        for _ in training(kit.model, kit.optimizer)(batch_size, accumulate):
            kit.step()
            yield


def of_an_object(kit):
    return Trainer(kit).train


WORLD = Nested(kit=None)  # set by the next function


def train_on_globals(batch_size, accumulate):
    kit = WORLD.kit
    for _ in training(kit.model, kit.optimizer)(batch_size, accumulate):
        kit.step()
        yield


def of_globals(kit):
    WORLD.kit = kit
    return train_on_globals


PLACES = [
    of_closure,
    of_containers,
    of_class_attributes,
    of_arguments,
    of_functions,
    of_an_object,
    of_globals,
]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_whatever_has_state_is_restored(place):
    kit = Kit()
    before, kind = Kit().state(), type(kit.short)

    report = tune(place(kit))

    assert len(report.trials) > 2
    assert same(before, kit.state())
    assert type(kit.short) is kind
    assert not any("cannot restore" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_training_with_a_short_schedule_is_bit_identical():
    def trained(tuned):
        kit = Kit()
        train = of_closure(kit)
        if tuned:
            tune(train)
        steps = train(8, 1)
        for _ in range(11):
            next(steps)
        with pytest.raises(ValueError, match="Tried to step 13 times"):
            for _ in range(2):
                next(steps)
        return kit.state()

    assert same(trained(tuned=True), trained(tuned=False))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("wrap", [lr_scheduler.ChainedScheduler, None], ids=["chained", "sequence"])
def test_a_trial_goes_past_the_end_of_nested_schedules(wrap):
    model, optimizer = perceptron()
    cycles = [lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2) for _ in range(2)]
    schedule = wrap(cycles) if wrap else lr_scheduler.SequentialLR(optimizer, cycles, [1])
    before = [cycle.last_epoch for cycle in cycles]

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            schedule.step()
            yield

    report = autobatch.find(train, device=SimulatedAccelerator("1MiB"), restore=[schedule])

    assert report.plan.micro_batch_size > 1
    assert [cycle.last_epoch for cycle in cycles] == before


count, history, hidden = 0, [], torch.zeros(2)


def test_changes_that_stay_are_named():
    model, optimizer = perceptron()
    state, names, unused = Nested(steps=0, best=None, same=1), {"a": 1}, []

    class Config:
        steps = 0

    def train(batch_size):
        global count  # noqa: PLW0603 -- as users write loops
        for _ in training(model, optimizer)(batch_size, 1):
            count += 1
            history.append(batch_size)
            hidden.add_(1)
            state.steps += 1
            state.best = model
            names["b"] = state.same + len(unused)
            Config.steps += 1
            yield

    report = tune(train)

    (note,) = (note for note in report.notes if "cannot restore" in note)
    listed = "Config.steps, count, hidden, history, names and 2 more"
    assert note.startswith(f"Trials changed {listed}, and find() cannot restore that")


def test_state_that_cannot_be_loaded_is_named():
    class Fails:
        def __init__(self):
            self.steps = 0

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise RuntimeError("never")

    class Asks(Fails):
        def state_dict(self, module):
            return {}

    model, optimizer = perceptron()
    before, fails, asks = state_of(model, optimizer), Fails(), Asks()

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            fails.steps += 1
            asks.steps += 1
            yield

    report = tune(train)

    (note,) = (note for note in report.notes if "cannot restore" in note)
    assert note.startswith("Trials changed asks, fails, and")
    assert unchanged(before, state_of(model, optimizer))
    assert (fails.steps, asks.steps) == (0, 0)


def test_cycles_libraries_and_large_containers_are_not_walked():
    model, optimizer = perceptron()
    ring = Nested(rows=[[] for _ in range(2000)])
    ring.ring, ring.torch, ring.everything = ring, torch, itertools
    deep = node = Nested()
    for _ in range(10_000):
        node.next = Nested()
        node = node.next

    def train(batch_size):
        for _ in training(model, optimizer)(batch_size, 1):
            ring.rows[0].append(1)
            yield deep and None

    assert tune(train).notes is not None


def test_values_that_a_loop_replaces_are_not_kept():
    """A hidden state that training would free must not stay on the device during trials."""
    model, optimizer = perceptron()
    hidden = torch.zeros(3)
    states, holder = [torch.zeros(3)], Nested(state=torch.zeros(3))
    gone = [weakref.ref(each) for each in (hidden, states[0], holder.state)]
    alive = []

    def train(batch_size):
        nonlocal hidden
        for _ in training(model, optimizer)(batch_size, 1):
            hidden, states[0], holder.state = torch.ones(3), torch.ones(3), torch.ones(3)
            alive.append(sum(ref() is not None for ref in gone))
            yield

    report = tune(train)

    assert set(alive) == {0}
    (note,) = (note for note in report.notes if "cannot restore" in note)
    assert note.startswith("Trials changed alive, hidden, holder.state, states, and")


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_a_value_at_the_address_of_a_dead_one_is_another(updates):
    """Python gives the addresses of freed values to new ones."""
    hidden, states, holder = torch.zeros(3), [torch.zeros(3)], Nested(state=torch.zeros(3))

    def train():
        nonlocal hidden
        for _ in range(updates):
            hidden, states[0], holder.state = torch.ones(3), torch.ones(3), torch.ones(3)
        return hidden

    watched = Watched(train, ())
    train()

    assert watched.changed() == ["hidden", "states", "holder.state"]
