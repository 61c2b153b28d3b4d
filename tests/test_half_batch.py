"""Batches and modules that NoiseScale cannot measure by halves."""

from __future__ import annotations

import collections

import pytest
import torch

import autobatch
from test_noise_scale_lightning import KnownNoise, known_loader, read, reason_of


def test_one_half_runs_once_halves_have_added_up():
    class Counted(KnownNoise):
        calls = ()

        def training_step(self, batch, batch_idx):
            type(self).calls += (len(batch[0]),)
            return super().training_step(batch, batch_idx)

    read(autobatch.NoiseScale(split_every=5), Counted(), limit_train_batches=11)

    assert Counted.calls == (8, 4, 4, *[8] * 5, 4, *[8] * 5, 4)


def collated(make):
    """Return a loader whose batches are made of the tensor of a batch."""
    loader = known_loader()
    loader.collate_fn = lambda samples: make(torch.stack([x for (x,) in samples]))
    return loader


class Constant(KnownNoise):
    """Does not look at its batch."""

    def training_step(self, batch, batch_idx):
        return -self.w.sum()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: [x, torch.zeros(3)], "have 3, 8 rows"),
        (lambda _: [1, 2], "have no rows"),
        (lambda x: [x, object()], "plain containers"),
    ],
)
def test_batch_without_two_halves_is_not_measured(make, reason):
    reading = read(autobatch.NoiseScale(), Constant(), collated(make), limit_train_batches=3)

    assert reason in reason_of(reading)


def test_samples_in_mappings_of_other_classes_are_counted():
    class Named(KnownNoise):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch["x"]], batch_idx)

    loader = collated(lambda x: collections.UserDict(x=x, names=["a"] * len(x)))

    reading = read(autobatch.NoiseScale(split_every=1), Named(), loader)

    assert reading.batch_size == 8
    assert reading.samples == pytest.approx(4, rel=0.3)
