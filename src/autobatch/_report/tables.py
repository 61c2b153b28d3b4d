"""Facts and tables of a report about training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch._memory import format_bytes
from autobatch._report.layout import Column, Fact, Table
from autobatch._report.tradeoff import is_of
from autobatch._report.units import BYTES, SECONDS, aligned, percent, quantity, unit_for
from autobatch._throughput import latest_by_size
from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from autobatch._plan import BatchPlan
    from autobatch._report.notes import Look
    from autobatch._report.tradeoff import EffectiveRow
    from autobatch._report.units import Unit
    from autobatch._throughput import SpeedRow
    from autobatch._trials import Trial

_BAR = 16  # characters
_SIZES = 12  # rows of the speed table: the whole report is one screen
_OUT = (Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY)
_SAID = {
    Outcome.FIT: "fits",
    Outcome.OVER_BUDGET: "over the budget",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.REFUSED: "refused",
}


def speed_fact(row: SpeedRow, rows: Sequence[SpeedRow]) -> Fact:
    """How fast the chosen micro-batch is, and how it compares."""
    fastest = max(rows, key=lambda other: other.of_fastest)
    here, there = (aligned([r.samples_per_second])[0] for r in (row, fastest))
    low, high = row.samples_per_second_low, row.samples_per_second_high
    if low is not None and high is not None:
        off = (high - low) / 2 / row.samples_per_second
        here = f"{here} samples/s ±{percent(off)}"
    else:
        here = f"{here} samples/s"
    remark = (
        f"{percent(row.of_fastest)} of the fastest measured ({there} at {fastest.batch_size:,})"
    )
    if row == fastest:
        remark = _fastest_of(row, rows)
    return Fact("Speed", here, remark)


def _fastest_of(row: SpeedRow, rows: Sequence[SpeedRow]) -> str:
    timed = [each for each in rows if each.updates is not None] or rows
    if len(rows) == 1:
        return "by one trial, a few steps" if row.updates is None else ""
    if row not in timed:
        return f"by its trial alone; {len(timed)} others were timed"
    if len(timed) < len(rows):
        return f"the fastest of {len(timed)} sizes timed, {len(rows) - len(timed)} by trial"
    return f"the fastest of {len(timed)} sizes timed"


def memory_fact(peak: int, budget: int, remark: str) -> Fact:
    """What the chosen micro-batch holds of the budget."""
    allowed = format_bytes(budget)
    held = format_bytes(peak).removesuffix(f" {allowed.split()[-1]}")
    spare = f"{format_bytes(budget - peak)} to spare"
    return Fact("Memory", f"{held} of {allowed}", f"{spare}; {remark}" if remark else spare)


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
    return Fact("Data", f"{look.read:,} sample{'s' if look.read > 1 else ''} read", found)


@dataclass(frozen=True, slots=True)
class _Size:
    """One micro-batch: what became of its trial, and its speed."""

    batch_size: int
    trial: Trial | None
    speed: SpeedRow | None

    @property
    def fits(self) -> bool:
        return self.speed is not None or (self.trial is not None and self.trial.fits)

    def said(self, *, marks: bool) -> str:
        """Its speed as a bar, marked where it was not timed as the others were; else what became of it."""
        if self.speed is not None:
            mark = " *" if marks and self.speed.updates is None else ""
            return f"{bar(self.speed.of_fastest)}{mark}"
        return _SAID[self.trial.outcome] if self.trial else ""

    @property
    def peak(self) -> int | None:
        if self.trial is not None:
            return self.trial.peak
        return self.speed.peak if self.speed else None


def speed_table(trials: Iterable[Trial], rows: Iterable[SpeedRow], plan: BatchPlan) -> Table:
    """The sizes that were tried or timed, with what was measured."""
    speeds = {row.batch_size: row for row in rows}
    tried = {trial.batch_size: trial for trial in latest_by_size(trials)}
    sizes = [_Size(size, tried.get(size), speeds.get(size)) for size in sorted({*tried, *speeds})]
    fastest = max(speeds, key=lambda size: speeds[size].of_fastest, default=0)
    shown = _thinned(sizes, keep={plan.micro_batch_size, fastest})
    lines = [size.speed for size in shown]
    marks = any(row.updates is not None for row in speeds.values())
    return table_of(
        [
            Column("micro-batch", tuple(f"{size.batch_size:,}" for size in shown)),
            numbers("samples/s", [row.samples_per_second if row else None for row in lines]),
            Column("", tuple(size.said(marks=marks) for size in shown), align="<"),
            Column(
                "of fastest",
                tuple(percent(row.of_fastest) if row else "" for row in lines),
            ),
            measures("step {}", [row.step_seconds if row else None for row in lines], SECONDS),
            measures("peak {}", [size.peak for size in shown], BYTES),
        ],
        chosen=[size.batch_size == plan.micro_batch_size for size in shown],
        foot=_foot(lines if marks else (), len(sizes) - len(shown)),
    )


def _foot(rows: Iterable[SpeedRow | None], left_out: int) -> str:
    """What a mark means, and how many sizes are not shown."""
    told = []
    if any(row is not None and row.updates is None for row in rows):
        told.append("* from its trial alone, a few steps")
    if left_out:
        told.append(f"{left_out:,} more; report.trials and report.curve have them all")
    return ". ".join(told)


def effective_table(
    rows: Sequence[EffectiveRow],
    plan: BatchPlan,
    *,
    title: str,
    foot: str,
) -> Table:
    """A ladder of effective batches: how many updates an epoch has, what they take, and what comes of them."""
    compared = any(row.relative_time is not None for row in rows)
    return table_of(
        [
            Column("per update", tuple(f"{row.effective_batch_size:,}" for row in rows)),
            Column("micro-batches", tuple(map(_made_of, rows))),
            Column(
                "updates/epoch",
                tuple(
                    f"{row.updates_per_epoch:,}" if row.updates_per_epoch else "" for row in rows
                ),
            ),
            measures("{}/epoch", [row.epoch_seconds for row in rows], SECONDS),
            Column("time to same loss", tuple(map(_relative_time, rows)), align="<")
            if compared
            else measures("{}/update", [*map(_update_seconds, rows)], SECONDS),
            Column("LR", tuple(map(_factor, rows))),
        ],
        title=title,
        chosen=[is_of(row, plan) for row in rows],
        foot=foot,
    )


def _made_of(row: EffectiveRow) -> str:
    return f"{row.accumulate_grad_batches:,} of {row.micro_batch_size:,}"


def _update_seconds(row: EffectiveRow) -> float | None:
    """Of all of the data in one update, the epoch has told it."""
    return None if row.updates_per_epoch == 1 else row.update_seconds


def _relative_time(row: EffectiveRow) -> str:
    if row.relative_time is None:
        return ""
    if row.relative_time == row.relative_time_low == row.relative_time_high:
        return f"{row.relative_time:.2f}×"
    return f"{_times(row.relative_time)}  ({spread(row)})"


def spread(row: EffectiveRow) -> str:
    """Between what and what the time to the same loss is likely to be."""
    low, high = (
        _times(row.relative_time_low or 0, 1),
        _times(row.relative_time_high or 0, 1),
    )
    return high if low == high else f"{low.removesuffix('×')}–{high}"


def _times(value: float, decimals: int = 2) -> str:
    """A multiple, to two digits where it is large."""
    if value < 10:  # noqa: PLR2004 -- one digit before the point
        return f"{value:.{decimals}f}×"
    return f"{float(f'{value:.2g}'):,.0f}×"


def _factor(row: EffectiveRow) -> str:
    factor = row.learning_rate_factor
    if factor is None:
        return ""
    return f"×{factor:,.0f}" if factor >= 10 else f"×{factor:.2g}"  # noqa: PLR2004 -- two digits are enough


def table_of(
    columns: Iterable[Column], *, chosen: list[bool], title: str = "", foot: str = ""
) -> Table:
    """A table without the columns in which nothing stands."""
    told = tuple(column for column in columns if any(column.cells))
    return Table(title, told, chosen.index(True) if any(chosen) else None, foot)


def measures(header: str, values: Sequence[float | None], units: Sequence[Unit]) -> Column:
    """Numbers in the one unit that suits them, which the header names."""
    unit = unit_for([value for value in values if value is not None], units)
    scaled = [None if value is None else value / unit.factor for value in values]
    return numbers(header.format(unit.name), scaled)


def numbers(header: str, values: Sequence[float | None]) -> Column:
    """Numbers that share their decimals."""
    shown = iter(aligned([value for value in values if value is not None]))
    return Column(header, tuple("" if value is None else next(shown) for value in values))


def bar(share: float) -> str:
    """A share as a bar, exact to an eighth of a character."""
    full, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def _thinned(sizes: Sequence[_Size], keep: set[int]) -> list[_Size]:
    """A screenful: without the failures past the first, and the sizes closest to their neighbours."""
    shown = list(sizes)
    while len(shown) > _SIZES:
        failed = [size for size in shown if size.trial and size.trial.outcome in _OUT][1:]
        inner = [
            (after.batch_size / before.batch_size, size)
            for before, size, after in zip(shown, shown[1:], shown[2:], strict=False)
            if size.fits and after.fits
        ]
        crowded = [size for _, size in sorted(inner, key=lambda pair: -pair[0])]
        spare = [size for size in (*crowded, *failed) if size.batch_size not in keep]
        if not spare:
            break
        shown.remove(spare[-1])
    return shown


def product(plan: BatchPlan) -> str:
    """How an effective batch is made."""
    ranks = f" × {plan.world_size} ranks" if plan.world_size > 1 else ""
    factors = f"{plan.micro_batch_size:,} × accumulate {plan.accumulate_grad_batches:,}{ranks}"
    return f"Micro-batch {factors} = {plan.effective_batch_size:,} per update"


def counted(trials: int) -> str:
    """So many trials."""
    return "1 trial" if trials == 1 else f"{trials:,} trials"
