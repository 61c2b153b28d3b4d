"""Gradient of the last accumulation window of an epoch, with repair_last_window."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl
from sameness import same

SIZE, WHOLE = 8, 4  # samples of a micro-batch, micro-batches of an update
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def data(length):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, :3].argmax(1))


class Model(pl.LightningModule):
    """Keeps its weights: every update has the gradient of its samples at the same point."""

    rate = 0.0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.updates = []  # gradients before clipping, with their samples
        self.clipped = []
        self.window = []

    def training_step(self, batch, batch_idx):
        self.window.append(batch)
        return self.loss(batch)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.updates.append((self.gradients(), self.window))
        self.window = []

    def on_before_zero_grad(self, optimizer):
        if self.net[0].weight.grad is not None:
            self.clipped.append(self.gradients())

    def gradients(self):
        return torch.cat([each.grad.flatten().double() for each in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def fit(model, loader, *, repair=True, size=SIZE, whole=WHOLE, resume=None, **options):
    callback = autobatch.AutoBatch(
        plan=autobatch.BatchPlan(size, whole),
        device=SimulatedAccelerator("64MiB"),
        repair_last_window=repair,
        steps_per_trial=1,
    )
    torch.manual_seed(1)
    pl.Trainer(callbacks=[callback], **{"max_epochs": 2, **QUIET, **options}).fit(
        model, loader, ckpt_path=resume
    )
    return callback.report


def in_one_batch(model, window):
    """The gradient of the mean loss over all samples of a window at once."""
    x, y = (torch.cat(parts) for parts in zip(*window, strict=True))
    model.zero_grad()
    model.loss((x, y)).backward()
    return model.gradients()


def samples(model):
    return [sum(len(x) for x, _ in window) for _, window in model.updates]


class Stream(IterableDataset):
    def __init__(self, length):
        self.data = data(length)

    def __iter__(self):
        return iter(self.data[index] for index in range(len(self.data)))


WINDOWS = {
    # samples per epoch, and per update
    "few micro-batches": (48, [32, 16]),
    "one micro-batch": (40, [32, 8]),
    "few, the last short": (45, [32, 13]),
    "one, short": (35, [32, 3]),
    "as many, the last short": (61, [32, 29]),
    "less than one update": (13, [13]),
    "whole": (64, [32, 32]),
}


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("kind", ["loader", "stream", "batch sampler", "sampler beneath"])
def test_last_update_has_the_gradient_of_its_samples_in_one_batch(case, kind):
    length, expected = WINDOWS[case]
    loader = {
        "loader": DataLoader(data(length), 4, shuffle=True),
        "stream": DataLoader(Stream(length), 4),
        "batch sampler": DataLoader(data(length), batch_sampler=Blocks(length, 4)),
        "sampler beneath": DataLoader(
            data(2 * length), batch_sampler=BatchSampler(range(length), 4, False)
        ),
    }[kind]
    model = Model()

    fit(model, loader)

    assert samples(model) == 2 * expected
    for gradient, window in model.updates:
        torch.testing.assert_close(gradient, in_one_batch(model, window))


class Blocks(BatchSampler):
    """A batch sampler of another class."""

    def __init__(self, length, batch_size):
        super().__init__(range(length), batch_size, drop_last=False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_train_batches": 6}, [32, 16]),
        ({"limit_train_batches": 0.75}, [32, 8]),
        ({"reload_dataloaders_every_n_epochs": 1}, [32, 21]),
    ],
)
def test_window_follows_the_arguments_of_the_trainer(options, expected):
    model = Model()

    fit(model, DataLoader(data(53), 4), **options)

    assert samples(model) == 2 * expected
    for gradient, window in model.updates:
        torch.testing.assert_close(gradient, in_one_batch(model, window))


def test_without_repair_the_last_update_is_wrong_and_a_note_shows_it():
    """The size of the gradient and the weights of samples are wrong."""
    model = Model()

    report = fit(model, DataLoader(data(45), 4), repair=False)

    (_, (gradient, window)), whole = model.updates[:2], in_one_batch
    assert not torch.allclose(gradient, whole(model, window))
    halves = [whole(model, [batch]) for batch in window]
    torch.testing.assert_close(gradient, (halves[0] + halves[1]) / WHOLE)
    assert report.notes[1] == (
        "The last update of an epoch is made of 2 micro-batches instead of 4, and Lightning still divides by 4: its "
        "gradient is 50 % of what it should be. The last micro-batch of an epoch has 5 of 8 samples, and Lightning "
        "counts it as a full one: its samples weigh 1.6 times as much as others; repair_last_window=True corrects it."
    )


def test_share_in_the_note_is_the_measured_one():
    model = Model()

    report = fit(model, DataLoader(data(40), 4), repair=False)

    gradient, window = model.updates[1]
    share = gradient.norm() / in_one_batch(model, window).norm()
    assert f"is {100 * share.item():.3g} % of what it should be" in report.notes[1]


@pytest.mark.parametrize(
    ("length", "note"),
    [
        (
            35,
            (
                "The last update of an epoch is made of 1 micro-batch instead of 4, and Lightning still divides by 4: its "
                "gradient is 25 % of what it should be; repair_last_window=True corrects it."
            ),
        ),
        (
            61,
            (
                "The last micro-batch of an epoch has 5 of 8 samples, and Lightning counts it as a full one: its samples "
                "weigh 1.6 times as much as others; repair_last_window=True corrects it."
            ),
        ),
    ],
    ids=["few", "short"],
)
def test_note_shows_only_the_errors_of_this_last_update(length, note):
    report = fit(Model(), DataLoader(data(length), 4), repair=False)

    assert report.notes[1] == note


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (64, {"repair": False}),
        (45, {"repair": True}),
        (45, {"repair": False, "whole": 1}),
        (48, {"repair": False, "limit_train_batches": 4}),
    ],
    ids=["whole windows", "repaired", "no accumulation", "limited to whole windows"],
)
def test_correct_last_update_has_no_note(length, options):
    report = fit(Model(), DataLoader(data(length), 4), **options)

    assert not any("repair_last_window" in note for note in report.notes)


def test_stream_of_unknown_length_has_no_note():
    report = fit(Model(), DataLoader(Stream(45), 4), repair=False)

    assert not any("repair_last_window" in note for note in report.notes)


class Normalised(Model):
    """Its layer needs two samples for a variance."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(5)
        self.net = nn.Sequential(nn.Linear(6, 5), norm, nn.Linear(5, 3)).double()


@pytest.mark.parametrize(("target", "drop_last"), [(16, False), (None, False), (16, True)])
def test_epoch_does_not_end_with_a_batch_size_that_a_layer_refuses(target, drop_last):
    callback = autobatch.AutoBatch(
        target_batch_size=target,
        max_micro_batch_size=16,
        device=SimulatedAccelerator("64MiB"),
    )
    trainer = pl.Trainer(callbacks=[callback], max_epochs=2, **QUIET)

    trainer.fit(Normalised(), DataLoader(data(401), 8, drop_last=drop_last))

    assert trainer.current_epoch == 2
    assert drop_last or 401 % callback.report.plan.micro_batch_size != 1


@pytest.mark.parametrize(("length", "whole"), [(64, WHOLE), (45, 1)])
def test_repair_without_a_partial_window_changes_nothing(length, whole):
    def weights(*, repair):
        torch.manual_seed(2)
        model = Model()
        model.rate = 0.1
        fit(model, DataLoader(data(length), 4), repair=repair, whole=whole)
        return dict(model.state_dict())

    assert same(weights(repair=True), weights(repair=False))


def test_repair_comes_before_clipping():
    limit, model = 0.01, Model()
    model.rate = 1e-12

    fit(
        model,
        DataLoader(data(45), 4),
        gradient_clip_val=limit,
        gradient_clip_algorithm="value",
    )

    last, window = model.updates[1]
    whole = in_one_batch(model, window)
    assert whole.abs().max() > limit
    torch.testing.assert_close(last, whole)
    torch.testing.assert_close(model.clipped[1], whole.clamp(-limit, limit))


class Half(Model):
    """In single precision, so that a scaler has something to scale; its own loss stays exact."""

    def __init__(self):
        super().__init__()
        self.net.float()

    def loss(self, batch):
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(self.net(batch[0].float()), batch[1])


def test_repair_holds_under_a_gradient_scaler():
    plugins = importlib.import_module(f"{pl.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision, model = plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler), Half()

    fit(model, DataLoader(data(45), 4), plugins=[precision])

    assert samples(model) == 2 * [32, 13]
    for gradient, window in model.updates:
        torch.testing.assert_close(gradient, in_one_batch(model, window), rtol=1e-4, atol=1e-6)


class Skips(Model):
    """Returns no loss for some micro-batches."""

    skipped = ()

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize(("skipped", "expected"), [((4,), 13), ((6,), 16)])
def test_micro_batch_without_a_loss_is_not_counted(skipped, expected):
    model = Skips()
    model.skipped = skipped

    fit(model, DataLoader(data(53), 4))

    assert samples(model) == 2 * [32, expected]
    for gradient, window in model.updates:
        torch.testing.assert_close(gradient, in_one_batch(model, window))


class Resumable(DataLoader):
    """Continues at its position, as a loader with a state."""

    given = skipped = 0

    def __iter__(self):
        skipped, self.skipped = self.skipped, 0
        for self.given, batch in enumerate(super().__iter__(), start=1):
            if self.given > skipped:
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skipped = state["given"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize(("kind", "last"), [(DataLoader, 32), (Resumable, 29)])
def test_resumed_epoch_counts_from_the_start_of_its_loader(tmp_path, kind, last):
    """Lightning continues with the saved batch index, and most loaders begin their data again."""
    first, model = Model(), Model()
    first.on_train_batch_end = lambda _, __, index: (
        index == 3 and first.trainer.save_checkpoint(tmp_path / "within.ckpt")
    )
    fit(first, kind(data(93), 4), max_epochs=1)

    fit(model, kind(data(93), 4), max_epochs=1, resume=tmp_path / "within.ckpt")

    assert samples(first) == [32, 32, 29]
    assert samples(model) == [32, last]
    for gradient, window in (*first.updates, *model.updates):
        torch.testing.assert_close(gradient, in_one_batch(model, window))


# Errors


@pytest.mark.parametrize("value", [1, "yes", None])
def test_repair_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match=f"repair_last_window={value!r} is not a"):
        autobatch.AutoBatch(repair_last_window=value)


class Quasi(Model):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class ByHand(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("model", "sentence"),
    [(Quasi, "LBFGS evaluates one several times"), (ByHand, "uses manual optimization")],
)
def test_unrepairable_training_is_refused_before_any_change(model, sentence):
    made, loader = model(), DataLoader(data(45), 4)
    before = {name: value.clone() for name, value in made.state_dict().items()}

    with pytest.raises(autobatch.AutobatchError, match=sentence) as caught:
        fit(made, loader)

    assert "\n" not in str(caught.value)
    assert made.window == []
    assert loader.batch_size == 4
    assert same(dict(made.state_dict()), before)


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as sharpness-aware optimizers do."""

    def step(self, closure):
        closure()
        return super().step(closure)


def test_optimizer_that_evaluates_twice_is_refused_at_its_first_update():
    model = Model()
    model.configure_optimizers = lambda: Twice(model.parameters(), 0.1)

    with pytest.raises(autobatch.AutobatchError, match="Twice evaluates one several"):
        fit(model, DataLoader(data(45), 4))


def test_stream_with_uncountable_batches_is_refused():
    def by_time(samples):
        x, y = zip(*samples, strict=True)
        return torch.stack(x).T, torch.stack(y)

    model = Model()
    model.loss = lambda batch: F.cross_entropy(model.net(batch[0].T), batch[1])

    with pytest.raises(autobatch.AutobatchError, match="batch of 8 have 6, 8 rows"):
        fit(model, DataLoader(Stream(45), 4, collate_fn=by_time))
