"""A report as a figure."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Final, cast

# Not `style`: within this package, that is the submodule
from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autobatch._report import files
from autobatch._report.figure import latency, training
from autobatch._report.figure.style import GREY, STYLE, cut
from autobatch._report.text import page

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import SubFigure

    from autobatch._report import TuningReport

    _Panel = Callable[[Axes, TuningReport], None]

_SIZE: Final = (12.2, 7.3)  # inches
_DPI: Final = 150
_SUFFIXES: Final = (".png", ".svg", ".pdf")
_LEFT: Final = 0.012  # of the width, left of title and footer
_FOOTER_WIDTH: Final = 176  # characters
_FOOTER_LINES: Final = 5
# Without a date the same report gives the same file
_UNDATED: Final[dict[str, dict[str, Any]]] = {
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


class Picture(Figure):
    """A figure without a window, shown by a notebook."""

    def _repr_png_(self) -> bytes:
        return _rendered(self, "png", dpi=100)  # about the width of a notebook


def draw(report: TuningReport, path: str | Path | None, ax: Axes | None) -> Figure:
    """Draw the figure, or its main panel into `ax`; write it to a file if one is named."""
    file = None if path is None else checked_path(path)
    if ax is not None and not isinstance(ax, Axes):
        raise ValueError(f"ax={ax!r} is not an Axes of matplotlib; give one, or None.")
    with mpl_style.context(["default", STYLE]):
        figure = _picture(report) if ax is None else _main_panel(report, ax)
    if file is not None:
        write(figure, file)
    return figure


def checked_path(path: str | Path) -> Path:
    """Return the file of a figure; `ValueError` for one of another format."""
    file = files.named(path, "that ends in .png, .svg or .pdf, or None")
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"path={str(path)!r} has no suffix of a known format; give a file that ends in "
            ".png, .svg or .pdf."
        )
    if file.is_dir():
        raise ValueError(f"path={str(path)!r} is a directory; give a file in it.")
    return file


def write(figure: Figure, file: Path) -> None:
    """Write a figure to a file."""
    files.write(file, _rendered(figure, file.suffix[1:].lower(), dpi=_DPI))


def _rendered(figure: Figure, kind: str, *, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with mpl_style.context(["default", STYLE]):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_UNDATED[kind])
    return buffer.getvalue()


def _main_panel(report: TuningReport, axes: Axes) -> Figure:
    is_compared = training.is_compared(report)
    panel = training.compared_panel if is_compared else _columns(report)[0][0][0]
    panel(axes, report)
    return cast("Figure", axes.get_figure(root=True))  # an Axes is made in a figure


def _picture(report: TuningReport) -> Figure:
    figure = Picture(figsize=_SIZE, dpi=_DPI, layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    _title(figure, page(report).answer, size=20, weight="bold")
    (body,) = figure.subfigures(squeeze=False).flat  # for a second title, below the first
    _title(body, _summary(report), size=12.5, color=GREY)
    body.supxlabel(_footer(report), x=_LEFT, ha="left", size=9, color=GREY)
    columns = _columns(report)
    parts = body.subfigures(1, len(columns), squeeze=False, width_ratios=(4, 5)[: len(columns)])
    for part, panels in zip(parts.flat, columns, strict=True):
        heights = (4, 3)[: len(panels)]
        for draw_panel, axes in part.subplot_mosaic(panels, height_ratios=heights).items():
            draw_panel(axes, report)
    figure.draw_without_rendering()  # creates all texts and ticks now, in this style
    return figure


def _title(figure: Figure | SubFigure, text: str, *, size: float, **look: Any) -> None:
    """Set a title in one line, smaller if it is long."""
    figure.suptitle(text, x=_LEFT, ha="left", size=min(size, 1280 / max(len(text), 1)), **look)


def _columns(report: TuningReport) -> list[list[list[_Panel]]]:
    """Return one or two columns, each with rows of panels."""
    if report.latencies:
        return [[[latency.latency_panel, latency.throughput_panel]]]
    measured: list[_Panel] = []
    if report.sizes:
        measured.append(training.speed_panel)
    if training.peaks(report):
        measured.append(training.memory_panel)
    costs: list[_Panel] = [training.cost_panel_and_table] if training.has_costs(report) else []
    if measured and costs:
        return [[[panel] for panel in measured], [costs]]
    return [[measured or costs or [_nothing_measured]]]


def _nothing_measured(axes: Axes, _: TuningReport) -> None:
    axes.set_axis_off()
    text = "No size was timed, and no memory was read."
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


def _summary(report: TuningReport) -> str:
    """Return latency, speed, memory, epoch and knee, as far as they are known."""
    facts = {fact.label: fact for fact in page(report).facts}
    parts = [facts[name].value for name in ("Latency", "Speed", "Memory") if name in facts]
    if epoch := facts.get("Epoch"):
        parts.append(", ".join(filter(None, (f"{epoch.value} per epoch", epoch.comment))))
    if knee := facts.get("Knee"):
        parts.append(f"{knee.value} give {knee.comment}")
    return "  ·  ".join(parts)


def _footer(report: TuningReport) -> str:
    """Return the methods of measurement, then device, subject and versions."""
    method = latency.measured_by(report) if report.latencies else training.measured_by(report)
    versions = (f"{name} {number}" for name, number in report.environment.items())
    setup = " · ".join(map(cut, [*page(report).header[1:], *versions]))
    lines = textwrap.wrap(method, _FOOTER_WIDTH)
    lines += textwrap.wrap(f"Measured on {setup}", _FOOTER_WIDTH)
    if len(lines) > _FOOTER_LINES:
        lines[_FOOTER_LINES - 1 :] = [f"{lines[_FOOTER_LINES - 1]} …"]
    return "\n".join(lines)
