"""benchmarks/on_gpu.sh, in short on a simulated GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch
from autobatch.testing import ReplayedDevice

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Run the script in short on a simulated GPU, and return the folder of its results."""
    if not any(map(importlib.util.find_spec, ("pytorch_lightning", "lightning"))):
        pytest.skip("needs Lightning")
    folder = tmp_path_factory.mktemp("on_gpu")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", BENCHMARKS / "on_gpu.sh", folder, "--device", "cpu"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert (folder / "log.txt").read_text(encoding="utf-8") == ran.stdout
    return folder


@pytest.mark.timeout(1200)  # the fixture runs the script: minutes on a busy machine
def test_one_command_runs_everything_for_a_gpu(on_gpu):
    _, _, short = (on_gpu / "log.txt").read_text(encoding="utf-8").partition("=== in short\n")

    parts = ["what autobatch sees", "tests", "benchmark", "recordings"]
    assert [line.partition(":")[0] for line in short.splitlines()] == parts
    assert all(": went well, " in line for line in short.splitlines())


@pytest.mark.parametrize("given", ["--device", "--device tpu", "--part all", "cpu"])
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, given):
    ran = subprocess.run(
        ["bash", BENCHMARKS / "on_gpu.sh", tmp_path / "results", *given.split()],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 2
    assert f"{given} is none of: --device cuda|cpu, --part tests|" in ran.stderr
    assert not ran.stdout


@pytest.mark.parametrize(
    ("part", "program"),
    [
        ("tests", "-m pytest"),
        ("benchmark", "benchmarks/gpu.py"),
        ("recordings", "benchmarks/record.py"),
    ],
)
def test_one_part_can_be_run_alone(tmp_path, part, program):
    """With a Python that only prints its arguments: the fixture runs the programs themselves."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ntest "$1" = -c || echo "python3 $*"\n')
    python.chmod(0o755)
    folder = tmp_path / "results"

    ran = subprocess.run(
        ["bash", BENCHMARKS / "on_gpu.sh", folder, "--device", "cpu", "--part", part],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )

    assert ran.returncode == 0, ran.stdout
    assert (folder / f"log-{part}.txt").read_text(encoding="utf-8") == ran.stdout
    (started,) = (line for line in ran.stdout.splitlines() if line.startswith("python3 "))
    assert started.startswith(f"python3 {program}")
    _, _, short = ran.stdout.partition("=== in short\n")
    assert re.fullmatch(rf"{part}: went well, \d+ s\n", short)


def test_an_incomplete_environment_is_refused_before_anything_runs(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho no module named rich >&2\nexit 1\n")
    python.chmod(0o755)

    ran = subprocess.run(
        ["bash", BENCHMARKS / "on_gpu.sh", tmp_path / "results"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )

    assert ran.returncode == 2
    assert f"{python} lacks the module named above: install autobatch" in ran.stderr
    assert not ran.stdout


@pytest.mark.timeout(1200)  # the fixture runs the script: minutes on a busy machine
def test_the_gpu_benchmark_compares_ways_to_find_a_batch_size(on_gpu):
    results = json.loads((on_gpu / "gpu.json").read_text(encoding="utf-8"))
    text = (on_gpu / "gpu.md").read_text(encoding="utf-8")

    assert results["surroundings"]["device"] == "simulated accelerator"
    ((result,),) = results["results"].values()  # by memory of the device
    rows = {row["method"]: row for row in result["rows"]}
    own = rows["autobatch"]
    assert own["found"] >= max(row["found"] or 0 for row in rows.values()) * 0.97
    assert own["ooms"] == own["ooms_in_steps"] == 0
    assert own["steps"] == 5
    assert 0.9 < own["used"] <= 1
    assert rows["Lightning, power"]["ooms"] > 0
    assert rows["accelerate"]["found"] or "not installed" in rows["accelerate"]["said"]
    for row in results["predicted"]:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.01)
    assert {row["network"] for row in results["predicted"]} == {"ResNet-50", "GPT-2", "U-Net"}
    assert result["plan"]["ratio"] > 0
    assert result["noise_scale"]["extra_time"] > -1
    assert re.search(r"(?m)^\| U-Net, Lightning, binsearch +\|", text)
    assert "\nGoal, 97% of the memory used" in text


@pytest.mark.timeout(1200)  # the fixture runs the script: minutes on a busy machine
def test_a_search_is_recorded_and_replayed(on_gpu):
    device = ReplayedDevice(on_gpu / "u-net.json")
    recording = device.recording

    report = autobatch.find(device.workload, device=device, memory_limit=recording.memory_limit)

    assert {run.accumulate for run in recording.runs} == {1, 2}
    assert any(run.ran_out for run in recording.runs)
    assert report.plan.micro_batch_size >= 0.98 * device.largest


def test_the_benchmark_page_has_a_section_for_gpus():
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")

    assert page.count("<!-- gpu.py -->") == page.count("<!-- end of gpu.py -->") == 1
