"""The search for the largest batch within a latency limit."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import autobatch
from autobatch._latency.search import SECONDS_TIMED, KnownTimes
from autobatch.testing import SimulatedAccelerator
from latency_cases import Paper, found, measured, noted, spans, steady
from sameness import same


def largest(report):
    """Return the largest size that was timed within the limit, of which the search is sure."""
    seconds = report.settings.latency_limit
    within = (each for each in report.latencies if each.at_percentile_seconds <= seconds)
    return max(each.batch_size for each in within)


@pytest.mark.parametrize("largest", [1, 2, 7, 16, 100])
def test_smaller_sizes_are_powers_of_two_up_to_the_answer(largest):
    report = found(Paper(steady(1e-4, 1e-6)), max_micro_batch_size=largest)

    sizes = [each.batch_size for each in report.latencies]
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(low < high <= 2 * low for low, high in pairwise(sizes))


@given(
    measured(),
    st.dictionaries(st.integers(1, 5000), spans, max_size=8),
    spans,
    st.just(math.inf) | spans,
)
def test_the_next_size_may_change_the_answer(latencies, steps, limit, affordable):
    """It was not timed, and lies between the best size and the largest that is known."""
    timed = {each.batch_size: each.at_percentile_seconds for each in latencies}
    best = max((size for size, took in timed.items() if took <= limit), default=0)
    over = [size for size, took in timed.items() if size > best]
    slow = [s for s, step in steps.items() if s > best and s not in timed]

    size = KnownTimes(limit, timed, steps).next_size(min(limit, affordable))

    if size is not None:
        assert size not in timed
        assert size > best
        assert size in steps or size < max([*over, *slow])
    elif math.isinf(affordable):
        # The search has ended: the next size is over the limit, or there is none
        known = [*over, *(s for s in slow if steps[s] > limit)]
        assert not known or min(known) - best <= max(1, best / 32)
        assert all(steps[size] > limit for size in slow)


@given(
    st.integers(1, 4000),
    st.floats(0.51, 30),
    st.floats(0, 0.5),
    st.sets(st.integers(1, 4096), min_size=1, max_size=5),
)
def test_narrowing_down_ends_at_the_largest_size_in_time(true, limit, fixed, tried):
    """With slow steps trials alone narrow down, and a single size is timed."""
    per_sample = (limit - fixed * limit) / (true + 0.5)
    seconds = {s: fixed * limit + per_sample * s for s in range(1, 4097)}
    steps = {size: seconds[size] for size in {*tried, 4096}}
    called = []

    for _ in range(60):
        timed = {each: seconds[each] for each in called}
        size = KnownTimes(limit, timed, steps).next_size(limit)
        if size is None:
            break
        if size in steps:
            called.append(size)
        else:
            steps[size] = seconds[size]

    within = max((each for each in called if seconds[each] <= limit), default=0)
    assert within <= true <= within + max(1, within // 32)
    if seconds[within] > 0.5:
        assert called[-1] == within or seconds[called[-1]] > limit


@given(
    st.floats(1e-4, 0.9),
    st.floats(1e-5, 0.1),
    st.integers(1, 100),
    st.floats(0, 0.1),
    st.integers(1, 3000),
)
def test_the_largest_batch_within_the_limit_is_found(base, per_sample, step, jump, most):
    """To within one thirty-second, and exactly up to 63, however slow calls are."""
    seconds = steady(base, per_sample, step, jump)
    sizes = range(1, most + 1)
    # Calls much slower than the limit are not timed
    true = max((size for size in sizes if seconds(size, 1) <= 1), default=0)
    # A clock that adds up has its own rounding
    sure = max((size for size in sizes if seconds(size, 1) < 1 - 1e-9), default=0)
    paper = Paper(seconds)

    if not sure:
        with contextlib.suppress(autobatch.DoesNotFitError):
            assert largest(found(paper, max_micro_batch_size=most)) == true
        return
    report = found(paper, max_micro_batch_size=most)

    size = largest(report)
    if any("Timing stopped" in note for note in report.notes):
        assert size <= true
    else:
        assert size <= true
        assert sure <= size + size // 32


# A line of seconds by size, as base and seconds per sample
@given(st.floats(1e-4, 0.15), st.floats(1e-5, 0.05), st.floats(1e-3, 0.3))
@example(0.001953125, 0.00390625, 0.1953125)  # a turn of size 8 comes before it
@example(1e-4, 1e-4, 0.28125)  # the turns of a smaller size would pass the 59 calls of the answer
def test_the_answer_has_100_calls_if_they_fit_in_the_time(base, per_sample, limit):
    paper = Paper(steady(base, per_sample))
    with contextlib.suppress(autobatch.DoesNotFitError):
        report = found(paper, latency_limit=limit, max_micro_batch_size=4096)

        answer = latency_of_answer(report)
        # With the first two calls, which are not timed, and a turn of smaller sizes before it
        if 102 * answer.p50_seconds <= SECONDS_TIMED - 2:
            assert answer.calls >= 100
        assert answer.calls == max(each.calls for each in report.latencies) or answer.calls >= 100


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("limit", "late", "times"), [(0.02, 0.0, 1), (0.05, 0.005, 3), (0.05, 0.03, 3), (0.01, 0.1, 2)]
)
def test_no_size_has_more_calls_than_an_answer_with_few(limit, late, times, seed):
    """Also if noise puts larger sizes over the limit after many of their calls."""
    numbers = itertools.count()

    def seconds(size, at):
        # Another generator each time: find() restores those that a loop can reach
        chance = random.Random(10**6 * seed + next(numbers))
        noise = times if chance.random() < late else 1 + chance.uniform(0, 0.1)
        return (1e-3 + 3e-4 * size) * noise

    report = found(Paper(seconds), latency_limit=limit)

    answer = latency_of_answer(report)
    # Late calls make sizes fail after many of their calls, until the time is over
    assert answer.calls >= 100 or any("Timing stopped" in note for note in report.notes)


def latency_of_answer(report):
    size = largest(report)
    return next(each for each in report.latencies if each.batch_size == size)


@pytest.mark.parametrize("room", [1, 7, 60, 64])
def test_memory_bounds_the_batch_as_well(room):
    paper = Paper(steady(1e-3, 1e-4), capacity=room, memory=lambda size: size)

    report = found(paper, memory_limit=1.0)

    assert largest(report) == room
    assert report.largest_fit == room


def test_the_answer_was_run_by_a_trial_and_timed():
    paper = Paper(steady(1e-3, 7e-4))

    report = found(paper, latency_limit=0.1)

    size = largest(report)
    assert 138 <= size <= 141  # 142 is over the limit
    assert any(trial.fits and trial.batch_size == size for trial in report.trials)
    here = next(each for each in report.latencies if each.batch_size == size)
    assert here.p99_seconds == pytest.approx(1e-3 + 7e-4 * size)
    assert {each.batch_size for each in report.latencies} <= {
        trial.batch_size for trial in report.trials if trial.fits
    }


def test_late_calls_decide_at_the_percentile():
    """Every twentieth call of 16 and more takes too long."""

    def seconds(size, at):
        return 0.05 if size >= 16 and at % 20 == 0 else 1e-3

    strict, lenient = (
        found(
            Paper(seconds),
            latency_limit=0.01,
            max_micro_batch_size=64,
            percentile=percentile,
        )
        for percentile in (99, 90)
    )

    assert largest(strict) == 15
    assert largest(lenient) == 64


def test_smaller_sizes_are_timed_in_turns():
    paper = Paper(steady(0.001, 1e-4))

    found(paper, max_micro_batch_size=8)

    # The answer, 8, has had its calls, and each smaller size its first turn
    assert paper.sizes_run[-27:] == [1, 2, 4] * 9


def test_first_calls_of_a_turn_are_not_timed():
    """A call that follows another size is slow, as on a device whose caches are cold."""

    class Cold(Paper):
        def answer(self, batch_size):
            for at, _ in enumerate(super().answer(batch_size)):
                self._now += 0.05 if at < 2 else 0.0
                yield

    cold = Cold(steady(1e-3, 1e-4))

    report = found(cold, latency_limit=0.03, max_micro_batch_size=8)

    assert largest(report) == 8
    assert report.latencies[-1].p99_seconds == pytest.approx(1.8e-3)


def test_calls_that_restart_the_workload_are_not_timed():
    class Short(Paper):
        def answer(self, batch_size):
            self._now += 0.05
            for _, _ in zip(range(5), super().answer(batch_size), strict=False):
                yield

    report = found(Short(steady(1e-3, 1e-4)), max_micro_batch_size=1, time_limit=None)

    assert report.latencies[0].p99_seconds == pytest.approx(1.1e-3)


def test_a_workload_of_a_single_call_is_timed():
    class Single(Paper):
        def answer(self, batch_size):
            yield next(super().answer(batch_size))
            self._now += 1e-3

    report = found(Single(lambda *_: 0.0), max_micro_batch_size=4)

    assert report.latencies[0].p50_seconds == pytest.approx(1e-3)


def test_a_plain_function_answers_one_batch():
    paper = Paper(lambda *_: 0.0)

    def answer(batch_size):
        paper._hold(batch_size)
        paper._now += 0.001 * batch_size

    report = autobatch.find(answer, device=paper, latency_limit=0.05)

    assert largest(report) in {49, 50}
    assert report.subject == "answer"


@pytest.mark.parametrize("base", [1e-4, 0.03, 0.1, 1.0])
def test_timing_keeps_its_time_limit_and_few_calls_are_noted(base):
    paper = Paper(steady(base, base / 50))

    report = found(paper, latency_limit=20 * base)

    # A trial is three steps on a device that no ledger watches, one more where modules may be compiled
    sizes = [trial.batch_size for trial in report.trials]
    by_trials = sum(4 * (base + base / 50 * size) for size in sizes)
    assert paper._now <= by_trials + SECONDS_TIMED + 1e-6
    is_noted = any("There was no time for 100 calls" in note for note in report.notes)
    assert is_noted == (base > 1e-3)


def test_the_largest_timed_size_is_taken_when_time_is_out():
    """Calls of ten seconds leave no time for a single one that counts."""
    report = found(Paper(steady(1.0, 0.1)), latency_limit=1000.0)

    size = largest(report)
    assert size == report.latencies[-1].batch_size
    assert f"sizes above {size} may answer in time too" in noted(report, "Timing stop")
    assert "too long to be timed repeatedly" in noted(report, "Largest fit not sought")


def test_calls_longer_than_the_time_limit_are_timed_once():
    report = found(Paper(steady(12.0, 0.1)), latency_limit=60.0)

    assert largest(report) == 8
    assert [each.calls for each in report.latencies] == [1]


# .1 s + .1 s per sample: the largest in time is 19 on paper
@pytest.mark.parametrize(
    ("base", "per_sample", "limit", "true"),
    [
        (0.1, 0.1, 2.0, 19),
        (0.05, 0.05, 1.0, 19),
        (0.2, 0.3, 1.0, 2),
        (0.9, 0.02, 1.0, 5),
        (0.7, 0.9, 5.0, 4),
        (0.01, 0.03, 1.0, 33),
    ],
)
def test_slow_calls_are_timed_near_the_limit(base, per_sample, limit, true):
    """Most of the time goes to the answer, and no trial goes far beyond the limit."""
    paper = Paper(steady(base, per_sample))

    report = found(paper, latency_limit=limit + 1e-9)

    size = largest(report)
    assert size <= true <= size + size // 32
    assert not any("Timing stopped" in note for note in report.notes)
    spent = {e.batch_size: e.calls * e.p50_seconds for e in report.latencies}
    assert spent[size] > sum(spent.values()) / 2
    # The first size is chosen before anything is known of the workload
    tried = [t.step_seconds for t in report.trials if t.batch_size != 8]
    assert max(tried) <= 1.3 * limit
    # A few sizes near the limit, and single samples; not the whole ladder
    assert len(report.trials) <= 10


def test_a_slow_size_over_the_limit_leaves_its_time_to_the_next():
    """There is time for few calls, so that none may be late: the first late one ends it."""

    def seconds(size, at):
        return 1.01 if size == 9 and at == 9 else 0.1 * size

    paper = Paper(seconds)
    report = found(paper, latency_limit=0.95)

    assert largest(report) == 8
    calls = {each.batch_size: each.calls for each in report.latencies}
    assert calls[8] > 2 * calls[9]


def test_the_best_size_that_ran_is_timed_when_time_limit_ends_trials():
    """`time_limit` allows no further trial between the sizes of the memory search."""
    paper = Paper(steady(0.1, 0.1))

    report = found(paper, latency_limit=2.0, time_limit=15)

    size = largest(report)
    assert size in {trial.batch_size for trial in report.trials}
    assert size < 19
    assert "Timing stopped" not in str(report)
    noted(report, "The search stopped at time_limit=15 seconds")
    if 20 in {trial.batch_size for trial in report.trials}:
        note = noted(report, f"Not timed were sizes between {size} and 20:")
        assert note.endswith("they may answer in time too.")


def test_memory_is_not_searched_beyond_the_latency_limit():
    paper = Paper(steady(0.01, 0.01))

    report = found(paper)

    assert max(paper.sizes_run) < 16 * 200
    note = noted(report, "Largest fit not sought: at ")
    assert "a step of its trial took 1.0" in note
    assert note.endswith("longer than latency_limit=1 seconds.")
    assert "larger sizes not sought" in str(report)
    assert "largest found to fit" not in str(report)


def test_timed_calls_and_not_a_trial_show_that_quick_steps_are_too_slow():
    report = found(Paper(steady(1e-4, 1e-4)), latency_limit=0.01)

    note = noted(report, "Largest fit not sought: at ")
    (size,) = (int(word) for word in note.split() if word.isdigit())
    assert note.endswith("half of the calls take longer than latency_limit=0.01 seconds.")
    assert size in {each.batch_size for each in report.latencies}


def test_a_size_out_of_memory_when_timed_is_not_taken():
    """Its trial fits, and then another process has taken the memory."""

    class Shrinking(Paper):
        def answer(self, batch_size):
            if self.sizes_run.count(8) >= 2:
                self._memory = lambda size: 10**10 if size >= 8 else size
            yield from super().answer(batch_size)

    report = found(Shrinking(steady(1e-3, 1e-4)), max_micro_batch_size=8)

    assert largest(report) < 8
    assert 8 not in {each.batch_size for each in report.latencies}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))


def test_a_real_network_is_timed_and_left_unchanged():
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def answer(batch_size):
        with torch.inference_mode():
            model(torch.randn(batch_size, 16))

    report = autobatch.find(
        answer,
        device=SimulatedAccelerator("64KiB"),
        latency_limit=30.0,
        max_micro_batch_size=20,
    )

    assert largest(report) == 20
    assert [each.batch_size for each in report.latencies] == [1, 2, 4, 8, 16, 20]
    assert all(each.calls == 100 for each in report.latencies)
    assert all(0 < e.p50_seconds <= e.p90_seconds <= e.p99_seconds for e in report.latencies)
    assert report.cameras(1 / 30) == 20
    assert report.task == "answer"
    assert same(before, dict(model.state_dict()))
    assert torch.equal(random, torch.get_rng_state())
    assert not model.training


def test_state_changed_by_calls_is_restored():
    """In training mode calls change the running mean, and may leave gradients behind."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def answer(batch_size):
        while True:
            model(torch.randn(batch_size, 16)).sum().backward()
            yield

    report = autobatch.find(
        answer,
        device=SimulatedAccelerator("1MiB"),
        latency_limit=30.0,
        max_micro_batch_size=4,
    )

    # A single sample has no variance: the workload refuses it
    assert [each.batch_size for each in report.latencies] == [2, 4]
    assert same(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calls_are_timed_without_the_ledger():
    watched = []
    device = SimulatedAccelerator("1MiB")

    def answer(batch_size):
        from torch.utils._python_dispatch import _len_torch_dispatch_stack

        watched.append(_len_torch_dispatch_stack() > 0)
        torch.ones(batch_size, 16).sum()

    autobatch.find(answer, device=device, latency_limit=30.0, max_micro_batch_size=2)

    assert any(watched)
    assert not any(watched[-100:])
