"""Batch size of the training step with every kind of loader."""

from __future__ import annotations

import functools
import importlib
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _InfiniteConstantSampler

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import QUICK, pl

combined_loader = importlib.import_module(f"{pl.__name__}.utilities.combined_loader")


def data(length=240):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1), torch.arange(length))


class Model(pl.LightningModule):
    """Records, per epoch, the indices of the samples in every batch of every loader."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        time.sleep(0.001)  # so that small batches are slow, and another size is taken
        parts = parts_of(batch)
        if self.epochs:
            self.epochs[-1].append([part[2].tolist() for part in parts])
        return sum(F.cross_entropy(self.net(x), y) for x, y, _ in parts)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    @property
    def sizes(self):
        """Per epoch and batch, the number of samples from each loader."""
        return [[[len(part) for part in batch] for batch in epoch] for epoch in self.epochs]


def parts_of(batch):
    """The batches of single loaders within any containers."""
    if isinstance(batch, dict):
        return [part for value in batch.values() for part in parts_of(value)]
    if isinstance(batch[0], torch.Tensor):
        return [batch]
    return [part for value in batch for part in parts_of(value)]


class Attribute(Model):
    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return DataLoader(data(), self.batch_size, shuffle=True)


class HardCoded(Model):
    def train_dataloader(self):
        return DataLoader(data(), 4, shuffle=True)


class Hyperparameter(Model):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(data(), self.hparams.batch_size, shuffle=True)


class SeveralFromAHook(Model):
    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return [DataLoader(data(), self.batch_size), DataLoader(data(), 2)]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), 4, shuffle=True)


class Blocks(Sampler):
    """A custom batch sampler."""

    def __init__(self, length, batch_size):
        self.length, self.batch_size = length, batch_size
        self.random = np.random.default_rng(3)

    def __iter__(self):
        starts = np.arange(0, self.length - self.batch_size + 1, self.batch_size)
        for start in self.random.permutation(starts).tolist():
            yield list(range(start, start + self.batch_size))

    def __len__(self):
        return self.length // self.batch_size


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class Own(DataLoader):
    """A subclass with other arguments than DataLoader."""

    def __init__(self, *, samples, name):
        super().__init__(samples, batch_size=4, shuffle=True)
        self.name = name


def plain(batch_size=4, **options):
    return DataLoader(data(), batch_size, **options)


def combined(mode):
    loaders = {"a": plain(4, shuffle=True), "b": plain(8, shuffle=True)}
    return combined_loader.CombinedLoader(loaders, mode)


# Loaders passed to fit, by name
PASSED = {
    "plain": plain,
    "shuffled": lambda: plain(shuffle=True),
    "drop_last": lambda: plain(shuffle=True, drop_last=True),
    "own generator": lambda: plain(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda: plain(sampler=WeightedRandomSampler([1.0] * 240, 240)),
    "subset": lambda: plain(sampler=SubsetRandomSampler(range(0, 240, 2))),
    "distributed sampler": lambda: plain(
        sampler=DistributedSampler(data(), num_replicas=1, rank=0)
    ),
    "batch sampler of torch": lambda: DataLoader(
        data(), batch_sampler=BatchSampler(RandomSampler(data()), 4, drop_last=False)
    ),
    "custom batch sampler": lambda: DataLoader(data(), batch_sampler=Blocks(240, 4)),
    "subclass": lambda: Own(samples=data(), name="mine"),
    "stream": lambda: DataLoader(Stream(), 4),
    "workers": lambda: plain(shuffle=True, num_workers=1),
    "persistent workers": lambda: plain(shuffle=True, num_workers=1, persistent_workers=True),
    "list of one": lambda: [plain(shuffle=True)],
    "list": lambda: [plain(4, shuffle=True), plain(2)],
    "dict": lambda: {"a": plain(4, shuffle=True), "b": plain(8)},
    "nested": lambda: {"a": plain(4), "b": [plain(4), plain(12)]},
    "min_size": lambda: combined("min_size"),
    "max_size_cycle": lambda: combined("max_size_cycle"),
}
# Loaders made by a module or a datamodule
MADE = {
    "hook with attribute": Attribute,
    "hook without": HardCoded,
    "hook with hyperparameter": Hyperparameter,
    "hook with several": SeveralFromAHook,
    "datamodule": Model,
}
ROWS = [*PASSED, *MADE]


@functools.cache
def fitted(row):
    """Train for two epochs, and return the model, the callback, the Trainer and the loaders."""
    model = MADE.get(row, Model)()
    passed = PASSED[row]() if row in PASSED else None
    tuner = autobatch.AutoBatch(
        target_batch_size=24,
        max_micro_batch_size=12,
        device=SimulatedAccelerator("1MiB"),
        **QUICK,
    )
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[tuner],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, passed, datamodule=Data() if row == "datamodule" else None)
    return model, tuner, trainer, passed


def flat(loaders):
    if isinstance(loaders, DataLoader):
        return [loaders]
    loaders = getattr(loaders, "iterables", loaders)
    parts = loaders.values() if isinstance(loaders, dict) else loaders
    return [loader for part in parts for loader in flat(part)]


@pytest.mark.parametrize("row", ROWS)
def test_every_step_receives_the_chosen_size(row):
    model, tuner, _, passed = fitted(row)

    plan = tuner.report.plan
    own = [4] if passed is None else [batch_size(loader) for loader in flat(passed)]
    if row == "hook with several":
        own = [4, 2]
    wanted = [plan.micro_batch_size * size // own[0] for size in own]
    assert plan.effective_batch_size == 24
    assert plan.micro_batch_size > 4
    assert len(model.epochs) == 2
    for epoch in model.sizes:
        # Each loader may end with a short batch
        assert epoch.count(wanted) >= len(epoch) - len(wanted)
        for batch in epoch:
            assert all(size <= most for size, most in zip(batch, wanted, strict=True))


def batch_size(loader):
    return loader.batch_sampler.batch_size


IN_ORDER = (SequentialSampler, _InfiniteConstantSampler)


def sampler_of(loader):
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


@pytest.mark.parametrize("row", PASSED)
def test_sampler_and_shuffling_stay(row):
    before = [type(sampler_of(loader)) for loader in flat(PASSED[row]())]
    model, _, _, passed = fitted(row)

    assert [type(sampler_of(loader)) for loader in flat(passed)] == before
    for at, loader in enumerate(flat(passed)):
        first, second = (
            [index for batch in epoch for index in batch[at]][:60] for epoch in model.epochs
        )
        is_own = isinstance(loader.batch_sampler, Blocks)
        is_shuffled = is_own or not isinstance(sampler_of(loader), IN_ORDER)
        assert (first == list(range(60))) is not is_shuffled
        if is_shuffled and row != "distributed sampler":  # its order depends on set_epoch()
            assert first != second


@pytest.mark.parametrize("row", PASSED)
def test_passed_loaders_have_their_own_size_after_fit(row):
    before = [batch_size(loader) for loader in flat(PASSED[row]())]

    *_, passed = fitted(row)

    assert [batch_size(loader) for loader in flat(passed)] == before


class Renamed(DataLoader):
    def __init__(self, samples, *, size, **options):
        super().__init__(samples, batch_size=size, **options)


def test_loader_made_again_at_its_own_size_is_refused_before_training():
    """Lightning makes it from its arguments, as for several ranks; none is batch_size."""

    class FromHook(Model):
        def train_dataloader(self):
            return Renamed(data(), size=4, shuffle=True)

    model = FromHook()
    tuner = autobatch.AutoBatch(target_batch_size=24, device=SimulatedAccelerator("1MiB"))
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[tuner],
        overfit_batches=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    with (
        pytest.warns(UserWarning, match="overfit"),
        pytest.raises(autobatch.AutobatchError, match="a Renamed, again with batches of 4"),
    ):
        trainer.fit(model)

    assert model.epochs == []


def test_what_a_hook_of_loaders_sets_is_there_in_every_trial_and_by_hand_once():
    class Counts(Model):
        made = 0

        def train_dataloader(self):
            self.made += 1
            self.scale = torch.ones(())
            return plain()

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    model = Counts()
    tuner = autobatch.AutoBatch(
        target_batch_size=24, max_micro_batch_size=12, device=SimulatedAccelerator("1MiB")
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    pl.Trainer(max_epochs=1, callbacks=[tuner], enable_progress_bar=False, **options).fit(model)

    assert len(tuner.report.trials) > 1
    assert model.made == 1
