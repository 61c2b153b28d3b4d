"""Lay out a page as text of limited width."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_WIDTH = 86
# Of the columns of facts, unless something in them is longer
_LABELS = 9
_VALUES = 24


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; `align` is "<" or ">"."""

    header: str
    cells: tuple[str, ...]
    align: str = ">"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; `marked` is the row of the choice."""

    title: str
    columns: tuple[Column, ...]
    marked: int | None
    foot: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of what the choice means."""

    label: str
    value: str
    remark: str


@dataclass(frozen=True, slots=True)
class Page:
    """What a report says, before anything decides how it looks."""

    header: tuple[str, ...]
    answer: str
    asked: str
    facts: tuple[Fact, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Which characters a text is spelled with: one for one, so that columns stay where they are.

    Args:
        encoding: What the text must fit into; a character outside it becomes "?".
        stand_ins: Characters to use instead of others.
    """

    encoding: str
    stand_ins: Mapping[int, int] = field(default_factory=dict)

    def spell(self, text: str) -> str:
        """The text in these characters."""
        spelled = text.translate(self.stand_ins)
        return spelled.encode(self.encoding, "replace").decode(self.encoding)


UNICODE = Glyphs("utf-8")
ASCII = Glyphs("ascii", str.maketrans("▶×·–−█▉▊▋▌▍▎▏±µ", ">x---#####   ~u"))


def terminal(page: Page, glyphs: Glyphs) -> str:
    """A page as text for a terminal or a log."""
    blocks = [
        _joined(page.header),
        _ends(page.answer, page.asked),
        _facts(page.facts),
        *(_rows(table) for table in page.tables),
        [line for note in page.notes for line in _note(note)],
    ]
    lines = "\n\n".join("\n".join(block) for block in blocks if block).splitlines()
    return glyphs.spell("\n".join(part for line in lines for part in _narrow(line)))


def _facts(facts: Sequence[Fact]) -> list[str]:
    """A line each, the remarks below each other."""
    labels = max((len(fact.label) for fact in facts), default=0)
    values = max((len(fact.value) for fact in facts if fact.remark), default=0)
    first, second = max(_LABELS, labels + 2), max(_VALUES, values + 2)
    return [f"  {fact.label:<{first}}{fact.value:<{second}}{fact.remark}" for fact in facts]


def _joined(parts: Iterable[str]) -> list[str]:
    """Parts side by side, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= _WIDTH:
            lines[-1] += f" · {part}"
        else:
            lines.append(f"  {part}" if lines else part)
    return lines


def _ends(left: str, right: str) -> list[str]:
    """The answer, and beside it, or below where there is no room, what was asked."""
    if not left:
        return []
    if not right:
        return [f"  {left}"]
    start = min(59, _WIDTH - len(right))
    beside = len(left) + 4 <= start
    return [f"  {left}".ljust(start) + right] if beside else [f"  {left}", f"  {right}"]


def _rows(table: Table) -> list[str]:
    first, *others = table.columns
    room = Column(first.header, tuple(f"  {cell}" for cell in first.cells))  # for the mark
    padded = [_padded(column) for column in (room, *others)]
    lines = ["  " + "  ".join(cells) for cells in zip(*padded, strict=True)]
    if table.marked is not None:
        lines[table.marked + 1] = f"  ▶{lines[table.marked + 1][3:]}"
    title, foot = ([f"  {text}"] if text else [] for text in (table.title, table.foot))
    return [*title, *lines, *foot]


def _padded(column: Column) -> list[str]:
    texts = (column.header, *column.cells)
    width = max(map(len, texts))
    return [f"{text:{column.align}{width}}" for text in texts]


def _note(note: str) -> list[str]:
    return textwrap.wrap(note, _WIDTH, initial_indent="  ! ", subsequent_indent="    ")


def _narrow(line: str) -> list[str]:
    """The line itself, or, where it is a sentence or has numbers beyond reason, as many as it takes."""
    line = line.rstrip()
    return textwrap.wrap(line, _WIDTH, subsequent_indent="    ") if len(line) > _WIDTH else [line]
