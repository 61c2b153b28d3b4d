"""Batches and modules that NoiseScale cannot measure by halves."""

from __future__ import annotations

import collections
import importlib

import pytest
import torch

import autobatch
from test_noise_scale_lightning import KnownNoise, read

half_batch = importlib.import_module("autobatch.lightning._half_batch")


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
    with pytest.raises(half_batch.NotDividedError, match=reason):
        half_batch._samples_of(batch)


def test_samples_in_mappings_of_other_classes_are_counted():
    batch = collections.UserDict(ids=torch.zeros(4, 2), names=["a", "b", "c", "d"])

    assert half_batch._samples_of(batch) == 4
