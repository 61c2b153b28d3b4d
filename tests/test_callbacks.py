"""Other callbacks in the same Trainer, and tuning again at an epoch."""

from __future__ import annotations

import copy
import csv
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, plain, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same

callbacks = pl.callbacks


def loader(size=4, length=600, **options):
    return DataLoader(data(length), batch_size=size, shuffle=True, **options)


class Monitored(Model):
    """A module with a learning rate, a schedule and a metric of validation for callbacks."""

    flops_per_batch = 1

    def __init__(self, batch_size=4, lr=1e-3):
        super().__init__(batch_size)
        self.lr = lr
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates = [*self.rates, self.optimizers().param_groups[0]["lr"]]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def fit(path, *others, size=4, accumulate=1, **options):
    """Train with these callbacks, and return the final state."""
    pl.seed_everything(1, verbose=False)
    model = Monitored(size)
    fitted = trainer(
        *others,
        **{
            "max_epochs": 3,
            "accumulate_grad_batches": accumulate,
            "default_root_dir": path,
            "log_every_n_steps": 1,
            **options,
        },
    )
    fitted.fit(model, loader(size), DataLoader(data(100), batch_size=20))
    return {
        "weights": dict(model.state_dict()),
        "optimizer": fitted.optimizers[0].state_dict(),
        "sizes": model.sizes,
        "rates": model.rates,
        "steps": fitted.global_step,
        "epochs": fitted.current_epoch,
        "lr": model.lr,
        "metrics": {name: each.item() for name, each in fitted.callback_metrics.items()},
    }


CASES = {
    "learning rate": lambda: callbacks.LearningRateFinder(num_training_steps=20),
    "early stopping": lambda: callbacks.EarlyStopping("loss", patience=0, min_delta=9),
    "weight averaging": callbacks.WeightAveraging,
    "moving average": lambda: callbacks.EMAWeightAveraging(decay=0.5),
    "stochastic averaging": lambda: callbacks.StochasticWeightAveraging(
        swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1
    ),
    "rich bar": callbacks.RichProgressBar,
    "bar": callbacks.TQDMProgressBar,
    "rate monitor": callbacks.LearningRateMonitor,
    "checkpoint": lambda: callbacks.ModelCheckpoint(every_n_train_steps=4, save_top_k=-1),
    "throughput": lambda: callbacks.ThroughputMonitor(
        batch_size_fn=lambda batch: len(batch[0]), window_size=3
    ),
}
NEEDS = {
    "rich bar": {"enable_progress_bar": True},
    "bar": {"enable_progress_bar": True},
    "checkpoint": {"enable_checkpointing": True},
}
LOGS = {"rate monitor", "throughput"}


@pytest.mark.filterwarnings("ignore:.*does not have a `forward`", "ignore:Swapping scheduler")
@pytest.mark.parametrize("case", CASES)
def test_training_with_another_callback_is_bit_identical(case, tmp_path, capsys):
    def run(path, *ours, at=0, **options):
        logger = pl.loggers.CSVLogger(path) if case in LOGS else False
        both = [CASES[case]()]
        both[at:at] = ours
        return fit(path, *both, logger=logger, **options, **NEEDS.get(case, {}))

    first, last = tuner(), tuner()
    tuned = {
        callback: run(tmp_path / f"{at}", callback, at=at)
        for at, callback in enumerate((first, last))
    }
    plan = first.report.plan
    by_hand = run(
        tmp_path / "by hand", size=plan.micro_batch_size, accumulate=plan.accumulate_grad_batches
    )

    for callback, result in tuned.items():
        different = [name for name in by_hand if not same(result[name], by_hand[name])]
        assert different == []
        assert callback.report.plan == plan
        assert len(callback.report.trials) > 1
        assert set(result["sizes"]) == {plan.micro_batch_size}
        assert result["epochs"] == (2 if case == "early stopping" else 3)


def test_learning_rate_finder_runs_at_the_tuned_batch_size(tmp_path):
    seen = []

    class Finder(callbacks.LearningRateFinder):
        def lr_find(self, fitted, module):
            super().lr_find(fitted, module)
            seen.append((module.hparams.batch_size, fitted.train_dataloader.batch_size))

    callback = tuner()
    result = fit(tmp_path, Finder(num_training_steps=20), callback)

    size = callback.report.plan.micro_batch_size
    assert seen == [(size, size)]
    assert result["lr"] != 1e-3


def test_a_fit_after_learning_rate_finder_is_not_taken_for_resumed(
    tmp_path,
):
    callback = tuner()
    finder = callbacks.LearningRateFinder(num_training_steps=20)
    fit(tmp_path, callback, finder)
    assert callback._run.checkpoint is not None  # of the finder

    fit(tmp_path, callback)

    assert not any("heckpoint" in note for note in callback.report.notes)
    assert any("found before" in note for note in callback.report.notes)


def test_every_checkpoint_holds_the_plan(tmp_path):
    callback = tuner()
    checkpoints = callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1
    )

    fit(tmp_path, callback, checkpoints, enable_checkpointing=True)

    written = sorted(tmp_path.glob("*.ckpt"))
    plan = callback.report.plan
    assert [each.stem for each in written] == ["step=12", "step=4", "step=8"]
    for each in written:
        state = torch.load(each, weights_only=True)["callbacks"]["AutoBatch"]
        assert state["micro_batch_size"] == plan.micro_batch_size
        assert state["accumulate_grad_batches"] == plan.accumulate_grad_batches


def test_throughput_monitor_counts_the_tuned_batch_size(tmp_path):
    logger, callback = pl.loggers.CSVLogger(tmp_path), tuner()
    monitor = CASES["throughput"]()

    fit(tmp_path, monitor, callback, logger=logger)

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = next(name for name in rows[0] if name.endswith("samples"))
    counted = [
        (float(row[name]), float(row[name.replace("samples", "batches")]))
        for row in rows
        if row[name]
    ]
    size = callback.report.plan.micro_batch_size
    assert counted
    assert all(samples == size * batches for samples, batches in counted)


# Tuning again at an epoch


class Frozen(pl.LightningModule):
    """A head that is trained from the start, and a wide backbone that is unfrozen later."""

    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 64))
        self.net = nn.Linear(64, 4)
        self.record = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(self.backbone(batch[0])), batch[1])
        self.log("loss", loss)
        # A new list, so that trials are restored
        self.record = [*self.record, (self.current_epoch, len(batch[0]), loss.item())]
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_epoch_start(self):
        self.started = (
            *getattr(self, "started", ()),
            self.trainer.num_training_batches,
        )

    def configure_optimizers(self):
        chosen = filter(lambda each: each.requires_grad, self.parameters())
        optimizer = torch.optim.AdamW(chosen, lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def sizes(self, epoch):
        return [size for each, size, _ in self.record if each == epoch]


def finetuning(*, epoch=1):
    return callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=epoch)


ROOM = "550KiB"


def finetuned(callback, *others, epochs=3, source=None, **options):
    pl.seed_everything(1, verbose=False)
    model = Frozen()
    fitted = trainer(callback, *others, max_epochs=epochs, **options)
    passed = loader() if source is None else None
    fitted.fit(source or model, passed) if source is None else fitted.fit(model, datamodule=source)
    return model, fitted


def wide(**options):
    """Without timing: the largest fit whose accumulation reaches the target."""
    return tuner(
        device=SimulatedAccelerator(ROOM),
        search=autobatch.Bisection(resolution=0.25),
        **{"target_batch_size": 240, "retune_at_epochs": [1], **options},
    )


def test_retuning_keeps_the_effective_batch_size():
    reports = []

    class Look(pl.Callback):
        def on_train_batch_start(self, fitted, module, batch, batch_idx):
            if batch_idx == 0:
                reports.append((callback.report, fitted.num_training_batches))

    # Given, so that only memory decides: it fits only while the backbone is frozen
    callback = wide(plan=autobatch.BatchPlan(120, 2))
    model, fitted = finetuned(callback, finetuning(), Look())

    (first, _), (second, batches), *_ = reports
    assert first.plan.micro_batch_size == 120
    assert second.largest_fit < 120
    for epoch, report in enumerate((first, second, second)):
        size = report.plan.micro_batch_size
        assert model.sizes(epoch) == [
            *[size] * (600 // size),
            *([600 % size] if 600 % size else []),
        ]
        assert report.plan.effective_batch_size == 240
    assert batches == len(model.sizes(1)) == fitted.num_training_batches
    assert fitted.global_step == 3 * 3
    assert callback.report.model_copy(update={"loading": None}) == second
    assert fitted.accumulate_grad_batches == second.plan.accumulate_grad_batches
    assert "Tuned again at epoch 1, for the effective batch of 240." in second.notes


def test_without_retuning_the_unfrozen_model_does_not_fit():
    """The first plan does not know of the backbone, which is trained from the second epoch."""
    first, second = wide(retune_at_epochs=()), wide()

    finetuned(first, finetuning())
    finetuned(second, finetuning())

    assert second.report.largest_fit < first.report.largest_fit


class BySwitch(pl.Callback):
    """A callback by hand that changes batch size and accumulation at an epoch."""

    def __init__(self, plan, data_loader):
        self.plan, self.loader = plan, data_loader

    def on_train_epoch_start(self, fitted, module):
        if fitted.current_epoch != 1:
            return
        size = self.plan.micro_batch_size
        self.loader.batch_sampler.batch_size = size
        object.__setattr__(self.loader, "batch_size", size)
        fitted.accumulate_grad_batches = self.plan.accumulate_grad_batches
        fitted.fit_loop.max_batches = len(self.loader)
        fitted.fit_loop._combined_loader.limits = [len(self.loader)]


@dataclass(frozen=True)
class Only:
    """A search that tries one size."""

    size: int

    def propose(self, trials, *, start, high, budget):
        return None if trials else self.size


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_training_after_retuning_is_identical_to_a_change_by_hand(own):
    def run(*others, size=4, **options):
        pl.seed_everything(1, verbose=False)
        generator = torch.Generator().manual_seed(3) if own else None
        model, data_loader = Frozen(size), loader(size, generator=generator)
        extra = [switch(data_loader) for switch in others]
        fitted = trainer(*extra, finetuning(), max_epochs=3, **options)
        fitted.fit(model, data_loader)
        return (
            model.record,
            dict(model.state_dict()),
            fitted.optimizers[0].state_dict(),
            fitted.global_step,
        )

    # Both plans are given, so that the comparison is of the change alone
    plans = [autobatch.BatchPlan(60, 2), autobatch.BatchPlan(20, 6)]
    callback = tuner(
        plan=plans[0],
        search=Only(20),
        timing_seconds=0,
        retune_at_epochs=[1],
        device=SimulatedAccelerator("2MiB"),
    )
    tuned = run(lambda _: callback)
    by_hand = run(
        lambda data_loader: BySwitch(plans[1], data_loader),
        size=60,
        accumulate_grad_batches=2,
    )

    assert callback.report.plan == plans[1]
    assert {size for epoch, size, _ in tuned[0] if epoch} == {20}
    assert same(tuned, by_hand)


class Drawn(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(data(20), batch_size=10)


@pytest.mark.parametrize(
    "options",
    [{}, {"reload_dataloaders_every_n_epochs": 1}, {"val_check_interval": 0.5}],
    ids=["", "reload", "validation"],
)
def test_retuning_changes_loaders_of_hooks_and_validation(options):
    validations = []

    class Look(pl.Callback):
        def on_validation_start(self, fitted, *_):
            if not fitted.sanity_checking:
                validations.append((fitted.current_epoch, fitted.fit_loop.batch_idx + 1))

    callback, source = wide(), Drawn()
    model, _ = finetuned(callback, finetuning(), Look(), source=source, **options)

    size = callback.report.plan.micro_batch_size
    full = -(-600 // size)
    for epoch in (1, 2):
        assert len(model.sizes(epoch)) == full
        assert model.sizes(epoch)[0] == size
        when = [batch for each, batch in validations if each == epoch]
        share = options.get("val_check_interval", 1.0)
        assert when == ([full] if share == 1.0 else [full // 2, full // 2 * 2])
    assert source.batch_size == size


def test_progress_bar_checkpoint_and_written_report_are_of_the_retuned_plan(tmp_path, capsys):
    totals = []

    class Bar(callbacks.TQDMProgressBar):
        def on_train_batch_start(self, fitted, *_):
            totals.append((fitted.current_epoch, self.train_progress_bar.total))

    callback, logger = wide(), pl.loggers.CSVLogger(tmp_path)
    options = {"enable_progress_bar": True, "logger": logger, "log_every_n_steps": 1}
    model, fitted = finetuned(callback, finetuning(), Bar(), **options)
    fitted.save_checkpoint(tmp_path / "last.ckpt")

    size = callback.report.plan.micro_batch_size
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    written = json.loads((Path(logger.log_dir) / "autobatch.json").read_text())
    assert model.sizes(2)[0] == size < model.sizes(0)[0]
    assert dict(totals) == {epoch: len(model.sizes(epoch)) for epoch in range(3)}
    assert state["AutoBatch"]["micro_batch_size"] == size
    assert any("Tuned again" in note for note in written["notes"])


def test_retuning_that_keeps_the_plan_leaves_no_trace():
    """Trials in the middle of training restore optimizers, schedules, metrics and random state."""

    def run(*ours, size=4, accumulate=1):
        pl.seed_everything(1, verbose=False)
        model = Monitored(size)
        fitted = trainer(*ours, max_epochs=3, accumulate_grad_batches=accumulate)
        fitted.fit(model, loader(size), DataLoader(data(100), batch_size=20))
        return (
            dict(model.state_dict()),
            fitted.optimizers[0].state_dict(),
            fitted.callback_metrics,
            model.rates,
            fitted.global_step,
        )

    # A prime, and a search that starts at it: no other plan is as near
    callback = tuner(target_batch_size=59, retune_at_epochs=(1, 2))
    tuned = run(callback)
    plan = callback.report.plan
    by_hand = run(size=plan.micro_batch_size, accumulate=plan.accumulate_grad_batches)

    assert "Tuned again at epoch 2, for the effective batch of 59." in (callback.report.notes)
    assert callback._results.last_fit.report.plan == plan
    assert same(tuned, by_hand)


def test_a_resumed_run_retunes_at_the_remaining_epochs(tmp_path):
    first = wide(retune_at_epochs=())
    _, begun = finetuned(first, finetuning(epoch=2), epochs=1)
    begun.save_checkpoint(tmp_path / "last.ckpt")

    again, model = wide(retune_at_epochs=[2]), Frozen()
    trainer(again, finetuning(epoch=2), max_epochs=3).fit(
        model, loader(), ckpt_path=tmp_path / "last.ckpt"
    )

    assert {size for size in model.sizes(1) if size != 600 % size} >= {
        first.report.plan.micro_batch_size
    }
    assert again.report.plan.effective_batch_size == 240
    assert any("epoch 2" in note for note in again.report.notes)
    assert model.sizes(2)[0] == again.report.plan.micro_batch_size


def test_fit_with_retuning_restores_the_loader_and_the_loop():
    callback, data_loader, fitted = wide(), loader(), None
    fitted = trainer(callback, finetuning(), max_epochs=2)

    fitted.fit(Frozen(), data_loader)

    assert data_loader.batch_size == data_loader.batch_sampler.batch_size == 4
    assert "advance" not in vars(fitted.fit_loop)


def test_a_user_error_while_retuning_passes_and_restores_everything():
    class Fails(Frozen):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise ZeroDivisionError("mine")
            return super().training_step(batch, batch_idx)

    data_loader = loader()
    fitted = trainer(wide(), finetuning(), max_epochs=2)

    with pytest.raises(ZeroDivisionError, match="mine"):
        fitted.fit(Fails(), data_loader)

    assert data_loader.batch_size == 4
    assert "advance" not in vars(fitted.fit_loop)


@pytest.mark.parametrize("epochs", [[0], [1.5], 3, "12", [True], None])
def test_bad_epochs_to_retune_at_are_refused(epochs):
    with pytest.raises(ValueError, match="retune_at_epochs="):
        autobatch.AutoBatch(retune_at_epochs=epochs)


@pytest.mark.parametrize("device", ["simulated:450KiB", None])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_callback_that_has_tuned_tunes_another_trainer(copied, device):
    callback = tuner(device=device, max_micro_batch_size=20)
    trainer(callback).fit(Model(), plain())

    copy_of_it, model = copied(callback), Model()

    assert copy_of_it.reports == callback.reports
    trainer(copy_of_it).fit(model, plain())
    assert set(model.sizes) == {copy_of_it.report.plan.micro_batch_size}
