"""Laws of every search, and of GuidedBisection on curves it can predict."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch import Bisection, GuidedBisection, Outcome, Trial
from search_curves import (
    BUDGET,
    HIGH,
    RESIDENT,
    ROOM,
    Allocations,
    Model,
    close,
    failures,
    found,
    line,
    run,
    sizes,
    truth,
)

SEARCHES = (
    Bisection(),
    Bisection(resolution=0.1),
    GuidedBisection(),
    GuidedBisection(resolution=0.05, growth=2),
)
each_search = pytest.mark.parametrize("search", SEARCHES, ids=repr)
modest = settings(max_examples=2 * settings.default.max_examples, derandomize=True)


# Any search


@each_search
def test_the_first_size_is_the_start_or_a_lower_cap(search):
    assert search.propose([], start=32, high=100, budget=BUDGET) == 32
    assert search.propose([], start=32, high=10, budget=BUDGET) == 10


@each_search
@pytest.mark.parametrize("start", [1, 2, 7, 64, 1000])
def test_a_search_without_a_fit_descends_to_one(search, start):
    trials = run(search, lambda size: BUDGET + size, start=start)

    assert sizes(trials)[-1] == 1
    assert sizes(trials) == sorted(sizes(trials), reverse=True)


@each_search
@pytest.mark.parametrize("read", ["fit", "all", "none"])
def test_size_one_is_found_if_nothing_else_fits(search, read):
    assert found(run(search, line(1), start=64, read=read)) == 1


@each_search
@pytest.mark.parametrize("high", [1, 2, 8, 9, 1000])
def test_the_cap_is_tried_before_it_is_the_answer(search, high):
    trials = run(search, lambda size: RESIDENT + size, high=high)

    assert found(trials) == high
    assert failures(trials) == 0


@each_search
def test_a_failure_below_a_fit_is_ignored(search):
    noise = [
        Trial(8, Outcome.FIT, peak=RESIDENT + ROOM // 4, resident=RESIDENT),
        Trial(4, Outcome.OUT_OF_MEMORY),
    ]

    proposed = search.propose(noise, start=8, high=HIGH, budget=BUDGET)

    assert proposed is not None
    assert proposed > 8


@each_search
def test_sizes_at_or_below_a_refused_one_are_never_tried(search):
    history = [
        Trial(64, Outcome.OVER_BUDGET, peak=BUDGET * 40, resident=RESIDENT),
        Trial(2, Outcome.REFUSED),
    ]

    while (size := search.propose(history, start=64, high=HIGH, budget=BUDGET)) is not None:
        assert 2 < size < 64
        history.append(Trial(size, Outcome.OUT_OF_MEMORY))

    assert history[-1].batch_size == 3


@each_search
def test_exploration_does_not_go_down_to_a_refused_size(search):
    history = [
        Trial(3, Outcome.FIT, peak=BUDGET - ROOM // 10, resident=RESIDENT, profile=(1, 2)),
        Trial(1, Outcome.REFUSED),
    ]

    assert search.propose(history, start=3, high=HIGH, budget=BUDGET) not in {1, None}


@each_search
@modest
@given(data=st.data())
def test_every_search_ends_and_repeats_no_size(search, data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    high = data.draw(st.integers(1, 5000))
    budget, trials = BUDGET, []
    start = data.draw(st.integers(1, 5000))
    while (size := search.propose(trials, start=start, high=high, budget=budget)) is not None:
        assert 1 <= size <= high
        assert size not in sizes(trials)
        assert len(trials) < 80
        outcome = draw(*Outcome) if trials else draw(Outcome.FIT, Outcome.OUT_OF_MEMORY)
        peak = data.draw(st.integers(0, budget)) if outcome is Outcome.FIT else None
        if outcome is Outcome.OVER_BUDGET:
            peak = data.draw(st.integers(budget + 1, 9 * budget))
        profile = tuple(data.draw(st.lists(st.integers(0, budget), max_size=4))) if peak else ()
        trials.append(Trial(size, outcome, draw(peak, None), resident=RESIDENT, profile=profile))
        if draw(False, False, True):
            budget = data.draw(st.integers(budget // 2, budget))
            trials = [judged(trial, budget) for trial in trials]


def judged(trial, budget):
    """Return the same trial, judged by a smaller budget."""
    over = trial.fits and trial.peak is not None and trial.peak > budget
    return replace(trial, outcome=Outcome.OVER_BUDGET) if over else trial


@each_search
@pytest.mark.parametrize("largest", [30, 200, 5000])
def test_a_search_continues_after_the_budget_shrinks(search, largest):
    peak = line(largest)
    trials = run(search, peak)
    less = BUDGET - ROOM // 3
    trials = [judged(trial, less) for trial in trials]
    before = len(trials)

    while (size := search.propose(trials, start=8, high=HIGH, budget=less)) is not None:
        fit = Outcome.FIT if peak(size) <= less else Outcome.OUT_OF_MEMORY
        trials.append(
            Trial(size, fit, peak(size) if fit is Outcome.FIT else None, resident=RESIDENT)
        )

    assert close(found(trials), truth(peak, budget=less), search.resolution)
    assert len(trials) - before <= 8


@pytest.mark.parametrize("kind", [Bisection, GuidedBisection])
@pytest.mark.parametrize("resolution", [0, 1, -0.1, 5, math.nan])
def test_a_bad_resolution_is_refused(kind, resolution):
    with pytest.raises(ValueError, match=r"^resolution must lie between 0 and 1, got .*\.$"):
        kind(resolution=resolution)


@pytest.mark.parametrize("growth", [1, 0, -8])
def test_a_bad_growth_is_refused(growth):
    with pytest.raises(ValueError, match=rf"^growth must be at least 2, got {growth}\.$"):
        GuidedBisection(growth=growth)


# Monotone curves


@st.composite
def monotone(draw):
    """Fixed memory, plus a power of the size, plus jumps."""
    fixed = draw(st.floats(0, 0.95)) * ROOM
    jumps = draw(st.lists(st.tuples(st.integers(1, 12_000), st.floats(0, 1)), max_size=12))
    at = sorted(size for size, _ in jumps)
    scale = draw(st.sampled_from([0.01, 0.1, 0.5, 1.5])) * ROOM
    rise = [0.0]
    for _, share in sorted(jumps):
        rise.append(rise[-1] + share * scale)
    largest = draw(st.floats(1, 12_000))
    power = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.0, 1.5, 2.0]))
    smooth = draw(st.floats(0, 1)) * ROOM
    grain = draw(st.sampled_from([1, 512, 2 * 2**20, 20 * 2**20, 2**30]))

    def peak(size):
        took = fixed + smooth * (size / largest) ** power + rise[bisect_right(at, size)]
        return RESIDENT + math.ceil(took / grain) * grain

    return peak


starts = st.integers(1, 300)
highs = st.integers(1, 20_000)


@pytest.mark.parametrize("search", [s for s in SEARCHES if isinstance(s, Bisection)])
@modest
@given(peak=monotone(), start=starts, high=highs)
def test_bisection_finds_the_largest_fit_to_its_resolution(search, peak, start, high):
    trials = run(search, peak, start=start, high=high, read="none")

    assert close(found(trials), truth(peak, high), search.resolution)


@pytest.mark.parametrize("search", [s for s in SEARCHES if isinstance(s, GuidedBisection)])
@pytest.mark.parametrize("read", ["fit", "all"])
@settings(modest, max_examples=4 * settings.default.max_examples)
@given(peak=monotone(), start=starts, high=highs, lie=st.booleans())
def test_guided_bisection_finds_the_largest_fit_or_fills_the_budget(
    search, read, peak, start, high, lie
):
    def profile(size):  # a straight line through the peak at 16, wrong elsewhere
        return (RESIDENT, RESIDENT + (peak(16) - RESIDENT) * size // 16)

    trials = run(
        search,
        peak,
        start=start,
        high=high,
        read=read,
        profile=profile if lie else None,
    )

    size = found(trials)
    unused = (BUDGET - peak(size)) / ROOM if size else 1
    # Readings on both sides of a line count as noise
    near = search.resolution * (1 if smooth(peak, trials) else 5)
    assert close(size, truth(peak, high), near) or unused <= max(near, 1 / size)


def smooth(peak, trials):
    """Return True if the curve through the fits bends one way only."""
    fits = sorted(t.batch_size for t in trials if t.fits)
    slopes = [(peak(b) - peak(a)) / (b - a) for a, b in pairwise(fits)]
    bends = {b > a for a, b in pairwise(slopes) if b != a}
    return len(bends) < 2


@modest
@given(peak=monotone(), start=starts, high=highs)
def test_guided_bisection_without_readings_is_bisection(peak, start, high):
    where = {"start": start, "high": high, "read": "none"}

    assert run(GuidedBisection(), peak, **where) == run(Bisection(), peak, **where)


# Straight lines, and maxima of straight lines with profiles


@pytest.mark.parametrize("search", [s for s in SEARCHES if isinstance(s, GuidedBisection)])
@modest
@given(
    largest=st.integers(30, 10_000),  # three readings must fit
    spare=st.floats(0.01, 0.99),
    fixed=st.floats(0, 0.9),
    start=st.integers(1, 64),
)
def test_on_a_straight_line_only_the_first_trial_may_fail(search, largest, spare, fixed, start):
    each = ROOM * (1 - fixed) / (largest + spare)
    peak = lambda size: RESIDENT + math.floor(ROOM * fixed + each * size)  # noqa: E731

    trials = run(search, peak, start=start)

    assert close(found(trials), truth(peak), search.resolution)
    assert failures(trials) == 0 or not trials[0].fits


models = st.builds(
    lambda largest, lines: Allocations(
        tuple(
            (int(fixed * ROOM), int((1 - fixed) * share * ROOM / largest)) for fixed, share in lines
        )
    ),
    st.floats(1, 10_000),
    st.lists(st.tuples(st.floats(0, 0.99), st.floats(0, 1)), min_size=2, max_size=9),
)


@pytest.mark.parametrize("search", [s for s in SEARCHES if isinstance(s, GuidedBisection)])
@settings(modest, max_examples=4 * settings.default.max_examples)
@given(model=models, start=st.integers(1, 64), high=st.integers(1, 20_000))
def test_with_true_profiles_only_the_first_trial_may_fail(search, model, start, high):
    trials = run(search, model.peak, profile=model.profile, start=start, high=high)

    assert close(found(trials), truth(model.peak, high), search.resolution)
    assert failures(trials) == 0 or not trials[0].fits or trials[0].batch_size <= 3


@pytest.mark.parametrize("largest", [30, 100, 1000, 10_000])
def test_profiles_take_three_trials_or_four_over_a_long_way(largest):
    model = Model(largest)

    trials = run(GuidedBisection(), model.peak, profile=model.profile)

    assert sizes(trials)[:2] == [8, 16]
    assert found(trials) == largest
    assert len(trials) == (3 if largest <= 16 * 8 else 4)


def test_profiles_of_size_one_are_not_used():
    model = Model(500)

    trials = run(GuidedBisection(), model.peak, profile=model.profile, start=1)

    assert sizes(trials)[:3] == [1, 2, 4]
    assert found(trials) == 500


def test_a_start_near_the_limit_takes_a_smaller_second_profile():
    model = Model(40)

    trials = run(GuidedBisection(), model.peak, profile=model.profile, start=32)

    assert sizes(trials) == [32, 16, 40]


def test_a_peak_equal_to_the_budget_fits():
    model = Allocations(((0, ROOM // 100), (0, ROOM // 200)))
    budget = RESIDENT + ROOM // 100 * 64

    trials = run(GuidedBisection(), model.peak, profile=model.profile, budget=budget)

    assert sizes(trials) == [8, 16, 64]


def test_profiles_that_contradict_a_peak_are_not_used():
    truthful, lying = Model(300), Model(3000)

    trials = run(GuidedBisection(), truthful.peak, profile=lying.profile)

    assert close(found(trials), 300, 0.01)
    assert trials == [
        replace(t, profile=lying.profile(t.batch_size) if t.fits else ()) for t in trials
    ]
    assert failures(trials) == 0


def test_a_profile_limit_that_recedes_is_not_followed():
    """From some size on there are more allocations, and the profiles no longer correspond."""

    def profile(size):
        square, line = 0.475 * (size / 333.5) ** 2, 0.87 + 0.13 * size / 333.5
        shares = (square, line, line, line) if size >= 100 else (square, line)
        return tuple(RESIDENT + int(ROOM * share) for share in shares)

    peak = lambda size: max(profile(size))  # noqa: E731

    trials = run(GuidedBisection(), peak, profile=profile, start=32)

    assert close(found(trials), truth(peak), 0.01)
    assert len(trials) < 10


def test_a_peak_over_the_budget_shortens_the_descent():
    without = run(GuidedBisection(), line(30), start=8000)
    read = run(GuidedBisection(), line(30), start=8000, read="all")

    assert found(without) == found(read) == 30
    assert len(read) < len(without)
