"""Gradient of a batch in two halves, on losses with a known difference."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autobatch._accumulation import (
    BatchNorms,
    UndecidedError,
    batch_norms,
    split_gradient,
    without_dropout,
)
from sameness import same

SAMPLES = 16


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def batch_of(samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator)
    return x, x[:, :4].argmax(1)


def mean(net, x, y):
    return F.cross_entropy(net(x), y)


def contrastive(net, x, y):
    z = F.normalize(net(x))
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def gradient_of(loss, net):
    weights = list(net.parameters())
    return lambda batch: torch.autograd.grad(loss(net, *batch), weights, allow_unused=True)


def split(loss, net, *, threshold):
    return split_gradient(gradient_of(loss, net), batch_of(), SAMPLES, threshold)


def test_change_is_the_distance_over_the_norm_of_the_whole_gradient(net):
    x, y = batch_of()
    gradient = gradient_of(contrastive, net)
    flat = [
        torch.cat([each.flatten().double() for each in gradient(part)])
        for part in ((x, y), (x[:8], y[:8]), (x[8:], y[8:]))
    ]
    expected = ((flat[1] + flat[2]) / 2 - flat[0]).norm() / flat[0].norm()

    found = split(contrastive, net, threshold=0.01)

    assert found.change == pytest.approx(expected.item(), rel=1e-5)


def test_change_below_the_threshold_is_none(net):
    change = split(contrastive, net, threshold=0.01).change

    assert split(contrastive, net, threshold=0.99 * change) is not None
    assert split(contrastive, net, threshold=1.01 * change) is None


def test_unused_weights_have_no_effect(net):
    unused = nn.Linear(2, 2)
    weights = [*unused.parameters(), *net.parameters()]
    gradient = lambda batch: torch.autograd.grad(  # noqa: E731
        mean(net, *batch), weights, allow_unused=True
    )

    assert split_gradient(gradient, batch_of(), SAMPLES, 0.01) is None


def test_weights_used_by_one_half_only_count(net):
    def gradient(batch):
        x, _ = batch
        first = bool((x[0] == batch_of()[0][0]).all())
        return [torch.ones(1) if first else None, torch.full((1,), 3.0)]

    found = split_gradient(gradient, batch_of(), SAMPLES, 0.01)

    # The first weight: 1 and none in the halves, 0.5 on average, and 1 in the whole
    assert found.change == pytest.approx(0.5 / 10**0.5)


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_gradient_without_a_finite_norm_is_undecided(number):
    with pytest.raises(UndecidedError, match="norm of"):
        split_gradient(lambda _: [torch.full((2,), number)], batch_of(), SAMPLES, 0.01)


def test_gradient_of_half_a_batch_that_is_not_finite_is_undecided():
    def gradient(batch):
        return [torch.full((2,), 1.0 if len(batch[0]) == SAMPLES else torch.nan)]

    with pytest.raises(UndecidedError, match="half a batch"):
        split_gradient(gradient, batch_of(), SAMPLES, 0.01)


# Containers


def test_halves_and_the_whole_are_compared_in_the_containers_of_the_batch():
    seen = []
    x, y = batch_of()

    def wrapped(x, y):
        names = [str(each) for each in y.tolist()]
        return collections.UserDict(x=x, more=[(y, names), {"mask": None}])

    split_gradient(
        lambda batch: seen.append(batch) or [torch.ones(1)], wrapped(x, y), SAMPLES, 0.01
    )

    rows = (slice(0, 8), slice(8, 16), slice(0, 16))
    for part, these in zip(seen, rows, strict=True):
        assert same(dict(part), dict(wrapped(x[these], y[these])))


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor(1.0),
        torch.ones(SAMPLES + 1, 2),
        (torch.ones(SAMPLES), torch.ones(3, SAMPLES)),
        {"x": torch.ones(SAMPLES), "longest": 57},
        [["a", "b"], torch.ones(SAMPLES)],
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
)
def test_batch_without_one_row_per_sample_is_not_split(batch):
    with pytest.raises(UndecidedError):
        split_gradient(lambda _: [torch.ones(1)], batch, SAMPLES, 0.01)


def test_step_that_writes_into_its_batch_changes_no_other_part(net):
    def writes(net, x, y):
        return mean(net, x.mul_(2), y)

    x, y = batch_of()
    kept = x.clone()

    found = split_gradient(gradient_of(writes, net), (x, y), SAMPLES, 0.01)

    assert found is None
    assert torch.equal(x, kept)


# Layers


def test_layers_with_batch_statistics_are_counted():
    net = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3).eval(),  # running statistics
        nn.BatchNorm3d(3, track_running_stats=False).eval(),  # has none
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3),
        nn.GroupNorm(1, 3),
    )

    assert batch_norms(net.modules()) == BatchNorms(alone=2, together=1)
    assert not batch_norms(nn.Linear(1, 1).modules())


def test_dropout_is_off_and_then_restored():
    net = nn.ModuleDict(
        {
            "drop": nn.Dropout(0.5),
            "attention": nn.MultiheadAttention(4, 1, dropout=0.5),
            "recurrent": nn.LSTM(4, 4, 2, dropout=0.5),
            "norm": nn.BatchNorm1d(4),
            "off": nn.Dropout(0.5).eval(),
        }
    )
    ones = torch.ones(64)

    with without_dropout(net):
        assert torch.equal(net["drop"](ones), ones)
        assert net["attention"].dropout == net["recurrent"].dropout == 0.0
        assert net["norm"].training

    assert net["drop"].training
    assert not net["off"].training
    assert net["attention"].dropout == net["recurrent"].dropout == 0.5
