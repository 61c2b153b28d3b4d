"""The line that shows where a tuning run is, on terminals, pipes and in logs; no real waiting."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import sys
import types
from pathlib import Path

import pytest
from rich.cells import cell_len

import autobatch
from autobatch import Outcome, Trial, sinks
from autobatch.testing import PaperDevice
from report_examples import GIB

ERASE = "\r\x1b[2K"


class Pipe(io.StringIO):
    encoding = "utf-8"


class Terminal(Pipe):
    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """The texts that the line had, one after the other."""
        return [text for text in self.getvalue().split(ERASE) if text]


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.DEBUG, logger="autobatch")
    return caplog


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


@pytest.fixture
def pipe():
    return Pipe()


@contextlib.contextmanager
def progress_on(stream, clock=Clock, **options):
    clock = clock() if clock is Clock else clock
    with contextlib.redirect_stderr(stream), sinks.progress(clock=clock, **options) as shown:
        yield shown


# Content


@pytest.mark.parametrize(
    ("trial", "line"),
    [
        (
            Trial(64, Outcome.FIT, 812 * 2**20, 0.125),
            "batch_size=64 fits: peak 812 MiB of 1.8 GiB, 512 samples/s",
        ),
        (Trial(64, Outcome.FIT), "batch_size=64 fits"),
        (
            Trial(64, Outcome.OVER_BUDGET, 2 * GIB),
            "batch_size=64 peaked at 2 GiB, over the budget of 1.8 GiB",
        ),
        (
            Trial(64, Outcome.OUT_OF_MEMORY),
            "batch_size=64 ran out of memory",
        ),
        (
            Trial(64, Outcome.REFUSED, error="ValueError: odd"),
            "batch_size=64 was refused (ValueError: odd)",
        ),
    ],
)
def test_every_trial_is_a_line_in_the_log_for_debugging(logged, trial, line):
    with sinks.progress() as shown:
        shown.trying(64)
        shown.tried(trial, best=None, budget=int(1.8 * GIB))

    assert logged.messages == [line]


def test_the_line_has_phase_size_count_bracket_and_seconds_left(terminal):
    clock = Clock()

    with progress_on(terminal, clock) as shown:
        shown.begin("reading batches", None)
        shown.begin("searching", 300.0)
        shown.trying(256)
        shown.tried(Trial(256, Outcome.FIT), best=256, budget=GIB)
        clock.now += 19.2
        shown.trying(2048)
        shown.tried(Trial(2048, Outcome.OUT_OF_MEMORY), best=256, budget=GIB)
        shown.trying(700)
        shown.tried(Trial(700, Outcome.OVER_BUDGET, 2 * GIB), best=256, budget=GIB)
        shown.trying(512)

    assert terminal.lines == [
        "autobatch · reading batches",
        "autobatch · searching · 300 s left",
        "autobatch · searching · batch size 256 · 300 s left",
        "autobatch · searching · batch size 2,048 · 1 trial · 256 fits · 281 s left",
        "autobatch · searching · batch size 700 · 2 trials · 256 fits, 2,048 does not · 281 s left",
        "autobatch · searching · batch size 512 · 3 trials · 256 fits, 700 does not · 281 s left",
    ]


def test_sizes_of_a_later_phase_are_named_after_it(terminal):
    with progress_on(terminal) as shown:
        shown.begin("searching", None)
        shown.tried(Trial(64, Outcome.FIT), best=64, budget=GIB)
        shown.begin("timing sizes", 20.0)
        shown.trying(1)
        shown.begin_part("validation")
        shown.begin("checking the plan", None)
        shown.trying(32)

    assert terminal.lines[-3:] == [
        "autobatch · timing sizes · batch size 1 · 1 trial · 20 s left",
        "autobatch · validation · checking the plan · 1 trial",
        "autobatch · validation · checking the plan · batch size 32 · 1 trial",
    ]


def test_time_that_is_over_is_no_seconds_left(terminal):
    clock = Clock()

    with progress_on(terminal, clock) as shown:
        shown.begin("timing sizes", 20.0)
        clock.now += 31
        shown.trying(4)

    assert terminal.lines[-1] == "autobatch · timing sizes · batch size 4 · 0 s left"


@pytest.mark.curve
def test_find_shows_its_phases_in_order(terminal):
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    with contextlib.redirect_stderr(terminal):
        autobatch.find(device.workload, device=device, target_batch_size=256)

    phases = list(dict.fromkeys(line.split(" · ")[1] for line in terminal.lines))
    assert phases == ["searching", "timing sizes", "checking the plan"]
    sizes = [line.split(" · ")[2] for line in terminal.lines if "timing" in line]
    assert "batch size 1" in sizes


def test_a_known_plan_is_checked_without_a_search(terminal):
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    with contextlib.redirect_stderr(terminal):
        autobatch.find(device.workload, device=device, plan=autobatch.BatchPlan(32))

    assert [line.partition(" · 300 s")[0] for line in terminal.lines] == [
        "autobatch · checking the plan",
        "autobatch · checking the plan · batch size 32",
    ]


def test_a_latency_search_names_its_timing(terminal):
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    with contextlib.redirect_stderr(terminal):
        autobatch.find(device.workload, device=device, latency_limit=0.01)

    assert any(line.startswith("autobatch · timing answers · ") for line in terminal.lines)


# Terminal


def test_a_terminal_has_one_line_that_is_erased_at_the_end(terminal):
    with progress_on(terminal) as shown:
        shown.begin("searching", 300.0)
        shown.trying(64)
        assert sys.stderr is terminal  # output of the workload is left alone

    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().startswith(ERASE)  # what a progress bar left on the line
    assert terminal.getvalue().endswith(f"left{ERASE}")


def test_an_interrupted_search_leaves_the_terminal_clean(terminal):
    with contextlib.suppress(KeyboardInterrupt), progress_on(terminal) as shown:
        shown.trying(64)
        raise KeyboardInterrupt

    assert terminal.getvalue().endswith(f"64{ERASE}")


def test_steps_are_shown_ten_times_a_second_at_most(terminal):
    clock = Clock()

    with progress_on(terminal, clock) as shown:
        shown.begin("searching", 300.0)
        for _ in range(40):
            clock.now += 0.05
            shown.stepped()

    # The text changes once a second
    assert len(terminal.lines) == 3


def test_a_line_on_a_narrow_terminal_is_cut(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")

    with progress_on(terminal) as shown:
        shown.begin("searching", 300.0)
        shown.trying(2**20)

    assert all(cell_len(line) == 29 for line in terminal.lines)


def test_a_log_on_the_same_terminal_finds_an_empty_line(terminal):
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("autobatch")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with progress_on(terminal) as shown:
            shown.trying(64)
            shown.tried(Trial(64, Outcome.FIT), best=64, budget=GIB)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    assert f"{ERASE}batch_size=64 fits\n" in terminal.getvalue()


def test_a_terminal_without_cursor_control_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    clock = Clock()

    with progress_on(terminal, clock) as shown:
        clock.now += 3
        shown.begin("searching", None)

    assert terminal.getvalue() == "autobatch · searching\n"


def test_a_bar_of_rich_that_stands_in_for_standard_error_is_written_around(terminal):
    """It prints at a line break, and would print each text of the line below the other."""
    bar = types.SimpleNamespace(rich_proxied_file=terminal)

    with progress_on(bar) as shown:
        shown.trying(64)

    assert terminal.lines == ["autobatch · batch size 64"]


# Pipes, files and logs


def shown_for(stream, seconds, **options):
    """Show a search that takes a trial every half a second."""
    clock = Clock()
    with progress_on(stream, clock, **options) as shown:
        shown.begin("searching", 300.0)
        for size in range(1, 2 * seconds + 1):
            shown.trying(size)
            clock.now += 0.5


def test_a_pipe_gets_a_line_after_three_seconds_and_then_every_five(pipe):
    shown_for(pipe, 15)

    assert pipe.getvalue().splitlines() == [
        f"autobatch · searching · batch size {size} · {left} s left"
        for size, left in ((7, 297), (17, 292), (27, 287))
    ]


def test_a_short_run_prints_nothing_on_a_pipe(pipe):
    shown_for(pipe, 3)

    assert pipe.getvalue() == ""


def test_steps_of_a_long_trial_are_lines_too(pipe):
    clock = Clock()

    with progress_on(pipe, clock) as shown:
        shown.trying(64)
        for _ in range(12):
            clock.now += 1
            shown.stepped()

    assert pipe.getvalue() == "autobatch · batch size 64\n" * 2


def test_a_log_for_info_gets_the_lines_instead_of_a_pipe(pipe, logged):
    logged.set_level(logging.INFO, logger="autobatch")

    shown_for(pipe, 9)

    assert pipe.getvalue() == ""
    assert [record.levelno for record in logged.records] == [logging.INFO] * 2
    assert logged.messages[0] == "autobatch · searching · batch size 7 · 297 s left"


def test_an_encoding_without_the_dot_gets_a_dash():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    shown_for(narrow, 4)

    narrow.seek(0)
    assert narrow.read() == "autobatch - searching - batch size 7 - 297 s left\n"


@pytest.mark.parametrize("stream", ["terminal", "pipe"])
def test_nothing_is_shown_if_not_verbose(stream, request):
    file, device = request.getfixturevalue(stream), PaperDevice(2**20)

    shown_for(file, 9, verbose=False)
    with contextlib.redirect_stderr(file):
        autobatch.find(device.workload, device=device, verbose=False)

    assert file.getvalue() == ""


def test_verbose_is_true_or_false():
    with pytest.raises(ValueError, match=r"^verbose=1 is not a switch; give True"):
        autobatch.find(PaperDevice(10).workload, verbose=1)


def test_a_notebook_gets_no_lines(pipe, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_jupyter", True, raising=False)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)

    shown_for(pipe, 9)

    assert pipe.getvalue() == ""


# Streams that cannot be written to


class Broken(io.StringIO):
    """A stream that raises from its second text on."""

    def __init__(self, error, *, is_terminal):
        super().__init__()
        self.error, self.is_terminal, self.left = error, is_terminal, 1

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")]
)
def test_an_error_of_standard_error_is_logged_once(error, is_terminal, monkeypatch, caplog):
    monkeypatch.setenv("TERM", "xterm")

    shown_for(Broken(error, is_terminal=is_terminal), 30)

    (message,) = caplog.messages
    assert message == f"The progress of tuning cannot be shown: {error!r}"


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


class Tee:
    """A stand-in for standard error as people write it: nothing but `write`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def test_a_missing_or_closed_standard_error_is_no_error():
    for stream in (None, closed()):
        shown_for(stream, 9)


def test_a_stand_in_with_nothing_but_write_gets_the_lines():
    tee = Tee()

    shown_for(tee, 4)

    assert tee.text == "autobatch - searching - batch size 7 - 297 s left\n"


def test_a_full_disk_does_not_end_find(monkeypatch, caplog):
    device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)
    monkeypatch.setattr("autobatch._progress._FIRST_SECONDS", 0.0)
    alone = autobatch.find(device.workload, device=device, verbose=False)

    with (
        contextlib.suppress(OSError),
        Path("/dev/full").open("w") as full,
        contextlib.redirect_stderr(full),
    ):
        report = autobatch.find(device.workload, device=device)

    assert report.plan == alone.plan
    assert sum("No space left" in message for message in caplog.messages) == 1


def test_a_real_terminal_is_left_with_an_empty_line(monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")

    with os.fdopen(theirs, "w", encoding="utf-8") as stream, progress_on(stream) as shown:
        shown.begin("searching", None)
    written = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while part := os.read(ours, 1000):  # perhaps one write at a time
            written += part
    os.close(ours)

    assert written.decode() == f"{ERASE}autobatch · searching{ERASE}"
