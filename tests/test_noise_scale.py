from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autobatch
from autobatch._noise import Window, read
from autobatch._noise.hooks import NoiseRecord
from sameness import same

# The estimate, on paper


def square(vector):
    return sum(x * x for x in vector)


def mean(vectors):
    return [sum(column) / Fraction(len(vectors)) for column in zip(*vectors, strict=True)]


def window_of(parts, update=1):
    """The window of an update whose parts have these per-sample gradients."""
    means = [mean(part) for part in parts]
    count = sum(map(len, parts))
    return Window(
        update,
        sum(map(square, means)) / Fraction(len(parts)),
        square(mean([each for part in parts for each in part])),
        Fraction(len(parts) * count, sum(count // len(p) for p in parts) or 1)
        if len({len(part) for part in parts}) > 1
        else len(parts[0]),
        count,
    )


POPULATION = ((3, 1), (-1, 2), (1, 0))  # per-sample gradients, each as likely


def truth(population):
    center = mean(population)
    spread = [[x - c for x, c in zip(each, center, strict=True)] for each in population]
    return square(center), sum(map(square, spread)) / Fraction(len(population))


def exact(part, parts):
    """|G|² and tr Σ by the estimator, averaged over every update that chance could make."""
    windows = [
        window_of([drawn[at : at + part] for at in range(0, len(drawn), part)])
        for drawn in itertools.product(POPULATION, repeat=part * parts)
    ]
    # Fractions all the way, but for the two divisions by floats of `noise`
    signal = sum(each.signal for each in windows) / len(windows)
    noise = sum(each.noise for each in windows) / len(windows)
    return signal, noise


@pytest.mark.parametrize(("part", "parts"), [(1, 2), (1, 4), (2, 2), (3, 2), (2, 3)])
def test_both_estimates_are_unbiased_over_every_update_that_chance_could_make(part, parts):
    signal, noise = exact(part, parts)

    assert signal == truth(POPULATION)[0]
    assert noise == pytest.approx(float(truth(POPULATION)[1]), rel=1e-12)


def test_the_mean_of_ratios_is_another_number():
    windows = [
        window_of([drawn[:2], drawn[2:]]) for drawn in itertools.product(POPULATION, repeat=4)
    ]
    signal, noise = truth(POPULATION)

    of_means = sum(w.noise for w in windows) / sum(w.signal for w in windows)
    ratios = [w.noise / w.signal for w in windows if w.signal > 0]

    assert of_means == pytest.approx(float(noise / signal))
    assert sum(ratios) / len(ratios) > 1.25 * of_means


def gaussian(count, *, signal=1.0, noise=40.0, part=8, parts=4, width=50, seed=0):
    """Windows of an update with normal per-sample gradients: noise scale `noise / signal`."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.full((width,), math.sqrt(signal / width), dtype=torch.float64)
    deviation = math.sqrt(noise / width / part)
    drawn = center + deviation * torch.randn(
        count, parts, width, generator=generator, dtype=torch.float64
    )
    small = drawn.square().sum(-1).mean(-1)
    big = drawn.mean(1).square().sum(-1)
    return [
        Window(update, *norms, part, part * parts)
        for update, *norms in zip(range(1, count + 1), small.tolist(), big.tolist(), strict=True)
    ]


def test_a_settled_reading_is_a_number_with_its_interval():
    reading = read(gaussian(400), updates=400, is_warming_up=False)

    assert reading.state == "ok"
    assert reading.samples == pytest.approx(40, rel=0.15)
    assert reading.low < reading.samples < reading.high < 4 * reading.low
    assert reading.windows == 200
    assert (reading.first_update, reading.last_update) == (201, 400)
    assert reading.batch_size == 32
    assert reading.reason is None


def test_nine_intervals_in_ten_hold_the_truth():
    readings = [
        read(gaussian(200, seed=seed), updates=200, is_warming_up=False) for seed in range(100)
    ]

    held = sum(each.low <= 40 <= each.high for each in readings)

    assert 80 <= held <= 98  # of a hundred, always the same ones
    assert sum(each.samples for each in readings) / 100 == pytest.approx(40, rel=0.02)


@settings(max_examples=20)
@given(st.floats(1e-20, 1e20))
def test_a_factor_that_all_windows_share_changes_nothing(factor):
    windows = gaussian(120)
    scaled = [dataclasses.replace(w, small=w.small * factor, big=w.big * factor) for w in windows]

    reading = read(windows, updates=120, is_warming_up=False)
    other = read(scaled, updates=120, is_warming_up=False)

    assert other.samples == pytest.approx(reading.samples)
    assert (other.low, other.high) == pytest.approx((reading.low, reading.high))


def test_nothing_is_said_before_anything_is_measured():
    reading = read([], updates=0, is_warming_up=False)

    assert (reading.state, reading.samples) == ("settling", None)


def test_gradients_that_are_never_finite_are_told_once_a_run_would_have_settled():
    windows = [Window(5 * i, math.nan, math.nan, 8, 32) for i in range(1, 41)]

    early = read(windows[:10], updates=50, is_warming_up=False)
    late = read(windows, updates=200, is_warming_up=False)

    assert early.state == "settling"
    assert late.state == "unavailable"
    assert late.reason == "no gradient that was measured is finite"


@pytest.mark.parametrize(
    ("windows", "updates", "is_warming_up", "reason"),
    [
        (gaussian(99), 99, False, "it takes 100 updates or more, and there were 99"),
        (gaussian(200), 200, True, "the learning rate was still rising"),
        (
            gaussian(200)[193:],
            200,
            False,
            "it takes 8 measured updates in the later half of a run, and there were 7",
        ),
    ],
)
def test_a_reading_too_early_is_settling_and_says_what_it_is_at_least_and_why(
    windows, updates, is_warming_up, reason
):
    reading = read(windows, updates=updates, is_warming_up=is_warming_up)

    assert (reading.state, reading.reason) == ("settling", reason)
    assert reading.samples == reading.low > 0
    assert reading.high is None


@pytest.mark.parametrize("signal", [0.0, 0.1])  # noise scales of infinity and of 400
def test_a_gradient_that_can_not_be_told_from_noise_gives_a_lower_bound(signal):
    readings = [
        read(gaussian(100, signal=signal, seed=seed), updates=100, is_warming_up=False)
        for seed in range(40)
    ]

    vague = [each for each in readings if each.state == "at_least"]
    assert len(vague) >= 30  # by chance, some intervals are narrow
    assert all(each.samples == each.low > 100 for each in vague)
    assert all(each.high is None for each in vague)
    assert all(math.isfinite(each.low) for each in vague)
    if signal:
        assert sum(each.low < 400 for each in readings) >= 34


def test_samples_that_are_all_alike_have_no_noise():
    alike = [Window(update, 2.0, 2.0, 8, 32) for update in range(1, 201)]

    reading = read(alike, updates=200, is_warming_up=False)

    assert (reading.state, reading.samples, reading.high) == ("ok", 0.0, 0.0)


def test_only_the_later_half_of_the_updates_counts():
    early = gaussian(100, signal=100.0)
    late = [dataclasses.replace(w, update=w.update + 100) for w in gaussian(100)]

    reading = read([*early, *late], updates=200, is_warming_up=False)

    assert reading == read(late, updates=200, is_warming_up=False)


def test_windows_that_overflowed_do_not_count():
    windows = gaussian(200)
    broken = [
        *windows,
        Window(150, math.inf, math.inf, 8, 32),
        Window(151, math.nan, 1.0, 8, 32),
    ]

    assert read(broken, updates=200, is_warming_up=False) == read(
        windows, updates=200, is_warming_up=False
    )


def test_the_interval_is_the_same_every_time_and_draws_no_random_number_of_the_run():
    windows = gaussian(200)
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()

    readings = {read(windows, updates=200, is_warming_up=False) for _ in range(3)}

    assert len(readings) == 1
    assert same((random.getstate(), torch.get_rng_state()), before)


# The learning rate


def rates(*values):
    record = NoiseRecord()
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    for value in values:
        optimizer.param_groups[0]["lr"] = value
        record.watch_rate(optimizer)
    return record._is_warming_up


def test_a_rate_that_has_only_risen_is_a_warm_up_and_one_that_stays_or_fell_is_none():
    assert rates(0.1, 0.2, 0.3)
    assert not rates(0.1, 0.2, 0.3, 0.3)
    assert not rates(0.3, 0.2, 0.3)
    assert not rates(0.1)
    assert not rates(torch.tensor(0.1), torch.tensor(0.2))


# A loop of one's own


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


def test_the_noise_scale_of_known_data_is_found():
    readings = [measured(updates=400, seed=seed) for seed in range(2)]

    for reading in readings:
        assert reading.state == "ok"
        assert reading.samples == pytest.approx(4, rel=0.2)
        assert (reading.windows, reading.batch_size) == (200, 32)
        assert (reading.first_update, reading.last_update) == (201, 400)


def test_it_is_the_same_however_the_loss_is_divided():
    reading = measured()

    for scale in (0.25, 1000.0):
        other = measured(scale=scale)
        assert other.samples == pytest.approx(reading.samples, rel=1e-4)
        assert other.high == pytest.approx(reading.high, rel=1e-4)


def test_clipping_and_unscaling_before_the_step_do_not_touch_it():
    model = Linear()
    reading = measured()

    clipped = measured(
        model,
        before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    )

    assert clipped == reading


def test_one_update_in_five_is_measured():
    reading = measured(updates=400, every=5)

    assert reading.windows == 40
    assert (reading.first_update, reading.last_update) == (201, 396)
    assert reading.samples == pytest.approx(4, rel=0.4)


def test_it_can_be_read_in_the_middle_of_training():
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
    """A tied weight, a sparse gradient, a branch that is not always taken, a frozen layer, and dropout."""

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


def test_training_is_the_same_to_the_bit():
    assert same(everything(watch=True), everything(watch=False))


def hooks_of(model):
    of_parameters = [dict(each._backward_hooks or {}) for each in model.parameters()]
    return of_parameters, dict(model._forward_pre_hooks)


def steppers():
    return dict(importlib.import_module("torch.optim.optimizer")._global_optimizer_pre_hooks)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails):
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


def test_hooks_are_there_only_in_the_updates_that_are_measured():
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


def test_it_agrees_with_the_gradients_of_all_samples_of_a_real_network():
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
    """Of the gradients of single samples, each by itself."""
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    flat = torch.cat([part.detach().flatten(1) for part in each.values()], 1).double()
    center = flat.mean(0)
    return float((flat - center).square().sum(1).mean() / center.square().sum())


# What can not be measured


def reason_of(reading):
    assert reading.state == "unavailable"
    assert reading.samples is None
    return reading.reason


def test_an_update_of_one_backward_pass_has_no_two_batch_sizes():
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


def test_a_reentrant_checkpoint_is_noticed_and_another_is_not_in_the_way():
    assert "use_reentrant=False" in reason_of(measured(Checkpointed(use_reentrant=True), updates=5))
    assert measured(Checkpointed(use_reentrant=False)).windows == 60


def test_gradients_of_gradients_are_noticed():
    class Penalised(Linear):
        def forward(self, x):
            loss = super().forward(x) + self.w.square().sum()
            (gradient,) = torch.autograd.grad(loss, self.w, create_graph=True)
            return loss + gradient.square().sum()

    assert "create_graph" in reason_of(measured(Penalised(), updates=5))


def test_an_optimizer_that_evaluates_a_batch_again_is_noticed():
    model = Linear()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.01)

    with autobatch.noise_scale(model, micro_batch_size=8, optimizer=optimizer) as noise:
        reading = noise.reading

    assert "LBFGS" in reason_of(reading)


def test_sharded_parameters_are_noticed():
    class FullyShardedDataParallel(Linear):
        """Of the same name."""

    assert "sharded (FullyShardedDataParallel)" in reason_of(
        measured(FullyShardedDataParallel(), updates=5)
    )


def test_a_gradient_that_was_there_before_is_noticed():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.zero_grad = lambda: None

    reading = measured(model, optimizer, updates=5)

    assert "not that of its backward passes" in reason_of(reading)


def test_gradients_that_are_zeroed_instead_of_dropped_are_fine():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    drop = optimizer.zero_grad
    optimizer.zero_grad = lambda: drop(set_to_none=False)

    assert measured(model, optimizer) == measured()


def test_an_update_of_fewer_samples_is_left_out():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, optimizer, updates=100)
        train(model, optimizer, updates=100, size=5)
        train(model, optimizer, updates=1, seed=2)

    assert noise.reading.last_update == 201
    assert noise.reading.windows == 1
    assert "micro_batch_size=8" in reason_of(measured(size=5, updates=5))


def test_an_update_of_another_number_of_batches_is_left_out():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        for epoch in range(4):
            train(model, optimizer, updates=9, seed=epoch)
            train(model, optimizer, updates=1, accumulate=2, seed=epoch)

    # Each short one, and the one after it, since by then it is not known what is usual
    assert noise.reading.windows == 20 - 2 - 2
    assert noise.reading.batch_size == 32


def test_a_loss_that_overflows_is_left_out():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, optimizer, updates=100)
        train(model, optimizer, updates=1, scale=math.inf)
        train(model, optimizer, updates=99, seed=1)

    assert noise.reading.state == "ok"
    assert noise.reading.windows == 99


def test_an_optimizer_of_something_else_ends_no_update():
    model, other = Linear(), Linear()
    own = torch.optim.SGD(model.parameters(), 0.0)
    foreign = torch.optim.SGD(other.parameters(), 0.0)

    with autobatch.noise_scale(model, micro_batch_size=8, every=1) as noise:
        train(model, own, before_step=foreign.step)

    assert noise.reading == measured()


def test_a_scaled_loss_is_measured_and_a_step_that_it_skips_is_left_out():
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
def test_a_compiled_model_is_not_compiled_anew():
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
def test_an_argument_that_can_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autobatch.noise_scale(**{"model": Linear(), **options})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (False, "no torch.optim optimizer of the model's parameters stepped"),
        (True, "the optimizer that was given never stepped"),
    ],
)
def test_a_loop_that_ends_without_a_step_has_no_updates_to_measure(given, reason):
    model = Linear()
    own = torch.optim.SGD(model.parameters(), 0.0)
    other = torch.optim.SGD(Linear().parameters(), 0.0)
    noise = autobatch.noise_scale(
        model, micro_batch_size=8, every=1, optimizer=own if given else None
    )

    with noise:
        model(samples(8, torch.Generator())).backward()
        other.step()
        assert noise.reading.state == "settling"  # it may step yet

    assert reason in reason_of(noise.reading)
    with noise:
        train(model, own)
    assert noise.reading.state == "ok"


def test_it_is_entered_once_at_a_time():
    noise = autobatch.noise_scale(Linear(), micro_batch_size=8)

    with noise, pytest.raises(RuntimeError, match="entered already"):
        noise.__enter__()
    with noise:
        pass
