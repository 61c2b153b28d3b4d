"""Projects as people write them: their loaders, batches, steps and callbacks."""

from __future__ import annotations

import functools
import pathlib
import queue
import threading
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    default_collate,
)

import autobatch
from autobatch.errors import AutobatchError
from autobatch.testing import SimulatedAccelerator
from by_hand import PAIRS, Recorded, X, Y, compared
from lightning_here import QUICK, pl, quiet_trainer


def shuffled(batch_size, **options):
    return DataLoader(PAIRS, batch_size, shuffle=True, **options)


def tuner(**options):
    return autobatch.AutoBatch(
        **{"target_batch_size": 24, "device": SimulatedAccelerator("900KiB"), **QUICK, **options}
    )


# Data sets and collate functions


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Described(Dataset):
    """A data set with classes, functions and modules among its attributes."""

    kind = Pair

    def __init__(self):
        self.path, self.dtype, self.read, self.library = pathlib.Path, torch.float32, float, torch
        self.parse = functools.partial(self.kind, y=torch.zeros(()))

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return self.kind(X[index], Y[index])


class Stacked:
    """A batch made of the samples by its own `__init__`, with a device as torch's manual shows."""

    def __init__(self, samples, factor=1.0):
        self.x = factor * torch.stack([x for x, _ in samples])
        self.y = torch.stack([y for _, y in samples])


class OfFields(Recorded):
    def pair(self, batch):
        return batch.x, batch.y


def test_classes_among_the_attributes_of_a_data_set_are_left_alone():
    both = compared(lambda size: DataLoader(Described(), size, shuffle=True))

    both.check()


@pytest.mark.parametrize(
    ("collate", "workers"),
    [(Stacked, 0), *((functools.partial(Stacked, factor=2.0), workers) for workers in (0, 1))],
)
def test_class_collates_also_with_bound_arguments(collate, workers):
    both = compared(lambda size: shuffled(size, collate_fn=collate, num_workers=workers), OfFields)

    both.check()


class Queue(Dataset):
    """A data set that fills a queue of patches from an inner loader, which stays open."""

    def __init__(self):
        self.inner = None
        self.patches = []

    def __len__(self):
        return len(X)

    def __getitem__(self, _):
        if not self.patches:
            self.patches = list(self._next())
        return self.patches.pop()

    def _next(self):
        if self.inner is None:
            self.inner = iter(DataLoader(PAIRS, shuffle=True, batch_size=None))
        try:
            first = next(self.inner)
        except StopIteration:
            self.inner = iter(DataLoader(PAIRS, shuffle=True, batch_size=None))
            first = next(self.inner)
        return [first, (first[0].flip(0), first[1])]


def test_queue_with_an_open_iterator_gives_the_data_it_gives_by_hand():
    both = compared(lambda size: DataLoader(Queue(), size))

    both.check()


# Loaders


class Background(DataLoader):
    """A loader whose batches are made ahead in a thread."""

    def __iter__(self):
        ahead = queue.Queue(2)

        def fill():
            for batch in DataLoader.__iter__(self):
                ahead.put(batch)
            ahead.put(None)

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        while (batch := ahead.get()) is not None:
            yield batch
        thread.join()


def test_loader_that_makes_batches_in_a_thread_is_tuned():
    both = compared(lambda size: Background(PAIRS, size))

    both.check()


class Forever:
    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class Endless(DataLoader):
    """A loader that starts its one iterator when it is made, and repeats its batch sampler."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        object.__setattr__(self, "batch_sampler", Forever(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


def test_loader_with_one_endless_iterator_is_refused_before_the_search():
    module, callback = Recorded(), tuner()

    with pytest.raises(AutobatchError, match="cannot change the batch size of this loader"):
        quiet_trainer(callback).fit(module, Endless(PAIRS, 4, shuffle=True))

    assert module.sizes == []
    assert callback.report is None


class Repeating(Sampler):
    """Each sample three times in a row, for three views of it in a batch."""

    def __len__(self):
        return 3 * len(PAIRS)

    def __iter__(self):
        for index in torch.randperm(len(PAIRS)).tolist():
            yield from [index] * 3


@pytest.mark.parametrize(
    ("sampler", "samples"),
    [(Repeating, 720), (lambda: RandomSampler(PAIRS, num_samples=100), 100)],
    ids=["repeated", "some"],
)
def test_samples_of_an_epoch_are_those_of_the_sampler(sampler, samples):
    both = compared(lambda size: DataLoader(PAIRS, size, sampler=sampler()))

    both.check()
    assert both.report.dataset_size == samples
    assert sum(both.tuned.sizes) == 2 * samples


class Buffered(IterableDataset):
    """A stream that shuffles within a buffer, and counts its passes."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        buffer = []
        for pair in zip(X, Y, strict=True):
            buffer.append(pair)
            if len(buffer) == 20:
                yield buffer.pop(int(torch.randint(20, ())))
        yield from buffer


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_with_a_buffer_gives_the_data_it_gives_by_hand(workers):
    both = compared(lambda size: DataLoader(Buffered(), size, num_workers=workers))

    both.check()
    assert sum(both.tuned.sizes) == 480


# Batches


class Masked:
    """Images and their mask, which know how to move."""

    def __init__(self, x, mask, y):
        self.x, self.mask, self.y = x, mask, y

    def to(self, device, **options):
        return Masked(*(each.to(device) for each in (self.x, self.mask, self.y)))

    def decompose(self):
        return self.x * self.mask, self.y


class OfMasked(Recorded):
    def pair(self, batch):
        return batch.decompose()


class Encoding(UserDict):
    """A mapping with an attribute beside its items, which its copies would lose."""

    def __init__(self, items, words):
        super().__init__(items)
        self.words = words

    def to(self, device, **options):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class OfEncoding(Recorded):
    def pair(self, batch):
        kept = torch.tensor([word is not None for word in batch.words])
        return batch["x"] * kept[:, None], batch["y"]


def masked(samples):
    x, y = default_collate(samples)
    return Masked(x, (x > 0).float(), y)


def encoding(samples):
    x, y = default_collate(samples)
    return Encoding({"x": x, "y": y}, [None if label == 0 else label for label in y.tolist()])


@pytest.mark.parametrize(
    ("module", "collate"), [(OfMasked, masked), (OfEncoding, encoding)], ids=["mask", "encoding"]
)
def test_batch_of_a_class_of_its_own_arrives_whole(module, collate):
    both = compared(lambda size: shuffled(size, collate_fn=collate), module)

    both.check()


class Pops(Recorded):
    """Takes the labels out of its batch, as a network that computes the loss itself wants it."""

    def pair(self, batch):
        return batch["x"], batch.pop("y")


def test_step_that_takes_an_entry_out_of_its_batch_is_tuned():
    data = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]

    both = compared(lambda size: DataLoader(data, size, shuffle=True), Pops)

    both.check()


# Modules and callbacks


COUNTED = set()


class Ramps(Recorded):
    """A second loss that grows with the share of the training that is done."""

    def training_step(self, batch, batch_idx):
        trainer = self.trainer
        COUNTED.add((len(batch[0]), trainer.num_training_batches))
        done = batch_idx / trainer.num_training_batches
        done = (trainer.current_epoch + done) / trainer.max_epochs
        loss = super().training_step(batch, batch_idx)
        return loss + done * self.net(batch[0]).square().mean()


def test_step_sees_the_number_of_batches_at_its_size():
    COUNTED.clear()

    both = compared(lambda size: shuffled(size, drop_last=True), Ramps)

    both.check()
    size = both.report.plan.micro_batch_size
    assert {(5, 48), (size, 240 // size)} <= COUNTED
    # Parts of a batch, too: whether it can be split is tested once
    assert all(received <= 240 // batches for received, batches in COUNTED)


class Balanced(Recorded):
    """Weights of the classes are counted when a fit starts."""

    def on_fit_start(self):
        self.weight = torch.bincount(Y, minlength=4) / len(Y)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * F.cross_entropy(self.net(batch[0]), batch[1], weight=self.weight)


class Remembers(Recorded):
    """A bank of features, made at the start of an epoch and filled by steps."""

    def on_train_epoch_start(self):
        self.bank = torch.zeros(60, 4)

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = super().training_step(batch, batch_idx) + (logits @ self.bank.T).mean()
        self.bank = torch.cat([logits.detach(), self.bank])[:60]
        return loss


@pytest.mark.parametrize("module", [Balanced, Remembers])
def test_step_has_what_the_hooks_before_it_made(module):
    both = compared(shuffled, module)

    both.check()


class Mixes(pl.Callback):
    """Mixes samples of a batch, and keeps what the step needs at the module."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.share = torch.rand(())
        batch[0].copy_(pl_module.share * batch[0] + (1 - pl_module.share) * batch[0].flip(0))


class Mixed(Recorded):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        flipped = F.cross_entropy(self.net(batch[0]), batch[1].flip(0))
        return self.share * loss + (1 - self.share) * flipped


def test_callback_that_mixes_samples_runs_before_trial_steps():
    both = compared(shuffled, Mixed, callbacks=lambda: [Mixes()])

    both.check()


class Even(Recorded):
    """Compares the halves of its batch, which have to be equally large."""

    def training_step(self, batch, batch_idx):
        if len(batch[0]) % 4:
            raise ValueError("a batch of pairs of pairs")
        return super().training_step(batch, batch_idx)


def test_sizes_that_a_step_refuses_are_left_out():
    both = compared(
        lambda size: shuffled(size, drop_last=True), Even, own=4, max_micro_batch_size=11
    )

    assert both.tuned.sizes == both.by_hand.sizes
    assert set(both.tuned.sizes) <= {4, 8}
    assert both.report.plan.effective_batch_size == 24
    assert any("a batch of pairs of pairs" in note for note in both.report.notes)


# Several runs


class OfWidth(Recorded):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, 4)


def test_one_callback_for_all_folds_searches_for_each_kind_of_data():
    """The second data set has samples of 256 times as many numbers."""

    def largest():
        return tuner(target_batch_size=None, device=SimulatedAccelerator("1MiB"))

    one = largest()
    sizes = []

    for times in (1, 256, 1):
        wide = DataLoader(TensorDataset(X.repeat(1, times), Y), 4)
        quiet_trainer(one, max_epochs=1).fit(OfWidth(16 * times), wide)
        new = largest()
        quiet_trainer(new, max_epochs=1).fit(OfWidth(16 * times), wide)
        sizes.append((one.report.plan.micro_batch_size, new.report.plan.micro_batch_size))

    assert all(a == b for a, b in sizes)
    assert sizes[1][0] < sizes[0][0] / 2


# Plain loops


def test_end_of_an_iterator_in_a_step_is_passed_on_with_the_size():
    pairs = iter(())
    model = nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(batch_size):
        x, y = default_collate([next(pairs) for _ in range(batch_size)])
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(StopIteration) as raised:
        autobatch.find(step, device=SimulatedAccelerator("900KiB"))

    assert "batch_size=" in raised.value.__notes__[0]
