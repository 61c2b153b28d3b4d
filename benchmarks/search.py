"""Compare searches: closeness to the largest size, trials, trials that did not fit, and safety of the result.

    python benchmarks/search.py [--quick] [--json PATH] [--markdown PATH] [--figure PATH] [--summary PATH]
        [--only curves|networks]

Each search gets the same memory curves, by formula, and the same real networks, on an accelerator that counts every
tensor byte. Each runs through its public entry point with its defaults, and once more with a higher cap if its default
cap decides the result. All have the same budget: autobatch leaves a tenth of a device free by default, so its device is
larger by as much.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import contestants
import curves
import torch
from contestants import SHARE, Contestant, Result
from pages import machine, renew, table
from paper import STEPS_AFTER, OnPaper

import networks
from autobatch import _settings

SECONDS_AFTER, QUICK_AFTER = 3.0, 0.1  # for the further steps of a real network
QUICK_MAXIMA = (100,)
PLAIN = ("straight", "step-wise", "state after step 1")  # nothing has to fail on these
ROUGH = ("jump", "noise of 1 %")
ACCENT, GREY, INK = "#D55E00", "#59626e", "#1a1d21"  # colours of the figure
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Cell:
    """One search of one contestant.

    Args:
        kind: The kind of curve, or the network.
        name: Which of them.
        true: The largest size that fits.
        rises: Whether a larger size never needs less.
        ends: Samples in the data set.
        contestant: Who searched.
        result: What came of it.
        survived: Successful further steps at the size, as far as they were run; None without a size.
        died: Whether one of them did not.
    """

    kind: str
    name: str
    true: int
    rises: bool
    ends: int
    contestant: str
    result: Result
    survived: int | None
    died: bool

    @property
    def ratio(self):
        """Found / true."""
        if not self.true:
            return None
        # Where a data set ends, a larger size comes to the same
        found = min(self.result.found or 0, self.ends)
        return found / self.true

    @property
    def is_unsafe(self):
        """True if the search returned a size that never ran, that fails later, or although none fits."""
        if self.result.found is None:
            return False
        return self.died or not self.result.is_tested or not self.true


# Running


def one_of_each():
    """One curve of each kind."""
    return list({each.kind: each for each in curves.curves(QUICK_MAXIMA)}.values())


def on_curves(given):
    """Every contestant on every one of the curves."""
    cells = []
    for one in given:
        for contestant in (*contestants.OURS, *contestants.THEIRS):
            work = OnPaper(one, contestant.budget_share)
            result = contestant.run(work)
            survived = work.survives(result.found) if result.found else None
            died = survived is not None and survived < STEPS_AFTER
            who = (one.kind, one.name, one.true, one.rises, one.ends)
            cells.append(Cell(*who, contestant.name, result, survived, died))
    return cells


def _of_networks():
    """Who searches on networks, and whether it sees single allocations."""
    bare = Contestant("find, bare peaks", contestants.find, SHARE)
    ours = [c for c in contestants.OURS if "1.0" not in c.name]
    pairs = [(contestant, False) for contestant in (*ours, *contestants.THEIRS)]
    return [*pairs[:1], (bare, True), *pairs[1:]]


def on_networks(kinds, seconds_after):
    """Every contestant on every network; of one that was capped once more with a higher cap."""
    cells = []
    for kind in kinds:
        data = networks.data_of(kind.make)
        budgets = [
            sum(peak(kind.make, data, kind.true + more) for more in (0, 1)) // 2
            for peak in (networks.peak_of, networks.peak_in_a_trainer)
        ]
        survived = {}
        for contestant, is_bare in _of_networks():
            if "max_val" in contestant.name:
                continue  # no cap decides below 8192
            share = contestant.budget_share
            budget = budgets[contestant.has_trainer]
            work = networks.Real(kind, data, budget, share, is_bare=is_bare)
            result = contestant.run(work)
            key = (result.found, share, budget)
            if result.found and key not in survived:
                survived[key] = work.survives(result.found, seconds_after)
            steps = survived.get(key)
            who = (kind.name, "", kind.true, True, work.ends, contestant.name)
            cells.append(Cell(*who, result, steps and abs(steps), bool(steps and steps < 0)))
            print(_line(cells[-1]), flush=True)
            del work
            gc.collect()
    return cells


def _line(cell):
    r = cell.result
    further = f" + {r.further_seconds:.1f}" if r.further_seconds else ""
    return (
        f"{cell.kind:14}{cell.contestant:26} found {r.found} of {cell.true}, {r.trials} trials, {r.unfit} not fit, "
        f"{r.samples} samples, {r.seconds:.1f}{further} s {r.error}"
    )


# Tables


def _range(values, form):
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, middle, high = min(known), statistics.median(known), max(known)
    return f"{form(middle)} ({form(low)}–{form(high)})" if low < high else form(low)


def _share(value):
    return f"{value:.3f}"


def _count(value):
    return f"{value:,.0f}"


def curves_table(cells):
    """Of every kind of curve and contestant: medians, and from the least to the most."""
    rows = []
    for kind in dict.fromkeys(cell.kind for cell in cells):
        for name in dict.fromkeys(cell.contestant for cell in cells):
            of = [c for c in cells if (c.kind, c.contestant) == (kind, name)]
            rows.append(
                [
                    kind,
                    name,
                    _range([c.ratio for c in of], _share),
                    _range([c.result.trials for c in of], _count),
                    _range([c.result.unfit for c in of], _count),
                    _range([c.result.samples for c in of], _count),
                    _range([c.result.seconds for c in of], lambda s: f"{s:,.1f}"),
                    f"{sum(c.is_unsafe for c in of)} of {len(of)}",
                ]
            )
    header = ["curve", "by", "found / true", "trials", "did not fit", "samples"]
    return table([*header, "seconds on paper", "unsafe"], rows)


def contestants_table(cells):
    """Of every contestant: all curves on which something fits."""
    rows = []
    for name in dict.fromkeys(cell.contestant for cell in cells):
        of = [c for c in cells if c.contestant == name and c.true and c.rises]
        every = [c for c in cells if c.contestant == name]
        rows.append(
            [
                name,
                _range([c.ratio for c in of], _share),
                f"{sum((c.ratio or 0) >= 0.99 for c in of)} of {len(of)}",  # noqa: RUF100
                _range([c.result.trials for c in every], _count),
                _range([c.result.unfit for c in every], _count),
                _range([c.result.samples for c in every], _count),
                f"{sum(c.is_unsafe for c in every)} of {len(every)}",
            ]
        )
    header = ["by", "found / true", "0.99 or more", "trials", "did not fit"]
    return table([*header, "samples", "unsafe"], rows)


def networks_table(cells):
    """Every network and contestant."""
    rows = []
    for c in cells:
        r = c.result
        steps = "" if c.survived is None else f"{c.survived}{', then failed' * c.died}"
        found = "none" if r.found is None else f"{r.found} / {c.true}"
        row = [c.kind, c.contestant, found, _share(c.ratio), str(r.trials)]
        row += [str(r.unfit), _count(r.samples), f"{r.seconds:.1f}"]
        if r.further_samples:
            row += [_count(r.further_samples), f"{r.further_seconds:.1f}"]
        else:
            row += ["", ""]
        rows.append([*row, steps, "yes" if r.is_tested else "no"])
    header = ["network", "by", "found / true", "ratio", "trials", "did not fit"]
    header += ["samples", "seconds", "curve: samples", "curve: seconds"]
    return table([*header, "steps survived", "tested"], rows)


def goals_table(on_paper, real):
    """Return the table of goals and results."""
    ours = [c for c in on_paper if c.contestant in ("find", "AutoBatch in a Trainer")]
    net = [c for c in real if c.contestant in ("find", "AutoBatch in a Trainer")]
    rising = [c for c in ours if c.rises and c.true]
    plain = [c for c in ours if c.kind in PLAIN]
    rough = [c for c in ours if c.kind in ROUGH]
    sized = [c for c in ours if c.true >= 30 and c.kind != "all of it fits"]
    seen = [c for c in sized if "with profiles" in c.kind] + net
    bare = [c for c in sized if "with profiles" not in c.kind and c.kind != "cliff"]
    rows = [
        _goal("unsafe answers", "0", [c.is_unsafe for c in (*ours, *net)], sum, 0),
        _goal(
            "found / true, curves that never fall",
            "≥ 0.99",
            [-c.ratio for c in rising],
            lambda v: -max(v),
            None,
            0.99,
        ),
        _goal(
            "did not fit: straight, step-wise, state after step 1",
            "0",
            [c.result.unfit for c in plain],
            max,
            0,
        ),
        _goal("did not fit: jump, noise", "≤ 1", [c.result.unfit for c in rough], max, 1),
    ]
    for what, of, middle, worst in (
        ("trials, with profiles", seen, 4, 6),
        ("trials, on bare curves", bare, 6, 9),
    ):
        counts = [c.result.trials for c in of]
        if counts:
            got = statistics.median(counts), max(counts)
            said = f"{got[0]:g} median, {got[1]} worst"
            met = got[0] <= middle and got[1] <= worst
            rows.append([what, f"≤ {middle} median, ≤ {worst} worst", said, _met(met)])
    rows += _against_binsearch(real)
    return table(["figure", "goal", "reached", ""], rows)


def _met(is_met):
    return "met" if is_met else "missed"


def _goal(what, goal, values, together, most, least=None):
    if not values:
        return [what, goal, "not run", ""]
    got = together(values)
    met = got <= most if most is not None else got >= least
    said = f"{got:.3f}" if isinstance(got, float) else f"{got}"
    return [what, goal, said, _met(met)]


def _against_binsearch(real):
    """Seconds and samples beside those of Lightning's binsearch, network by network."""
    rows = []
    for name in ("find", "AutoBatch in a Trainer"):
        pairs = [
            (c.result, other.result)
            for c in real
            for other in real
            if (c.contestant, other.contestant, c.kind)
            == (name, contestants.BINSEARCH.name, other.kind)
        ]
        if not pairs:
            continue
        for what, most, shares in (
            ("seconds of the search", 1 / 5, [a.seconds / b.seconds for a, b in pairs]),
            (
                "seconds with the speed curve",
                1 / 5,
                [(a.seconds + a.further_seconds) / b.seconds for a, b in pairs],
            ),
            ("samples of the search", 1 / 3, [a.samples / b.samples for a, b in pairs]),
        ):
            rows.append(
                [
                    f"{what}, {name}, against binsearch",
                    f"≤ {most:.2f}",
                    f"{statistics.median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})",
                    _met(max(shares) <= most),
                ]
            )
        least = [contestants.STEPS * a.found / b.samples for a, b in pairs if a.found]
        rows.append(
            [
                f"samples of its {contestants.STEPS} steps at the answer alone, {name}, against binsearch",
                "",
                _range(least, lambda share: f"{share:.2f}"),
                "",
            ]
        )
    return rows


def summary(on_paper, real):
    """Return a short table: each search on all networks, and its unsafe results on curves."""
    rows = []
    for name in dict.fromkeys(cell.contestant for cell in real):
        of = [c for c in real if c.contestant == name]
        paper = [c for c in on_paper if c.contestant == name]
        rows.append(
            [
                name,
                _range([c.ratio for c in of], lambda share: f"{share:.2f}"),
                _range([c.result.trials for c in of], _count),
                _range([c.result.unfit for c in of], _count),
                _range([c.result.samples for c in of], _count),
                f"{sum(c.is_unsafe for c in paper)} of {len(paper)}" if paper else "",
            ]
        )
    kinds = len({cell.kind for cell in real})
    header = [f"{kinds} networks", "found / true", "trials", "did not fit", "samples"]
    return f"Measured on {machine()}.\n\n{table([*header, 'unsafe curves'], rows)}"


def page(on_paper, real, seconds, seconds_after):
    """All of it as text."""
    parts = [f"Measured on {machine()}; {seconds:.0f} s in all."]
    parts += ["What was to be reached:", goals_table(on_paper, real)]
    if real:
        parts += [
            (
                "Networks, each search by itself. Seconds are CPU time; timing the speed curve, which only autobatch "
                "does, is counted beside the search. Steps survived: of a new training, as many of "
                f"{STEPS_AFTER} as took {seconds_after:g} s, 3 at least."
            ),
            networks_table(real),
        ]
    if on_paper:
        parts += [
            (
                "Curves, all together: median, and from the least to the most. found / true is of curves that never "
                "fall. Unsafe is a size larger than any that ran, or one that fails within "
                f"{STEPS_AFTER} further steps, or any where none fits."
            ),
            contestants_table(on_paper),
            "Curves, kind by kind:",
            curves_table(on_paper),
        ]
    return "\n\n".join(parts)


def draw(on_paper, real, path):
    """Draw found / true against the number of trials that did not fit."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    sets = {"Curves, on paper": on_paper, "Networks, real tensors": real}
    sets = {title: cells for title, cells in sets.items() if cells}
    with mpl.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure = Figure(figsize=(6.1 * len(sets), 5.2), dpi=120, layout="constrained")
        axes = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
        for axis, title in zip(axes, sets, strict=True):
            axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(-0.25, 100)
            axis.set_ylim(0, 1.2)
            ticks = (0, 1, 3, 10, 30, 100)
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xlabel("trials that did not fit", color=GREY)
            axis.axhline(1, color=INK, linewidth=0.8)
        axes[0].set_ylabel("found / true", color=GREY)
        figure.suptitle(
            "Size found by each search, and number of trials that did not fit",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=15,
        )
        figure.supxlabel(
            "Each point is the mean of all curves or networks with a true maximum of 30 or more, lines go from the "
            "least to the most; above 1 does not fit.",
            x=0.01,
            ha="left",
            fontsize=8.5,
            color=GREY,
        )
        figure.draw_without_rendering()
        for axis, cells in zip(axes, sets.values(), strict=True):
            _points(axis, cells)
        figure.savefig(path)


def _points(axis, cells):
    """Draw one point per search; searches with the same result share a point and a label."""
    points = {}
    for name in dict.fromkeys(c.contestant for c in cells):
        of = [c for c in cells if c.contestant == name and c.true >= 30 and c.rises]
        unfit, ratios = [c.result.unfit for c in of], [c.ratio for c in of]
        x, y = statistics.fmean(unfit), statistics.fmean(ratios)
        point = (round(x, 1), round(y, 2), name in _OURS)
        points.setdefault(point, (unfit, ratios, []))[-1].append(name)
    for at, ((x, y, is_ours), (unfit, ratios, names)) in enumerate(points.items()):
        color = ACCENT if is_ours else GREY
        axis.plot([min(unfit), max(unfit)], [y, y], color=color, linewidth=0.9, alpha=0.5)
        axis.plot([x, x], [min(ratios), max(ratios)], color=color, linewidth=0.9, alpha=0.5)
        marker = MARKERS[at % len(MARKERS)]
        axis.plot(x, y, marker, ms=8, color=color, zorder=5, label=", ".join(names))
    axis.legend(loc="lower right", fontsize=8)


_OURS = {c.name for c in contestants.OURS} | {"find, bare peaks"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one curve of each kind, and one small network"
    )
    parser.add_argument("--only", choices=["curves", "networks"])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables into this page")
    parser.add_argument("--summary", type=Path, help="write a short one into this page")
    parser.add_argument("--figure", type=Path, help="draw the picture into this file")
    return parser.parse_args()


def main():
    given = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    contestants.quiet()
    gc.freeze()  # what was imported is not looked through after every failure
    began = time.perf_counter()
    if given.quick:
        _settings.TIMING_SECONDS = 0.2  # nothing is said of it then
    seconds_after = QUICK_AFTER if given.quick else SECONDS_AFTER
    on_paper, real = [], []
    if given.only != "networks":
        on_paper = on_curves(one_of_each() if given.quick else list(curves.curves(curves.MAXIMA)))
    if given.only != "curves":
        kinds = networks.QUICK if given.quick else networks.KINDS
        real = on_networks(kinds, seconds_after)
    text = page(on_paper, real, time.perf_counter() - began, seconds_after)
    print(f"\n{text}")
    if given.json:
        cells = {"curves": on_paper, "networks": real}
        numbers = {
            "machine": machine(),
            **{
                where: [{**asdict(c), "ratio": c.ratio, "is_unsafe": c.is_unsafe} for c in of]
                for where, of in cells.items()
            },
        }
        given.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    if given.markdown:
        renew(given.markdown, "search.py", text)
    if given.summary:
        renew(given.summary, "search.py", summary(on_paper, real))
    if given.figure:
        draw(on_paper, real, given.figure)


if __name__ == "__main__":
    main()
