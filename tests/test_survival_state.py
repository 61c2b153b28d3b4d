"""State of a module before a failed micro-batch, which is there again in its pieces."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

import autobatch
from lightning_here import pl, quiet_trainer
from surviving import SPLIT, quick_collections, torchmetrics


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_collections():
        yield


class Failing(pl.LightningModule):
    """Runs out of memory at the end of one step, with more than half of its samples."""

    half = 4

    def __init__(self, at=None):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Linear(16, 4)
        self.at = at  # updates before it
        self.sizes = ()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.count(logits.detach(), y)
        if self.at == self.global_step and len(x) > self.half:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.sizes += (len(x),)
        return F.cross_entropy(logits, y)

    def count(self, logits, y):
        """Count the samples of a step."""

    def train_dataloader(self):
        return DataLoader(samples(), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def fitted(module, loader=None, epochs=2, **options):
    callback = autobatch.AutoBatch(**SPLIT)
    trainer = quiet_trainer(callback, max_epochs=epochs, **options)
    trainer.fit(module, loader)
    return callback, module


class WithAttributes(Failing):
    def __init__(self, at=None):
        super().__init__(at)
        self.values = {
            "list": [],
            "dict": {"labels": []},
            "nested": {"of": {"train": []}},
            "defaultdict": defaultdict(list),
            "Counter": Counter(),
            "OrderedDict": OrderedDict(n=0),
            "deque": deque(maxlen=5),
            "tensor": {"sum": torch.zeros(())},
            "array": np.zeros(4),
            "large": list(range(2000)),
        }
        vars(self).update({f"of_{name}": value for name, value in self.values.items()})
        del self.values

    def count(self, logits, y):
        labels = y.tolist()
        self.of_list += labels
        self.of_dict["labels"] += labels
        self.of_nested["of"]["train"] += labels
        self.of_defaultdict["labels"] += labels
        self.of_Counter.update(labels)
        self.of_OrderedDict["n"] += len(labels)
        self.of_deque.extend(labels)
        self.of_tensor["sum"] += y.sum()
        self.of_array += np.bincount(labels, minlength=4)
        self.of_large += labels


def test_contents_of_attributes_are_those_of_a_run_that_never_failed():
    _, never = fitted(WithAttributes())

    callback, module = fitted(WithAttributes(at=2))

    assert [event.step for event in callback.survived] == [2]
    names = [name for name in vars(never) if name.startswith("of_")]
    assert len(names) == 10
    for name in names:
        expected, found = getattr(never, name), getattr(module, name)
        assert type(found) is type(expected)
        assert repr(found) == repr(expected)


def test_set_of_many_entries_that_a_step_changes_passes_the_error():
    class Large(Failing):
        def __init__(self, at=None):
            super().__init__(at)
            self.seen = set(range(2000))

        def count(self, logits, y):
            self.seen.add(object())

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fitted(Large(at=2))

    note = caught.value.__notes__[-1]
    assert "training_step changes a set of more than 1,000 entries" in note


class WithLateMetric(Failing):
    """Makes its metric and a buffer once training has begun."""

    def on_train_start(self):
        self.part = torch.nn.Module()
        self.part.register_buffer("seen", torch.zeros(()))

    def on_train_epoch_start(self):
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)

    def count(self, logits, y):
        self.part.seen += len(y)
        self.accuracy.update(logits, y)

    def on_train_epoch_end(self):
        self.last = self.accuracy.tp.sum() + self.accuracy.fn.sum()


@pytest.mark.parametrize("at", [2, 7])
def test_metrics_and_buffers_made_by_hooks_count_each_sample_once(at, caplog):
    callback, module = fitted(WithLateMetric(at))

    assert len(callback.survived) == 1
    assert module.last == 40
    assert module.part.seen == 80
    assert "updated once per batch" not in caplog.text


def test_curve_of_more_than_a_thousand_batches_counts_each_sample_once():
    class Curve(Failing):
        half = 1

        def __init__(self, at=None):
            super().__init__(at)
            self.curve = torchmetrics.classification.MulticlassAUROC(4)

        def count(self, logits, y):
            self.curve.update(logits, y)

        def on_train_epoch_end(self):
            self.seen = sum(map(len, self.curve.target))

    callback, module = fitted(Curve(at=1010), DataLoader(samples(2040), 2), epochs=1)

    assert len(callback.survived) == 1
    assert module.seen == 2040


def test_batch_size_may_change_with_the_epoch():
    class Grows(Failing):
        def train_dataloader(self):
            return DataLoader(samples(), 8 * (1 + self.current_epoch))

    callback, module = fitted(Grows(at=6), reload_dataloaders_every_n_epochs=1)

    assert len(callback.survived) == 1
    assert module.sizes == (*[8] * 5, 16, *[4] * 6)


class Stream(IterableDataset):
    """Samples of two workers, of which each ends with a smaller batch."""

    def __iter__(self):
        worker = get_worker_info().id
        yield from list(samples(13, worker))


def test_smaller_batch_of_a_worker_in_the_middle_is_divided():
    callback, module = fitted(Failing(at=2), DataLoader(Stream(), 8, num_workers=2), epochs=1)

    assert len(callback.survived) == 1
    assert sum(module.sizes) == 26
