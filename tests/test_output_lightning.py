"""Output of AutoBatch in a Trainer: progress beside its bars, and streams that fail."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch

from autobatch import BatchPlan, NoiseScale
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, pl, plain, quiet_trainer, tuner

ERASE = "\r\x1b[2K"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def fit_on(stdout, stderr, *callbacks, callback=None, **options):
    """Return a fitted model, the Trainer and the callback, after a run with other streams."""
    model = Model()
    callback = callback or tuner(plan=BatchPlan(60, 2), verbose=True)
    trainer = quiet_trainer(callback, *callbacks, **options)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        trainer.fit(model, plain(), val_dataloaders=plain())
    return model, trainer, callback


def texts_of(terminal):
    return [part for part in terminal.getvalue().split(ERASE) if part.startswith("autobatch · ")]


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar", None])
def test_progress_is_shown_beside_the_bar_of_a_trainer(bar, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    bars = [getattr(pl.callbacks, bar)()] if bar else []
    terminal, out = Terminal(), Terminal()

    _, _, callback = fit_on(
        out, terminal, *bars, callback=tuner(verbose=True), enable_progress_bar=bool(bar)
    )

    phases = list(dict.fromkeys(tuple(text.split(" · ")[1:3]) for text in texts_of(terminal)))
    assert phases[0] == ("reading batches",)
    assert ("validation", "checking the plan") in phases
    names = list(dict.fromkeys(phase[0] for phase in phases))
    assert names == ["reading batches", "searching", "checking the plan", "validation"]
    assert "\x1b[?25l" not in terminal.getvalue().partition("Epoch")[0]  # the cursor stays
    assert callback.report.plan.effective_batch_size == 120
    assert "= 120 per update" in out.getvalue()


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_between_epochs_is_erased_before_the_bar_goes_on(bar, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal, out = Terminal(), Terminal()

    fit_on(
        out,
        terminal,
        getattr(pl.callbacks, bar)(),
        callback=tuner(retune_at_epochs=[1], verbose=True),
        enable_progress_bar=True,
    )

    assert len(texts_of(terminal)) > 10
    assert all("\n" not in text for text in texts_of(terminal)[:-1])
    assert out.getvalue().count("= 120 per update") == 2


def test_nothing_is_printed_if_not_verbose():
    terminal, out = Terminal(), io.StringIO()

    _, _, callback = fit_on(out, terminal, callback=tuner(plan=BatchPlan(60, 2), verbose=False))

    assert "autobatch" not in terminal.getvalue() + out.getvalue()
    assert callback.report.plan.effective_batch_size == 120


def test_a_resumed_run_prints_one_line(tmp_path):
    _, trainer, callback = fit_on(io.StringIO(), io.StringIO(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    out = io.StringIO()

    resumed = tuner(verbose=True)
    with contextlib.redirect_stdout(out):
        quiet_trainer(resumed, max_epochs=2).fit(
            Model(), plain(), plain(), ckpt_path=tmp_path / "last.ckpt"
        )

    assert resumed.report.plan == callback.report.plan
    (line,) = out.getvalue().splitlines()
    assert line.startswith("autobatch - Micro-batch ")
    assert "= 120 per update - resumed, verified by one trial in " in line


# Seconds


class Slow(Model):
    """A module that takes a second per training step and 100 per validation step, by its clock."""

    seconds = 0.0

    def training_step(self, batch, batch_idx):
        Slow.seconds += 1  # attributes of the object are restored
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        Slow.seconds += 100

    def on_train_start(self):
        self.tuned_at = Slow.seconds


def test_the_seconds_of_the_report_are_those_of_all_trials(monkeypatch):
    model, callback = Slow(), tuner(plan=BatchPlan(60, 2), verbose=True)
    monkeypatch.setattr(SimulatedAccelerator, "clock", lambda _: Slow.seconds)

    quiet_trainer(callback, num_sanity_val_steps=0, limit_train_batches=1).fit(
        model, plain(), plain()
    )

    assert model.tuned_at > 300  # with those of validation
    assert callback.report.search_seconds == model.tuned_at


# Standard output that cannot be written to


@contextlib.contextmanager
def missing():
    yield None


@contextlib.contextmanager
def closed():
    stream = io.StringIO()
    stream.close()
    yield stream


@contextlib.contextmanager
def full():
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as stream:
        yield stream


@contextlib.contextmanager
def without_reader():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with contextlib.suppress(OSError), os.fdopen(write_end, "w") as stream:
        yield stream


class Tee:
    """A stand-in for a stream as people write it: nothing but `write`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (missing, None),
        (closed, "I/O operation on closed file"),
        (full, "No space left on device"),
        (without_reader, "Broken pipe"),
    ],
)
def test_training_goes_on_without_a_standard_output(broken, why, caplog):
    with broken() as stream:
        model, _, callback = fit_on(stream, stream)

    ours = [record for record in caplog.records if record.name == "autobatch"]
    warnings = [r.getMessage() for r in ours if r.getMessage().startswith("The report could")]
    assert [why in text for text in warnings] == ([] if why is None else [True])
    assert model.sizes == [60] * 20
    assert callback.report.plan == BatchPlan(60, 2)


def test_a_completed_report_that_cannot_be_printed_is_not_told_again(caplog):
    with full() as stream:
        fit_on(stream, io.StringIO(), NoiseScale())

    told = [record for record in caplog.records if "could not be printed" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]


def test_a_stand_in_with_nothing_but_write_gets_the_report():
    tee = Tee()

    fit_on(tee, io.StringIO())

    assert "= 120 per update" in tee.text


def test_output_does_not_change_training():
    def weights(*streams, **options):
        pl.seed_everything(1, verbose=False)
        model, *_ = fit_on(*streams, **options)
        return [parameter.detach().clone() for parameter in model.parameters()]

    shown = weights(Terminal(), Terminal())
    silent = weights(
        io.StringIO(), io.StringIO(), callback=tuner(plan=BatchPlan(60, 2), verbose=False)
    )

    assert all(map(torch.equal, shown, silent))
