"""A page of a report, laid out by rich for terminals, logs and notebooks."""

from __future__ import annotations

import io
import re
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TextIO

from rich import table as rich_table
from rich.columns import Columns
from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text
from rich.theme import Theme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import RenderableType

WIDTH: Final = 86  # columns
MARK: Final = "▶"
_INDENT: Final = 2  # columns
_JOINT: Final = "\ue000"  # stands for a space that must not end a line
_HTML: Final = (
    '<pre style="font-family:monospace;line-height:normal;white-space:pre;overflow-x:auto;'
    'background:none">{code}</pre>'
)
COLOURED: Final = Theme({"chosen": "bold green", "sign": "bold yellow"})
UNCOLOURED: Final = Theme({"chosen": "bold", "sign": "bold"})


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; `align` is "<" or ">"."""

    header: str
    cells: Sequence[str]
    align: str = ">"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; `marked` is the row of the chosen size."""

    title: str
    columns: Sequence[Column]
    marked: int | None
    foot: str

    @property
    def rows(self) -> Iterator[tuple[str, ...]]:
        return zip(*(column.cells for column in self.columns), strict=True)


@dataclass(frozen=True, slots=True)
class Fact:
    """One line about the chosen size: label, value and comment."""

    label: str
    value: str
    comment: str


@dataclass(frozen=True, slots=True)
class Page:
    """Content of a report, independent of its look; `comment` is about the answer."""

    header: tuple[str, ...]
    answer: str
    comment: str
    facts: tuple[Fact, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters that an output can show; replaced one for one, so that columns stay aligned."""

    encoding: str  # of the output; characters outside it become "?"
    stand_ins: Mapping[int, int] = field(default_factory=dict)  # characters that replace others

    def spell(self, text: str) -> str:
        """Return text in these characters."""
        spelled = text.translate(self.stand_ins)
        return spelled.encode(self.encoding, "replace").decode(self.encoding)


UNICODE: Final = Glyphs("utf-8")
ASCII: Final = Glyphs("ascii", str.maketrans("▶×·–−█▉▊▋▌▍▎▏±µ", ">x---#####   ~u"))


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return all glyphs if the encoding has them, otherwise their ASCII stand-ins."""
    try:
        "▶×·–−±▏▉█".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def console(file: TextIO, theme: Theme, **options: Any) -> Console:
    """Return a console for `renderable`; names in a report are never read as markup."""
    return Console(
        file=file, width=WIDTH, theme=theme, markup=False, emoji=False, highlight=False,
        force_jupyter=False, **options,
    )  # fmt: skip


def terminal(page: Page, glyphs: Glyphs, **options: Any) -> str:
    """Return a page as text: plain, unless `options` of a Console say otherwise."""
    out = io.StringIO()
    console(out, COLOURED, **({"color_system": None} | options)).print(renderable(page))
    return "\n".join(map(_without_blanks, glyphs.spell(out.getvalue()).splitlines()))


def _without_blanks(line: str) -> str:
    """Remove blanks that fill the width: a narrow terminal would wrap them."""
    return re.sub(r"( |\x1b\[[\d;]*m)+$", lambda end: "\x1b[0m" * ("\x1b" in end[0]), line)


def html(page: Page) -> str:
    """Return a page as HTML, in the colours of the notebook around it."""
    output = console(io.StringIO(), UNCOLOURED, record=True)
    output.print(renderable(page))
    return output.export_html(inline_styles=True, code_format=_HTML)


def renderable(page: Page) -> RenderableType:
    """Return the blocks of a page, with an empty line between two."""
    answer = Columns(list(filter(None, (page.answer, page.comment))), padding=(0, 4))
    shown = answer if page.answer else None
    blocks = [shown, _facts(page.facts), *map(_table, page.tables), _notes(page.notes)]
    indented = (Padding(block, (1, 0, 0, _INDENT)) for block in blocks if block)
    return Group(_header(page.header), *indented)


def _header(parts: Sequence[str]) -> str:
    """Break lines between parts only."""
    lines: list[str] = []
    for part in parts:
        if lines and len(f"{lines[-1]} · {part}") <= WIDTH:
            lines[-1] += f" · {part}"
        else:
            lines.append(f"  {part}" if lines else part)
    return "\n".join(lines)


def _facts(facts: Sequence[Fact]) -> RenderableType | None:
    grid = rich_table.Table.grid(padding=(0, 3))
    grid.add_column(no_wrap=True)
    for fact in facts:
        grid.add_row(fact.label, fact.value, fact.comment)
    return grid if facts else None


def _table(table: Table) -> RenderableType:
    grid = rich_table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for number, column in enumerate(table.columns):
        # Sizes and bars keep their width; in a table that is too wide, other cells are folded
        is_fixed = number == 0 or not column.header
        grid.add_column(
            column.header,
            justify="left" if column.align == "<" else "right",
            no_wrap=is_fixed,
            overflow="crop" if is_fixed else "fold",
        )
    width = max(len(table.columns[0].header), *(len(row[0]) + 2 for row in table.rows))
    for number, (first, *others) in enumerate(table.rows):
        is_marked = number == table.marked
        mark = MARK if is_marked else ""
        row = (f"{mark}{first:>{width - len(mark)}}", *others)
        grid.add_row(*row, style="chosen" if is_marked else None)
    return Group(*(part for part in (table.title, grid, table.foot) if part))


def _notes(notes: Sequence[str]) -> RenderableType | None:
    grid = rich_table.Table.grid(padding=(0, 1))
    for note in notes:
        grid.add_row(Text("!", "sign"), "\n".join(wrapped(note, WIDTH - _INDENT - len("! "))))
    return grid if notes else None


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text; a number stays on one line with the word after it."""
    joined = re.sub(r"(?<=\d) (?=\S)", _JOINT, text)
    lines = textwrap.wrap(joined, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_JOINT, " ") for line in lines]
