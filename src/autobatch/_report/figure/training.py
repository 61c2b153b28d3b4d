"""Figure panels of training: throughput, peak memory, and cost of the effective batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from autobatch._memory import format_bytes
from autobatch._report.figure.style import (
    ACCENT,
    BAR,
    BLUE,
    GREEN,
    GREY,
    INK,
    SHADE,
    between,
    count,
    cut,
    drawable,
    heading,
    ring,
    short,
    size_axis,
    value_axis,
)
from autobatch._report.tables import spread
from autobatch._report.text import trust
from autobatch._report.tradeoff import NoiseRange, is_of
from autobatch._report.units import BYTES, SECONDS, counted, factor, multiple, percent, unit_for
from autobatch._throughput import row_of
from autobatch._trials import latest_by_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from autobatch._report import TuningReport
    from autobatch._report.tradeoff import EffectiveRow

_BUDGET_IN_SIGHT: Final = 4  # times the highest bar; a budget above is named, not drawn
_ROW_HEIGHT: Final = 0.075  # of the axes
_FAR: Final = 4  # times its neighbor; beyond, a size is not shown
_TOP: Final = 2.5  # times the chosen; longer times leave the panel
_WORTH_CHANGING: Final = 0.97  # times the chosen; a longer time is about the same


def speed_panel(axes: Axes, report: TuningReport) -> None:
    """Draw measured samples per second over the micro-batch, with bars from 10 to 90 %."""
    rows = report.sizes
    xs = [row.batch_size for row in rows]
    ys = np.array([row.samples_per_second for row in rows])
    lows = [row.samples_per_second_low or row.samples_per_second for row in rows]
    highs = [row.samples_per_second_high or row.samples_per_second for row in rows]
    chosen, size = "", report.plan.micro_batch_size
    if row := row_of(rows, size):
        chosen = f"{short(row.samples_per_second)}/s at {count(size)}"
        if row.of_fastest < 1:
            chosen += f", {percent(row.of_fastest)} of the fastest"
        elif len(rows) > 1:
            chosen += ", the fastest"
        ring(axes, size, row.samples_per_second, chosen)
    axes.plot(xs, ys, color=BLUE, alpha=0.4, linewidth=2.2)
    spread = np.abs([ys - lows, ys - highs])
    axes.errorbar(xs, ys, yerr=spread, fmt="o", color=BLUE, elinewidth=2, ms=7)
    _micro_batch_axis(axes, report)
    value_axis(axes, max(highs))
    heading(axes, "Speed: samples per second", chosen)


def memory_panel(axes: Axes, report: TuningReport) -> None:
    """Draw the measured peak memory over the micro-batch, and the budget."""
    held = peaks(report)
    highest = max([*held.values(), 1])
    in_sight = report.budget <= _BUDGET_IN_SIGHT * highest
    top = max(highest, report.budget) if in_sight else highest
    unit = unit_for([top], BYTES)
    _micro_batch_axis(axes, report)
    value_axis(axes, top / unit.factor)
    chosen, size = "", report.plan.micro_batch_size
    if size in held:
        chosen = f"{format_bytes(held[size])} at {count(size)}"
    colors = [ACCENT if each == size else BAR for each in held]
    labels = [chosen if each == size else "" for each in held]
    heights = [peak / unit.factor for peak in held.values()]
    axes.bar(list(held), heights, _bar_widths(axes, list(held)), color=colors, label=labels)
    usable = f"{format_bytes(report.budget)} usable{'' if in_sight else ', above this panel'}"
    axes.axhline(report.budget / unit.factor, color=INK, label=usable)
    heading(axes, f"Peak memory, {unit.name}", chosen)


def _bar_widths(axes: Axes, sizes: Sequence[int]) -> list[float]:
    """Return widths that look equal on a logarithmic axis, as wide as the closest sizes allow."""
    octaves = np.diff(np.log2(axes.get_xlim()))[0]
    closest = np.diff(np.log2(sizes)).min(initial=octaves)
    width = np.clip(0.7 * closest, 0.006 * octaves, 0.03 * octaves)
    return [size * (2**width - 1) for size in sizes]


def peaks(report: TuningReport) -> dict[int, int]:
    """Return the peak in bytes of every micro-batch that fits, if it was read."""
    timed = {row.batch_size: row.peak for row in report.sizes}
    tried = {size: t.peak for size, t in latest_by_size(report.trials).items() if t.fits}
    return {size: peak for size, peak in sorted((timed | tried).items()) if peak is not None}


def _micro_batch_axis(axes: Axes, report: TuningReport) -> None:
    """Set the x-axis of speed and memory, and shade the sizes that do not fit."""
    sizes = {row.batch_size for row in report.sizes} | set(peaks(report))
    size_axis(axes, sorted(sizes), report.smallest_failing)
    axes.set_xlabel("micro-batch" if report.task == "train" else "batch size")
    if report.smallest_failing is not None:
        end = axes.get_xlim()[1]
        label = "does not fit"
        axes.axvspan(report.smallest_failing, end, color=SHADE, linewidth=0, zorder=0, label=label)


def is_compared(report: TuningReport) -> bool:
    """Return True if the time to the same loss was estimated."""
    return any(row.relative_time is not None for row in report.effective)


def compared_panel(axes: Axes, report: TuningReport) -> None:
    """Draw the estimated time and samples to the same loss, relative to the plan."""
    shown, at = _shown_rows(report), _place_of_plan(report)
    places = {x: row for x, row in enumerate(shown) if row.relative_time is not None}
    xs, rows = list(places), list(places.values())
    times, lows, highs, samples = (
        [getattr(row, name) for row in rows]
        for name in ("relative_time", "relative_time_low", "relative_time_high", "relative_samples")
    )
    best = times.index(min(times))
    size = count(shown[at].effective_batch_size)
    is_worth_changing = times[best] < _WORTH_CHANGING
    chosen = f"{size} chosen" if is_worth_changing else f"{size} chosen: about the shortest time"
    ring(axes, at, 1.0, chosen)
    if is_worth_changing:
        row = rows[best]
        shorter = f"{multiple(times[best])} the time ({spread(row)})"
        label = f"{count(row.effective_batch_size)} per update: {shorter}"
        axes.plot(xs[best], times[best], "o", color=GREEN, ms=10, zorder=5, label=label)
    _near_shortest(axes, report)
    axes.fill_between(xs, lows, highs, color=BLUE, alpha=0.14, linewidth=0)
    axes.plot(xs, times, "o-", color=BLUE, linewidth=3, ms=5, label="time to the same loss")
    axes.plot(xs, samples, "--", color=INK, linewidth=1.3, label="samples needed")
    _effective_axis(axes, report)
    value_axis(axes, 1)
    axes.set_ylim(0, min(_TOP, max(1.25, 1.12 * max(times))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    heading(axes, f"Cost of the effective batch, relative to {size}", chosen, columns=2)


def _near_shortest(axes: Axes, report: TuningReport) -> None:
    """Shade the effective batch sizes of about the shortest time."""
    optimum, rows = report.optimum, _shown_rows(report)
    if optimum is None or len(rows) == 1:
        return
    low, high = optimum.near_low, optimum.near_high
    near = [x for x, row in enumerate(rows) if low <= row.effective_batch_size <= high]
    if near:
        label = "within 10 % of the shortest time"
        start, end = near[0] - 0.5, near[-1] + 0.5
        axes.axvspan(start, end, color=GREEN, alpha=0.1, linewidth=0, zorder=0, label=label)


def _shown_rows(report: TuningReport) -> tuple[EffectiveRow, ...]:
    """Return the effective batch sizes to show, without a last one far above the others."""
    *others, last = report.effective
    size, effective = last.effective_batch_size, report.plan.effective_batch_size
    is_far = others and size > max(effective, _FAR * others[-1].effective_batch_size)
    return tuple(others) if is_far else report.effective


def _place_of_plan(report: TuningReport) -> int:
    """Return the index of the plan among the rows to show."""
    return next((x for x, row in enumerate(_shown_rows(report)) if is_of(row, report.plan)), 0)


def _effective_axis(axes: Axes, report: TuningReport) -> None:
    """Set an x-axis with one place for each effective batch size: columns of the table below."""
    sizes = [count(row.effective_batch_size) for row in _shown_rows(report)]
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlabel("samples per update")


def has_costs(report: TuningReport) -> bool:
    """Return True if there are effective batch sizes to compare in time or in updates."""
    if is_compared(report):
        return True
    return len(report.effective) > 1 and any(_measured_costs(report)[1])


def cost_panel_and_table(axes: Axes, report: TuningReport) -> None:
    """Draw the estimated cost of each effective batch, else the measured one, and the table."""
    if is_compared(report):
        compared_panel(axes, report)
    else:
        _measured_costs_panel(axes, report)
    _effective_table(axes, report)


def _measured_costs_panel(axes: Axes, report: TuningReport) -> None:
    title, costs = _measured_costs(report)
    xs = [x for x, cost in enumerate(costs) if cost]
    ys = [cost for cost in costs if cost]
    axes.plot(xs, ys, "o-", color=BLUE, linewidth=2.2, ms=7)
    chosen, at = "", _place_of_plan(report)
    if cost := costs[at]:
        text = count(cost) if isinstance(cost, int) else short(cost)
        chosen = f"{text} at {count(_shown_rows(report)[at].effective_batch_size)}"
        ring(axes, at, cost, chosen)
    _effective_axis(axes, report)
    value_axis(axes, max(ys))
    heading(axes, title, chosen)


def _measured_costs(report: TuningReport) -> tuple[str, list[float | None]]:
    """Return a title, and seconds per epoch, else seconds per update, else updates per epoch."""
    rows = _shown_rows(report)
    for title, seconds in (
        ("Training steps of an epoch", [row.epoch_seconds for row in rows]),
        ("One update", [row.update_seconds for row in rows]),
    ):
        if known := [value for value in seconds if value]:
            unit = unit_for([min(known)], SECONDS)
            return f"{title}, {unit.name}", [value and value / unit.factor for value in seconds]
    return "Updates per epoch", [row.updates_per_epoch for row in rows]


def _effective_table(axes: Axes, report: TuningReport) -> None:
    """Draw a table below the x-axis, with a column for each effective batch size."""
    rows, at = _shown_rows(report), _place_of_plan(report)
    lines = {
        "samples/update": [count(row.effective_batch_size) for row in rows],
        "accumulate": [f"×{count(row.accumulate_grad_batches)}" for row in rows],
    }
    if report.dataset_size is not None:
        lines["updates/epoch"] = [count(row.updates_per_epoch or 0) for row in rows]
    if report.learning_rate is not None:
        factors = [factor(row.learning_rate_factor) for row in rows]
        lines[f"LR vs {count(rows[at].effective_batch_size)}"] = factors
    axes.tick_params(labelbottom=False)
    axes.set_xlabel("")
    height = _ROW_HEIGHT * len(lines)
    table = axes.table(
        list(lines.values()), rowLabels=list(lines), cellLoc="center", rowLoc="right",
        bbox=Bbox.from_bounds(0, -height - 0.01, 1, height), edges="open",
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for (_, column), cell in table.get_celld().items():
        look = {"color": ACCENT, "weight": "bold"} if column == at else {"color": GREY}
        cell.set_text_props(**look)


def measured_by(report: TuningReport) -> str:
    """Return sentences on how the numbers were measured or estimated."""
    rule = report.learning_rate if report.effective else None
    of_rates = f"LR: by the {rule.rule} rule, usual for {cut(rule.optimizer)}." if rule else ""
    return " ".join(filter(None, (_speed_by(report), _loss_by(report), of_rates)))


def _speed_by(report: TuningReport) -> str:
    updates = [row.updates for row in report.sizes if row.updates is not None]
    if not report.sizes:
        return ""
    if not updates:
        steps = counted(report.settings.steps_per_trial, "optimizer step")
        return f"Speed: median step of a trial of {steps}."
    by_trial = [str(row.batch_size) for row in report.sizes if row.updates is None]
    but = f"; at {', '.join(by_trial)}, steps of a trial only" if by_trial else ""
    return f"Speed: median of {between(updates)} timed updates of each size, bars 10–90 %{but}."


def _loss_by(report: TuningReport) -> str:
    """Return the basis of the estimated times to the same loss, or the reason for their absence."""
    if report.task != "train":
        return ""
    noise, scale = report.noise, NoiseRange.of(report.noise)
    if noise and scale and is_compared(report):
        return (
            "Time to the same loss: estimated from a gradient noise scale of about "
            f"{short(scale.samples)} (updates {noise.first_update:,}–{noise.last_update:,}); band: "
            f"for one of {short(scale.low)}–{short(scale.high)}. Assumes that the learning rate is "
            "retuned. Estimates: they compare batch sizes, and do not predict how long a run takes."
        )
    reason = "No size was timed." if scale else trust(report)
    missing = "No gradient noise scale was measured."
    return f"Time to the same loss: not estimated. {drawable(reason or missing)}"
