"""Situations of projects that train as by hand, each with the values that training shows."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, quiet_trainer, tuner


class Scales(Dataset):
    """Draws another size of its pictures in the collate function, which is a method of it."""

    def __init__(self):
        self.drawn = 0
        self.size = 16
        self.pictures = torch.randn(120, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index], index % 3

    def collate(self, samples):
        if self.drawn % 3 == 0:
            self.size = random.choice([8, 12, 16, 20, 24])
        self.drawn += 1
        pictures = torch.stack([picture for picture, _ in samples])
        return F.interpolate(pictures, self.size), torch.tensor([label for _, label in samples])


class Pictures(Model):
    def __init__(self):
        super().__init__()
        self.shapes = []
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch[0].shape))
        return super().training_step(batch, batch_idx)


def test_a_collate_function_that_draws_sizes_trains_with_the_largest_batch():
    dataset, model = Scales(), Pictures()
    callback = autobatch.AutoBatch(
        device=SimulatedAccelerator("3MiB"), prefer="largest", verbose=False, steps_per_trial=2
    )

    quiet_trainer(callback).fit(model, DataLoader(dataset, 4, collate_fn=dataset.collate))

    assert callback.report.plan.micro_batch_size == callback.report.largest_fit > 4
    assert model.shapes[0][0] == callback.report.plan.micro_batch_size
    assert sum(shape[0] for shape in model.shapes) == 2 * len(dataset)


def test_a_later_epoch_is_searched_for_the_same_effective_batch():
    model, callback = (
        Model(),
        tuner(device=SimulatedAccelerator("900KiB"), target_batch_size=600, retune_at_epochs=[1]),
    )

    quiet_trainer(callback, max_epochs=3, max_steps=3).fit(model, DataLoader(data(), 4))

    assert callback.report.plan.effective_batch_size == 600
    assert len(callback.report.trials) > 1
    assert sum(model.sizes) == 1800


def test_lists_of_samples_are_cut_to_the_planned_size_with_a_repaired_last_window():
    class Lists(Model):
        def training_step(self, batch, batch_idx):
            x, y = map(torch.stack, zip(*batch, strict=True))
            return super().training_step((x, y), batch_idx)

    model = Lists()
    callback = tuner(target_batch_size=24, repair_last_window=True)

    quiet_trainer(callback, max_epochs=1).fit(model, DataLoader(data(103), 4, collate_fn=list))

    assert callback.report.plan == autobatch.BatchPlan(24)
    assert model.sizes == [24, 24, 24, 24, 7]


def test_an_own_size_above_the_data_set_is_reduced_to_one_that_fits():
    model, callback = Model(), tuner(target_batch_size=None)

    quiet_trainer(callback, max_epochs=1).fit(model, DataLoader(data(), 4096))

    size = callback.report.plan.micro_batch_size
    assert 1 < size < 600
    assert model.sizes == [size] * (600 // size) + [600 % size] * (600 % size > 0)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_test_step_sees_the_folder_of_its_checkpoints(tmp_path, evaluates):
    folders = set()

    class Writes(Model):
        def test_step(self, batch, batch_idx):
            folders.add(self.trainer.checkpoint_callback.dirpath)

    checkpoint = pl.callbacks.ModelCheckpoint(dirpath=tmp_path)
    trainer = quiet_trainer(tuner(evaluate=evaluates), checkpoint, enable_checkpointing=True)
    trainer.test(Writes(), DataLoader(data(), 4), verbose=False)

    assert folders == {str(tmp_path)}
    assert list(tmp_path.iterdir()) == []
