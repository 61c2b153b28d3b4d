"""Samplers and loaders whose state follows from the batch size that they are made with."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

import autobatch
from lightning_here import Model, data, pl, quiet_trainer, tuner
from sameness import same


class Takes(Model):
    """Records the first number of each batch, and makes its loader at a size of its own."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.make, self.own = None, 4

    def train_dataloader(self):
        return self.make(self.own)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0][0, 0].item())
        return super().training_step(batch, batch_idx)


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


@pytest.mark.parametrize("name", SETTERS)
def test_a_loader_passed_to_fit_that_cannot_be_made_again_names_the_ways_out(name):
    model = Model()

    with pytest.raises(
        autobatch.AutobatchError,
        match=r"pass set_batch_size, a function .*, or make the loader in train_dataloader, or",
    ):
        quiet_trainer(tuner()).fit(model, MADE[name](4))

    assert model.sizes == []


@pytest.mark.parametrize("name", SETTERS)
def test_training_is_the_same_with_a_setter_as_with_a_loader_of_the_planned_size(name):
    callback, modules = tuner(set_batch_size=SETTERS[name]), []
    for tuned in (True, False):
        plan = callback.report.plan if callback.report else autobatch.BatchPlan(4)
        accumulate = plan.accumulate_grad_batches
        pl.seed_everything(3, verbose=False)
        model = Takes()
        quiet_trainer(*([callback] if tuned else []), accumulate_grad_batches=accumulate).fit(
            model, MADE[name](plan.micro_batch_size)
        )
        modules.append(model)

    tuned, by_hand = modules
    assert callback.report.plan.effective_batch_size == 120
    assert callback.report.plan.micro_batch_size > 4
    assert (tuned.sizes, tuned.seen) == (by_hand.sizes, by_hand.seen)
    assert same(dict(tuned.state_dict()), dict(by_hand.state_dict()))


@pytest.mark.parametrize("name", [*PASSED, *MADE])
def test_training_is_the_same_as_with_a_loader_made_at_the_planned_size(name):
    # 600 samples leave a rest at the size that is looked at before the search, at any place
    callback, modules, own = tuner(), [], []
    for tuned in (True, False):
        plan = callback.report.plan if callback.report else autobatch.BatchPlan(4)
        micro, accumulate = plan.micro_batch_size, plan.accumulate_grad_batches
        pl.seed_everything(3, verbose=False)
        model = Takes()
        model.make, model.own = MADE.get(name), micro
        loader = PASSED[name](micro) if name in PASSED else None
        before = loader and dict(vars(loader.batch_sampler))
        quiet_trainer(
            *([callback] if tuned else []), accumulate_grad_batches=1 if tuned else accumulate
        ).fit(model, loader)
        modules.append(model)
        own.append(loader and {**vars(loader.batch_sampler), "epoch": 0} == {**before, "epoch": 0})

    tuned, by_hand = modules
    assert callback.report.plan.micro_batch_size > 4
    assert tuned.sizes == by_hand.sizes
    assert tuned.seen == by_hand.seen
    assert same(dict(tuned.state_dict()), dict(by_hand.state_dict()))
    assert all(own) or name in MADE  # the user's sampler is as it was


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
    model, callback = Takes(), tuner(retune_at_epochs=[1])
    model.make = lambda n: DataLoader(data(), batch_sampler=Reordered(LENGTHS, n))

    quiet_trainer(callback).fit(model)

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
    callback, seen = tuner(), []
    for tuned in (True, False):
        plan = callback.report.plan if callback.report else autobatch.BatchPlan(4)
        pl.seed_everything(3, verbose=False)
        model = Takes()
        sampler = InPlace(kind(range(1200)), plan.micro_batch_size)
        quiet_trainer(*([callback] if tuned else [])).fit(
            model, DataLoader(data(1200), batch_sampler=sampler)
        )
        seen.append((model.sizes, model.seen))

    assert callback.report.plan.micro_batch_size > 4
    assert seen[0] == seen[1]


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
