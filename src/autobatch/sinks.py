"""Sinks of a report: console, JSON, Markdown, figure and log; and the progress of a search."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from autobatch._memory import format_bytes
from autobatch._report import TuningReport, files
from autobatch._report.layout import COLOURED, WIDTH, glyphs_for, renderable
from autobatch._report.text import completed, page
from autobatch._report.units import rounded
from autobatch._trials import Outcome, Trial
from autobatch._trials.context import Progress

if TYPE_CHECKING:
    from pathlib import Path

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
    """Print the report to standard output: in colour on a terminal, plain elsewhere."""
    _print(page(report))


def completed_on_console(report: TuningReport) -> None:
    """Print the part of the report that training has added since `console` printed it."""
    print()  # noqa: T201 -- standard output is the purpose
    _print(completed(report))


def _print(content: Page) -> None:
    output = Console(width=WIDTH, theme=COLOURED, highlight=False)
    shown = renderable(content, glyphs_for(sys.stdout.encoding))
    for segments in output.render_lines(shown, pad=False):
        line = Text.assemble(*((text, style or "") for text, style, _ in segments))
        line.rstrip()  # a narrow terminal would wrap the blanks that fill the width
        output.print(line, soft_wrap=True)


def log(report: TuningReport) -> None:
    """Write the report to the logger "autobatch", at level INFO."""
    logger.info("%s", report)


def json_file(path: str | Path) -> Sink:
    """Return a sink that writes the report as JSON; `TuningReport.read` reads it."""
    file = files.named(path, "to write to")
    return lambda report: files.write(file, f"{report.to_json()}\n".encode())


def markdown_file(path: str | Path) -> Sink:
    """Return a sink that writes the report as Markdown."""
    file = files.named(path, "to write to")
    return lambda report: files.write(file, to_markdown(report).encode())


def figure_file(path: str | Path) -> Sink:
    """Return a sink that draws the report into a .png, .svg or .pdf file; it needs matplotlib."""

    def write(report: TuningReport) -> None:
        report.plot(path)

    return write


def to_markdown(report: TuningReport) -> str:
    """Return the report as Markdown, with its tables as Markdown tables."""
    content = page(report)
    comment = f"; {content.comment}" if content.comment else ""
    facts = [
        f"- {fact.label}: {'; '.join(filter(None, (fact.value, fact.remark)))}"
        for fact in content.facts
    ]
    blocks = [
        f"## {' · '.join(content.header)}",
        f"**{content.answer}**{comment}",
        "\n".join(facts),
        *map(_markdown_table, content.tables),
        "\n".join(f"- **Note:** {note}" for note in content.notes),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(table: Table) -> str:
    headers = [column.header for column in table.columns]
    rules = [":--" if column.align == "<" else "--:" for column in table.columns]
    rows = [list(cells) for cells in table.rows]
    if table.marked is not None:
        rows[table.marked] = [f"**{cell}**" if cell else "" for cell in rows[table.marked]]
    lines = [f"| {' | '.join(cells)} |" for cells in (headers, rules, *rows)]
    return "\n\n".join(text for text in (table.title, "\n".join(lines), table.foot) if text)


@contextmanager
def progress() -> Iterator[Progress]:
    """Log one line per trial to the logger "autobatch"; on a terminal, show the running trial."""
    if not sys.stderr.isatty():
        yield _LogLines()
        return
    # Refreshed by news and never by a thread; output of the workload is left alone
    with Live(
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield _ProgressLine(live, _LogLines())


class _LogLines:
    """One line per trial in the log."""

    def trying(self, batch_size: int) -> None:
        pass

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:  # noqa: ARG002
        logger.info("batch_size=%d %s", trial.batch_size, _result(trial, budget))


class _ProgressLine:
    """One line on a terminal that is replaced, beside the lines in the log."""

    def __init__(self, live: Live, log_lines: Progress) -> None:
        self._live = live
        self._log_lines = log_lines
        self._best: int | None = None

    def trying(self, batch_size: int) -> None:
        so_far = f" · largest that fits so far {self._best:,}" if self._best else ""
        self._show(f"autobatch · trying {batch_size:,}{so_far}")

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:
        self._best = best
        self._show("")  # a log line may go to the same terminal
        self._log_lines.tried(trial, best=best, budget=budget)

    def _show(self, line: str) -> None:
        self._live.update(glyphs_for(sys.stderr.encoding).spell(line), refresh=True)


def _result(trial: Trial, budget: int) -> str:
    peak = f"peak {format_bytes(trial.peak)} of {format_bytes(budget)}" if trial.peak else ""
    match trial.outcome:
        case Outcome.FIT:
            speed = trial.samples_per_second
            rate = f"{rounded(speed)} samples/s" if speed else ""
            measured = ", ".join(part for part in (peak, rate) if part)
            return f"fits: {measured}" if measured else "fits"
        case Outcome.OVER_BUDGET:
            return f"is over the budget: {peak or format_bytes(budget)}"
        case Outcome.OUT_OF_MEMORY:
            return f"ran out of memory: the budget is {format_bytes(budget)}"
        case Outcome.REFUSED:
            return "was refused by the workload itself"
