from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import BatchPlan, NoiseReading, Outcome, Trial
from autobatch._report.tradeoff import common_rule
from autobatch.report import CurvePoint, LearningRateRule, NoiseRange
from report_examples import example

times = st.floats(1e-6, 1e3)
trials = st.builds(
    Trial,
    batch_size=st.integers(1, 100),
    outcome=st.sampled_from(Outcome),
    peak=st.none() | st.integers(0, 2**40),
    step_seconds=st.none() | times,
    accumulate=st.integers(1, 4),
    optimizer_seconds=st.none() | times,
)
tried = st.lists(trials, max_size=20)
plans = st.builds(BatchPlan, st.integers(1, 100), st.integers(1, 100), st.integers(1, 9))
datasets = st.none() | st.integers(1, 10**6)


def report_of(plan, history, dataset_size=None, *, curve=(), noise=None, rule=None):
    return example(
        plan=plan,
        trials=tuple(history),
        dataset_size=dataset_size,
        curve=tuple(curve),
        noise=noise,
        learning_rate=rule,
    )


def rows_of(plan, history, dataset_size, **measured):
    return report_of(plan, history, dataset_size, **measured).effective


def speeds_of(history, curve=(), world_size=1):
    return report_of(BatchPlan(1, 1, world_size), history, curve=curve).sizes


def line_of(seconds):
    """The line through timed sizes, from their seconds."""
    return report_of(BatchPlan(1), (), curve=[point(*each) for each in seconds.items()]).fit


def latest(history):
    return {trial.batch_size: trial for trial in history}.values()


def is_of(row, plan):
    made = (row.micro_batch_size, row.accumulate_grad_batches)
    return made == (plan.micro_batch_size, plan.accumulate_grad_batches)


def point(batch_size, step_seconds, spread=0.0, optimizer_seconds=None, accumulate=1):
    return CurvePoint(
        batch_size=batch_size,
        accumulate=accumulate,
        step_seconds=step_seconds,
        step_seconds_low=step_seconds * (1 - spread),
        step_seconds_high=step_seconds * (1 + spread),
        optimizer_seconds=optimizer_seconds,
        updates=20,
        peak=None,
        drift=1.0,
    )


@given(tried, st.integers(1, 9))
def test_each_timed_size_that_fits_has_one_speed_row(history, world_size):
    rows = speeds_of(history, (), world_size)

    last = {trial.batch_size: trial for trial in history}
    timed = [t for t in last.values() if t.fits and t.step_seconds]
    assert [row.batch_size for row in rows] == sorted(t.batch_size for t in timed)
    assert all(0 < row.of_fastest <= 1 for row in rows)
    assert not rows or max(row.of_fastest for row in rows) == 1


def test_samples_per_second_count_all_ranks():
    (row,) = speeds_of([Trial(8, Outcome.FIT, 100, step_seconds=0.5)], (), 4)

    assert row.samples_per_second == 64


def test_latest_trial_of_a_size_counts():
    history = [Trial(8, Outcome.FIT, 1, 0.5), Trial(8, Outcome.OVER_BUDGET, 2)]

    assert speeds_of(history) == ()
    assert report_of(BatchPlan(8), history).largest_fit is None


@given(plans, tried, datasets)
def test_effective_batch_is_micro_batch_times_accumulation_times_ranks(plan, history, dataset_size):
    for row in rows_of(plan, history, dataset_size):
        made = row.micro_batch_size * row.accumulate_grad_batches * plan.world_size
        assert row.effective_batch_size == min(made, dataset_size or made)


@given(plans, tried, datasets)
def test_rows_are_few_and_ascending_and_include_the_plan(plan, history, dataset_size):
    rows = rows_of(plan, history, dataset_size)

    sizes = [row.effective_batch_size for row in rows]
    assert 1 <= len(sizes) <= 7
    assert sum(is_of(row, plan) for row in rows) == 1
    below = sizes if dataset_size is None else sizes[:-1]
    assert all(3 * low <= 2 * high for low, high in pairwise(below) if high != sizes[-1])
    assert sizes == sorted(sizes)


@given(plans, tried, st.integers(1, 10**6))
def test_last_row_is_the_whole_epoch_in_one_update(plan, history, dataset_size):
    """Rows whose last micro-batch is refused are left out: test_choice.py."""
    history = [trial for trial in history if trial.outcome is not Outcome.REFUSED]

    last = rows_of(plan, history, dataset_size)[-1]

    assert last.effective_batch_size == dataset_size
    assert last.updates_per_epoch == 1


@given(plans, tried, datasets)
def test_micro_batches_of_rows_are_the_plans_or_ran(plan, history, dataset_size):
    run = {trial.batch_size for trial in latest(history) if trial.fits}

    for row in rows_of(plan, history, dataset_size):
        assert row.micro_batch_size in run | {plan.micro_batch_size}


@given(plans, tried, st.integers(1, 10**6))
def test_updates_cover_the_epoch_and_none_is_empty(plan, history, dataset_size):
    for row in rows_of(plan, history, dataset_size):
        micro = row.micro_batch_size * plan.world_size
        passes = math.ceil(dataset_size / micro)

        assert row.updates_per_epoch * row.effective_batch_size >= dataset_size
        assert (row.updates_per_epoch - 1) * row.accumulate_grad_batches < passes


@given(plans, tried, datasets)
def test_unmeasured_values_are_none(plan, history, dataset_size):
    timed = {t.batch_size for t in latest(history) if t.fits and t.step_seconds}

    for row in rows_of(plan, history, dataset_size):
        known = row.micro_batch_size in timed
        assert (row.update_seconds is not None) == known
        assert (row.updates_per_epoch is not None) == (dataset_size is not None)
        assert (row.epoch_seconds is not None) == (known and dataset_size is not None)


@given(plans, tried, st.integers(1, 1000))
def test_epoch_of_whole_updates_takes_the_time_of_its_updates(plan, history, updates):
    dataset_size = updates * plan.effective_batch_size
    rows = rows_of(plan, history, dataset_size)

    (row,) = (row for row in rows if is_of(row, plan))
    assert row.updates_per_epoch == updates
    if row.epoch_seconds is not None:
        assert row.epoch_seconds == pytest.approx(updates * row.update_seconds)


@given(plans, tried, st.integers(1, 10**6))
def test_more_accumulation_never_makes_an_epoch_longer(plan, history, dataset_size):
    rows = rows_of(plan, history, dataset_size)

    same = [r.epoch_seconds for r in rows if r.micro_batch_size == plan.micro_batch_size]
    if None not in same:
        assert all(more <= less * (1 + 1e-9) for less, more in pairwise(same))


def test_optimizer_time_counts_once_per_update():
    # 2 micro-batches of 0.1 s and an optimizer step of 0.05 s took 0.125 s per micro-batch
    trial = Trial(8, Outcome.FIT, 1, 0.125, accumulate=2, optimizer_seconds=0.05)

    rows = rows_of(BatchPlan(8, 4), [trial], 100)

    (row,) = (r for r in rows if r.accumulate_grad_batches == 4)
    assert row.update_seconds == pytest.approx(4 * 0.1 + 0.05)
    assert row.updates_per_epoch == 4  # 13 micro-batches: 4 + 4 + 4 + 1
    assert row.epoch_seconds == pytest.approx(13 * 0.1 + 4 * 0.05)


def test_optimizer_without_a_time_of_its_own_stays_in_the_step():
    trial = Trial(8, Outcome.FIT, 1, 0.125, accumulate=2)

    rows = rows_of(BatchPlan(8, 4), [trial], None)

    assert [r.update_seconds for r in rows] == [r.accumulate_grad_batches * 0.125 for r in rows]


def test_smaller_rows_halve_accumulation_then_use_sizes_that_ran():
    history = [Trial(size, Outcome.FIT, 1, 0.1) for size in (1, 3, 5, 6, 8)]

    rows = rows_of(BatchPlan(8, 2), history, 40)

    made = [(r.micro_batch_size, r.accumulate_grad_batches) for r in rows]
    assert made == [(1, 1), (3, 1), (5, 1), (8, 1), (8, 2), (8, 5)]


# The curve


def test_curve_replaces_the_time_of_a_trial_and_keeps_its_peak():
    (row,) = speeds_of([Trial(8, Outcome.FIT, 100, 0.5)], [point(8, 0.25, 0.2)], 2)

    assert (row.samples_per_second, row.updates, row.peak) == (64, 20, 100)
    assert row.samples_per_second_low == pytest.approx(64 / 1.2)
    assert row.samples_per_second_high == pytest.approx(64 / 0.8)


@given(st.dictionaries(st.integers(1, 500), times, min_size=1), st.floats(0, 0.9))
def test_spread_contains_its_point_and_the_knee_is_fast(seconds, spread):
    curve = [point(*each, spread) for each in seconds.items()]
    report = report_of(BatchPlan(1), (), curve=curve)

    rows = report.sizes
    for row in rows:
        assert row.samples_per_second_low <= row.samples_per_second * (1 + 1e-9)
        assert row.samples_per_second_high >= row.samples_per_second * (1 - 1e-9)
    fast = [row.batch_size for row in rows if row.of_fastest >= 0.95]
    assert report.knee == min(fast)


@given(st.floats(1e-4, 1), st.floats(1e-5, 1e-1))
def test_line_is_found_in_linear_times(fixed, slope):
    sizes = (1, 2, 4, 8, 16, 32, 64)

    fit = line_of({size: fixed + slope * size for size in sizes})

    assert fit.worst_miss < 1e-6
    assert fit.seconds(10) == pytest.approx(fixed + 10 * slope)


def test_one_outlier_hardly_bends_the_line():
    sizes = (1, 2, 4, 8, 16, 32, 64)
    seconds = [0.01 + 0.001 * size for size in sizes]
    seconds[3] *= 1.095

    fit = line_of(dict(zip(sizes, seconds, strict=True)))

    assert fit.fixed_seconds == pytest.approx(0.01, rel=0.03)
    assert fit.seconds_per_sample == pytest.approx(0.001, rel=0.03)


@pytest.mark.parametrize(
    "samples_per_second",
    [
        # Convolutions whose speed has a peak: a line would promise what is not there
        {1: 372, 2: 452, 4: 611, 8: 822, 16: 933, 32: 976, 64: 893, 128: 757},
        {8: 100, 16: 200},
        {1: 1, 2: 50, 4: 3},
    ],
)
def test_line_that_misses_a_size_by_ten_percent_is_dropped(
    samples_per_second,
):
    seconds = {size: size / speed for size, speed in samples_per_second.items()}

    assert line_of(seconds) is None


@given(st.lists(times, min_size=3, max_size=8))
def test_line_is_never_negative(seconds):
    fit = line_of({2**i: each for i, each in enumerate(seconds)})

    assert fit is None or min(fit.fixed_seconds, fit.seconds_per_sample) >= 0


# The noise scale

noises = st.builds(
    lambda samples, below, above: NoiseReading("ok", samples, samples / below, samples * above),
    st.floats(1, 1e6),
    st.floats(1, 10),
    st.floats(1, 10),
)


@given(plans, tried, datasets, noises)
def test_estimates_are_relative_to_the_plan_and_within_their_ranges(
    plan, history, dataset_size, noise
):
    for row in rows_of(plan, history, dataset_size, noise=noise):
        if is_of(row, plan):
            assert row.relative_updates == row.relative_samples == 1
            assert row.relative_time in (None, 1)
        if row.relative_time is not None:
            low, high = row.relative_time_low, row.relative_time_high
            assert low <= row.relative_time <= high


@given(plans, tried, datasets, noises)
def test_larger_batches_take_fewer_updates_and_more_samples(plan, history, dataset_size, noise):
    rows = rows_of(plan, history, dataset_size, noise=noise)

    for small, large in pairwise(rows):
        assert large.relative_updates <= small.relative_updates
        assert large.relative_samples >= small.relative_samples * (1 - 1e-12)


def test_formulas_of_the_noise_scale():
    history = [Trial(16, Outcome.FIT, 1, 0.1, optimizer_seconds=0.02)]
    noise = NoiseReading("ok", 300, 75, 1200)

    rows = rows_of(BatchPlan(16, 4), history, None, noise=noise)

    (row,) = (row for row in rows if row.effective_batch_size == 16)
    assert row.relative_updates == pytest.approx((1 + 300 / 16) / (1 + 300 / 64))
    assert row.relative_samples == pytest.approx((1 + 16 / 300) / (1 + 64 / 300))
    update, chosen = 0.08 + 0.02, 4 * 0.08 + 0.02
    assert row.relative_time == pytest.approx(row.relative_updates * update / chosen)
    assert row.relative_time_high == pytest.approx(
        (1 + 1200 / 16) / (1 + 1200 / 64) * update / chosen
    )
    assert row.useful_samples_per_second == pytest.approx(160 * 300 / 316)


@pytest.mark.parametrize("state", ["settling", "at_least", "unavailable"])
def test_unsettled_noise_scale_gives_no_estimates(state):
    assert NoiseRange.of(NoiseReading(state, 900, 800, 1000)) is None
    assert NoiseRange.of(None) is None


def test_noise_range_is_at_least_a_factor_of_four_each_way():
    assert NoiseRange.of(NoiseReading("ok", 100, 90, 110)) == NoiseRange(100, 25, 400)
    assert NoiseRange.of(NoiseReading("ok", 100, 20, 500)) == NoiseRange(100, 20, 500)


@given(noises, st.floats(1e-4, 1), st.floats(1e-5, 1e-2), st.floats(1e-5, 1))
def test_the_optimum_has_the_shortest_time_to_the_same_loss(noise, fixed, slope, optimizer):
    curve = [
        point(size, fixed + slope * size + optimizer, optimizer_seconds=optimizer)
        for size in (1, 4, 16, 64)
    ]
    best = report_of(BatchPlan(16), (), curve=curve, noise=noise).optimum

    def at_once(batch):
        return (1 + noise.samples / batch) * (fixed + slope * batch + optimizer)

    def accumulated(k):
        return (1 + noise.samples / (16 * k)) * (k * (fixed + 16 * slope) + optimizer)

    for time, at in ((at_once, best.at_once), (accumulated, best.accumulate_grad_batches)):
        assert time(at) <= min(time(at * 0.9), time(at * 1.1)) * (1 + 1e-9)


@given(plans, tried, datasets, noises)
def test_near_range_is_within_ten_percent_of_the_shortest_time(plan, history, dataset_size, noise):
    report = report_of(plan, history, dataset_size, noise=noise)
    rows, best = report.effective, report.optimum

    times = {
        row.effective_batch_size: row.relative_time for row in rows if row.relative_time is not None
    }
    if best is None:
        assert plan.micro_batch_size not in report.pace.sizes or not min(report.pace.micro_seconds)
    else:
        least = min(times.values())
        assert times[best.effective_batch_size] == least
        for end in (best.near_low, best.near_high):
            assert times[end] <= 1.1 * least
        assert best.near_low <= best.effective_batch_size <= best.near_high


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4), ("square-root", 2)])
def test_learning_rate_factor_follows_its_rule(rule, factor):
    rule = LearningRateRule("SGD", rule)

    rows = rows_of(BatchPlan(8, 4), [], None, rule=rule)

    factors = {row.effective_batch_size: row.learning_rate_factor for row in rows}
    assert factors[32] == 1
    assert factors[128] == factor
    assert factors[8] == 1 / factor


def test_plan_larger_than_the_data_set_is_the_only_row():
    rows = rows_of(BatchPlan(100, 50), [Trial(100, Outcome.FIT, 1, 0.1)], 100)

    assert [row.effective_batch_size for row in rows] == [100]


# The rule of several optimizers


def optimizer(name, *bases):
    return type(name, bases or (object,), {})()


ADAM, SGD, LION = optimizer("Adam"), optimizer("SGD"), optimizer("Lion")


@pytest.mark.parametrize(
    ("optimizers", "rule"),
    [
        ((), None),
        ((LION,), None),
        ((ADAM,), LearningRateRule("Adam", "square-root")),
        ((SGD,), LearningRateRule("SGD", "linear")),
        ((optimizer("Own", type(SGD)),), LearningRateRule("Own", "linear")),
        ((ADAM, optimizer("Adam")), LearningRateRule("Adam", "square-root")),
        ((ADAM, SGD), None),
        ((ADAM, LION), None),
    ],
)
def test_optimizers_share_one_rule_or_have_none(optimizers, rule):
    assert common_rule(optimizers) == rule
