"""A loop that ignores its batch size is noticed by its memory, without false alarms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator


def loop(loader_of, features=16, width=64):
    """Return a training loop over the loader that a function of the batch size returns."""
    model = torch.nn.Sequential(
        torch.nn.Linear(features, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(batch_size, accumulate):
        batches = itertools.chain.from_iterable(itertools.repeat(loader_of(batch_size)))
        for i, (x, y) in enumerate(batches, 1):
            (torch.nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                yield

    return train


def samples(count, features=16):
    return TensorDataset(torch.randn(count, features), torch.zeros(count, dtype=torch.long))


# With 16 and 24, trials run with and without accumulation
@pytest.mark.parametrize("target", [16, 24, 32, 64, 256, None])
def test_a_loop_with_a_size_of_its_own_is_refused(target):
    own = DataLoader(samples(500), batch_size=16)

    with pytest.raises(ValueError, match=r"^Memory use was identical at batch_size=8 and at"):
        autobatch.find(
            loop(lambda _: own),
            dataset_size=500,
            device=SimulatedAccelerator("1MiB"),
            target_batch_size=target,
        )


def test_sizes_run_only_to_be_timed_show_a_loop_with_a_size_of_its_own():
    own = DataLoader(samples(500), batch_size=16)

    with pytest.raises(ValueError, match=r"^Memory use was identical at batch_size=\d and at"):
        autobatch.find(
            loop(lambda _: own),
            device=SimulatedAccelerator("1MiB"),
            target_batch_size=8,
            timing_seconds=60,
        )


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("count", [20, 25, 64, 500])
@pytest.mark.parametrize(("features", "width"), [(1, 1), (16, 64)])
def test_no_loop_that_follows_its_size_is_refused(steps, count, features, width):
    data = samples(count, features)

    report = autobatch.find(
        loop(lambda size: DataLoader(data, size), features, width),
        dataset_size=count,
        device=SimulatedAccelerator("1MiB"),
        steps_per_trial=steps,
        prefer="largest",
    )

    assert report.plan.micro_batch_size == count
