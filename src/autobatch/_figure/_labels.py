"""Labels on a picture: short numbers, and texts put where they cover nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import Bbox

from autobatch._numbers import aligned, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

__all__ = ["FONT", "Labels", "count", "drawn", "factor", "short"]

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
        label = self.axes.annotate(
            text, anchors[0], (0, 0), textcoords="offset points", **style
        )
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
        hit = sum(
            int(np.count_nonzero(_within(cleared, marks))) for marks in self._marks
        )
        return (
            (_OUTSIDE * min(1.0, out) if out > 0 else 0.0)
            + _ON_A_TEXT * covered
            + _ON_A_MARK * hit
        )


def _within(box: Bbox, points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    inside: np.ndarray[Any, Any] = (
        (points[:, 0] >= box.x0)
        & (points[:, 0] <= box.x1)
        & (points[:, 1] >= box.y0)
        & (points[:, 1] <= box.y1)
    )
    return inside
