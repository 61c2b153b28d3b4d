"""Figure panels of inference: latency and throughput."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch._report.figure.style import (
    BLUE,
    INK,
    LINE,
    SHADE,
    between,
    count,
    heading,
    log_axis,
    ring,
    short,
    size_axis,
    value_axis,
)
from autobatch._report.text import page
from autobatch._report.units import SECONDS, duration, unit_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autobatch._report import TuningReport


def latency_panel(axes: Axes, report: TuningReport) -> None:
    """Draw measured seconds of one call over the batch size, from the median to the percentile."""
    rows = sorted(report.latencies, key=lambda row: row.batch_size)
    limit = report.settings.limit_on_latency
    unit = unit_for([min(row.p50_seconds for row in rows)], SECONDS)
    xs = [row.batch_size for row in rows]
    medians = [row.p50_seconds / unit.factor for row in rows]
    slow = [max(row.at_percentile_seconds, row.p50_seconds) / unit.factor for row in rows]
    percentile = f"p{report.settings.percentile:g}"
    size_axis(axes, xs)
    log_axis(axes, [*medians, *slow, *([limit.seconds / unit.factor] if limit else [])])
    chosen = ""
    for row in rows:
        if row.batch_size == report.plan.micro_batch_size:
            seconds = row.at_percentile_seconds
            chosen = f"{count(row.batch_size)}: {percentile} {duration(seconds)}"
            ring(axes, row.batch_size, seconds / unit.factor, chosen)
    axes.fill_between(xs, medians, slow, color=BLUE, alpha=0.16, linewidth=0)
    axes.plot(xs, slow, color=BLUE, linewidth=1.4)
    axes.plot(xs, medians, "o-", color=BLUE, linewidth=2.6, ms=7)
    if limit is not None:
        top = axes.get_ylim()[1]
        axes.axhspan(limit.seconds / unit.factor, top, color=SHADE, linewidth=0, zorder=0)
        label = f"limit {duration(limit.seconds)}"
        axes.axhline(limit.seconds / unit.factor, color=INK, label=label)
    axes.set_xlabel("batch size")
    heading(axes, f"Latency of one batch, {unit.name} (band: median to {percentile})", chosen)


def throughput_panel(axes: Axes, report: TuningReport) -> None:
    """Draw samples per second of the median call over the batch size."""
    rows = sorted(report.latencies, key=lambda row: row.batch_size)
    limit = report.settings.limit_on_latency
    speeds = {row.batch_size: row.samples_per_second for row in rows}
    late = [row.batch_size for row in rows if limit and row.at_percentile_seconds > limit.seconds]
    size_axis(axes, list(speeds))
    value_axis(axes, max(speeds.values()))
    axes.plot(list(speeds), list(speeds.values()), "o-", color=BLUE, linewidth=2.6, ms=7)
    chosen, size, first = "", report.plan.micro_batch_size, rows[0]
    if size in speeds:
        chosen = f"{short(speeds[size])}/s at {count(size)}"
        if first.batch_size < size and first.samples_per_second:
            ratio = speeds[size] / first.samples_per_second
            chosen += f", {ratio:.2g}× batch {count(first.batch_size)}"
        ring(axes, size, speeds[size], chosen)
    if late:
        ys = [speeds[size] for size in late]
        axes.plot(late, ys, "o", ms=7, mfc="white", mec=LINE, mew=2, label="over the limit")
    axes.set_xlabel("batch size")
    heading(axes, "Throughput, samples per second", chosen)


def measured_by(report: TuningReport) -> str:
    """Return sentences on how latencies were measured."""
    calls = between([row.calls for row in report.latencies])
    scope = next((f", {fact.comment}" for fact in page(report).facts if fact.label == "Calls"), "")
    return (
        f"{calls} timed calls of each size{scope}; left out are the first of each round, the "
        "first two of quick calls, and calls that restart the workload. Throughput: by the median "
        "call. Waiting for a batch to fill is not included."
    )
