"""A page of a report, laid out by rich for terminals, logs and notebooks."""

from __future__ import annotations

import io
import re
import textwrap
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Final

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
COLOURED: Final = Theme({"chosen": "bold green", "sign": "bold yellow"})
UNCOLOURED: Final = Theme({"chosen": "bold", "sign": "bold"})


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; `align` is "<" or ">"."""

    header: str
    cells: tuple[str, ...]
    align: str = ">"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; `marked` is the row of the chosen size."""

    title: str
    columns: tuple[Column, ...]
    marked: int | None
    foot: str

    @property
    def rows(self) -> Iterator[tuple[str, ...]]:
        """Cells, row by row."""
        return zip(*(column.cells for column in self.columns), strict=True)


@dataclass(frozen=True, slots=True)
class Fact:
    """One line about the chosen size: label, value and comment."""

    label: str
    value: str
    remark: str


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
    """Characters that an output can show; replaced one for one, so that columns stay aligned.

    Args:
        encoding: Encoding of the output; characters outside it become "?".
        stand_ins: Characters that replace others.
    """

    encoding: str
    stand_ins: Mapping[int, int] = field(default_factory=dict)

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


def terminal(page: Page, glyphs: Glyphs) -> str:
    """Return a page as plain text."""
    out = io.StringIO()
    console = Console(
        file=out, width=WIDTH, theme=UNCOLOURED, color_system=None, force_jupyter=False
    )
    console.print(renderable(page, glyphs))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def renderable(page: Page, glyphs: Glyphs) -> RenderableType:
    """Return a page for a console of `WIDTH` columns whose theme has the styles chosen and sign."""
    return _Layout(glyphs).page(page)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Blocks of a page; every string becomes a `Text`, so that names are never read as markup."""

    glyphs: Glyphs

    def page(self, page: Page) -> RenderableType:
        blocks = [self._header(page.header)]
        if page.answer:
            parts = [self._text(part) for part in (page.answer, page.comment) if part]
            blocks.append(_indented(Columns(parts, padding=(0, 4))))
        if page.facts:
            blocks.append(_indented(self._facts(page.facts)))
        blocks += [_indented(self._table(table)) for table in page.tables]
        if page.notes:
            blocks.append(_indented(self._notes(page.notes)))
        return Group(blocks[0], *chain.from_iterable((Text(), block) for block in blocks[1:]))

    def _text(self, content: str, style: str = "") -> Text:
        return Text(self.glyphs.spell(content), style)

    def _header(self, parts: Sequence[str]) -> RenderableType:
        """Break lines between parts only."""
        lines: list[str] = []
        for part in parts:
            if lines and len(f"{lines[-1]} · {part}") <= WIDTH:
                lines[-1] += f" · {part}"
            else:
                lines.append(f"  {part}" if lines else part)
        return self._text("\n".join(lines))

    def _facts(self, facts: Sequence[Fact]) -> RenderableType:
        grid = rich_table.Table.grid(padding=(0, 3))
        grid.add_column(no_wrap=True)
        for fact in facts:
            grid.add_row(*map(self._text, (fact.label, fact.value, fact.remark)))
        return grid

    def _table(self, table: Table) -> RenderableType:
        grid = rich_table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
        for number, column in enumerate(table.columns):
            # Sizes and bars keep their width; in a table that is too wide, other cells are folded
            is_fixed = number == 0 or not column.header
            grid.add_column(
                self._text(column.header),
                justify="left" if column.align == "<" else "right",
                no_wrap=is_fixed,
                overflow="crop" if is_fixed else "fold",
            )
        width = max(len(table.columns[0].header), *(len(row[0]) + 2 for row in table.rows))
        for number, (first, *others) in enumerate(table.rows):
            is_marked = number == table.marked
            mark = MARK if is_marked else ""
            cells = (f"{mark}{first:>{width - len(mark)}}", *others)
            grid.add_row(*map(self._text, cells), style="chosen" if is_marked else None)
        title, foot = (self._text(text) for text in (table.title, table.foot))
        return Group(*(part for part in (title, grid, foot) if part))

    def _notes(self, notes: Sequence[str]) -> RenderableType:
        grid = rich_table.Table.grid(padding=(0, 1))
        for note in notes:
            lines = wrapped(note, WIDTH - _INDENT - len("! "))
            grid.add_row(self._text("!", "sign"), self._text("\n".join(lines)))
        return grid


def _indented(block: RenderableType) -> RenderableType:
    return Padding(block, (0, 0, 0, _INDENT))


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text; a number stays on one line with the word after it."""
    joined = re.sub(r"(?<=\d) (?=\S)", _JOINT, text)
    lines = textwrap.wrap(joined, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_JOINT, " ") for line in lines]
