"""Measure the cost of autobatch: tuning against Lightning's search, import, training after it, copies, growth.

    python benchmarks/overhead.py [--quick] [--json PATH] [--markdown PATH]

Every number is the median of several runs, in turns with its counterpart, in CPU time of the process, which a busy
machine changes little. Networks train on an accelerator that counts every tensor byte.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import contestants
import pytorch_lightning as pl
import torch
from contestants import trainer
from pages import machine, renew, table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import autobatch
import networks
from autobatch import _settings
from autobatch._trials.snapshot import Snapshot
from autobatch.testing import SimulatedAccelerator

MIB = 2**20
IMPORT_GOAL = 0.050  # seconds
TRAINING_GOAL = 0.01  # share
BINSEARCH_GOAL = 1.0  # share of its time


@dataclass(frozen=True)
class Size:
    """Extent of the benchmark."""

    repeats: int
    updates: int  # of a training that is timed
    widths: tuple[int, ...]  # of networks that are copied
    lengths: tuple[int, ...]  # of data sets
    batches: tuple[int, ...]  # largest that fit
    kinds: tuple[networks.Kind, ...] = networks.KINDS  # of networks that are tuned


FULL = Size(
    9,
    60,
    (256, 512, 1024, 2048),
    (10**3, 10**4, 10**5, 10**6, 10**7),
    (10**2, 10**3, 10**4, 10**5),
)
QUICK = Size(1, 10, (256, 512), (10**3, 10**5), (10**2, 10**3), networks.KINDS[2:3])


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        what: Name of the measurement.
        value: In words.
        goal: The target value; empty if there is none.
        numbers: Every run of it.
    """

    what: str
    value: str
    goal: str
    numbers: tuple[float, ...]


# Importing


def importing(size):
    """Seconds that `import autobatch` adds to starting the interpreter."""

    def seconds(code):
        before = _children()
        subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 -- our own code
        return _children() - before

    pairs = [(seconds("import autobatch"), seconds("pass")) for _ in range(size.repeats)]
    added = [with_it - without for with_it, without in pairs]
    met = statistics.median(added) <= IMPORT_GOAL
    return Row(
        "`import autobatch`, CPU time on top of the interpreter",
        f"{statistics.median(added) * 1e3:.1f} ms",
        f"≤ {IMPORT_GOAL * 1e3:.0f} ms: {'met' if met else 'missed'}",
        tuple(added),
    )


def _children():
    """CPU seconds of the processes that have ended."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# Tuning


def tuning_against_binsearch(size):
    """CPU time of all of `AutoBatch(prefer="largest").tune`, against the search of Lightning.

    Both look for the largest size in a Trainer, with three steps per trial and within the same
    bytes, and no other limit of theirs decides. `AutoBatch` also times sizes for its report.
    """
    gc.freeze()  # what was imported is not looked through after every failure
    shares = {
        kind.name: [_of_binsearch(kind, turn) for turn in range(max(1, size.repeats // 2))]
        for kind in size.kinds
    }
    medians = [statistics.median(each) for each in shares.values()]
    goal = f"≤ {BINSEARCH_GOAL:g}: {'met' if max(medians) <= BINSEARCH_GOAL else 'missed'}"
    what = "all of tuning, with timing, against Lightning's binsearch"
    return [
        *(
            Row(f"{what}: {name}", f"{statistics.median(each):.2f}", "", tuple(each))
            for name, each in shares.items()
        ),
        Row(
            f"{what}: median of {len(medians)} networks, and the most",
            f"{statistics.median(medians):.2f}, {max(medians):.2f}",
            goal,
            tuple(medians),
        ),
    ]


def _of_binsearch(kind, turn):
    data = networks.data_of(kind.make)
    budget = sum(networks.peak_in_a_trainer(kind.make, data, kind.true + more) for more in (0, 1))
    pair = [contestants.IN_A_TRAINER, contestants.BINSEARCH]
    seconds = {}
    for each in pair[:: -1 if turn % 2 else 1]:
        result = each.run(networks.Real(kind, data, budget // 2, each.budget_share))
        assert result.found, result.error
        seconds[each.name] = result.seconds + result.further_seconds
        gc.collect()
    ours, theirs = (seconds[each.name] for each in pair)
    return ours / theirs


# Training afterwards


class Network(pl.LightningModule):
    def __init__(self, batch_size):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(64, 512),
            nn.GELU(),
            nn.Linear(512, 512),
            nn.GELU(),
            nn.Linear(512, 10),
        )
        self.batch_size = batch_size
        self.seconds = []  # CPU time of each update
        self.wait = lambda: None  # between updates
        self._last = None

    def training_step(self, batch):
        inputs, labels = batch
        return F.cross_entropy(self.layers(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def end_update(self):
        if self._last is not None:
            self.seconds.append(time.thread_time() - self._last)
        self.wait()
        self._last = time.thread_time()


class Updates(pl.Callback):
    """Ends the updates of training alone: trials run the hooks of the module, and not those of callbacks."""

    def on_train_batch_end(self, trainer, module, *_):  # noqa: ARG002 -- as Lightning calls it
        module.end_update()


class Samples(Dataset):
    """Made when they are read: as many as are asked for."""

    def __init__(self, length):
        self._length = length
        self._inputs = torch.randn(64)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._inputs, index % 10


def _data(batch_size, count=20_000):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 64, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size)


class Deep(Network):
    """1.1 M parameters in many small layers, which stay in the caches: an update takes a while, and alike each time."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        torch.manual_seed(0)
        hidden = [part for _ in range(16) for part in (nn.Linear(256, 256), nn.GELU())]
        self.layers = nn.Sequential(nn.Linear(64, 256), *hidden, nn.Linear(256, 10))


class Idle(Network):
    """A network with next to nothing to compute: the time of an update is that of the loop."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        self.layers = nn.Linear(64, 10)


def training_after(size):
    """CPU time of an update after AutoBatch, against the same plan written by hand."""
    pairs = [_in_turns(Deep, size.updates) for _ in range(3 * size.repeats)]
    ratios = [after / own for after, own in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios))
    met = abs(middle - 1) <= TRAINING_GOAL
    own = statistics.median(own for _, own in pairs)
    idle = [_in_turns(Idle, 5 * size.updates) for _ in range(size.repeats)]
    added = [after - own for after, own in idle]
    base = statistics.median(own for _, own in idle)
    return [
        Row(
            f"an update of {own * 1e3:.0f} ms in training after `AutoBatch`, against the plan written by hand",
            f"×{middle:.3f} ± {error:.3f}",
            f"1.00 ± {TRAINING_GOAL}: {'met' if met else 'missed'}",
            tuple(ratios),
        ),
        Row(
            "what the callback adds to an update that is nothing but the Trainer's loop",
            f"{statistics.median(added) * 1e6:.0f} µs of {base * 1e3:.1f} ms",
            "",
            tuple(added),
        ),
    ]


def _in_turns(kind, updates):
    """Median CPU seconds of an update, after AutoBatch and with its plan by hand: two trainings that take turns."""
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as run:
        turns = Turns()
        tuned, by_hand = kind(32), kind(128)
        # Both train one network, so the position of its memory is the same for both
        by_hand.layers = tuned.layers
        callback = autobatch.AutoBatch(target_batch_size=128, device=SimulatedAccelerator("1GiB"))

        def after():
            tuned.wait = turns.of(0)
            fit(tuned, 32, callbacks=[callback])

        def hand_written():
            by_hand.wait = turns.of(1)
            turns.start(1)
            plan = callback.report.plan
            fit(
                by_hand,
                plan.micro_batch_size,
                accumulate_grad_batches=plan.accumulate_grad_batches,
            )

        def fit(module, batch_size, callbacks=(), **options):
            steps = {"max_epochs": -1, "max_steps": updates + 10}
            try:
                trainer(callbacks=[*callbacks, Updates()], **steps, **options).fit(
                    module, _data(batch_size)
                )
            finally:
                turns.end()

        # On one core, since two are seldom as fast as each other: threads that are yet to start inherit it
        with without_the_curve(), on_one_core():
            for each in [run.submit(after), run.submit(hand_written)]:
                each.result()
    return tuple(statistics.median(each.seconds[10:]) for each in (tuned, by_hand))


class on_one_core:  # noqa: N801 -- reads as what it does
    """Keep threads that start in the body on one core, if the system can."""

    def __enter__(self):
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        if self._cores:
            os.sched_setaffinity(0, {max(self._cores)})

    def __exit__(self, *_):
        if self._cores:
            os.sched_setaffinity(0, self._cores)


class Turns:
    """Two threads, of which one runs at a time."""

    def __init__(self):
        self._may = [threading.Semaphore(0), threading.Semaphore(0)]
        self._ended = False

    def start(self, which):
        """Wait for the other's first turn to end."""
        self._may[which].acquire()

    def of(self, which):
        """Return a function that ends a turn and waits for the next."""

        def wait():
            self._may[1 - which].release()
            if not self._ended:
                self._may[which].acquire()

        return wait

    def end(self):
        """Let the other run on by itself."""
        self._ended = True
        for each in self._may:
            each.release()


def tuning_against_an_epoch(size):
    """Tune for a target, and without one, against one epoch with the plan for the target."""
    shares, searches = [], []
    for _ in range(max(1, size.repeats // 3)):
        module = Network(32)
        loader = _data(32, count=60_000)
        callback = autobatch.AutoBatch(target_batch_size=128, device=SimulatedAccelerator("1GiB"))
        began = time.perf_counter()
        report = callback.tune(trainer(), module, loader)
        whole = time.perf_counter() - began
        plan = report.plan
        module = Network(plan.micro_batch_size)
        began = time.perf_counter()
        trainer(accumulate_grad_batches=plan.accumulate_grad_batches).fit(
            module, _data(plan.micro_batch_size, count=60_000)
        )
        epoch = time.perf_counter() - began
        shares.append(whole / epoch)
        searches.append(_search_seconds(loader) / epoch)
    return [
        Row(
            "tuning for 128 per update, with the speed curve, in epochs of 60,000 samples",
            f"{statistics.median(shares):.2f}",
            "",
            tuple(shares),
        ),
        Row(
            "a search with no target, up to 4,096, without the curve, in the same epochs",
            f"{statistics.median(searches):.2f}",
            "",
            tuple(searches),
        ),
    ]


def _search_seconds(loader):
    """Seconds of a search by itself, without the curve, to 4,096 samples at most."""
    callback = autobatch.AutoBatch(device=SimulatedAccelerator("1GiB"), max_micro_batch_size=4096)
    with without_the_curve():
        began = time.perf_counter()
        callback.tune(trainer(), Network(32), loader)
        return time.perf_counter() - began


def without_the_curve():
    """Measure no throughput curve in the body."""
    return mock.patch.object(_settings, "TIMING_SECONDS", 0.0)


# Copies


def copying(size):
    """Snapshot and restore, against the bytes of a model with AdamW's state."""
    rows = []
    for width in size.widths:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, width)).sum().backward()
        optimizer.step()
        nbytes = Snapshot.bytes_of(model, optimizer)
        taken, given = [], []
        for _ in range(size.repeats):
            with Snapshot() as snapshot:
                began = time.process_time()
                snapshot.capture(model, optimizer)
                taken.append(time.process_time() - began)
                began = time.process_time()
                snapshot.restore()
                given.append(time.process_time() - began)
        rows.append(
            Row(
                f"snapshot and restore of {nbytes / MIB:.0f} MiB",
                f"{statistics.median(taken) * 1e3:.1f} and {statistics.median(given) * 1e3:.1f} ms",
                "",
                (*taken, *given),
            )
        )
    return rows


# How tuning grows


def against_the_data(size):
    """Seconds of a search, up to 256 samples, over the length of the data set."""
    rows = []
    for length in size.lengths:
        seconds = []
        for _ in range(max(1, size.repeats // 3)):
            loader = DataLoader(Samples(length), 32, shuffle=True)
            callback = autobatch.AutoBatch(
                device=SimulatedAccelerator("1GiB"), max_micro_batch_size=256
            )
            with without_the_curve():
                began = time.process_time()
                callback.tune(trainer(), Network(32), loader)
                seconds.append(time.process_time() - began)
        rows.append(
            Row(
                f"a search with {length:,} samples in the data set, CPU time",
                f"{statistics.median(seconds):.2f} s",
                "",
                tuple(seconds),
            )
        )
    return rows


def against_the_batch(size):
    """Seconds of a search, over the largest batch, without the steps themselves."""
    rows = []
    for largest in size.batches:
        seconds = []
        for _ in range(max(1, size.repeats // 3)):
            loader = DataLoader(Samples(10**6), 8)
            module = Still(8, largest)
            callback = autobatch.AutoBatch(
                device=SimulatedAccelerator("1GiB"), max_micro_batch_size=largest
            )
            with without_the_curve():
                began = time.process_time()
                callback.tune(trainer(), module, loader)
                seconds.append(time.process_time() - began)
        rows.append(
            Row(
                f"a search up to a batch of {largest:,}, whose steps take no time, CPU time",
                f"{statistics.median(seconds):.2f} s",
                "",
                tuple(seconds),
            )
        )
    return rows


class Still(Network):
    """Its step costs next to nothing at any size."""

    def __init__(self, batch_size, largest):
        super().__init__(batch_size)
        self.layers = nn.Linear(64, 10)
        self.largest = largest

    def training_step(self, batch):
        inputs, _ = batch
        return (self.layers(inputs[:2]).sum() + inputs.expand(1, -1, -1)[0, 0, 0]) * 0


def page(rows):
    """All of it as text."""
    lines = [[row.what, row.value, row.goal] for row in rows]
    load = (
        ", ".join(f"{each:.1f}" for each in os.getloadavg()) if hasattr(os, "getloadavg") else "?"
    )
    return f"Measured on {machine()}; load of the last 1, 5 and 15 minutes {load}.\n\n{table(['what', 'measured', 'goal'], lines)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    contestants.quiet()
    rows = []
    for part in (
        tuning_against_binsearch,
        importing,
        training_after,
        tuning_against_an_epoch,
        copying,
        against_the_data,
        against_the_batch,
    ):
        measured = part(size)
        new = measured if isinstance(measured, list) else [measured]
        print("".join(f"{row.what}: {row.value}\n" for row in new), end="", flush=True)
        rows += new
    text = page(rows)
    print(f"\n{text}")
    if given.json:
        numbers = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    if given.markdown:
        renew(given.markdown, "overhead.py", text)


if __name__ == "__main__":
    main()
