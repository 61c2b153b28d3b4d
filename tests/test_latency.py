"""Latency: percentiles, the largest size within a limit, streams, and arguments."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import autobatch
from autobatch import BatchPlan, TuningReport
from autobatch._latency import best_within, enough_calls, slowest
from autobatch.report import Latency
from latency_cases import Paper, answered, found, latency, measured, spans, steady
from report_examples import settings


def report_of(latencies, limit=None, size=1):
    asked = settings(target_batch_size=None, latency_limit=limit)
    return answered(latencies=tuple(latencies), settings=asked, plan=BatchPlan(size))


@given(st.lists(spans, min_size=1), st.floats(0.1, 100))
def test_percentile_is_a_measured_call_by_nearest_rank(seconds, percentile):
    at = Latency.of(8, seconds, percentile).at_percentile_seconds

    assert at in seconds
    enough = percentile * len(seconds) / 100 - 1e-9
    assert sum(each <= at for each in seconds) >= enough
    assert sum(each < at for each in seconds) < enough + 1


def test_percentiles_count_every_call():
    """One of a hundred may be slow at the 99th percentile; two are seen."""
    one, two = (Latency.of(1, [1.0] * (100 - slow) + [9.0] * slow, 99) for slow in (1, 2))

    assert (one.p50_seconds, one.p99_seconds, one.calls) == (1.0, 1.0, 100)
    assert (two.p50_seconds, two.p99_seconds, two.calls) == (1.0, 9.0, 100)


@pytest.mark.parametrize(("percentile", "calls"), [(50, 100), (99, 100), (99.9, 1000), (100, 100)])
def test_high_percentiles_need_more_calls(percentile, calls):
    assert enough_calls(percentile) == calls


@given(st.lists(measured(), min_size=1, max_size=3))
def test_merged_ranks_are_as_slow_as_the_slowest(of_ranks):
    together = slowest(of_ranks)

    every = [each for one in of_ranks for each in one]
    assert [one.batch_size for one in together] == sorted({each.batch_size for each in every})
    for one in together:
        alike = [each for each in every if each.batch_size == one.batch_size]
        assert one.p99_seconds == max(each.p99_seconds for each in alike)
        assert one.p50_seconds == max(each.p50_seconds for each in alike)
        assert one.calls == min(each.calls for each in alike)


@given(measured(), spans, spans)
def test_a_longer_limit_never_gives_a_smaller_batch(latencies, one, other):
    report = report_of(latencies)

    assert report.cameras(max(one, other)) <= report.cameras(min(one, other))


@given(measured(), spans)
def test_the_size_taken_gives_nearly_the_most_and_the_smallest_does(latencies, limit):
    within = [each for each in latencies if each.at_percentile_seconds <= limit]

    best = best_within(latencies, limit)

    assert (best is None) == (not within)
    for each in within:
        assert best.samples_per_second >= 0.99 * each.samples_per_second
        if each.samples_per_second >= 0.99 * max(one.samples_per_second for one in within):
            assert best.batch_size <= each.batch_size


def test_a_slower_size_that_gives_less_is_not_taken():
    def call(size, seconds):
        return Latency(size, seconds, seconds, seconds, seconds, 100)

    latencies = [call(8, 0.012), call(16, 0.0199), call(32, 0.0398), call(64, 0.1)]

    assert best_within(latencies, 0.2).batch_size == 16
    assert best_within(latencies, 0.015).batch_size == 8
    assert best_within(latencies, 0.005) is None


def test_no_batch_is_suggested_for_a_stream_that_none_answers_in_time():
    # A single sample takes 50 ms in its slowest calls, and a batch of 32 takes 20 ms
    latencies = (
        Latency(1, 0.010, 0.050, 0.050, 0.050, 100),
        Latency(32, 0.020, 0.020, 0.020, 0.020, 100),
    )

    text = str(report_of(latencies, 0.033, size=32))

    (streams,) = (line for line in text.splitlines() if line.startswith("  Streams"))
    assert "alone" not in streams


@given(measured())
def test_knee_is_the_smallest_size_with_nearly_the_highest_throughput(latencies):
    speeds = {each.batch_size: each.samples_per_second for each in latencies}
    fastest = max(speeds.values())

    bend = report_of(latencies).knee

    assert speeds[bend] / fastest >= 0.95
    assert all(speed / fastest < 0.95 for size, speed in speeds.items() if size < bend)


@given(measured(), spans)
def test_a_size_is_stable_if_its_throughput_exceeds_the_rate(latencies, rate):
    for row, each in zip(report_of(latencies).stream(rate).rows, latencies, strict=True):
        ratio = each.samples_per_second / rate
        if not math.isclose(ratio, 1):
            assert row.is_stable == (ratio > 1)
        assert row.worst_seconds == row.filling_seconds + each.at_percentile_seconds


@given(measured(), st.floats(1, 240))
def test_one_camera_is_best_served_with_batches_of_one(latencies, fps):
    latencies = (latency(1, 0.9 / fps), *(e for e in latencies if e.batch_size > 1))

    assert report_of(latencies).stream(fps).best.batch_size == 1


@given(measured(), spans, st.none() | spans)
def test_best_size_for_a_stream_answers_soonest(latencies, rate, limit):
    one = report_of(latencies, limit).stream(rate)
    fine = [
        row.worst_seconds
        for row in one.rows
        if row.utilisation < 1 and (limit is None or row.worst_seconds <= limit)
    ]

    assert (one.best is None) == (not fine)
    assert one.best is None or one.best.worst_seconds == min(fine)


@given(measured(), spans)
def test_cameras_share_a_batch_answered_before_their_next_frames(latencies, fps):
    sizes = [e.batch_size for e in latencies if e.at_percentile_seconds <= 1 / fps]

    assert report_of(latencies).cameras(fps) == max(sizes, default=0)


@pytest.mark.parametrize("rate", [0, -30, math.nan, math.inf, True, "30", None])
def test_invalid_rates_are_refused(rate):
    report = answered()

    with pytest.raises(ValueError, match=r"^rate=.+ is not a rate; give a number"):
        report.stream(rate)
    with pytest.raises(ValueError, match=r"^fps=.+ is not a rate; give a number"):
        report.cameras(rate)


@pytest.mark.parametrize("value", [0, -1.0, True, "30", math.inf, math.nan])
def test_invalid_latency_limits_are_refused(value):
    with pytest.raises(
        ValueError, match=r"^latency_limit=.+ is not a time; give seconds, more than 0"
    ):
        autobatch.find(lambda batch_size: None, latency_limit=value)


@pytest.mark.parametrize("value", [0, -1.0, 100.5, True, "99", math.nan])
def test_invalid_percentiles_are_refused(value):
    with pytest.raises(
        ValueError, match=r"^percentile=.+ is not a percentile; give a number above 0"
    ):
        autobatch.find(lambda batch_size: None, latency_limit=1, percentile=value)


@pytest.mark.parametrize("value", [95, 99, 99.9])
def test_a_percentile_without_a_limit_is_refused(value):
    with pytest.raises(
        ValueError, match=rf"^percentile={value} says how many calls have to meet lat"
    ):
        autobatch.find(lambda batch_size: None, percentile=value)


def test_the_default_percentile_is_the_99th():
    report = found(Paper(steady(1e-3, 0)), max_micro_batch_size=1)

    assert report.settings.percentile == 99
    assert TuningReport.from_json(report.to_json()) == report


def test_a_latency_limit_excludes_a_target_and_a_plan():
    with pytest.raises(
        ValueError, match=r"^latency_limit=1 is about inference, which has no updates"
    ):
        found(Paper(lambda *_: 0.0), target_batch_size=64)
    with pytest.raises(ValueError, match=r"^plan=.+ is verified, and latency_limit=1 "):
        found(Paper(lambda *_: 0.0), plan=BatchPlan(4))
