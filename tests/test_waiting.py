"""Waiting time for the loader, measured in a fit."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl, quiet_trainer

# Only where there is a Lightning
from autobatch.lightning._loading import DataLoaderTimer  # isort: skip

SECONDS = 0.04


class Slow(Dataset):
    def __init__(self, length, seconds=SECONDS):
        self.length, self.seconds = length, seconds

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.ones(4)


class Stream(IterableDataset):
    def __iter__(self):
        for _ in range(20):
            time.sleep(SECONDS)
            yield torch.ones(4)


class Model(pl.LightningModule):
    seconds = 0.0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Busy(Model):
    seconds = 0.02


class Validated(Model):
    def validation_step(self, batch, batch_idx):
        time.sleep(SECONDS)


def fit(model, data, validation=None, **options):
    callback = autobatch.AutoBatch(
        plan=autobatch.BatchPlan(1, 1),
        device=SimulatedAccelerator("64MiB"),
        steps_per_trial=1,
    )
    trainer = quiet_trainer(callback, **{"max_epochs": 1, **options})
    trainer.fit(model, DataLoader(data, 1), validation)
    return callback.report


def test_a_slow_loader_takes_most_of_the_time(caplog):
    report = fit(Model(), Slow(20))

    # 20 batches have 19 intervals, of which the first three are warm-up
    assert report.loading.batches == 16
    assert report.loading.wait_seconds >= 16 * SECONDS
    assert report.loading.share > 0.5
    assert "Data loading took" in str(report)
    assert "Data loading took" in caplog.text


def test_waiting_for_a_prefetched_stream_counts():
    report = fit(Model(), Stream())

    assert report.loading.share > 0.5


def test_a_fast_loader_takes_the_smaller_part():
    report = fit(Busy(), Slow(20, seconds=0.0))

    assert report.loading.batches == 16
    assert report.loading.step_seconds >= 16 * Busy.seconds
    assert report.loading.share < 0.5


def test_validation_does_not_count_as_waiting():
    validation = DataLoader(torch.ones(1, 4), 1)

    report = fit(Validated(), Slow(20, 0.0), validation, val_check_interval=1)

    assert report.loading is None  # it comes between any two batches


def test_several_epochs_are_measured_as_one():
    report = fit(Model(), Slow(8), max_epochs=3)

    # All seven intervals of each epoch, less the warm-up in the first
    assert report.loading.batches == 7 + 7 + 4


def test_a_few_batches_are_not_reported():
    assert fit(Model(), Slow(12)).loading is None


def test_200_batches_are_measured():
    assert fit(Model(), Slow(300, 0.0)).loading.batches == 200


def test_fit_restores_the_profiler_calls_of_the_loop():
    class Watching(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            fetcher = trainer.fit_loop._data_fetcher
            self.watch = fetcher._start_profiler.__self__

    callback = autobatch.AutoBatch(
        plan=autobatch.BatchPlan(1, 1), device=SimulatedAccelerator("64MiB")
    )
    watching = Watching()

    trainer = quiet_trainer(callback, watching, max_epochs=1)
    trainer.fit(Model(), DataLoader(Slow(20, 0.0), 1))

    assert watching.watch is trainer.fit_loop.epoch_loop


# With a simulated clock


class Trainer:
    """The attributes of a Trainer that the timer uses."""

    def __init__(self, device="cpu"):
        self.fit_loop = self.strategy = self._data_fetcher = self
        self.root_device = torch.device(device)
        self.profiled = []
        self._start_profiler = lambda: self.profiled.append("start")
        self._stop_profiler = lambda: self.profiled.append("stop")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("device", "is_done", "share"),
    [("cpu", None, 0.3), ("cuda:1", True, 0.3), ("cuda:1", False, 0)],
)
def test_on_a_gpu_a_wait_counts_only_with_an_empty_queue(device, is_done, share, monkeypatch):
    class Event:
        def record(self, stream):
            assert stream == "of cuda:1"

        def query(self):
            return is_done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"of {d}")
    clock, trainer = Clock(), Trainer(device)
    timer = DataLoaderTimer(clock)

    for _ in range(24):
        timer.start_batch(trainer)
        clock.now += 7.0
        trainer._start_profiler()
        clock.now += 3.0
        trainer._stop_profiler()
    timer.stop()

    assert timer.loading.wait_seconds == pytest.approx(share * 200)
    assert timer.loading.step_seconds == pytest.approx((1 - share) * 200)
    assert trainer.profiled == 24 * ["start", "stop"]
