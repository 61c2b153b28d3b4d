"""noise_scale() around a plain PyTorch loop."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autobatch
from sameness import same

WIDTH = 6


class Linear(nn.Module):
    """The loss -w·x has the gradient -x: its noise scale is that of the data."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return -(x @ self.w).mean()


def samples(count, generator):
    """Mean 0.5 and variance 1 in each of six directions: a noise scale of 6 / (6 * 0.25) = 4."""
    return 0.5 + torch.randn(count, WIDTH, generator=generator)


def train(
    model,
    optimizer,
    *,
    updates=120,
    accumulate=4,
    size=8,
    scale=1.0,
    before_step=lambda: None,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for _ in range(accumulate):
            (model(samples(size, generator)) * scale).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()


def measured(model=None, optimizer=None, every=1, **options):
    model = model or Linear()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.0)
    with autobatch.noise_scale(model, micro_batch_size=8, every=every) as noise:
        train(model, optimizer, **options)
    return noise.reading


def test_noise_scale_of_known_data_is_measured():
    readings = [measured(updates=400, seed=seed) for seed in range(2)]

    for reading in readings:
        assert reading.state == "ok"
        assert reading.samples == pytest.approx(4, rel=0.2)
        assert (reading.windows, reading.batch_size) == (200, 32)
        assert (reading.first_update, reading.last_update) == (201, 400)


def test_scale_of_the_loss_has_no_effect():
    reading = measured()

    for scale in (0.25, 1000.0):
        other = measured(scale=scale)
        assert other.samples == pytest.approx(reading.samples, rel=1e-4)
        assert other.high == pytest.approx(reading.high, rel=1e-4)


def test_clipping_before_the_step_has_no_effect():
    model = Linear()
    reading = measured()

    clipped = measured(
        model,
        before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    )

    assert clipped == reading


def test_every_5_measures_one_update_in_five():
    reading = measured(updates=400, every=5)

    assert reading.windows == 40
    assert (reading.first_update, reading.last_update) == (201, 396)
    assert reading.samples == pytest.approx(4, rel=0.4)


def test_reading_is_available_during_training():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        first = noise.reading
        train(model, optimizer, updates=50)
        early = noise.reading
        train(model, optimizer, updates=150, seed=1)
        late = noise.reading

    assert (first.state, first.samples) == ("settling", None)
    assert early.state == "settling"
    assert late.state == "ok"
    assert noise.reading == late


class Everything(nn.Module):
    """A tied weight, a sparse gradient, an optional branch, a frozen layer, and dropout."""

    def __init__(self):
        super().__init__()
        self.sparse = nn.Embedding(20, WIDTH, sparse=True)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.also = nn.Linear(WIDTH, WIDTH)
        self.also.weight = self.tied.weight
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x + self.sparse((x[:, 0].abs() * 5).long().clamp(max=19))
        x = F.dropout(self.norm(self.also(self.tied(self.frozen(x)))), 0.1)
        if self.calls % 3:
            x = self.sometimes(x)
        return x.square().mean()


def everything(watch):
    torch.manual_seed(3)
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    if watch:
        with autobatch.noise_scale(model, micro_batch_size=8, every=2) as noise:
            train(model, optimizer, updates=120)
        assert noise.reading.windows > 20
    else:
        train(model, optimizer, updates=120)
    return model.state_dict(), torch.get_rng_state()


def test_training_is_bit_identical():
    assert same(everything(watch=True), everything(watch=False))


def hooks_of(model):
    of_parameters = [dict(each._backward_hooks or {}) for each in model.parameters()]
    return of_parameters, dict(model._forward_pre_hooks)


def steppers():
    return dict(importlib.import_module("torch.optim.optimizer")._global_optimizer_pre_hooks)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_remains(fails):
    model, before = Linear(), steppers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    try:
        with autobatch.noise_scale(model, micro_batch_size=8, every=1):
            train(model, optimizer, updates=2)
            model(samples(8, None)).backward()
            assert hooks_of(model) != ([{}], {})
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass

    assert hooks_of(model) == ([{}], {})
    assert steppers() == before


def test_hooks_exist_only_in_measured_updates():
    model, seen = Linear(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    with autobatch.noise_scale(model, micro_batch_size=8, every=3):
        for _ in range(7):
            train(
                model,
                optimizer,
                updates=1,
                before_step=lambda: seen.append(len(hooks_of(model)[0][0])),
            )

    assert seen == [1, 0, 0, 1, 0, 0, 1]


# Real gradients


def test_reading_agrees_with_per_sample_gradients_of_a_real_network():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    warm = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(100):
        warm.zero_grad()
        F.cross_entropy(model(x), y).backward()
        warm.step()
    frozen = torch.optim.SGD(model.parameters(), 0.0)
    generator = torch.Generator().manual_seed(1)

    with autobatch.noise_scale(model, micro_batch_size=32, every=1) as noise:
        for _ in range(250):
            for _ in range(8):
                drawn = torch.randint(len(x), (32,), generator=generator)
                F.cross_entropy(model(x[drawn]), y[drawn]).backward()
            frozen.step()
            frozen.zero_grad()

    expected = noise_scale_of_all(model, x, y)
    assert noise.reading.state == "ok"
    assert noise.reading.samples == pytest.approx(expected, rel=0.2)
    assert noise.reading.low / 1.1 < expected < noise.reading.high * 1.1


def noise_scale_of_all(model, x, y):
    """Return the noise scale of the gradients of single samples."""
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    flat = torch.cat([part.detach().flatten(1) for part in each.values()], 1).double()
    center = flat.mean(0)
    return float((flat - center).square().sum(1).mean() / center.square().sum())


# Unavailable


def reason_of(reading):
    assert reading.state == "unavailable"
    assert reading.samples is None
    return reading.reason


def test_update_of_one_backward_pass_is_unavailable():
    assert "accumulate over two or more" in reason_of(measured(accumulate=1, updates=5))


class Checkpointed(Linear):
    def __init__(self, *, use_reentrant):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x.requires_grad_()
        x = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return super().forward(checkpoint(self.first, x, use_reentrant=self.use_reentrant)) + (
            self.w.square().sum() + self.w.sum()
        )


def test_only_a_reentrant_checkpoint_is_unavailable():
    assert "use_reentrant=False" in reason_of(measured(Checkpointed(use_reentrant=True), updates=5))
    assert measured(Checkpointed(use_reentrant=False)).windows == 60


def test_gradients_of_gradients_are_unavailable():
    class Penalised(Linear):
        def forward(self, x):
            loss = super().forward(x) + self.w.square().sum()
            (gradient,) = torch.autograd.grad(loss, self.w, create_graph=True)
            return loss + gradient.square().sum()

    assert "create_graph" in reason_of(measured(Penalised(), updates=5))


def test_lbfgs_is_unavailable():
    model = Linear()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.01)

    with autobatch.noise_scale(model, micro_batch_size=8, optimizer=optimizer) as noise:
        reading = noise.reading

    assert "LBFGS" in reason_of(reading)


def test_sharded_parameters_are_unavailable():
    class FullyShardedDataParallel(Linear):
        """A class of the same name."""

    assert "sharded (FullyShardedDataParallel)" in reason_of(
        measured(FullyShardedDataParallel(), updates=5)
    )


def test_gradients_left_from_earlier_updates_are_unavailable():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.zero_grad = lambda: None

    reading = measured(model, optimizer, updates=5)

    assert "not that of its backward passes" in reason_of(reading)


def test_gradients_set_to_zero_are_measured_like_none():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    drop = optimizer.zero_grad
    optimizer.zero_grad = lambda: drop(set_to_none=False)

    assert measured(model, optimizer) == measured()


def test_update_with_fewer_samples_is_skipped():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, optimizer, updates=100)
        train(model, optimizer, updates=100, size=5)
        train(model, optimizer, updates=1, seed=2)

    assert noise.reading.last_update == 201
    assert noise.reading.windows == 1
    assert "micro_batch_size=8" in reason_of(measured(size=5, updates=5))


def test_update_with_another_number_of_batches_is_skipped():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        for epoch in range(4):
            train(model, optimizer, updates=9, seed=epoch)
            train(model, optimizer, updates=1, accumulate=2, seed=epoch)

    # Each short update and the one after it: neither has as many passes as the last
    assert noise.reading.windows == 20 - 2 - 2
    assert noise.reading.batch_size == 32


def test_update_with_an_overflow_is_skipped():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, optimizer, updates=100)
        train(model, optimizer, updates=1, scale=math.inf)
        train(model, optimizer, updates=99, seed=1)

    assert noise.reading.state == "ok"
    assert noise.reading.windows == 99


def test_optimizer_of_another_model_ends_no_update():
    model, other = Linear(), Linear()
    own = torch.optim.SGD(model.parameters(), 0.0)
    foreign = torch.optim.SGD(other.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, own, before_step=foreign.step)

    assert noise.reading == measured()


def test_scaled_loss_is_measured_except_in_skipped_steps():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    generator = torch.Generator().manual_seed(0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        for update in range(200):
            for _ in range(4):
                loss = model(samples(8, generator))
                scaler.scale(loss * (math.inf if update == 150 else 1)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    assert noise.reading.state == "ok"
    assert noise.reading.samples == pytest.approx(4, rel=0.3)


@pytest.mark.slow
def test_compiled_model_is_not_compiled_again():
    testing = importlib.import_module("torch._dynamo.testing")
    counter = testing.CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Linear())
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    train(compiled, optimizer, updates=2)
    before = counter.frame_count

    with autobatch.noise_scale(compiled, micro_batch_size=8, every=2) as noise:
        train(compiled, optimizer, updates=120)

    assert noise.reading.windows == 30
    assert counter.frame_count == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size=0 is not a number of samples"),
        ({"micro_batch_size": True}, "micro_batch_size=True"),
        ({"micro_batch_size": 2, "every": 0}, "every=0 is not an interval"),
        ({"micro_batch_size": 2, "optimizer": 3}, "optimizer=int"),
        ({"micro_batch_size": 2, "model": 3}, "model=int has no parameters"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autobatch.noise_scale(**{"model": Linear(), **options})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (False, "no torch.optim optimizer of the model's parameters stepped"),
        (True, "the optimizer that was given never stepped"),
    ],
)
def test_loop_without_a_step_is_unavailable_once_it_ends(given, reason):
    model = Linear()
    own = torch.optim.SGD(model.parameters(), 0.0)
    other = torch.optim.SGD(Linear().parameters(), 0.0)
    noise = autobatch.noise_scale(
        model, micro_batch_size=8, every=1, optimizer=own if given else None
    )

    with noise:
        model(samples(8, torch.Generator())).backward()
        other.step()
        assert noise.reading.state == "settling"  # it may still step

    assert reason in reason_of(noise.reading)
    with noise:
        train(model, own)
    assert noise.reading.state == "ok"


def test_context_manager_is_entered_once_at_a_time():
    noise = autobatch.noise_scale(Linear(), micro_batch_size=8)

    with noise, pytest.raises(RuntimeError, match="entered already"):
        noise.__enter__()
    with noise:
        pass
