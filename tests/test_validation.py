"""Validation beside training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from evaluating import Data, Model, loader, tuner
from lightning_here import data, pl
from lightning_here import quiet_trainer as trainer
from sameness import same


def test_validation_keeps_a_size_that_fits():
    model, callback = Model(), tuner("2MiB")

    trainer(callback).fit(model, loader(4), loader(60))

    assert model.sizes == {60}
    assert callback.report.validation_batch_size == 60
    assert 0 < callback.report.validation_seconds < callback.report.search_seconds
    assert not any("Validation runs" in note for note in callback.report.notes)


def test_validation_that_does_not_fit_gets_a_smaller_batch():
    """Parameters, gradients and optimizer state leave less memory than an empty device has."""
    model, callback, passed = Model(kib=4), tuner("256KiB"), loader(60)

    trainer(callback).fit(model, loader(4), passed)

    size = callback.report.validation_batch_size
    assert 1 < size < 60
    assert max(model.sizes) == size
    assert f"Validation runs batches of {size} instead of 60" in callback.report.notes[-1]
    assert passed.batch_size == passed.batch_sampler.batch_size == 60
    # The smaller size is close to the limit: half as much again does not fit
    held = 3 * sum(p.numel() * 4 for p in model.parameters())
    budget = callback.report.budget
    assert held + size * 4 * 1024 <= budget < held + 1.5 * size * 4 * 1024 + 20_000


def test_a_size_beyond_the_data_is_tried_at_the_length_of_the_data():
    model, callback, passed = Model(kib=4), tuner("256KiB"), loader(500, length=20)

    trainer(callback).fit(model, loader(4), passed)

    assert model.sizes == {20}
    assert callback.report.validation_batch_size == 20
    assert not any("Validation runs" in note for note in callback.report.notes)


def test_the_sanity_check_runs_at_a_size_that_fits():
    model, callback = Model(kib=4), tuner("256KiB")
    sanity = []

    class Look(pl.Callback):
        def on_sanity_check_end(self, fitted, module):
            sanity.extend(module.sizes)

    trainer(callback, Look(), num_sanity_val_steps=2).fit(model, loader(4), loader(60))

    assert sanity == [callback.report.validation_batch_size]


def test_validation_that_fits_at_no_size_is_refused_before_changes():
    model, callback, passed = Model(kib=300), tuner("256KiB"), loader(4)

    sentence = "Training fits, but validation does not beside it. No batch size fits"
    with pytest.raises(autobatch.DoesNotFitError, match=sentence):
        trainer(callback).fit(model, passed, loader(2))

    assert model.trained == model.evaluated == []
    assert passed.batch_size == 4


def test_each_of_several_validation_loaders_is_tried():
    """The first loader has small samples, the second large ones."""

    class Second(Model):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            room = torch.empty(len(batch[0]), 2 + 4 * dataloader_idx, 256)
            self.evaluated.append((dataloader_idx, room.shape[0]))

    model, callback = Second(), tuner("512KiB")

    trainer(callback).fit(model, loader(4), [loader(40), loader(80)])

    first, second = (max(size for at, size in model.evaluated if at == which) for which in (0, 1))
    assert second < 80
    assert second == 2 * first


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}])
@pytest.mark.parametrize("validated", [1, 3])
def test_validation_keeps_its_size_if_one_batch_size_is_for_all(validated, options):
    model, made, callback = Model(), Data(validated=validated), tuner("512KiB")

    trainer(callback, **options).fit(model, datamodule=made)

    report = callback.report
    assert made.hparams.batch_size == report.plan.micro_batch_size > 4
    assert set(model.trained) == {report.plan.micro_batch_size}
    assert report.validation_batch_size == 4 * validated
    assert model.sizes == {4 * validated}


def test_validation_of_a_shared_batch_size_shrinks_if_it_does_not_fit():
    model, callback = Model(kib=16), tuner("512KiB", target_batch_size=60)

    trainer(callback).fit(model, datamodule=Data(validated=15))

    report = callback.report
    assert 60 > report.validation_batch_size > 4
    assert max(model.sizes) == report.validation_batch_size


def test_retuning_keeps_the_size_of_validation_with_a_shared_batch_size():
    model, callback = Model(), tuner("512KiB", retune_at_epochs=[1])

    trainer(callback).fit(model, datamodule=Data())

    assert callback.report.plan.micro_batch_size > 4
    assert model.sizes == {4}


def test_retuning_shrinks_validation_that_has_grown():
    class Growing(Model):
        def on_train_epoch_start(self):
            self.kib = 4 * 4**self.current_epoch

        def on_validation_epoch_start(self):
            self.evaluated.append([])

        def validation_step(self, batch, batch_idx):
            self.evaluated[-1].append(len(batch[0]))
            torch.empty(len(batch[0]), self.kib, 256)

    model, passed = Growing(kib=4), loader(100)
    callback = tuner("256KiB", retune_at_epochs=[1, 2])

    trainer(callback, max_epochs=3, num_sanity_val_steps=0).fit(model, loader(4), passed)

    first, second, third = (max(sizes) for sizes in model.evaluated)
    assert 100 > first > second > third == callback.report.validation_batch_size
    assert passed.batch_size == passed.batch_sampler.batch_size == 100


def test_no_validation_is_tried_if_there_is_none():
    model, callback = Model(), tuner()

    trainer(callback, limit_val_batches=0).fit(model, loader(4), loader(60))

    assert callback.report.validation_batch_size is None
    assert model.evaluated == []


def test_validation_with_a_fixed_size_is_kept_and_noted():
    model, callback = Model(), tuner("2MiB")
    batches = [tuple(data(8).tensors)]

    trainer(callback).fit(model, loader(4), DataLoader(batches, batch_size=None))

    assert model.sizes == {8}
    assert any("Validation was not tried" in note for note in callback.report.notes)


def test_a_validation_trial_has_the_attributes_made_by_start_hooks():
    class Prepared(Model):
        def on_validation_epoch_start(self):
            self.outputs = []

        def validation_step(self, batch, batch_idx):
            self.outputs.append(len(batch[0]))
            self.evaluated.append((0, len(batch[0])))

    model = Prepared()

    trainer(tuner("2MiB")).fit(model, loader(4), loader(60))

    assert model.outputs == [60] * 4


def test_training_with_validation_is_bit_identical_to_training_by_hand():
    class Dropped(Model):
        def __init__(self):
            super().__init__(kib=4)
            self.net = nn.Sequential(
                nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 4)
            )

    def run(*callbacks, size=4, validation=60, **options):
        pl.seed_everything(1, verbose=False)
        model = Dropped()
        fitted = trainer(*callbacks, **options)
        passed = DataLoader(data(240), size, shuffle=True)
        fitted.fit(model, passed, loader(validation))
        metrics = {name: value.item() for name, value in fitted.callback_metrics.items()}
        return [
            model.trained,
            model.evaluated,
            dict(model.state_dict()),
            metrics,
            torch.get_rng_state(),
        ]

    callback = tuner("256KiB")
    tuned = run(callback)

    report = callback.report
    assert report.validation_batch_size < 60
    by_hand = run(
        size=report.plan.micro_batch_size,
        validation=report.validation_batch_size,
        accumulate_grad_batches=report.plan.accumulate_grad_batches,
    )
    assert same(tuned, by_hand)
