"""A report as a figure."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autobatch._report import files
from autobatch._report.figure.latency import latency_panel, throughput_panel
from autobatch._report.figure.style import GREY, INK, STYLE, drawn, short
from autobatch._report.figure.training import (
    comparable,
    compared_panel,
    cost_panel,
    memory_panel,
    peaks,
    speed_panel,
    write_table,
)
from autobatch._report.text import page
from autobatch._report.tradeoff import NoiseRange

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from autobatch._report import TuningReport

    _Panel: TypeAlias = Callable[[Axes, TuningReport], None]
    from autobatch._report.layout import Fact


_WIDTH: Final = 12.2  # inches
_HEIGHT: Final = 7.3
_DOTS: Final = 150  # per inch
_KINDS: Final = (".png", ".svg", ".pdf")
_LEFT: Final = 0.72  # inches from the left to everything
_RIGHT: Final = 11.86
_FLOOR: Final = 2.2
_FOOT_LINE: Final = 0.185  # inches
_FOOT_WIDTH: Final = 165  # characters
_FOOT_LINES: Final = 5


class Picture(Figure):
    """A figure that belongs to no window, and that a notebook shows."""

    def _repr_png_(self) -> bytes:
        return _rendered(self, "png", dpi=100)


def draw(report: TuningReport, path: str | Path | None, ax: Axes | None) -> Figure:
    """The whole picture, or its main panel in an Axes; written to a file where one is named."""
    file = None if path is None else _checked(path)
    if ax is not None and not isinstance(ax, Axes):
        raise ValueError(f"ax={ax!r} is not an Axes of matplotlib; give one, or None.")
    with mpl_style.context(["default", STYLE]):
        figure = _picture(report) if ax is None else _main_panel(report, ax)
        if file is not None:
            content = _rendered(figure, file.suffix[1:].lower(), dpi=_DOTS)
            files.write(file, content)
    return figure


def _checked(path: str | Path) -> Path:
    file = files.named(path, "that ends in .png, .svg or .pdf, or None")
    if file.suffix.lower() not in _KINDS:
        raise ValueError(
            f"path={str(path)!r} has no suffix that says what to write; give a file that ends in .png, .svg or .pdf."
        )
    if file.is_dir():
        raise ValueError(f"path={str(path)!r} is a directory; give a file in it.")
    return file


def _rendered(figure: Figure, kind: str, *, dpi: int) -> bytes:
    # Without a date the same report gives the same file
    undated: dict[str, dict[str, Any]] = {
        "png": {},
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    into = io.BytesIO()
    with mpl_style.context(["default", STYLE]):
        figure.savefig(into, format=kind, dpi=dpi, metadata=undated[kind])
    return into.getvalue()


def _main_panel(report: TuningReport, axes: Axes) -> Figure:
    """What the report is about, in a panel of someone else's figure."""
    if report.latencies:
        latency_panel(axes, report)
    elif comparable(report):
        compared_panel(axes, report)
        axes.set_xlabel("samples per update")
    elif report.sizes:
        speed_panel(axes, report)
        axes.set_xlabel("micro-batch")
    else:
        _nothing(axes)
    return cast("Figure", axes.get_figure(root=True))  # an Axes is made in a figure


def _picture(report: TuningReport) -> Figure:
    figure = Picture(figsize=(_WIDTH, _HEIGHT), dpi=_DOTS)
    if report.latencies:
        _head(figure, answer(report), inference_remark(report))
        _inference_panels(figure, report)
        _foot(figure, inference_foot(report))
    else:
        _head(figure, answer(report), remark(report))
        _training_panels(figure, report)
        _foot(figure, foot(report))
    figure.draw_without_rendering()  # every text is made now, in this style
    return figure


def _head(figure: Figure, answer: str, remark: str) -> None:
    _line(figure, answer, _HEIGHT - 0.28, fontsize=20, fontweight="bold", color=INK)
    _line(figure, remark, _HEIGHT - 0.74, fontsize=12.5, color=GREY)


def _foot(figure: Figure, paragraphs: list[str]) -> None:
    lines = [line for text in paragraphs for line in textwrap.wrap(text, _FOOT_WIDTH)]
    if len(lines) > _FOOT_LINES:
        lines = [*lines[: _FOOT_LINES - 1], f"{lines[_FOOT_LINES - 1]} …"]
    for i, line in enumerate(lines):
        inches = 0.13 + (len(lines) - i) * _FOOT_LINE
        _line(figure, line, inches, fontsize=9, color=GREY)


def _line(figure: Figure, text: str, inches: float, **look: Any) -> None:
    """A line of text below this height, from the left edge of the panels; smaller where it would pass the right one."""
    line = figure.text(_LEFT / _WIDTH, inches / _HEIGHT, text, va="top", **look)
    room = (_RIGHT - _LEFT) * figure.dpi
    taken = line.get_window_extent().width
    if taken > room:
        line.set_fontsize(look["fontsize"] * room / taken)


def _place(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """An Axes at a place in inches."""
    return figure.add_axes(
        (
            left / _WIDTH,
            bottom / _HEIGHT,
            (right - left) / _WIDTH,
            (top - bottom) / _HEIGHT,
        )
    )


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(
        0.5,
        0.5,
        "No size was timed, and no memory was read.",
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=GREY,
        fontsize=12.5,
    )


def _training_panels(figure: Figure, report: TuningReport) -> None:
    left = _left_panels(report)
    if report.task == "train" and _right_panel(figure, report, alone=not left):
        places = [(3.83, 5.92), (_FLOOR, 3.28)] if len(left) > 1 else [(_FLOOR, 5.92)]
        for draw_panel, (bottom, top) in zip(left, places, strict=False):
            axes = _place(figure, _LEFT, bottom, 5.15, top)
            draw_panel(axes, report)
            if (bottom, top) != places[len(left) - 1]:
                axes.tick_params(labelbottom=False)
                axes.set_xlabel("")
            else:
                axes.set_xlabel("micro-batch", labelpad=5)
        return
    if not left:
        _nothing(_place(figure, _LEFT, 1.6, _RIGHT, 5.92))
    sides = [(_LEFT, 6.0), (6.86, _RIGHT)] if len(left) > 1 else [(_LEFT, _RIGHT)]
    for draw_panel, (start, end) in zip(left, sides, strict=False):
        axes = _place(figure, start, 1.6, end, 5.92)
        draw_panel(axes, report)
        axes.set_xlabel("micro-batch" if report.task == "train" else "batch size", labelpad=5)


def _left_panels(report: TuningReport) -> list[_Panel]:
    panels: list[_Panel] = []
    if report.sizes:
        panels.append(speed_panel)
    if peaks(report):
        panels.append(memory_panel)
    return panels


def _right_panel(figure: Figure, report: TuningReport, *, alone: bool) -> bool:
    """What the effective batch costs; False where there is nothing to say of it."""
    if not report.effective:
        return False
    axes = _place(figure, 1.8 if alone else 6.62, _FLOOR, _RIGHT - 0.05, 5.92)
    if comparable(report):
        compared_panel(axes, report)
    elif not cost_panel(axes, report):
        axes.remove()
        return False
    write_table(axes, report)
    return True


def _inference_panels(figure: Figure, report: TuningReport) -> None:
    latency_panel(_place(figure, _LEFT, 1.6, 5.9, 5.92), report)
    throughput_panel(_place(figure, 6.86, 1.6, _RIGHT, 5.92), report)


_NAME_WIDTH: Final = 60
_TOGETHER: Final = "\N{NO-BREAK SPACE}"


def answer(report: TuningReport) -> str:
    """What was chosen."""
    plan = report.plan
    size, ranks = f"{plan.micro_batch_size:,}", plan.world_size
    if report.task != "train":
        return page(report).answer
    parts = [f"Micro-batch {size}"]
    if plan.accumulate_grad_batches > 1:
        parts.append(f"accumulate {plan.accumulate_grad_batches:,}")
    if ranks > 1:
        parts.append(f"{ranks:,} ranks")
    if len(parts) == 1:
        return f"Micro-batch {size}, one per update"
    return f"{', '.join(parts)}: {plan.effective_batch_size:,} samples per update"


def remark(report: TuningReport) -> str:
    """What it comes to: speed, memory, an epoch."""
    facts = {fact.label: fact for fact in page(report).facts}
    said = [facts[name].value for name in ("Speed", "Memory") if name in facts]
    if "Epoch" in facts:
        said.append(_epoch_said(facts["Epoch"]))
    return "  ·  ".join(said)


def _epoch_said(epoch: Fact) -> str:
    return f"{epoch.value} per epoch" + (f", {epoch.remark}" if epoch.remark else "")


def foot(report: TuningReport) -> list[str]:
    """How it was measured and what is estimated; and on what."""
    said = (_measured(report), _loss_said(report), _rule_said(report))
    return [" ".join(text for text in said if text), _on_what(report)]


def _measured(report: TuningReport) -> str:
    if not report.sizes:
        return ""
    timed = [row.updates for row in report.sizes if row.updates is not None]
    steps = report.settings.steps_per_trial
    how = f"Speed: median step of a trial of {steps} optimizer step{'s' if steps > 1 else ''}."
    if timed:
        least, most = min(timed), max(timed)
        count = f"{least}" if least == most else f"{least}–{most}"
        how = f"Speed: median of {count} timed updates of each size, bars 10–90 %."
        by_trial = [str(row.batch_size) for row in report.sizes if row.updates is None]
        if by_trial:
            how = f"{how[:-1]}; at {', '.join(by_trial)} of the steps of a trial alone."
    if report.fit is not None:
        how += " Line: a fixed time for each step, plus a time for each sample."
    return how


def _loss_said(report: TuningReport) -> str:
    """What the right panel rests on, or why it says nothing about the loss."""
    noise = report.noise
    if report.task != "train":
        return ""
    if noise is not None and comparable(report):
        scale = NoiseRange.of(noise)
        band = f"{short(scale.low)}–{short(scale.high)}" if scale else ""
        return (
            f"Time to the same loss: estimated from a gradient noise scale of about {short(noise.samples or 0)} "
            f"(updates {noise.first_update:,}–{noise.last_update:,}); band: for one of {band}. "
            "Assumes that the learning rate is retuned. "
            "Estimates: they compare batch sizes, and do not predict how long a run takes."
        )
    return f"Time to the same loss: not estimated; {_no_noise(report)}."


def _rule_said(report: TuningReport) -> str:
    rule = report.learning_rate
    if rule is None or not report.effective:
        return ""
    return f"LR: by the {rule.rule} rule, usual for {_cut(drawn(rule.optimizer))}."


def _no_noise(report: TuningReport) -> str:
    noise = report.noise
    if noise is None:
        return "no gradient noise scale was measured"
    match noise.state:
        case "settling":
            return (
                "the gradient noise scale had not settled yet, and still rises in the first updates"
            )
        case "at_least":
            least = short(noise.samples or 0)
            return f"the gradient noise scale is at least {least}, and these batches are too small to measure more"
        case "unavailable":
            why = f": {drawn(noise.reason).rstrip('.')}" if noise.reason else ""
            return f"the gradient noise scale could not be measured{why}"
        case "ok":
            return "no size was timed"


def _on_what(report: TuningReport) -> str:
    header = [_cut(drawn(part)) for part in page(report).header[1:]]
    versions = [
        _cut(drawn(f"{name} {number}")).replace(" ", _TOGETHER)
        for name, number in report.environment.items()
    ]
    return "Measured on " + " · ".join([*header, *versions])


def _cut(text: str) -> str:
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"


def inference_remark(report: TuningReport) -> str:
    """What stands below it: how long, how many, how much memory; and which smaller batch does about as well."""
    facts = {fact.label: fact for fact in page(report).facts}
    said = [facts[name].value for name in ("Latency", "Speed", "Memory") if name in facts]
    if "Knee" in facts:
        said.append(f"{facts['Knee'].value} give {facts['Knee'].remark}")
    return "  ·  ".join(said)


def inference_foot(report: TuningReport) -> list[str]:
    """How it was measured, and on what."""
    calls = [row.calls for row in report.latencies]
    least, most = min(calls), max(calls)
    many = f"{least:,}" if least == most else f"{least:,}–{most:,}"
    facts = {fact.label: fact for fact in page(report).facts}
    what = f", {facts['Calls'].remark}" if "Calls" in facts else ""
    said = (
        f"{many} timed calls of each size{what}; left out are the first of each turn, of quick calls the first two, "
        "and those that start the workload anew. Throughput: by the median call. "
        "Waiting for a batch to fill is not included."
    )
    return [said, _on_what(report)]
