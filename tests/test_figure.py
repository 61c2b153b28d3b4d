from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from autobatch import BatchPlan, NoiseReading, Outcome, Trial, sinks
from autobatch._report.figure import style
from autobatch._report.figure.style import count, short
from autobatch.errors import AutobatchError
from autobatch.report import CurvePoint, Device, Latency, LearningRateRule
from report_examples import GIB, example, settings, with_noise

REFERENCES = Path(__file__).parent / "snapshots" / "figures"
_DOTS = 30  # per inch: 366 by 219 pixels
# Mean absolute difference, 0 to 1. Letters drawn by another FreeType stay below it, another choice does not.
_SAME = 0.004


def trial(size: int, speed: float, gib: float) -> Trial:
    return Trial(
        size,
        Outcome.FIT,
        peak=int(gib * GIB),
        step_seconds=size / speed,
        accumulate=2,
        optimizer_seconds=0.002,
        resident=GIB,
    )


def noise(samples: float) -> NoiseReading:
    return NoiseReading("ok", samples, samples / 2, samples * 2, 50, 150, 400, 256)


def untimed(**changes):
    trials = (
        dataclasses.replace(trial, step_seconds=None, optimizer_seconds=None)
        for trial in example().trials
    )
    return example(trials=tuple(trials), **changes)


LATENCIES = tuple(
    Latency(size, p50 / 1e3, p50 * 1.1 / 1e3, p99 / 1e3, p99 / 1e3, 120)
    for size, p50, p99 in (
        (1, 1.03, 1.7),
        (2, 1.08, 1.68),
        (4, 1.72, 2.3),
        (8, 3.35, 3.9),
        (16, 6.53, 7.4),
        (32, 13.7, 14.5),
        (64, 31.4, 34.8),
    )
)


def answers(limit: float = 1 / 30, **changes):
    asked = settings(target_batch_size=None, latency_limit=limit)
    more = {"latencies": LATENCIES, "plan": BatchPlan(32, 1), "settings": asked}
    return example(**({"task": "answer"} | more | changes))


LONG = "An accelerator $x_1$ with a name of 日本 that never ends and goes on, and on, and on and on"
REPORTS = {
    "with a noise scale": with_noise,
    "without": example,
    "several ranks": lambda: with_noise(plan=BatchPlan(32, 2, 4)),
    "settling": lambda: example(noise=NoiseReading("settling", 80.0, windows=8, last_update=20)),
    "a lower bound": lambda: example(noise=NoiseReading("at_least", 1500.0)),
    "no noise scale to be had": lambda: example(
        noise=NoiseReading("unavailable", reason="gradients are sharded")
    ),
    "a noise scale, nothing timed": lambda: untimed(noise=noise(900)),
    "a low noise scale": lambda: with_noise(noise=noise(4)),
    "a high noise scale": lambda: with_noise(noise=noise(40_000)),
    "validation": lambda: example(task="validate", plan=BatchPlan(56, 1)),
    "one size": lambda: example(
        trials=example().trials[5:6], plan=BatchPlan(32, 1), dataset_size=None
    ),
    "nothing timed": untimed,
    "nothing timed, no data set": lambda: untimed(dataset_size=None),
    "nothing at all": lambda: example(trials=(), dataset_size=None),
    "no peaks": lambda: example(
        trials=tuple(dataclasses.replace(t, peak=None) for t in example().trials),
        can_accumulate=False,
    ),
    "fourteen sizes near the limit": lambda: example(
        trials=(
            *(
                trial(size, 5000 + size, 0.01 * size)
                for size in (8, 16, 1000, 1024, *range(1050, 1070, 2))
            ),
            Trial(1071, Outcome.OUT_OF_MEMORY),
        ),
        plan=BatchPlan(1024, 4),
        settings=settings(target_batch_size=4096),
        noise=noise(300),
        device=Device(name=LONG, source="NVML", total=80 * GIB, foreign=0),
        environment={"torch": LONG, "python": LONG, "lightning": LONG},
    ),
    "sizes side by side": lambda: example(
        trials=tuple(trial(size, 6000, 10) for size in range(1000, 1015)),
        plan=BatchPlan(1007, 1),
    ),
    "from one to a million": lambda: with_noise(
        curve=(),
        trials=tuple(
            trial(4**i, 2e6 * 4**i / (4**i + 1000), 0.01 + 4**i * 1e-5) for i in range(11)
        ),
        plan=BatchPlan(4**10, 4, 64),
        dataset_size=10**9,
        noise=noise(3e6),
        budget=80 * GIB,
    ),
    "all as fast": lambda: example(
        curve=tuple(
            CurvePoint(2**i, 2, *(2**i / v for v in (400, 480, 310)), 0.0, 20, GIB, 1.3)
            for i in range(9)
        ),
        trials=(),
        plan=BatchPlan(64, 4),
    ),
    "latency": answers,
    "latency of one size": lambda: answers(latencies=LATENCIES[:1], plan=BatchPlan(1, 1)),
    "latency over the limit": lambda: answers(0.0001),
    "latency far below the limit": lambda: answers(60, plan=BatchPlan(64, 1)),
    "latency of others than the chosen": lambda: answers(plan=BatchPlan(24, 1)),
}
every_report = pytest.mark.parametrize("name", REPORTS)


@cache
def picture(name: str) -> Figure:
    return REPORTS[name]().plot()


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in texts(figure))


def texts(figure: Figure) -> list[Text]:
    """Return every drawn text, tick labels within the limits of their axis included."""
    idle = {
        text
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.findobj(Tick)
        for text in (tick.label1, tick.label2)
        if not drawn(tick, axis.get_view_interval())
    }
    # findobj does not descend into the cells of a table
    tables = [table for axes in figure.axes for table in axes.tables]
    cells = [cell.get_text() for table in tables for cell in table.get_celld().values()]
    return [
        text
        for text in (*figure.findobj(Text), *cells)
        if text.get_visible() and text.get_text().strip() and text not in idle
    ]


def drawn(tick, interval) -> bool:
    low, high = sorted(interval)
    return low <= tick.get_loc() <= high


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    return [
        (a, b)
        for (a, one), (b, other) in combinations(boxes, 2)
        if one.padded(-1).overlaps(other.padded(-1))
    ]


# Text


@every_report
def test_no_text_covers_another(name):
    assert overlaps(picture(name)) == []


@every_report
def test_every_text_is_on_the_page(name):
    figure = picture(name)
    page = figure.bbox

    outside = [
        text.get_text()
        for text in texts(figure)
        for box in [text.get_window_extent()]
        if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1
    ]

    assert outside == []


def test_overlap_check_finds_an_overlap():
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")

    assert overlaps(figure) == [("one", "other")]


@every_report
def test_the_title_is_the_answer(name):
    report, figure = REPORTS[name](), picture(name)

    largest = max(texts(figure), key=Text.get_fontsize).get_text()

    assert f"  {largest}  " in f"{report.text()}  ".replace("\n", "  ")


def test_sizes_that_do_not_fit_are_shaded():
    assert "does not fit" in words(picture("without"))
    assert "does not fit" not in words(picture("sizes side by side"))


def test_time_to_the_same_loss_is_shown_with_its_uncertainty():
    shown = words(picture("with a noise scale"))

    assert "time to the same loss" in shown
    assert "64 per update" in shown
    assert "(0.6–1.0×)" in shown
    assert "within 10 % of the shortest time" in shown
    assert "noise scale of about 900 (updates 150–400); band: for one of 225–3,600" in shown
    assert "do not predict how long a run takes" in shown
    assert "×0.71" in shown


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("without", "No gradient noise scale was measured."),
        ("settling", "Noise scale not settled; at least 80.0 so far."),
        ("a lower bound", "Noise scale at least 1,500: updates are too small to measure more."),
        ("no noise scale to be had", "Noise scale not measured: gradients are sharded."),
        ("a noise scale, nothing timed", "No size was timed."),
    ],
)
def test_footer_gives_the_reason_for_a_missing_estimate(name, why):
    shown = words(picture(name))

    assert f"Time to the same loss: not estimated. {why}" in shown
    assert "per update:" not in shown


def test_plan_with_about_the_shortest_time_has_no_rival():
    shown = words(picture("a high noise scale"))

    assert "256 chosen: about the shortest time" in shown
    assert "the time (" not in shown


def test_unknown_values_are_left_out():
    assert "LR vs" not in words(picture("without"))
    assert "updates/epoch" not in words(picture("one size"))
    assert "samples per second" not in words(picture("nothing timed"))
    assert "Peak memory" not in words(picture("no peaks"))
    assert "No size was timed" in words(picture("nothing at all"))


def test_evaluation_shows_no_effective_batches():
    shown = words(picture("validation"))

    assert "Batches of 56 to validate" in shown
    assert "accumulat" not in shown


def test_inference_shows_latency_and_throughput():
    shown = words(picture("latency"))

    assert "Latency of one batch, ms" in shown
    assert "32: p99 14.5 ms" in shown
    assert "120 timed calls of each size, with all that the workload does in a call" in shown
    assert "limit 33.3 ms" in shown
    assert "over the limit" in shown
    assert "batches of 8 give 97 % of the fastest" in shown


def test_points_are_the_measured_speeds():
    (axes,) = (
        axes for axes in picture("without").axes if axes.get_title(loc="left").startswith("Speed")
    )

    measured = [[row.batch_size, row.samples_per_second] for row in example().sizes]

    assert measured in [line.get_xydata().tolist() for line in axes.lines]


def test_names_are_drawn_literally_in_characters_of_the_font():
    shown = words(picture("fourteen sizes near the limit"))

    assert "$x_1$" in shown
    assert "日" not in shown


# Colours


def seen_without_green(color: str) -> np.ndarray:
    """Return linear light as seen without the receptor for green (Machado et al. 2009)."""
    value = np.array(mpl.colors.to_rgb(color))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    return np.array(seen) @ linear


@pytest.mark.parametrize("other", ["BLUE", "GREEN", "BAR", "GREY"])
def test_choice_is_distinguishable_without_seeing_green(other):
    accent, color = (seen_without_green(getattr(style, name)) for name in ("ACCENT", other))

    assert np.linalg.norm(accent - color) > 0.15


@pytest.mark.parametrize("name", ["INK", "GREY", "BLUE"])
def test_small_text_has_enough_contrast_on_white(name):
    value = np.array(mpl.colors.to_rgb(getattr(style, name)))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]

    assert 1.05 / (luminance + 0.05) >= 4.5


# Snapshots


def pixels(figure: Figure) -> np.ndarray:
    into = io.BytesIO()
    figure.savefig(into, dpi=_DOTS)
    into.seek(0)
    return imread(into, format="png")[..., :3].astype(float)


@pytest.mark.parametrize("name", ["with a noise scale", "without", "validation", "latency"])
def test_figure_matches_its_snapshot(name, request):
    path = REFERENCES / f"{name.replace(' ', '_')}.png"
    if request.config.getoption("--overwrite"):
        path.parent.mkdir(exist_ok=True)
        picture(name).savefig(path, dpi=_DOTS)
    assert path.exists(), f"{path} is missing; `pytest --overwrite` writes it"

    shown, expected = pixels(picture(name)), imread(path)[..., :3].astype(float)

    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < _SAME


@pytest.mark.parametrize(
    "change",
    [
        {"plan": BatchPlan(16, 16)},
        {"budget": 9 * GIB},
    ],
    ids=lambda change: next(iter(change)),
)
def test_snapshot_of_another_report_does_not_match(change):
    expected = imread(REFERENCES / "with_a_noise_scale.png")[..., :3]

    shown = pixels(with_noise(**change).plot())

    assert np.abs(shown - expected).mean() > _SAME


# Files


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.png", b"\x89PNG"), ("A.PDF", b"%PDF")],
)
def test_suffix_chooses_the_format(tmp_path, name, start):
    path = tmp_path / "made" / name

    example().plot(str(path))

    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["tradeoff", "tradeoff.jpg", "tradeoff.png.txt", ""])
def test_other_suffixes_are_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=r"path=.*\.png, \.svg or \.pdf(, or None)?\.$"):
        example().plot(name)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [3, b"a.png", ["a.png"]])
def test_other_types_than_paths_are_refused(path):
    sentence = rf"path={re.escape(repr(path))} is not a path; give a str or a pathlib\.Path that ends in .*, or None\.$"

    with pytest.raises(ValueError, match=sentence):
        example().plot(path)


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()

    with pytest.raises(ValueError, match="is a directory"):
        example().plot(tmp_path / "a.png")


def test_failed_write_keeps_existing_files(tmp_path):
    (tmp_path / "file").write_text("earlier content")

    with pytest.raises(OSError, match="could not be written to"):
        sinks.figure_file(tmp_path / "file" / "a.png")(example())

    assert (tmp_path / "file").read_text() == "earlier content"


def test_style_and_bytes_do_not_depend_on_user_settings(tmp_path):
    example().plot(tmp_path / "plain.svg")
    with mpl.rc_context({"font.family": "serif", "axes.facecolor": "black"}):
        figure = example().plot(tmp_path / "dark.svg")
        families = {text.get_fontfamily()[0] for text in figure.findobj(Text)}

    assert families == {"DejaVu Sans"}
    one, other = ((tmp_path / name).read_bytes() for name in ("plain.svg", "dark.svg"))
    assert one.startswith(b"<?xml")
    assert one == other  # and the same report gives the same file


# A panel in another figure


def test_axes_gets_the_main_panel_and_its_figure_is_returned(tmp_path):
    figure = Figure()
    left, right = figure.subplots(1, 2)

    assert with_noise().plot(tmp_path / "both.png", ax=right) is figure

    assert "Cost of the effective batch" in words(figure)
    assert not left.has_data()
    assert len(figure.axes) == 2
    assert (tmp_path / "both.png").exists()


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("without", "Speed: samples per second"),
        ("validation", "Speed: samples per second"),
        ("latency", "Latency of one batch"),
        ("nothing timed", "Peak memory"),
        ("nothing at all", "No size was timed"),
    ],
)
def test_main_panel_shows_the_best_known_numbers(name, title):
    figure = Figure()

    REPORTS[name]().plot(ax=figure.subplots())

    assert title in words(figure)


def test_other_objects_than_axes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ax=3 is not an Axes"):
        example().plot(tmp_path / "a.png", ax=3)

    assert list(tmp_path.iterdir()) == []


# Side effects


def test_pyplot_and_its_settings_stay_untouched():
    program = """
import matplotlib, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
from report_examples import with_noise
settled = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
before = settled()
with_noise().plot()._repr_png_()
assert settled() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, folder], check=True)


def test_error_without_matplotlib_names_the_package(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("autobatch._report.figure")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(AutobatchError, match=r"pip install .lightning-autobatch\[plot"):
        sinks.figure_file(tmp_path / "a.png")(example())

    assert list(tmp_path.iterdir()) == []


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (7.6, "7.6"),
        (358, "358"),
        (4884, "4,880"),
        (12_345, "12.3k"),
        (1_281_167, "1.28M"),
        (2e9, "2G"),
        (999_999, "1M"),
        (5e20, "500E"),
    ],
)
def test_measures_have_three_digits(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (5005, "5,005"), (40_037, "40,037"), (10**6, "1M")]
)
def test_counts_are_exact_up_to_five_digits(value, text):
    assert count(value) == text


def test_learning_rate_rule_is_named():
    report = example(learning_rate=LearningRateRule("SGD", "linear"))

    assert "LR: by the linear rule, usual for SGD." in words(report.plot())
