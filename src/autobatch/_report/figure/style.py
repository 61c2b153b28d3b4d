"""Colours, axes and labels of the figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from autobatch._report.units import aligned, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

FONT: Final = "DejaVu Sans"  # comes with matplotlib
_SUFFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPELLED_OUT: Final = 10_000
_COUNTED_OUT: Final = 100_000
_CLEAR: Final = 4.0  # pixels around a text that stay free
_APART: Final = 3.0  # pixels between the points that stand for a line
# Where a text may go, from its anchor: how it is aligned, and which way it moves
_WAYS: Final = {
    "above": ("center", "bottom", 0.0, 1.0),
    "below": ("center", "top", 0.0, -1.0),
    "right": ("left", "center", 1.0, 0.0),
    "left": ("right", "center", -1.0, 0.0),
    "right above": ("left", "bottom", 0.7, 0.7),
    "left above": ("right", "bottom", -0.7, 0.7),
    "right below": ("left", "top", 0.7, -0.7),
    "left below": ("right", "top", -0.7, -0.7),
}
_ALIGNED: Final = {
    "left": 0.0, "center": -0.5, "right": -1.0, "bottom": 0.0, "top": -1.0
}  # fmt: skip
_OUTSIDE: Final = 1e6  # what it costs a text to leave its axes
_ON_A_TEXT: Final = 1e4  # to cover another
_ON_A_MARK: Final = 20.0  # to cover one point of a line
_TOO_BAD: Final = 5 * _ON_A_MARK


def short(value: float) -> str:
    """A measure for a small space, "7.6" or "1.28M": three digits."""
    if abs(value) < _SPELLED_OUT:
        text = aligned([value])[0]
        return text.rstrip("0").rstrip(".") if "." in text else text
    rounded = float(f"{value:.3g}")
    for scale, suffix in _SUFFIXES:
        if scale <= abs(rounded) < 1000 * scale:
            return f"{rounded / scale:.3g}{suffix}"
    return f"{value:.2g}"


def count(value: float) -> str:
    """A whole number for a small space: exact up to five digits, "5,005"."""
    return f"{value:,.0f}" if abs(value) < _COUNTED_OUT else short(value)


def factor(value: float) -> str:
    """A multiple, "×0.35": two digits, or all before the point."""
    return f"×{short(value)}" if value >= 10 else f"×{value:.2g}"  # noqa: PLR2004 -- two digits


def drawn(text: str) -> str:
    """One line of what the font has; it warns of anything else, and draws a box."""
    return "".join(c if ord(c) in _characters() else "?" for c in plain(text))


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


@dataclass(frozen=True, slots=True)
class Labels:
    """The texts inside of one Axes; its limits have to be set before.

    Args:
        axes: Where they stand.
    """

    axes: Axes
    _texts: list[Bbox] = field(default_factory=list)
    _marks: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def avoid(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Keep texts off a line, or off single points where there is only one."""
        points = self.axes.transData.transform(np.column_stack((xs, ys)).astype(float))
        along = [points[:1]]
        for start, end in pairwise(points):
            steps = int(min(1000, np.hypot(*(end - start)) / _APART)) + 1
            along.append(start + np.linspace(0, 1, steps + 1)[1:, None] * (end - start))
        self._marks.append(np.concatenate(along))

    def put(
        self,
        text: str,
        anchors: Iterable[tuple[float, float]],
        *,
        distances: Sequence[float],
        ways: Sequence[str] = tuple(_WAYS),
        needed: bool = False,
        **style: Any,
    ) -> Annotation | None:
        """Write a text at the best place around its anchors; none where it would cover another, unless it is needed.

        Args:
            text: What it says.
            anchors: What it is about, in data coordinates; any of them, the first ones rather.
            distances: How far from its anchor it may stand, in points; the first ones rather.
            ways: Which sides of an anchor it may stand on; the first ones rather.
            needed: Whether it is written even where there is no good place.
            style: What matplotlib's texts take.
        """
        anchors = list(anchors)
        label = self.axes.annotate(text, anchors[0], (0, 0), textcoords="offset points", **style)
        size = label.get_window_extent()
        sides = [_WAYS[way] for way in ways]
        places = product(enumerate(anchors), enumerate(distances), enumerate(sides))
        cost, anchor, way, away = min(
            (
                self._cost(size, anchor, way, away) + 3.0 * i + 2.0 * j + 0.1 * k,
                anchor,
                way,
                away,
            )
            for (i, anchor), (j, away), (k, way) in places
        )
        if cost >= _TOO_BAD and not needed:
            label.remove()
            return None
        horizontal, vertical, right, up = way
        label.xy = anchor
        # An annotation's own position is where its text stands
        label.set(position=(right * away, up * away), ha=horizontal, va=vertical)
        self._texts.append(self._box(size, anchor, way, away))
        return label

    def _box(
        self,
        size: Bbox,
        anchor: tuple[float, float],
        way: tuple[str, str, float, float],
        away: float,
    ) -> Bbox:
        horizontal, vertical, right, up = way
        x, y = self.axes.transData.transform(anchor)
        pixels = self.axes.figure.dpi / 72
        x += right * away * pixels + _ALIGNED[horizontal] * size.width
        y += up * away * pixels + _ALIGNED[vertical] * size.height
        return Bbox.from_bounds(x, y, size.width, size.height)

    def _cost(
        self,
        size: Bbox,
        anchor: tuple[float, float],
        way: tuple[str, str, float, float],
        away: float,
    ) -> float:
        box = self._box(size, anchor, way, away)
        inside = self.axes.bbox
        out = (
            max(0.0, inside.x0 - box.x0)
            + max(0.0, box.x1 - inside.x1)
            + max(0.0, inside.y0 - box.y0)
            + max(0.0, box.y1 - inside.y1)
        )
        cleared = box.padded(_CLEAR)
        covered = sum(cleared.overlaps(other) for other in self._texts)
        hit = sum(int(np.count_nonzero(_within(cleared, marks))) for marks in self._marks)
        return (
            (_OUTSIDE * min(1.0, out) if out > 0 else 0.0) + _ON_A_TEXT * covered + _ON_A_MARK * hit
        )


def _within(box: Bbox, points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    inside: np.ndarray[Any, Any] = (
        (points[:, 0] >= box.x0)
        & (points[:, 0] <= box.x1)
        & (points[:, 1] >= box.y0)
        & (points[:, 1] <= box.y1)
    )
    return inside


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


def size_axis(axes: Axes, sizes: Sequence[int], chosen: int, beyond: int | None) -> None:
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
    axes.plot(x, y, "o", ms=14, mfc="white", mec=ACCENT, mew=2.6, zorder=5, clip_on=False)
    axes.plot(x, y, "o", ms=6.5, color=ACCENT, zorder=6, clip_on=False)


def blob(axes: Axes, x: float, y: float) -> tuple[list[float], list[float]]:
    """What a round mark covers, as points in data coordinates."""
    at = axes.transData.transform((x, y))
    radius = 5 * axes.figure.dpi / 72
    corners = [(at[0] + i * radius, at[1] + j * radius) for i in (-1, 1) for j in (-1, 1)]
    back = axes.transData.inverted().transform(corners)
    return list(back[:, 0]), list(back[:, 1])
