"""Searches on a device that was recorded: any file in tests/recordings, and what is recorded here on simulated ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import autobatch
from autobatch._memory.cuda import CudaProbe
from autobatch.errors import AutobatchError
from autobatch.testing import PaperDevice, Recorder, Recording, ReplayedDevice, SimulatedAccelerator
from conftest import set_curve_seconds
from networks import Perceptron, training
from nvml_standin import GIB, FakeGpu

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))


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


def test_a_recorder_changes_nothing_of_a_search():
    plain = PaperDevice(10_000, fixed=100, per_sample=7)

    report, _ = on_paper()

    without = autobatch.find(plain.workload, device=plain, memory_limit=1.0)
    assert [trial.batch_size for trial in report.trials] == [
        trial.batch_size for trial in without.trials
    ]
    assert report.plan == without.plan


def test_every_trial_is_kept_with_what_the_device_said_of_it(simulated):
    report, recording = simulated

    assert [
        (run.batch_size, run.fits, run.after.peak if run.fits else None) for run in recording.runs
    ] == [(trial.batch_size, trial.fits, trial.peak) for trial in report.trials]
    assert all(run.budget == report.budget for run in recording.runs)
    assert all(run.step_seconds > 0 for run in recording.runs if run.fits)
    assert recording.device == "simulated accelerator"
    assert recording.source == "the ledger of live tensor bytes"
    assert recording.runs[0].allocator == {"num_ooms": 7}


def test_a_run_that_ran_out_of_memory_is_kept_as_one_that_failed():
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
def test_a_run_whose_allocator_made_room_in_the_first_step_alone_came_through(
    monkeypatch, tmp_path, steps, fits
):
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


def test_what_others_hold_is_kept_as_it_was_in_each_run():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        device.foreign += 100
        yield from device.workload(batch_size, accumulate)

    _, recording = recorded(device, train, memory_limit=1.0)

    foreign = [run.after.foreign for run in recording.runs]
    assert foreign == [100 * number for number in range(1, len(foreign) + 1)]


def test_a_size_that_was_refused_for_something_else_did_not_run_out_of_memory():
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


def test_a_loop_that_ends_is_started_again_under_the_recorder():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        steps = device.workload(batch_size, accumulate)
        yield next(steps)
        yield next(steps)

    report, recording = recorded(device, train, memory_limit=1.0)

    assert len(recording.runs) == len(report.trials)


# The file


def test_a_recording_is_the_same_after_it_was_kept(simulated, tmp_path):
    _, recording = simulated
    path = tmp_path / "recordings" / "perceptron.json"

    recording.write(path)

    assert Recording.read(path) == recording
    assert path.stat().st_size < 64 * 2**10


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2, "runs": []}', "not JSON"])
def test_a_file_that_holds_none_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)

    with pytest.raises(AutobatchError, match=r"other\.json holds no recording of"):
        Recording.read(path)


def test_a_file_with_a_run_too_little_said_of_is_refused(simulated, tmp_path):
    path = tmp_path / "short.json"
    simulated[1].write(path)
    told = json.loads(path.read_text())
    del told["runs"][0]["after"]["peak"]
    path.write_text(json.dumps(told))

    with pytest.raises(AutobatchError, match="holds no recording"):
        Recording.read(path)


def test_a_recording_of_failures_alone_is_not_played_back(simulated):
    from dataclasses import replace

    runs = tuple(replace(run, steps=0) for run in simulated[1].runs)

    with pytest.raises(ValueError, match="no run that fits"):
        ReplayedDevice(replace(simulated[1], runs=runs))


# Playing back


def test_a_search_on_a_recording_finds_what_was_found_on_the_device(simulated):
    report, recording = simulated

    again = replayed(recording)

    assert again.plan.micro_batch_size == pytest.approx(report.plan.micro_batch_size, rel=0.02)
    assert again.budget == report.budget
    assert again.device.name == "replay of simulated accelerator"


def test_a_size_that_was_run_peaks_and_takes_what_it_did(simulated):
    _, recording = simulated
    run = recording.runs[-1]
    device = ReplayedDevice(recording)

    with device.limited(run.budget):
        steps = device.workload(run.batch_size, run.accumulate)
        next(steps)

    assert device.read().peak == run.after.peak
    assert device.clock() == pytest.approx(run.step_seconds)


def test_from_the_smallest_size_that_failed_on_memory_runs_out():
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


def test_between_sizes_that_were_run_memory_lies_on_a_line():
    _, recording = on_paper()
    device = ReplayedDevice(recording)

    for size in (3, 10, 100, device.largest):
        assert device.needs(size, 1) == pytest.approx(100 + 7 * size, rel=0.01)


def test_what_others_took_meanwhile_they_take_again():
    device = PaperDevice(10_000, fixed=100, per_sample=7)

    def train(batch_size, accumulate):
        device.foreign += 100
        yield from device.workload(batch_size, accumulate)

    report, recording = recorded(device, train, memory_limit=1.0)

    again = replayed(recording)

    assert again.device.foreign <= report.budget
    assert again.budget <= 10_000 - 100
    assert again.plan.micro_batch_size <= report.plan.micro_batch_size * 1.02


@pytest.mark.parametrize("search", [autobatch.GuidedBisection(), autobatch.Bisection()], ids=repr)
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_on_what_was_recorded_of_real_devices_the_largest_fit_is_found(path, search):
    recording = Recording.read(path)
    device = ReplayedDevice(recording)

    report = replayed(recording, search=search)

    assert report.plan.micro_batch_size >= 0.97 * device.largest
    assert all(trial.peak <= report.budget for trial in report.trials if trial.fits)
