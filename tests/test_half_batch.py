"""Batches and modules that NoiseScale cannot measure by halves."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from lightning_here import pl, quiet_trainer
from test_noise_scale_lightning import KnownNoise, read


def test_one_half_runs_once_halves_have_added_up():
    class Counted(KnownNoise):
        calls = ()

        def training_step(self, batch, batch_idx):
            type(self).calls += (len(batch[0]),)
            return super().training_step(batch, batch_idx)

    read(autobatch.NoiseScale(split_every=5), Counted(), limit_train_batches=11)

    assert Counted.calls == (8, 4, 4, *[8] * 5, 4, *[8] * 5, 4)


class Blind(pl.LightningModule):
    """Trains on any batch, without a look at it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return self.w.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([torch.zeros(4), torch.zeros(3)], "have 3, 4 rows"),
        ([1, 2], "have no rows"),
        ([torch.zeros(4), object()], "plain containers"),
        ([torch.zeros(1)], "one sample"),
        (collections.UserDict(ids=torch.zeros(4, 2), names=["a", "b", "c", "d"]), "updates"),
    ],
)
def test_batch_without_two_halves_is_not_measured(batch, reason):
    noise = autobatch.NoiseScale()

    quiet_trainer(noise, max_epochs=1).fit(
        Blind(), DataLoader(range(4), collate_fn=lambda _: batch)
    )

    assert reason in noise.reading.reason
    assert ("cannot be compared" in noise.reading.reason) is isinstance(batch, list)
