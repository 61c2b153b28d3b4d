"""Inference: the largest batch that answers within a limit, what streams get, and how a report tells it."""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import autobatch
from autobatch import TuningReport
from autobatch._latency import (
    Latency,
    cameras,
    enough_calls,
    knee,
    ladder,
    largest_within,
    next_size,
    search,
    slowest,
    stream,
)
from autobatch._plan import BatchPlan
from autobatch._report.layout import ASCII
from autobatch._trials import Outcome, Trial
from autobatch.sinks import to_markdown
from autobatch.testing import PaperDevice, SimulatedAccelerator
from report_examples import GIB, example, reports
from report_examples import settings as asked
from sameness import same

WIDTH = 86

spans = st.floats(1e-6, 1e3)


def latency(batch_size, seconds, top=None, calls=100):
    top = seconds if top is None else top
    return Latency(batch_size, seconds, seconds, top, top, calls)


@st.composite
def measured(draw):
    """Latencies of some sizes, in ascending order."""
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=30, unique=True))
    return tuple(
        Latency.of(size, draw(st.lists(spans, min_size=1, max_size=5)), 95)
        for size in sorted(sizes)
    )


# What calls come to


@given(st.lists(spans, min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_a_call_than_which_so_many_took_no_longer(seconds, percentile):
    at = Latency.of(8, seconds, percentile).at_percentile_seconds

    assert at in seconds
    enough = percentile * len(seconds) / 100 - 1e-9
    assert sum(each <= at for each in seconds) >= enough
    assert sum(each < at for each in seconds) < enough + 1


def test_no_call_is_left_out():
    """One of a hundred may be slow at the 99th percentile; two are seen."""
    one, two = (Latency.of(1, [1.0] * (100 - slow) + [9.0] * slow, 99) for slow in (1, 2))

    assert (one.p50_seconds, one.p99_seconds, one.calls) == (1.0, 1.0, 100)
    assert (two.p50_seconds, two.p99_seconds, two.calls) == (1.0, 9.0, 100)


@pytest.mark.parametrize(("percentile", "calls"), [(50, 100), (99, 100), (99.9, 1000), (100, 100)])
def test_rare_calls_take_many_to_be_seen(percentile, calls):
    assert enough_calls(percentile) == calls


@given(st.lists(measured(), min_size=1, max_size=3))
def test_ranks_together_are_as_slow_as_the_slowest(of_ranks):
    together = slowest(of_ranks)

    every = [each for told in of_ranks for each in told]
    assert [one.batch_size for one in together] == sorted({each.batch_size for each in every})
    for one in together:
        alike = [each for each in every if each.batch_size == one.batch_size]
        assert one.p99_seconds == max(each.p99_seconds for each in alike)
        assert one.p50_seconds == max(each.p50_seconds for each in alike)
        assert one.calls == min(each.calls for each in alike)


# Which size


@given(st.integers(1, 10**6))
def test_the_ladder_goes_up_to_the_largest_in_steps_of_two_at_most(largest):
    sizes = ladder(largest)

    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(low < high <= 2 * low for low, high in pairwise(sizes))


@given(measured(), spans, spans)
def test_a_longer_limit_never_means_a_smaller_batch(latencies, one, other):
    short, long = sorted([one, other])
    small, large = (largest_within(latencies, limit) for limit in (short, long))

    assert small is None or (large is not None and large.batch_size >= small.batch_size)
    assert small is None or small.at_percentile_seconds <= short


@given(
    measured(),
    st.dictionaries(st.integers(1, 5000), spans, max_size=8),
    spans,
    st.just(math.inf) | spans,
)
def test_what_is_timed_next_may_move_the_answer(latencies, steps, limit, affordable):
    """It was not timed, lies above the best, and below what is known to be over the limit."""
    timed = {each.batch_size: each.at_percentile_seconds for each in latencies}
    best = max((size for size, took in timed.items() if took <= limit), default=0)
    over = [size for size, took in timed.items() if size > best]
    slow = [s for s, step in steps.items() if s > best and s not in timed]

    size = next_size(latencies, steps, limit, affordable)

    if size is not None:
        assert size not in timed
        assert size > best
        assert size in steps or size < max([*over, *slow])
    elif math.isinf(affordable):
        # Nothing is left to ask: the next size is over the limit, or there is none
        known = [*over, *(s for s in slow if steps[s] > limit)]
        assert not known or min(known) - best <= max(1, best / 32)
        assert all(steps[size] > limit for size in slow)


@given(
    st.integers(1, 4000),
    st.floats(0.51, 30),
    st.floats(0, 0.5),
    st.sets(st.integers(1, 4096), min_size=1, max_size=5),
)
def test_asking_ends_at_the_largest_in_time_and_calls_only_it(true, limit, fixed, tried):
    """Where steps are slow, trials alone narrow the doubt, and one size is left to be timed."""
    per_sample = (limit - fixed * limit) / (true + 0.5)
    seconds = {s: fixed * limit + per_sample * s for s in range(1, 4097)}
    steps = {size: seconds[size] for size in {*tried, 4096}}
    called = []

    for _ in range(60):
        size = next_size(
            [latency(each, seconds[each]) for each in sorted(called)],
            steps,
            limit,
            math.inf,
        )
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


@given(measured())
def test_the_knee_is_the_smallest_that_is_nearly_as_fast_as_the_fastest(latencies):
    fastest = max(each.samples_per_second for each in latencies)

    bend = knee(latencies)

    assert bend.samples_per_second >= 0.95 * fastest
    assert all(
        each.samples_per_second < 0.95 * fastest
        for each in latencies
        if each.batch_size < bend.batch_size
    )


# Streams


@given(measured(), spans)
def test_a_size_keeps_up_with_a_stream_if_its_throughput_is_above_the_rate(latencies, rate):
    for row, each in zip(stream(latencies, rate, None).rows, latencies, strict=True):
        ratio = each.samples_per_second / rate
        if not math.isclose(ratio, 1):
            assert row.is_stable == (ratio > 1)
        assert row.worst_seconds == row.filling_seconds + each.at_percentile_seconds


@given(measured(), st.floats(1, 240))
def test_one_camera_wants_batches_of_one_where_a_frame_is_answered_before_the_next(latencies, fps):
    latencies = (latency(1, 0.9 / fps), *(e for e in latencies if e.batch_size > 1))

    assert stream(latencies, fps, None).best.batch_size == 1


@given(measured(), spans, st.none() | spans)
def test_the_best_size_for_a_stream_is_the_one_with_the_soonest_answers(latencies, rate, limit):
    one = stream(latencies, rate, limit)
    fine = [
        row.worst_seconds
        for row in one.rows
        if row.utilisation < 1 and (limit is None or row.worst_seconds <= limit)
    ]

    assert (one.best is None) == (not fine)
    assert one.best is None or one.best.worst_seconds == min(fine)


@given(measured(), spans)
def test_cameras_are_answered_in_one_batch_before_their_next_frames(latencies, fps):
    sizes = [e.batch_size for e in latencies if e.at_percentile_seconds <= 1 / fps]

    assert cameras(latencies, fps) == max(sizes, default=0)


@pytest.mark.parametrize("rate", [0, -30, math.nan, math.inf, True, "30", None])
def test_a_rate_is_a_number_above_zero(rate):
    report = answered()

    with pytest.raises(ValueError, match=r"^rate=.+ is not a rate; give a number"):
        report.stream(rate)
    with pytest.raises(ValueError, match=r"^fps=.+ is not a rate; give a number"):
        report.cameras(rate)


# The search, on paper


class Paper(PaperDevice):
    """A device whose calls take what a function of the batch size and the number of the call says."""

    def __init__(self, seconds, **options):
        super().__init__(
            **{"capacity": 10**9, "seconds_per_step": 0, "seconds_per_sample": 0} | options
        )
        self.calls = {}
        self._seconds = seconds

    def answer(self, batch_size):
        for _ in self.workload(batch_size, 1):
            self.calls[batch_size] = at = self.calls.get(batch_size, 0) + 1
            self._now += self._seconds(batch_size, at)
            yield


def found(paper, **options):
    return autobatch.find(paper.answer, device=paper, **{"latency_limit": 1.0, **options})


def steady(base, per_sample, step=1, jump=0.0):
    """Seconds that grow with the batch, and jump every so many samples."""
    return lambda size, _: base + per_sample * size + jump * (size // step)


@given(
    st.floats(1e-4, 0.9),
    st.floats(1e-5, 0.1),
    st.integers(1, 100),
    st.floats(0, 0.1),
    st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_batch_that_answers_in_time_is_found(base, per_sample, step, jump, most):
    """To within one thirty-second of it, and exactly up to 63, however slow calls are."""
    seconds = steady(base, per_sample, step, jump)
    sizes = range(1, most + 1)
    # Much slower than the limit, calls are not timed for their own sake
    true = max((size for size in sizes if seconds(size, 1) <= 1), default=0)
    # A clock that adds up has its own rounding
    sure = max((size for size in sizes if seconds(size, 1) < 1 - 1e-9), default=0)
    paper = Paper(seconds)

    if not sure:
        with contextlib.suppress(autobatch.DoesNotFitError):
            assert found(paper, max_micro_batch_size=most).plan == BatchPlan(true)
        return
    report = found(paper, max_micro_batch_size=most)

    size = report.plan.micro_batch_size
    if any("Timing stopped" in note for note in report.notes):
        assert size <= true
    else:
        assert size <= true
        assert sure <= size + size // 32


@pytest.mark.parametrize("room", [1, 7, 60, 64])
def test_only_what_fits_is_answered(room):
    paper = Paper(steady(1e-3, 1e-4), capacity=room, memory=lambda size: size)

    report = found(paper, memory_limit=1.0)

    assert report.plan == BatchPlan(room)
    assert report.largest_fit == room


def test_the_size_that_is_taken_was_run_by_a_trial_and_timed():
    paper = Paper(steady(1e-3, 7e-4))

    report = found(paper, latency_limit=0.1)

    size = report.plan.micro_batch_size
    assert 138 <= size <= 141  # 142 is over the limit
    assert any(trial.fits and trial.batch_size == size for trial in report.trials)
    here = next(each for each in report.latencies if each.batch_size == size)
    assert here.p99_seconds == pytest.approx(1e-3 + 7e-4 * size)
    assert {each.batch_size for each in report.latencies} <= {
        trial.batch_size for trial in report.trials if trial.fits
    }


def test_slow_calls_are_not_left_out_and_decide_at_the_percentile():
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

    assert strict.plan.micro_batch_size == 15
    assert lenient.plan.micro_batch_size == 64


def test_sizes_take_turns():
    paper = Paper(steady(0.001, 1e-4))

    found(paper, max_micro_batch_size=8)

    # The largest has had its first turn by then
    assert paper.sizes_run[-39:] == [*[1, 2, 4, 8] * 9, 1, 2, 4]


def test_first_calls_of_a_turn_are_left_out():
    """A call that follows another size is slow, as on a device whose caches are cold."""

    class Cold(Paper):
        def answer(self, batch_size):
            for at, _ in enumerate(super().answer(batch_size)):
                self._now += 0.05 if at < 2 else 0.0
                yield

    cold = Cold(steady(1e-3, 1e-4))

    report = found(cold, latency_limit=0.03, max_micro_batch_size=8)

    assert report.plan.micro_batch_size == 8
    assert report.latencies[-1].p99_seconds == pytest.approx(1.8e-3)


def test_calls_that_start_the_workload_anew_are_left_out():
    class Short(Paper):
        def answer(self, batch_size):
            self._now += 0.05
            for _, _ in zip(range(5), super().answer(batch_size), strict=False):
                yield

    report = found(Short(steady(1e-3, 1e-4)), max_micro_batch_size=1, time_limit=None)

    assert report.latencies[0].p99_seconds == pytest.approx(1.1e-3)


def test_a_workload_of_a_single_call_is_timed_all_the_same():
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

    assert report.plan.micro_batch_size in {49, 50}
    assert report.subject == "answer"


@pytest.mark.parametrize("base", [1e-4, 0.03, 0.1, 1.0])
def test_timing_has_its_own_bound_and_too_few_calls_are_told(base):
    paper = Paper(steady(base, base / 50))

    report = found(paper, latency_limit=20 * base)

    # A trial is three steps on a device that no ledger watches, one more where modules may be compiled
    sizes = [trial.batch_size for trial in report.trials]
    by_trials = sum(4 * (base + base / 50 * size) for size in sizes)
    assert paper._now <= by_trials + search.SECONDS_TIMED + 1e-6
    told = any("There was no time for 100 calls" in note for note in report.notes)
    assert told == (base > 1e-3)


def test_where_time_runs_out_the_largest_timed_is_taken_and_the_report_says_so():
    """Calls of ten seconds leave no time for a single one that counts."""
    report = found(Paper(steady(1.0, 0.1)), latency_limit=1000.0)

    size = report.plan.micro_batch_size
    assert size == report.latencies[-1].batch_size
    assert f"sizes above {size} may answer in time too" in noted(report, "Timing stop")
    # Those above that a trial ran are told for what they are
    assert "too long to be timed again" in noted(report, "Largest fit not sought")


def noted(report, start):
    """The one note that begins so."""
    (note,) = (note for note in report.notes if note.startswith(start))
    return note


def test_calls_longer_than_all_timing_are_timed_once_all_the_same():
    report = found(Paper(steady(12.0, 0.1)), latency_limit=60.0)

    assert report.plan == BatchPlan(8)
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
def test_slow_calls_are_timed_where_the_limit_lies(base, per_sample, limit, true):
    """Most of the time of all calls goes to the size that is taken, and no trial goes far beyond the limit."""
    paper = Paper(steady(base, per_sample))

    report = found(paper, latency_limit=limit + 1e-9)

    size = report.plan.micro_batch_size
    assert size <= true <= size + size // 32
    assert not any("Timing stopped" in note for note in report.notes)
    spent = {e.batch_size: e.calls * e.p50_seconds for e in report.latencies}
    assert spent[size] > sum(spent.values()) / 2
    # The first size is not chosen by anything that is known of the workload
    tried = [t.step_seconds for t in report.trials if t.batch_size != 8]
    assert max(tried) <= 1.3 * limit
    # A few sizes near the limit, and single samples; not the whole ladder
    assert len(report.trials) <= 10


def test_a_slow_size_that_is_late_once_leaves_its_time_to_the_next():
    """Of so few calls as there is time for, none may be late: the first that is ends it."""

    def seconds(size, at):
        return 1.01 if size == 9 and at == 9 else 0.1 * size

    paper = Paper(seconds)
    report = found(paper, latency_limit=0.95)

    assert report.plan == BatchPlan(8)
    calls = {each.batch_size: each.calls for each in report.latencies}
    assert calls[8] > 2 * calls[9]


def test_few_calls_are_told_wherever_their_percentile_stands():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    here = report.latencies[-1]
    text = str(report)
    assert 1 < here.calls < 12
    assert f"{here.calls} calls timed, asked for 99 %" in text
    assert "max 2 s " in text
    assert "99 % of calls" not in text
    assert f"{here.calls} calls at {here.batch_size}" in text
    assert "there p99 is the slowest" in text
    few = f"There was no time for 100 calls at {here.batch_size}, only for {here.calls}"
    assert noted(report, "There was no time").startswith(f"{few}: what stands for the")


def test_few_calls_that_tell_their_percentile_are_not_said_to_be_the_slowest():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05, percentile=50)

    text = str(report)
    assert "50 % of calls" in text
    assert "slowest" not in text
    assert noted(report, "There was no time").endswith(f"only for {report.latencies[-1].calls}.")


def test_a_size_whose_trial_alone_is_over_the_limit_is_told_so():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    over = report.plan.micro_batch_size + 1
    assert over not in {each.batch_size for each in report.latencies}
    assert over in {trial.batch_size for trial in report.trials}
    assert noted(report, f"{over} took longer than the limit in the few steps of its trial")


def test_where_time_leaves_out_smaller_sizes_they_are_named():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    timed = {each.batch_size for each in report.latencies}
    left_out = [size for size in (1, 2, 4, 8, 16) if size not in timed]
    assert left_out
    names = ", ".join(map(str, left_out))
    assert f"not timed, {names}, may" in noted(report, "Smaller sizes")


def test_where_trials_run_out_of_time_the_best_of_those_that_ran_is_timed():
    """`time_limit` allows no trial between what the search has run."""
    paper = Paper(steady(0.1, 0.1))

    report = found(paper, latency_limit=2.0, time_limit=15)

    size = report.plan.micro_batch_size
    assert size in {trial.batch_size for trial in report.trials}
    assert size < 19
    assert "Timing stopped" not in str(report)
    noted(report, "The search stopped at time_limit=15 seconds")
    if 20 in {trial.batch_size for trial in report.trials}:
        note = noted(report, f"Not timed were sizes between {size} and 20:")
        assert note.endswith("they may answer in time too.")


def test_memory_is_not_searched_beyond_what_is_slow_in_any_case():
    paper = Paper(steady(0.01, 0.01))

    report = found(paper)

    assert max(paper.sizes_run) < 16 * 200
    note = noted(report, "Largest fit not sought: at ")
    assert "a step of its trial took 1.0" in note
    assert note.endswith("longer than latency_limit=1 seconds.")
    assert "larger sizes not sought" in str(report)
    assert "largest found to fit" not in str(report)


def test_of_quick_steps_calls_and_not_a_trial_show_what_is_too_slow():
    report = found(Paper(steady(1e-4, 1e-4)), latency_limit=0.01)

    note = noted(report, "Largest fit not sought: at ")
    (size,) = (int(word) for word in note.split() if word.isdigit())
    assert note.endswith("every call takes longer than latency_limit=0.01 seconds.")
    assert size in {each.batch_size for each in report.latencies}


@pytest.mark.parametrize(
    ("limit", "said"), [(1e-7, "100 ns"), (2.5e-5, "25 µs"), (4e-4, "0.400 ms")]
)
def test_small_limits_are_told_in_a_unit_that_shows_them(limit, said):
    report = found(Paper(steady(limit / 50, limit / 50)), latency_limit=limit)

    assert f"answer within {said}" in str(report)
    assert " 0 ms" not in str(report)
    assert report.text(ASCII).isascii()
    assert said.replace("µ", "u") in report.text(ASCII)


def test_a_size_that_memory_refuses_once_it_is_timed_is_not_taken():
    """Its trial fits, and then others have taken the memory."""

    class Shrinking(Paper):
        def answer(self, batch_size):
            if self.sizes_run.count(8) >= 2:
                self._memory = lambda size: 10**10 if size >= 8 else size
            yield from super().answer(batch_size)

    report = found(Shrinking(steady(1e-3, 1e-4)), max_micro_batch_size=8)

    assert report.plan.micro_batch_size < 8
    assert 8 not in {each.batch_size for each in report.latencies}


def test_where_not_even_one_sample_answers_in_time_it_is_told_how_long_it_takes():
    sentence = (
        r"^No batch size answers within 20 ms: a single sample takes 41 ms in the slowest of 10 calls, 41 ms at the median\. "
        r"Raise latency_limit, lower percentile, or make the model faster\.$"
    )

    with pytest.raises(autobatch.DoesNotFitError, match=sentence):
        found(Paper(steady(0.031, 0.01)), latency_limit=0.02)


def test_where_nothing_fits_that_is_what_is_told():
    paper = Paper(steady(1e-3, 0), capacity=10, memory=lambda _: 100)

    with pytest.raises(autobatch.DoesNotFitError, match="No batch size fits the budget"):
        found(paper)


# What is told besides


def test_calls_that_something_disturbs_are_told():
    def seconds(size, at):
        if size > 4:
            return 0.12 if at % 20 == 0 else 1e-3
        return 0.09 if at % 20 == 0 else 1e-3

    disturbed = found(Paper(seconds), latency_limit=0.1)
    # Nothing larger was over the limit
    bounded = found(Paper(seconds), latency_limit=0.1, max_micro_batch_size=4)
    quiet = found(Paper(steady(1e-3, 0)), latency_limit=0.1, max_micro_batch_size=4)

    assert disturbed.plan.micro_batch_size == bounded.plan.micro_batch_size == 4
    assert noted(disturbed, "At 4 the 99th percentile is 90 times the median")
    for other in (bounded, quiet):
        assert not any("quiet machine" in note for note in other.notes)


def test_a_next_size_that_only_disturbances_put_over_the_limit_is_told():
    def seconds(size, at):
        return 0.5 if size >= 16 and at % 10 == 0 else 1e-3

    report = found(Paper(seconds), latency_limit=0.1, max_micro_batch_size=64)

    assert report.plan.micro_batch_size == 15
    assert noted(report, "Half of the calls at 16 take no longer than 1 ms, and some")
    quiet = found(Paper(steady(1e-3, 1e-3)), latency_limit=0.1)
    assert not any("Half of the calls" in note for note in quiet.notes)


def test_a_smaller_size_that_is_slow_by_itself_is_told():
    report = found(
        Paper(lambda size, at: 0.2 if size == 2 and at > 20 else 1e-3),
        latency_limit=0.1,
        max_micro_batch_size=8,
    )

    assert report.plan.micro_batch_size == 8
    assert any(
        note.startswith("Batches of 2 are over the limit though larger ones meet it")
        for note in report.notes
    )


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (1, None),
        (
            4,
            "one stream of 10 samples/s takes 300 ms to fill 4; in batches of 1 it is answered within 1.10 ms.",
        ),
    ],
)
def test_that_a_batch_has_to_fill_first_is_told(most, said):
    report = found(Paper(steady(1e-3, 1e-4)), latency_limit=0.1, max_micro_batch_size=most)

    told = [note for note in report.notes if note.startswith("Waiting")]
    assert told == ([f"Waiting for a batch to fill comes on top: {said}"] if said else [])


# On a real network


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))


def test_a_real_network_answers_and_is_left_as_it_was():
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

    assert report.plan == BatchPlan(20)
    assert [each.batch_size for each in report.latencies] == [1, 2, 4, 8, 16, 20]
    assert all(each.calls == 100 for each in report.latencies)
    assert all(0 < e.p50_seconds <= e.p90_seconds <= e.p99_seconds for e in report.latencies)
    assert report.cameras(1 / 30) == 20
    assert report.task == "answer"
    assert same(before, dict(model.state_dict()))
    assert torch.equal(random, torch.get_rng_state())
    assert not model.training


def test_what_calls_change_is_given_back():
    """In training mode every call moves the running mean, with gradients it may leave some behind."""
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


def test_calls_are_timed_without_a_ledger_that_watches():
    watched = []
    device = SimulatedAccelerator("1MiB")

    def answer(batch_size):
        from torch.utils._python_dispatch import _len_torch_dispatch_stack

        watched.append(_len_torch_dispatch_stack() > 0)
        torch.ones(batch_size, 16).sum()

    autobatch.find(answer, device=device, latency_limit=30.0, max_micro_batch_size=2)

    assert any(watched)
    assert not any(watched[-100:])


# What is refused


@pytest.mark.parametrize("value", [0, -1.0, True, "30", math.inf, math.nan])
def test_a_limit_on_latency_is_a_time(value):
    with pytest.raises(
        ValueError, match=r"^latency_limit=.+ is not a time; give seconds, more than 0"
    ):
        autobatch.find(lambda batch_size: None, latency_limit=value)


@pytest.mark.parametrize("value", [0, -1.0, 100.5, True, "99", math.nan])
def test_a_percentile_is_one(value):
    with pytest.raises(
        ValueError, match=r"^percentile=.+ is not a percentile; give a number above 0"
    ):
        autobatch.find(lambda batch_size: None, latency_limit=1, percentile=value)


@pytest.mark.parametrize("value", [95, 99, 99.9])
def test_a_percentile_of_no_limit_is_refused(value):
    with pytest.raises(
        ValueError, match=rf"^percentile={value} says how many calls have to meet lat"
    ):
        autobatch.find(lambda batch_size: None, percentile=value)


def test_a_percentile_that_is_not_given_is_the_99th():
    report = found(Paper(steady(1e-3, 0)), max_micro_batch_size=1)

    assert report.settings.percentile == 99
    assert TuningReport.from_json(report.to_json()) == report


def test_a_limit_on_latency_knows_no_updates_and_no_plan():
    with pytest.raises(
        ValueError, match=r"^latency_limit=1 is about inference, which has no updates"
    ):
        found(Paper(lambda *_: 0.0), target_batch_size=64)
    with pytest.raises(ValueError, match=r"^plan=.+ is verified, and latency_limit=1 "):
        found(Paper(lambda *_: 0.0), plan=BatchPlan(4))


# The report


def answered(**changes) -> TuningReport:
    """A search that met its limit between 32 and 64."""
    told = (
        (1, 1.0, 1.4, 1.7, 2.70),
        (2, 1.1, 1.4, 1.7, 2.74),
        (4, 1.7, 2.1, 2.3, 2.80),
        (8, 3.3, 3.6, 3.9, 2.93),
        (16, 6.5, 7.0, 7.5, 3.20),
        (32, 13.7, 14.1, 14.5, 3.73),
        (40, 19.4, 20.1, 22.9, 4.00),
        (42, 31.4, 32.3, 34.1, 4.07),
        (64, 31.5, 33.0, 34.8, 4.80),
    )
    latencies = tuple(
        Latency(size, p50 / 1e3, p90 / 1e3, p99 / 1e3, p99 / 1e3, 100)
        for size, p50, p90, p99, _ in told
    )
    trials = tuple(
        Trial(size, Outcome.FIT, int(gib * GIB), p50 / 1e3, resident=2 * GIB)
        for size, p50, _, _, gib in told
    )
    report = example(
        settings=asked(target_batch_size=None, latency_limit=1 / 30, percentile=99),
        subject="answer",
        task="answer",
        trials=trials,
        plan=BatchPlan(40),
        latencies=latencies,
        dataset_size=None,
        validation_batch_size=None,
        look=None,
        notes=(
            "Waiting for a batch to fill comes on top: one stream of 30 samples/s takes 1.3 s to fill 40.",
        ),
    )
    return report.model_copy(update=changes)


def test_the_report_of_what_answers_in_time(snapshot):
    snapshot(f"{answered()}\n", "latency.txt")


def test_the_report_of_what_answers_in_time_in_markdown(snapshot):
    snapshot(to_markdown(answered()), "latency.md")


def test_json_holds_latencies_with_units_and_what_is_derived(snapshot):
    report = answered(latencies=answered().latencies[5:8], trials=answered().trials[5:8])

    snapshot(report.to_json() + "\n", "latency.json")
    assert TuningReport.from_json(report.to_json()) == report


def test_the_report_of_a_rare_percentile_and_a_step_of_lightning(snapshot):
    report = answered(
        settings=asked(target_batch_size=None, latency_limit=2.0, percentile=99.9),
        task="predict",
        plan=BatchPlan(64, world_size=2),
    )

    snapshot(f"{report}\n", "latency_rare.txt")


@given(reports(), measured(), spans, st.floats(0.1, 100))
@settings(deadline=None)
def test_a_report_with_latencies_is_never_wider_than_its_columns(
    report, latencies, limit, percentile
):
    told = report.settings.model_copy(update={"latency_limit": limit, "percentile": percentile})
    report = report.model_copy(update={"latencies": latencies, "settings": told})

    for text in (report.text(), report.text(ASCII)):
        assert all(cell_len(line) <= WIDTH for line in text.splitlines())


@given(measured(), spans, st.integers(0, 29))
@settings(deadline=None)
def test_a_report_with_latencies_marks_its_choice_and_is_one_screen(latencies, limit, which):
    chosen = latencies[which % len(latencies)].batch_size
    told = asked(target_batch_size=None, latency_limit=limit)
    report = answered(latencies=latencies, settings=told, plan=BatchPlan(chosen))

    text = str(report)

    assert text.count("\n  ▶ ") == 1
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("changed", [{"batch_size": 0}, {"p50_seconds": 0}, {"p99_seconds": -1}])
def test_latencies_that_can_not_be_are_refused(changed):
    import json

    stored = json.loads(answered().to_json())
    stored["latencies"][0] |= changed

    with pytest.raises(ValueError, match=r"not a complete report \(latencies"):
        TuningReport.from_json(json.dumps(stored))


def test_the_report_answers_what_streams_and_cameras_get():
    report = answered()

    assert report.knee == 4  # 2,353 of 2,462 samples per second
    assert report.cameras(30) == 40
    assert report.cameras(60) == 32
    assert report.cameras(1000) == 0
    assert report.stream(30).best.batch_size == 1
    row = next(row for row in report.stream(30).rows if row.batch_size == 32)
    assert row.filling_seconds == pytest.approx(31 / 30)
    assert row.utilisation == pytest.approx(30 * 0.0137 / 32)
    # Batches of 1 do not keep up; of those that do, 2 waits the least
    assert report.stream(1500).best.batch_size == 2
    assert report.stream(10_000).best is None


def test_the_knee_of_training_is_that_of_its_speed():
    assert example().knee == 48


@pytest.mark.parametrize("ask", ["stream", "cameras"])
@pytest.mark.parametrize("task", ["train", "validate"])
def test_a_report_without_timed_calls_answers_no_stream_and_no_camera(ask, task):
    report = example(task=task)

    sentence = rf"^report\.{ask} goes by how long calls take, and this report \(task '{task}'\) has timed none; ask"
    with pytest.raises(autobatch.AutobatchError, match=sentence):
        getattr(report, ask)(30)
