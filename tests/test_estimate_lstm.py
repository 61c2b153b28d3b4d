"""LSTMs in an estimate: cuDNN's allocations, and peaks that were measured on an H200."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import autobatch
from autobatch._memory.estimate.scratch import Gpu


class Sequences(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(16, 64, 2, batch_first=True, **options)

    def forward(self, x):
        return self.lstm(x)[0].square().mean()


@cache
def estimated(precision, **options):
    return autobatch.estimate(
        Sequences(**options),
        lambda model, x: model(x),
        torch.randn(2, 32, 16),
        precision=precision,
        device="H200",
        memory_limit="2GiB",
    )


@pytest.mark.parametrize(("precision", "itemsize"), [("bf16-mixed", 2), ("32-true", 4)])
def test_an_lstm_holds_its_output_and_the_reserve_of_cudnn(precision, itemsize):
    samples, length, width = 512, 32, 64
    weights = sum(parameter.numel() for parameter in Sequences().parameters())

    peak = estimated(precision).at(samples)

    # Four gates and a cell in each of two layers, a value between them, and the output
    values = samples * length * width * (2 * 5 + 1 + 1)
    first_states = 2 * 2 * samples * width
    casts = samples * length * 16 + weights if precision == "bf16-mixed" else 0
    assert peak.activations["lstm"] == itemsize * (values + first_states + casts)


def test_lstms_that_were_not_measured_have_a_wider_band():
    plain, other = estimated("bf16-mixed"), estimated("bf16-mixed", bidirectional=True, dropout=0.5)

    assert (plain.band_share, plain.untested) == (pytest.approx(0.10), ())
    assert other.band_share == pytest.approx(0.15)
    assert other.untested == ("LSTMs other than of two layers in one direction",)
    # The random state of dropout is there once, and all else twice but for the inputs
    state = 24 * Gpu().multiprocessors * Gpu().threads
    grown = other.at(512).held["activations"] - state
    assert 1.9 < grown / plain.at(512).held["activations"] < 2


def test_predicted_peaks_of_an_lstm_agree_with_those_of_an_h200(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from estimate import compared, mean_error

    rows = list(compared(["lstm T64"]))

    assert len(rows) == 4
    assert all(row.is_within for row in rows)
    assert mean_error(rows, "LSTM") <= 0.02
