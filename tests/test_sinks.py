from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given

from autobatch import TuningReport, sinks
from report_examples import example, printed, reports


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="autobatch")
    return caplog


# Reports


def test_the_console_gets_plain_text_without_a_terminal(capsys):
    sinks.console(example())

    assert capsys.readouterr().out == f"{example()}\n"


def test_an_encoding_without_the_glyphs_gets_ascii(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)

    sinks.console(example())

    narrow.seek(0)
    assert narrow.read() == f"{printed(example(), encoding='ascii')}\n"


def test_a_terminal_shows_the_choice_and_the_notes_in_colour(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    sinks.console(example())

    lines = terminal.getvalue().splitlines()
    coloured = [line for line in lines if "\x1b" in line]
    assert len(coloured) == 4
    assert all("▶" in line or "!" in line for line in coloured)
    # Blanks that fill the width would be wrapped by a narrower terminal
    assert re.sub(r"\x1b\[[\d;]*m", "", "\n".join(lines)) == str(example())


def test_the_log_gets_the_same_text(logged):
    sinks.log(example())

    assert logged.record_tuples == [("autobatch", logging.INFO, str(example()))]


@pytest.mark.parametrize("sink", [sinks.json_file, sinks.markdown_file, sinks.figure_file])
@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_file_name_is_refused(sink, path):
    with pytest.raises(ValueError, match=r"^path=.* does not name a file"):
        sink(path)(example())


def test_a_json_file_can_be_read_again(tmp_path):
    path = tmp_path / "new" / "folders" / "report.json"

    sinks.json_file(path)(example())

    assert TuningReport.read(path) == example()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_markdown(tmp_path, snapshot):
    path = tmp_path / "report.md"

    sinks.markdown_file(str(path))(example())

    text = path.read_text(encoding="utf-8")
    assert text == sinks.to_markdown(example())
    snapshot(text, "report.md")


@given(reports())
def test_the_rows_of_a_markdown_table_have_as_many_cells_as_its_header(report):
    blocks = sinks.to_markdown(report).split("\n\n")

    tables = [block.splitlines() for block in blocks if block.startswith("| ")]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert re.fullmatch(r"\|( :?--:? \|)+", table[1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("previous content")
    monkeypatch.setattr(Path, "replace", fail_to_replace)

    with pytest.raises(OSError, match=r"^The report could not be written to .+report\.json: "):
        sinks.json_file(path)(example())

    assert path.read_text() == "previous content"
    assert list(tmp_path.iterdir()) == [path]


def fail_to_replace(self, target):
    raise OSError(28, "No space left on device")


def test_an_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(
        OSError, match=r"could not be written to .+below: .+; give a writable path\."
    ):
        sinks.json_file(tmp_path / "file" / "below")(example())
    with pytest.raises(OSError, match=r"could not be written to .+; give a writable path\."):
        sinks.json_file(tmp_path)(example())

    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_markdown_takes_no_html_and_no_links_from_names_and_notes():
    bad = "<img src=x onerror=alert(1)> [here](javascript:alert(1)) <javascript:alert(1)>"
    device = example().device.model_copy(update={"name": bad})
    update = {"subject": bad, "device": device, "notes": (bad, f"\\{bad}")}

    text = sinks.to_markdown(example().model_copy(update=update))

    assert "<" not in text
    assert "[" not in text
    assert text.count("&lt;img src=x onerror=alert(1)> &#91;here](javascript") == 4
