"""Sharded modules in `find`, on each of several real processes; results are saved for each rank.

As torchrun starts it: sharded_cases.py DIRECTORY CASE …
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import partial
from random import Random

import torch
import torch.distributed as dist

import autobatch
from autobatch._distributed.dry import DryCollectives
from autobatch._memory.ledger import Ledger
from autobatch.testing import SimulatedAccelerator
from sharded_models import KINDS, batch, parts, sharded, update
from torchrun import save_results

RANK = int(os.environ.get("RANK", "0"))
ALL_KINDS = (*KINDS, "ddp")
POINTS = 20
CAPACITY = 1_500_000  # bytes
LARGE, SMALL = {"width": 96, "depth": 1}, {"width": 8, "depth": 1}


def peak_of(network, optimizer, size, accumulate=2):
    """Return the most that a ledger holds in an update.

    The least of some: threads of gloo may hold what they have sent a moment longer.
    """
    peaks = []
    for _ in range(3):
        ledger = Ledger()
        ledger.attach(network, optimizer)
        with ledger.watching(None, 0):
            update(network, optimizer, size, accumulate)
        peaks.append(ledger.peak)
    return min(peaks)


def kinds_here():
    """Return the kinds that this number of ranks can have."""
    return [kind for kind in ALL_KINDS if kind != "fsdp2 and tp" or dist.get_world_size() > 2]


def peaks():
    """Return the peak of each kind, really and with dry collectives."""
    found = {}
    for kind in kinds_here():
        network, optimizer = warm(kind)
        real = peak_of(network, optimizer, 8)
        with DryCollectives():
            found[kind] = (real, peak_of(network, optimizer, 8))
    return found


def loop_of(network, optimizer):
    def train(batch_size, accumulate):
        while True:
            update(network, optimizer, batch_size, accumulate)
            yield

    return train


def warm(kind):
    network, optimizer = sharded(kind, **LARGE)
    update(network, optimizer, 4)  # the state of the optimizer exists
    return network, optimizer


def found(kind, capacity, **options):
    network, optimizer = warm(kind)
    report = autobatch.find(
        loop_of(network, optimizer),
        device=SimulatedAccelerator(capacity),
        memory_limit=1.0,
        prefer="largest",
        timing_seconds=0,
        steps_per_trial=1,
        max_micro_batch_size=2000,
        **options,
    )
    return report, network, optimizer


def searched(kind, capacity):
    """Return the size that is found, real peaks there and at the next, and training afterwards."""
    report, network, optimizer = found(kind, capacity)
    size = report.plan.micro_batch_size
    after = [update(network, optimizer, size, 1) for _ in range(2)]
    by_hand = warm(kind)
    expected = [update(*by_hand, size, 1) for _ in range(2)]
    same = after == expected and all(map(torch.equal, parts(network, optimizer), parts(*by_hand)))
    peaks = [peak_of(network, optimizer, each, accumulate=1) for each in (size, size + 1)]
    trials = [(trial.batch_size, str(trial.outcome)) for trial in report.trials]
    return {"size": size, "peaks": peaks, "same": same, "trials": trials, "plan": report.plan}


def timed():
    """Return the curve of sizes timed with real collectives, and updates run on this rank."""
    network, optimizer = sharded("fsdp2", **LARGE)
    updates = [0]

    def train(batch_size, accumulate):
        while True:
            update(network, optimizer, batch_size, accumulate)
            updates[0] += 1
            yield

    report = autobatch.find(
        train,
        device=SimulatedAccelerator(4_000_000),
        max_micro_batch_size=4,
        prefer="largest",
        timing_seconds=60,
    )
    return {"sizes": [each.batch_size for each in report.curve], "updates": updates[0]}


def out_of_memory_on_rank_1(is_time):
    """Return the sizes timed if rank 1 runs out of memory at size 2 in some updates, or the error.

    Args:
        is_time: Whether it does, by the starts of the workload at that size, and whether
            collectives are real.
    """
    network, optimizer = sharded("fsdp2", **LARGE)
    starts = [0]

    def train(batch_size, accumulate):
        starts[0] += batch_size == 2
        while True:
            ranks = torch.ones(1)
            dist.all_reduce(ranks)
            if RANK == 1 and batch_size == 2 and is_time(starts[0], ranks.item() == 2):
                raise torch.OutOfMemoryError("of another process")
            update(network, optimizer, batch_size, accumulate)
            yield

    device = SimulatedAccelerator(4_000_000)
    try:
        report = autobatch.find(train, device=device, max_micro_batch_size=4, timing_seconds=60)
    except (torch.OutOfMemoryError, autobatch.AutobatchError) as error:
        return f"{type(error).__name__}: {error}"
    return [each.batch_size for each in report.curve]


def raising():
    network, optimizer = sharded("fsdp2")

    def train(batch_size, accumulate):
        while True:
            if RANK == 1:
                raise ZeroDivisionError("mine")
            update(network, optimizer, batch_size, accumulate)
            yield

    try:
        autobatch.find(train, device=SimulatedAccelerator(4_000_000))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Holder(torch.nn.Module):
    """A module around a DDP module, as Fabric has it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def nested():
    """Tune a DDP module within another whose step has a collective of its own."""
    inner, optimizer = sharded("ddp", **LARGE)
    network = Holder(inner)

    def train(batch_size, accumulate):
        while True:
            loss = torch.tensor(update(network, optimizer, batch_size, accumulate))
            dist.all_reduce(loss)
            yield

    report = autobatch.find(
        train,
        device=SimulatedAccelerator(2_000_000 - 400_000 * RANK),
        memory_limit=1.0,
        prefer="largest",
        timing_seconds=0,
        steps_per_trial=1,
        max_micro_batch_size=2000,
        search=autobatch.Bisection(resolution=0.2),
    )
    after = [update(network, optimizer, 4, 1) for _ in range(2)]
    by_hand = sharded("ddp", **LARGE)
    expected = [update(*by_hand, 4, 1) for _ in range(2)]
    outcomes = {str(trial.outcome) for trial in report.trials}
    return {"plan": report.plan, "outcomes": outcomes, "same": after == expected}


def refused():
    """Return the sentences that refuse a new group in a step, and a limit on latency."""
    network, optimizer = sharded("fsdp2")

    def grouping(batch_size):
        dist.new_group()
        update(network, optimizer, batch_size)

    def answer(batch_size):
        network(batch(batch_size, 0)[0])

    sentences = []
    for workload, options in ((grouping, {}), (answer, {"latency_limit": 0.1})):
        try:
            autobatch.find(workload, device=SimulatedAccelerator(4_000_000), **options)
        except autobatch.AutobatchError as error:
            sentences.append(str(error))
    return sentences


def failing(kind):
    """Tune again and again, each time out of memory at another allocation of rank 1.

    After each, one update of the module that was tuned and of one that never was: return the
    results of trials, and whether losses and shards agree.
    """
    tuned, by_hand = sharded(kind, **SMALL), sharded(kind, **SMALL)
    ledger, results = Ledger(), []
    update(*tuned, 2)
    with ledger.watching(None, 0):
        update(*by_hand, 2)
    for allocation in Random(kind).sample(range(1, ledger.allocations // 2), POINTS):
        device = SimulatedAccelerator(CAPACITY)
        device.ledger.refuse_at = allocation if RANK == 1 else None
        report = autobatch.find(
            loop_of(*tuned),
            device=device,
            max_micro_batch_size=2,
            timing_seconds=0,
            steps_per_trial=1,
            verbose=False,
        )
        losses = update(*tuned, 2), update(*by_hand, 2)
        pairs = zip(parts(*tuned), parts(*by_hand), strict=True)
        same = losses[0] == losses[1] and all(torch.equal(*pair) for pair in pairs)
        trials = [(trial.batch_size, str(trial.outcome)) for trial in report.trials]
        results.append({"trials": trials, "same": same})
    return results


def main(directory, *names):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = {
        **{each.__name__: each for each in (peaks, timed, raising, nested, refused)},
        "taken": partial(out_of_memory_on_rank_1, lambda starts, _: starts > 1),
        "leaving": partial(out_of_memory_on_rank_1, lambda _, is_real: is_real),
        **{kind: partial(searched, kind, CAPACITY) for kind in ALL_KINDS},
        **{f"{kind}/failing": partial(failing, kind) for kind in ALL_KINDS},
        "less": partial(searched, "fsdp2", CAPACITY - 300_000 * RANK),
    }
    save_results(directory, names, lambda name: cases[name]())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
