"""What the effective batch costs: in time to the same loss, or else in time."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from autobatch._figure._axes import (
    ACCENT,
    BLUE,
    GREEN,
    GREEN_INK,
    GREY,
    INK,
    LEAST_OCTAVES,
    LINE,
    NEAR,
    TICKS,
    blob,
    heading,
    plain_grid,
    ring,
    value_axis,
)
from autobatch._figure._labels import Labels, count
from autobatch._numbers import SECONDS, quantity, unit_for
from autobatch._tradeoff import is_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from autobatch._report import TuningReport
    from autobatch._tradeoff import EffectiveRow

__all__ = ["chosen_rung", "comparable", "compared_panel", "cost_panel", "rungs"]

_FAR: Final = 4.0  # times its neighbour: a rung that would squeeze all others
_ABOVE: Final = ("above", "left above", "right above")
_BELOW: Final = ("below", "right below", "left below")
_COINCIDE: Final = 0.02  # of the axis: so close, two lines look like one
_WIDE: Final = 4.5  # times so wide, a range would fill the axis: room for its name
_TOP: Final = 2.5  # times the chosen; what takes longer leaves the panel
_NEAR: Final = 1.1  # times the shortest
_AS_SHORT: Final = 0.97  # of the time of the chosen: not worth changing it for


def rungs(report: TuningReport) -> tuple[EffectiveRow, ...]:
    """The effective batches that a picture shows: without one so far above the others that it would squeeze them."""
    rows = report.effective
    effective = report.plan.effective_batch_size
    while (
        len(rows) > 1
        and rows[-1].effective_batch_size > effective
        and rows[-1].effective_batch_size > _FAR * rows[-2].effective_batch_size
    ):
        rows = rows[:-1]
    return rows


def comparable(report: TuningReport) -> bool:
    """Whether the time to the same loss was estimated."""
    return any(row.relative_time is not None for row in report.effective)


def compared_panel(axes: Axes, report: TuningReport) -> None:
    """Time and samples to the same loss over the effective batch, beside the chosen: estimated."""
    shown = rungs(report)
    rows = [row for row in shown if row.relative_time is not None]
    xs = [row.effective_batch_size for row in rows]
    times = [row.relative_time or 0.0 for row in rows]
    chosen = chosen_rung(report, shown)
    heading(
        axes,
        f"What the effective batch costs, relative to {count(chosen.effective_batch_size)}",
    )
    plain_grid(axes)
    _effective_axis(axes, shown)
    axes.set_ylim(0, min(_TOP, max(1.25, 1.12 * max(times))))
    axes.yaxis.set_major_locator(MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))

    labels = Labels(axes)
    lows = [row.relative_time_low or 0.0 for row in rows]
    highs = [row.relative_time_high or 0.0 for row in rows]
    axes.fill_between(xs, lows, highs, color=BLUE, alpha=0.14, linewidth=0, zorder=1)
    axes.plot(xs, times, color=BLUE, linewidth=3, zorder=4)
    axes.plot(xs, times, "o", color=BLUE, ms=5, zorder=4)
    labels.avoid(xs, times)
    samples = [row.relative_samples or 0.0 for row in rows]
    top = axes.get_ylim()[1]
    apart = any(
        abs(min(a, top) - min(b, top)) > _COINCIDE * top
        for a, b in zip(times, samples, strict=True)
    )
    if apart:
        dashes = (0, (5, 3))
        axes.plot(xs, samples, color=INK, linewidth=1.3, linestyle=dashes, zorder=3)
        labels.avoid(xs, samples)
    ring(axes, chosen.effective_batch_size, 1.0)
    labels.avoid(*blob(axes, chosen.effective_batch_size, 1.0))

    best = min(rows, key=lambda row: row.relative_time or math.inf)
    _best_said(axes, labels, chosen, best)
    _accumulation(axes, labels, shown)
    _good_range(axes, labels, rows)
    _lines_said(labels, xs, times, samples if apart else None)


def _lines_said(
    labels: Labels,
    xs: Sequence[float],
    times: Sequence[float],
    samples: Sequence[float] | None,
) -> None:
    """Which line is which, beside each; one name for both where they are one."""
    upper, lower = _ABOVE, _BELOW
    if samples is not None and times[0] < samples[0]:
        upper, lower = lower, upper
    labels.put(
        "time to the same loss" if samples else "time and samples\nto the same loss",
        _clear_of(labels.axes, xs, times, samples or times, upper),
        distances=(8.0, 12.0, 18.0),
        ways=upper,
        needed=True,
        color=BLUE,
        fontweight="bold",
    )
    if samples is not None:
        labels.put(
            "samples needed",
            _clear_of(labels.axes, xs, samples, times, lower),
            distances=(8.0, 12.0, 18.0),
            ways=lower,
            color=INK,
            fontsize=9.5,
        )


def chosen_rung(report: TuningReport, rows: Sequence[EffectiveRow]) -> EffectiveRow:
    """The row of the plan."""
    return next((row for row in rows if is_of(row, report.plan)), rows[0])


def _effective_axis(axes: Axes, rows: Sequence[EffectiveRow]) -> None:
    sizes = [row.effective_batch_size for row in rows]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    if high - low < LEAST_OCTAVES:
        low, high = low - LEAST_OCTAVES / 2, high + LEAST_OCTAVES / 2
    margin = 0.05 * (high - low)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _best_said(
    axes: Axes, labels: Labels, chosen: EffectiveRow, best: EffectiveRow
) -> None:
    """What the shortest time is, and at which batch."""
    here = (chosen.effective_batch_size, 1.0)
    shorter = best.relative_time is not None and best.relative_time < _AS_SHORT
    said = f"{count(here[0])}\nchosen"
    if not shorter:
        said = f"{count(here[0])} chosen:\nabout the shortest time"
    labels.put(
        said,
        [here],
        distances=NEAR[1:],
        needed=True,
        color=ACCENT,
        fontweight="bold",
    )
    if not shorter or best.relative_time is None:
        return
    there = (best.effective_batch_size, best.relative_time)
    axes.plot(*there, "o", color=GREEN, ms=10, zorder=5)
    labels.avoid(*blob(axes, *there))
    labels.put(
        f"{count(there[0])} per update: {times_said(best.relative_time)}\n"
        f"the time ({range_said(best)})",
        [there],
        distances=NEAR[1:],
        color=GREEN_INK,
        fontweight="bold",
    )


def times_said(value: float) -> str:
    """A multiple of the chosen, "0.87×"."""
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.1g}×"  # noqa: PLR2004 -- two decimals would be one digit


def range_said(row: EffectiveRow) -> str:
    """How far off it may be, "0.6–1.0×"."""
    low, high = row.relative_time_low or 0.0, row.relative_time_high or 0.0
    return f"{_one(low)}–{_one(high)}×"


def _one(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.1g}"  # noqa: PLR2004 -- one decimal would be 0


def _accumulation(axes: Axes, labels: Labels, rows: Sequence[EffectiveRow]) -> None:
    """From where on an update is made of several micro-batches."""
    single = [row for row in rows if row.accumulate_grad_batches == 1]
    if not single or len(single) == len(rows):
        return
    start = single[-1].effective_batch_size
    axes.axvline(start, color=LINE, linewidth=1.2, linestyle=(0, (1, 2)), zorder=2)
    bottom, top = axes.get_ylim()
    labels.avoid((start, start), (bottom, top))
    labels.put(
        "accumulation →",
        [(start, bottom + share * (top - bottom)) for share in (0.05, 0.15, 0.9)],
        distances=(6.0,),
        ways=("right",),
        color=GREY,
        fontsize=9.5,
    )


def _good_range(axes: Axes, labels: Labels, rows: Sequence[EffectiveRow]) -> None:
    """The batches whose time is about as short as the shortest."""
    if len(rows) == 1:
        return
    low, high = _crossings(rows)
    left, right = axes.get_xlim()
    low = left if low == rows[0].effective_batch_size else low
    high = right if high == rows[-1].effective_batch_size else high
    axes.axvspan(low, high, color=GREEN, alpha=0.1, linewidth=0, zorder=0)
    bottom, top = axes.get_ylim()
    heights = [bottom + (top - bottom) * share for share in (0.98, 0.85, 0.7, 0.3)]
    said = "within 10 %\nof the shortest time"
    look: dict[str, Any] = {"color": GREEN_INK, "fontsize": 9.5}
    middle = math.sqrt(low * high)
    if (high / low) ** _WIDE >= right / left and labels.put(
        said,
        [(middle, height) for height in heights],
        distances=(0.0,),
        ways=("below",),
        **look,
    ):
        return
    edge, side = (high, "right below") if high < right else (low, "left below")
    labels.put(
        said,
        [(edge, height) for height in heights],
        distances=(6.0,),
        ways=(side,),
        **look,
    )


def _crossings(rows: Sequence[EffectiveRow]) -> tuple[float, float]:
    """Where the drawn line goes below and above 1.1 times its lowest, around the lowest."""
    xs = [math.log2(row.effective_batch_size) for row in rows]
    ys = [row.relative_time or 0.0 for row in rows]
    best = ys.index(min(ys))
    level = _NEAR * ys[best]

    def edge(path: Sequence[int]) -> float:
        for inner, outer in pairwise(path):
            if ys[outer] > level:
                share = (level - ys[inner]) / (ys[outer] - ys[inner])
                return float(2 ** (xs[inner] + share * (xs[outer] - xs[inner])))
        return float(rows[path[-1]].effective_batch_size)

    return edge(range(best, -1, -1)), edge(range(best, len(rows)))


def _clear_of(
    axes: Axes,
    xs: Sequence[float],
    own: Sequence[float],
    other: Sequence[float],
    ways: Sequence[str],
) -> list[tuple[float, float]]:
    """Where a line can be named: in sight, where the other is not on the same side, and first where it is far."""
    ends = list(zip(xs, own, other, strict=True))
    between = [
        (
            a[0] ** (1 - share) * b[0] ** share,
            a[1] * (1 - share) + b[1] * share,
            a[2] * (1 - share) + b[2] * share,
        )
        for a, b in pairwise(ends)
        for share in (0.5, 0.25, 0.75)
    ]
    top, side = axes.get_ylim()[1], 1 if ways == _ABOVE else -1
    seen = [place for place in (*between, *ends) if place[1] <= top]
    own_side = [
        (x, y, z) for x, y, z in seen if side * (y - z) >= -_COINCIDE * top
    ] or seen
    far = sorted(own_side, key=lambda place: -abs(min(place[2], top) - place[1]))
    return [(x, y) for x, y, _ in far]


def cost_panel(axes: Axes, report: TuningReport) -> bool:
    """What an epoch, or else an update, takes over the effective batch; False where neither is known: derived."""
    rows = rungs(report)
    if len(rows) == 1:  # nothing to compare
        return False
    if _seconds_line(
        axes, report, "Training steps of an epoch", lambda row: row.epoch_seconds
    ):
        return True
    if _seconds_line(axes, report, "One update", lambda row: row.update_seconds):
        return True
    counted = [(row, float(row.updates_per_epoch or 0)) for row in rows]
    if all(value for _, value in counted):
        heading(axes, "Updates per epoch")
        _cost_line(axes, report, counted, lambda value: f"{value:,.0f} updates")
        return True
    return False


def _seconds_line(
    axes: Axes,
    report: TuningReport,
    title: str,
    seconds: Callable[[EffectiveRow], float | None],
) -> bool:
    known = [(row, value) for row in rungs(report) if (value := seconds(row))]
    if not known:
        return False
    unit = unit_for([min(value for _, value in known)], SECONDS)
    heading(axes, f"{title}, {unit.name}")
    _cost_line(
        axes,
        report,
        [(row, value / unit.factor) for row, value in known],
        lambda value: quantity(value * unit.factor, SECONDS),
    )
    return True


def _cost_line(
    axes: Axes,
    report: TuningReport,
    known: Sequence[tuple[EffectiveRow, float]],
    said: Callable[[float], str],
) -> None:
    shown = rungs(report)
    plain_grid(axes)
    _effective_axis(axes, shown)
    xs = [row.effective_batch_size for row, _ in known]
    ys = [value for _, value in known]
    value_axis(axes, max(ys), room=0.2)
    axes.plot(xs, ys, color=BLUE, linewidth=2.2, zorder=3)
    axes.plot(xs, ys, "o", color=BLUE, ms=7, zorder=4, clip_on=False)
    labels = Labels(axes)
    labels.avoid(xs, ys)
    for x, y in zip(xs, ys, strict=True):
        labels.avoid(*blob(axes, x, y))
    chosen = chosen_rung(report, shown)
    value = next((value for row, value in known if row == chosen), None)
    if value is not None:
        ring(axes, chosen.effective_batch_size, value)
        labels.put(
            f"{said(value)} at {count(chosen.effective_batch_size)}",
            [(chosen.effective_batch_size, value)],
            distances=NEAR[1:],
            needed=True,
            color=ACCENT,
            fontweight="bold",
        )
    _accumulation(axes, labels, shown)
