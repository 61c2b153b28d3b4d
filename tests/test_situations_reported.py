"""Situations that projects have reported about batch sizes, in small; trained by hand as well."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
)

import autobatch
from autobatch.errors import AutobatchError
from autobatch.testing import SimulatedAccelerator
from by_hand import PAIRS, Recorded, X, Y, compared
from lightning_here import pl, quiet_trainer
from sameness import same

# Only the choice depends on the time of steps, and not what is trained
UNTIMED = {"timing_seconds": 0.0}


def plain(batch_size, **options):
    return DataLoader(PAIRS, batch_size, shuffle=True, **options)


def collated(collate, data=PAIRS, **options):
    """Return a function of a batch size that makes a loader with this collate function."""
    return lambda size: DataLoader(data, size, shuffle=True, collate_fn=collate, **options)


# Batches


@dataclasses.dataclass(frozen=True)
class Fixed:
    x: torch.Tensor
    y: torch.Tensor


class Movable(Fixed):
    def to(self, device, **options):
        return Movable(self.x.to(device), self.y.to(device))


@dataclasses.dataclass
class Named:
    names: list
    x: torch.Tensor
    y: torch.Tensor
    count: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.count = len(self.x)


class OfFields(Recorded):
    def pair(self, batch):
        assert getattr(batch, "count", len(batch.x)) == len(batch.x)
        return batch.x, batch.y


class Moves(OfFields):
    """Moves a batch that cannot move itself, and augments it on the device."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return Fixed(batch.x.to(device), batch.y.to(device))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return Fixed(batch.x + 0.1 * torch.randn_like(batch.x), batch.y)


class Held:
    """A batch that a step writes into."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class Views(Recorded):
    """Puts a second view of each sample into the batch it was given."""

    def pair(self, batch):
        x, y = batch.x, batch.y
        batch.x, batch.y = torch.cat([x, x + 0.1]), y.repeat(2)
        self.loss_on = batch
        return x, y

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return F.cross_entropy(self.net(batch.x), batch.y)


def fields(kind, samples):
    return kind(*default_collate(samples))


def named(samples):
    x, y = default_collate(samples)
    return Named([str(i) for i in range(len(x))], x, y)


def mixed(samples):
    """Mix samples of a batch, as collate functions of image classifiers do."""
    x, y = default_collate(samples)
    share = torch.distributions.Beta(0.4, 0.4).sample()
    return share * x + (1 - share) * x.roll(1, 0), y


class TwoViews(Recorded):
    """Contrasts two views of each sample, which the collate function stacks."""

    def training_step(self, batch, batch_idx):
        count = len(batch) // 2
        self.sizes.append(count)
        self.seen.append(batch.double().sum().item())
        first, second = F.normalize(self.net(batch)).split(count)
        return F.cross_entropy(first @ second.T, torch.arange(count))


def two_views(samples):
    x, _ = default_collate(samples)
    return torch.cat([x + 0.1 * torch.randn_like(x) for _ in range(2)])


class Detects(Recorded):
    """Takes a tuple of pictures of several sizes, and one of their boxes."""

    def training_step(self, batch, batch_idx):
        pictures, targets = batch
        self.sizes.append(len(pictures))
        self.seen.append(sum(each.double().sum().item() for each in pictures))
        losses = [
            F.cross_entropy(self.net(picture.mean(0)), target["label"])
            for picture, target in zip(pictures, targets, strict=True)
        ]
        return torch.stack(losses).mean()


PICTURES = [(X[i].expand(1 + i % 4, 16), {"label": Y[i]}) for i in range(len(X))]


class Packed(Recorded):
    """Runs a recurrent network over packed sequences."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(2, 16)
        self.head = nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        packed, y = batch
        self.sizes.append(len(y))
        self.seen.append(packed.data.double().sum().item())
        _, (hidden, _) = self.net(packed)
        return F.cross_entropy(self.head(hidden[0]), y)


SEQUENCES = [(X[i].view(8, 2)[: 2 + i % 7], Y[i]) for i in range(len(X))]


def packed(samples):
    sequences = [sequence for sequence, _ in samples]
    labels = torch.stack([label for _, label in samples])
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False), labels


class OfArrays(Recorded):
    def pair(self, batch):
        return torch.from_numpy(batch["x"]), torch.from_numpy(batch["y"])


def arrays(samples):
    x, y = default_collate(samples)
    return {"x": x.numpy(), "y": y.numpy(), "none": None, "raw": b"bytes"}


class OfSparse(Recorded):
    def pair(self, batch):
        return batch[0].to_dense(), batch[1]


def sparse(samples):
    x, y = default_collate(samples)
    return x.relu().to_sparse(), y


BATCHES = {
    "frozen dataclass with to": (partial(fields, Movable), OfFields, PAIRS),
    "frozen dataclass moved by a hook": (partial(fields, Fixed), Moves, PAIRS),
    "dataclass with a field of its own": (named, OfFields, PAIRS),
    "object that a step writes into": (partial(fields, Held), Views, PAIRS),
    "mixed samples": (mixed, Recorded, PAIRS),
    "two views": (two_views, TwoViews, PAIRS),
    "pictures of several sizes": (
        lambda samples: tuple(zip(*samples, strict=True)),
        Detects,
        PICTURES,
    ),
    "packed sequences": (packed, Packed, SEQUENCES),
    "arrays, bytes and None": (arrays, OfArrays, PAIRS),
    "sparse tensors": (sparse, OfSparse, PAIRS),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_projects_train_as_by_hand(name):
    collate, module, data = BATCHES[name]

    both = compared(collated(collate, data), module, trainer={"max_epochs": 1}, **UNTIMED)

    both.check()


class Scales(Dataset):
    """Its collate function counts batches, and draws a size of pictures every third time."""

    def __init__(self):
        self.count, self.size = 0, 16

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]

    def collate(self, samples):
        if self.count % 3 == 0:
            self.size = random.choice([8, 12, 16])
        self.count += 1
        x, y = default_collate(samples)
        return F.interpolate(x[:, None], self.size)[:, 0], y


class OfScales(Recorded):
    def pair(self, batch):
        return F.interpolate(batch[0][:, None], 16)[:, 0], batch[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_method_that_counts_its_batches_counts_as_by_hand(workers):
    def make(size):
        data = Scales()
        persistent = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoader(data, size, shuffle=True, collate_fn=data.collate, **persistent)

    both = compared(make, OfScales, **UNTIMED)

    both.check()


# Loaders


class Chunks(Sampler):
    """Sorts chunks of a hundred batches by length, and gives them in another order each epoch."""

    def __init__(self, batch_size):
        self.batch_size, self.epoch = batch_size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return math.ceil(len(X) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.epoch))
        for chunk in order.split(100 * self.batch_size):
            ordered = sorted(chunk.tolist(), key=lambda index: X[index, 0].item())
            for start in range(0, len(ordered), self.batch_size):
                yield ordered[start : start + self.batch_size]


class Lines(IterableDataset):
    """Reads lines of an open file, from the start."""

    def __init__(self, file):
        self.file = file

    def __iter__(self):
        self.file.seek(0)
        for row in csv.reader(self.file):
            yield torch.tensor([float(number) for number in row[:-1]]), int(row[-1])


class Once(Lines):
    """Reads lines from where the file is."""

    def __iter__(self):
        for row in csv.reader(self.file):
            yield torch.tensor([float(number) for number in row[:-1]]), int(row[-1])


def test_batch_sampler_that_sorts_chunks_by_epoch_gives_the_order_by_hand():
    both = compared(lambda size: DataLoader(PAIRS, batch_sampler=Chunks(size)), **UNTIMED)

    both.check()


@pytest.mark.parametrize("kind", [Lines, Once])
def test_stream_of_an_open_file_gives_the_lines_by_hand(kind, tmp_path):
    path = tmp_path / "lines.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([*x.tolist(), int(y)] for x, y in zip(X, Y, strict=True))

    with path.open(newline="") as first, path.open(newline="") as second:
        files = iter([first, second])
        both = compared(
            lambda size: DataLoader(kind(next(files)), size), trainer={"max_epochs": 1}, **UNTIMED
        )

    both.check()
    assert sum(both.tuned.sizes) == len(X)


class Wrapped:
    """A loader around another, as loaders of other libraries are: not a DataLoader."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.loader = plain(batch_size)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


class Batched(IterableDataset):
    """A stream that makes its batches itself."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __iter__(self):
        yield from zip(X.split(self.batch_size), Y.split(self.batch_size), strict=True)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (Wrapped, "it is a Wrapped, not a DataLoader"),
        (lambda size: DataLoader(Batched(size), None), "it has batch_size=None"),
    ],
    ids=["wrapper", "stream of batches"],
)
def test_loader_that_autobatch_cannot_change_trains_without_it_and_is_refused(loader, reason):
    alone, module = Recorded(), Recorded()
    quiet_trainer(max_epochs=1).fit(alone, loader(5))

    with pytest.raises(AutobatchError, match=f"cannot change the batch size.*{reason}"):
        quiet_trainer(autobatch.AutoBatch()).fit(module, loader(5))

    assert alone.sizes == [5] * 48
    assert module.sizes == []


class Counting(IterableDataset):
    def __init__(self):
        self.reads = 0

    def __iter__(self):
        for pair in PAIRS:
            self.reads += 1
            yield pair


STREAMS = []


def counting(size):
    STREAMS.append(Counting())
    return DataLoader(STREAMS[-1], size)


class Estimates(Recorded):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_schedule_that_starts_a_stream_twice_leaves_its_counter_as_by_hand():
    both = compared(counting, Estimates, trainer={"max_steps": 3}, **UNTIMED)

    both.check()
    tuned, by_hand = STREAMS[-2:]
    assert tuned.reads == by_hand.reads


# Epochs and callbacks


class Grows(Recorded):
    """More data in each epoch."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        count = 60 * (1 + self.trainer.current_epoch)
        return DataLoader(TensorDataset(X[:count], Y[:count]), self.batch_size, shuffle=True)


def test_data_that_grow_each_epoch_are_trained_with_as_by_hand():
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    tuner = autobatch.AutoBatch(
        target_batch_size=24, max_micro_batch_size=12, device="simulated:900KiB", **UNTIMED
    )
    pl.seed_everything(3, verbose=False)
    tuned = Grows(5)
    quiet_trainer(tuner, **options).fit(tuned)
    plan = tuner.report.plan
    pl.seed_everything(3, verbose=False)
    by_hand = Grows(plan.micro_batch_size)

    accumulate = plan.accumulate_grad_batches
    quiet_trainer(accumulate_grad_batches=accumulate, **options).fit(by_hand)

    assert sum(tuned.sizes) == 60 + 120 + 180
    assert tuned.seen == by_hand.seen
    assert same(tuned.state_dict(), by_hand.state_dict())


class Levels(pl.Callback):
    """Raises the level of the data set each epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.train_dataloader.dataset.level = 1 + trainer.current_epoch


class Leveled(Scales):
    level = 0

    def __getitem__(self, index):
        return self.level * X[index], Y[index]


class Swaps(pl.Callback):
    """Validates with an average of the weights in the place of the weights."""

    def on_train_start(self, trainer, pl_module):
        self.average = [each.clone() for each in pl_module.net.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        for average, each in zip(self.average, pl_module.net.parameters(), strict=True):
            average.lerp_(each.detach(), 0.1)

    def on_validation_start(self, trainer, pl_module):
        if hasattr(self, "average"):
            self._swap(pl_module)

    on_validation_end = on_validation_start

    def _swap(self, module):
        for i, each in enumerate(module.net.parameters()):
            each.data, self.average[i] = self.average[i], each.data


class Validates(Recorded):
    def validation_step(self, batch, batch_idx):
        self.seen.append(F.cross_entropy(self.net(batch[0]), batch[1]).item())

    def val_dataloader(self):
        return DataLoader(PAIRS, 120)


@pytest.mark.parametrize(
    ("make", "module", "callback"),
    [
        (lambda size: DataLoader(Leveled(), size, shuffle=True), Recorded, Levels),
        (plain, Validates, Swaps),
    ],
    ids=["level of the data", "average for validation"],
)
def test_callbacks_of_projects_train_as_by_hand(make, module, callback):
    both = compared(make, module, callbacks=lambda: [callback()], **UNTIMED)

    both.check()


# What training alone refuses as well


class Two(Recorded):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


@pytest.mark.parametrize(
    ("module", "loader"),
    [(Two, plain), (OfFields, collated(partial(fields, Fixed)))],
    ids=["two optimizers", "frozen dataclass"],
)
def test_error_that_training_alone_raises_is_the_same_with_autobatch(module, loader):
    errors = []
    for callbacks in ([], [autobatch.AutoBatch(device=SimulatedAccelerator("900KiB"))]):
        with pytest.raises(Exception) as raised:
            quiet_trainer(*callbacks).fit(module(), loader(5))
        errors.append(raised.value)

    alone, tuned = errors
    assert type(tuned) is type(alone)
    assert str(tuned) == str(alone)


# Samples and batches that fail


class Damaged(Dataset):
    """Replaces a sample that cannot be read by a random other one, or by None."""

    def __init__(self, replaces):
        self.replaces = replaces

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, index):
        while index % 7 == 0:
            if not self.replaces:
                return None
            index = random.randrange(len(PAIRS))
        return PAIRS[index]


def readable(samples):
    """Collate what could be read; None if that is nothing."""
    kept = [each for each in samples if each is not None]
    return default_collate(kept) if kept else None


class Skips(Recorded):
    def training_step(self, batch, batch_idx):
        return None if batch is None else super().training_step(batch, batch_idx)


def test_samples_that_cannot_be_read_are_replaced_as_by_hand():
    both = compared(lambda size: DataLoader(Damaged(replaces=True), size, shuffle=True), **UNTIMED)

    both.check()


@pytest.mark.parametrize("own", [5, 1])
def test_batches_without_the_samples_that_cannot_be_read_train_as_by_hand(own):
    both = compared(collated(readable, Damaged(replaces=False)), Skips, own=own, **UNTIMED)

    both.check()
    assert 0 < sum(both.tuned.sizes) < 2 * len(PAIRS)


class OfBatches:
    """Larger batches of pairs that belong together."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __len__(self):
        return math.ceil(len(PAIRS) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(PAIRS) // 2).tolist()
        pairs = [index for each in order for index in (2 * each, 2 * each + 1)]
        for at in range(0, len(pairs), self.batch_size):
            yield pairs[at : at + self.batch_size]


def test_batches_of_samples_that_belong_together_give_the_order_by_hand():
    both = compared(lambda size: DataLoader(PAIRS, batch_sampler=OfBatches(size)), **UNTIMED)

    both.check()
