from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import BatchPlan, Outcome, Trial, _plan
from autobatch._plan import nearest
from autobatch._throughput.preference import Preference
from autobatch._trials.runner import per_rank
from autobatch.report import StepTimes

counts = st.integers(1, 5000)


def pace(seconds_by_size, optimizer_seconds=0.0):
    return StepTimes(tuple(seconds_by_size), tuple(seconds_by_size.values()), optimizer_seconds)


NO_PACE = pace({})


SMALLEST = Preference(own_size=None, has_batch_norm=False, is_split=True)


def candidates(target, world_size, largest, seconds, usable=lambda _: True, preference=SMALLEST):
    return _plan.candidates(target, world_size, largest, seconds, usable, preference)


def test_the_effective_batch_is_micro_times_accumulation_times_ranks():
    assert BatchPlan(8, 4, 2).effective_batch_size == 64


@given(target=counts, largest=counts, world_size=st.integers(1, 8))
def test_every_candidate_uses_a_micro_batch_that_fits_and_is_deterministic(
    target, largest, world_size
):
    plans = candidates(target, world_size, largest, NO_PACE)

    assert plans
    assert plans == candidates(target, world_size, largest, NO_PACE)
    for plan in plans:
        assert 1 <= plan.micro_batch_size <= largest
        assert plan.world_size == world_size


@given(target=counts, largest=counts, world_size=st.integers(1, 8))
def test_the_target_is_met_exactly_if_that_is_cheap(target, largest, world_size):
    samples, rest = divmod(target, world_size)
    fewest = math.ceil(max(samples, 1) / largest)
    cheap = any(samples % passes == 0 for passes in range(fewest, 2 * fewest + 1))

    plan = candidates(target, world_size, largest, NO_PACE)[0]

    if samples and not rest and cheap:
        assert plan.effective_batch_size == target


@given(target=counts, largest=counts, world_size=st.integers(1, 8))
def test_exactness_never_costs_more_than_twice_the_fewest_passes(target, largest, world_size):
    fewest = math.ceil(per_rank(target, world_size) / largest)

    for plan in candidates(target, world_size, largest, NO_PACE):
        assert 1 <= plan.accumulate_grad_batches <= 2 * fewest


@given(target=counts, largest=counts)
def test_a_deviation_is_as_small_as_passes_allow(target, largest):
    plan = candidates(target, 1, largest, NO_PACE)[0]
    fewest = math.ceil(target / largest)

    off = abs(plan.effective_batch_size - target)

    assert (
        off <= fewest
    )  # a rounding of at most half a sample per pass, or one sample short of `largest`


@given(
    target=st.integers(1, 500),
    largest=st.integers(1, 500),
    data=st.dictionaries(st.integers(1, 500), st.floats(1e-3, 1), min_size=1),
)
def test_a_plan_of_many_passes_is_within_five_percent_of_the_fastest_timed(target, largest, data):
    timed = {size: data[size] for size in sorted(data)}
    fewest = math.ceil(target / min(largest, target))

    first, *_ = candidates(target, 1, largest, pace(timed))

    if first.accumulate_grad_batches > 2 * fewest:
        sizes = [size for size in timed if size <= target]
        fastest = max(size / timed[size] for size in sizes)
        rate = first.micro_batch_size / pace(timed).micro(first.micro_batch_size)
        assert rate >= 0.95 * fastest * (1 - 1e-9)


def test_the_optimizer_step_counts_for_the_speed_of_a_plan():
    seconds = {64: 0.1, 128: 0.2}

    assert candidates(128, 1, 128, pace(seconds, 0.0))[0] == BatchPlan(64, 2)
    assert candidates(128, 1, 128, pace({64: 0.11, 128: 0.2}, 0.0))[0] == BatchPlan(128, 1)
    assert candidates(128, 1, 128, pace({64: 0.11, 128: 0.2}, 2.0))[0] == BatchPlan(64, 2)


@given(target=counts, sizes=st.sets(counts, min_size=1))
def test_the_nearest_verified_plan_uses_a_verified_size(target, sizes):
    plan = nearest(target, 1, sizes)

    assert plan.micro_batch_size in sizes
    assert abs(plan.effective_batch_size - target) <= max(
        plan.micro_batch_size / 2, plan.micro_batch_size - target
    )


def test_step_times_interpolate_and_never_extrapolate():
    slow = Trial(10, Outcome.FIT, 1, step_seconds=1.0)
    fast = Trial(20, Outcome.FIT, 1, step_seconds=3.5, accumulate=2, optimizer_seconds=1.0)
    failed = Trial(40, Outcome.OUT_OF_MEMORY)

    between = StepTimes.of([slow, fast, failed], ())

    assert between.sizes == (10, 20)
    assert between.micro(20) == 3.0  # without its share of the optimizer
    assert between.micro(15) == pytest.approx(2.0)
    assert between.micro(9) is None
    assert between.micro(21) is None
    assert between.update(20, 4) == 13.0
