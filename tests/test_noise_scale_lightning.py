"""NoiseScale in a Trainer."""

from __future__ import annotations

import importlib
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from lightning_here import pl, quiet_trainer
from sameness import same

torchmetrics = importlib.import_module("torchmetrics")


def data(length=240):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def loader(batch_size=8, length=240):
    return DataLoader(data(length), batch_size, shuffle=True)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Busy(Model):
    """Has every kind of state that a second pass could change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(32, 4),
        )
        self.tuned = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.register_buffer("average", torch.zeros(4))
        self.seen = []
        self.kept = {}
        self.steps = 0
        self.hooked = 0
        self.net[0].register_forward_hook(self.count)

    def count(self, *_):
        self.hooked += 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.steps += 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        logits = self.net(x + 0.01 * noise) + self.tuned(x.clone())[:, :4]
        self.average.mul_(0.9).add_(logits.detach().mean(0))
        self.kept["last"] = logits.detach().clone()
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.seen.append(x[:, 0].tolist())
        x.mul_(0.5)
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((len(outputs["logits"]), batch[0].sum().item()))


OWN = ("seen", "kept", "steps", "hooked")


class Recorded(pl.loggers.logger.Logger):
    name, version = "recorded", 0

    def __init__(self):
        super().__init__()
        self.logged = []
        self.hyperparameters = []

    def log_hyperparams(self, params):
        self.hyperparameters.append(params)

    def log_metrics(self, metrics, step):
        self.logged.append((step, dict(metrics)))


def fitted(callback, *, kind=Busy, batches=None, **options):
    """Train, and return everything that training changed."""
    pl.seed_everything(1, verbose=False)
    model, logger = kind(), Recorded()
    options = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 5, **options}
    trainer = quiet_trainer(*([callback] if callback else []), **options)
    trainer.fit(model, batches or loader())
    return trainer, {
        "weights": model.state_dict(),
        "own": [getattr(model, name, None) for name in OWN],
        "optimizer": trainer.optimizers[0].state_dict(),
        "metrics": dict(trainer.callback_metrics),
        "logged": [
            (step, values) for step, values in logger.logged if "noise_scale_low" not in values
        ],
        "random": (
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
def test_training_is_bit_identical(options):
    callback = autobatch.NoiseScale(every=2, split_every=3)

    _, watched = fitted(callback, **options)
    _, plain = fitted(None, **options)

    assert callback.reading.windows > 2
    assert [name for name in plain if not same(watched[name], plain[name])] == []


def scaled():
    """Mixed precision with a scaled loss, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=20)
    return pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_with_a_scaled_loss_is_bit_identical(accumulate):
    callback = autobatch.NoiseScale(every=2, split_every=3)
    options = {"accumulate_grad_batches": accumulate, "kind": Model, "max_epochs": 4}

    _, watched = fitted(callback, plugins=[scaled()], **options)
    _, plain = fitted(None, plugins=[scaled()], **options)

    assert callback.reading.windows > 2
    assert same(watched, plain)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_scale_of_the_loss_has_no_effect(accumulate):
    options = {"accumulate_grad_batches": accumulate, "max_epochs": accumulate}
    plain, under = (autobatch.NoiseScale(every=1, split_every=1) for _ in range(2))

    read(plain, KnownNoise(), **options)
    read(under, KnownNoise(), plugins=[scaled()], **options)

    assert under.reading.samples == pytest.approx(plain.reading.samples, rel=0.05)


def test_lightning_without_a_needed_name_is_unavailable(monkeypatch):
    noise = importlib.import_module("autobatch.lightning._noise_scale")
    monkeypatch.setattr(noise, "name_missing_to_noise_scale", lambda _: "fit_loop.no_more")

    reading = read(autobatch.NoiseScale(), KnownNoise(), limit_train_batches=3)

    assert "has no fit_loop.no_more" in reason_of(reading)


def test_list_of_more_than_a_thousand_entries_is_restored():
    class Long(Busy):
        def __init__(self):
            super().__init__()
            self.seen = list(range(2000))

    callback = autobatch.NoiseScale(split_every=3)

    _, watched = fitted(callback, kind=Long)
    _, plain = fitted(None, kind=Long)

    assert same(watched["own"], plain["own"])


# Readings


class KnownNoise(pl.LightningModule):
    """The loss -w·x has the gradient -x: its noise scale is that of the data."""

    def __init__(self, extra=None, total=False):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))
        self.extra = extra or nn.Identity()
        self.total = total

    def training_step(self, batch, batch_idx):
        loss = -(self.extra(batch[0]) @ self.w)
        return loss.sum() if self.total else loss.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def known_loader(batch_size=8, length=8 * 160):
    """A noise scale of 6 / (6 * 0.25) = 4."""
    generator = torch.Generator().manual_seed(7)
    x = 0.5 + torch.randn(length, 6, generator=generator)
    return DataLoader(TensorDataset(x), batch_size, shuffle=True)


def read(callback, model, batches=None, **options):
    pl.seed_everything(2, verbose=False)
    trainer = quiet_trainer(callback, **{"max_epochs": 1, **options})
    trainer.fit(model, batches or known_loader())
    return callback.reading


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (KnownNoise(), {"max_epochs": 5, "accumulate_grad_batches": 4}),
        (KnownNoise(), {}),
        (KnownNoise(total=True), {}),
        (KnownNoise(), {"precision": "64-true"}),
        pytest.param(KnownNoise(), {"gradient_clip_val": 1e-3}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "split", "a sum", "double", "clipped"],
)
def test_noise_scale_of_known_data_is_measured(model, options):
    reading = read(autobatch.NoiseScale(every=1, split_every=1), model, **options)

    assert reading.state == "ok"
    assert reading.samples == pytest.approx(4, rel=0.3)
    assert reading.batch_size == 8 * options.get("accumulate_grad_batches", 1)


def test_dropout_adds_noise_to_both_halves():
    """The variance of a dropped x is (1 + 0.25) / 0.5 - 0.25 = 2.25: a noise scale of 9."""
    model = KnownNoise(nn.Dropout(0.5))

    reading = read(autobatch.NoiseScale(split_every=1), model, max_epochs=2)

    assert reading.samples == pytest.approx(9, rel=0.3)


def test_batch_of_an_odd_size_is_split():
    reading = read(autobatch.NoiseScale(split_every=1), KnownNoise(), known_loader(5), max_epochs=1)

    assert reading.batch_size == 5
    assert reading.samples == pytest.approx(4, rel=0.3)


# Updates


def test_last_update_with_fewer_batches_is_skipped():
    callback = autobatch.NoiseScale(every=1)

    # 7 micro-batches of 8: one whole update of four, and one of three
    reading = read(
        callback, KnownNoise(), known_loader(8, 56), max_epochs=8, accumulate_grad_batches=4
    )

    assert reading.windows == 4  # of the later 8 updates
    assert reading.last_update == 15


def test_update_with_batches_of_several_sizes_is_skipped():
    reading = read(
        autobatch.NoiseScale(every=1),
        KnownNoise(),
        known_loader(8, 60),
        max_epochs=8,
        accumulate_grad_batches=4,
    )

    # The second of an epoch has four batches, the last of 4 samples
    assert reading.windows == 4


def test_first_reading_is_settling_with_a_lower_bound():
    reading = read(autobatch.NoiseScale(every=1), KnownNoise(), accumulate_grad_batches=4)

    assert reading.state == "settling"
    assert reading.samples == reading.low


def test_resumed_run_keeps_its_windows(tmp_path):
    whole, first, second = (autobatch.NoiseScale(every=2) for _ in range(3))
    options = {"accumulate_grad_batches": 4}
    read(whole, KnownNoise(), max_epochs=4, **options)

    pl.seed_everything(2, verbose=False)
    trainer = quiet_trainer(first, max_epochs=2, **options)
    trainer.fit(KnownNoise(), known_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = quiet_trainer(second, max_epochs=4, **options)
    again.fit(KnownNoise(), known_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)

    assert second.reading.state == "ok"
    assert second.reading.windows == whole.reading.windows
    assert second.reading.last_update == whole.reading.last_update
    assert kept(second)[:40] == kept(first)


def test_second_fit_starts_a_new_record():
    callback = autobatch.NoiseScale(every=1)
    read(callback, KnownNoise(), accumulate_grad_batches=4, max_epochs=2)

    reading = read(callback, KnownNoise(), accumulate_grad_batches=4, limit_train_batches=40)

    assert reading.state == "settling"
    assert reading.last_update == 10


def test_loggers_get_the_reading():
    callback, logger = autobatch.NoiseScale(every=1), Recorded()

    read(
        callback,
        KnownNoise(),
        accumulate_grad_batches=4,
        max_epochs=3,
        logger=logger,
        log_every_n_steps=50,
    )

    steps = [step for step, values in logger.logged if "noise_scale" in values]
    assert steps == [99, 120]
    last = logger.logged[-1][1]
    assert set(last) == {"noise_scale", "noise_scale_low", "noise_scale_high"}
    assert last["noise_scale"] == callback.reading.samples


def hooks_of(model):
    return [dict(each._backward_hooks or {}) for each in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}], ids=str)
@pytest.mark.parametrize("fails_at", [None, 6])
def test_no_hook_remains(options, fails_at):
    class Fails(KnownNoise):
        def training_step(self, batch, batch_idx):
            if batch_idx == fails_at:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Fails()
    trainer = quiet_trainer(autobatch.NoiseScale(every=1), max_epochs=1, **options)

    try:
        trainer.fit(model, known_loader())
    except ZeroDivisionError:
        assert fails_at

    assert hooks_of(model) == [{}]
    assert "log" not in vars(model)


# Unavailable


def reason_of(reading):
    assert reading.state == "unavailable"
    return reading.reason


class ByHand(KnownNoise):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class Iterated(KnownNoise):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Particular(KnownNoise):
    """Takes whole batches only."""

    def training_step(self, batch, batch_idx):
        assert len(batch[0]) == 8
        return super().training_step(batch, batch_idx)


class Changing(KnownNoise):
    """Changes a teacher within the step."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Parameter(torch.zeros(6), requires_grad=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher.add_(1)
        return super().training_step(batch, batch_idx)


class Checkpointed(KnownNoise):
    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        return checkpoint(lambda x: -(x @ self.w).mean(), x, use_reentrant=True)


class Compiled(KnownNoise):
    def __init__(self):
        super().__init__(nn.Linear(6, 6))
        self.extra.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize(
    ("kind", "batch_size", "reason"),
    [
        (ByHand, 8, "manual optimization"),
        (Iterated, 8, "takes its batches from an iterator"),
        (Particular, 8, r"fails on half a batch \(AssertionError"),
        (Changing, 8, "training_step changes parameters itself"),
        (Checkpointed, 8, "use_reentrant=False"),
        (Compiled, 8, "torch.compile"),
        (KnownNoise, 1, "of one sample"),
    ],
)
def test_unmeasurable_module_trains_on_and_the_reading_has_a_reason(kind, batch_size, reason):
    callback = autobatch.NoiseScale()
    model = kind()

    reading = read(callback, model, known_loader(batch_size), limit_train_batches=30)

    assert re.search(reason, reason_of(reading))
    if kind is Changing:
        assert model.teacher.tolist() == [30.0] * 6


def test_half_batch_out_of_memory_is_no_error():
    class Full(KnownNoise):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) < 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, batch_idx)

    assert "(memory)" in reason_of(read(autobatch.NoiseScale(), Full(), limit_train_batches=30))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "^every=0"), ({"split_every": "no"}, "^split_every='no'")],
)
def test_invalid_intervals_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autobatch.NoiseScale(**options)


def kept(noise):
    """Return the windows in a checkpoint."""
    checkpoint = {}
    noise.on_save_checkpoint(None, None, checkpoint)
    return checkpoint["autobatch.NoiseScale"]["windows"]


def test_trainer_with_two_noise_scales_is_refused():
    trainer = quiet_trainer(autobatch.NoiseScale(), autobatch.NoiseScale(every=2))

    with pytest.raises(autobatch.AutobatchError, match="callbacks holds 2 NoiseScale"):
        trainer.fit(Model(), loader())
