"""Whole trainings in which memory runs out: the same weights, few failures, all of them shown."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from autobatch._memory.ledger import Ledger
from autobatch.lightning._survival.repeats import PieceLimit
from autobatch.report import Survived, TuningReport
from lightning_here import QUICK, Model, data, pl, quiet_trainer
from surviving import SPLIT, quick_collections

LONG = 20  # times the length of other samples
BATCH = 32


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_collections():
        yield


class Reader(pl.LightningModule):
    """Reads sequences; memory goes by their length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)).double()
        self.sizes = []
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        loss = F.cross_entropy(self.net(x).mean(1), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(self.count)
        return optimizer

    def count(self, *_):
        self.steps += 1


class Memory(pl.Callback):
    """A device with as many bytes as `limit` returns for the index of a batch; None: enough."""

    def __init__(self, limit):
        self.limit, self.ledger, self.watch = limit, Ledger(), contextlib.ExitStack()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ledger.attach(module, *trainer.optimizers)
        self.watch.enter_context(self.ledger.watching(self.limit(batch_idx), 0))

    def on_train_batch_end(self, *_):
        self.watch.close()

    def on_exception(self, *_):
        self.watch.close()


def sequences(lengths):
    """Return one batch of each length."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in lengths:
        x = torch.randn(BATCH, length, 1, generator=generator, dtype=torch.float64)
        made.append((x, (x.mean((1, 2)) > 0).long()))
    return DataLoader(made, batch_size=None)


def read(lengths, limit, module=None, **options):
    callback, module = autobatch.AutoBatch(**SPLIT), module or Reader()
    memory = Memory(limit)  # keeps modules eager
    callbacks = [callback] if limit is None else [callback, memory]
    trainer = quiet_trainer(*callbacks, max_epochs=1, **options)
    trainer.fit(module, sequences(lengths))
    return module, callback, memory.ledger.peak, trainer.callback_metrics["loss"]


def peak_of(lengths):
    return read(lengths, lambda _: None)[2]


def same_weights(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


def test_one_batch_twenty_times_as_long_is_trained_on():
    lengths = [5] * 4 + [5 * LONG] + [5] * 4
    limit = int(1.3 * peak_of([5]))
    never, _, _, loss = read(lengths, lambda _: None, accumulate_grad_batches=2)

    module, callback, _, survived_loss = read(lengths, lambda _: limit, accumulate_grad_batches=2)

    (event,) = callback.survived
    assert (event.step, event.samples) == (2, BATCH)
    assert event.pieces >= LONG / 1.3
    assert module.sizes.count(BATCH) == 8  # also the shorter ones that follow
    assert module.steps == never.steps == 5
    assert same_weights(module, never)
    assert torch.allclose(loss, survived_loss, rtol=1e-12)


def test_neighbour_that_takes_half_of_the_memory_for_100_steps_costs_few_failures():
    lengths = [20] * 252
    peak = peak_of([20])

    module, callback, _, loss = read(
        lengths, lambda index: int((0.7 if 20 <= index < 120 else 1.3) * peak)
    )

    # Whole batches are tried again after 32, then 64, then 128 good ones
    assert [each.step for each in callback.survived] == [20, 53, 118]
    assert {each.pieces for each in callback.survived} == {2}
    assert module.sizes[-5:] == [BATCH] * 5
    assert module.steps == 252
    never, _, _, expected = read(lengths, lambda _: None)
    assert same_weights(module, never)
    assert torch.allclose(loss, expected, rtol=1e-12)


class Thrashing(Reader):
    """Has an allocator that fails again and again, a little after it has succeeded."""

    period, failing = 5, (0, 2)

    def __init__(self):
        super().__init__()
        self.calls = itertools.count(1)  # not restored after a failure, as a number would be

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if next(self.calls) % self.period in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def test_allocator_that_thrashes_never_makes_the_optimizer_step_twice(monkeypatch):
    monkeypatch.setattr(PieceLimit, "pieces", lambda *_: 1)
    never, _, _, expected = read([20] * 6, lambda _: None, accumulate_grad_batches=3)

    module, callback, _, loss = read(
        [20] * 6, lambda _: None, Thrashing(), accumulate_grad_batches=3
    )

    assert len(callback.survived) > 3
    assert max(each.pieces for each in callback.survived) > 2  # failed again in the pieces
    assert module.steps == never.steps == 2
    assert same_weights(module, never)
    assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_module_is_compiled_for_the_pieces(backend):
    class Compiled(Thrashing):
        period, failing = 3, (0,)

        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend=backend)

    never, _, _, expected = read([5] * 4, None)

    module, callback, _, loss = read([5] * 4, None, Compiled())

    assert callback.survived
    assert same_weights(module, never)
    assert torch.allclose(loss, expected, rtol=1e-12)


class Logger(pl.loggers.Logger):
    """Keeps scalars."""

    name = version = "kept"

    def __init__(self):
        super().__init__()
        self.scalars = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.scalars += [(name, value, step) for name, value in metrics.items()]


class FailsOnce(Model):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 3 and len(batch[0]) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def test_survival_is_shown_in_log_loggers_report_and_a_note(caplog):
    logger = Logger()
    callback = autobatch.AutoBatch(
        target_batch_size=16,
        max_micro_batch_size=8,
        prefer="largest",
        timing_seconds=0,
        device="simulated:1GiB",
        on_out_of_memory="split",
        **QUICK,
    )

    quiet_trainer(callback, max_steps=6, logger=logger).fit(
        FailsOnce(), DataLoader(data(200), batch_size=8)
    )

    (event,) = callback.survived
    assert (event.step, event.epoch, event.samples, event.pieces) == (3, 0, 8, 2)
    assert event.lost_seconds > 0
    assert "step 3: out of memory, micro-batch 8 done in 2 × 4" in caplog.text
    note = "4 micro-batches of 4 would have fitted."
    assert note in caplog.text
    assert [each for each in logger.scalars if each[0] == "autobatch/out_of_memory"] == [
        ("autobatch/out_of_memory", 1, 3)
    ]
    assert callback.report.survived == callback.survived
    assert note in str(callback.report).replace("\n    ", " ")
    stored = json.loads(callback.report.to_json())
    assert stored["survived"][0]["pieces"] == 2
    assert TuningReport.from_json(json.dumps(stored)).survived == (event,)


def test_second_fit_begins_without_the_failures_of_the_first():
    callback = autobatch.AutoBatch(**SPLIT)
    for model, expected in ((FailsOnce(), 1), (Model(), 0)):
        quiet_trainer(callback, max_steps=5).fit(model, DataLoader(data(80), batch_size=8))

        assert len(callback.survived) == expected


# The size of pieces


@given(
    nbytes=st.integers(1, 10**12),
    samples=st.integers(1, 4096),
    failures=st.lists(st.integers(1, 10**9)),
)
def test_pieces_are_at_most_the_one_that_succeeded_and_never_below_a_sample(
    nbytes, samples, failures
):
    limit = PieceLimit()
    for each in failures:
        limit.fail(each)

    pieces = limit.pieces(nbytes, samples)

    assert 1 <= pieces <= samples
    if failures and pieces < samples:
        assert nbytes <= pieces * failures[-1]
    if failures and pieces > 1:
        assert nbytes > (pieces - 1) * failures[-1]


def test_each_further_failure_doubles_the_wait_before_larger_pieces():
    limit = PieceLimit()
    waits = []
    for _ in range(4):
        limit.fail(50)
        good = 0
        while limit.pieces(100, 8) == 2:
            limit.succeed(2)
            good += 1
        waits.append(good)

    assert waits == [32, 64, 128, 256]


def test_a_survived_micro_batch_is_a_public_record():
    assert (
        Survived(step=1, epoch=0, samples=8, pieces=2, piece_size=4, lost_seconds=0.5).pieces == 2
    )
