"""Tune a loop of nearly 1 MiB per sample to 96 MiB more than this process has, and train with the plan.

Prints the size, the limit and the peak of the memory of this process, in bytes.
"""

from __future__ import annotations

import threading

import torch

import autobatch
from autobatch._memory.host import HostProbe

torch.set_num_threads(1)
WEIGHTS = torch.ones(4, 2**15, requires_grad=True)


def train(batch_size):
    while True:
        values = torch.ones(batch_size, 1)
        for weight in WEIGHTS:
            values = torch.tanh(values * weight)  # keeps two tensors for the backward pass
        values.mean().backward()
        WEIGHTS.grad = None
        yield


def find(limit, **options):
    return autobatch.find(
        train, memory_limit=limit, prefer="largest", timing_seconds=0, verbose=False, **options
    )


def peak_of(steps):
    """Return the largest memory in steps, read by another thread all the time."""
    probe, readings, is_over = HostProbe(), [], threading.Event()

    def watch():
        while not is_over.wait(0.0002):
            readings.append(probe.read().reserved)

    watching = threading.Thread(target=watch)
    watching.start()
    loop = train(size)
    for _ in range(steps):
        next(loop)
    is_over.set()
    watching.join()
    return max(readings)


find("100GiB", max_micro_batch_size=1)  # imports what a run needs
limit = HostProbe().read().reserved + 96 * 2**20
size = find(limit).plan.micro_batch_size
print(size, limit, peak_of(4))
