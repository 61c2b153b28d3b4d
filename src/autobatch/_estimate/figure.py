"""Memory over one training step as a figure."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib import style as mpl_style

from autobatch._estimate.breakdown import Held
from autobatch._memory import format_bytes
from autobatch._report.figure import Picture, checked_path, write
from autobatch._report.figure.style import (
    ACCENT,
    BLUE,
    GREEN,
    GREY,
    INK,
    STYLE,
    cut,
    value_axis,
)
from autobatch._report.units import BYTES, counted, unit_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autobatch._estimate import Estimate, EstimatedPeak
    from autobatch._estimate.breakdown import Moment

_SIZE: Final = (12.2, 5.6)  # inches
_DPI: Final = 150
# All of Okabe and Ito's palette, and one grey; neighbors differ in lightness
_COLORS: Final = {
    Held.PARAMETERS: BLUE,
    Held.OPTIMIZER_STATE: "#56B4E9",
    Held.GRADIENTS: "#CC79A7",
    Held.BATCH: GREY,
    Held.ACTIVATIONS: GREEN,
    Held.TEMPORARY: "#F0E442",
    Held.SCRATCH: ACCENT,
}


def draw(
    estimate: Estimate, held: Sequence[Moment], peak: EstimatedPeak, path: str | Path | None
) -> Figure:
    """Draw the memory over one step; write the figure to a file if one is named."""
    file = None if path is None else checked_path(path)
    with mpl_style.context(["default", STYLE]):
        figure = Picture(figsize=_SIZE, dpi=_DPI, layout="constrained")
        title = f"{counted(peak.batch_size, 'sample')} on {cut(estimate.device)}: estimated"
        figure.suptitle(title, x=0.012, ha="left", size=18, weight="bold")
        _panel(figure.subplots(), estimate, held, peak)
        figure.draw_without_rendering()  # creates all texts and ticks now, in this style
    if file is not None:
        write(figure, file)
    return figure


def _panel(axes: Axes, estimate: Estimate, held: Sequence[Moment], peak: EstimatedPeak) -> None:
    """Draw bytes by kind of memory over the events of a step, its phases, and the budget."""
    top = max(peak.reserved, estimate.budget)
    unit = unit_for([top], BYTES)
    kinds = [kind for kind in _COLORS if any(moment.held.get(kind) for moment in held)]
    heights = [
        np.array([moment.held.get(kind, 0) for moment in held]) / unit.factor for kind in kinds
    ]
    labels, colors = [str(kind) for kind in kinds], [_COLORS[kind] for kind in kinds]
    axes.stackplot(range(len(held)), heights, labels=labels, colors=colors, step="post")
    budget = f"budget, {format_bytes(estimate.budget)}"
    axes.axhline(estimate.budget / unit.factor, color=INK, linewidth=1.5, label=budget)
    reserved = f"reserved, {format_bytes(peak.reserved)}"
    axes.axhline(peak.reserved / unit.factor, color=INK, linestyle=":", label=reserved)
    value_axis(axes, top / unit.factor)
    axes.set_xlim(0, len(held) - 1)
    axes.set_ylabel(unit.name)
    axes.set_xlabel(f"allocations and releases of one step of {cut(estimate.subject)}, in order")
    axes.set_xticks(_name_phases(axes, held), [])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _name_phases(axes: Axes, held: Sequence[Moment]) -> list[int]:
    """Write the name of each phase above its part of the step; return where they begin."""
    begins = []
    at = 0
    for phase, part in groupby(held, key=lambda moment: moment.phase):
        begins.append(at)
        axes.text(at, 1.01, f" {phase}", transform=axes.get_xaxis_transform(), color=GREY)
        axes.axvline(at, color=GREY, linewidth=0.8)
        at += len(list(part))
    return begins
