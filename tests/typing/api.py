"""The public calls as users write them: never run, only read by mypy."""

from __future__ import annotations

from collections.abc import Generator, Iterator  # noqa: TC003 -- as users write it
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

import autobatch
from autobatch import (
    AutoBatch,
    AutobatchError,
    BatchPlan,
    Bisection,
    DoesNotFitError,
    Estimate,
    GuidedBisection,
    MemoryProbe,
    MemoryReading,
    NoiseReading,
    NoiseScale,
    Outcome,
    ProbeError,
    ShortTrialError,
    Trial,
    TuningReport,
    sinks,
)
from autobatch.errors import FixedBatchSizeError
from autobatch.report import (
    CurvePoint,
    Device,
    EffectiveRow,
    Latency,
    LearningRateRule,
    LineFit,
    Loading,
    Look,
    Optimum,
    Settings,
    SpeedRow,
    StepTimes,
    Stream,
    StreamRow,
)
from autobatch.testing import PaperDevice, SimulatedAccelerator

model = nn.Linear(64, 10)
optimizer = torch.optim.AdamW(model.parameters())


# Workloads, in each of the accepted forms


def train(batch_size: int, accumulate: int) -> Iterator[None]:
    yield


def counting(batch_size: int, accumulate: int) -> Generator[int]:
    yield batch_size


def plain(batch_size: int) -> Iterator[None]:
    yield


def step(batch_size: int) -> None: ...


paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

for report in (
    autobatch.find(train),
    autobatch.find(counting, target_batch_size=4096, dataset_size=50_000),
    autobatch.find(plain, memory_limit="10GiB", max_micro_batch_size=64),
    autobatch.find(step, memory_limit=2**30, steps_per_trial=5, time_limit=None),
    autobatch.find(train, search=Bisection(), restore=[model, optimizer]),
    autobatch.find(train, search=GuidedBisection(resolution=0.05), device="cuda:1"),
    autobatch.find(train, plan=BatchPlan(32, 8, 1), device=SimulatedAccelerator("2GiB")),
    autobatch.find(paper.workload, plan="autobatch.json", device=paper),
    autobatch.find(train, plan=Path("autobatch.json")),
    autobatch.find(step, latency_limit=1 / 30, percentile=99.9),
):
    assert_type(report, TuningReport)


# An estimate


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.as_tensor(model(batch).mean())


for estimated in (
    autobatch.estimate(model, loss, torch.zeros(2, 64), device="H100"),
    autobatch.estimate(model, loss, [1], optimizer=optimizer, precision="bf16-mixed"),
    autobatch.estimate(model, loss, {}, optimizer=torch.optim.SGD, device=2**34, accumulate=4),
):
    assert_type(estimated, Estimate)
    assert_type(estimated.largest.low, int)
    assert_type(estimated.at(64).reserved.high, int)
    assert_type(estimated.untested, tuple[str, ...])


# The report

found = TuningReport.read("autobatch.json")
assert_type(TuningReport.from_json(found.to_json()), TuningReport)
assert_type(found.plan, BatchPlan)
assert_type(found.plan.micro_batch_size, int)
assert_type(found.plan.accumulate_grad_batches, int)
assert_type(found.plan.world_size, int)
assert_type(found.plan.effective_batch_size, int)
assert_type(found.budget, int)
assert_type(found.largest_fit, int | None)
for trial in found.trials:
    assert_type(trial, Trial)
    assert_type(trial.batch_size, int)
    assert_type(trial.outcome, Outcome)
    assert_type(trial.fits, bool)
    assert_type(trial.peak, int | None)
    assert_type(trial.step_seconds, float | None)

assert_type(found.settings, Settings)
assert_type(found.device, Device)
assert_type(found.curve, tuple[CurvePoint, ...])
assert_type(found.look, Look | None)
assert_type(found.loading, Loading | None)
assert_type(found.learning_rate, LearningRateRule | None)
assert_type(found.latencies, tuple[Latency, ...])
assert_type(found.sizes, tuple[SpeedRow, ...])
assert_type(found.pace, StepTimes)
assert_type(found.fit, LineFit | None)
assert_type(found.effective, tuple[EffectiveRow, ...])
assert_type(found.optimum, Optimum | None)
assert_type(found.stream(30), Stream)
assert_type(found.stream(30).best, StreamRow | None)
assert_type(found.knee, int | None)
assert_type(found.cameras(30), int)
for row in found.stream(29.97).rows:
    assert_type(row.worst_seconds, float)
    assert_type(row.is_stable, bool)
for latency in found.latencies:
    assert_type(latency.p99_seconds, float)

sinks.console(found)
sinks.log(found)
sinks.json_file("autobatch.json")(found)
sinks.markdown_file(Path("autobatch.md"))(found)


def my_sink(report: TuningReport) -> None: ...


every_sink: list[sinks.Sink] = [sinks.console, sinks.log, my_sink]


# The callback

callback = AutoBatch(target_batch_size=256)
assert_type(callback.report, TuningReport | None)
AutoBatch(
    target_batch_size=256,
    memory_limit="10GiB",
    max_micro_batch_size=64,
    plan="autobatch.json",
    steps_per_trial=5,
    time_limit=60.0,
    search=Bisection(),
    device=SimulatedAccelerator("2GiB", foreign="1GiB"),
    batch_arg_name="micro_batch_size",
    evaluate=True,
)
assert_type(callback.reports, dict[str, TuningReport])
AutoBatch(latency_limit=0.1, percentile=95)


# The noise scale

noise = NoiseScale(every=5, split_every=20)
assert_type(noise.reading, NoiseReading)
with autobatch.noise_scale(model, micro_batch_size=8) as watch:
    assert_type(watch.reading, NoiseReading)
assert_type(noise.reading.samples, float | None)


# A search of one's own


class Ladder:
    def propose(self, trials: Any, *, start: int, high: int, budget: int) -> int | None:
        return start if not trials else None


autobatch.find(train, search=Ladder())


# What may be raised

try:
    autobatch.find(train)
except DoesNotFitError:
    pass
except (ShortTrialError, ProbeError, FixedBatchSizeError):
    pass
except AutobatchError:
    pass


def memory_in_use(probe: MemoryProbe) -> int:
    reading = probe.read()
    assert_type(reading, MemoryReading)
    return reading.used
