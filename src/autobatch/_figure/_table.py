"""The effective batches as a table under the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter

from autobatch._figure._axes import ACCENT, GREY
from autobatch._figure._cost import chosen_rung, rungs
from autobatch._figure._labels import count, factor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from autobatch._report import TuningReport

__all__ = ["rung_table", "write_table"]


def rung_table(report: TuningReport) -> list[tuple[str, list[str]]]:
    """What stands below the axis of effective batches: a label and a cell for each."""
    rows = rungs(report)
    table = [
        ("accumulate", [f"×{count(row.accumulate_grad_batches)}" for row in rows]),
        (
            "updates/epoch",
            [
                "" if row.updates_per_epoch is None else count(row.updates_per_epoch)
                for row in rows
            ],
        ),
        (
            f"LR vs {count(chosen_rung(report, rows).effective_batch_size)}",
            [
                ""
                if row.learning_rate_factor is None
                else factor(row.learning_rate_factor)
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
        if all(
            abs(middles[i] - middles[j]) >= (widths[i] + widths[j]) / 2 for j in kept
        ):
            kept.add(i)
    return kept
