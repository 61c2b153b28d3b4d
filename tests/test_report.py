from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from autobatch import BatchPlan, NoiseReading, Outcome, Trial, TuningReport
from autobatch._report.tables import thinned
from autobatch._report.units import aligned, duration, factor, multiple, percent
from autobatch.report import Look
from autobatch.sinks import completed_on_console, json_file, markdown_file, to_markdown
from conftest import SNAPSHOTS
from report_examples import example, full_example, printed, reports, settings

WIDTH = 86


# Settings


@pytest.mark.parametrize("name", ["target_batch_size", "max_micro_batch_size", "dataset_size"])
@pytest.mark.parametrize("value", [-3, 0, True, 2.0, "32", float("nan"), [1]])
def test_a_count_is_a_whole_number_above_zero(name, value):
    sentence = (
        f"{name}={value!r} is not a count; give a whole number of samples, 1 or more, or None."
    )

    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        settings(**{name: value})


@pytest.mark.parametrize("value", [0, -1, None, False, 1.5, "3"])
def test_a_trial_has_at_least_one_step(value):
    sentence = (
        f"steps_per_trial={value!r} is not a count; "
        "give a whole number of optimizer steps, 1 or more."
    )

    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        settings(steps_per_trial=value)


@pytest.mark.parametrize("value", [0, -1.0, True, "300", float("inf"), float("nan")])
def test_a_time_limit_is_a_positive_number(value):
    sentence = (
        f"time_limit={value!r} is not a time; give seconds, more than 0, or None for no limit."
    )

    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        settings(time_limit=value)


@pytest.mark.parametrize("value", [0, 0.0, 1.5, 1, -5, True, None, "lots", "10 apples"])
def test_a_memory_limit_is_a_share_or_an_amount(value):
    with pytest.raises(ValueError, match=r"^memory_limit=[^\n]+\.$"):
        settings(memory_limit=value)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"^batchsize=3 is not a setting\.$"):
        settings(batchsize=3)


def test_numpy_integers_are_counts():
    assert settings(target_batch_size=np.int64(64)).target_batch_size == 64


@pytest.mark.parametrize("value", [0.5, 1.0, 2**30, "10GiB"])
def test_a_memory_limit_is_kept_as_given(value):
    kept = settings(memory_limit=value).memory_limit

    assert (kept, type(kept)) == (value, type(value))


# JSON


@given(reports())
def test_a_report_survives_json(report):
    assert TuningReport.from_json(report.to_json()) == report


def test_json_has_units_in_names_and_derived_numbers(snapshot):
    text = example(trials=example().trials[5:]).to_json()

    snapshot(text + "\n", "report.json")
    stored = json.loads(text)
    assert stored["plan"]["effective_batch_size"] == 256
    assert stored["sizes"][0]["peak_bytes"] == stored["trials"][0]["peak_bytes"]
    assert (stored["largest_fit"], stored["smallest_failing"]) == (56, 64)


def numbers_of(value, path=(), kind=None):
    """Yield each number of a JSON document: its path, and the kind of the record around it."""
    if isinstance(value, dict):
        inside = value.get("kind", kind)
        for key, each in value.items():
            yield from numbers_of(each, (*path, key), inside)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_of(each, path, kind)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, kind


@given(reports())
def test_every_number_in_json_has_a_kind(report):
    stored = json.loads(report.to_json())

    for path, kind in numbers_of(stored):
        if path[0] not in ("settings", "schema_version"):  # settings are the user's
            assert (kind or stored["kinds"][path[0]]) in ("measured", "derived", "estimated")


def test_numbers_about_the_loss_are_estimated_and_times_measured(snapshot):
    text = full_example(trials=(), curve=full_example().curve[4:]).to_json()

    snapshot(text + "\n", "report_full.json")
    kinds = {path[-2:]: kind for path, kind in numbers_of(json.loads(text))}
    assert kinds["to_same_loss", "relative_time"] == "estimated"
    assert kinds["optimum", "accumulate_grad_batches"] == "estimated"
    assert kinds["effective", "updates_per_epoch"] == "derived"
    assert kinds["curve", "step_seconds"] == "measured"
    assert kinds["noise", "low_samples"] == "measured"


@pytest.mark.parametrize("name", ["report.json", "report_full.json", "latency.json"])
def test_a_report_stored_by_version_0_1_0_is_read(name):
    text = (SNAPSHOTS / name).read_text(encoding="utf-8")

    assert json.loads(TuningReport.from_json(text).to_json()) == json.loads(text)


def test_the_profile_of_a_trial_is_not_stored():
    trial = Trial(1, Outcome.FIT, 5, profile=(1, 2, 3))
    fields = {name: getattr(example(), name) for name in TuningReport.model_fields}

    report = TuningReport(**(fields | {"trials": (trial,)}))

    assert report.trials == (Trial(1, Outcome.FIT, 5),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "",
            r"The text is not JSON \(.+\); give what TuningReport.to_json\(\) wrote\.",
        ),
        ("[" * 10**5, r"The text is not JSON \(.+\); give .+\."),
        ("[]", r"The text is JSON, but not a report of autobatch; give .+\."),
        ('{"a": 1}', r"The text is JSON, but not a report of autobatch; give .+\."),
        (
            '{"schema_version": 2}',
            r"The text has schema_version=2, and this version of autobatch reads up to 1; upgrade .+\.",
        ),
        (
            '{"schema_version": 1}',
            r"The text is not a complete report \(autobatch_version: Field required\); give .+\.",
        ),
    ],
)
def test_other_text_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        TuningReport.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", {"micro_batch_size": 0}),
        ("trials", [{"batch_size": 0, "outcome": "fit"}]),
        ("trials", [{"batch_size": 1, "outcome": "fit", "step_seconds": -1}]),
        ("trials", [{"batch_size": 1, "outcome": "fit", "step_seconds": float("nan")}]),
        ("trials", [{"batch_size": 1, "outcome": "splendid"}]),
        ("trials", "none"),
        ("search_seconds", float("inf")),
    ],
)
def test_impossible_numbers_are_refused(field, value):
    stored = json.loads(example().to_json()) | {field: value}

    with pytest.raises(ValueError, match=rf"^The text is not a complete report \({field}"):
        TuningReport.from_json(json.dumps(stored))


def test_a_report_is_read_from_a_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(example().to_json(), encoding="utf-8")

    assert TuningReport.read(path) == example()


@pytest.mark.parametrize("act", [TuningReport.read, json_file, markdown_file])
def test_an_invalid_path_is_refused_in_one_sentence(act):
    with pytest.raises(ValueError, match=r"^path=3 is not a path; give a str or .*\.$"):
        act(3)


def test_an_unreadable_file_is_named(tmp_path):
    missing, picture, other = (tmp_path / n for n in ("missing", "picture", "other"))
    picture.write_bytes(b"\xff\xd8")
    other.write_text("{}")

    with pytest.raises(ValueError, match=r"missing cannot be read \(No such file .+\); "):
        TuningReport.read(missing)
    with pytest.raises(ValueError, match=r"picture cannot be read \(it is not UTF-8 text\); "):
        TuningReport.read(picture)
    with pytest.raises(ValueError, match="other is JSON, but not a report of autobatch; "):
        TuningReport.read(other)


# Text


def test_the_report_of_one_device(snapshot):
    snapshot(f"{example()}\n", "report.txt")


def test_the_report_with_everything_measured(snapshot):
    snapshot(f"{full_example()}\n", "report_full.txt")
    assert len(str(full_example()).splitlines()) <= 45


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        (
            NoiseReading("settling", 80.4, reason="the learning rate was still rising"),
            "Noise scale not settled; at least 80.4 so far: the learning rate was still rising.",
        ),
        (
            NoiseReading("at_least", 1500.0, batch_size=32, last_update=900),
            "Noise scale at least 1,500: updates of 32 are too small to measure more.",
        ),
        (
            NoiseReading("unavailable", reason="gradients are sharded"),
            "Noise scale not measured: gradients are sharded.",
        ),
    ],
)
def test_an_unsettled_noise_scale_gives_a_sentence_and_no_column(noise, sentence):
    text = " ".join(str(full_example(noise=noise)).split())

    assert sentence in text
    assert "time to same loss" not in text


def test_the_loss_is_not_mentioned_without_a_noise_scale():
    assert "loss" not in str(full_example(noise=None))


def test_the_report_in_ascii(snapshot):
    text = printed(example(), encoding="ascii")

    assert text.isascii()
    assert "?" not in printed(full_example(), encoding="ascii")
    snapshot(f"{text}\n", "report_ascii.txt")


def test_the_report_of_several_ranks_that_miss_the_target(snapshot):
    report = example(
        settings=settings(target_batch_size=130),
        plan=BatchPlan(8, 4, 4),
        dataset_size=1797,
        notes=(),
    )

    snapshot(f"{report}\n", "report_ranks.txt")


def test_the_report_without_a_target_and_without_timings(snapshot):
    tried = (
        Trial(8, Outcome.FIT, 8 * 2**20),
        Trial(56, Outcome.FIT, 56 * 2**20),
        Trial(60, Outcome.OVER_BUDGET, 70 * 2**20),
        Trial(1, Outcome.REFUSED),
    )
    report = example(
        settings=settings(target_batch_size=None),
        subject="",
        trials=tried,
        plan=BatchPlan(56),
        dataset_size=None,
        budget=64 * 2**20,
        notes=(),
    )

    snapshot(f"{report}\n", "report_untimed.txt")


def test_the_report_of_a_long_search_is_still_one_screen(snapshot):
    fits = [1, 2, 4, 8, 16, 32, 64, 128, 256, 400, 480, 490, 500, 503, 505, 506, 507]
    tried = [
        Trial(size, Outcome.FIT, (size + 30) * 2**20, 0.004 + size * 1.1e-4, 1, 1e-3)
        for size in fits
    ]
    failed = [Trial(size, Outcome.OUT_OF_MEMORY) for size in (1024, 700, 508)]
    report = example(
        settings=settings(target_batch_size=1000),
        trials=(*tried, *failed),
        plan=BatchPlan(500, 2),
        dataset_size=1797,
        budget=538 * 2**20,
        notes=(),
    )

    snapshot(f"{report}\n", "report_long.txt")
    assert len(str(report).splitlines()) <= 40


@given(reports())
def test_a_report_is_never_wider_than_its_columns(report):
    for text in (str(report), printed(report, encoding="ascii")):
        assert all(cell_len(line) <= WIDTH for line in text.splitlines())


@given(reports())
def test_the_chosen_size_is_marked_in_each_table_that_holds_it(report):
    chosen = report.plan.micro_batch_size
    sizes = {t.batch_size for t in report.trials} | {row.batch_size for row in report.sizes}
    tables = (chosen in sizes) + bool(
        report.effective
        and (report.dataset_size or any(row.update_seconds for row in report.effective))
    )

    assert len(re.findall(r"(?m)^  ▶( |$)", str(report))) == tables


def test_names_cannot_break_the_layout_or_control_the_terminal():
    text = str(example(subject="a\nb\x1b[31m\u2028c"))

    assert text.splitlines()[0].startswith("autobatch · a b [31m c · 1 × RTX 3060")
    assert "\x1b" not in text


def test_bytes_in_use_are_shown_beside_reserved_ones_where_they_differ():
    def column(share):
        trials = [replace(t, allocated=t.peak and int(share * t.peak)) for t in example().trials]
        return table(example().model_copy(update={"trials": tuple(trials)}))

    header, *rows = column(0.5)
    assert header.endswith("peak GiB  in use GiB")
    assert [row.split()[-1] for row in rows[:3]] == ["1.35", "1.40", "1.55"]
    assert "in use" not in column(1.0)[0]


def table(report):
    """Return the lines of the first table in the text of a report."""
    return next(
        block.splitlines() for block in str(report).split("\n\n") if "  micro-batch " in block
    )


def test_columns_without_a_number_are_left_out():
    text = str(example(trials=(Trial(8, Outcome.FIT),), plan=BatchPlan(8)))

    assert "samples/s" not in text
    assert "peak" not in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "asked for 256, exact"),
        ({"plan": BatchPlan(32, 7)}, "asked for 256, 32 fewer (12 %)"),
        ({"plan": BatchPlan(37, 7)}, "asked for 256, 3 more (1 %)"),
        (
            {"settings": settings(target_batch_size=None)},
            "56 is the largest found to fit",
        ),
        (
            {"settings": settings(target_batch_size=None), "plan": BatchPlan(56)},
            "the largest found to fit",
        ),
        (
            {"settings": settings(target_batch_size=None, max_micro_batch_size=56)},
            "56 fits too; larger sizes not sought",
        ),
        (  # of larger epochs that the Trainer cuts off
            {
                "settings": settings(target_batch_size=None, dataset_size=1000),
                "dataset_size": 40,
            },
            "56 is the largest found to fit",
        ),
    ],
)
def test_the_answer_compares_the_plan_with_the_target(changes, text):
    answer = str(example(**changes)).split("\n\n")[1]

    assert answer.endswith(f"  {text}")


def test_a_verified_plan_is_the_only_size_tried():
    report = example(trials=example().trials[5:6])

    assert "4 GiB to spare; the only size tried" in str(report)


def test_timed_sizes_count_as_tried():
    report = full_example(trials=example().trials[5:6], settings=settings(target_batch_size=32))

    assert "1 trial, 8 sizes timed" in str(report)
    assert "only size tried" not in str(report)
    one = report.model_copy(update={"curve": report.curve[5:6]})
    assert "1 trial, 1 size timed" in str(one)
    assert "only size tried" in str(one)


def test_comments_of_facts_are_aligned():
    report = example(dataset_size=10**9, look=Look(123_456_789, 10**9, is_even=True))
    lines = str(report).splitlines()
    facts = [line for line in lines if line.startswith(("  Memory", "  Data"))]

    values = ("123,456,789 samples read", "7.6 of 11.6 GiB")
    assert all(f"{value}  " in "\n".join(facts) for value in values)
    assert len({line.index(of) for line, of in zip(facts, ("4 GiB", "of 1,0"), strict=True)}) == 1


def test_counts_have_commas_in_every_text():
    report = full_example(
        plan=BatchPlan(2048, 2),
        settings=settings(target_batch_size=4096),
        trials=(
            Trial(2048, Outcome.FIT, 2**30, 0.5, 2),
            Trial(4096, Outcome.OVER_BUDGET),
        ),
        curve=(),
        noise=NoiseReading("at_least", 1500.0, batch_size=4096),
    )

    for text in (
        str(report),
        to_markdown(report),
        printed(report, completed_on_console),
        repr(report),
    ):
        counts = text.replace("RTX 3060", "")
        assert re.findall(r"(?<![\d.,])[1-9]\d{3,}(?!\d|\.\d)", counts) == []
        assert "2,048" in text or "1,500" in text


def test_the_completed_report_has_a_table_only_with_a_noise_scale():
    short = printed(
        full_example(noise=NoiseReading("settling", reason="why")), completed_on_console
    )
    full = printed(full_example(), completed_on_console)

    assert "Noise scale not settled: why." in short
    assert "per update" not in short
    assert "Data loading took" in short
    assert "time to same loss" in full


def test_repr_is_short():
    assert repr(example()) == (
        "<TuningReport: Micro-batch 32 × accumulate 8 = 256 per update, 9 trials>"
    )


# Numbers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (3e-8, "30 ns"),
        (2.5e-5, "25 µs"),
        (0.0716, "71.6 ms"),
        (0.716, "716 ms"),
        (1.92, "1.92 s"),
        (48, "48 s"),
        (119.9, "120 s"),
        (3604, "60.1 min"),
        (86400, "24 h"),
        (10**7, "2,780 h"),
    ],
)
def test_durations_have_a_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ([], []),
        ([1.0], ["1.00"]),
        ([42, 391], ["42", "391"]),
        ([2.71, 11.32], ["2.7", "11.3"]),
        ([0.051, 2.3], ["0.051", "2.300"]),
        ([94.2, 2731], ["94", "2,730"]),
        ([12345], ["12,300"]),
        ([0, 5], ["0.00", "5.00"]),
    ],
)
def test_the_numbers_of_a_column_share_their_decimals(column, text):
    assert aligned(column) == text


@given(st.lists(st.floats(0, 1e15), min_size=1))
def test_a_column_is_shown_to_within_its_precision(column):
    shown = [float(text.replace(",", "")) for text in aligned(column)]

    assert shown[column.index(max(column))] == pytest.approx(max(column), 0.006, 6e-4)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1e-9, "0.01 %"),
        (0.0004, "0.04 %"),
        (0.004, "0.4 %"),
        (0.0149, "1 %"),
        (0.5, "50 %"),
        (0.985, "98 %"),
        (0.996, "99.6 %"),
        (0.999, "99.9 %"),
        (1 - 1e-9, "99.99 %"),
        (1, "100 %"),
        (12.3, "1,230 %"),
    ],
)
def test_percent_has_decimals_near_nothing_and_all(share, text):
    assert percent(share) == text


@given(st.floats(0, 1))
def test_only_all_is_100_percent_and_only_nothing_is_0(share):
    assert (percent(share) == "100 %") == (share == 1)
    assert (percent(share) == "0 %") == (share == 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.354, "×0.35"), (1, "×1"), (1.414, "×1.4"), (71.2, "×71"), (1e4, "×10,000")],
)
def test_a_factor_has_two_digits_or_more(value, text):
    assert factor(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5832, "0.58×"), (1, "1.00×"), (12.4, "12×"), (1094.6, "1,100×")]
)
def test_a_multiple_has_two_decimals_or_two_digits(value, text):
    assert multiple(value) == text


# Sizes of what is shown; without these bounds each takes minutes


def test_a_very_long_text_is_cut():
    name, note = "x" * 2**23, "1 2 " * 2**21
    device = example().device.model_copy(update={"name": name})
    report = example().model_copy(update={"subject": name, "device": device, "notes": (note,)})

    text = str(report)

    assert len(text) < 40_000
    assert "".join(text.split()).count("x" * 10_000 + "…") == 2


@pytest.mark.parametrize("outcome", Outcome)
def test_thousands_of_sizes_are_one_screen(outcome):
    seconds = 0.001 if outcome is Outcome.FIT else None
    trials = tuple(Trial(size, outcome, None, seconds) for size in range(2000, 5000))
    report = example().model_copy(update={"trials": (*example().trials, *trials)})

    _, *rows, foot = table(report)

    assert len(rows) == 12
    assert f"{len(report.trials) - 12:,} more sizes in report.trials" in foot


@given(st.sets(st.integers(1, 10_000), max_size=40), st.data())
def test_the_sizes_left_out_are_the_closest_to_others(sizes, drawn):
    sizes = sorted(sizes)
    keep = drawn.draw(st.sets(st.sampled_from(sizes))) if sizes else set()

    shown = thinned(sizes, keep)

    assert {*keep, *sizes[:1], *sizes[-1:]} <= set(shown) <= set(sizes)
    assert shown == sorted(shown)
    assert len(shown) >= min(12, len(sizes))
    spare = set(shown[1:-1]) - keep
    assert len(shown) <= 12 or not spare
    left_out = set(sizes) - set(shown)
    others = {size: [at for at in shown if at != size] for size in {*spare, *left_out}}
    apart = {
        size: min(max(size / at, at / size) for at in ats) for size, ats in others.items() if ats
    }
    assert all(apart[size] >= apart[out] for size in spare for out in left_out)
