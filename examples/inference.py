"""Find the largest batch that is answered between two frames of a camera, and the best batch for one camera alone."""

from __future__ import annotations

import torch
from torch import nn

import autobatch
from autobatch.testing import SimulatedAccelerator

model = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
).eval()
model(torch.zeros(1, 3, 64, 64))


def answer(batch_size):
    """Answer one batch after another, with frames that are already in memory."""
    frames = torch.rand(batch_size, 3, 64, 64)
    while True:
        with torch.inference_mode():
            model(frames)
        yield


report = autobatch.find(
    answer,
    latency_limit=1 / 30,  # seconds: the time until the next frame
    percentile=99,
    max_micro_batch_size=64,
    device=SimulatedAccelerator("64MiB"),  # leave this out on a GPU
)
print(report)

print(f"\n{report.cameras(30)} cameras of 30 frames per second in one batch")
print(f"A batch of {report.knee} has nearly all of the throughput")
alone = report.stream(30).best
if alone is not None:
    print(
        f"One camera alone: batches of {alone.batch_size}, "
        f"each frame answered within {1e3 * alone.worst_seconds:.1f} ms"
    )
