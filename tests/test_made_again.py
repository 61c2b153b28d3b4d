"""Samplers and loaders whose state follows from the batch size that they are made with."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

import autobatch
from autobatch.errors import FixedBatchSizeError
from by_hand import OWN, compared
from lightning_here import Model, data, pl, quiet_trainer, tuner


class Hook(pl.LightningDataModule):
    """Makes its loader at a size of its own."""

    def __init__(self, make, own):
        super().__init__()
        self.make, self.own = make, own

    def train_dataloader(self):
        return self.make(self.own)


class Listed(Sampler):
    """Lists its batches when it is made."""

    def __init__(self, lengths, batch_size, drop_last=False):
        self.lengths, self.batch_size, self.drop_last = lengths, batch_size, drop_last
        self.epoch = 0
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        if drop_last:
            self.batches = [batch for batch in self.batches if len(batch) == batch_size]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.epoch += 1
        for at in torch.randperm(len(self.batches)).tolist():
            yield self.batches[at]


class Grouped(Sampler):
    """Sorts within chunks of some batches."""

    def __init__(self, lengths, batch_size):
        self.lengths = lengths
        self.chunk = 4 * batch_size

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = torch.randperm(len(self)).tolist()
        for at in range(0, len(order), self.chunk):
            yield from sorted(order[at : at + self.chunk], key=self.lengths.__getitem__)


class Buckets(BatchSampler):
    """Cuts batches out of buckets; how many go into one is not kept."""

    def __init__(self, sampler, batch_size, multiple):
        super().__init__(sampler, batch_size, drop_last=False)
        self.buckets = BatchSampler(sampler, batch_size * multiple, drop_last=False)

    def __len__(self):
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self):
        for bucket in self.buckets:
            yield from BatchSampler(sorted(bucket), self.batch_size, drop_last=False)


class Zipped(DataLoader):
    """Makes its batches of inner loaders."""

    def __init__(self, parts, batch_size):
        self.loaders = [DataLoader(part, batch_size, shuffle=True) for part in parts]
        super().__init__(parts[0], batch_size)

    def __iter__(self):
        for batches in zip(*self.loaders, strict=True):
            yield [torch.cat(parts) for parts in zip(*batches, strict=True)]


LENGTHS = [index * 7 % 60 for index in range(600)]
PASSED = {
    "batches listed": lambda n: DataLoader(data(), batch_sampler=Listed(LENGTHS, n)),
    "last one dropped": lambda n: DataLoader(data(), batch_sampler=Listed(LENGTHS, n, True)),
    "chunks of a sampler": lambda n: DataLoader(data(), n, sampler=Grouped(LENGTHS, n)),
}
MADE = {
    "buckets": lambda n: DataLoader(data(), batch_sampler=Buckets(RandomSampler(data()), n, 4)),
    "inner loaders": lambda n: Zipped([data(), data()], n),
}


def set_buckets(loader, batch_size):
    sampler = loader.batch_sampler
    sampler.batch_size = batch_size
    sampler.buckets = BatchSampler(sampler.sampler, batch_size * 4, drop_last=False)


def set_inner_loaders(loader, batch_size):
    loader.batch_sampler.batch_size = batch_size
    loader.loaders = [DataLoader(each.dataset, batch_size, shuffle=True) for each in loader.loaders]


SETTERS = {"buckets": set_buckets, "inner loaders": set_inner_loaders}
ROWS = {"buckets": 1, "inner loaders": 2}  # of a batch, for each of its samples


@pytest.mark.parametrize(("name", "rows"), [("buckets", "7, 9"), ("inner loaders", "8")])
def test_a_loader_passed_to_fit_that_cannot_be_made_again_names_the_ways_out(name, rows):
    model = Model()

    with pytest.raises(
        FixedBatchSizeError,
        match=rf"it makes batches of {rows} samples when batch_size is 9.*; pass set_batch_size, a "
        r"function .*, or make the loader in train_dataloader, or",
    ):
        quiet_trainer(tuner()).fit(model, MADE[name](4))

    assert model.sizes == []


@pytest.mark.parametrize("name", SETTERS)
def test_training_is_the_same_with_a_setter_as_with_a_loader_of_the_planned_size(name):
    compared(MADE[name], set_batch_size=SETTERS[name]).check(rows=ROWS[name])


@pytest.mark.parametrize("name", [*PASSED, *MADE])
def test_training_is_the_same_as_with_a_loader_made_at_the_planned_size(name):
    made = []

    def make(size):
        # 600 samples leave a rest at the size that is looked at before the search, at any place
        made.append(PASSED[name](size) if name in PASSED else Hook(MADE[name], size))
        return made[-1]

    compared(make).check(rows=ROWS.get(name, 1))

    if name in PASSED:  # the user's sampler is as it was
        now, before = (vars(each.batch_sampler) for each in (made[0], PASSED[name](OWN)))
        assert repr({**now, "epoch": 0, "sampler": 0}) == repr({**before, "epoch": 0, "sampler": 0})


def test_an_epoch_that_a_sampler_counts_goes_on_after_it_was_made_again():
    loader = DataLoader(data(), batch_sampler=Listed(LENGTHS, 4))

    quiet_trainer(tuner()).fit(Model(), loader)

    assert (loader.batch_sampler.epoch, len(loader.batch_sampler)) == (2, 150)


class Reordered(Listed):
    def __iter__(self):
        self.batches = self.batches[::-1]
        return iter(self.batches)


def test_a_sampler_that_an_epoch_changes_is_refused_before_the_search_if_later_ones_are_tuned():
    model, callback = Model(), tuner(retune_at_epochs=[1])
    sampler = Reordered(LENGTHS, 4)
    batches = list(sampler.batches)

    with pytest.raises(
        autobatch.AutobatchError, match=r"^retune_at_epochs cannot .* a Reordered has .* pass set_b"
    ):
        quiet_trainer(callback).fit(model, DataLoader(data(), batch_sampler=sampler))

    assert model.sizes == []
    assert (sampler.batch_size, sampler.batches) == (4, batches)


def test_a_sampler_that_an_epoch_changes_is_tuned_again_if_a_hook_makes_it():
    model, callback = Model(), tuner(retune_at_epochs=[1])
    hook = Hook(lambda n: DataLoader(data(), batch_sampler=Reordered(LENGTHS, n)), 4)

    quiet_trainer(callback).fit(model, hook)

    assert any(note.startswith("Tuned again at epoch 1") for note in callback.report.notes)
    assert set(model.sizes) == {callback.report.plan.micro_batch_size}


class InPlace(Sampler):
    """Shuffles its order in place in each epoch."""

    def __init__(self, order, batch_size):
        self.order, self.batch_size = order, batch_size

    def __len__(self):
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self):
        random.shuffle(self.order)
        for at in range(0, len(self.order), self.batch_size):
            yield [int(index) for index in self.order[at : at + self.batch_size]]


@pytest.mark.parametrize("kind", [list, np.array])
def test_a_long_order_that_a_sampler_shuffles_in_place_is_that_of_training_by_hand(kind):
    def loader(size):
        return DataLoader(data(1200), batch_sampler=InPlace(kind(range(1200)), size))

    compared(loader).check()


class Guessed(Buckets):
    """Keeps a number that may have been given, or follow from the batch size."""

    def __init__(self, sampler, batch_size, bucket_size=None):
        super().__init__(sampler, batch_size, 4)
        self.bucket_size = bucket_size or 4 * batch_size
        self.buckets = BatchSampler(sampler, self.bucket_size, drop_last=False)


def test_an_argument_that_may_follow_from_the_size_is_not_guessed():
    loader = DataLoader(data(), batch_sampler=Guessed(RandomSampler(data()), 4))

    with pytest.raises(autobatch.AutobatchError, match="samples when batch_size is 9; pass set_ba"):
        quiet_trainer(tuner()).fit(Model(), loader)

    assert vars(loader.batch_sampler.buckets)["batch_size"] == 16


def test_batches_listed_by_a_class_with_unknown_arguments_are_refused():
    class Secret(Listed):
        def __init__(self, numbers, batch_size):
            super().__init__(numbers, batch_size)

    loader = DataLoader(data(), batch_sampler=Secret(LENGTHS, 4))

    with pytest.raises(autobatch.AutobatchError, match="150 batches at any batch_size; pass set_b"):
        quiet_trainer(tuner()).fit(Model(), loader)
