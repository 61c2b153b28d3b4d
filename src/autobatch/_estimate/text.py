"""Content of an estimate: header, answer, facts, a table of what holds the memory, and notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._estimate.breakdown import Held
from autobatch._memory import format_bytes
from autobatch._report.layout import Column, Fact, Page
from autobatch._report.tables import bar, counts, table_of
from autobatch._report.units import counted, multiple, percent, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch._estimate import Estimate, EstimatedChange, EstimatedPeak
    from autobatch._report.layout import Table

_MODULES: Final = 10  # with the most activations
_NAME: Final = 40  # characters
_LEAST: Final = 0.001  # share of a row of its own
_ALWAYS: Final = (Held.PARAMETERS, Held.GRADIENTS, Held.OPTIMIZER_STATE)


def page(estimate: Estimate, changes: Sequence[EstimatedChange]) -> Page:
    """Return the content of an estimate."""
    peak = estimate.at(max(1, estimate.largest))
    return Page(
        header=(
            "autobatch estimate",
            plain(estimate.subject),
            f"{plain(estimate.device)}, budget {format_bytes(estimate.budget)}",
        ),
        answer=_answer(estimate),
        comment=_comment(estimate),
        facts=_facts(estimate, peak),
        tables=(_table(peak), *_changes(estimate, changes)),
        notes=_notes(estimate, changes),
    )


def _answer(estimate: Estimate) -> str:
    if not estimate.largest:
        return "Not even one sample fits"
    return f"Batches of {counted(estimate.largest, 'sample')} fit: estimated"


def _comment(estimate: Estimate) -> str:
    low, high = estimate.largest.low, estimate.largest.high
    return f"{low:,} to {high:,} with memory ±{100 * estimate.band_share:.1f} %"


def _facts(estimate: Estimate, peak: EstimatedPeak) -> tuple[Fact, ...]:
    low, high = (format_bytes(each) for each in (peak.reserved.low, peak.reserved.high))
    spare = estimate.budget - peak.reserved
    beside = f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}"
    place = f"in {plain(peak.module)}" if peak.module else ""
    return (
        Fact("Reserved", f"{format_bytes(peak.reserved)}, {low} to {high}", beside),
        Fact("Allocated", format_bytes(peak.allocated), ""),
        Fact("Peak", f"{peak.phase}, {plain(peak.operator)}", place),
        Fact("Context", format_bytes(peak.context), "outside of the budget"),
    )


def _table(peak: EstimatedPeak) -> Table:
    rows = dict(peak.held)
    activations = rows.pop("activations", 0)
    modules = list(peak.activations.items())
    largest = {f"activations of {_name(name)}": nbytes for name, nbytes in modules[:_MODULES]}
    rows |= largest | {"other activations": activations - sum(largest.values())}
    total = sum(rows.values())
    small = {
        name: nbytes
        for name, nbytes in rows.items()
        if nbytes < _LEAST * total and name not in _ALWAYS
    }
    shown = sorted(
        ((name, nbytes) for name, nbytes in rows.items() if nbytes and name not in small),
        key=lambda row: -row[1],
    )
    if rest := sum(small.values()):
        shown.append(("everything else", rest))
    return table_of(
        [
            Column("", [format_bytes(nbytes) for _, nbytes in shown]),
            Column("", [bar(nbytes / total) for _, nbytes in shown], align="<"),
            Column("share", [percent(nbytes / total) for _, nbytes in shown]),
            Column("held at the peak by", [name for name, _ in shown], align="<"),
        ],
        title=f"Memory at batch {peak.batch_size:,}",
        chosen=[False] * len(shown),
    )


def _changes(estimate: Estimate, changes: Sequence[EstimatedChange]) -> Iterator[Table]:
    """Yield a table of changes, if there are any."""
    if not changes:
        return
    sizes = [each.largest for each in changes]
    yield table_of(
        [
            counts("largest", sizes),
            Column("band", [f"{size.low:,} to {size.high:,}" for size in sizes]),
            Column("", [multiple(size / max(1, estimate.largest)) for size in sizes]),
            Column("with", [each.change for each in changes], align="<"),
        ],
        title="With one change",
        chosen=[False] * len(sizes),
    )


def _name(module: str) -> str:
    """Return the name of a module, its end if it is long."""
    name = plain(module) or "the step itself"
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _notes(estimate: Estimate, changes: Sequence[EstimatedChange]) -> tuple[str, ...]:
    notes = ["Estimated, and confirmed by no trial: autobatch.find on the GPU measures it."]
    if estimate.fp16_instead:
        notes.append(
            f"{estimate.device} has no bf16 arithmetic, and torch emulates it slowly: fp16, "
            f'"{estimate.fp16_instead}", takes as much memory.'
        )
    if estimate.untested:
        notes.append(
            f"Never compared with a GPU, so the band is wider: {', '.join(estimate.untested)}."
        )
    more = [what for each in changes for what in each.untested if what not in estimate.untested]
    if more:
        notes.append(f"Nor was, of the changes: {', '.join(dict.fromkeys(more))}.")
    return tuple(map(plain, notes))
