"""Estimator of the gradient noise scale, on windows of known noise."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch._noise import Window, estimate
from autobatch._noise.hooks import NoiseRecord
from sameness import same


def square(vector):
    return sum(x * x for x in vector)


def mean(vectors):
    return [sum(column) / Fraction(len(vectors)) for column in zip(*vectors, strict=True)]


def window_of(parts, update=1):
    """Return the window of an update, given the per-sample gradients of its parts."""
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


POPULATION = ((3, 1), (-1, 2), (1, 0))  # per-sample gradients, equally likely


def truth(population):
    center = mean(population)
    spread = [[x - c for x, c in zip(each, center, strict=True)] for each in population]
    return square(center), sum(map(square, spread)) / Fraction(len(population))


def exact(part, parts):
    """Return |G|² and tr Σ by the estimator, averaged over all possible updates."""
    windows = [
        window_of([drawn[at : at + part] for at in range(0, len(drawn), part)])
        for drawn in itertools.product(POPULATION, repeat=part * parts)
    ]
    # Fractions all the way, but for the two divisions by floats of `noise`
    signal = sum(each.signal for each in windows) / len(windows)
    noise = sum(each.noise for each in windows) / len(windows)
    return signal, noise


@pytest.mark.parametrize(("part", "parts"), [(1, 2), (1, 4), (2, 2), (3, 2), (2, 3)])
def test_signal_and_noise_are_unbiased_over_all_possible_updates(part, parts):
    signal, noise = exact(part, parts)

    assert signal == truth(POPULATION)[0]
    assert noise == pytest.approx(float(truth(POPULATION)[1]), rel=1e-12)


def test_mean_of_ratios_is_too_high():
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


def test_settled_reading_has_a_number_and_an_interval():
    reading = estimate(gaussian(400), updates=400, is_warming_up=False)

    assert reading.state == "ok"
    assert reading.samples == pytest.approx(40, rel=0.15)
    assert reading.low < reading.samples < reading.high < 4 * reading.low
    assert reading.windows == 200
    assert (reading.first_update, reading.last_update) == (201, 400)
    assert reading.batch_size == 32
    assert reading.reason is None


def test_nine_in_ten_intervals_contain_the_true_value():
    readings = [
        estimate(gaussian(200, seed=seed), updates=200, is_warming_up=False) for seed in range(100)
    ]

    held = sum(each.low <= 40 <= each.high for each in readings)

    assert 80 <= held <= 98  # of a hundred fixed seeds
    assert sum(each.samples for each in readings) / 100 == pytest.approx(40, rel=0.02)


@settings(max_examples=20)
@given(st.floats(1e-20, 1e20))
def test_common_factor_of_all_windows_has_no_effect(factor):
    windows = gaussian(120)
    scaled = [dataclasses.replace(w, small=w.small * factor, big=w.big * factor) for w in windows]

    reading = estimate(windows, updates=120, is_warming_up=False)
    other = estimate(scaled, updates=120, is_warming_up=False)

    assert other.samples == pytest.approx(reading.samples)
    assert (other.low, other.high) == pytest.approx((reading.low, reading.high))


def test_reading_without_windows_is_settling_without_a_number():
    reading = estimate([], updates=0, is_warming_up=False)

    assert (reading.state, reading.samples) == ("settling", None)


def test_gradients_never_finite_make_a_late_reading_unavailable():
    windows = [Window(5 * i, math.nan, math.nan, 8, 32) for i in range(1, 41)]

    early = estimate(windows[:10], updates=50, is_warming_up=False)
    late = estimate(windows, updates=200, is_warming_up=False)

    assert early.state == "settling"
    assert late.state == "unavailable"
    assert late.reason == "no measured gradient is finite"


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
def test_early_reading_is_settling_with_a_lower_bound_and_a_reason(
    windows, updates, is_warming_up, reason
):
    reading = estimate(windows, updates=updates, is_warming_up=is_warming_up)

    assert (reading.state, reading.reason) == ("settling", reason)
    assert reading.samples == reading.low > 0
    assert reading.high is None


@pytest.mark.parametrize("signal", [0.0, 0.1])  # noise scales of infinity and of 400
def test_gradient_lost_in_noise_gives_a_lower_bound(signal):
    readings = [
        estimate(gaussian(100, signal=signal, seed=seed), updates=100, is_warming_up=False)
        for seed in range(40)
    ]

    vague = [each for each in readings if each.state == "at_least"]
    assert len(vague) >= 30  # by chance, some intervals are narrow
    assert all(each.samples == each.low > 100 for each in vague)
    assert all(each.high is None for each in vague)
    assert all(math.isfinite(each.low) for each in vague)
    if signal:
        assert sum(each.low < 400 for each in readings) >= 34


def test_identical_samples_have_no_noise():
    alike = [Window(update, 2.0, 2.0, 8, 32) for update in range(1, 201)]

    reading = estimate(alike, updates=200, is_warming_up=False)

    assert (reading.state, reading.samples, reading.high) == ("ok", 0.0, 0.0)


def test_only_the_later_half_of_the_updates_counts():
    early = gaussian(100, signal=100.0)
    late = [dataclasses.replace(w, update=w.update + 100) for w in gaussian(100)]

    reading = estimate([*early, *late], updates=200, is_warming_up=False)

    assert reading == estimate(late, updates=200, is_warming_up=False)


def test_windows_with_an_overflow_do_not_count():
    windows = gaussian(200)
    broken = [
        *windows,
        Window(150, math.inf, math.inf, 8, 32),
        Window(151, math.nan, 1.0, 8, 32),
    ]

    assert estimate(broken, updates=200, is_warming_up=False) == estimate(
        windows, updates=200, is_warming_up=False
    )


def test_interval_is_deterministic_and_leaves_the_random_state_alone():
    windows = gaussian(200)
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()

    readings = {estimate(windows, updates=200, is_warming_up=False) for _ in range(3)}

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


def test_only_a_learning_rate_that_has_never_fallen_is_a_warm_up():
    assert rates(0.1, 0.2, 0.3)
    assert not rates(0.1, 0.2, 0.3, 0.3)
    assert not rates(0.3, 0.2, 0.3)
    assert not rates(0.1)
    assert not rates(torch.tensor(0.1), torch.tensor(0.2))
