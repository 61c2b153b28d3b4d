"""Sinks of a report: console, JSON, Markdown, figure and log; and the progress of a search."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from autobatch._progress import is_a_terminal, progress
from autobatch._report import TuningReport, files, layout
from autobatch._report.text import completed, page, resumed
from autobatch._trials.context import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch._report.layout import Glyphs, Page, Table

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
    "resumed_on_console",
    "to_markdown",
]

Sink = Callable[[TuningReport], None]

logger = logging.getLogger("autobatch")


def console(report: TuningReport) -> None:
    """Print the report to standard output: in colour on a terminal, plain elsewhere."""
    _print(_rendered(page(report)))


def completed_on_console(report: TuningReport) -> None:
    """Print the part of the report that training has added since `console` printed it."""
    _print(f"\n{_rendered(completed(report))}")


def resumed_on_console(report: TuningReport) -> None:
    """Print one line about a run that goes on with a plan whose report was shown before."""
    _print(f"{_glyphs().spell(resumed(report))}\n")


def _print(text: str) -> None:
    """Write to standard output, and learn now whether it can be written to.

    A Console of rich ends the process at a closed pipe (rich 15.0, `Console.on_broken_pipe`), and
    writes around a progress bar that stands in for standard output.
    """
    if sys.stdout is None:  # as for print()
        return
    sys.stdout.write(text)
    if hasattr(sys.stdout, "flush"):
        sys.stdout.flush()


def _rendered(content: Page) -> str:
    options = {"color_system": "auto", "force_terminal": is_a_terminal(sys.stdout) or None}
    return f"{layout.terminal(content, _glyphs(), **options)}\n"


def _glyphs() -> Glyphs:
    return layout.glyphs_for(getattr(sys.stdout, "encoding", None))


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
        f"- {fact.label}: {'; '.join(filter(None, (fact.value, fact.comment)))}"
        for fact in content.facts
    ]
    blocks = [
        f"## {' · '.join(content.header)}",
        f"**{content.answer}**{comment}",
        "\n".join(facts),
        *map(_markdown_table, content.tables),
        "\n".join(f"- **Note:** {note}" for note in content.notes),
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    # Names and notes may come from a file: no HTML, and no links
    return text.replace("<", "&lt;").replace("[", "&#91;")


def _markdown_table(table: Table) -> str:
    headers = [column.header for column in table.columns]
    rules = [":--" if column.align == "<" else "--:" for column in table.columns]
    rows = [list(cells) for cells in table.rows]
    if table.marked is not None:
        rows[table.marked] = [f"**{cell}**" if cell else "" for cell in rows[table.marked]]
    lines = [f"| {' | '.join(cells)} |" for cells in (headers, rules, *rows)]
    return "\n\n".join(text for text in (table.title, "\n".join(lines), table.foot) if text)
