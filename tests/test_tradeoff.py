from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch._plan import BatchPlan
from autobatch._tradeoff import effective_rows, settled, speed_rows
from autobatch._trial import Outcome, Trial

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
plans = st.builds(
    BatchPlan, st.integers(1, 100), st.integers(1, 100), st.integers(1, 9)
)
datasets = st.none() | st.integers(1, 10**6)


@given(tried, st.integers(1, 9))
def test_a_speed_row_stands_for_each_size_that_fits_and_was_timed(history, world_size):
    rows = speed_rows(history, world_size)

    last = {trial.batch_size: trial for trial in history}
    timed = [t for t in last.values() if t.fits and t.step_seconds]
    assert [row.batch_size for row in rows] == sorted(t.batch_size for t in timed)
    assert all(0 < row.of_fastest <= 1 for row in rows)
    assert not rows or max(row.of_fastest for row in rows) == 1


def test_samples_per_second_are_those_of_all_ranks():
    (row,) = speed_rows([Trial(8, Outcome.FIT, 100, step_seconds=0.5)], world_size=4)

    assert row.samples_per_second == 64


def test_the_latest_trial_speaks_for_its_size():
    history = [Trial(8, Outcome.FIT, 1, 0.5), Trial(8, Outcome.OVER_BUDGET, 2)]

    assert settled(history) == (history[1],)
    assert speed_rows(history, world_size=1) == ()


@given(plans, tried, datasets)
def test_every_effective_batch_is_micro_times_accumulation_times_ranks(
    plan, history, dataset_size
):
    for row in effective_rows(plan, history, dataset_size):
        made = row.micro_batch_size * row.accumulate_grad_batches * plan.world_size
        assert row.effective_batch_size == made


@given(plans, tried, datasets)
def test_the_ladder_is_short_ascends_in_real_steps_and_holds_the_plan(
    plan, history, dataset_size
):
    sizes = [
        row.effective_batch_size for row in effective_rows(plan, history, dataset_size)
    ]

    assert 1 <= len(sizes) <= 6
    assert plan.effective_batch_size in sizes
    assert all(3 * low <= 2 * high for low, high in pairwise(sizes))


@given(plans, tried, datasets)
def test_the_ladder_ends_where_an_epoch_no_longer_fills_an_update(
    plan, history, dataset_size
):
    rows = effective_rows(plan, history, dataset_size)

    above = [r for r in rows if r.effective_batch_size > plan.effective_batch_size]
    assert all(
        dataset_size is None or row.effective_batch_size <= dataset_size
        for row in above
    )


@given(plans, tried, datasets)
def test_a_micro_batch_on_the_ladder_is_the_plans_or_was_run(
    plan, history, dataset_size
):
    run = {trial.batch_size for trial in settled(history) if trial.fits}

    for row in effective_rows(plan, history, dataset_size):
        assert row.micro_batch_size in run | {plan.micro_batch_size}


@given(plans, tried, st.integers(1, 10**6))
def test_the_updates_of_an_epoch_cover_it_and_none_is_idle(plan, history, dataset_size):
    for row in effective_rows(plan, history, dataset_size):
        micro = row.micro_batch_size * plan.world_size
        passes = math.ceil(dataset_size / micro)

        assert row.updates_per_epoch * row.effective_batch_size >= dataset_size
        assert (row.updates_per_epoch - 1) * row.accumulate_grad_batches < passes


@given(plans, tried, datasets)
def test_what_was_not_measured_is_not_told(plan, history, dataset_size):
    timed = {t.batch_size for t in settled(history) if t.fits and t.step_seconds}

    for row in effective_rows(plan, history, dataset_size):
        known = row.micro_batch_size in timed
        assert (row.update_seconds is not None) == known
        assert (row.updates_per_epoch is not None) == (dataset_size is not None)
        assert (row.epoch_seconds is not None) == (known and dataset_size is not None)


@given(plans, tried, st.integers(1, 1000))
def test_an_epoch_of_whole_updates_takes_as_long_as_its_updates(plan, history, updates):
    dataset_size = updates * plan.effective_batch_size
    rows = effective_rows(plan, history, dataset_size)

    (row,) = (r for r in rows if r.effective_batch_size == plan.effective_batch_size)
    assert row.updates_per_epoch == updates
    if row.epoch_seconds is not None:
        assert row.epoch_seconds == pytest.approx(updates * row.update_seconds)


@given(plans, tried, st.integers(1, 10**6))
def test_more_accumulation_never_makes_an_epoch_longer(plan, history, dataset_size):
    rows = effective_rows(plan, history, dataset_size)

    same = [
        r.epoch_seconds for r in rows if r.micro_batch_size == plan.micro_batch_size
    ]
    if None not in same:
        assert all(more <= less * (1 + 1e-9) for less, more in pairwise(same))


def test_the_optimizer_is_paid_once_per_update():
    # 2 micro-batches of 0.1 s and an optimizer step of 0.05 s took 0.125 s per micro-batch
    trial = Trial(8, Outcome.FIT, 1, 0.125, accumulate=2, optimizer_seconds=0.05)

    rows = effective_rows(BatchPlan(8, 4), [trial], dataset_size=100)

    (row,) = (r for r in rows if r.accumulate_grad_batches == 4)
    assert row.update_seconds == pytest.approx(4 * 0.1 + 0.05)
    assert row.updates_per_epoch == 4  # 13 micro-batches: 4 + 4 + 4 + 1
    assert row.epoch_seconds == pytest.approx(13 * 0.1 + 4 * 0.05)


def test_an_optimizer_that_was_not_timed_apart_stays_in_the_step():
    trial = Trial(8, Outcome.FIT, 1, 0.125, accumulate=2)

    rows = effective_rows(BatchPlan(8, 4), [trial], dataset_size=None)

    assert [r.update_seconds for r in rows] == [
        r.accumulate_grad_batches * 0.125 for r in rows
    ]


def test_the_ladder_goes_down_by_less_accumulation_then_by_sizes_that_were_run():
    history = [Trial(size, Outcome.FIT, 1, 0.1) for size in (1, 3, 5, 6, 8)]

    rows = effective_rows(BatchPlan(8, 2), history, dataset_size=40)

    made = [(r.micro_batch_size, r.accumulate_grad_batches) for r in rows]
    assert made == [(1, 1), (3, 1), (5, 1), (8, 1), (8, 2), (8, 4)]
