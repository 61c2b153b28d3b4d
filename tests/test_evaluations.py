"""Validation, testing and prediction by themselves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from evaluating import Data, Model, data, loader, tuner
from lightning_here import pl
from lightning_here import quiet_trainer as trainer
from sameness import same

METHODS = ["validate", "test", "predict"]


@pytest.mark.parametrize("target", [None, 24])
@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_that_nobody_asked_to_tune_runs_as_it_is(method, target):
    model, callback = Model(), tuner(target_batch_size=target, evaluate=False)
    steps = []
    model.net.register_forward_pre_hook(lambda *_: steps.append(1))

    getattr(trainer(callback), method)(model, loader(16))

    assert model.evaluated == [(0, 16)] * 15
    assert len(steps) == 15
    assert callback.reports == {}
    assert callback.report is None


@pytest.mark.parametrize("method", METHODS)
def test_tune_for_an_evaluation_needs_no_switch(method):
    callback = tuner(target_batch_size=None, evaluate=False)

    report = callback.tune(trainer(), Model(kib=4), dataloaders=loader(4), method=method)

    assert report.plan.micro_batch_size > 4
    assert callback.reports == {method: report}


@pytest.mark.parametrize("method", METHODS)
def test_the_attribute_has_the_size_of_an_evaluation_until_it_ends(method):
    class Reads(Model):
        def on_any(self, batch, *_):
            assert len(batch[0]) in (self.trainer.datamodule.hparams.batch_size, rest)

        on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_any

        def validation_step(self, batch, batch_idx):
            self.read.add(self.trainer.datamodule.hparams.batch_size)
            super().validation_step(batch, batch_idx)

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            self.read.add(self.trainer.datamodule.hparams.batch_size)
            return super().predict_step(batch, batch_idx)

    model, made, callback = Reads(kib=4), Data(), tuner(target_batch_size=None)
    model.read, rest = set(), 240
    seen = []

    class Look(pl.Callback):
        def look(self, *_):
            nonlocal rest
            seen.append(made.hparams.batch_size)
            rest = 240 % seen[0]

        on_validation_start = on_test_start = on_predict_start = look

    getattr(trainer(callback, Look()), method)(model, datamodule=made)

    size = callback.report.plan.micro_batch_size
    assert seen == [size]
    assert size in model.sizes
    assert model.read == {size}
    assert made.hparams.batch_size == made.hparams_initial.batch_size == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_of_an_evaluation_reads_its_size_from_the_attribute(method):
    class Adversarial(Model):
        def __init__(self):
            super().__init__(kib=4)
            self.batch_size = 4

        def validation_step(self, batch, batch_idx):
            super().validation_step([batch[0] + torch.zeros(self.batch_size, 16), batch[1]], 0)

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return super().predict_step([batch[0] + torch.zeros(self.batch_size, 16)], 0)

    model, callback = Adversarial(), tuner(target_batch_size=None, max_micro_batch_size=24)

    getattr(trainer(callback), method)(model, loader(4))

    assert model.evaluated == [(0, 24)] * 10
    assert model.batch_size == 4


def test_the_attribute_is_restored_after_an_error_in_an_evaluation():
    class Broken(Model):
        def on_test_epoch_end(self):
            self.started.append(self.trainer.datamodule.hparams.batch_size)
            raise ZeroDivisionError("mine")

    model, made = Broken(kib=4), Data()
    model.started = []

    with pytest.raises(ZeroDivisionError):
        trainer(tuner(target_batch_size=None)).test(model, datamodule=made)

    assert model.started[0] > 4
    assert made.hparams.batch_size == 4


def test_the_attribute_stays_if_an_evaluation_keeps_its_size():
    model, made = Model(), Data(batch_size=16, validated=2)
    seen = []
    model.on_test_start = lambda: seen.append(made.hparams.batch_size)

    trainer(tuner("2MiB")).test(model, datamodule=made)

    assert set(seen) == {16}  # in the trial and in the evaluation
    assert model.sizes == {32, 16}


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=f"evaluate={value!r} is not a switch"):
        tuner(evaluate=value)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_without_a_target_takes_the_largest_fit(method):
    model, callback, passed = Model(kib=4), tuner(target_batch_size=None), loader(4)

    getattr(trainer(callback), method)(model, passed)

    report = callback.report
    size = report.plan.micro_batch_size
    assert report.task == method
    assert max(model.sizes) == size > 4
    assert size == report.largest_fit
    (chosen,) = (trial for trial in report.trials if trial.batch_size == size)
    assert chosen.peak <= report.budget < chosen.peak * (size + 1.5) / size
    assert passed.batch_size == 4
    assert f"Batches of {size} to {method}" in str(report)
    assert "per update" not in str(report)
    assert report.effective == ()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_with_a_target_keeps_its_own_size_if_it_fits(method):
    model, callback = Model(), tuner("2MiB", target_batch_size=512)

    getattr(trainer(callback), method)(model, loader(16))

    assert model.sizes == {16}


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_with_a_target_shrinks_a_size_that_does_not_fit(method):
    model, callback = Model(kib=4), tuner(target_batch_size=512)

    getattr(trainer(callback), method)(model, loader(120))

    assert 1 < max(model.sizes) < 120


@pytest.mark.parametrize("method", METHODS)
def test_results_equal_those_of_the_same_size_by_hand(method):
    def run(*callbacks, size=4):
        pl.seed_everything(1, verbose=False)
        model = Model(kib=4)
        result = getattr(trainer(*callbacks), method)(model, loader(size))
        return result, model.evaluated, dict(model.state_dict()), torch.get_rng_state()

    callback = tuner(target_batch_size=None)
    tuned = run(callback)

    assert same(tuned, run(size=callback.report.plan.micro_batch_size))


@pytest.mark.parametrize("method", METHODS)
def test_tune_evaluates_nothing_and_changes_nothing(method):
    model, callback, passed = Model(kib=4), tuner(target_batch_size=None), loader(4)
    fitted = trainer()
    random_state = torch.get_rng_state()

    report = callback.tune(fitted, model, dataloaders=passed, method=method)

    assert report.task == method
    assert report.plan.micro_batch_size > 4
    assert passed.batch_size == 4
    assert model.evaluated == []
    assert torch.equal(random_state, torch.get_rng_state())
    assert "setup_data" not in vars(getattr(fitted, f"{method}_loop"))
    assert all(part.training for part in model.modules())
    getattr(fitted, method)(model, passed)
    assert model.sizes == {4}


def test_an_error_in_an_evaluation_trial_passes_and_restores_the_loop():
    class Broken(Model):
        def test_step(self, batch, batch_idx):
            raise ZeroDivisionError("mine")

    fitted, passed = trainer(tuner(target_batch_size=None)), loader(4)

    with pytest.raises(ZeroDivisionError, match="mine"):
        fitted.test(Broken(), passed)

    assert "setup_data" not in vars(fitted.test_loop)
    assert passed.batch_size == 4


def test_testing_after_training_keeps_the_plan_in_the_checkpoint():
    model, callback = Model(), tuner("2MiB")
    fitted = trainer(callback)
    fitted.fit(model, loader(4))
    plan = callback.report.plan

    fitted.test(model, loader(16))

    assert callback.report.plan == plan
    assert callback.report is callback.reports["fit"]
    assert callback.reports["test"].task == "test"
    assert list(callback.reports) == ["fit", "test"]
    assert callback.state_dict()["micro_batch_size"] == plan.micro_batch_size
    assert callback.state_dict()["accumulate_grad_batches"] == plan.accumulate_grad_batches


@pytest.mark.parametrize("target", [None, 24])
@pytest.mark.parametrize("method", METHODS)
def test_loaders_with_a_fixed_size_run_unchanged(method, target, caplog):
    model, callback = Model(), tuner("2MiB", target_batch_size=target)
    batches = DataLoader([tuple(data(8).tensors)], batch_size=None)

    getattr(trainer(callback), method)(model, batches)

    assert model.sizes == {8}
    assert f"{method} runs its loaders as they are" in caplog.text
    with pytest.raises(autobatch.AutobatchError, match="batch_size=None"):
        callback.tune(trainer(), model, dataloaders=batches, method=method)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "learn"}, "method='learn' is none of a Trainer's"),
        ({"method": "test", "train_dataloaders": []}, "are for fit; give test its"),
        ({"dataloaders": []}, "give fit its train_dataloaders"),
    ],
)
def test_loaders_for_another_method_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tuner().tune(trainer(), Model(), **options)


def test_several_loaders_keep_their_proportion():
    model, callback = Model(kib=4), tuner(target_batch_size=None)

    trainer(callback).test(model, [loader(4), loader(8)])

    first, second = (max(size for at, size in model.evaluated if at == which) for which in (0, 1))
    assert first > 4
    assert second == 2 * first


# Latency limit


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_the_batch_with_the_most_throughput_within_the_latency_limit_is_applied(method):
    model, passed = Model(), loader(4)
    callback = tuner("64KiB", target_batch_size=None, latency_limit=30.0)

    getattr(trainer(callback), method)(model, passed)

    report = callback.report
    size = report.plan.micro_batch_size
    assert report.task == method
    assert model.sizes <= {size, 240 % size}
    assert report.latencies[-1].batch_size == report.largest_fit
    rates = {each.batch_size: each.samples_per_second for each in report.latencies}
    assert rates[size] >= 0.99 * max(rates.values())
    assert report.latencies[0].batch_size == 1
    assert f"Batches of {size} to {method}, within 30 s" in str(report)
    assert "with the copy to the device, without reading data" in str(report)
    assert passed.batch_size == 4


def test_slow_steps_limit_the_batch_size():
    class Clocked(SimulatedAccelerator):
        now = 0.0

        def clock(self):
            return self.now

    device = Clocked("1MiB")

    class Slow(Model):
        def predict_step(self, batch, batch_idx):
            device.now += 0.06 if len(batch[0]) > 4 else 0.01
            return super().predict_step(batch, batch_idx)

    model = Slow()
    callback = tuner(device=device, target_batch_size=None, latency_limit=0.04)

    report = callback.tune(trainer(), model, dataloaders=loader(2), method="predict")

    assert report.plan.micro_batch_size == 4
    assert max(trial.batch_size for trial in report.trials) > 4
    assert model.evaluated == []


def test_a_call_is_a_batch_of_each_loader_in_turn():
    callback = tuner("1MiB", target_batch_size=None, latency_limit=30.0)
    loaders = [loader(4, length=16), loader(8, length=16)]

    report = callback.tune(trainer(), Model(), dataloaders=loaders, method="predict")

    assert any("A call is one batch of each of the 2 loaders" in note for note in report.notes)


def test_a_latency_limit_is_refused_for_fit():
    model, passed = Model(), loader(4)
    callback = autobatch.AutoBatch(latency_limit=0.1)
    sentence = (
        "^latency_limit=0.1 is for validate, test and predict, which answer batches; fit trains"
    )

    with pytest.raises(autobatch.AutobatchError, match=sentence):
        trainer(callback).fit(model, passed)
    with pytest.raises(autobatch.AutobatchError, match=sentence):
        callback.tune(trainer(), model, passed)

    assert model.trained == []
    assert passed.batch_size == 4
    assert callback.report is None


def test_a_latency_limit_and_a_target_exclude_each_other():
    with pytest.raises(ValueError, match=r"^latency_limit=0\.1 is about inference"):
        autobatch.AutoBatch(latency_limit=0.1, target_batch_size=64)


def test_a_percentile_without_a_latency_limit_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^percentile=95 says how many calls have to meet latency_limi",
    ):
        autobatch.AutoBatch(percentile=95)
