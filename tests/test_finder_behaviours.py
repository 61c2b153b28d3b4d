"""The laws that Lightning's own tests hold for its BatchSizeFinder, one by one, for AutoBatch.

The docstrings give the number of the law; where one makes no sense here, the docstring says why, and the test shows
what stands in its place.
"""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import QUICK, Model, data, pl
from lightning_here import quiet_trainer as trainer
from sameness import same

half = importlib.import_module("lightning_cases").half

ALL = ("fit", "validate", "test", "predict")
EVALUATIONS = ALL[1:]
LENGTH = 600


def tuner(capacity="450KiB", **options):
    device = SimulatedAccelerator(capacity)
    return autobatch.AutoBatch(device=device, evaluate=True, **QUICK, **options)


def loader(size=4, length=LENGTH, **options):
    return DataLoader(data(length), batch_size=size, **options)


class Everything(Model):
    """Has a step for everything, and loaders from hooks that read its hyperparameter."""

    def __init__(self, batch_size=4):
        super().__init__(batch_size)
        self.tested, self.predicted, self.hooks = [], [], []

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.net(batch[0])
        self.tested.append(len(batch[0]))

    def predict_step(self, batch, batch_idx):
        self.predicted.append(len(batch[0]))
        return self.net(batch[0])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        super().validation_step(batch, batch_idx)

    def steps_of(self, method):
        return {
            "fit": self.sizes,
            "validate": self.validated,
            "test": self.tested,
            "predict": self.predicted,
        }[method]


class Hooked(Everything):
    """Its loaders come from hooks."""

    def train_dataloader(self):
        self.hooks.append("train")
        return loader(self.hparams.batch_size)

    def val_dataloader(self):
        self.hooks.append("validate")
        return loader(self.hparams.batch_size)

    def test_dataloader(self):
        return loader(self.hparams.batch_size)

    predict_dataloader = test_dataloader


class Data(pl.LightningDataModule):
    """Names its batch size in an attribute."""

    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return loader(self.batch_size)


class DataWithHyperparameter(pl.LightningDataModule):
    def __init__(self, batch_size=4, length=LENGTH):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(self.hparams.batch_size, self.hparams.length)


class InUse(pl.Callback):
    """Remembers the batch sizes in use while training."""

    def on_train_batch_start(self, fitted, module, batch, batch_idx):
        self.trains_by = fitted.train_dataloader.batch_size
        self.hyperparameters = dict(module.hparams)
        self.attributes = [
            vars(owner)["batch_size"]
            for owner in (module, fitted.datamodule)
            if "batch_size" in vars(owner or object.__new__(Data))
        ]


def passed(method, given):
    name = "train_dataloaders" if method == "fit" else "dataloaders"
    return {name: given}


# 1 to 10


@pytest.mark.parametrize("holders", ["model", "datamodule", "both"])
def test_the_size_is_written_everywhere_and_the_datamodule_wins(
    holders,
):
    """1."""
    model, datamodule, in_use, callback = Hooked(), Data(), InUse(), tuner()
    if holders != "datamodule":
        model.batch_size = 4
    if holders == "model":
        datamodule = None

    trainer(callback, in_use, max_epochs=1).fit(model, datamodule=datamodule)

    found = callback.report.plan.micro_batch_size
    assert found != 4
    assert in_use.attributes == [found] * (2 if holders == "both" else 1)
    assert in_use.trains_by == model.sizes[0] == found
    assert ("train" in model.hooks) is (datamodule is None)


@pytest.mark.parametrize("most", [7, 8, 64])
def test_with_enough_memory_the_result_is_the_bound(most):
    """2. No mode and no margin reduces the result: only the bound does."""
    report = tuner("1GiB", max_micro_batch_size=most).tune(trainer(), Everything(), loader())

    assert report.plan.micro_batch_size == most


@pytest.mark.parametrize("method", ALL)
def test_tuning_leaves_the_trainer_unchanged(method, tmp_path, monkeypatch):
    """3."""
    monkeypatch.chdir(tmp_path)
    model = Everything()
    limits = {f"limit_{stage}_batches": 3 for stage in ("train", "val", "test", "predict")}
    fitted = trainer(
        pl.callbacks.LambdaCallback(),
        max_steps=9,
        logger=pl.loggers.CSVLogger(tmp_path / "logs"),
        **limits,
    )

    def state():
        return {
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "steps": (fitted.global_step, fitted.max_steps, fitted.current_epoch),
            "limits": [getattr(fitted, limit) for limit in limits],
            "loop": fitted.fit_loop.state_dict(),
            "evaluations": [getattr(fitted, f"{each}_loop").state_dict() for each in EVALUATIONS],
            "metrics": dict(fitted.callback_metrics),
            "objects": [id(each) for each in (*fitted.loggers, *fitted.callbacks)],
            "accumulation": fitted.accumulate_grad_batches,
        }

    before = state()

    report = tuner().tune(fitted, model, method=method, **passed(method, loader()))

    assert same(state(), before)
    assert len(report.trials) > 1
    assert list(tmp_path.rglob("*")) == []


def test_half_precision_is_tuned_and_the_scaler_survives():
    """4. On the host, with the scaler of the host."""
    plugin, callback = half(), tuner("2MiB")
    fitted, model = trainer(callback, plugins=plugin, max_epochs=1), Everything()
    before = plugin.scaler.state_dict()

    callback.tune(fitted, model, loader())
    after = plugin.scaler.state_dict()
    fitted.fit(model, loader())

    assert after == before
    assert callback.report.plan.micro_batch_size != 4
    assert fitted.precision_plugin.scaler is plugin.scaler
    assert plugin.scaler.state_dict() != before  # it went on with training


@pytest.mark.parametrize("where", ["model", "datamodule"])
def test_a_hyperparameter_alone_is_updated_and_the_data_set_bounds_it(where):
    """5."""
    model, callback, in_use = Hooked(), tuner("1GiB"), InUse()
    datamodule = DataWithHyperparameter(length=100) if where == "datamodule" else None
    fitted = trainer(callback, in_use, max_epochs=1)

    fitted.fit(model, datamodule=datamodule)

    length = LENGTH if datamodule is None else 100
    holder = model if datamodule is None else datamodule
    assert holder.hparams.batch_size == callback.report.plan.micro_batch_size == length
    assert in_use.trains_by == length


def test_an_attribute_and_a_hyperparameter_of_one_name_are_both_set():
    """6. The finder warns that it changes only one of the two; AutoBatch changes both."""
    model, in_use, callback = Hooked(), InUse(), tuner()
    model.batch_size = 4

    trainer(callback, in_use, max_epochs=1).fit(model)

    found = callback.report.plan.micro_batch_size
    assert in_use.attributes == [found]
    assert in_use.hyperparameters["batch_size"] == found


@pytest.mark.parametrize("method", ALL)
def test_after_tuning_a_fit_works(method):
    """7."""
    model, fitted = Everything(), trainer(max_epochs=1)
    tuner().tune(fitted, model, method=method, **passed(method, loader()))

    fitted.fit(model, loader(60))

    assert model.sizes == [60] * 10
    assert fitted.global_step == 10


@pytest.mark.parametrize("method", ALL)
def test_a_loader_that_is_passed_is_tuned(method):
    """8. The finder refuses it."""
    model, callback, given = Everything(), tuner(), loader()

    getattr(trainer(callback, max_epochs=1), method)(model, given)

    assert set(model.steps_of(method)[:-1]) <= {callback.report.plan.micro_batch_size}
    assert callback.report.plan.micro_batch_size != 4
    assert given.batch_size == 4


def test_a_known_plan_takes_one_trial():
    """9. No max_trials=0 can return a size that nobody ran: a known plan is still verified."""
    report = tuner(plan=autobatch.BatchPlan(4)).tune(trainer(), Everything(), loader())

    assert [trial.batch_size for trial in report.trials] == [4]
    assert report.plan == autobatch.BatchPlan(4)


def test_an_unknown_mode_is_refused():
    """10. Modes are objects here."""
    with pytest.raises(ValueError, match=r"search='power'.*Bisection"):
        tuner(search="power")


# 11 to 20


def test_trials_rebuild_no_loader(caplog):
    """11. Trials make batches without loaders: hooks run as often for one trial as for ten."""

    def asked(**options):
        model, callback = Hooked(), tuner(target_batch_size=120, **options)
        fitted = trainer(callback, max_epochs=1)
        fitted.fit(model)
        validation = fitted.val_dataloaders.batch_size
        return model, callback.report, fitted.train_dataloader.batch_size, validation

    with caplog.at_level(logging.INFO, logger="autobatch"):
        model, report, training, _ = asked()
    again, verified, *_ = asked(plan=report.plan)

    assert len(report.trials) > len(verified.trials) == 1
    assert model.hooks == again.hooks
    assert training == report.plan.micro_batch_size
    assert set(model.sizes) == {training}
    # Each trial is logged once
    sizes = [trial.batch_size for trial in report.trials]
    assert all(f" {size:,}" in str(report) for size in sizes)
    assert any(record.name == "autobatch" for record in caplog.records)


def test_a_size_bounded_by_the_data_set_is_noted():
    """11."""
    report = tuner("1GiB").tune(trainer(), Everything(), loader(length=100))

    assert any("All 100 samples of an epoch fit at once" in n for n in report.notes)
    assert report.plan.micro_batch_size == 100


@pytest.mark.parametrize("method", EVALUATIONS)
def test_evaluations_are_tuned_and_count_no_steps(method):
    """12."""
    model, fitted = Hooked(), trainer()

    report = tuner().tune(fitted, model, method=method)

    assert report.task == method
    assert report.plan.micro_batch_size > 4
    assert report.plan.micro_batch_size == report.largest_fit
    assert (fitted.global_step, fitted.current_epoch) == (0, 0)
    assert model.steps_of(method) == []


@pytest.mark.parametrize("method", ALL)
def test_the_run_afterwards_has_the_size_found(method):
    """13."""
    model, callback = Hooked(), tuner()
    fitted = trainer(callback, max_epochs=1)

    getattr(fitted, method)(model)

    found = callback.report.plan.micro_batch_size
    full, rest = divmod(LENGTH, found)
    steps = model.steps_of(method)
    assert found > 4
    assert steps == [found] * full + [rest] * (rest > 0)
    assert fitted.global_step == (len(steps) if method == "fit" else 0)


def test_an_unknown_method_is_refused():
    """14."""
    with pytest.raises(ValueError, match="method='prediction' is none of a Trainer's"):
        tuner().tune(trainer(), Everything(), method="prediction")


@pytest.mark.parametrize("method", EVALUATIONS)
@pytest.mark.parametrize("name", ["train_dataloaders", "val_dataloaders"])
def test_loaders_of_the_wrong_kind_are_refused_with_the_right_argument(method, name):
    """14."""
    with pytest.raises(ValueError, match=f"give {method} its dataloaders"):
        tuner().tune(trainer(), Everything(), method=method, **{name: loader()})


def test_loaders_of_evaluations_are_refused_for_fit():
    """14."""
    with pytest.raises(ValueError, match="give fit its train_dataloaders"):
        tuner().tune(trainer(), Everything(), dataloaders=loader())


def test_several_loaders_of_an_evaluation_are_tuned():
    """15. The finder refuses them, and several ranks as well, which test_ranks.py tests."""
    model, callback = Everything(), tuner(max_micro_batch_size=60)

    trainer(callback).test(model, [loader(4), loader(8)])

    assert callback.report.plan.micro_batch_size == 60
    assert model.tested == [60] * 10 + [120] * 5


def test_attribute_report_and_loader_agree_after_out_of_memory():
    """16."""
    model, in_use = Hooked(), InUse()
    callback = tuner(search=autobatch.Bisection(resolution=0.25))

    trainer(callback, in_use, max_epochs=1).fit(model)

    found = callback.report.plan.micro_batch_size
    outcomes = {trial.batch_size: trial.outcome for trial in callback.report.trials}
    assert "out_of_memory" in outcomes.values()
    assert outcomes[found] == "fit"
    assert in_use.hyperparameters["batch_size"] == in_use.trains_by == found
    assert max(model.sizes) == found


def test_validation_is_not_limited_in_the_real_run():
    """17."""
    model = Everything()

    trainer(tuner(), max_epochs=1, num_sanity_val_steps=0).fit(model, loader(), loader(4, 80))

    assert model.validated == [4] * 20


def test_a_lower_memory_limit_leaves_a_margin():
    """18. A margin is one of memory, not of a number of samples."""

    def found(limit):
        report = tuner(memory_limit=limit).tune(trainer(), Everything(), loader())
        assert all(trial.peak <= report.budget for trial in report.trials if trial.fits)
        return report.plan.micro_batch_size

    assert found(0.7) < found(0.9)


def test_the_bound_holds_if_more_would_fit():
    """18."""
    report = tuner("1GiB", max_micro_batch_size=31).tune(trainer(), Everything(), loader())

    assert max(trial.batch_size for trial in report.trials) == 31


@pytest.mark.parametrize("method", ALL)
def test_an_error_in_a_trial_passes_through_and_leaves_no_file(method, tmp_path, monkeypatch):
    """19."""
    monkeypatch.chdir(tmp_path)
    model, callback = Everything(), tuner()

    def explode(batch, batch_idx):
        raise ZeroDivisionError("mine")

    stages = {"fit": "training", "validate": "validation"}
    setattr(model, f"{stages.get(method, method)}_step", explode)

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        callback.tune(trainer(), model, method=method, **passed(method, loader()))

    assert any("batch_size=4" in note for note in caught.value.__notes__)
    assert callback.report is None
    assert list(tmp_path.iterdir()) == []


def test_a_search_out_of_time_returns_the_last_size_that_fitted():
    """20. Time bounds the search, not a number of trials."""
    report = tuner("1GiB", time_limit=1e-9).tune(trainer(), Everything(), loader())

    assert [trial.batch_size for trial in report.trials] == [4]
    assert report.plan.micro_batch_size == 4
    assert any("time_limit" in note for note in report.notes)


# And after those


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("own", [3, 8])
def test_the_first_size_is_the_loaders_own(method, own):
    report = tuner().tune(trainer(), Everything(), method=method, **passed(method, loader(own)))

    assert report.trials[0].batch_size == own


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("capacity", ["300KiB", "400KiB", "500KiB"])
def test_a_size_that_ran_out_of_memory_is_never_returned(method, capacity):
    report = tuner(capacity, search=autobatch.Bisection(resolution=0.1)).tune(
        trainer(), Everything(), method=method, **passed(method, loader())
    )

    outcomes = [(trial.batch_size, str(trial.outcome)) for trial in report.trials]
    assert (report.plan.micro_batch_size, "fit") in outcomes
    assert (report.plan.micro_batch_size, "out_of_memory") not in outcomes
    if method == "fit":
        assert "out_of_memory" in [outcome for _, outcome in outcomes]


@pytest.mark.parametrize("method", ALL)
def test_nothing_fitting_raises(method):
    model, given = Everything(), loader()

    with pytest.raises(autobatch.DoesNotFitError, match="batch_size=1"):
        tuner("24KiB").tune(trainer(), model, method=method, **passed(method, given))

    assert given.batch_size == 4


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("most", "length"), [(50, LENGTH), (None, 70)])
def test_the_bound_itself_is_run(method, most, length):
    report = tuner("1GiB", max_micro_batch_size=most).tune(
        trainer(), Everything(), method=method, **passed(method, loader(length=length))
    )

    assert report.plan.micro_batch_size == (most or length)
    assert report.trials[-1].fits
    assert (most or length) in [trial.batch_size for trial in report.trials]


def test_an_attribute_is_verified_against_the_real_batch():
    """A hook may ignore the size: the loader itself is changed, and one batch read back."""

    class Ignores(Everything):
        def train_dataloader(self):
            return loader(4)

    model, callback = Ignores(), tuner()

    trainer(callback, max_epochs=1).fit(model)

    assert model.sizes[0] == callback.report.plan.micro_batch_size != 4


def test_a_run_resumes_from_a_checkpoint_written_after_tuning(tmp_path):
    callback = tuner(target_batch_size=120)
    begun = trainer(callback, max_epochs=1)
    begun.fit(Hooked())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    model = Hooked()
    resumed = trainer(tuner(target_batch_size=120), max_epochs=3)

    resumed.fit(model, ckpt_path=tmp_path / "last.ckpt")

    assert set(model.sizes) == {callback.report.plan.micro_batch_size}
    assert resumed.global_step == 3 * 5


@pytest.mark.parametrize("method", ALL)
def test_random_numbers_continue_unchanged(method):
    given = loader(shuffle=True, generator=torch.Generator().manual_seed(2))
    model = Everything()
    before = torch.get_rng_state(), given.generator.get_state()

    tuner().tune(trainer(), model, method=method, **passed(method, given))

    assert same((torch.get_rng_state(), given.generator.get_state()), before)


def test_a_schedule_is_as_long_as_training():
    class Scheduled(Hooked):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.total = int(self.trainer.estimated_stepping_batches)
            return [optimizer], [
                {
                    "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                        optimizer, 0.1, total_steps=self.total
                    ),
                    "interval": "step",
                }
            ]

    model, fitted = Scheduled(), trainer(tuner(target_batch_size=120))

    fitted.fit(model)

    assert model.total == fitted.global_step == 2 * 5
