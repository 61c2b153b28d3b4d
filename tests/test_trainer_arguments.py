"""Arguments of the Trainer that count batches or steps, or disable parts of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same

PLAN = autobatch.BatchPlan(60, 2)


def loader(size=4, length=600, **options):
    return DataLoader(data(length), batch_size=size, **options)


def known(**options):
    """Return a callback with a plan that needs one trial."""
    return tuner(plan=PLAN, **options)


def notes(model=None, validation=None, **options):
    callback = known()
    trainer(callback, max_epochs=1, **options).fit(model or Model(), loader(), validation)
    return callback.report.notes


class Hooked(Model):
    def train_dataloader(self):
        return loader(self.hparams.batch_size, shuffle=True)


def test_a_limit_in_batches_is_noted_in_samples():
    told = notes(limit_train_batches=5)

    assert (
        "limit_train_batches=5 counts micro-batches: an epoch trains on 300 samples instead of 20."
        in told
    )


@pytest.mark.parametrize("limit", [1.0, 0.5, 1000])
def test_a_limit_as_a_share_is_not_noted(limit):
    assert not any("limit_train_batches" in note for note in notes(limit_train_batches=limit))


def test_a_limit_of_a_stream_is_noted_in_samples():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    callback = known()
    trainer(callback, max_epochs=1, limit_train_batches=3).fit(
        Model(), DataLoader(Stream(), batch_size=4)
    )

    assert any(
        "an epoch trains on 180 samples instead of 12" in note for note in callback.report.notes
    )


def test_a_share_of_an_epoch_below_one_batch_is_refused():
    model, data_loader, callback = Model(), loader(), known()
    fitted = trainer(callback, limit_train_batches=0.05)

    with pytest.raises(autobatch.AutobatchError, match=r"limit_train_batches=0\.05 of the 10"):
        fitted.fit(model, data_loader)

    assert (model.sizes, data_loader.batch_size) == ([], 4)


def test_a_share_below_one_batch_of_one_of_several_loaders_is_refused():
    class First(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    loaders = [loader(), loader(length=60)]
    fitted = trainer(known(), limit_train_batches=0.5)

    with pytest.raises(autobatch.AutobatchError, match=r"limit_train_batches=0\.5 of the 1 "):
        fitted.fit(First(), loaders)

    assert [each.batch_size for each in loaders] == [4, 4]


def test_a_validation_interval_in_batches_is_noted_in_samples():
    model = Model()

    told = notes(model, loader(20, 20), val_check_interval=5)

    assert (
        "val_check_interval=5 counts micro-batches: validation comes every 300 samples instead of every 20."
        in told
    )
    assert len(model.validated) == 2 + 1  # in an epoch of 10 batches; the sanity check
    assert not any("val_check_interval" in note for note in notes(val_check_interval=5))


def test_a_validation_interval_beyond_the_epoch_is_refused():
    model, data_loader, callback = Model(), loader(), known()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = trainer(callback, val_check_interval=11)
    random_state = torch.get_rng_state()

    with pytest.raises(autobatch.AutobatchError, match="val_check_interval=11") as caught:
        fitted.fit(model, data_loader, loader(20, 20))

    assert "of 60 samples an epoch has only 10 instead of 150" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(before, dict(model.state_dict()))
    assert torch.equal(random_state, torch.get_rng_state())
    assert (model.sizes, data_loader.batch_size) == ([], 4)
    assert fitted.accumulate_grad_batches == 1
    assert model.hparams.batch_size == 4
    assert callback.report is None


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": None}, {"limit_val_batches": 0}])
def test_an_interval_over_epochs_or_without_validation_is_accepted(options):
    model = Model()
    try:
        trainer(val_check_interval=11, max_epochs=1, **options).fit(
            Model(), loader(60), loader(20, 20)
        )
    except ValueError:
        pytest.skip("this Lightning (2.6.0 does) refuses it itself")

    trainer(known(), val_check_interval=11, **options).fit(model, loader(), loader(20, 20))

    assert len(model.sizes) == 20


def test_epochs_too_short_for_a_logged_step_are_noted(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)

    assert (
        "log_every_n_steps=50 counts updates: an epoch has 5 instead of 150, so that some epochs log no step."
        in notes(logger=logger)
    )
    assert not any("log_every" in note for note in notes(logger=logger, log_every_n_steps=5))
    assert not any("log_every" in note for note in notes())


def test_max_steps_is_noted_in_samples():
    model = Model()

    told = notes(model, max_steps=4)

    assert "max_steps=4 counts updates: training ends after 480 samples instead of 16." in told
    assert sum(model.sizes) == 480


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("amount", [4, 0.4])
@pytest.mark.parametrize("hooked", [True, False])
def test_overfit_batches_trains_on_the_first_batches_of_the_tuned_size(hooked, amount, shuffle):
    class Shown(Hooked if hooked else Model):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[0].sum().item()]
            return super().training_step(batch, batch_idx)

    def fit(*callbacks, size=4, **options):
        pl.seed_everything(1, verbose=False)
        model = Shown(size)
        passed = None if hooked else loader(size, shuffle=shuffle)
        trainer(*callbacks, overfit_batches=amount, **options).fit(model, passed)
        return model

    callback = known()
    tuned, by_hand = fit(callback), fit(size=60, accumulate_grad_batches=2)

    assert tuned.sizes == by_hand.sizes == [60] * 8
    # Attributes set in earlier trials are restored
    assert tuned.seen == by_hand.seen
    assert tuned.seen[:4] == tuned.seen[4:]
    assert same(dict(tuned.state_dict()), dict(by_hand.state_dict()))
    told = [note for note in callback.report.notes if "overfit_batches" in note]
    assert told == (
        ["overfit_batches=4 counts micro-batches: an epoch trains on 240 samples instead of 16."]
        if amount == 4
        else []
    )


@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True, "logger": None, "enable_checkpointing": None}
        | {"enable_progress_bar": None, "enable_model_summary": None},
        {"inference_mode": False},
        {"max_steps": 7, "max_epochs": -1},
        {"max_time": "00:01:00:00"},
        {"enable_progress_bar": True},
        {"enable_model_summary": True},
        {"min_epochs": 1},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"deterministic": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic", "ignore:.*Anomaly Detection")
def test_training_is_bit_identical_with_trainer_argument(options, capsys):
    def fit(*callbacks, size=4, accumulate=1):
        pl.seed_everything(1, verbose=False)
        model = Model(size)
        fitted = trainer(*callbacks, accumulate_grad_batches=accumulate, **options)
        fitted.fit(model, loader(size, shuffle=True), loader(20, 20))
        return model, fitted

    callback = tuner()
    try:
        tuned, fitted = fit(callback)
        plan = callback.report.plan
        by_hand, other = fit(size=plan.micro_batch_size, accumulate=plan.accumulate_grad_batches)
    finally:
        torch.use_deterministic_algorithms(mode=False)

    assert len(callback.report.trials) > 1
    assert tuned.sizes == by_hand.sizes
    assert fitted.global_step == other.global_step > 0
    assert same(dict(tuned.state_dict()), dict(by_hand.state_dict()))


def test_a_run_without_time_left_is_tuned_and_ends():
    model, callback = Model(), tuner(device=SimulatedAccelerator("450KiB"))

    trainer(callback, max_time={"seconds": 0}).fit(model, loader())

    assert callback.report.plan.effective_batch_size == 120
    assert len(model.sizes) <= 1


# Private names of Lightning


OWNERS = {
    "_build_kwargs": lambda fitted: type(fitted.fit_loop.epoch_loop),
    "_TunerExitException": lambda _: pl.utilities.exceptions,
    "restarted_mid_epoch": lambda fitted: type(fitted.fit_loop),
}


@pytest.mark.parametrize("name", OWNERS)
@pytest.mark.parametrize("tune", [False, True], ids=["fit", "tune"])
def test_a_lightning_without_a_needed_name_is_refused(monkeypatch, name, tune):
    model, callback, data_loader = Model(), known(), loader()
    fitted = trainer(*([] if tune else [callback]))
    monkeypatch.delattr(OWNERS[name](fitted), name)

    with pytest.raises(
        autobatch.AutobatchError, match=rf"has no .*{name}.*Lightning 2\.6\.0 to"
    ) as caught:
        (callback.tune if tune else fitted.fit)(*([fitted] if tune else []), model, data_loader)

    assert "\n" not in str(caught.value)
    assert (model.sizes, data_loader.batch_size) == ([], 4)
    assert "setup_optimizers" not in vars(fitted.strategy)
