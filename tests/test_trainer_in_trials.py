"""A step of a trial reads from its Trainer what it reads in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, quiet_trainer, tuner


class Started(pl.Callback):
    """Tells training from trials, in which no hook of a callback is called."""

    started = False

    def on_train_start(self, *_):
        self.started = True


class Reader(Model):
    """Keeps what each step reads from its Trainer, by the size of its batch."""

    def __init__(self):
        super().__init__()
        self.kept = []
        self.read_in_trials, self.read_in_training = {}, {}

    def read(self):
        trainer = self.trainer
        return {
            "train": (type(trainer.train_dataloader), trainer.train_dataloader.batch_size),
            "samples": getattr(trainer.train_dataloader, "dataset", None),
            "batches": trainer.num_training_batches,
            "validation": getattr(trainer.val_dataloaders, "batch_size", None),
            "validation batches": trainer.num_val_batches,
            "batches between validations": trainer.val_check_batch,
            "updates": trainer.estimated_stepping_batches,
            "accumulation": trainer.accumulate_grad_batches,
            "epoch": trainer.current_epoch,
            "max steps": trainer.max_steps,
            "validates": trainer.enable_validation,
            "callbacks": [type(each) for each in trainer.callbacks],
            "stage": (trainer.training, trainer.sanity_checking, trainer.state.fn),
            "loggers": [type(each) for each in trainer.loggers] and trainer.logger.version,
            "folder": trainer.log_dir,
        }

    def training_step(self, batch, batch_idx):
        assert batch_idx == 0 or batch_idx < self.trainer.num_training_batches
        assert batch_idx == self.trainer.fit_loop.batch_idx
        size, trainer = len(batch[0]), self.trainer
        started = next(each for each in trainer.callbacks if isinstance(each, Started)).started
        # A plain dict in a method: nothing that a trial restores
        into = KEPT["training" if started else "trials"]
        into.setdefault((size, trainer.current_epoch), {**self.read(), "step": trainer.global_step})
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


KEPT = {"trials": {}, "training": {}}


@pytest.fixture
def kept():
    KEPT.update(trials={}, training={})
    return KEPT


def assert_same(kept, size, epoch=0):
    (first, *_) = [read for (_, at), read in kept["training"].items() if at == epoch]
    assert kept["trials"][size, epoch] == first


class Stream(IterableDataset):
    def __iter__(self):
        return iter([data()[index] for index in range(600)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
        {"limit_train_batches": 3, "limit_val_batches": 1},
        {"max_steps": 7, "val_check_interval": "00:01:00:00"},
        {"accumulate_grad_batches": 3, "val_check_interval": 0.5},
    ],
    ids=str,
)
def test_a_step_of_a_trial_reads_what_training_shows_at_that_size(options, kept, tmp_path):
    model, callback = Reader(), tuner()
    logger = pl.loggers.CSVLogger(tmp_path)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path)

    quiet_trainer(
        callback,
        Started(),
        checkpoints,
        logger=logger,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **options,
    ).fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(60), 5))

    assert_same(kept, callback.report.plan.micro_batch_size)
    assert len({read["batches"] for read in kept["trials"].values()}) > 1 or "limit" in str(options)
    assert kept["training"]


@pytest.mark.parametrize("limit", [1.0, 4])
def test_a_trial_shows_the_length_of_a_stream_as_training_does(limit, kept):
    callback = tuner(target_batch_size=None, max_micro_batch_size=30)

    quiet_trainer(callback, Started(), max_epochs=1, limit_train_batches=limit).fit(
        Reader(), DataLoader(Stream(), 4), DataLoader(data(60), 5)
    )

    assert_same(kept, callback.report.plan.micro_batch_size)


def test_a_trial_while_retuning_shows_the_epoch_and_step_of_training(kept):
    callback = tuner(retune_at_epochs=[1])
    started = Started()

    quiet_trainer(callback, started, max_epochs=2).fit(Reader(), DataLoader(data(), 4))

    assert {at for (_, at) in kept["training"]} == {0, 1}
    # Trials at epoch 1 run after training has started
    reads = [read for (_, at), read in kept["training"].items() if at == 1]
    assert len(reads) > 1
    assert {read["step"] for read in reads} == {5}


def test_a_trial_of_a_resumed_run_shows_the_epoch_of_the_checkpoint(kept, tmp_path):
    first = quiet_trainer(tuner(), Started(), max_epochs=2)
    first.fit(Reader(), DataLoader(data(), 4))
    path = tmp_path / "end.ckpt"
    first.save_checkpoint(path)
    KEPT.update(trials={}, training={})

    callback = tuner()
    quiet_trainer(callback, Started(), max_epochs=3).fit(
        Reader(), DataLoader(data(), 4), ckpt_path=path
    )

    assert_same(kept, callback.report.plan.micro_batch_size, epoch=2)
    assert {read["step"] for read in kept["trials"].values()} == {10}


def test_a_trial_runs_the_first_and_last_micro_batch_of_a_window():
    indices = {}

    class Indexed(Model):
        def training_step(self, batch, batch_idx):
            indices.setdefault(len(batch[0]), []).append(batch_idx)
            return super().training_step(batch, batch_idx)

    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(10, 4), steps_per_trial=4)
    callback.tune(quiet_trainer(callback), Indexed(), DataLoader(data(130), 10))

    # 13 batches are three windows of four
    assert indices[10][:8] == [0, 3, 4, 7, 8, 11, 0, 3]


def test_an_epoch_that_the_module_ends_early_begins_again():
    seen = []

    class Short(Model):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(10), steps_per_trial=5)
    callback.tune(quiet_trainer(callback), Short(), DataLoader(data(), 4))

    assert seen[:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_a_module_that_never_steps_is_refused():
    class Never(Model):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    with pytest.raises(autobatch.AutobatchError, match="on_train_batch_start returned -1"):
        quiet_trainer(tuner()).fit(Never(), DataLoader(data(), 4))


def test_checkpoints_and_a_stop_in_a_trial_step_have_no_effect(tmp_path):
    steps = []

    class Stops(Model):
        def training_step(self, batch, batch_idx):
            if not self.trainer.callbacks[1].started:
                self.trainer.should_stop = True
                self.trainer.save_checkpoint(tmp_path / "trial.ckpt")
                self.logger.experiment.config.update({"a": 1})
                self.logger.log_metrics({"a": 1})
                assert isinstance(self.logger, pl.loggers.CSVLogger)
                self.trainer.callbacks[1].seen.append(1)
            else:
                steps.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    started = Started()
    started.seen = []
    logger = pl.loggers.CSVLogger(tmp_path)
    quiet_trainer(tuner(), started, logger=logger, max_epochs=1).fit(Stops(), DataLoader(data(), 4))

    assert sum(steps) == 600
    assert started.seen == []
    assert not (tmp_path / "trial.ckpt").exists()
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_an_evaluation_step_reads_its_loaders_and_hooks_run_around_it(method):
    reads, hooks = [], []
    kind = {"validate": "validation"}.get(method, method)
    plural = {"validate": "val"}.get(method, method)

    class Evaluated(Model):
        def evaluated(self, batch, *_):
            trainer = self.trainer
            shown = getattr(trainer, f"{plural}_dataloaders")
            batches = getattr(trainer, f"num_{plural}_batches")
            reads.append((len(batch[0]), shown.batch_size, batches[0]))
            hooks.append("step")

        validation_step = test_step = predict_step = evaluated

    def told(name):
        return lambda *_, **__: hooks.append(name)

    names = ["model_eval", "start", "epoch_start", "batch_start", "batch_end"]
    for name in names[1:]:
        setattr(Evaluated, f"on_{kind}_{name}", told(name))

    callback = autobatch.AutoBatch(device=SimulatedAccelerator("450KiB"))
    callback.tune(
        quiet_trainer(callback), Evaluated(), dataloaders=DataLoader(data(240), 4), method=method
    )

    assert len({size for size, *_ in reads}) > 1
    assert all(size == shown and batches == -(-240 // size) for size, shown, batches in reads)
    assert hooks[:8] == [
        *("start", "epoch_start", "batch_start", "step", "batch_end"),
        *("batch_start", "step", "batch_end"),
    ]


class OnModule(pl.Callback):
    """Makes what the step needs when fit starts."""

    def on_fit_start(self, trainer, module):
        print("printed")
        module.weight = torch.ones(4, device=module.device)


class Weighted(Model):
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        return F.cross_entropy(self.net(x), y, weight=self.weight)


class Masks(pl.Callback):
    """Changes the batch before the step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch["keep"] = torch.ones(len(batch["x"]))


class Masked(Model):
    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch["x"]))
        losses = F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
        return (losses * batch["keep"]).mean()


@pytest.mark.parametrize(("kind", "callback"), [(Weighted, OnModule), (Masked, Masks)])
def test_hooks_of_callbacks_that_a_step_needs_run_in_trials(kind, callback, capsys):
    samples = data() if kind is Weighted else [{"x": x, "y": y} for x, y in data()]

    def fit(*others, size=4, **options):
        pl.seed_everything(1, verbose=False)
        model = kind()
        quiet_trainer(*others, callback(), **options).fit(
            model, DataLoader(samples, size, shuffle=True)
        )
        return model

    tuning = tuner()
    tuned = fit(tuning)
    printed = capsys.readouterr().out.count("printed")
    plan = tuning.report.plan
    by_hand = fit(size=plan.micro_batch_size, accumulate_grad_batches=plan.accumulate_grad_batches)

    assert plan.effective_batch_size == 120
    assert tuned.sizes == by_hand.sizes
    assert all(map(torch.equal, tuned.state_dict().values(), by_hand.state_dict().values()))
    assert printed == (kind is Weighted)


def test_an_error_that_hooks_of_callbacks_do_not_cure_is_the_original():
    fired = []

    class Cures(pl.Callback):
        def on_train_start(self, trainer, module):
            fired.append("hook")
            module.fault = KeyError("second")

    class Fails(Model):
        fault = ZeroDivisionError("first")

        def training_step(self, batch, batch_idx):
            raise self.fault

    with pytest.raises(ZeroDivisionError, match="first") as caught:
        quiet_trainer(tuner(), Cures()).fit(Fails(), DataLoader(data(), 4))

    assert fired == ["hook"]
    assert any("autobatch was trying batch_size" in note for note in caught.value.__notes__)
