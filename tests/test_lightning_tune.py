"""Tuning without training, and plans that are known."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
)

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, plain, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same


def test_tune_trains_and_changes_nothing():
    model, loader, callback = Model(), plain(), tuner()
    other = pl.callbacks.LambdaCallback()
    fitted = trainer(other, accumulate_grad_batches=2)
    callbacks = list(fitted.callbacks)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    report = callback.tune(fitted, model, loader)

    assert report.plan.effective_batch_size == 120
    assert callback.report is report
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.sizes == []
    assert model.hparams.batch_size == loader.batch_size == 4
    assert fitted.callbacks == callbacks
    assert fitted.accumulate_grad_batches == 2


def test_tune_with_a_schedule_that_needs_the_loader_moves_no_generator():
    class Scheduled(Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            steps = int(self.trainer.estimated_stepping_batches)
            return [optimizer], [
                torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            ]

    loader = DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator())
    fitted, model = trainer(), Scheduled()
    before = torch.get_rng_state(), loader.generator.get_state()

    tuner().tune(fitted, model, loader)

    assert same(before, (torch.get_rng_state(), loader.generator.get_state()))


def test_training_after_tune_is_unchanged():
    def weights(tuned):
        pl.seed_everything(1, verbose=False)
        model, fitted = Model(), trainer()
        if tuned:
            tuner().tune(fitted, model, plain())
        fitted.fit(model, plain())
        return dict(model.state_dict())

    assert same(weights(tuned=True), weights(tuned=False))


def test_a_plan_of_tune_can_be_passed_to_the_callback():
    report = tuner().tune(trainer(), Model(), plain())
    callback = tuner(plan=report.plan)
    fitted = trainer(callback)

    fitted.fit(Model(), plain())

    assert callback.report.plan == report.plan
    assert len(callback.report.trials) == 1
    assert fitted.accumulate_grad_batches == report.plan.accumulate_grad_batches


def test_an_error_in_tune_restores_the_callbacks():
    fitted, callback = trainer(tuner()), tuner()
    callbacks = list(fitted.callbacks)

    with pytest.raises(autobatch.AutobatchError, match="it is a range"):
        callback.tune(fitted, Model(), [plain(), range(3)])

    assert fitted.callbacks == callbacks


@pytest.mark.parametrize("value", [5, None, pl.Trainer])
def test_tune_refuses_what_is_no_trainer(value):
    with pytest.raises(ValueError, match="is not a Trainer; give the one to tune for"):
        tuner().tune(value, Model(), plain())


def test_tune_beside_another_autobatch_changes_nothing():
    own, other = tuner(target_batch_size=60), tuner()
    fitted, model, loader = trainer(other, autobatch.NoiseScale()), Model(), plain()
    callbacks, listed = fitted.callbacks, list(fitted.callbacks)

    report = own.tune(fitted, model, loader)

    assert report.plan.effective_batch_size == 60
    assert other.report is None
    assert fitted.callbacks is callbacks
    assert callbacks == listed
    assert fitted.accumulate_grad_batches == 1
    assert loader.batch_size == loader.batch_sampler.batch_size == model.hparams.batch_size == 4
    fitted.fit(model, loader)
    assert other.report.plan.effective_batch_size == 120
    assert set(model.sizes) == {other.report.plan.micro_batch_size}


def test_a_trainer_with_two_autobatches_is_refused_in_one_sentence():
    fitted, model, loader = trainer(tuner()), Model(), plain()
    fitted.callbacks.append(tuner())

    with pytest.raises(autobatch.AutobatchError, match="has 2 AutoBatch callbacks, and each"):
        fitted.fit(model, loader)

    assert model.sizes == []
    assert loader.batch_size == 4


def test_fit_trains_after_an_error_in_tune():
    model, callback = Model(), tuner()
    fitted = trainer(callback)
    model.explode_at = 0
    with pytest.raises(ZeroDivisionError):
        callback.tune(fitted, model, plain())

    model.explode_at = None
    fitted.fit(model, plain())

    assert set(model.sizes) == {callback.report.plan.micro_batch_size}


class Adversarial(Model):
    """A module that draws noise for the batch size of its attribute."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn(self.hparams.batch_size, 16)
        self.sizes.append((len(x), len(noise)))
        return F.cross_entropy(self.net(x + noise), y)

    def train_dataloader(self):
        return DataLoader(data(), self.hparams.batch_size, drop_last=True)


def test_a_step_reads_the_batch_size_of_the_trial():
    model, callback = Adversarial(), tuner()

    trainer(callback).fit(model)

    size = callback.report.plan.micro_batch_size
    assert size > 4
    assert set(model.sizes) == {(size, size)}


def test_tune_restores_the_attribute_that_names_the_batch_size():
    model = Adversarial()

    tuner().tune(trainer(), model)

    assert model.hparams.batch_size == model.hparams_initial.batch_size == 4


@pytest.mark.parametrize(("samples", "own"), [(3, 64), (20, 64), (30, 8)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_update_has_at_most_the_samples_of_an_epoch(samples, own, drop_last):
    """Accumulating over more would weaken the gradient: Lightning divides by all of it."""
    if drop_last:
        own = min(own, samples)
    model, callback = Model(), tuner(target_batch_size=64, device=None)

    trainer(callback).fit(model, DataLoader(data(samples), own, drop_last=drop_last))

    plan = callback.report.plan
    assert plan.effective_batch_size == samples
    whole = plan.accumulate_grad_batches  # which of the exact plans is the fastest, a clock says
    assert model.sizes == [plan.micro_batch_size] * whole * 2
    assert callback.report.notes[0] == (
        f"Asked for 64 samples per update, got {samples}: an epoch has no more than {samples} samples."
    )


def test_a_second_fit_notes_no_change_of_the_effective_batch_size():
    callback, loader = (
        tuner(target_batch_size=60, device=SimulatedAccelerator("200KiB")),
        plain(),
    )
    fitted = trainer(callback, max_epochs=1)
    fitted.fit(Model(), loader)
    assert callback.report.plan.accumulate_grad_batches > 1

    fitted.fit_loop.max_epochs = 2
    fitted.fit(Model(), loader)

    assert not any("goes from" in note for note in callback.report.notes)


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}])
def test_a_trainer_without_epochs_or_steps_is_not_tuned(options):
    callback = tuner()

    trainer(callback, **options).fit(Model(), plain())

    assert callback.report is None


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork"])
def test_tune_refuses_strategies_that_spawn_or_fork(name):
    with pytest.raises(autobatch.AutobatchError, match='Tune with strategy="ddp"'):
        tuner().tune(trainer(strategy=name, devices=2), Model(), plain())


def test_a_report_about_testing_is_refused_as_a_plan(tmp_path):
    report = tuner().tune(trainer(), Model(), plain())
    about = report.model_copy(update={"task": "test"})
    (tmp_path / "report.json").write_text(about.to_json())

    with pytest.raises(ValueError, match="a report about test, which trains nothing"):
        tuner(plan=tmp_path / "report.json")
