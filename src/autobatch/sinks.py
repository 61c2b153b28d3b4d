"""Where a report goes: console, JSON, Markdown, a picture, log lines; and what a person sees while the search runs."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autobatch._memory import format_bytes
from autobatch._report import TuningReport, files
from autobatch._report.layout import ASCII, UNICODE, Glyphs, terminal
from autobatch._report.text import completed, page
from autobatch._report.units import aligned
from autobatch._trials import Outcome, Trial
from autobatch._trials.context import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from rich.live import Live

    from autobatch._report.layout import Page, Table

__all__ = [
    "Progress",
    "Sink",
    "completed_on_console",
    "console",
    "figure_file",
    "json_file",
    "log",
    "markdown_file",
    "progress",
    "to_markdown",
]

Sink = Callable[[TuningReport], None]

logger = logging.getLogger("autobatch")


def console(report: TuningReport) -> None:
    """Print the report to standard output; in colour on a terminal, plain anywhere else."""
    _print(page(report))


def completed_on_console(report: TuningReport) -> None:
    """Print what training has added to a report that was printed when it began."""
    print()  # noqa: T201 -- standard output is where it goes
    _print(completed(report))


def _print(what: Page) -> None:
    from rich.console import Console
    from rich.text import Text

    glyphs = _glyphs_for(sys.stdout.encoding)
    text = Text(terminal(what, glyphs))
    text.highlight_regex(rf"(?m)^ +{re.escape(glyphs.spell('▶'))}.*$", "bold green")
    text.highlight_regex(r"(?m)^ +! ", "bold yellow")
    Console(highlight=False).print(text, soft_wrap=True)


def log(report: TuningReport) -> None:
    """Write the report to the logger "autobatch", at level INFO."""
    logger.info("%s", report)


def json_file(path: str | Path) -> Sink:
    """A sink that writes the report as JSON; `TuningReport.read` gives it back."""
    file = files.named(path, "to write to")
    return lambda report: _write(file, report.to_json() + "\n")


def markdown_file(path: str | Path) -> Sink:
    """A sink that writes the report as Markdown."""
    file = files.named(path, "to write to")
    return lambda report: _write(file, to_markdown(report))


def figure_file(path: str | Path) -> Sink:
    """A sink that draws the report into a PNG, SVG or PDF file, as the path ends; it needs matplotlib."""

    def write(report: TuningReport) -> None:
        report.plot(path)

    return write


def to_markdown(report: TuningReport) -> str:
    """The report as Markdown, its tables as tables."""
    what = page(report)
    asked = f"; {what.asked}" if what.asked else ""
    blocks = [
        f"## {' · '.join(what.header)}",
        f"**{what.answer}**{asked}",
        "\n".join(
            f"- {fact.label}: {'; '.join(filter(None, (fact.value, fact.remark)))}"
            for fact in what.facts
        ),
        *(_markdown_table(table) for table in what.tables),
        "\n".join(f"- **Note:** {note}" for note in what.notes),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(table: Table) -> str:
    rules = [":--" if column.align == "<" else "--:" for column in table.columns]
    rows = [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    if table.marked is not None:
        rows[table.marked] = [f"**{cell}**" if cell else "" for cell in rows[table.marked]]
    headers = [column.header for column in table.columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (headers, rules, *rows)]
    return "\n\n".join(text for text in (table.title, "\n".join(lines), table.foot) if text)


def _write(path: Path, text: str) -> None:
    files.write(path, text.encode())


def _glyphs_for(encoding: str | None) -> Glyphs:
    """All glyphs, where an output can carry them."""
    try:
        "▶×·–−±▏▉█".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


@contextmanager
def progress() -> Iterator[Progress]:
    """Log one line per trial to the logger "autobatch"; where standard error is a terminal, show what is being tried."""
    if not sys.stderr.isatty():
        yield _Logged()
        return
    from rich.console import Console
    from rich.live import Live

    # Drawn when there is news and never by a thread; the workload's own output is left alone.
    with Live(
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield _Shown(live, _Logged())


class _Logged:
    """One line per trial in a log."""

    def trying(self, batch_size: int) -> None:
        pass

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:  # noqa: ARG002 -- the line says what is new
        logger.info("batch_size=%d %s", trial.batch_size, _verdict(trial, budget))


class _Shown:
    """One line on a terminal that is replaced, beside the lines in the log."""

    def __init__(self, live: Live, logged: Progress) -> None:
        self._live = live
        self._logged = logged
        self._best: int | None = None

    def trying(self, batch_size: int) -> None:
        so_far = f" · largest that fits so far {self._best:,}" if self._best else ""
        self._show(f"autobatch · trying {batch_size:,}{so_far}")

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:
        self._best = best
        self._show("")  # a log line may go to the same terminal
        self._logged.tried(trial, best=best, budget=budget)

    def _show(self, line: str) -> None:
        glyphs = _glyphs_for(sys.stderr.encoding)
        self._live.update(glyphs.spell(line), refresh=True)


def _verdict(trial: Trial, budget: int) -> str:
    took = f"peak {format_bytes(trial.peak)} of {format_bytes(budget)}" if trial.peak else ""
    match trial.outcome:
        case Outcome.FIT:
            speed = trial.samples_per_second
            rate = f"{aligned([speed])[0]} samples/s" if speed else ""
            said = ", ".join(part for part in (took, rate) if part)
            return f"fits: {said}" if said else "fits"
        case Outcome.OVER_BUDGET:
            return f"is over the budget: {took or format_bytes(budget)}"
        case Outcome.OUT_OF_MEMORY:
            return f"ran out of memory: the budget is {format_bytes(budget)}"
        case Outcome.REFUSED:
            return "was refused by the workload itself"
