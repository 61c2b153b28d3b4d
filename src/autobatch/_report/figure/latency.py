"""Figure panels of inference: latency and throughput."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from autobatch._report.figure.style import (
    ACCENT,
    BLUE,
    GREY,
    INK,
    LINE,
    NEAR,
    SHADE,
    Labels,
    blob,
    count,
    heading,
    plain_grid,
    ring,
    short,
    size_axis,
    tick,
    value_axis,
)
from autobatch._report.units import SECONDS, quantity, unit_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autobatch._report import TuningReport


def _in_time(report: TuningReport) -> set[int]:
    """The sizes that answer within the limit; all where there is none."""
    limit = report.settings.limit_on_latency
    return {
        row.batch_size
        for row in report.latencies
        if limit is None or row.at_percentile_seconds <= limit.seconds
    }


def latency_panel(axes: Axes, report: TuningReport) -> None:
    """What one call takes over the batch size, from the median up: measured."""
    rows = sorted(report.latencies, key=lambda row: row.batch_size)
    chosen, limit = report.plan.micro_batch_size, report.settings.limit_on_latency
    xs = [row.batch_size for row in rows]
    slowest = [max(row.at_percentile_seconds, row.p50_seconds) for row in rows]
    unit = unit_for([min(row.p50_seconds for row in rows)], SECONDS)
    middle = [row.p50_seconds / unit.factor for row in rows]
    late = [value / unit.factor for value in slowest]
    name = f"p{report.settings.percentile:g}"
    heading(axes, f"Latency of one batch, {unit.name} (band: median to {name})")
    plain_grid(axes)
    size_axis(axes, xs, chosen, None)
    allowed = [] if limit is None else [limit.seconds / unit.factor]
    positive = [v for v in (*middle, *late, *allowed) if v > 0] or [1.0]
    axes.set_yscale("log")
    axes.set_ylim(min(positive) / 1.5, max(positive) * 1.8)
    _round_ticks(axes)
    labels = Labels(axes)
    axes.fill_between(xs, middle, late, color=BLUE, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(xs, late, color=BLUE, linewidth=1.4, zorder=3)
    axes.plot(xs, middle, color=BLUE, linewidth=2.6, zorder=3)
    axes.plot(xs, middle, "o", color=BLUE, ms=7, zorder=4)
    labels.avoid(xs, middle)
    labels.avoid(xs, late)
    here = next((row for row in rows if row.batch_size == chosen), None)
    if allowed:
        top = axes.get_ylim()[1]
        axes.axhspan(allowed[0], top, color=SHADE, linewidth=0, zorder=0)
        axes.axhline(allowed[0], color=INK, linewidth=1.6, zorder=2)
        labels.avoid(axes.get_xlim(), (allowed[0], allowed[0]))
    if here is not None:
        y = here.at_percentile_seconds / unit.factor
        ring(axes, chosen, y)
        labels.avoid(*blob(axes, chosen, y))
        labels.put(
            f"{count(chosen)}: {name} {quantity(here.at_percentile_seconds, SECONDS)}",
            [(chosen, y)],
            distances=NEAR[1:],
            needed=True,
            color=ACCENT,
            fontweight="bold",
        )
    if limit is not None:
        low, high = axes.get_xlim()
        labels.put(
            f"limit {quantity(limit.seconds, SECONDS)}",
            [(low * (high / low) ** share, allowed[0]) for share in (0.01, 0.3, 0.6)],
            distances=(5.0,),
            ways=("right above", "right below"),
            color=INK,
            fontsize=9.5,
        )
    axes.set_xlabel("batch size", labelpad=5)


def _round_ticks(axes: Axes) -> None:
    """1, 2, 5, 10 …, or only powers of ten where these would be many."""
    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    several = 8
    for firsts in ((1, 2, 5), (1,)):
        ticks = [first * 10.0**n for n in powers for first in firsts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= several:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def throughput_panel(axes: Axes, report: TuningReport) -> None:
    """Samples per second over the batch size, by the median call: measured."""
    rows = sorted(report.latencies, key=lambda row: row.batch_size)
    chosen = report.plan.micro_batch_size
    xs = [row.batch_size for row in rows]
    ys = [row.samples_per_second for row in rows]
    heading(axes, "Throughput, samples per second")
    plain_grid(axes)
    size_axis(axes, xs, chosen, None)
    value_axis(axes, max(ys), room=0.2)
    axes.plot(xs, ys, color=BLUE, linewidth=2.6, zorder=3)
    in_time = _in_time(report)
    labels = Labels(axes)
    labels.avoid(xs, ys)
    for x, y in zip(xs, ys, strict=True):
        kept = x in in_time
        axes.plot(
            x,
            y,
            "o",
            ms=7,
            color=BLUE if kept else "white",
            mec=BLUE if kept else LINE,
            mew=1 if kept else 2,
            zorder=4,
        )
        labels.avoid(*blob(axes, x, y))
    if chosen in xs:
        y = ys[xs.index(chosen)]
        ring(axes, chosen, y)
        beside = ""
        if xs[0] < chosen and ys[0]:
            beside = f",\n{y / ys[0]:.2g}× batch {count(xs[0])}"
        labels.put(
            f"{short(y)}/s at {count(chosen)}{beside}",
            [(chosen, y)],
            distances=NEAR[1:],
            needed=True,
            color=ACCENT,
            fontweight="bold",
        )
    over = [(x, y) for x, y in zip(xs, ys, strict=True) if x not in in_time]
    if over:
        labels.put(
            "over the limit",
            over,
            distances=NEAR,
            color=GREY,
            fontsize=9.5,
        )
    axes.set_xlabel("batch size", labelpad=5)
