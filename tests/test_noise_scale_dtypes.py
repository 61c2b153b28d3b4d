"""The gradient noise scale of parameters of every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autobatch
from lightning_here import pl
from test_noise_scale import WIDTH, measured
from test_noise_scale_lightning import known_loader, read

DTYPES = [torch.float64, torch.complex64, torch.complex128]


class Weighted(nn.Module):
    """A loss with the gradient -x; complex weights hold two of the six numbers each."""

    def __init__(self, dtype):
        super().__init__()
        width = WIDTH // 2 if dtype.is_complex else WIDTH
        self.w = nn.Parameter(torch.zeros(width, dtype=dtype))

    def forward(self, x):
        w = torch.view_as_real(self.w).flatten() if self.w.is_complex() else self.w
        return -(x.to(w.dtype) @ w).mean()


class Trained(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD([self.net.w], 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_in_a_loop_is_that_of_float32(dtype):
    expected = measured(Weighted(torch.float32))

    reading = measured(Weighted(dtype))

    assert (reading.state, reading.windows) == ("ok", expected.windows)
    assert reading.samples == pytest.approx(expected.samples, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_in_a_trainer_is_that_of_float32(dtype, accumulate):
    def reading(dtype):
        noise = autobatch.NoiseScale(every=1, split_every=1)
        options = {"accumulate_grad_batches": accumulate}
        return read(noise, Trained(Weighted(dtype)), known_loader(length=8 * 120), **options)

    expected, found = reading(torch.float32), reading(dtype)

    assert found.windows == expected.windows > 0
    assert found.low == pytest.approx(expected.low, rel=1e-3)


class Float8(Weighted):
    """Has gradients of which torch cannot compute a norm; one per update, as they do not add up."""

    def __init__(self):
        super().__init__(torch.float32)
        self.small = nn.Parameter(torch.ones(WIDTH).to(torch.float8_e4m3fn))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 4 != 1:
            return super().forward(x)
        self.small.grad = None
        return super().forward(x * self.small.to(torch.float32))


def test_gradients_without_a_norm_are_unavailable():
    model = Float8()

    reading = measured(model, torch.optim.SGD([model.w], 0.0))

    assert reading.state == "unavailable"
    assert "a gradient has no norm" in reading.reason
    assert model.calls == 480


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_without_a_norm_do_not_end_training(accumulate):
    model = Trained(Float8())
    noise = autobatch.NoiseScale(every=1, split_every=1)

    reading = read(noise, model, accumulate_grad_batches=accumulate)

    assert reading.state == "unavailable"
    assert model.net.small.grad is not None
    assert model.net.calls == 160
