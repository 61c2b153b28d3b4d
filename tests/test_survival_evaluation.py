"""Batches of validation and testing that run out of memory are run again in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from lightning_here import Model, data, quiet_trainer
from surviving import SPLIT, quick_collections, torchmetrics


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_collections():
        yield


class Evaluated(Model):
    """Runs out of memory at each batch of more than `most` samples, once it has logged it."""

    def __init__(self, most=99):
        super().__init__()
        torch.manual_seed(3)
        self.most = most
        self.net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.seen = []
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.seen.append(len(x))
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        loss = self.loss(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"loss": loss, "logits": logits}

    def loss(self, logits, y):
        return F.cross_entropy(logits, y)

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def on_test_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def loader():
    return DataLoader(data(42), batch_size=16)


def evaluated(module, batches=None):
    trainer = quiet_trainer(autobatch.AutoBatch(**SPLIT), logger=False)
    trainer.test(module, batches or loader(), verbose=False)
    return module, trainer


def test_test_in_pieces_gives_the_values_of_whole_batches(caplog):
    never, expected = evaluated(Evaluated())

    module, trainer = evaluated(Evaluated(most=8))

    assert "test_step: out of memory, batch 16 done in 2 × 8" in caplog.text
    assert module.seen[-4:] == [8, 8, 5, 5]  # later batches begin in pieces
    assert {"accuracy", "loss_epoch"} <= expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        assert torch.allclose(trainer.callback_metrics[name], value, rtol=1e-6)
    for outputs, others in zip(module.outputs, never.outputs, strict=True):
        assert outputs.keys() == others.keys()
        assert all(torch.allclose(outputs[name], others[name], atol=1e-6) for name in others)
    assert "test_step" not in vars(trainer.strategy)


def fitted(module):
    trainer = quiet_trainer(autobatch.AutoBatch(**SPLIT), max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader(), loader())
    return trainer


def test_validation_within_training_survives_and_training_is_the_same():
    expected = fitted(never := Evaluated())

    trainer = fitted(module := Evaluated(most=4))

    assert max(module.seen[-8:]) == 4
    for name, value in expected.callback_metrics.items():
        assert torch.allclose(trainer.callback_metrics[name], value, rtol=1e-6)
    for one, other in zip(module.parameters(), never.parameters(), strict=True):
        assert torch.equal(one, other)


class SumOfLosses(Evaluated):
    def loss(self, logits, y):
        return F.cross_entropy(logits, y, reduction="sum")


class Contrastive(Evaluated):
    def loss(self, logits, y):
        return F.cross_entropy(logits @ logits.T, torch.arange(len(y)))


class ReturnsNames(Evaluated):
    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx) | {"name": "x"}


class MeanOfBatches(Evaluated):
    def __init__(self, most):
        super().__init__(most)
        self.mean = torchmetrics.MeanMetric()

    def loss(self, logits, y):
        self.mean(loss := super().loss(logits, y))
        return loss


class UpdatedInPlace(MeanOfBatches):
    def loss(self, logits, y):
        self.mean.update(loss := F.cross_entropy(logits, y))
        return loss


@pytest.mark.parametrize(
    "kind", [SumOfLosses, Contrastive, ReturnsNames, MeanOfBatches, UpdatedInPlace]
)
def test_values_that_pieces_would_change_pass_the_error(kind):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(kind(most=10))

    assert "outputs or logged values of 8 samples are not means" in caught.value.__notes__[-1]


class IgnoresLabels(Evaluated):
    def loss(self, logits, y):
        return F.cross_entropy(logits, y, ignore_index=3)


def test_loss_that_ignores_a_label_late_in_the_batch_passes_the_error():
    y = torch.arange(16) % 3
    y[12] = 3
    rows = TensorDataset(torch.randn(16, 16), y)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(IgnoresLabels(most=8), DataLoader(rows, 16))

    assert "outputs or logged values of 8 samples are not means" in caught.value.__notes__[-1]


@pytest.mark.parametrize(("most", "compared"), [(4, 4), (2, 2)])
def test_fewer_samples_are_compared_where_eight_do_not_fit(most, compared):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(Contrastive(most))

    note = caught.value.__notes__[-1]
    assert f"outputs or logged values of {compared} samples are not means" in note


class Collected(Evaluated):
    def __init__(self, most=99):
        super().__init__(most)
        kinds = torchmetrics.classification.MulticlassAccuracy, torchmetrics.classification.AUROC
        self.both = torchmetrics.MetricCollection(
            kinds[0](4), kinds[1]("multiclass", num_classes=4)
        )

    def loss(self, logits, y):
        self.both.update(logits.softmax(1), y)
        self.log_dict(self.both)
        return super().loss(logits, y)


def test_collections_of_metrics_are_those_of_whole_batches():
    expected = evaluated(Collected())[1].callback_metrics

    found = evaluated(Collected(most=8))[1].callback_metrics

    assert len(expected) > 3
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6)


class LogsSizeOfLoader(Evaluated):
    def validation_step(self, batch, batch_idx):
        outputs = super().validation_step(batch, batch_idx)
        self.log("weighted", outputs["loss"], batch_size=16)
        return outputs


def test_batch_size_of_the_loader_counts_by_the_share_of_a_piece():
    expected = evaluated(LogsSizeOfLoader())[1].callback_metrics

    found = evaluated(LogsSizeOfLoader(most=8))[1].callback_metrics

    assert torch.allclose(found["weighted"], expected["weighted"], rtol=1e-6)
    assert not torch.allclose(found["weighted"], found["loss_epoch"], rtol=1e-6)


class SumOfSecondLoader(Evaluated):
    def test_step(self, batch, batch_idx, dataloader_idx):
        self.is_sum = dataloader_idx == 1
        return self.validation_step(batch, batch_idx)

    def loss(self, logits, y):
        return F.cross_entropy(logits, y, reduction="sum" if self.is_sum else "mean")

    def on_test_batch_end(self, *_):
        pass


def test_values_of_each_loader_are_compared(caplog):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(SumOfSecondLoader(most=8), [loader(), loader()])

    assert caplog.text.count("test_step: out of memory, batch 16 done in 2 × 8") == 1
    assert "outputs or logged values of 8 samples are not means" in caught.value.__notes__[-1]


def test_single_sample_that_does_not_fit_passes_the_error():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluated(Evaluated(most=0))

    assert "a single sample does not fit" in caught.value.__notes__[-1]
