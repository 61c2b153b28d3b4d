"""What the panels of a picture share: colours, axes of batch sizes, the mark of the choice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from autobatch._figure._labels import FONT, count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = [
    "ACCENT",
    "BAR",
    "BLUE",
    "GREEN",
    "GREEN_INK",
    "GREY",
    "INK",
    "LEAST_OCTAVES",
    "LINE",
    "NEAR",
    "SHADE",
    "STYLE",
    "TICKS",
    "blob",
    "heading",
    "plain_grid",
    "ring",
    "size_axis",
    "tick",
    "value_axis",
]

ACCENT: Final = "#D55E00"
BLUE: Final = "#0072B2"
GREEN: Final = "#009E73"
GREEN_INK: Final = "#00795A"  # for words: the same, dark enough to read
INK: Final = "#1a1d21"
GREY: Final = "#59626e"
LINE: Final = "#9aa3ad"
BAR: Final = "#b8c3ce"
RULE: Final = "#e3e6ea"
SHADE: Final = "#f0f1f3"
STYLE: Final[dict[str, Any]] = {
    "font.family": FONT,
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.edgecolor": "#c9ced4",
    "axes.labelcolor": GREY,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "autobatch",  # the same report gives the same file
}
LEAST_OCTAVES: Final = 1.0  # of an axis of batch sizes
NEAR: Final = (9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 65.0, 80.0)
TICKS: Final = 5
_STRIP: Final = 0.14  # of the axis, for what does not fit
_MARGIN: Final = 0.06  # of the axis, on both sides


def heading(axes: Axes, text: str) -> None:
    """The title of a panel, above its left edge."""
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", pad=9)


def plain_grid(axes: Axes) -> None:
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.tick_params(length=0)


def value_axis(axes: Axes, highest: float, *, room: float) -> None:
    """An axis from zero, with room above the highest value, as a share of it, for a label."""
    axes.set_ylim(0, (highest or 1.0) * (1 + room))
    axes.yaxis.set_major_locator(MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A round number as it is, "0.25", "1,500", "20k"."""
    return (
        f"{value:,.10g}" if abs(value) < 10_000 else f"{_thousands(value)}"  # noqa: PLR2004 -- five digits
    )


def _thousands(value: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"


def size_axis(
    axes: Axes, sizes: Sequence[int], chosen: int, beyond: int | None
) -> None:
    """A logarithmic axis of batch sizes, with room at its end for what does not fit."""
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    end = high if beyond is None else max(high, math.log2(beyond))
    if end - low < LEAST_OCTAVES and len(sizes) == 1:
        low, end = low - LEAST_OCTAVES / 2, max(end, high + LEAST_OCTAVES / 2)
    span = end - low
    after = _MARGIN if beyond is None else _STRIP
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - _MARGIN * span), 2 ** (end + after * span))
    ticks = _ticks(axes, sizes, chosen)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _ticks(axes: Axes, sizes: Sequence[int], chosen: int) -> list[float]:
    """Powers of two where there are a few, else sizes; as many as have room."""
    low, high = axes.get_xlim()
    powers = [2**n for n in range(64) if low <= 2**n <= high]
    few = 3
    wishes = powers if len(powers) >= few else [chosen, *sizes]
    width = axes.bbox.width / axes.figure.dpi * 72  # points
    room = 9 * max(len(count(value)) for value in wishes) + 8
    if wishes is powers:
        octaves = math.log2(high / low)
        step = max(1, math.ceil(room / (width / octaves)))
        first = powers.index(chosen) % step if chosen in powers else 0
        return [float(value) for value in powers[first::step]]
    kept: list[int] = []
    for size in wishes:
        place = [abs(math.log2(size / other)) / math.log2(high / low) for other in kept]
        if low <= size <= high and all(width * away >= room for away in place):
            kept.append(size)
    return sorted(map(float, kept))


def ring(axes: Axes, x: float, y: float) -> None:
    """The mark of the choice."""
    axes.plot(
        x, y, "o", ms=14, mfc="white", mec=ACCENT, mew=2.6, zorder=5, clip_on=False
    )
    axes.plot(x, y, "o", ms=6.5, color=ACCENT, zorder=6, clip_on=False)


def blob(axes: Axes, x: float, y: float) -> tuple[list[float], list[float]]:
    """What a round mark covers, as points in data coordinates."""
    at = axes.transData.transform((x, y))
    radius = 5 * axes.figure.dpi / 72
    corners = [
        (at[0] + i * radius, at[1] + j * radius) for i in (-1, 1) for j in (-1, 1)
    ]
    back = axes.transData.inverted().transform(corners)
    return list(back[:, 0]), list(back[:, 1])
