"""Compare ways to find a batch size on one GPU: their results, their cost, and the value of the plan.

    python benchmarks/gpu.py [--device cuda] [--memory 8GiB full] [--json PATH] [--markdown PATH] [--brief]

Three networks in bf16, made here so that nothing is fetched: a ResNet-50, a transformer like the smallest GPT-2, a U-Net;
and one each of timm, transformers and torchvision, where they are installed. Then predicted peaks of six others of these.
Every method may use the same memory: autobatch as its budget, the others under a cap of torch's allocator. Results are
written after each network, and after each method.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from pages import renew, table
from torch.utils.data import DataLoader, Dataset
from workloads import BRIEF, NETWORKS, OF_OTHERS, UNSEEN, Place, fresh, installed, surroundings

import autobatch
from autobatch import _settings
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.tracer import TrainingStep

START = 8  # the batch size that every method starts from, where it takes one
GOAL = 0.97  # of the budget used at the size found


@dataclass(frozen=True)
class Size:
    """Extent of the benchmark."""

    networks: dict
    predicted: dict  # networks whose peaks are predicted
    memory: tuple[str, ...]
    steps: int  # at the size that autobatch found
    steps_of_others: int
    updates: int  # timed of each plan, and of training with NoiseScale
    timing_seconds: float  # of the whole tuning, at most


FULL = Size(NETWORKS | installed(OF_OTHERS), installed(UNSEEN), ("8GiB",), 200, 20, 10, 20.0)
QUICK = Size(BRIEF, BRIEF, ("6MiB",), 5, 2, 3, 1.0)
SIZES_PREDICTED = (8, 32, 96)


@dataclass
class Row:
    """Result of one method on one network.

    Args:
        method: Its name.
        found: The batch size, if it returned one.
        trials: Sizes it ran.
        ooms: Times it ran out of memory during the search; for autobatch, repeated allocations count too.
        seconds: Of the search, without timing a speed curve.
        whole: Seconds of the whole tuning, with that.
        used: The peak at the size found, as a share of the allowed memory; None if that did not run.
        steps: Steps run at the size found.
        ooms_in_steps: Times memory ran out in them.
        said: The reason if it returned none or could not run.
    """

    method: str
    found: int | None = None
    trials: int = 0
    ooms: int = 0
    seconds: float = 0.0
    whole: float = 0.0
    used: float | None = None
    steps: int = 0
    ooms_in_steps: int = 0
    said: str = ""


@dataclass
class Result:
    """All about one network."""

    network: str
    rows: list[Row] = field(default_factory=list)
    plan: dict | None = None  # throughput of the plan, and of batches of an eighth
    noise_scale: dict | None = None  # cost of measuring it


class Numbers(Dataset):
    """A data set without data: steps make their own."""

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        return index


def lightning():
    for name in ("pytorch_lightning", "lightning.pytorch"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return None


def module_of(pl, model, ran):
    """The network as a LightningModule; `ran` gets each size that a training starts with."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model
            self.batch_size = START

        def train_dataloader(self):
            return DataLoader(Numbers(), self.batch_size)

        def training_step(self, batch, _):
            ran.add(len(batch))
            return self.net.loss(len(batch), self.device.type)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-4)

    return Module()


def trainer(pl, place, **options):
    return pl.Trainer(
        accelerator="gpu" if place.is_cuda else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Lightning's finder keeps a checkpoint of the model there while it searches
        default_root_dir=tempfile.gettempdir(),
        **options,
    )


# Ways to find a batch size; each gives the size and the sizes it ran


def by_autobatch(place, model, _):
    pl = needs("Lightning", lightning())
    ran = set()
    probe = place.probe()
    tuner = autobatch.AutoBatch(memory_limit=place.memory, device=probe)
    report = tuner.tune(trainer(pl, place), module_of(pl, model, ran))
    refused = sum(trial.outcome == "out_of_memory" for trial in report.trials)
    print(f"guided {report.guide}", flush=True)
    return report.largest_fit, len(report.trials), refused, report.timing_seconds


def by_lightning(place, model, _, mode):
    pl = needs("Lightning", lightning())
    ran = set()
    tuner = importlib.import_module(f"{pl.__name__}.tuner").Tuner(trainer(pl, place))
    with place.capped() as usage:
        usage.attach(model)
        found = tuner.scale_batch_size(module_of(pl, model, ran), mode=mode)
        return found, len(ran), usage.ooms, 0.0


def by_accelerate(place, model, at_most):
    if importlib.util.find_spec("accelerate") is None:
        raise MissingError("accelerate is not installed")
    from accelerate.utils import find_executable_batch_size

    ran = []
    # It only ever goes down
    start = 1 << (2 * at_most - 1).bit_length()

    @find_executable_batch_size(starting_batch_size=start)
    def run(batch_size):
        ran.append(batch_size)
        _, train = fresh(place, lambda: model)
        steps = train(batch_size, 1)
        for _ in range(3):
            next(steps)
        return batch_size

    with place.capped() as usage:
        usage.attach(model)
        return run(), len(ran), usage.ooms, 0.0


METHODS = {
    "autobatch": by_autobatch,
    "Lightning, power": lambda *given: by_lightning(*given, mode="power"),
    "Lightning, binsearch": lambda *given: by_lightning(*given, mode="binsearch"),
    "accelerate": by_accelerate,
}


class MissingError(Exception):
    """A method cannot run on this machine."""


def needs(what, found):
    if found is None:
        raise MissingError(f"{what} is not installed")
    return found


def searched(place, build, method, at_most, size):
    """Return the row of a method, before its size is run."""
    row = Row(method)
    model = build().to("cpu")
    timing = 0.0
    _settings.TIMING_SECONDS = size.timing_seconds
    began = time.perf_counter()
    try:
        row.found, row.trials, row.ooms, timing = METHODS[method](place, model, at_most)
    except MissingError as missing:
        row.said = str(missing)
    except Exception as error:  # an exception of another package is its result
        row.said = f"{type(error).__name__}: {error}".partition("\n")[0]
    row.whole = time.perf_counter() - began
    row.seconds = row.whole - timing
    _settings.TIMING_SECONDS = 0.0
    return row


def run(place, build, row, steps):
    """Train at the size found, in the same memory, and as the method would: in a Trainer, or in a plain loop."""
    plain = row.method == "accelerate"
    clean(place)  # the search's own model is not to take room of the training
    with place.capped() as usage:
        try:
            if plain:
                _, train = fresh(place, build)
                loop = train(row.found, 1)
                for _ in range(steps):
                    next(loop)
                    row.steps += 1
            else:
                row.steps = fitted(place, build, row.found, steps, usage)
        except torch.OutOfMemoryError:
            row.said = "out of memory in training"
        else:
            row.used = usage.peak / place.memory
        row.ooms_in_steps = usage.ooms


def fitted(place, build, batch_size, steps, usage):
    """Steps of a fit."""
    pl = lightning()
    model = build()
    usage.attach(model)
    module = module_of(pl, model, set())
    module.batch_size = batch_size
    fit = trainer(pl, place, max_steps=steps)
    fit.fit(module)
    return fit.global_step


# What a plan is worth


def updates(place, loop, count):
    """Median seconds of an update."""
    taken = []
    for _ in range(count):
        began = place.clock()
        next(loop)
        taken.append(place.clock() - began)
    return statistics.median(taken)


def plan_against_small_batches(place, build, size):
    """Samples per second of the plan for a target, and of the same target by batches of an eighth."""
    _, train = fresh(place, build)
    largest = autobatch.find(
        train, device=place.probe(), memory_limit=place.memory
    ).plan.micro_batch_size
    target = 2 * max(8, largest // 8 * 8)
    _settings.TIMING_SECONDS = min(5.0, size.timing_seconds)
    report = autobatch.find(
        train, device=place.probe(), memory_limit=place.memory, target_batch_size=target
    )
    _settings.TIMING_SECONDS = 0.0
    plan = report.plan
    small = max(1, plan.micro_batch_size // 8)
    patterns = {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches),
        "eighth": (small, plan.effective_batch_size // small),
    }
    told = {"target": target, "effective": plan.effective_batch_size}
    for name, (micro, accumulate) in patterns.items():
        with place.capped(), contextlib.closing(train(micro, accumulate)) as loop:
            updates(place, loop, 2)
            seconds = updates(place, loop, size.updates)
        told[name] = {
            "micro_batch_size": micro,
            "accumulate": accumulate,
            "samples_per_second": micro * accumulate / seconds,
        }
    told["ratio"] = told["plan"]["samples_per_second"] / told["eighth"]["samples_per_second"]
    return told


def noise_scale_overhead(place, build, plan, size):
    """Seconds of an update with the noise scale measured, beside those without, in turns."""
    micro = max(1, plan["micro_batch_size"] // 2)
    model, train = fresh(place, build)
    ratios = []
    with place.capped(), contextlib.closing(train(micro, 4)) as loop:
        updates(place, loop, 2)
        for _ in range(3):
            began = place.clock()
            for _ in range(size.updates):
                next(loop)
            plain = place.clock() - began
            with autobatch.noise_scale(model, micro_batch_size=micro):
                began = place.clock()
                for _ in range(size.updates):
                    next(loop)
                measured = place.clock() - began
            ratios.append(measured / plain - 1)
    return {
        "micro_batch_size": micro,
        "accumulate": 4,
        "extra_time": statistics.median(ratios),
        "of_each_turn": ratios,
    }


# Predicted peaks


@dataclass(frozen=True)
class Prediction:
    """Peak of three steps at a batch size, in bytes: reserved ones on CUDA, requested ones elsewhere."""

    network: str
    batch_size: int
    predicted: int
    measured: int


def predictions(place, name, build):
    """Yield predicted and measured peaks, from small sizes to the first that runs out of memory."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    step = TrainingStep(
        model, optimizer, lambda model, size: model.loss(size, "cpu"), int, torch.bfloat16
    )
    estimate = MemoryEstimate.of(step, place.probe().gpu())
    del model, optimizer, step
    for batch_size in SIZES_PREDICTED:
        clean(place)
        with place.capped() as usage:
            model, train = fresh(place, build)
            usage.attach(model)
            try:
                with contextlib.closing(train(batch_size, 1)) as loop:
                    for _ in range(3):
                        next(loop)
            except torch.OutOfMemoryError:
                return
            peaks = estimate.peaks(batch_size)
            yield Prediction(name, batch_size, peaks.reserved, usage.peak)
        del model, train, loop


def predicted_page(rows):
    header = ["network", "batch", "predicted, MiB", "measured, MiB", "error"]
    cells = [
        [row.network, str(row.batch_size)]
        + [f"{nbytes / 2**20:,.1f}" for nbytes in (row.predicted, row.measured)]
        + [f"{row.predicted / row.measured - 1:+.2%}"]
        for row in rows
    ]
    return "\n\n".join(["Peaks of networks, predicted without running them:", table(header, cells)])


# All of it


def benchmark(place, name, size, keep):
    """Everything about a network; `keep` is called whenever there is more of it."""
    build = size.networks[name]
    result = Result(name)
    at_most = START
    for method in METHODS:
        row = searched(place, build, method, at_most, size)
        if row.found is not None:
            own = method == "autobatch"
            at_most = row.found if own else at_most
            run(place, build, row, size.steps if own else size.steps_of_others)
        result.rows.append(row)
        keep(result)
        clean(place)
        print(f"{name}: {row}", flush=True)
    for what, measure in (
        ("plan", lambda: plan_against_small_batches(place, build, size)),
        (
            "noise_scale",
            lambda: noise_scale_overhead(place, build, result.plan["plan"], size),
        ),
    ):
        try:
            setattr(result, what, measure())
        except Exception as error:  # the other numbers are worth having all the same
            setattr(result, what, None)
            print(f"{name}, {what}: {type(error).__name__}: {error}", flush=True)
        keep(result)
        clean(place)
        print(f"{name}: {what} {getattr(result, what)}", flush=True)
    return result


def clean(place):
    gc.collect()
    if place.is_cuda:
        torch.cuda.empty_cache()


# Tables


def page(told, memory, results):
    where = ", ".join(f"{name} {version}" for name, version in told.items())
    parts = [
        f"Measured on {where}; {memory / 2**30:.3g} GiB for every method.",
        table(
            [
                "network and method",
                "found",
                "sizes tried",
                "out of memory",
                "seconds",
                "with timing",
                "memory used",
                "steps then",
                "out of memory",
            ],
            [cells(result, row) for result in results for row in result.rows],
        ),
    ]
    plans = [result for result in results if result.plan]
    if plans:
        parts.append(
            table(
                [
                    "network",
                    "plan",
                    "samples/s",
                    "in eighths",
                    "samples/s",
                    "ratio",
                    "NoiseScale takes",
                ],
                [plan_cells(result) for result in plans],
            )
        )
    own = [row for result in results for row in result.rows if row.used is not None]
    own = [row for row in own if row.method == "autobatch"]
    met = sum(row.used >= GOAL and not row.ooms_in_steps for row in own)
    parts.append(
        f"Goal, {GOAL:.0%} of the memory used and never out of memory in the steps: met for {met} of {len(own)} networks."
    )
    return "\n\n".join(parts)


def cells(result, row):
    name = f"{result.network}, {row.method}"
    if row.found is None:
        return [name, row.said or "none", *[""] * 7]
    used = row.said if row.used is None else f"{row.used:.1%}"
    seconds = (f"{row.seconds:.1f}", f"{row.whole:.1f}")
    counts = (row.found, row.trials, row.ooms, *seconds, used)
    return [name, *map(str, counts), str(row.steps), str(row.ooms_in_steps)]


def plan_cells(result):
    told = [result.network]
    for name in ("plan", "eighth"):
        part = result.plan[name]
        told += [
            f"{part['micro_batch_size']} × {part['accumulate']}",
            f"{part['samples_per_second']:,.0f}",
        ]
    overhead = result.noise_scale
    extra = f"{overhead['extra_time']:+.1%}" if overhead else ""
    return [*told, f"{result.plan['ratio']:.2f}", extra]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--memory", nargs="+", help="memory for every method (8GiB), one run each; or full"
    )
    parser.add_argument("--only", help="one network, by its name")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables into this page")
    parser.add_argument(
        "--brief", action="store_true", help="small networks, few steps: that it runs"
    )
    return parser.parse_args()


def main():
    given = arguments()
    size = QUICK if given.brief else FULL
    places = [Place.named(given.device, memory) for memory in given.memory or size.memory]
    warnings.simplefilter("ignore")
    lightning()  # which sets its logger's level when it is imported
    gc.freeze()  # what was imported is not looked through after every failure
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    importlib.import_module("autobatch.sinks").console = lambda _: None
    _settings.TIMING_SECONDS = 0.0
    told = surroundings(places[0])
    results = {place.memory: {} for place in places}
    predicted = []

    def text():
        parts = [page(told, memory, list(of.values())) for memory, of in results.items() if of]
        return "\n\n".join([*parts, *([predicted_page(predicted)] if predicted else [])])

    def keep(place, result):
        if result is not None:
            results[place.memory][result.network] = result
        if given.json:
            numbers = {
                "surroundings": told,
                "results": {
                    memory: [asdict(each) for each in of.values()] for memory, of in results.items()
                },
                "predicted": [asdict(each) for each in predicted],
            }
            given.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
        if given.markdown:
            renew(given.markdown, "gpu.py", text())

    for place in places:
        for name in [given.only] if given.only else size.networks:
            benchmark(place, name, size, partial(keep, place))
    for name, build in [] if given.only and not given.brief else size.predicted.items():
        try:
            predicted += predictions(places[-1], name, build)
        except UntraceableError as error:
            print(f"{name}: {error}", flush=True)
        keep(places[-1], None)
    print(f"\n{text()}")


if __name__ == "__main__":
    main()
