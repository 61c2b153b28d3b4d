"""Predicted memory as the guide of a search in a Trainer, on a device that shows peaks alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from autobatch import GuidedBisection, _guide
from autobatch.testing import SimulatedAccelerator
from lightning_here import data, pl, quiet_trainer, tuner
from sameness import same

pytestmark = pytest.mark.guide

MEASURED = GuidedBisection(estimate=False)


class Module(pl.LightningModule):
    """A network with buffers, random numbers, logged values and state of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 4)
        )
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0] + torch.rand(16)), batch[1])
        self.losses.append(loss.detach())
        self.log("loss", loss)
        return {"loss": loss, "batch_idx": batch_idx}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Branches(Module):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return outputs if outputs["loss"] > 0 else None


class Transfers(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class OptimizesItself(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        self.optimizers().step()
        self.optimizers().zero_grad()


class KeepsMore(Module):
    """Its copy, which has no Trainer, keeps less memory than the module itself."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return outputs | ({} if self._trainer is None else {"kept": torch.zeros(10_000)})


class ShowsPeaks(SimulatedAccelerator):
    """Accelerator whose single allocations cannot be seen, as on CUDA."""

    @contextlib.contextmanager
    def limited(self, budget):
        with super().limited(budget):
            yield None


def fitted(module, device=ShowsPeaks, **options):
    """Return a report, and the module after two updates of training."""
    callback = tuner(target_batch_size=None, timing_seconds=0, device=device("1MiB"), **options)
    trainer = quiet_trainer(callback, max_steps=2)
    torch.manual_seed(7)
    trainer.fit(module, DataLoader(data(4000), batch_size=4, shuffle=True))
    return callback.report, module


def tried(report):
    return [trial.batch_size if trial.fits else -trial.batch_size for trial in report.trials]


@pytest.fixture(autouse=True, scope="module")
def patience():
    """A busy machine may take longer than predictions are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_guide, "_SECONDS", 600.0)
        yield


@pytest.fixture(scope="module")
def measured():
    return fitted(Module(), search=MEASURED)


@pytest.fixture(scope="module")
def predicted():
    return fitted(Module())


def test_a_traceable_step_takes_three_trials_without_a_failure(predicted, measured):
    report = predicted[0]

    assert report.guide == "by predicted memory"
    assert "Search" in str(report)
    assert len(tried(report)) <= 3
    assert min(tried(report)) > 0
    assert report.largest_fit >= 0.99 * measured[0].largest_fit
    assert report.trials[-1].peak <= report.budget


def test_training_after_a_trace_is_identical_to_training_without_one(predicted):
    most = predicted[0].largest_fit
    report, again = fitted(Module(), max_micro_batch_size=most)
    _, plain = fitted(Module(), max_micro_batch_size=most, search=MEASURED)

    assert report.guide == "by predicted memory"
    assert same(again.state_dict(), plain.state_dict())
    assert same(again.losses, plain.losses)


def test_without_an_estimate_measured_memory_guides_and_nothing_is_said(measured):
    report = measured[0]

    assert report.guide is None
    assert "predicted" not in str(report)
    assert tried(report)[1] == 32


def test_memory_of_which_every_allocation_is_seen_needs_no_prediction():
    report, _ = fitted(Module(), SimulatedAccelerator)

    assert report.guide is None
    assert min(tried(report)) > 0
    assert len(tried(report)) <= 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branches, "the step depends on values of tensors"),
        (Transfers, "on_after_batch_transfer is not traced"),
        (OptimizesItself, "the module optimizes by itself"),
        (KeepsMore, "predicted bytes of the first trial were -"),
    ],
)
def test_a_step_that_cannot_be_predicted_leaves_the_search_to_measured_memory(kind, reason):
    report, _ = fitted(kind())

    assert report.guide.startswith(f"by measured memory: {reason}")
    assert tried(report) == tried(fitted(kind(), search=MEASURED)[0])


def test_a_trace_that_takes_too_long_leaves_the_search_to_measured_memory(monkeypatch, measured):
    monkeypatch.setattr(_guide, "_SECONDS", 0.0)
    monkeypatch.setattr(_guide, "_SHARE", 0.0)

    report, module = fitted(Module())

    assert report.guide == "by measured memory: tracing the step takes too long"
    assert tried(report) == tried(measured[0])
    assert same(module.state_dict(), measured[1].state_dict())


def test_an_estimate_that_is_no_truth_value_is_refused():
    with pytest.raises(ValueError, match="estimate must be True or False, got 1"):
        GuidedBisection(estimate=1)
