"""Searches on memory curves of CUDA: measured ones, and those of replayed allocators; prints Markdown.

    python benchmarks/replays.py [--quick] [--markdown PATH]

The measured curves are those of tests/recordings. Where timm and transformers are installed, they
are searched by predicted memory as well; requested bytes, which decide whether predictions are
followed, were recorded for three of the six, and are taken as predicted for the others. A replayed
curve has the peaks that torch's caching allocator would reach on an H100 in a training step of a
network, traced without a GPU. The guide's predictions of them are off by as much as those of
convolutional networks on an H200 were in the mean (estimate.py): reserved bytes by 1.6 %, at every
other budget too high, and else too low.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pages import machine, renew, table
from torch import nn
from torch.nn import functional as F

from autobatch import GuidedBisection, Outcome, Trial
from autobatch._guide import error_of_peaks
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu
from autobatch._memory.estimate.tracer import TrainingStep
from autobatch._search.estimated import EstimatedSearch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measured_curves import measured_curves, starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._memory.estimate.prediction import Peaks

GIB = 2**30
BUDGETS = tuple(int(4 * GIB * 20 ** (step / 11)) for step in range(12))  # 4 to 80 GiB
RESERVED_ERROR, REQUESTED_ERROR = 0.016, 0.005
HIGH = 100_000


class Encoder(nn.Module):
    def __init__(self, layers, width, length):
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(30_000, width)
        each = partial(nn.TransformerEncoderLayer, width, width // 64, 4 * width, batch_first=True)
        self.layers = nn.Sequential(*(each(norm_first=True) for _ in range(layers)))
        self.head = nn.Linear(width, 1000)

    def forward(self, tokens):
        return self.head(self.layers(self.tokens(tokens)).mean(1))

    def batch(self, size):
        return torch.randint(0, 30_000, (size, self.length)), torch.randint(0, 1000, (size,))


class Convolutional(nn.Module):
    def __init__(self, widths, side):
        super().__init__()
        self.side = side
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inside, outside, 3, 2, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
                nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            )
            for inside, outside in zip((3, *widths), widths, strict=False)
        )
        self.again = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for width in widths)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, hidden):
        for stage, again in zip(self.stages, self.again, strict=True):
            hidden = stage(hidden)
            hidden = hidden + again(hidden)
        return self.head(hidden.mean((2, 3)))

    def batch(self, size):
        return torch.randn(size, 3, self.side, self.side), torch.randint(0, 1000, (size,))


NETWORKS = {
    "encoder, 12 × 768, 128 tokens": partial(Encoder, 12, 768, 128),
    "encoder, 12 × 768, 512 tokens": partial(Encoder, 12, 768, 512),
    "encoder, 6 × 512, 256 tokens": partial(Encoder, 6, 512, 256),
    "encoder, 4 × 1024, 1024 tokens": partial(Encoder, 4, 1024, 1024),
    "convolutions to 512, 224²": partial(Convolutional, (64, 128, 256, 512), 224),
    "convolutions to 1024, 128²": partial(Convolutional, (96, 192, 384, 1024), 128),
    "convolutions to 256, 320²": partial(Convolutional, (32, 64, 256), 320),
    "convolutions to 384, 64²": partial(Convolutional, (48, 96, 192, 384), 64),
}


@dataclass(frozen=True)
class Found:
    """One search.

    Args:
        trials: Number of trials.
        failures: Those that did not fit.
        share: The size found over the largest that fits.
        unused: Share of the bytes left at the size found, of those between resident memory and budget.
        is_kept: Whether the promise is kept: within 1 % of the largest, or at most 2 % of the bytes
            (or one sample's share) unused.
    """

    trials: int
    failures: int
    share: float
    unused: float
    is_kept: bool


def traced(make):
    """Return the peaks of a network, and a function from the budget to the error of predictions."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    step = TrainingStep(model, optimizer, loss, model.batch, torch.bfloat16)
    estimate = MemoryEstimate.of(step, Gpu())
    return Peaked(cache(estimate.peaks)), partial(error_of_peaks, step, estimate)


@dataclass(frozen=True)
class Peaked:
    peaks: Callable[[int], Peaks]


def off(true, sign):
    """Return predictions with errors of one sign."""

    def peaks(size):
        found = true.peaks(size)
        requested = int(found.requested * (1 + sign * REQUESTED_ERROR))
        return replace(
            found,
            requested=requested,
            reserved=int(found.reserved * (1 + sign * RESERVED_ERROR)),
        )

    return Peaked(peaks)


def largest(true, budget):
    """Return the largest size that fits, of those up to 4 % above the first limit."""
    low, high = 1, 2
    while true.peaks(high).reserved <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if true.peaks(middle).reserved <= budget else (low, middle)
    above = range(low, int(1.04 * low) + 2, max(1, low // 400))
    return max(size for size in above if true.peaks(size).reserved <= budget)


def on_replay(true, predicted, budget, error=None):
    """Search one replayed curve; without predictions if there are none."""
    resident = true.peaks(1).requested // 2  # parameters and a part of the state

    def trial(size):
        peaks = true.peaks(size)
        if peaks.reserved > budget:
            return Trial(size, Outcome.OUT_OF_MEMORY, resident=resident)
        measured = {"allocated": peaks.allocated, "requested": peaks.requested}
        return Trial(size, Outcome.FIT, peak=peaks.reserved, resident=resident, **measured)

    return found(search(trial, 8, budget, predicted, error), largest(true, budget), budget)


def on_measured(curve, start, predicted=None, error=None):
    """Search one measured curve; without predictions if there are none."""

    def trial(size):
        if not curve.fits(size):
            return Trial(size, Outcome.OUT_OF_MEMORY, resident=curve.resident)
        measured = {"peak": curve.peak(size), "allocated": curve.allocated(size)}
        if predicted:
            requested = curve.requested(size)
            measured["requested"] = requested or predicted.peaks(size).requested
        return Trial(size, Outcome.FIT, resident=curve.resident, **measured)

    trials = search(trial, start, curve.budget, predicted, error)
    return found(trials, curve.largest, curve.budget)


def search(trial, start, budget, predicted, error):
    """Return the trials of a search, guided by predictions as long as trials confirm them."""
    bare, trials, size = GuidedBisection(), [], start
    guided = EstimatedSearch(predicted, bare.resolution, error) if predicted else None
    while size is not None:
        trials.append(trial(size))
        if guided is not None and guided.is_trusted(trials):
            size = guided.propose(trials, high=HIGH, budget=budget)
        else:
            size = bare.propose(trials, start=start, high=HIGH, budget=budget)
    return trials


def predicted_curves():
    """Yield the peaks predicted for each measured curve and their error.

    Nothing without timm and transformers.
    """
    if not all(map(importlib.util.find_spec, ("timm", "transformers"))):
        return
    import estimate

    of_trainer = {
        "GPT-2, 512 tokens": estimate.text(512, estimate.gpt2),
        "ViT-B": estimate.NETWORKS["timm vit_base_patch16_224"],
        "ResNet-50": estimate.NETWORKS["timm resnet50"],
    }
    before = 0  # bytes of the network that ran before in the same process
    for curve in measured_curves():
        name = curve.name.partition(", bf16")[0]
        in_trainer = curve.name.endswith("Lightning")
        network = (of_trainer if in_trainer else estimate.SEARCHES)[name]
        of = estimate.predicted(network, in_trainer=in_trainer)
        before = 0 if in_trainer else before
        peaks = Peaked(partial(_as_recorded, curve, before, cache(of.estimate.peaks)))
        yield curve, peaks, of.band.share_at(curve.budget)
        model = network.make()
        before = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def _as_recorded(curve, before, peaks, size):
    """Return predicted peaks, with what was held besides in some trials: requested bytes show it."""
    of, requested = peaks(size), curve.requested(size)
    extra = (0, before if requested else 0)
    held = min(extra, key=lambda each: abs(of.requested + each - (requested or 0)))
    fields = ("requested", "allocated", "reserved")
    return replace(of, **{field: getattr(of, field) + held for field in fields})


def found(trials, most, budget):
    best = max((trial for trial in trials if trial.fits), key=lambda trial: trial.batch_size)
    share = best.batch_size / most
    unused = (budget - best.peak) / (budget - best.resident)
    is_kept = share >= 0.99 or unused <= max(0.02, 1 / best.batch_size)
    return Found(len(trials), sum(not trial.fits for trial in trials), share, unused, is_kept)


def row(name, results):
    trials = sorted(result.trials for result in results)
    return [
        name,
        str(len(results)),
        f"{statistics.mean(trials):.2f}",
        str(trials[int(0.9 * (len(trials) - 1))]),
        f"{statistics.mean(result.failures for result in results):.2f}",
        f"{statistics.mean(not result.failures for result in results):.0%}",
        f"{min(result.share for result in results):.3f}",
        f"{statistics.mean(result.share >= 0.99 for result in results):.0%}",
        f"{statistics.mean(result.is_kept for result in results):.0%}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two networks and two budgets")
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    networks = list(NETWORKS)[::4] if given.quick else list(NETWORKS)
    budgets = BUDGETS[::6] if given.quick else BUDGETS
    measured = [on_measured(curve, start) for curve in measured_curves() for start in starts(curve)]
    bare, guided = [], []
    for name in networks:
        true, error = traced(NETWORKS[name])
        predicted = off(true, 1), off(true, -1)
        bare += [on_replay(true, None, budget) for budget in budgets]
        guided += [
            on_replay(true, predicted[at % 2], each, error(each)) for at, each in enumerate(budgets)
        ]
        for kind, results in (("measured", bare), ("predicted", guided)):
            last = results[-len(budgets) :]
            said = (f"{r.trials}/{r.failures}/{r.share:.3f}" for r in last)
            print(f"{name}, by {kind} memory:", *said, flush=True)
    foretold = [
        on_measured(curve, start, predicted, error)
        for curve, predicted, error in (() if given.quick else predicted_curves())
        for start in starts(curve)
    ]
    header = ["curves", "searches", "trials", "90 % within", "did not fit", "none failed"]
    rows = [
        row("measured, by measured memory", measured),
        *([row("measured, by predicted memory", foretold)] if foretold else []),
        row("replayed, by measured memory", bare),
        row("replayed, by predicted memory", guided),
    ]
    text = (
        f"Computed on {machine()}.\n\n"
        f"{table([*header, 'found / largest, least', '0.99 or more', 'that, or 2 % of the bytes'], rows)}"
    )
    print(text)
    if given.markdown:
        renew(given.markdown, "replays.py", text)


if __name__ == "__main__":
    main()
