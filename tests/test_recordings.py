"""Recordings of searches on simulated devices, and searches on their replay."""

from __future__ import annotations

import json

import pytest
import torch

import autobatch
from autobatch._memory.cuda import CudaProbe
from autobatch.errors import AutobatchError
from autobatch.testing import PaperDevice, Recorder, Recording, ReplayedDevice, SimulatedAccelerator
from conftest import set_curve_seconds
from networks import Perceptron, training
from nvml_standin import GIB, FakeGpu


def recorded(probe, workload, **options):
    recorder = Recorder(probe, allocator=lambda: {"num_ooms": 7})
    report = autobatch.find(recorder.watching(workload), device=recorder, **options)
    recording = recorder.recording(
        "Perceptron", memory_limit=1.0, environment={"torch": torch.__version__}
    )
    return report, recording


def perceptron():
    model = Perceptron()
    return training(model, torch.optim.AdamW(model.parameters()))


@pytest.fixture(scope="module")
def simulated():
    """A search on real tensors, and its recording."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_curve_seconds(monkeypatch, 0.0)
        return recorded(SimulatedAccelerator("600KiB"), perceptron(), memory_limit=1.0)


def on_paper(**options):
    device = PaperDevice(10_000, fixed=100, per_sample=7, **options)
    return recorded(device, device.workload, memory_limit=1.0)


def replayed(recording, **options):
    device = ReplayedDevice(recording)
    options = {"memory_limit": recording.memory_limit} | options
    return autobatch.find(device.workload, device=device, **options)


# Recording


def test_recording_does_not_change_a_search():
    plain = PaperDevice(10_000, fixed=100, per_sample=7)

    report, _ = on_paper()

    without = autobatch.find(plain.workload, device=plain, memory_limit=1.0)
    assert [trial.batch_size for trial in report.trials] == [
        trial.batch_size for trial in without.trials
    ]
    assert report.plan == without.plan


def test_every_trial_is_recorded_with_its_readings(simulated):
    report, recording = simulated

    assert [
        (run.batch_size, run.fits, run.after.peak if run.fits else None) for run in recording.runs
    ] == [(trial.batch_size, trial.fits, trial.peak) for trial in report.trials]
    assert all(run.budget == report.budget for run in recording.runs)
    assert all(run.step_seconds > 0 for run in recording.runs if run.fits)
    assert recording.device == "simulated accelerator"
    assert recording.source == "the ledger of live tensor bytes"
    assert recording.runs[0].allocator == {"num_ooms": 7}


def test_a_run_out_of_memory_is_recorded_as_failed():
    _, recording = recorded(
        SimulatedAccelerator("600KiB"),
        perceptron(),
        memory_limit=1.0,
        search=autobatch.Bisection(resolution=0.2),
    )

    failed = [run for run in recording.runs if not run.fits]
    assert failed
    assert all(run.after.failures > run.before.failures for run in failed)


@pytest.mark.parametrize(("steps", "fits"), [({0}, True), ({1}, False)])
def test_a_run_with_retries_in_the_first_step_only_fits(monkeypatch, tmp_path, steps, fits):
    gpu = FakeGpu().install(monkeypatch)
    recorder = Recorder(CudaProbe(0))

    def train(batch_size, accumulate):
        for step in range(3):
            gpu.cards[0].retries += step in steps
            with gpu.holding(0, GIB):
                yield

    with recorder.limited(6 * GIB):
        assert len(list(recorder.watching(train)(8, 1))) == 3
    recorder.recording("steps", memory_limit=1.0).write(tmp_path / "steps.json")
    (run,) = Recording.read(tmp_path / "steps.json").runs

    assert run.fits is fits
    assert run.ran_out is not fits


def test_memory_of_other_processes_is_recorded_per_run():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        device.foreign += 100
        yield from device.workload(batch_size, accumulate)

    _, recording = recorded(device, train, memory_limit=1.0)

    foreign = [run.after.foreign for run in recording.runs]
    assert foreign == [100 * number for number in range(1, len(foreign) + 1)]


def test_a_refused_size_is_not_recorded_as_out_of_memory():
    device = PaperDevice(10_000, fixed=100, per_sample=3000)

    def train(batch_size, accumulate):
        if batch_size < 3:
            raise ValueError("too few")
        yield from device.workload(batch_size, accumulate)

    _, recording = recorded(device, train, memory_limit=1.0)
    again = ReplayedDevice(recording)

    refused = [run for run in recording.runs if run.batch_size < 3]
    assert refused
    assert not any(run.fits or run.ran_out for run in refused)
    assert again.needs(2, 1) < 9100


def test_a_loop_that_ends_is_restarted_under_the_recorder():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        steps = device.workload(batch_size, accumulate)
        yield next(steps)
        yield next(steps)

    report, recording = recorded(device, train, memory_limit=1.0)

    assert len(recording.runs) == len(report.trials)


# The file


def test_a_recording_is_equal_after_write_and_read(simulated, tmp_path):
    _, recording = simulated
    path = tmp_path / "recordings" / "perceptron.json"

    recording.write(path)

    assert Recording.read(path) == recording
    assert path.stat().st_size < 64 * 2**10


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2, "runs": []}', "not JSON"])
def test_a_file_without_a_recording_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)

    with pytest.raises(AutobatchError, match=r"other\.json does not hold a recording of"):
        Recording.read(path)


def test_a_file_with_an_incomplete_run_is_refused(simulated, tmp_path):
    path = tmp_path / "short.json"
    simulated[1].write(path)
    content = json.loads(path.read_text())
    del content["runs"][0]["after"]["peak"]
    path.write_text(json.dumps(content))

    with pytest.raises(AutobatchError, match="does not hold a recording"):
        Recording.read(path)


def test_a_recording_without_a_fit_is_not_replayed(simulated):
    from dataclasses import replace

    runs = tuple(replace(run, steps=0) for run in simulated[1].runs)

    with pytest.raises(ValueError, match="no run that fits"):
        ReplayedDevice(replace(simulated[1], runs=runs))


# Replay


def test_a_search_on_a_replay_finds_the_same_plan(simulated):
    report, recording = simulated

    again = replayed(recording)

    assert again.plan.micro_batch_size == pytest.approx(report.plan.micro_batch_size, rel=0.02)
    assert again.budget == report.budget
    assert again.device.name == "replay of simulated accelerator"


def test_a_recorded_size_repeats_its_peak_and_time(simulated):
    _, recording = simulated
    run = recording.runs[-1]
    device = ReplayedDevice(recording)

    with device.limited(run.budget):
        steps = device.workload(run.batch_size, run.accumulate)
        next(steps)

    assert device.read().peak == run.after.peak
    assert device.clock() == pytest.approx(run.step_seconds)


def test_memory_runs_out_from_the_smallest_failure_on():
    _, recording = recorded(
        SimulatedAccelerator("600KiB"),
        perceptron(),
        memory_limit=1.0,
        search=autobatch.Bisection(resolution=0.2),
    )
    failed = min(run.batch_size for run in recording.runs if not run.fits)
    device = ReplayedDevice(recording)

    for size in (failed, 3 * failed):
        with (
            device.limited(recording.runs[0].budget),
            pytest.raises(torch.OutOfMemoryError),
        ):
            next(device.workload(size, 1))

    assert device.read().failures == 2
    assert device.largest < failed


def test_memory_is_interpolated_between_recorded_sizes():
    _, recording = on_paper()
    device = ReplayedDevice(recording)

    for size in (3, 10, 100, device.largest):
        assert device.needs(size, 1) == pytest.approx(100 + 7 * size, rel=0.01)


def test_a_replay_repeats_memory_taken_by_other_processes():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        device.foreign += 100
        yield from device.workload(batch_size, accumulate)

    report, recording = recorded(device, train, memory_limit=1.0)

    again = replayed(recording)

    assert again.device.foreign <= report.budget
    assert again.budget <= 10_000 - 100
    assert again.plan.micro_batch_size <= report.plan.micro_batch_size * 1.02
