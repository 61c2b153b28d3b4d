from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
    TensorDataset,
)

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import HERE, pl
from lightning_here import quiet_trainer as trainer
from sameness import same

check = importlib.import_module("autobatch.lightning._checks").check
CASES = importlib.import_module("lightning_cases").CASES


def data(length=600):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


class Model(pl.LightningModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        self.sizes = []
        self.validated = []
        self.explode_at = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if len(self.sizes) == self.explode_at:
            raise ZeroDivisionError("mine")
        self.sizes.append(len(x))
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def tuner(**options):
    return autobatch.AutoBatch(
        **{
            "target_batch_size": 120,
            "device": SimulatedAccelerator("450KiB"),
            **options,
        }
    )


# Without a trace


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case, tuned in one process, and in another with the numbers found written by hand; half of them at a time."""
    folders = [tmp_path_factory.mktemp("runs") for _ in range(2)]
    halves = [sorted(CASES)[::2], sorted(CASES)[1::2]]
    for mode in ("tuned", "by-hand"):
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("lightning_cases.py")),
                    mode,
                    str(where / f"{mode}.pt"),
                    str(where / "plans.json"),
                    *half,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for where, half in zip(folders, halves, strict=True)
        ]
        outputs = [process.communicate(timeout=280)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    return {
        mode: {
            case: result
            for where in folders
            for case, result in torch.load(where / f"{mode}.pt", weights_only=False).items()
        }
        for mode in ("tuned", "by-hand")
    }


@pytest.mark.parametrize("case", CASES)
def test_training_after_tuning_is_the_same_to_the_bit_as_with_the_numbers_written_by_hand(
    runs, case
):
    tuned, by_hand = dict(runs["tuned"][case]), runs["by-hand"][case]
    trials = tuned.pop("trials")

    different = [name for name in by_hand if not same(tuned[name], by_hand[name])]

    assert different == []
    assert len(by_hand["record"]) > 5
    assert len(trials) >= 3
    if case != "bf16":
        assert "out_of_memory" in [outcome for _, outcome in trials]


def test_the_comparison_can_fail(runs):
    one, other = runs["by-hand"]["passed"], runs["by-hand"]["clipped"]

    assert not same(one["record"], other["record"])
    assert not same(one["weights"], other["weights"])


# The size that training really gets


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}])
def test_the_training_step_receives_the_size_found_in_every_epoch(options):
    model, callback = Model(), tuner()
    loader = DataLoader(data(), batch_size=4, shuffle=True, drop_last=True)

    fitted = trainer(callback, **options)
    fitted.fit(model, loader)

    plan = callback.report.plan
    assert plan.effective_batch_size == 120
    assert set(model.sizes) == {plan.micro_batch_size}
    assert len(model.sizes) == 2 * (600 // plan.micro_batch_size)
    assert fitted.accumulate_grad_batches == plan.accumulate_grad_batches
    assert model.hparams.batch_size == plan.micro_batch_size
    assert model.hparams_initial.batch_size == plan.micro_batch_size


def test_the_loader_has_its_own_size_again_after_fit():
    loader = DataLoader(data(), batch_size=4, shuffle=True)

    trainer(tuner()).fit(Model(), loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4


def test_the_loader_has_its_own_size_again_after_an_error_in_training():
    loader, model = DataLoader(data(), batch_size=4), Model()

    class Explode(pl.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(tuner(), Explode()).fit(model, loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_a_trial_leaves_everything_as_it_was(error):
    loader, model, callback = DataLoader(data(), batch_size=4), Model(), tuner()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count = itertools.count()
    step = model.training_step

    def training_step(batch, batch_idx):
        if next(count) == 5:
            raise error("mine")
        return step(batch, batch_idx)

    model.training_step = training_step
    fitted = trainer(callback)
    # Lightning ends the process gracefully when the keyboard interrupts
    expected = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(expected):
        fitted.fit(model, loader)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.sizes == []
    assert loader.batch_size == 4
    assert fitted.accumulate_grad_batches == 1
    assert callback.report is None


def test_without_a_target_the_largest_is_taken_and_the_accumulation_stays():
    callback = tuner(target_batch_size=None)
    fitted = trainer(callback, accumulate_grad_batches=3)

    fitted.fit(Model(), DataLoader(data(), batch_size=4))

    assert callback.report.plan.micro_batch_size == callback.report.largest_fit
    assert callback.report.plan.accumulate_grad_batches == 3
    assert fitted.accumulate_grad_batches == 3


def test_a_changed_effective_batch_is_told():
    callback = tuner()

    trainer(callback).fit(Model(), DataLoader(data(), batch_size=4))

    assert callback.report.notes[0] == (
        "The effective batch goes from 4 to 120: 5 updates per epoch instead of 150. AdamW usually wants about ×5.5 the "
        "learning rate for that (square-root rule)."
    )


def test_an_accumulation_that_is_overridden_is_told():
    callback = tuner()

    trainer(callback, accumulate_grad_batches=5).fit(Model(), DataLoader(data(), batch_size=4))

    assert any("accumulate_grad_batches=5" in note for note in callback.report.notes)


def test_the_validation_loader_keeps_its_size():
    model, validation = Model(), DataLoader(data(20), batch_size=5)

    trainer(tuner()).fit(model, DataLoader(data(), batch_size=4), validation)

    assert set(model.validated) == {5}


def test_trials_fire_no_hooks_of_the_users_callbacks_and_log_nothing(tmp_path):
    fired = []

    class Watcher(pl.Callback):
        def __getattribute__(self, name):
            if name.startswith("on_") and name not in (
                "on_fit_start",
                "on_save_checkpoint",
            ):
                fired.append(name)
            return super().__getattribute__(name)

        def on_fit_start(self, *_):
            fired.clear()

    class Logs(Model):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0)
            assert fired == [] or "on_train_start" in fired
            return super().training_step(batch, batch_idx)

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(tuner(), Watcher(), logger=logger, log_every_n_steps=1).fit(
        Logs(), DataLoader(data(), batch_size=4)
    )

    steps = [
        row.split(",") for row in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    ]
    assert len(steps) - 1 == 10  # two epochs of five updates


def test_it_goes_first_whatever_the_order():
    order = []

    class Other(pl.Callback):
        def on_fit_start(self, fitted, module):
            order.append(module.hparams.batch_size)

    trainer(Other(), tuner()).fit(Model(), DataLoader(data(), batch_size=4))

    assert order != [4]


def test_an_epoch_is_counted_as_it_is_trained():
    def updates(size=200, limit=1.0, drop_last=False):
        callback, fitted = (
            tuner(target_batch_size=48),
            trainer(max_epochs=1, limit_train_batches=limit),
        )
        fitted.callbacks.append(callback)
        fitted.fit(Model(), DataLoader(data(size), batch_size=4, drop_last=drop_last))
        (row,) = (row for row in callback.report.effective if row.effective_batch_size == 48)
        return row.updates_per_epoch, fitted.global_step

    for case in ({}, {"drop_last": True}, {"limit": 0.5}, {"limit": 3}):
        told, done = updates(**case)
        assert told == done, case


class Prepared(Model):
    """Makes in a start hook what its step uses, and asks the Trainer for this and that."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, lambda *_: setattr(self, "outputs", []))

    def training_step(self, batch, batch_idx):
        self.outputs.append(int(self.trainer.num_training_batches))
        if self.logger is not None:
            assert Path(self.logger.save_dir).name
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "hook",
    ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"],
)
def test_what_a_start_hook_makes_is_there_in_a_trial(hook, tmp_path):
    kind = type("Hooked", (Prepared,), {hook: lambda self, *_: setattr(self, "outputs", [])})
    model, callback = kind.__new__(kind), tuner()
    Model.__init__(model)

    trainer(callback, logger=pl.loggers.CSVLogger(tmp_path)).fit(model, plain())

    assert callback.report.plan.effective_batch_size == 120
    assert set(model.sizes) == {callback.report.plan.micro_batch_size}


def test_a_collate_function_may_take_its_samples_apart():
    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 200

        def __getitem__(self, index):
            x, y = data()[index]
            return {"x": x, "inside": {"y": y}}

    def collate(samples):
        labels = torch.stack([sample["inside"].pop("y") for sample in samples])
        return torch.stack([sample.pop("x") for sample in samples]), labels

    callback = tuner(target_batch_size=100)
    trainer(callback).fit(Model(), DataLoader(Dicts(), batch_size=4, collate_fn=collate))

    assert callback.report.plan.effective_batch_size == 100


def test_only_samples_that_the_sampler_names_are_read():
    class Partly(torch.utils.data.Dataset):
        def __len__(self):
            return 600

        def __getitem__(self, index):
            assert index < 100, "corrupt sample"
            return data()[index]

    sampler = torch.utils.data.SubsetRandomSampler(range(100))
    callback = tuner(target_batch_size=50)

    trainer(callback).fit(Model(), DataLoader(Partly(), batch_size=4, sampler=sampler))

    assert callback.report.plan.effective_batch_size == 50
    assert callback.report.dataset_size == 100


def test_what_counts_is_the_sampler_beneath_a_batch_sampler():
    sampler = BatchSampler(torch.utils.data.SubsetRandomSampler(range(60)), 8, drop_last=True)
    callback, fitted = tuner(target_batch_size=24), trainer(max_epochs=1)
    fitted.callbacks.append(callback)

    fitted.fit(Model(), DataLoader(data(), batch_sampler=sampler))

    (row,) = (row for row in callback.report.effective if row.effective_batch_size == 24)
    assert row.updates_per_epoch == fitted.global_step
    assert callback.report.dataset_size <= 60


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_the_plan_is_applied_leaves_everything_as_it_was(error):
    model, loader, calls = Model(), plain(), itertools.count(1)

    def configure_optimizers():
        if next(calls) == 2:
            raise error("mine")
        return torch.optim.AdamW(model.parameters())

    model.configure_optimizers = configure_optimizers
    fitted = trainer(tuner())

    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fitted.fit(model, loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4
    assert fitted.accumulate_grad_batches == 1
    assert model.hparams.batch_size == 4
    assert "dataloader" not in vars(fitted.fit_loop._data_source)


def test_a_datamodule_that_draws_its_data_is_asked_as_if_for_the_first_time():
    def drawn(*callbacks, size=4, accumulate=1):
        class Draws(pl.LightningDataModule):
            def __init__(self):
                super().__init__()
                self.random = torch.Generator().manual_seed(0)
                self.drawn = []

            def train_dataloader(self):
                chosen = torch.randperm(600, generator=self.random)[:240].tolist()
                self.drawn.append(chosen[:5])
                return DataLoader(torch.utils.data.Subset(data(), chosen), batch_size=size)

        module, model = Draws(), Model()
        trainer(*callbacks, accumulate_grad_batches=accumulate).fit(model, datamodule=module)
        return module.drawn

    assert drawn(tuner()) == drawn()


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
def test_empty_data_is_left_to_lightning():
    callback = tuner()

    trainer(callback).fit(Model(), DataLoader(data(0), batch_size=4))

    assert callback.report is None


# Tuning without training


def test_tune_changes_nothing_and_trains_nothing():
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


def test_tune_moves_no_generator_though_the_schedule_asks_for_the_loader():
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


def test_the_trainer_trains_as_ever_after_tune():
    def weights(tuned):
        pl.seed_everything(1, verbose=False)
        model, fitted = Model(), trainer()
        if tuned:
            tuner().tune(fitted, model, plain())
        fitted.fit(model, plain())
        return dict(model.state_dict())

    assert same(weights(tuned=True), weights(tuned=False))


def test_what_tune_finds_can_be_given_to_the_callback():
    report = tuner().tune(trainer(), Model(), plain())
    callback, fitted = tuner(plan=report.plan), trainer()

    fitted = trainer(callback)
    fitted.fit(Model(), plain())

    assert callback.report.plan == report.plan
    assert len(callback.report.trials) == 1


def test_an_error_while_tuning_leaves_the_callbacks_alone():
    fitted, callback = trainer(tuner()), tuner()
    callbacks = list(fitted.callbacks)

    with pytest.raises(autobatch.AutobatchError, match="it is a range"):
        callback.tune(fitted, Model(), [plain(), range(3)])

    assert fitted.callbacks == callbacks


class Adversarial(Model):
    """Makes as much noise as the attribute says a batch has."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn(self.hparams.batch_size, 16)
        self.sizes.append((len(x), len(noise)))
        return F.cross_entropy(self.net(x + noise), y)

    def train_dataloader(self):
        return DataLoader(data(), self.hparams.batch_size, drop_last=True)


def test_a_step_finds_the_size_of_the_trial_where_it_looks_for_it():
    model, callback = Adversarial(), tuner()

    trainer(callback).fit(model)

    size = callback.report.plan.micro_batch_size
    assert size > 4
    assert set(model.sizes) == {(size, size)}


def test_after_tune_the_attribute_names_what_it_named():
    model = Adversarial()

    tuner().tune(trainer(), model)

    assert model.hparams.batch_size == model.hparams_initial.batch_size == 4


@pytest.mark.parametrize(("samples", "own"), [(3, 64), (20, 64), (30, 8)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_update_has_no_more_than_an_epoch(samples, own, drop_last):
    """Accumulating beyond it would weaken the gradient: Lightning divides by what never comes."""
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


def test_a_second_fit_tells_no_change_from_what_was_never_trained():
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
def test_where_nothing_will_be_trained_nothing_is_tuned(options):
    callback = tuner()

    trainer(callback, **options).fit(Model(), plain())

    assert callback.report is None


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork"])
def test_tune_is_refused_where_its_result_would_not_come_back(name):
    with pytest.raises(autobatch.AutobatchError, match='Tune with strategy="ddp"'):
        tuner().tune(trainer(strategy=name, devices=2), Model(), plain())


def test_a_report_about_a_test_is_no_plan_to_train_with(tmp_path):
    report = tuner().tune(trainer(), Model(), plain())
    about = report.model_copy(update={"task": "test"})
    (tmp_path / "report.json").write_text(about.to_json())

    with pytest.raises(ValueError, match="a report about test, which trains nothing"):
        tuner(plan=tmp_path / "report.json")


# Resuming


@pytest.mark.parametrize(
    "stop", [{"max_epochs": 1}, {"max_steps": 3}], ids=["between epochs", "within one"]
)
def test_a_resumed_run_goes_on_with_the_plan_of_its_checkpoint(tmp_path, stop):
    def scheduled():
        pl.seed_everything(1, verbose=False)
        model = Model()

        def configure_optimizers():
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 * model.hparams.batch_size)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        model.configure_optimizers = configure_optimizers
        return model

    def run(first, second, size, **options):
        """Train, stop, and go on in another Trainer."""
        begun = trainer(*first, **stop, **options)
        model = scheduled()
        model.hparams.batch_size = size
        begun.fit(model, DataLoader(data(), batch_size=size))
        begun.save_checkpoint(path)
        resumed = trainer(*second, **options)
        model = scheduled()
        model.hparams.batch_size = size
        resumed.fit(model, DataLoader(data(), batch_size=size), ckpt_path=path)
        return (
            dict(model.state_dict()),
            resumed.optimizers[0].state_dict(),
            resumed.global_step,
        )

    path, again = tmp_path / "last.ckpt", tuner()
    tuned = run([tuner()], [again], 4)
    plan = again.report.plan
    torch.load(path, weights_only=True)
    by_hand = run(
        [],
        [],
        plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
    )

    assert len(again.report.trials) == 1
    assert plan.effective_batch_size == 120
    assert same(tuned, by_hand)


# What is told


def test_the_report_is_kept_printed_and_written_beside_the_logs(tmp_path, capsys):
    callback, logger = tuner(), pl.loggers.CSVLogger(tmp_path)

    trainer(callback, logger=logger).fit(Model(), DataLoader(data(), batch_size=4))

    written = autobatch.TuningReport.read(Path(logger.log_dir) / "autobatch.json")
    assert written == callback.report
    assert "= 120 per update" in capsys.readouterr().out
    assert written.dataset_size == 600
    assert written.subject == "Model · AdamW · 32-true"


def test_nothing_is_written_where_there_is_no_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    trainer(tuner()).fit(Model(), DataLoader(data(), batch_size=4))

    assert list(tmp_path.iterdir()) == []


def test_a_known_plan_needs_one_trial():
    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(30, 4))

    fitted = trainer(callback)
    fitted.fit(Model(), DataLoader(data(), batch_size=4))

    assert len(callback.report.trials) == 1
    assert fitted.accumulate_grad_batches == 4


def test_a_trial_is_the_real_thing():
    """The peak that a trial measured is that of the same steps inside a real fit."""
    device = SimulatedAccelerator("450KiB")
    callback = tuner(device=device)
    trainer(callback).fit(Model(), DataLoader(data(), batch_size=4))
    plan = callback.report.plan
    measured = next(t for t in callback.report.trials if t.batch_size == plan.micro_batch_size)

    class Watch(pl.Callback):
        def on_train_start(self, fitted, module):
            device.attach(module, *fitted.optimizers)
            self.watching = device.limited(10**9)
            self.watching.__enter__()

        def on_train_end(self, *_):
            self.watching.__exit__(None, None, None)

    device = SimulatedAccelerator("1GiB")
    trainer(Watch(), accumulate_grad_batches=plan.accumulate_grad_batches).fit(
        Model(), DataLoader(data(), batch_size=plan.micro_batch_size)
    )

    assert device.read().peak == pytest.approx(measured.peak, rel=0.01)


@pytest.mark.parametrize("allocation", [1, 3, 8, 13, 21, 34, 44])
def test_memory_that_runs_out_anywhere_in_a_trial_is_survived(allocation):
    def fit(*callbacks, size=4, **options):
        pl.seed_everything(1, verbose=False)
        model = Model()
        loader = DataLoader(data(), batch_size=size, shuffle=True)
        trainer(*callbacks, max_epochs=1, **options).fit(model, loader)
        return model

    device = SimulatedAccelerator("450KiB")
    device.ledger.refuse_at = allocation
    callback = tuner(device=device)

    tuned = fit(callback)

    plan = callback.report.plan
    assert callback.report.trials[0].outcome is autobatch.Outcome.OUT_OF_MEMORY
    by_hand = fit(size=plan.micro_batch_size, accumulate_grad_batches=plan.accumulate_grad_batches)
    assert same(dict(tuned.state_dict()), dict(by_hand.state_dict()))


@pytest.mark.parametrize("package", HERE)
def test_it_works_in_a_trainer_of_either_package(package):
    """The Trainer of one package, while the module and the callback may come from wherever they were imported."""
    code = f"""
import importlib
pl = importlib.import_module({package!r})
import torch, autobatch
from autobatch.testing import SimulatedAccelerator
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)
    def training_step(self, batch, _):
        return self.net(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

callback = autobatch.AutoBatch(target_batch_size=32, device=SimulatedAccelerator("1MiB"))
assert isinstance(callback, pl.Callback)
trainer = pl.Trainer(
    max_epochs=1, callbacks=callback, accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Model(), DataLoader(TensorDataset(torch.zeros(64, 8)), batch_size=4))
assert callback.report.plan.effective_batch_size == 32
assert {package.partition(".")[0]!r} in callback.report.environment
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


# What is refused


class WithHook(Model):
    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.hparams.batch_size)


class Precomputed(Sampler):
    """Batches made once and for all."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.batches = [
            list(range(start, start + batch_size)) for start in range(0, 600, batch_size)
        ]

    def __iter__(self):
        return iter(self.batches)


class Fixed(Sampler):
    """Batches of the right size, but as many as were right once."""

    def __init__(self, batch_size):
        self.batch_size, self.length = batch_size, 600 // batch_size

    def __iter__(self):
        return iter([list(range(self.batch_size))] * self.length)

    def __len__(self):
        return self.length


class Tokens(Sampler):
    """Batches of so many tokens, however many samples that is."""

    def __iter__(self):
        return iter([[0, 1, 2], [3]])


def plain():
    return DataLoader(data(), batch_size=4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: (Model(), [(torch.zeros(4, 16), torch.zeros(4))], {}),
            "it is a Tensor, not a DataLoader",
        ),
        (lambda: (Model(), {"a": range(3)}, {}), "it is a range, not a DataLoader"),
        (lambda: (Model(), DataLoader(data(), batch_size=None), {}), "batch_size=None"),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Precomputed(4)), {}),
            "Precomputed, makes batches of 4 when its batch_size is 1",
        ),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Tokens()), {}),
            "Tokens, has no batch_size",
        ),
        (
            lambda: (
                WithHook(),
                None,
                {"callbacks": [tuner(), pl.callbacks.BatchSizeFinder()]},
            ),
            "BatchSizeFinder",
        ),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Fixed(4)), {}),
            "Fixed, has 150 batches at any batch_size",
        ),
        (
            lambda: (
                Model(),
                plain(),
                {
                    "callbacks": [
                        tuner(),
                        pl.callbacks.GradientAccumulationScheduler({0: 2}),
                    ]
                },
            ),
            "GradientAccumulationScheduler",
        ),
    ],
    ids=[
        "list of batches",
        "iterable",
        "unbatched",
        "precomputed",
        "token budget",
        "finder",
        "fixed length",
        "scheduler",
    ],
)
def test_what_is_not_handled_is_refused_before_anything_is_touched(make, sentence):
    model, loader, options = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    callbacks = options.pop("callbacks", [tuner()])
    fitted = trainer(*callbacks, **options)
    random_state = torch.get_rng_state()

    with pytest.raises(autobatch.AutobatchError, match=sentence) as caught:
        fitted.fit(model, loader)

    assert "\n" not in str(caught.value)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.sizes == []
    assert fitted.accumulate_grad_batches == 1


def test_one_loader_for_training_and_validation_is_refused():
    loader = plain()

    with pytest.raises(autobatch.AutobatchError, match="one loader serves"):
        trainer(tuner()).fit(Model(), loader, loader)

    assert loader.batch_size == 4


def test_a_name_for_the_batch_size_that_is_nowhere_is_refused():
    with pytest.raises(autobatch.AutobatchError, match="batch_arg_name='bacth'"):
        trainer(tuner(batch_arg_name="bacth")).fit(Model(), plain())


def test_resuming_with_another_target_is_refused(tmp_path):
    first = trainer(tuner(), max_epochs=1)
    first.fit(Model(), plain())
    first.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(autobatch.AutobatchError, match="target_batch_size=60 asks for another"):
        trainer(tuner(target_batch_size=60)).fit(Model(), plain(), ckpt_path=tmp_path / "last.ckpt")


def test_a_strategy_whose_steps_wait_for_other_ranks_is_refused(monkeypatch):
    fitted = trainer()
    strategy = object.__new__(pl.strategies.FSDPStrategy)
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: strategy))

    with pytest.raises(autobatch.AutobatchError, match="FSDPStrategy makes ranks wait"):
        check(fitted, Model(), None)


def test_a_loader_that_ignores_its_batch_size_is_refused():
    class Stubborn(DataLoader):
        @property
        def batch_sampler(self):
            return BatchSampler(self.sampler, 4, drop_last=False)

        @batch_sampler.setter
        def batch_sampler(self, _):
            pass

    loader = Stubborn(data(), batch_size=4)
    fitted = trainer(tuner())

    with pytest.raises(autobatch.AutobatchError, match="still makes batches of 4"):
        fitted.fit(Model(), loader)

    assert loader.batch_size == 4
    assert fitted.accumulate_grad_batches == 1


def test_a_run_without_training_is_left_alone():
    callback = tuner()

    trainer(callback, limit_train_batches=0).fit(Model(), plain())

    assert callback.report is None


def test_a_fast_dev_run_is_left_alone():
    model, callback = Model(), tuner()

    trainer(callback, fast_dev_run=True).fit(model, plain())

    assert callback.report is None
    assert model.sizes == [4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_batch_size": 0}, "target_batch_size=0"),
        ({"memory_limit": "much"}, "memory_limit='much'"),
        ({"steps_per_trial": True}, "steps_per_trial=True"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_bad_argument_is_refused_at_the_door(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        autobatch.AutoBatch(**options)


def test_without_lightning_the_error_says_what_to_install():
    code = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_utilities", "lightning_fabric"):
    sys.modules[name] = None
import autobatch
try:
    autobatch.AutoBatch
except ImportError as error:
    assert "lightning-autobatch[lightning]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
