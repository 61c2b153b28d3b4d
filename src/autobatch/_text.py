"""How a report reads: numbers for people, tables, and a page at most 86 columns wide."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch._memory import format_bytes
from autobatch._tradeoff import settled
from autobatch._trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autobatch._notes import Look
    from autobatch._plan import BatchPlan
    from autobatch._tradeoff import EffectiveRow, SpeedRow
    from autobatch._trial import Trial

__all__ = [
    "ASCII",
    "BYTES",
    "SECONDS",
    "UNICODE",
    "Column",
    "Fact",
    "Glyphs",
    "Page",
    "Table",
    "aligned",
    "bar",
    "data_fact",
    "effective_table",
    "epoch_fact",
    "measures",
    "memory_fact",
    "numbers",
    "percent",
    "plain",
    "quantity",
    "speed_fact",
    "speed_table",
    "table_of",
    "terminal",
    "unit_for",
    "update_fact",
]

_WIDTH = 86
_DIGITS = 3  # significant ones of the largest number in a column
_DIGITS_LEAST = 2  # and of the smallest
_BAR = 16  # characters
_SIZES = 12  # rows of the speed table: the whole report is one screen
_OUT = (Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY)
_SAID = {
    Outcome.FIT: "fits",
    Outcome.OVER_BUDGET: "over the budget",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.REFUSED: "refused",
}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit for people, used when the smallest number to show is at least `since`."""

    name: str
    factor: float
    since: float


SECONDS = (
    Unit("h", 3600, 7200),
    Unit("min", 60, 120),
    Unit("s", 1, 1),
    Unit("ms", 1e-3, 0),
)
BYTES = (
    Unit("GiB", 2**30, 2**29),
    Unit("MiB", 2**20, 2**19),
    Unit("KiB", 2**10, 0),
)


def unit_for(values: Iterable[float], units: Sequence[Unit]) -> Unit:
    """The one unit in which all of these are shown."""
    least = min(values, default=0)
    return next((unit for unit in units if least >= unit.since), units[-1])


def aligned(values: Sequence[float]) -> list[str]:
    """The numbers of a column with the same decimals: three digits of the largest, two of the smallest."""
    digits = [_digits(value) for value in values]
    largest, least = max(digits, default=1), min(digits, default=1)
    if largest > _DIGITS:
        return [
            f"{round(value, min(0, _DIGITS - _digits(value))):,.0f}" for value in values
        ]
    decimals = min(3, max(0, _DIGITS - largest, _DIGITS_LEAST - least))
    return [f"{value:,.{decimals}f}" for value in values]


def _digits(value: float) -> int:
    """Digits before the point; zero or less for a fraction below a tenth."""
    return math.floor(math.log10(abs(value))) + 1 if value else 1


def quantity(value: float, units: Sequence[Unit]) -> str:
    """One number with its unit, "48.2 s"; decimals that are all zero are left out."""
    unit = unit_for([value], units)
    whole, _, decimals = aligned([value / unit.factor])[0].partition(".")
    return (
        f"{whole}.{decimals} {unit.name}"
        if decimals.strip("0")
        else f"{whole} {unit.name}"
    )


def percent(share: float) -> str:
    """A share as a whole percentage; what is not quite nothing, or not quite all, says so."""
    if 0 < share < 0.005:  # noqa: PLR2004 -- would round to 0
        return "<1 %"
    if 0.995 <= share < 1:  # noqa: PLR2004 -- would round to 100
        return ">99 %"
    return f"{100 * share:.0f} %"


def plain(text: str) -> str:
    """One line without control characters, whatever a name or a file held."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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


def speed_fact(row: SpeedRow, rows: Sequence[SpeedRow]) -> Fact:
    """How fast the chosen micro-batch is, and how it compares."""
    fastest = max(rows, key=lambda other: other.of_fastest)
    here, there = (aligned([r.samples_per_second])[0] for r in (row, fastest))
    remark = f"{percent(row.of_fastest)} of the fastest measured ({there} at {fastest.batch_size})"
    if row == fastest:
        remark = f"the fastest of {len(rows)} sizes timed" if len(rows) > 1 else ""
    return Fact("Speed", f"{here} samples/s", remark)


def memory_fact(peak: int, budget: int, remark: str) -> Fact:
    """What the chosen micro-batch holds of the budget."""
    allowed = format_bytes(budget)
    held = format_bytes(peak).removesuffix(f" {allowed.split()[-1]}")
    spare = f"{format_bytes(budget - peak)} to spare"
    return Fact(
        "Memory", f"{held} of {allowed}", f"{spare}; {remark}" if remark else spare
    )


def update_fact(seconds: float, optimizer_seconds: float | None) -> Fact:
    """What one update takes."""
    share = percent(optimizer_seconds / seconds) if optimizer_seconds else ""
    return Fact(
        "Update",
        quantity(seconds, SECONDS),
        f"optimizer {share} of it" if share else "",
    )


def epoch_fact(updates: int, seconds: float | None) -> Fact:
    """How many updates an epoch has, and what they take together."""
    took = f"{quantity(seconds, SECONDS)} in training steps" if seconds else ""
    return Fact("Epoch", f"{updates:,} update{'s' if updates > 1 else ''}", took)


def data_fact(look: Look) -> Fact:
    """What trials ran on."""
    found = "all of one size" if look.is_even else "trials ran the largest"
    if look.among is not None and look.read < look.among:
        found = f"of {look.among:,}; {found}"
    return Fact(
        "Data", f"{look.read:,} sample{'s' if look.read > 1 else ''} read", found
    )


def speed_table(
    trials: Iterable[Trial], rows: Iterable[SpeedRow], plan: BatchPlan
) -> Table:
    """The sizes that were tried, with what was measured."""
    timed = {row.batch_size: row for row in rows}
    tried = settled(trials)
    fastest = max(timed, key=lambda size: timed[size].of_fastest, default=0)
    shown = _thinned(tried, keep={plan.micro_batch_size, fastest})
    lines = [timed.get(trial.batch_size) for trial in shown]
    left_out = len(tried) - len(shown)
    return table_of(
        [
            Column("micro-batch", tuple(str(trial.batch_size) for trial in shown)),
            numbers(
                "samples/s", [row.samples_per_second if row else None for row in lines]
            ),
            Column(
                "",
                tuple(
                    bar(row.of_fastest) if row else _SAID[trial.outcome]
                    for trial, row in zip(shown, lines, strict=True)
                ),
                align="<",
            ),
            Column(
                "of fastest",
                tuple(percent(row.of_fastest) if row else "" for row in lines),
            ),
            measures(
                "step {}", [row.step_seconds if row else None for row in lines], SECONDS
            ),
            measures("peak {}", [trial.peak for trial in shown], BYTES),
        ],
        chosen=[trial.batch_size == plan.micro_batch_size for trial in shown],
        foot=f"{left_out} more tried; report.trials has them all" if left_out else "",
    )


def effective_table(
    rows: Sequence[EffectiveRow], plan: BatchPlan, dataset_size: int | None
) -> Table:
    """A ladder of effective batches: how many updates an epoch has, and what they take."""
    epoch = f", over an epoch of {dataset_size:,} samples" if dataset_size else ""
    return table_of(
        [
            Column("per update", tuple(str(row.effective_batch_size) for row in rows)),
            Column("micro-batch", tuple(str(row.micro_batch_size) for row in rows)),
            Column(
                "accumulate", tuple(f"×{row.accumulate_grad_batches}" for row in rows)
            ),
            Column(
                "updates/epoch",
                tuple(f"{row.updates_per_epoch:,}" if epoch else "" for row in rows),
            ),
            measures("{}/epoch", [row.epoch_seconds for row in rows], SECONDS),
            measures("{}/update", [row.update_seconds for row in rows], SECONDS),
        ],
        title=f"Effective batch{epoch}",
        chosen=[row.effective_batch_size == plan.effective_batch_size for row in rows],
    )


def table_of(
    columns: Iterable[Column], *, chosen: list[bool], title: str = "", foot: str = ""
) -> Table:
    told = tuple(column for column in columns if any(column.cells))
    return Table(title, told, chosen.index(True) if any(chosen) else None, foot)


def measures(
    header: str, values: Sequence[float | None], units: Sequence[Unit]
) -> Column:
    """Numbers in the one unit that suits them, which the header names."""
    unit = unit_for([value for value in values if value is not None], units)
    scaled = [None if value is None else value / unit.factor for value in values]
    return numbers(header.format(unit.name), scaled)


def numbers(header: str, values: Sequence[float | None]) -> Column:
    shown = iter(aligned([value for value in values if value is not None]))
    return Column(
        header, tuple("" if value is None else next(shown) for value in values)
    )


def bar(share: float) -> str:
    """A share as a bar, exact to an eighth of a character."""
    full, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def _thinned(trials: Sequence[Trial], keep: set[int]) -> list[Trial]:
    """A screenful: without the failures past the first, and the sizes closest to their neighbours."""
    shown = list(trials)
    while len(shown) > _SIZES:
        failed = [trial for trial in shown if trial.outcome in _OUT][1:]
        inner = [
            (after.batch_size / before.batch_size, trial)
            for before, trial, after in zip(shown, shown[1:], shown[2:], strict=False)
            if trial.fits and after.fits
        ]
        crowded = [trial for _, trial in sorted(inner, key=lambda pair: -pair[0])]
        spare = [t for t in (*crowded, *failed) if t.batch_size not in keep]
        if not spare:
            break
        shown.remove(spare[-1])
    return shown


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
ASCII = Glyphs("ascii", str.maketrans("▶×·–−█▉▊▋▌▍▎▏", ">x---#####   "))


def terminal(page: Page, glyphs: Glyphs) -> str:
    """A page as text for a terminal or a log."""
    blocks = [
        _joined(page.header),
        _ends(page.answer, page.asked),
        [f"  {fact.label:<9}{fact.value:<24}{fact.remark}" for fact in page.facts],
        *(_rows(table) for table in page.tables),
        [line for note in page.notes for line in _note(note)],
    ]
    lines = "\n\n".join("\n".join(block) for block in blocks if block).splitlines()
    return glyphs.spell("\n".join(part for line in lines for part in _narrow(line)))


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
    start = min(59, _WIDTH - len(right))
    beside = len(left) + 4 <= start
    return [f"  {left}".ljust(start) + right] if beside else [f"  {left}", f"  {right}"]


def _rows(table: Table) -> list[str]:
    first, *others = table.columns
    room = Column(
        first.header, tuple(f"  {cell}" for cell in first.cells)
    )  # for the mark
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
    """The line itself, or, with numbers beyond reason, as many as it takes."""
    line = line.rstrip()
    return (
        textwrap.wrap(line, _WIDTH, subsequent_indent="    ")
        if len(line) > _WIDTH
        else [line]
    )
