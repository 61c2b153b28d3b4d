"""Notes on layers and losses that accumulation changes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl, quiet_trainer

SAMPLES = 96


def points():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 6, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


class Texts(Dataset):
    """Sequences of random length."""

    def __init__(self):
        generator = torch.Generator().manual_seed(6)
        lengths = torch.randn(SAMPLES, generator=generator).exp().mul(5).int() + 2
        self.texts = [torch.randint(1, 9, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.texts[index]

    @staticmethod
    def padded(texts):
        return nn.utils.rnn.pad_sequence(texts, batch_first=True)


class Points(pl.LightningModule):
    """Learns from points by a mean over samples."""

    def __init__(self, *between):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), *between, nn.Tanh(), nn.Linear(12, 4))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(len(batch[0]))
        self.log("rows", float(len(batch[0])))
        return self.loss(*batch)

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Contrastive(Points):
    def loss(self, x, y):
        z = F.normalize(self.net(x))
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


class AddedUp(Points):
    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y, reduction="sum")


class Random(Points):
    def loss(self, x, y):
        return super().loss(x + torch.randn_like(x), y)


class Stubborn(Points):
    """Accepts whole batches only."""

    def loss(self, x, y):
        if len(x) < 16:
            raise RuntimeError("a batch has 16 samples")
        return super().loss(x, y)


class Silent(Points):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if len(batch[0]) > 12 else None


class ByHand(Contrastive):
    def __init__(self, *between):
        super().__init__(*between)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Tokens(Points):
    """The mean over all tokens that are no padding."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))

    def training_step(self, batch, batch_idx):
        self.batches.append(len(batch))
        scores = self.net(batch[:, :-1]).transpose(1, 2)
        return F.cross_entropy(scores, batch[:, 1:], ignore_index=0)


def fit(
    module,
    loader=None,
    *,
    size=16,
    whole=4,
    capacity="64MiB",
    time_limit=None,
    **options,
):
    callback = autobatch.AutoBatch(
        plan=autobatch.BatchPlan(size, whole),
        device=SimulatedAccelerator(capacity),
        steps_per_trial=1,
        time_limit=time_limit,
    )
    loader = loader or DataLoader(points(), 8, shuffle=True)
    quiet_trainer(callback, **{"max_epochs": 1, **options}).fit(module, loader)
    return callback.report.notes


def has_note(notes):
    return any("Splitting a batch" in note for note in notes)


def test_mean_over_samples_has_no_note():
    module = Points()

    notes = fit(module)

    assert not has_note(notes)
    assert module.batches == 6 * [16]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_rounding_has_no_note(precision):
    class Converted(Points):
        def loss(self, x, y):
            return super().loss(x.to(self.net[0].weight.dtype), y)

    assert not has_note(fit(Converted(), precision=precision))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_loss_that_compares_samples_has_a_note(precision):
    notes = fit(Contrastive(), precision=precision)

    (note,) = (note for note in notes if "Splitting" in note)
    assert note.startswith("Splitting a batch of 16 changed its gradient by ")
    assert "does not reproduce a batch of 64" in note


def test_mean_over_tokens_of_different_lengths_has_a_note():
    notes = fit(Tokens(), DataLoader(Texts(), 8, collate_fn=Texts.padded))

    assert has_note(notes)


def test_sum_over_samples_has_a_note_of_its_own():
    notes = fit(AddedUp())

    assert not has_note(notes)
    assert any("its gradient is 1/4" in note for note in notes)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.GroupNorm(3, 12), nn.LayerNorm(12)])
def test_layers_without_batch_statistics_have_no_note(layer):
    assert not has_note(fit(Points(layer)))


def test_batch_norm_has_a_note_without_a_test():
    module = Points(nn.BatchNorm1d(12))

    notes = fit(module, size=16)

    assert "1 BatchNorm layer uses the statistics of 16 samples, not 64." in notes
    assert not has_note(notes)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_frozen_batch_norm_has_no_note():
    module = Points(nn.BatchNorm1d(12).eval())

    assert not any("BatchNorm" in note for note in fit(module))


@pytest.mark.parametrize("module", [Contrastive, lambda: Points(nn.BatchNorm1d(12))])
def test_plan_without_accumulation_has_no_note(module):
    notes = fit(module(), size=32, whole=1)

    assert not has_note(notes)
    assert not any("BatchNorm" in note for note in notes)


def test_step_that_needs_a_start_hook_is_tested():
    class Prepared(Contrastive):
        def on_train_start(self):
            self.temperature = 2.0

        def loss(self, x, y):
            return super().loss(x, y) / self.temperature

    assert has_note(fit(Prepared()))


def test_batch_norm_under_manual_optimization_has_a_note():
    notes = fit(ByHand(nn.BatchNorm1d(12)))

    assert "1 BatchNorm layer uses the statistics of 16 samples, not 64." in notes


# Without a result


@pytest.mark.parametrize(("seconds", "tested"), [(1e-3, False), (600, True)])
def test_test_is_left_out_without_time_and_a_note_shows_it(seconds, tested):
    module = Contrastive()

    notes = fit(module, time_limit=seconds)

    assert has_note(notes) == tested
    assert any("left no time to test" in note for note in notes) != tested
    assert module.batches == 6 * [16], "training is unchanged"


@pytest.mark.parametrize("module", [ByHand(), Points(nn.BatchNorm1d(12))])
def test_no_note_on_time_without_anything_to_test(module):
    assert not any("left no time" in note for note in fit(module, time_limit=1e-3))


@pytest.fixture
def why(caplog):
    caplog.set_level(logging.DEBUG, "autobatch")
    return lambda: [each.message for each in caplog.records if "tested" in each.message]


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (Random, {}, "the same batch gave gradients"),
        (Stubborn, {}, "a batch has 16 samples"),
        (Silent, {"size": 24, "whole": 2}, "returned no loss"),
    ],
)
def test_undecided_test_has_no_note_and_training_continues(module, options, reason, why):
    trained = module()

    notes = fit(trained, **options)

    assert not has_note(notes)
    assert trained.batches
    assert reason in why()[0]


def test_batch_without_one_row_per_sample_is_not_split(why):
    class Odd(Points):
        def training_step(self, batch, batch_idx):
            x, _ = batch
            return super().training_step((x, x[:, :4].argmax(1)), batch_idx)

    def collated(samples):
        return torch.stack([x for x, _ in samples]), {"count": len(samples)}

    notes = fit(Odd(), DataLoader(points(), 8, collate_fn=collated))

    assert not has_note(notes)
    assert "a int in a batch" in why()[0]


def test_out_of_memory_has_no_note_and_memory_is_freed(why, monkeypatch):
    device = SimulatedAccelerator("64MiB")
    monkeypatch.setattr(
        "autobatch.lightning._accumulation.memory_budget", lambda *_: device.ledger.current
    )
    callback = autobatch.AutoBatch(plan=autobatch.BatchPlan(16, 4), device=device)
    module = Contrastive()

    quiet_trainer(callback, max_epochs=1).fit(module, DataLoader(points(), 8))

    assert not has_note(callback.report.notes)
    assert "OutOfMemoryError" in why()[0]
    assert module.batches == 6 * [16]


def test_manual_optimization_is_not_tested(why):
    assert not has_note(fit(ByHand()))
    assert why() == []


def test_test_leaves_no_trace_in_training():
    """Weights and random numbers after training equal those of a run without a test."""

    def trained(module):
        torch.manual_seed(3)
        module.load_state_dict(initial)
        fit(module)
        return [*module.parameters(), torch.rand(3)]

    class Drawing(Contrastive):
        def loss(self, x, y):
            self.seen = getattr(self, "seen", 0) + 1
            return super().loss(x, y) + 0.01 * torch.rand(()) * self.net[0].weight.sum()

    class Untested(Drawing):
        pass

    initial = {k: v.clone() for k, v in Drawing().state_dict().items()}
    tested, untested = Drawing(), Untested()
    one = trained(tested)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autobatch.lightning._accumulation.SplittingTest._tested", lambda *_: None)
        other = trained(untested)

    assert tested.seen == untested.seen
    assert all(map(torch.equal, one, other))


def test_tune_alone_has_the_note():
    module = Contrastive()
    callback = autobatch.AutoBatch(
        target_batch_size=64,
        max_micro_batch_size=16,
        device=SimulatedAccelerator("64MiB"),
        steps_per_trial=1,
    )

    report = callback.tune(quiet_trainer(), module, DataLoader(points(), 8))

    assert has_note(report.notes)
    assert module.batches == []


# The batch that is split


@pytest.fixture
def batches(monkeypatch):
    """Batches that are split."""
    seen = []
    monkeypatch.setattr(
        "autobatch.lightning._accumulation.split_gradient",
        lambda _, batch, samples, **__: seen.append((batch, samples)),
    )
    return seen


def test_split_batch_holds_ordinary_samples_each_once(batches):
    texts = Texts()

    fit(Tokens(), DataLoader(texts, 8, collate_fn=Texts.padded))

    ((batch, samples),) = batches
    taken = [tuple(row[row > 0].tolist()) for row in batch]
    assert samples == len(taken) == 16
    assert len({len(each) for each in taken}) > 3
    assert len(set(taken)) == 16
    assert set(taken) <= {tuple(text.tolist()) for text in texts.texts}


@pytest.mark.parametrize(("size", "samples"), [(2, 2), (15, 14), (32, 32), (33, 32), (48, 32)])
def test_split_batch_has_an_even_size_up_to_32(batches, size, samples):
    fit(Points(), size=size, whole=2)

    ((batch, said),) = batches
    assert said == samples == len(batch[0])


def test_worst_case_batch_is_split(batches):
    made = []

    def largest(size):
        made.append(size)
        return torch.ones(size, 6), torch.zeros(size, dtype=torch.long)

    callback = autobatch.AutoBatch(
        plan=autobatch.BatchPlan(16, 4),
        device=SimulatedAccelerator("64MiB"),
        worst_case=largest,
    )

    callback.tune(quiet_trainer(), Points(), DataLoader(points(), 8))

    ((batch, samples),) = batches
    assert samples == len(batch[0]) == made[-1] == 16
