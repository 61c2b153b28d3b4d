"""Style of the figure: colors, number formats, axes and legends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from matplotlib import ticker
from matplotlib.font_manager import findfont, get_font

from autobatch._report.units import plain, trimmed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FONT: Final = "DejaVu Sans"  # comes with matplotlib
# Okabe and Ito's palette for the color-blind, and greys
ACCENT: Final = "#D55E00"
BLUE: Final = "#0072B2"
GREEN: Final = "#009E73"
INK: Final = "#1a1d21"
GREY: Final = "#59626e"
LINE: Final = "#9aa3ad"
BAR: Final = "#b8c3ce"
SHADE: Final = "#f0f1f3"
STYLE: Final[dict[str, Any]] = {
    "font.family": FONT,
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.edgecolor": "#c9ced4",
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "grid.color": "#e3e6ea",
    "legend.fontsize": 9,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0.3,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.5,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 7,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "autobatch",  # the same report gives the same file
}
_NAME_WIDTH: Final = 60  # characters
_EXACT_COUNTS: Final = 100_000
_EXACT_MEASURES: Final = 10_000
_OCTAVES_OF_POWERS: Final = 2  # axes narrower than this have too few powers of two for ticks
_LEGEND_LINE: Final = 16  # points


def short(value: float) -> str:
    """Return a measure in three digits, "7.6" or "1.28M"."""
    if abs(value) >= _EXACT_MEASURES:
        return str(ticker.EngFormatter(sep="").format_eng(float(f"{value:.3g}")))
    return trimmed(value)


def count(value: float) -> str:
    """Return a whole number, exact up to five digits, "5,005"."""
    return f"{value:,.0f}" if abs(value) < _EXACT_COUNTS else short(value)


def between(counts: Sequence[int]) -> str:
    """Return the smallest and the largest count, "20–120"."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def cut(text: str) -> str:
    """Return a name in drawable characters, cut if it is long."""
    name = drawable(text)
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"


def drawable(text: str) -> str:
    """Return one line with "?" for each character missing in the font (matplotlib would warn)."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(c if ord(c) in known else "?" for c in plain(text))


def size_axis(axes: Axes, sizes: Sequence[int], failing: int | None = None) -> None:
    """Set a logarithmic x-axis of batch sizes, with room for sizes that do not fit."""
    low, high = math.log2(min(sizes)), math.log2(max([*sizes, failing or 0]))
    margin = 0.06 * (high - low) or 0.5
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + (2 * margin if failing else margin)))
    if len(sizes) == 1:
        axes.xaxis.set_major_locator(ticker.FixedLocator(list(sizes)))
    elif high - low < _OCTAVES_OF_POWERS:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    else:
        axes.xaxis.set_major_locator(ticker.LogLocator(base=2, numticks=8))
    _format(axes.xaxis, count)


def value_axis(axes: Axes, highest: float) -> None:
    """Set a y-axis from zero to a little above the highest value."""
    axes.set_ylim(0, 1.12 * (highest or 1.0))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    _format(axes.yaxis, short)


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic y-axis with ticks at 1, 2, 5, 10 and so on."""
    positive = [value for value in values if value > 0] or [1.0]
    axes.set_yscale("log")
    axes.set_ylim(min(positive) / 1.5, max(positive) * 1.5)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    _format(axes.yaxis, short)


def _format(axis: Axis, text: Callable[[float], str]) -> None:
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))


def ring(axes: Axes, x: float, y: float, label: str) -> None:
    """Mark the choice."""
    axes.plot(x, y, "o", ms=14, mfc="white", mec=ACCENT, mew=2.6, zorder=5, clip_on=False)
    axes.plot(x, y, "o", ms=6.5, color=ACCENT, zorder=6, clip_on=False, label=label)


def heading(axes: Axes, title: str, chosen: str, *, columns: int = 3) -> None:
    """Set the title of a panel, and a legend below it that begins with `chosen` in bold."""
    handles, labels = axes.get_legend_handles_labels()
    axes.set_title(title, pad=8 + _LEGEND_LINE * math.ceil(len(labels) / columns))
    if not labels:
        return
    order = sorted(range(len(labels)), key=lambda i: labels[i] != chosen)
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    legend = axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    if chosen in labels:
        legend.get_texts()[0].set(color=ACCENT, weight="bold")
