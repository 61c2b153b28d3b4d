"""Report files with numbers that no report can have: one sentence, or a report that can be shown."""

from __future__ import annotations

import json
import random

import pytest

from autobatch import TuningReport
from autobatch.__main__ import main
from autobatch.sinks import to_markdown
from conftest import SNAPSHOTS
from report_examples import example, full_example, with_noise

STORED = {
    "short": example,
    "full": full_example,
    "noise": with_noise,
    "latency": lambda: TuningReport.read(SNAPSHOTS / "latency.json"),
}
# As text, since JSON of Python cannot write some of them
VALUES = [
    "0",
    "-1",
    "1e308",
    "-1e308",
    "1e-320",
    "1" + "0" * 400,
    "9223372036854775808",
    "NaN",
    "Infinity",
    "true",
    "null",
    '"7"',
    "[]",
    "{}",
    '"\\ud800"',
    "0.5",
]


def leaves(value, path=()):
    """Yield the path of each value that is no container."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key)


def broken(stored, path, text):
    """Return a stored report with one value replaced."""
    mark = "replaced-by-another-value"
    copied = json.loads(json.dumps(stored))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = mark
    return json.dumps(copied).replace(f'"{mark}"', text)


def check(text):
    """Read and show a report, unless it is refused in one sentence."""
    try:
        report = TuningReport.from_json(text)
    except ValueError as error:
        sentence = str(error)
    else:
        show(report)
        return
    assert "\n" not in sentence
    assert len(sentence) < 500


def show(report):
    shown = str(report), to_markdown(report), report.to_json()
    for each in shown:
        each.encode("utf-8")


def cases():
    for name, make in STORED.items():
        stored = json.loads(make().to_json())
        for path in leaves(stored):
            for value in VALUES:
                yield name, stored, path, value


def test_broken_numbers_are_refused_or_shown():
    for name, stored, path, value in random.Random(7).sample(list(cases()), 200):
        try:
            check(broken(stored, path, value))
        except Exception as error:
            error.add_note(f"{name}: {'.'.join(map(str, path))} = {value[:20]}")
            raise


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_broken_number_is_refused_or_shown():
    for name, stored, path, value in cases():
        try:
            check(broken(stored, path, value))
        except Exception as error:
            error.add_note(f"{name}: {'.'.join(map(str, path))} = {value[:20]}")
            raise


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("budget_bytes",), "1" + "0" * 400),
        (("device", "total_bytes"), "1" + "0" * 400),
        (("plan", "accumulate_grad_batches"), "0"),
        (("plan", "micro_batch_size"), "true"),
        (("trials", 0, "accumulate"), "0"),
        (("trials", 0, "step_seconds"), "1e308"),
        (("trials", 0, "step_seconds"), "1e-320"),
        (("trials", 0, "peak_bytes"), "NaN"),
        (("search_seconds",), "1e308"),
        (("dataset_size",), "1" + "0" * 400),
    ],
)
def test_show_refuses_numbers_that_no_report_can_have(tmp_path, capsys, path, value):
    file = tmp_path / "autobatch.json"
    file.write_text(broken(json.loads(full_example().to_json()), path, value))

    code = main(["show", str(file)])

    sentence = capsys.readouterr().err
    assert code == 2
    assert sentence.count("\n") == 1
    assert "not a complete report" in sentence
