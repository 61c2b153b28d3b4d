"""Record the memory readings of a search on a GPU, for tests without one.

    python benchmarks/record.py FOLDER [--device cuda] [--memory 8GiB] [--brief]

Each of three networks is searched, and then run at sizes on the way up to the limit and around it, so that a search that
tries other sizes finds readings near them. Each network has its own file. tests/recordings/h200.json
holds the readings of such files in short.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from workloads import BRIEF, NETWORKS, Place, fresh, surroundings

import autobatch
from autobatch import _settings
from autobatch.testing import Recorder

AROUND = (0.8, 0.9, 0.95, 0.98, 0.99, 1.01, 1.02, 1.05, 1.1, 1.5)  # of the largest fit
KEPT = (
    "allocated_bytes.all.peak",
    "active_bytes.all.peak",
    "requested_bytes.all.peak",
    "inactive_split_bytes.all.peak",
    "segment.all.peak",
    "num_alloc_retries",
    "num_ooms",
    "num_device_alloc",
    "num_device_free",
)


@dataclass(frozen=True)
class Listed:
    """A search that tries given sizes and then ends."""

    sizes: tuple[int, ...]

    def propose(self, trials, *, start, high, budget):  # noqa: ARG002
        return self.sizes[len(trials)] if len(trials) < len(self.sizes) else None


def statistics():
    told = torch.cuda.memory_stats(0) if torch.cuda.is_initialized() else {}
    return {name: told[name] for name in KEPT if name in told}


def ladder(tried, largest):
    """Sizes not tried yet: powers of two on the way up, the last of them half of the largest, and around the largest."""
    wanted = {2**power for power in range(1, largest.bit_length())}
    wanted |= {round(largest * share) for share in AROUND}
    return tuple(sorted(wanted - set(tried)))


def record(place, name, build):
    model, train = fresh(place, build)
    recorder = Recorder(place.probe(), allocator=statistics)
    options = {"device": recorder, "memory_limit": place.memory, "time_limit": 60}
    watched = recorder.watching(train)
    report = autobatch.find(watched, **options)
    tried = [trial.batch_size for trial in report.trials]
    largest = report.plan.micro_batch_size
    for accumulating in (False, True):
        sizes = ladder(() if accumulating else tried, largest)
        if accumulating:  # gradients that live on are a burden of their own
            sizes = tuple(size for size in sizes if size >= largest // 2)
        target = 4 * max(sizes) if accumulating else None
        autobatch.find(watched, **options, search=Listed(sizes), target_batch_size=target)
    del model
    return recorder.recording(
        f"{name}, bf16, AdamW",
        memory_limit=place.memory,
        environment=surroundings(place),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--memory", help="memory for the searches", default=None)
    parser.add_argument("--only", help="one network, by its name")
    parser.add_argument("--brief", action="store_true", help="small networks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    gc.freeze()  # what was imported is not looked through after every trial
    importlib.import_module("autobatch.sinks").console = lambda _: None
    _settings.TIMING_SECONDS = 0.0
    memory = given.memory or ("6MiB" if given.brief else "8GiB")
    place = Place.named(given.device, memory)
    networks = BRIEF if given.brief else NETWORKS
    for name in [given.only] if given.only else networks:
        recording = record(place, name, networks[name])
        path = given.folder / f"{name.lower()}.json"
        recording.write(path)
        fitting = [run.batch_size for run in recording.runs if run.fits]
        print(
            f"{path}: {len(recording.runs)} runs, {max(fitting)} is the largest that fits",
            flush=True,
        )


if __name__ == "__main__":
    main()
