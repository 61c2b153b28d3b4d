"""Reports about inference: facts, table, notes, JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import autobatch
from autobatch import BatchPlan, TuningReport
from autobatch.sinks import to_markdown
from latency_cases import Paper, answered, found, measured, noted, spans, steady
from report_examples import example, printed, reports
from report_examples import settings as report_settings

WIDTH = 86


def test_few_calls_are_reported_with_their_percentile():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    here = report.latencies[-1]
    text = str(report)
    assert 1 < here.calls < 12
    assert f"{here.calls} calls timed, asked for 99 %" in text
    assert "max 2 s " in text
    assert "99 % of calls" not in text
    assert f"{here.calls} at {here.batch_size}; there p99" in text
    assert "there p99 is the slowest" in text
    few = f"There was no time for 100 calls at {here.batch_size}, only for {here.calls}"
    assert noted(report, "There was no time") == f"{few}: p99 is the slowest of them."


def test_a_percentile_below_the_slowest_call_is_reported_as_such():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05, percentile=50)

    text = str(report)
    assert "50 % of calls" in text
    assert "slowest" not in text
    assert noted(report, "There was no time").endswith(f"only for {report.latencies[-1].calls}.")


def test_a_size_over_the_limit_by_its_trial_is_noted():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    over = report.plan.micro_batch_size + 1
    assert over not in {each.batch_size for each in report.latencies}
    assert over in {trial.batch_size for trial in report.trials}
    assert noted(report, f"Batches of {over} took longer than the limit in the few steps of their")


def test_smaller_sizes_that_were_not_timed_are_noted():
    report = found(Paper(steady(0.1, 0.1)), latency_limit=2.05)

    timed = {each.batch_size for each in report.latencies}
    left_out = [size for size in (1, 2, 4, 8, 16) if size not in timed]
    assert left_out
    *first, last = map(str, left_out)
    assert f"not timed ({', '.join(first)} and {last}): they" in noted(report, "Smaller sizes")


@pytest.mark.parametrize(
    ("limit", "shown"), [(1e-7, "100 ns"), (2.5e-5, "25 µs"), (4e-4, "0.400 ms")]
)
def test_small_limits_are_shown_in_a_small_unit(limit, shown):
    report = found(Paper(steady(limit / 50, limit / 50)), latency_limit=limit)

    assert f"answer within {shown}" in str(report)
    assert " 0 ms" not in str(report)
    assert shown.replace("µ", "u") in printed(report, encoding="ascii")


def test_error_shows_the_latency_of_a_single_sample_over_the_limit():
    sentence = (
        r"^No batch size answers within 20 ms: a single sample takes 41 ms in the slowest of 10 calls, 41 ms at the median\. "
        r"Raise latency_limit, lower percentile, or make the model faster\.$"
    )

    with pytest.raises(autobatch.DoesNotFitError, match=sentence):
        found(Paper(steady(0.031, 0.01)), latency_limit=0.02)


def test_memory_error_comes_before_the_latency_limit():
    paper = Paper(steady(1e-3, 0), capacity=10, memory=lambda _: 100)

    with pytest.raises(autobatch.DoesNotFitError, match="No batch size fits the budget"):
        found(paper)


def test_noisy_calls_are_noted():
    def seconds(size, at):
        if size > 4:
            return 0.12 if at % 20 == 0 else 1e-3
        return 0.09 if at % 20 == 0 else 1e-3

    disturbed = found(Paper(seconds), latency_limit=0.1)
    # Nothing larger was over the limit
    bounded = found(Paper(seconds), latency_limit=0.1, max_micro_batch_size=4)
    quiet = found(Paper(steady(1e-3, 0)), latency_limit=0.1, max_micro_batch_size=4)

    assert disturbed.plan.micro_batch_size == bounded.plan.micro_batch_size == 4
    assert noted(disturbed, "At 4 p99 is 90 times the median")
    for other in (bounded, quiet):
        assert not any("quiet machine" in note for note in other.notes)


def test_noise_at_the_next_size_is_noted():
    def seconds(size, at):
        return 0.5 if size >= 16 and at % 10 == 0 else 1e-3

    report = found(Paper(seconds), latency_limit=0.1, max_micro_batch_size=64)

    assert report.plan.micro_batch_size == 15
    assert noted(report, "Half of the calls at 16 take no longer than 1 ms, and some")
    quiet = found(Paper(steady(1e-3, 1e-3)), latency_limit=0.1)
    assert not any("Half of the calls" in note for note in quiet.notes)


def test_a_slow_smaller_size_is_noted():
    report = found(
        Paper(lambda size, at: 0.2 if size == 2 and at > 20 else 1e-3),
        latency_limit=0.1,
        max_micro_batch_size=8,
    )

    assert report.plan.micro_batch_size == 8
    assert any(
        note.startswith("Batches of 2 are over the limit although larger ones meet it")
        for note in report.notes
    )


@pytest.mark.parametrize(
    ("most", "shown"),
    [
        (1, None),
        (
            4,
            "one stream of 10 samples/s takes 300 ms to fill 4; in batches of 1 it is answered within 1.10 ms.",
        ),
    ],
)
def test_time_to_fill_a_batch_is_noted(most, shown):
    report = found(Paper(steady(1e-3, 1e-4)), latency_limit=0.1, max_micro_batch_size=most)

    waiting = [note for note in report.notes if note.startswith("Waiting")]
    assert waiting == ([f"Waiting for a batch to fill comes on top: {shown}"] if shown else [])


def test_latency_report_as_text(snapshot):
    snapshot(f"{answered()}\n", "latency.txt")


def test_latency_report_as_markdown(snapshot):
    snapshot(to_markdown(answered()), "latency.md")


def test_latency_report_as_json(snapshot):
    report = answered(latencies=answered().latencies[5:8], trials=answered().trials[5:8])

    snapshot(report.to_json() + "\n", "latency.json")
    assert TuningReport.from_json(report.to_json()) == report


def test_latency_report_of_a_high_percentile_and_a_lightning_step(snapshot):
    report = answered(
        settings=report_settings(target_batch_size=None, latency_limit=2.0, percentile=99.9),
        task="predict",
        plan=BatchPlan(64, world_size=2),
    )

    snapshot(f"{report}\n", "latency_rare.txt")


@given(reports(), measured(), spans, st.floats(0.1, 100))
def test_latency_report_keeps_its_width(report, latencies, limit, percentile):
    limited = report.settings.model_copy(update={"latency_limit": limit, "percentile": percentile})
    report = report.model_copy(update={"latencies": latencies, "settings": limited})

    for text in (str(report), printed(report, encoding="ascii")):
        assert all(cell_len(line) <= WIDTH for line in text.splitlines())


@given(measured(), spans, st.integers(0, 29))
def test_latency_report_marks_the_choice_and_fits_one_screen(latencies, limit, which):
    chosen = latencies[which % len(latencies)].batch_size
    limited = report_settings(target_batch_size=None, latency_limit=limit)
    report = answered(latencies=latencies, settings=limited, plan=BatchPlan(chosen))

    text = str(report)

    assert text.count("\n  ▶ ") == 1
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("changed", [{"batch_size": 0}, {"p50_seconds": 0}, {"p99_seconds": -1}])
def test_invalid_latencies_in_json_are_refused(changed):

    stored = json.loads(answered().to_json())
    stored["latencies"][0] |= changed

    with pytest.raises(ValueError, match=r"not a complete report \(latencies"):
        TuningReport.from_json(json.dumps(stored))


def test_report_gives_streams_and_cameras():
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


def test_the_knee_of_training_comes_from_its_throughput():
    assert example().knee == 48


@pytest.mark.parametrize("ask", ["stream", "cameras"])
@pytest.mark.parametrize("task", ["train", "validate"])
def test_a_report_without_timed_calls_refuses_streams_and_cameras(ask, task):
    report = example(task=task)

    sentence = rf"^report\.{ask} goes by how long calls take, and this report \(task '{task}'\) has timed none; ask"
    with pytest.raises(autobatch.AutobatchError, match=sentence):
        getattr(report, ask)(30)
