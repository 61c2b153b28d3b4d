"""Sizes at which a module's own code raises an error, in a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from autobatch import BatchPlan
from lightning_here import Model, data, pl, quiet_trainer, tuner


class Queue(Model):
    """A queue of keys that takes whole batches."""

    def training_step(self, batch, batch_idx):
        assert 512 % len(batch[0]) == 0, "the queue takes whole batches"
        return super().training_step(batch, batch_idx)


class Pictures(torch.utils.data.Dataset):
    """Pictures of many sizes, which only stack one by one."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.ones(3, 8 + index, 8), index % 4


class OnPictures(Model):
    def training_step(self, batch, batch_idx):
        pictures, labels = batch
        pooled = torch.nn.functional.adaptive_avg_pool2d(pictures, (4, 4))[:, 0].flatten(1)
        return super().training_step((pooled, labels), batch_idx)


def fitted(module, loader, **options):
    auto = tuner(**options)
    quiet_trainer(auto, max_epochs=1).fit(module, loader)
    return auto.report


@pytest.mark.parametrize("target", [128, None])
def test_a_queue_trains_with_a_size_that_divides_it(target):
    module = Queue()

    report = fitted(
        module, DataLoader(data(), 8, shuffle=True, drop_last=True), target_batch_size=target
    )

    size = report.plan.micro_batch_size
    assert report.plan.effective_batch_size == (target or 64)  # 128 do not fit
    assert module.sizes == [size] * (600 // size)
    assert any("(AssertionError: the queue takes whole batches)" in n for n in report.notes)


@pytest.mark.parametrize(("target", "plan"), [(4, BatchPlan(1, 4)), (None, BatchPlan(1))])
def test_pictures_that_only_stack_one_by_one_are_trained_one_by_one(target, plan):
    module = OnPictures()

    report = fitted(module, DataLoader(Pictures(), 1), target_batch_size=target)

    assert report.plan == plan
    assert module.sizes == [1] * 12
    assert any("at batch_size=2" in note and "(RuntimeError: " in note for note in report.notes)


def test_an_error_at_the_loaders_own_size_is_the_users():
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        fitted(Fails(), DataLoader(data(), 8))

    assert "autobatch was trying batch_size=8" in caught.value.__notes__
    assert issubclass(Fails, pl.LightningModule)
