"""A micro-batch that runs out of memory is undone and run again in pieces."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from autobatch.lightning._survival.repeats import PieceLimit
from lightning_here import pl
from sameness import same
from surviving import (
    SAMPLES,
    Trained,
    allocations,
    by_hand,
    quick_collections,
    torchmetrics,
    trained,
)

HALVES = [3, 3]
MixedPrecision = pl.plugins.precision.MixedPrecision


every_network = pytest.mark.parametrize(
    ("network", "every"),
    [
        ("norm and dropout", 4),
        pytest.param("norm and dropout", 1, marks=pytest.mark.slow),
        pytest.param("transformer", 2, marks=pytest.mark.slow),
        pytest.param("residual", 2, marks=pytest.mark.slow),
    ],
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_collections():
        yield


@pytest.fixture
def whole_first(monkeypatch):
    """Let each micro-batch begin as a whole, also after a failure."""
    monkeypatch.setattr(PieceLimit, "pieces", lambda *_: 1)


def refusals_at(count, every=1):
    """Return one window for each allocation that is refused, or for every n-th and the last."""
    return [[at] for at in sorted({*range(1, count + 1, every), count})]


def test_training_without_a_failure_is_the_same_to_the_bit():
    optimizer, gradients = by_hand(plain := Trained(), {}, accumulate=2, count=3)

    run = trained(Trained(), accumulate=2, count=3)

    assert run.survived == ()
    assert same(run.refusing.gradients, gradients)
    assert same(run.optimizer_state, optimizer.state_dict()["state"])
    assert same(run.module.net.state_dict(), plain.net.state_dict())


@pytest.mark.usefixtures("whole_first")
@every_network
def test_a_failing_micro_batch_is_as_if_cut_by_hand(network, every):
    refusals = refusals_at(allocations(Trained(network)), every)
    expected = Trained(network)
    optimizer, gradients = by_hand(expected, {0: HALVES}, count=len(refusals))

    run = trained(Trained(network), refusals)

    assert [(each.samples, each.pieces) for each in run.survived] == [(6, 2)] * len(refusals)
    assert same(run.refusing.gradients, gradients)
    assert same(run.optimizer_state, optimizer.state_dict()["state"])
    assert same(run.module.net.state_dict(), expected.net.state_dict())
    assert run.module.sizes == HALVES * len(refusals)
    assert run.module.seen == SAMPLES * len(refusals)


def is_of(gradients, *wholes):
    """Check that each gradient is that of one of the ways to run the micro-batch."""
    return all(
        any(torch.equal(gradient, whole[name]) for whole in wholes)
        for name, gradient in gradients.items()
    )


@pytest.mark.usefixtures("whole_first")
@every_network
def test_later_in_a_window_each_gradient_is_of_the_whole_or_the_pieces(network, every):
    make = partial(Trained, network, torch.optim.SGD, 0.0)
    place = {"accumulate": 4, "position": 2}
    (whole,) = by_hand(make(), {}, accumulate=4)[1]
    (halves,) = by_hand(make(), {2: HALVES}, accumulate=4)[1]

    run = trained(make(), refusals_at(allocations(make(), **place), every), **place)

    found = run.refusing.gradients
    assert all(gradients.keys() == whole.keys() for gradients in found)
    assert all(is_of(gradients, whole, halves) for gradients in found)
    assert sum(same(gradients, halves) for gradients in found) > len(found) / 2
    assert not all(same(gradients, halves) for gradients in found)  # some parameters were done


PRECISIONS = {
    "bf16": ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "fp16 scaler": (
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
        {"autocast": torch.float16, "scale": 2.0**16},
    ),
}


@pytest.mark.usefixtures("whole_first")
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) for each in PRECISIONS]
)
def test_sixteen_bits_give_the_gradients_of_pieces(name):
    options, at_hand = PRECISIONS[name]
    make = partial(Trained, optimizer=torch.optim.SGD, rate=0.0)
    (halves,) = by_hand(make(), {0: HALVES}, **at_hand)[1]
    refusals = refusals_at(allocations(make(), **options), 2)

    run = trained(make(), refusals, **options)

    assert all(same(gradients, halves) for gradients in run.refusing.gradients)


@pytest.mark.usefixtures("whole_first")
@pytest.mark.parametrize(
    ("network", "place"),
    [
        ("deterministic", {"accumulate": 4, "position": 1}),
        pytest.param("transformer without dropout", {}, marks=pytest.mark.slow),
    ],
)
def test_without_random_numbers_training_ends_as_if_nothing_had_failed(network, place):
    make = partial(lambda: Trained(network, torch.optim.SGD).double())
    options = {"precision": "64-true", "dtype": torch.float64, **place}
    refusals = refusals_at(allocations(make(), **options), 9)
    never = trained(make(), count=len(refusals), **options)

    run = trained(make(), refusals, **options)

    assert len(run.survived) == len(refusals)
    for name, value in run.module.state_dict().items():
        assert torch.allclose(value, never.module.state_dict()[name], rtol=0, atol=1e-12)
    for row, expected in zip(run.refusing.rows, never.refusing.rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    shown, expected = run.trainer.callback_metrics, never.trainer.callback_metrics
    assert torch.allclose(shown["loss_epoch"], expected["loss_epoch"])
    assert torch.equal(shown["accuracy"], expected["accuracy"])


@pytest.mark.usefixtures("whole_first")
def test_second_failures_in_the_pieces_are_survived():
    make = partial(lambda: Trained("deterministic", torch.optim.SGD).double())
    options = {"precision": "64-true", "dtype": torch.float64, "accumulate": 2, "position": 1}
    count = allocations(make(), **options)
    # The loss is tested in the first window; later ones fail in a piece
    refusals = [
        [count],
        *([first, second] for first in (2, count - 3) for second in range(3, 40, 5)),
    ]
    never = trained(make(), count=len(refusals), **options)

    run = trained(make(), refusals, **options)

    assert {each.pieces for each in run.survived} == {2, 3}
    for name, value in run.module.state_dict().items():
        assert torch.allclose(value, never.module.state_dict()[name], rtol=0, atol=1e-12)


class AddsGradients(Trained):
    """Makes a gradient of its own before each backward pass, and runs out of memory after it once."""

    def on_before_backward(self, loss):
        for each in self.net.parameters():
            each.grad = torch.full_like(each, 0.5)

    def on_after_backward(self):
        if self.sizes == [SAMPLES]:
            raise torch.OutOfMemoryError("CUDA out of memory.")


class ScalesGradients(Trained):
    """Changes gradients before the backward pass, which fails in the second micro-batch."""

    def backward(self, loss):
        if self.sizes[1:] == [SAMPLES]:
            for each in self.net.parameters():
                each.grad *= 2
                each.grad /= 2
            loss.register_hook(self.fail)
        loss.backward()

    def fail(self, _):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_gradient_that_a_hook_makes_before_the_backward_pass_is_not_lost():
    make = partial(AddsGradients, "deterministic", torch.optim.SGD, 0.0)
    (whole,) = by_hand(make(), {})[1]

    run = trained(make(), count=1)

    assert len(run.survived) == 1
    (found,) = run.refusing.gradients
    assert all(torch.allclose(found[name], whole[name] + 0.5) for name in whole)


class KeepsGradients(Trained):
    """Never resets gradients, and runs out of memory after its second backward pass if `fails`."""

    fails = True

    def optimizer_zero_grad(self, *_):
        pass

    def on_after_backward(self):
        if self.fails and self.sizes == [SAMPLES] * 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_gradients_that_a_module_does_not_reset_are_not_lost():
    make = lambda kind: kind("deterministic", torch.optim.SGD, 0.0)  # noqa: E731
    never = trained(make(type("", (KeepsGradients,), {"fails": False})), count=2)

    run = trained(make(KeepsGradients), count=2)

    assert len(run.survived) == 1
    assert same(run.refusing.gradients, never.refusing.gradients)


def test_gradients_that_a_module_changes_before_its_backward_pass_are_not_done():
    make = partial(ScalesGradients, "deterministic", torch.optim.SGD, 0.0)
    (halves,) = by_hand(make(), {1: HALVES}, accumulate=2)[1]

    run = trained(make(), count=1, accumulate=2)

    assert len(run.survived) == 1
    assert same(run.refusing.gradients[0], halves)


class FailsLate(Trained):
    """Runs out of memory in the third micro-batch."""

    def __init__(self):
        super().__init__("deterministic")
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.change(batch_idx, loss.detach())
        if batch_idx == 2 and len(batch[1]) == SAMPLES:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


class ReplacesMetric(FailsLate):
    def change(self, batch_idx, loss):
        self.mean(loss)


class WritesIntoMetric(FailsLate):
    def change(self, batch_idx, loss):
        self.mean.update(loss)


class WritesAgain(FailsLate):
    """Updates the metric in place, then by its forward method, then in place again."""

    def change(self, batch_idx, loss):
        (self.mean if batch_idx == 1 else self.mean.update)(loss)


@pytest.mark.parametrize("kind", [ReplacesMetric, WritesIntoMetric, WritesAgain])
def test_metrics_count_no_piece_twice_however_they_are_updated(kind):
    run = trained(kind(), count=4)

    assert len(run.survived) == 1
    assert run.module.mean.weight == len(run.module.sizes) == 6


class BeginsList(FailsLate):
    def change(self, batch_idx, loss):
        if batch_idx == 1:
            self.later = []
        if batch_idx >= 1:
            self.later.append(self.sizes[-1])


def test_list_that_was_made_in_training_is_restored():
    run = trained(BeginsList(), count=4)

    assert run.module.later == run.module.sizes[1:] == [SAMPLES, *HALVES, *HALVES]
