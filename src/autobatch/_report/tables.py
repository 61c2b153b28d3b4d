"""Tables of a report about training: measured sizes and effective batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._report.layout import Column, Table
from autobatch._report.tradeoff import is_of
from autobatch._report.units import (
    BYTES,
    SECONDS,
    aligned,
    counted,
    factor,
    multiple,
    percent,
    unit_for,
)
from autobatch._trials import Outcome, latest_by_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autobatch._plan import BatchPlan
    from autobatch._report.tradeoff import EffectiveRow
    from autobatch._report.units import Unit
    from autobatch._throughput import SpeedRow
    from autobatch._trials import Trial

_BAR: Final = 16  # characters of a full bar
_ROWS: Final = 12  # of a table of sizes: the whole report fits one screen
_OUTCOMES: Final = {
    Outcome.FIT: "fits",
    Outcome.OVER_BUDGET: "over the budget",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.REFUSED: "refused",
}


def speed_table(trials: Iterable[Trial], rows: Iterable[SpeedRow], plan: BatchPlan) -> Table:
    """Return the sizes that were tried or timed, with their throughput and peak memory."""
    speeds = {row.batch_size: row for row in rows}
    tried = latest_by_size(trials)
    sizes = sorted({*tried, *speeds})
    shown = _one_screen(sizes, tried, speeds, plan.micro_batch_size)
    timed = [speeds.get(size) for size in shown]
    # Sizes with fewer steps are marked only beside sizes that were timed longer
    marks = any(row.updates is not None for row in speeds.values())
    stars = {size: " *" for size, row in speeds.items() if marks and row.updates is None}
    bars = [
        f"{bar(row.of_fastest)}{stars.get(size, '')}" if row else _OUTCOMES[tried[size].outcome]
        for size, row in zip(shown, timed, strict=True)
    ]
    peaks = [(tried.get(size) or speeds[size]).peak for size in shown]
    # Beside the reserved bytes, which are the peak, where the allocator has reserved more
    allocated = [tried[size].allocated if size in tried else None for size in shown]
    differ = any(each not in (None, peak) for each, peak in zip(allocated, peaks, strict=True))
    return table_of(
        [
            counts("micro-batch", shown),
            numbers("samples/s", [row.samples_per_second if row else None for row in timed]),
            Column("", bars, align="<"),
            Column("of fastest", [percent(row.of_fastest) if row else "" for row in timed]),
            measures("step {}", [row.step_seconds if row else None for row in timed], SECONDS),
            measures("peak {}", peaks, BYTES),
            *([measures("in use {}", allocated, BYTES)] if differ else ()),
        ],
        chosen=[size == plan.micro_batch_size for size in shown],
        foot=_foot(timed if marks else (), len(sizes) - len(shown)),
    )


def _foot(rows: Iterable[SpeedRow | None], left_out: int) -> str:
    sentences = []
    if any(row is not None and row.updates is None for row in rows):
        sentences.append("* from its trial alone, a few steps")
    if left_out:
        sentences.append(f"{counted(left_out, 'more size')} in report.trials and report.curve")
    return ". ".join(sentences)


def _one_screen(
    sizes: Sequence[int], tried: Mapping[int, Trial], speeds: Mapping[int, SpeedRow], chosen: int
) -> list[int]:
    """Leave out the largest failures first, then the sizes closest to others."""
    fits = [size for size in sizes if size in speeds or tried[size].fits]
    largest = max(fits, default=0)
    failed = [size for size in sizes if size > largest]
    spare = max(0, len(sizes) - _ROWS)
    left_out = set(failed[max(1, len(failed) - spare) :]) - {chosen}
    fastest = max(speeds, key=lambda size: speeds[size].of_fastest, default=chosen)
    keep = {chosen, fastest, *fits[-1:], *failed[:1]}
    return thinned([size for size in sizes if size not in left_out], keep)


def thinned(sizes: Sequence[int], keep: Iterable[int | None]) -> list[int]:
    """Return one screen of ascending sizes: those to keep, both ends, and others far from these."""
    shown = set(sizes).intersection({*keep, *sizes[:1], *sizes[-1:]})
    rest = [size for size in sizes if size not in shown]
    while rest and len(shown) < _ROWS:
        farthest = max(rest, key=lambda size: min(max(size / at, at / size) for at in shown))
        rest.remove(farthest)
        shown.add(farthest)
    return sorted(shown)


def effective_table(
    rows: Sequence[EffectiveRow], plan: BatchPlan, *, title: str, foot: str
) -> Table:
    """Return effective batches with their updates, times and learning rates."""
    if any(row.relative_time is not None for row in rows):
        time = Column("time to same loss", [_relative_time(row) for row in rows], align="<")
    else:
        # An update of all samples takes an epoch, which has its own column
        updates = [None if row.updates_per_epoch == 1 else row.update_seconds for row in rows]
        time = measures("{}/update", updates, SECONDS)
    made_of = [f"{row.accumulate_grad_batches:,} of {row.micro_batch_size:,}" for row in rows]
    return table_of(
        [
            counts("per update", [row.effective_batch_size for row in rows]),
            Column("micro-batches", made_of),
            counts("updates/epoch", [row.updates_per_epoch for row in rows]),
            measures("{}/epoch", [row.epoch_seconds for row in rows], SECONDS),
            time,
            Column("LR", [factor(row.learning_rate_factor) for row in rows]),
        ],
        title=title,
        chosen=[is_of(row, plan) for row in rows],
        foot=foot,
    )


def _relative_time(row: EffectiveRow) -> str:
    if row.relative_time is None:
        return ""
    is_exact = row.relative_time == row.relative_time_low == row.relative_time_high
    return f"{multiple(row.relative_time)}{'' if is_exact else f'  ({spread(row)})'}"


def spread(row: EffectiveRow) -> str:
    """Return the likely range of the relative time to the same loss, "0.6–1.0×"."""
    low, high = (multiple(x or 0, 1) for x in (row.relative_time_low, row.relative_time_high))
    return high if low == high else f"{low.removesuffix('×')}–{high}"


def table_of(
    columns: Iterable[Column], *, chosen: list[bool], title: str = "", foot: str = ""
) -> Table:
    """Return a table without its empty columns."""
    filled = [column for column in columns if any(column.cells)]
    return Table(title, filled, chosen.index(True) if any(chosen) else None, foot)


def measures(header: str, values: Sequence[float | None], units: Sequence[Unit]) -> Column:
    """Return a column of numbers in one unit, named in the header."""
    unit = unit_for([value for value in values if value is not None], units)
    scaled = [None if value is None else value / unit.factor for value in values]
    return numbers(header.format(unit.name), scaled)


def numbers(header: str, values: Sequence[float | None]) -> Column:
    """Return a column of numbers with equal decimals."""
    shown = iter(aligned([value for value in values if value is not None]))
    return Column(header, ["" if value is None else next(shown) for value in values])


def counts(header: str, values: Sequence[int | None]) -> Column:
    """Return a column of whole numbers, exactly."""
    return Column(header, ["" if value is None else f"{value:,}" for value in values])


def bar(share: float) -> str:
    """Return a share as a bar, exact to an eighth of a character."""
    full, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def product(plan: BatchPlan) -> str:
    """Return the factors of an effective batch."""
    ranks = f" × {plan.world_size} ranks" if plan.world_size > 1 else ""
    factors = f"{plan.micro_batch_size:,} × accumulate {plan.accumulate_grad_batches:,}{ranks}"
    return f"Micro-batch {factors} = {plan.effective_batch_size:,} per update"
