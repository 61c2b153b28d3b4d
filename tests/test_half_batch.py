"""Batches and modules that NoiseScale cannot measure by halves."""

from __future__ import annotations

import collections

import pytest
import torch

import autobatch
from autobatch._trials import batches
from test_noise_scale_lightning import KnownNoise, read


def test_one_half_runs_once_halves_have_added_up():
    class Counted(KnownNoise):
        calls = ()

        def training_step(self, batch, batch_idx):
            type(self).calls += (len(batch[0]),)
            return super().training_step(batch, batch_idx)

    read(autobatch.NoiseScale(split_every=5), Counted(), limit_train_batches=11)

    assert Counted.calls == (8, 4, 4, *[8] * 5, 4, *[8] * 5, 4)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([torch.zeros(4), torch.zeros(3)], "have 3, 4 rows"),
        ([1, 2], "have no rows"),
        ([torch.zeros(4), object()], "plain containers"),
        ([torch.zeros(1)], "one sample"),
    ],
)
def test_batch_without_two_halves_is_refused(batch, reason):
    with pytest.raises(batches.NotDividedError, match=reason):
        batches.divisible_samples(batch)


def test_samples_in_mappings_of_other_classes_are_counted():
    batch = collections.UserDict(ids=torch.zeros(4, 2), names=["a", "b", "c", "d"])

    assert batches.divisible_samples(batch) == 4
