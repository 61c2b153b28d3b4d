"""AutoBatch in a Trainer: the size that training gets, trials, and the report."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
)

import autobatch
from autobatch.testing import SimulatedAccelerator
from forked import run_forked
from lightning_here import HERE, Model, data, pl, plain, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same

CASES = importlib.import_module("lightning_cases").CASES


# Bit-identity


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of every case: tuned in one process, written by hand in another."""
    folder = tmp_path_factory.mktemp("runs")
    program = Path(__file__).with_name("lightning_cases.py")
    modes = ("tuned", "by-hand")
    for mode in modes:
        ran = run_forked(program, mode, folder / f"{mode}.pt", folder / "plans.json")
        assert ran.returncode == 0, ran.stderr
    return {mode: torch.load(folder / f"{mode}.pt", weights_only=False) for mode in modes}


@pytest.mark.timeout(900)  # the fixture trains all cases: minutes on a busy machine
@pytest.mark.parametrize("case", CASES)
def test_training_after_tuning_is_bit_identical_to_training_by_hand(runs, case):
    tuned, by_hand = dict(runs["tuned"][case]), runs["by-hand"][case]
    trials = tuned.pop("trials")

    different = [name for name in by_hand if not same(tuned[name], by_hand[name])]

    assert different == []
    assert len(by_hand["record"]) > 5
    assert len(trials) >= 3
    if case not in ("bf16", "fp16"):  # all trials of the search fit
        assert "out_of_memory" in [outcome for _, outcome in trials]


def test_the_comparison_can_fail(runs):
    one, other = runs["by-hand"]["passed"], runs["by-hand"]["clipped"]

    assert not same(one["record"], other["record"])
    assert not same(one["weights"], other["weights"])


# Batch sizes in training


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}])
def test_training_steps_get_the_tuned_batch_size_in_every_epoch(options):
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


def test_fit_restores_the_batch_size_of_the_loader():
    loader = DataLoader(data(), batch_size=4, shuffle=True)

    trainer(tuner()).fit(Model(), loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4


def test_an_error_in_training_restores_the_batch_size_of_the_loader():
    loader, model = DataLoader(data(), batch_size=4), Model()

    class Explode(pl.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(tuner(), Explode()).fit(model, loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_a_trial_restores_everything(error):
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
    # Lightning ends the process gracefully after a keyboard interrupt
    expected = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(expected):
        fitted.fit(model, loader)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.sizes == []
    assert loader.batch_size == 4
    assert fitted.accumulate_grad_batches == 1
    assert callback.report is None


def test_no_target_takes_the_largest_fit_and_keeps_the_accumulation():
    callback = tuner(target_batch_size=None)
    fitted = trainer(callback, accumulate_grad_batches=3)

    fitted.fit(Model(), DataLoader(data(), batch_size=4))

    assert callback.report.plan.micro_batch_size == callback.report.largest_fit
    assert callback.report.plan.accumulate_grad_batches == 3
    assert fitted.accumulate_grad_batches == 3


def test_a_changed_effective_batch_size_is_noted():
    callback = tuner()

    trainer(callback).fit(Model(), DataLoader(data(), batch_size=4))

    assert callback.report.notes[0] == (
        "The effective batch goes from 4 to 120: 5 updates per epoch instead of 150. AdamW usually wants about ×5.5 the "
        "learning rate for that (square-root rule)."
    )


def test_an_overridden_accumulation_is_noted():
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


def test_autobatch_moves_to_the_front_of_the_callbacks():
    order = []

    class Other(pl.Callback):
        def on_fit_start(self, fitted, module):
            order.append(module.hparams.batch_size)

    trainer(Other(), tuner()).fit(Model(), DataLoader(data(), batch_size=4))

    assert order != [4]


def test_updates_per_epoch_match_training():
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
    """A module whose step needs attributes made in a start hook."""

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
def test_a_trial_has_the_attributes_made_by_start_hooks(hook, tmp_path):
    kind = type("Hooked", (Prepared,), {hook: lambda self, *_: setattr(self, "outputs", [])})
    model, callback = kind.__new__(kind), tuner()
    Model.__init__(model)

    trainer(callback, logger=pl.loggers.CSVLogger(tmp_path)).fit(model, plain())

    assert callback.report.plan.effective_batch_size == 120
    assert set(model.sizes) == {callback.report.plan.micro_batch_size}


def test_a_collate_function_may_modify_its_samples():
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


def test_only_samples_of_the_sampler_are_read():
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


def test_the_sampler_of_a_batch_sampler_decides():
    sampler = BatchSampler(torch.utils.data.SubsetRandomSampler(range(60)), 8, drop_last=True)
    callback, fitted = tuner(target_batch_size=24), trainer(max_epochs=1)
    fitted.callbacks.append(callback)

    fitted.fit(Model(), DataLoader(data(), batch_sampler=sampler))

    (row,) = (row for row in callback.report.effective if row.effective_batch_size == 24)
    assert row.updates_per_epoch == fitted.global_step
    assert callback.report.dataset_size <= 60


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_applying_the_plan_restores_everything(error):
    model, loader, calls = Model(), plain(), itertools.count(1)

    def configure_optimizers():
        if next(calls) == 2:
            raise error("mine")
        # Optimizers that depend on the batch size are made again with the plan
        return torch.optim.AdamW(model.parameters(), lr=1e-4 * model.hparams.batch_size)

    model.configure_optimizers = configure_optimizers
    fitted = trainer(tuner())

    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fitted.fit(model, loader)

    assert loader.batch_size == loader.batch_sampler.batch_size == 4
    assert fitted.accumulate_grad_batches == 1
    assert model.hparams.batch_size == 4
    assert "dataloader" not in vars(fitted.fit_loop._data_source)


def test_a_datamodule_draws_the_same_random_data_after_tuning():
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
def test_empty_data_is_not_tuned():
    callback = tuner()

    trainer(callback).fit(Model(), DataLoader(data(0), batch_size=4))

    assert callback.report is None


# Resuming


@pytest.mark.parametrize(
    "stop", [{"max_epochs": 1}, {"max_steps": 3}], ids=["between epochs", "within one"]
)
def test_a_resumed_run_continues_with_the_plan_of_its_checkpoint(tmp_path, stop):
    def scheduled():
        pl.seed_everything(1, verbose=False)
        model = Model()

        def configure_optimizers():
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 * model.hparams.batch_size)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        model.configure_optimizers = configure_optimizers
        return model

    def run(first, second, size, **options):
        """Train, stop, and continue in another Trainer."""
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


# Reports


def test_the_report_is_printed_and_written_beside_the_logs(tmp_path, capsys):
    callback, logger = tuner(verbose=True), pl.loggers.CSVLogger(tmp_path)

    trainer(callback, logger=logger).fit(Model(), DataLoader(data(), batch_size=4))

    written = autobatch.TuningReport.read(Path(logger.log_dir) / "autobatch.json")
    assert written == callback.report
    assert "= 120 per update" in capsys.readouterr().out
    assert written.dataset_size == 600
    assert written.subject == "Model · AdamW · 32-true"


def test_a_fit_without_a_logger_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    trainer(tuner()).fit(Model(), DataLoader(data(), batch_size=4))

    assert list(tmp_path.iterdir()) == []


def test_a_known_plan_needs_one_trial():
    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(30, 4))

    fitted = trainer(callback)
    fitted.fit(Model(), DataLoader(data(), batch_size=4))

    assert len(callback.report.trials) == 1
    assert fitted.accumulate_grad_batches == 4


def test_a_trial_has_the_peak_memory_of_training_steps():
    """The peak of a trial equals the peak of the same steps in a fit."""
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
def test_out_of_memory_at_any_allocation_of_a_trial_is_handled(allocation):
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
def test_it_works_with_both_lightning_packages(package, tmp_path):
    """The Trainer of one package; module and callback may come from the other."""
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
    program = tmp_path / "program.py"
    program.write_text(code)
    if package == HERE[0]:
        ran = run_forked(program)
    else:  # only one of the two packages may be imported
        ran = subprocess.run([sys.executable, program], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
