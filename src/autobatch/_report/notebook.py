"""A report as HTML for notebooks."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Final

from autobatch._report.text import page
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._report import TuningReport
    from autobatch._report.layout import Page, Table

_DOTS: Final = 100  # per inch: what a notebook's column shows
_CELL: Final = "padding:.15em .7em;border:0;background:none;text-align:{}"
_CHOSEN: Final = "font-weight:bold;box-shadow:inset 3px 0 0 currentColor"


def to_html(report: TuningReport) -> str:
    """The report as HTML, without colours of its own: the answer, its tables and notes, and the picture."""
    what = page(report)
    return (
        '<div style="line-height:1.45">'
        f"{_answer(what)}{_facts(what)}{''.join(map(_table, what.tables))}{_notes(what)}{_picture(report)}"
        "</div>"
    )


def _answer(what: Page) -> str:
    asked = f" <span>({escape(what.asked)})</span>" if what.asked else ""
    header = escape(" · ".join(what.header))
    return (
        f'<div style="opacity:.75">{header}</div>'
        f'<div style="margin:.3em 0"><strong style="font-size:1.15em">{escape(what.answer)}</strong>{asked}</div>'
    )


def _facts(what: Page) -> str:
    rows = (
        [
            f'<th scope="row" style="{_CELL.format("left")};font-weight:normal;opacity:.75">{escape(fact.label)}</th>',
            *(
                f'<td style="{_CELL.format("left")}">{escape(text)}</td>'
                for text in (fact.value, fact.remark)
            ),
        ]
        for fact in what.facts
    )
    return _rows([], ["".join(row) for row in rows], marked=None)


def _table(table: Table) -> str:
    sides = ["left" if column.align == "<" else "right" for column in table.columns]
    heads = [
        f'<th scope="col" style="{_CELL.format(side)};opacity:.75">{escape(column.header)}</th>'
        for side, column in zip(sides, table.columns, strict=True)
    ]
    rows = [
        "".join(
            f'<td style="{_CELL.format(side)};font-variant-numeric:tabular-nums">{escape(cell)}</td>'
            for side, cell in zip(sides, cells, strict=True)
        )
        for cells in zip(*(column.cells for column in table.columns), strict=True)
    ]
    title, foot = (
        f'<div style="margin-top:.6em">{escape(text)}</div>' if text else ""
        for text in (table.title, table.foot)
    )
    return title + _rows(heads, rows, marked=table.marked) + foot


def _rows(heads: list[str], rows: list[str], *, marked: int | None) -> str:
    if not rows:
        return ""
    head = f"<thead><tr>{''.join(heads)}</tr></thead>" if heads else ""
    body = "".join(
        f'<tr style="background:none{";" + _CHOSEN if i == marked else ""}">{row}</tr>'
        for i, row in enumerate(rows)
    )
    return (
        f'<table style="border-collapse:collapse;margin:.4em 0">{head}<tbody>{body}</tbody></table>'
    )


def _notes(what: Page) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in what.notes)
    return f'<ul style="margin:.4em 0">{items}</ul>' if items else ""


def _picture(report: TuningReport) -> str:
    """The picture within the page, where matplotlib is there."""
    try:
        figure = report.plot()
    except AutobatchError:
        return ""
    into = io.BytesIO()
    figure.savefig(into, format="png", dpi=_DOTS)
    data = base64.b64encode(into.getvalue()).decode("ascii")
    said = escape(page(report).answer, quote=True)
    return f'<img alt="{said}" style="max-width:100%;margin-top:.6em" src="data:image/png;base64,{data}">'
