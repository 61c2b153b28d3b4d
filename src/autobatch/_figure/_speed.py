"""Speed and memory over the micro-batch."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Final

from autobatch._figure._axes import (
    ACCENT,
    BAR,
    BLUE,
    GREY,
    INK,
    LINE,
    NEAR,
    SHADE,
    blob,
    heading,
    plain_grid,
    ring,
    size_axis,
    value_axis,
)
from autobatch._figure._labels import Labels, count, short
from autobatch._numbers import BYTES, percent, unit_for
from autobatch._throughput import settled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from autobatch._report import TuningReport
    from autobatch._throughput import SpeedRow

__all__ = ["memory_panel", "peaks", "speed_panel"]

_UNDER: Final = ("below", "right below", "left below", "left", "right")
_OVER: Final = ("above", "left above", "right above", *_UNDER)
_BUDGET_IN_SIGHT: Final = 4.0  # times the highest bar


def speed_panel(axes: Axes, report: TuningReport) -> None:
    """Samples per second over the micro-batch: measured."""
    rows, chosen = report.sizes, report.plan.micro_batch_size
    xs = [row.batch_size for row in rows]
    ys = [row.samples_per_second for row in rows]
    heading(axes, "Speed: samples per second")
    plain_grid(axes)
    value_axis(
        axes,
        max([*ys, *(row.samples_per_second_high or 0.0 for row in rows)]),
        room=0.27,
    )
    size_axis(axes, _all_sizes(report), chosen, report.smallest_failing)
    labels = Labels(axes)
    labels.avoid(xs, ys)
    _guide(axes, report)
    for row in rows:
        _spread(axes, row, labels)
    axes.plot(xs, ys, "o", color=BLUE, ms=7, zorder=4, clip_on=False)
    for x, y in zip(xs, ys, strict=True):
        labels.avoid(*blob(axes, x, y))
    here = next((row for row in rows if row.batch_size == chosen), None)
    top = max(ys)
    axes.axhline(top, color=LINE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    labels.avoid(axes.get_xlim(), (top, top))
    if here is not None:
        ring(axes, here.batch_size, here.samples_per_second)
        labels.put(
            _speed_said(here, rows),
            [(here.batch_size, here.samples_per_second)],
            distances=NEAR,
            ways=_OVER if here.samples_per_second == top else _UNDER,
            needed=True,
            color=ACCENT,
            fontweight="bold",
        )
    if here is None or here.samples_per_second < top:
        low, high = axes.get_xlim()
        starts = [low * (high / low) ** share for share in (0.01, 0.2, 0.4, 0.6)]
        labels.put(
            f"fastest measured {short(top)}",
            [(start, top) for start in starts],
            distances=(4.0, 9.0, 14.0, 20.0, 28.0),
            ways=("right above", "right below"),
            color=GREY,
            fontsize=9.5,
        )
    _no_fit(axes, report, labels)


def _all_sizes(report: TuningReport) -> list[int]:
    """What the axis of micro-batches has to hold."""
    told = {row.batch_size for row in report.sizes} | set(peaks(report))
    return sorted(told)


def _guide(axes: Axes, report: TuningReport) -> None:
    """The line of a fit where there is a good one, else from point to point."""
    rows, fit, ranks = report.sizes, report.fit, report.plan.world_size
    xs = [float(row.batch_size) for row in rows]
    ys = [row.samples_per_second for row in rows]
    if fit is not None:
        steps = 100
        ratio = (xs[-1] / xs[0]) ** (1 / steps)
        xs = [xs[0] * ratio**i for i in range(steps + 1)]
        share = _optimizer_share(report)
        ys = [x * ranks / (fit.seconds(x) + share) for x in xs]
    axes.plot(xs, ys, color=BLUE, alpha=0.4, linewidth=2.2, zorder=2)


def _optimizer_share(report: TuningReport) -> float:
    """Seconds of the optimizer in the step of a micro-batch, which a fit is without."""
    pace = report.pace
    return median(
        row.step_seconds - (pace.micro(row.batch_size) or row.step_seconds)
        for row in report.sizes
    )


def _spread(axes: Axes, row: SpeedRow, labels: Labels) -> None:
    low, high = row.samples_per_second_low, row.samples_per_second_high
    if low is not None and high is not None:
        axes.plot(
            [row.batch_size] * 2,
            [low, high],
            color=BLUE,
            alpha=0.55,
            linewidth=2,
            zorder=3,
        )
        labels.avoid([row.batch_size] * 2, [low, high])


def _speed_said(row: SpeedRow, rows: Sequence[SpeedRow]) -> str:
    said = f"{short(row.samples_per_second)}/s at {count(row.batch_size)}"
    if len(rows) == 1:
        return said
    share = "the fastest" if row.of_fastest == 1 else _share_said(row.of_fastest)
    return f"{said}\n{share}"


def _share_said(share: float) -> str:
    return f"{percent(share)} of the fastest"


def peaks(report: TuningReport) -> dict[int, int]:
    """The peak of every micro-batch that fits, in bytes, where it was read."""
    tried = {t.batch_size: t.peak for t in settled(report.trials) if t.fits}
    timed = {row.batch_size: row.peak for row in report.sizes}
    return {size: peak for size, peak in (timed | tried).items() if peak is not None}


def memory_panel(axes: Axes, report: TuningReport) -> None:
    """Peak memory over the micro-batch, below the budget: measured."""
    held, chosen = peaks(report), report.plan.micro_batch_size
    highest = max(held.values())
    in_sight = report.budget <= _BUDGET_IN_SIGHT * max(highest, 1)
    top = max(highest, report.budget) if in_sight else highest
    unit = unit_for([max(top, 1)], BYTES)
    heading(axes, f"Peak memory, {unit.name}")
    plain_grid(axes)
    size_axis(axes, _all_sizes(report), chosen, report.smallest_failing)
    value_axis(axes, top / unit.factor, room=0.3 if in_sight else 0.45)
    _bars(axes, {size: peak / unit.factor for size, peak in held.items()}, chosen)
    labels = Labels(axes)
    bars = sorted(held.items())
    for size, peak in bars:
        labels.avoid([size, size], [0, peak / unit.factor])
    usable = f"{_one_decimal(report.budget / unit.factor)} {unit.name} usable"
    edge = axes.get_ylim()[1]
    if in_sight:
        budget = report.budget / unit.factor
        axes.axhline(budget, color=INK, linewidth=1.6, zorder=3)
        labels.avoid(axes.get_xlim(), (budget, budget))
    else:
        budget, usable = edge, f"{usable}, above this panel ↑"
    if chosen in held:
        labels.put(
            _one_decimal(held[chosen] / unit.factor),
            [(chosen, held[chosen] / unit.factor)],
            distances=(4.0, 9.0, 14.0, 19.0, 24.0),
            ways=("above",),
            needed=True,
            color=ACCENT,
            fontweight="bold",
        )
    low, high = axes.get_xlim()
    labels.put(
        usable,
        [(low * (high / low) ** share, budget) for share in (0.01, 0.2, 0.4, 0.6)],
        distances=(4.0,),
        ways=("right above", "right below") if in_sight else ("right below",),
        needed=True,
        color=INK,
        fontsize=9.5,
    )
    _no_fit(axes, report, None)
    axes.set_xlabel("micro-batch", labelpad=5)


def _one_decimal(value: float) -> str:
    """As the text of a report has it."""
    return short(round(value, 1)) if value >= 1 else short(value)


def _bars(axes: Axes, heights: dict[int, float], chosen: int) -> None:
    """Bars of equal width on a logarithmic axis, as wide as the closest of them allow."""
    low, high = map(math.log2, axes.get_xlim())
    sizes = sorted(heights)
    gaps = [math.log2(b / a) for a, b in pairwise(sizes)]
    width = min([0.7 * gap for gap in gaps] + [0.025 * (high - low)])
    width = max(width, 0.006 * (high - low))
    for size in sizes:
        left = size * 2 ** (-width / 2)
        axes.bar(
            left,
            heights[size],
            width=size * 2 ** (width / 2) - left,
            align="edge",
            color=ACCENT if size == chosen else BAR,
            zorder=2.5 if size == chosen else 2,
        )


def _no_fit(axes: Axes, report: TuningReport, labels: Labels | None) -> None:
    """The part of the axis that memory refused."""
    start = report.smallest_failing
    if start is None:
        return
    _, high = axes.get_xlim()
    axes.axvspan(start, high, color=SHADE, linewidth=0, zorder=0)
    if labels is not None:
        middle = math.sqrt(start * high)
        bottom, top = axes.get_ylim()
        heights = [bottom + (top - bottom) * share for share in (0.12, 0.3, 0.5, 0.7)]
        labels.put(
            "does\nnot\nfit",
            [(middle, height) for height in heights],
            distances=(0.0,),
            ways=("above",),
            color=GREY,
            fontsize=9.5,
        )
