"""Samples of trials: the largest ones found in bounded time."""

from __future__ import annotations

import importlib
from collections import UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
)

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl

_samples = importlib.import_module("autobatch._loaders.samples")
_reading = importlib.import_module("autobatch._loaders.reading")

LONG = 20  # times as long as the others


class Sequences(Dataset):
    """Sequences of 16 steps, and one that is 20 times as long."""

    def __init__(self, length, long_at):
        self.length, self.long_at = length, long_at
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads.append(index)
        return torch.ones(16 * (LONG if index == self.long_at else 1), 4)


class Stream(IterableDataset):
    def __init__(self, length, long_at):
        self.data = Sequences(length, long_at)

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


def padded(samples):
    return pad_sequence(samples, batch_first=True)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        self.shapes = []

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch.shape[:2]))
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(dataset, device, collate_fn=padded, workers=0, **options):
    callback = autobatch.AutoBatch(device=device, **options)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    loader = DataLoader(dataset, 4, collate_fn=collate_fn, num_workers=workers)
    with device.limited(int(0.9 * device.capacity)):  # in training too
        trainer.fit(model, loader)
    return model, callback.report


@pytest.mark.parametrize("workers", [0, 1])
def test_training_survives_one_long_sample(workers):
    device = SimulatedAccelerator("4MiB")

    model, report = fit(Sequences(1000, long_at=617), device, workers=workers)

    size = report.plan.micro_batch_size
    assert (size, 16 * LONG) in model.shapes
    assert report.look.read == report.look.among == 1000
    assert not report.look.is_even
    assert any("Samples differ in size" in note for note in report.notes)


def test_without_the_long_sample_the_batch_is_far_larger():
    """The long sample of the test above has an effect."""
    _, with_it = fit(Sequences(1000, long_at=617), SimulatedAccelerator("4MiB"))
    _, without = fit(Sequences(1000, long_at=None), SimulatedAccelerator("4MiB"))

    assert without.plan.micro_batch_size > 5 * with_it.plan.micro_batch_size
    assert without.look.is_even


def test_samples_of_a_stream_are_read():
    _, report = fit(Stream(1000, long_at=617), SimulatedAccelerator("4MiB"))

    assert report.look.read == 1000
    assert report.look.among is None
    assert not report.look.is_even


def test_report_shows_the_number_of_samples_read_of_a_large_data_set():
    dataset = Sequences(100_000, long_at=99_999)
    callback = autobatch.AutoBatch(device=SimulatedAccelerator("4MiB"))

    report = callback.tune(
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False),
        Model(),
        DataLoader(dataset, 4, collate_fn=padded),
    )

    assert report.look.read == 1000
    assert report.look.among == 100_000
    assert "1,000 samples read" in str(report)
    assert "of 100,000; all of one size" in str(report)


def test_data_set_is_read_once_for_all_trials():
    dataset = Sequences(200, long_at=3)
    callback = autobatch.AutoBatch(
        device=SimulatedAccelerator("4MiB"), search=autobatch.Bisection()
    )

    report = callback.tune(
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False),
        Model(),
        DataLoader(dataset, 4, collate_fn=padded),
    )

    assert len(report.trials) > 5
    # Restored after every trial, as every attribute
    assert dataset.reads == []
    assert report.look.read == 200


def test_slow_data_set_is_read_for_seconds_at_most(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(_reading, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    _, report = fit(Sequences(1000, long_at=None), SimulatedAccelerator("4MiB"))

    assert report.look.read == 6 * 16  # chunks, a second each
    assert "96 samples read" in str(report)
    assert "of 1,000; all of one size" in str(report)


def test_first_samples_read_are_spread_over_the_data_set():
    scattered = _reading._spread(list(range(1000)))

    assert sorted(scattered) == list(range(1000))
    for count in (16, 64, 160):
        first = sorted(scattered[:count])
        gaps = [b - a for a, b in zip([0, *first], [*first, 1000], strict=True)]
        assert max(gaps) < 3 * 1000 / count


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (torch.ones(3), torch.ones(4)),
        ("abc", "abcd"),
        ({"ids": [1, 2]}, {"ids": [1, 2, 3]}),
        ((torch.ones(2), 1), (torch.ones(3), 1)),
        (torch.ones(3).numpy(), torch.ones(4).numpy()),
        ([torch.ones(2)], [torch.ones(2), torch.ones(1)]),
        (torch.ones(4, dtype=torch.float16), torch.ones(4)),
    ],
    ids=["tensor", "text", "numbers", "tuple", "array", "list", "dtype"],
)
def test_larger_samples_count_as_larger(small, large):
    assert _reading.data_size(small) < _reading.data_size(large)
    assert _reading.data_size(small) == _reading.data_size(small)


def test_worst_case_replaces_reading_samples():
    asked = []

    def worst_case(batch_size):
        asked.append(batch_size)
        return torch.ones(batch_size, 16 * LONG, 4)

    device = SimulatedAccelerator("4MiB")
    dataset = Sequences(100_000, long_at=99_999)

    callback = autobatch.AutoBatch(device=device, worst_case=worst_case)
    report = callback.tune(
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False),
        Model(),
        DataLoader(dataset, 4, collate_fn=padded),
    )

    assert dataset.reads == []
    assert report.look is None
    assert report.plan.micro_batch_size in asked
    _, seen = fit(Sequences(1000, long_at=3), device)
    assert report.plan.micro_batch_size == pytest.approx(seen.plan.micro_batch_size, rel=0.1)


def test_worst_case_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="worst_case=7 cannot be called"):
        autobatch.AutoBatch(worst_case=7)


def test_worst_case_that_ignores_its_argument_is_refused():
    callback = autobatch.AutoBatch(
        device=SimulatedAccelerator("4MiB"), worst_case=lambda _: torch.ones(3, 16, 4)
    )

    with pytest.raises(ValueError, match="as much data for 8 samples as for 4"):
        callback.tune(
            pl.Trainer(max_epochs=1, accelerator="cpu", logger=False),
            Model(),
            DataLoader(Sequences(100, long_at=3), 4, collate_fn=padded),
        )


def test_note_after_reading_all_samples_warns_of_no_larger_one():
    _, report = fit(Sequences(200, long_at=3), SimulatedAccelerator("4MiB"))

    (note,) = (note for note in report.notes if "differ in size" in note)
    assert note.endswith("Trials ran the largest of all 200, and times are for these.")


def test_plain_list_is_a_data_set():
    samples = [torch.ones(16, 4) for _ in range(64)]

    model, report = fit(samples, SimulatedAccelerator("4MiB"), target_batch_size=32)

    assert report.look.read == 64
    assert (report.plan.micro_batch_size, 16) in model.shapes


class Pair(NamedTuple):
    image: Any
    label: Any


class Record(UserDict):
    pass


def comparable(part):
    """Return a batch as lists and dicts with the types of its parts."""
    if isinstance(part, torch.Tensor):
        return part.dtype, part.tolist()
    if isinstance(part, (dict, UserDict)):
        return type(part), {name: comparable(one) for name, one in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part), [comparable(one) for one in part]
    return part


@pytest.mark.parametrize("size", [4, 10])
@pytest.mark.parametrize(
    "sample",
    [
        lambda i: torch.full((2, 3), float(i)),
        lambda i: (torch.full((2,), i), i, float(i), f"sample {i}"),
        lambda i: {"image": torch.full((2,), i), "more": {"name": b"ab", "n": [i, i]}},
        lambda i: Pair(np.full((2,), i), np.float32(i)),
        lambda i: Record(image=torch.full((2,), i)),
        lambda i: f"sample {i}",
        lambda i: [f"{i}", f"{i}"],
        lambda i: torch.full((), i),
    ],
)
def test_repeated_batch_equals_collating_its_samples_again(sample, size):
    samples = [sample(i) for i in range(4)]

    repeated = _samples.repeated(default_collate(samples), 4, size)

    expected = default_collate([samples[i % 4] for i in range(size)])
    assert comparable(repeated) == comparable(expected)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(3, 2),
        torch.tensor(1.0),
        torch.eye(4).to_sparse(),
        {"image": torch.ones(4), "count": 4},
        ["a", "b"],
        object(),
    ],
)
def test_batch_without_one_entry_per_sample_is_not_repeated(batch):
    assert _samples.repeated(batch, 4, 10) is None


def test_large_batch_of_few_samples_is_collated_once(monkeypatch):
    most = torch.zeros((), dtype=torch.int64).share_memory_()  # another process collates

    def counted(samples):
        most.fill_(max(most.item(), len(samples)))
        return default_collate(samples)

    monkeypatch.setattr(_samples, "default_collate", counted)

    callback = autobatch.AutoBatch(device=SimulatedAccelerator("4MiB"))

    report = callback.tune(
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False),
        Model(),
        DataLoader([torch.ones(16, 4)] * 500, 4, collate_fn=counted),
    )

    assert max(trial.batch_size for trial in report.trials) > 64
    assert most == 64
