"""Figure panels of training: throughput, peak memory, and cost of the effective batch size."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from autobatch._report.figure.style import (
    ACCENT,
    BAR,
    BLUE,
    GREEN,
    GREEN_INK,
    GREY,
    INK,
    LEAST_OCTAVES,
    LINE,
    NEAR,
    SHADE,
    TICKS,
    Labels,
    blob,
    count,
    factor,
    heading,
    plain_grid,
    ring,
    short,
    size_axis,
    value_axis,
)
from autobatch._report.tradeoff import is_of
from autobatch._report.units import BYTES, SECONDS, percent, quantity, unit_for
from autobatch._throughput import latest_by_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from autobatch._report import TuningReport
    from autobatch._report.tradeoff import EffectiveRow
    from autobatch._throughput import SpeedRow

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
        row.step_seconds - (pace.micro(row.batch_size) or row.step_seconds) for row in report.sizes
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
    tried = {t.batch_size: t.peak for t in latest_by_size(report.trials) if t.fits}
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


def _best_said(axes: Axes, labels: Labels, chosen: EffectiveRow, best: EffectiveRow) -> None:
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
    own_side = [(x, y, z) for x, y, z in seen if side * (y - z) >= -_COINCIDE * top] or seen
    far = sorted(own_side, key=lambda place: -abs(min(place[2], top) - place[1]))
    return [(x, y) for x, y, _ in far]


def cost_panel(axes: Axes, report: TuningReport) -> bool:
    """What an epoch, or else an update, takes over the effective batch; False where neither is known: derived."""
    rows = rungs(report)
    if len(rows) == 1:  # nothing to compare
        return False
    if _seconds_line(axes, report, "Training steps of an epoch", lambda row: row.epoch_seconds):
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


def rung_table(report: TuningReport) -> list[tuple[str, list[str]]]:
    """What stands below the axis of effective batches: a label and a cell for each."""
    rows = rungs(report)
    table = [
        ("accumulate", [f"×{count(row.accumulate_grad_batches)}" for row in rows]),
        (
            "updates/epoch",
            ["" if row.updates_per_epoch is None else count(row.updates_per_epoch) for row in rows],
        ),
        (
            f"LR vs {count(chosen_rung(report, rows).effective_batch_size)}",
            [
                "" if row.learning_rate_factor is None else factor(row.learning_rate_factor)
                for row in rows
            ],
        ),
    ]
    return [(label, cells) for label, cells in table if any(cells)]


def write_table(axes: Axes, report: TuningReport) -> None:
    """The table below the axis of effective batches, a column at each; the chosen in bold."""
    rows = rungs(report)
    chosen = rows.index(chosen_rung(report, rows))
    place = axes.get_xaxis_transform()
    lines = [
        ("samples/update", [count(row.effective_batch_size) for row in rows]),
        *rung_table(report),
    ]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda *_: ""))
    columns = _with_room(
        axes,
        [row.effective_batch_size for row in rows],
        [cells for _, cells in lines],
        chosen,
    )
    for line, (label, cells) in enumerate(lines):
        down = -16 - 18 * line
        axes.annotate(
            label,
            (0, 0),
            (-10, down),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="center",
            color=GREY,
            fontsize=9.5,
        )
        for column, cell in enumerate(cells):
            if column not in columns:
                continue
            axes.annotate(
                cell,
                (rows[column].effective_batch_size, 0),
                (0, down),
                xycoords=place,
                textcoords="offset points",
                ha="center",
                va="center",
                color=ACCENT if column == chosen else GREY,
                fontweight="bold" if column == chosen else "normal",
                fontsize=10.5 if line == 0 else 9.5,
            )


def _with_room(
    axes: Axes, xs: Sequence[float], lines: Sequence[Sequence[str]], chosen: int
) -> set[int]:
    """The columns that stand clear of each other, the chosen among them."""
    widths = [7.2 * max(len(line[i]) for line in lines) + 5 for i in range(len(xs))]
    dots = axes.figure.dpi / 72
    middles = axes.transData.transform([(x, 0.0) for x in xs])[:, 0] / dots
    kept: set[int] = set()
    for i in (chosen, *range(len(xs))):
        if all(abs(middles[i] - middles[j]) >= (widths[i] + widths[j]) / 2 for j in kept):
            kept.add(i)
    return kept
