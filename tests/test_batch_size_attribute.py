"""The attribute or hyperparameter that names the batch size."""

from __future__ import annotations

import argparse
import dataclasses
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

import autobatch
from autobatch.errors import FixedBatchSizeError
from lightning_here import Model as Plain
from lightning_here import data, pl, plain, tuner
from lightning_here import quiet_trainer as trainer


class Model(pl.LightningModule):
    """A module without a batch size, which counts all of its steps in a list outside of it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(16, 4)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Hyper(Model):
    def __init__(self, batch_size):
        super().__init__()
        self.save_hyperparameters()

    @property
    def held(self):
        return self.hparams.batch_size


class Attribute(Model):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    @property
    def held(self):
        return self.batch_size


@pytest.mark.parametrize("kind", [Hyper, Attribute])
@pytest.mark.parametrize("value", [{"train": 4, "val": 8}, [4, 8], "4", True, None, 4.5], ids=repr)
def test_a_batch_size_that_is_no_whole_number_is_left_alone(kind, value):
    model, callback = kind(value), tuner()

    trainer(callback).fit(model, plain())

    assert model.held == value
    assert type(model.held) is type(value)
    assert set(model.sizes[:-1]) == {callback.report.plan.micro_batch_size}


def test_a_method_of_this_name_stays_callable():
    class Method(Model):
        def batch_size(self, batch):
            return len(batch[0])

        def training_step(self, batch, batch_idx):
            self.log("loss", 0.0, batch_size=self.batch_size(batch))
            return super().training_step(batch, batch_idx)

    model, callback = Method(), tuner()

    trainer(callback).fit(model, plain())

    assert callback.report.plan.micro_batch_size in model.sizes
    assert "batch_size" not in vars(model)


def test_a_property_without_a_setter_goes_on_computing_its_number():
    class Computed(Model):
        @property
        def batch_size(self):
            return 4

    model, callback = Computed(), tuner()

    trainer(callback).fit(model, plain())

    assert callback.report.plan.micro_batch_size in model.sizes
    assert model.batch_size == 4


# Dotted names


class Nested(Model):
    """A module whose step reads a batch size inside of a config."""

    def __init__(self, config, read):
        super().__init__()
        self.config, self.read = config, read
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((len(batch[0]), self.read(self.config)))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(data(), self.read(self.config), drop_last=True)


def omega(text):
    return pytest.importorskip("omegaconf").OmegaConf.create(text)


CONFIGS = {
    "dict": (lambda: {"data": {"batch_size": 4}}, lambda c: c["data"]["batch_size"]),
    "argparse": (
        lambda: argparse.Namespace(data=argparse.Namespace(batch_size=4)),
        lambda c: c.data.batch_size,
    ),
    "mixed": (lambda: SimpleNamespace(data={"batch_size": 4}), lambda c: c.data["batch_size"]),
    "omegaconf": (lambda: omega("data: {batch_size: 4}"), lambda c: c.data.batch_size),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dotted_name_reaches_the_batch_size_inside_of_a_config(name):
    make, read = CONFIGS[name]
    model, callback = Nested(make(), read), tuner(batch_arg_name="config.data.batch_size")

    trainer(callback).fit(model)

    size = callback.report.plan.micro_batch_size
    assert size > 4
    assert read(model.config) == size
    assert set(model.seen) == {(size, size)}


@pytest.mark.parametrize("name", CONFIGS)
def test_tune_leaves_the_batch_size_inside_of_a_config(name):
    make, read = CONFIGS[name]
    model = Nested(make(), read)

    tuner(batch_arg_name="config.data.batch_size").tune(trainer(), model)

    assert read(model.config) == 4


def test_a_dotted_name_reaches_into_hyperparameters():
    class Saved(Model):
        def __init__(self, data, rate=0.1):
            super().__init__()
            self.save_hyperparameters()

    model, callback = Saved({"batch_size": 4}), tuner(batch_arg_name="data.batch_size")

    trainer(callback).fit(model, plain())

    size = callback.report.plan.micro_batch_size
    assert model.hparams.data["batch_size"] == size > 4
    assert model.hparams_initial["data"]["batch_size"] == size


def test_an_interpolation_stays_one_after_tune():
    config = omega("{size: 4, batch_size: '${size}'}")

    class Interpolated(Model):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters(config)

    model = Interpolated()

    tuner().tune(trainer(), model, plain())
    config.size = 8

    assert model.hparams.batch_size == 8


def test_a_class_attribute_is_not_shadowed_after_tune():
    class Classwide(Model):
        batch_size = 4

    model = Classwide()

    tuner().tune(trainer(), model, plain())

    assert "batch_size" not in vars(model)


# Refused before anything runs


@dataclasses.dataclass(frozen=True)
class Frozen:
    batch_size: int = 4


class Refusing(Model):
    config = Frozen()
    proxy = MappingProxyType({"batch_size": 4})

    @property
    def computed(self):
        return 4

    @property
    def batch_size(self):
        return 4

    @batch_size.setter
    def batch_size(self, value):
        raise RuntimeError("It is fixed.\nReally.")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"^batch_size=4, an attribute of Refusing, cannot be set .* \(It is fixed\); make"),
        ({"batch_arg_name": "config.batch_size"}, r"config.batch_size=4, .*cannot assign to field"),
        ({"batch_arg_name": "proxy.batch_size"}, r"proxy.batch_size=4, .*item assignment"),
        ({"batch_arg_name": "computed"}, r"computed=4, an attribute of Refusing, .*no setter"),
        ({"batch_arg_name": "proxy"}, "'proxy' names a mappingproxy, and a batch size is a whole"),
        ({"batch_arg_name": "config.size"}, "'config.size' is no attribute or hyperparameter"),
    ],
)
def test_a_batch_size_that_cannot_be_set_is_refused_before_any_trial(options, sentence):
    model, passed, fitted = Refusing(), plain(), trainer(tuner(**options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    model.net.register_forward_pre_hook(lambda *_: steps.append(1))

    with pytest.raises(autobatch.AutobatchError, match=sentence):
        fitted.fit(model, passed)

    assert steps == []
    assert passed.batch_size == passed.batch_sampler.batch_size == 4
    assert fitted.accumulate_grad_batches == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_read_only_config_is_refused_and_can_be_opened():
    config = omega("batch_size: 4")

    class Closed(Model):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters(config)
            set_readonly(self.hparams, True)

    set_readonly = pytest.importorskip("omegaconf").OmegaConf.set_readonly
    model = Closed()

    sentence = r"batch_size=4, a hyperparameter of Closed, cannot be set .*read-only"
    with pytest.raises(autobatch.AutobatchError, match=sentence):
        trainer(tuner()).fit(model, plain())

    assert model.sizes == []
    set_readonly(model.hparams, False)
    callback = tuner()
    trainer(callback).fit(model, plain())
    assert model.hparams.batch_size == callback.report.plan.micro_batch_size


@pytest.mark.parametrize("name", ["", ".", "data.", "data..size", "a b", 3])
def test_a_name_that_can_be_none_is_refused(name):
    with pytest.raises(ValueError, match="is no name; give that of an attribute"):
        tuner(batch_arg_name=name)


# A batch sampler that computes its batch size


class ClassBalanced(Sampler):
    """Batches of some classes with some samples of each."""

    def __init__(self, samples):
        self.samples = samples

    @property
    def batch_size(self):
        return 4 * self.samples

    def __len__(self):
        return 600 // self.batch_size

    def __iter__(self):
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            yield list(range(first, first + self.batch_size))


def test_a_batch_sampler_that_computes_its_size_is_refused_in_one_sentence():
    model = Plain()

    sentence = "the batch_size of its batch sampler, a ClassBalanced, cannot be set"
    with pytest.raises(FixedBatchSizeError, match=f"{sentence}; pass set_batch_size"):
        trainer(tuner()).fit(model, DataLoader(data(), batch_sampler=ClassBalanced(2)))

    assert model.sizes == []
    assert model.hparams.batch_size == 4


def test_a_batch_sampler_that_computes_its_size_is_tuned_by_a_setter():
    def set_samples(loader, batch_size):
        loader.batch_sampler.samples = max(1, batch_size // 4)

    model, callback = Plain(), tuner(set_batch_size=set_samples)

    trainer(callback).fit(model, DataLoader(data(), batch_sampler=ClassBalanced(2)))

    size = callback.report.plan.micro_batch_size
    assert size > 8
    assert set(model.sizes) == {size // 4 * 4}
