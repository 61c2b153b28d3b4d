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


def run(script, *arguments, needs):
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_benchmark_of_the_tradeoff_compares_predicted_with_measured_order(tmp_path):
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text(
        "Before.\n<!-- tradeoff.py -->old<!-- end of tradeoff.py -->\nAfter.\n",
        encoding="utf-8",
    )

    printed = run(
        "tradeoff.py",
        "--quick",
        "--json",
        numbers,
        "--markdown",
        page,
        needs=["sklearn"],
    )

    for batch in (16, 32, 64, 128, 256):
        assert re.search(rf"(?m)^\| {batch} +\| +\d+ \(at ", printed)
    found = json.loads(numbers.read_text(encoding="utf-8"))
    verdicts = found["verdicts"]
    assert {v["choice"] for v in verdicts} >= {"largest batch", "smallest batch"}
    taus = [v["tau"] for v in verdicts if v["tau"] is not None]
    assert taus
    assert all(-1 <= tau <= 1 for tau in taus)
    assert all(min(v["extra_times"]) >= 0 for v in verdicts)
    assert {each["state"] for each in found["noise"]} == {"ok"}
    assert all(each["measured"] > 0 for each in found["update_seconds"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    assert verdicts[0]["choice"] in text


def test_the_benchmark_of_the_noise_scale_prints_a_ratio_of_each_kind():
    lightning_of = ["pytorch_lightning", "lightning"]
    if not any(map(importlib.util.find_spec, lightning_of)):
        pytest.skip("needs Lightning")

    printed = run("noise_scale.py", "--quick", needs=[])

    ratios = re.findall(
        r"(?m)^  MLP +[+-]\d+\.\d% +[+-]\d+\.\d% to +[+-]\d+\.\d%$", printed
    )
    assert len(ratios) == 4, printed


LIGHTNING = ["pytorch_lightning", "lightning"]


def needs_lightning():
    if not any(map(importlib.util.find_spec, LIGHTNING)):
        pytest.skip("needs Lightning")


def test_the_benchmark_of_a_gpu_runs_in_little_on_a_simulated_one(tmp_path):
    needs_lightning()
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"

    run(
        "gpu.py",
        *("--device", "cpu", "--brief", "--only", "U-Net"),
        *("--json", numbers, "--markdown", page),
        needs=[],
    )

    told = json.loads(numbers.read_text(encoding="utf-8"))
    assert told["surroundings"]["device"] == "simulated accelerator"
    (result,) = told["results"]
    rows = {row["method"]: row for row in result["rows"]}
    own = rows["autobatch"]
    assert own["found"] >= max(row["found"] or 0 for row in rows.values()) * 0.99
    assert own["ooms"] == own["ooms_in_steps"] == 0
    assert own["steps"] == 5
    assert 0.9 < own["used"] <= 1
    assert rows["Lightning, power"]["ooms"] > 0
    assert rows["accelerate"]["found"] or "not installed" in rows["accelerate"]["said"]
    assert result["plan"]["ratio"] > 0
    assert result["noise_scale"]["extra_time"] > -1
    text = page.read_text(encoding="utf-8")
    assert "| U-Net, Lightning, binsearch |" in text
    assert "\nGoal, 97% of the memory used" in text


def test_a_search_is_recorded_and_played_back(tmp_path):
    run(
        "record.py",
        tmp_path,
        *("--device", "cpu", "--brief", "--only", "U-Net"),
        needs=[],
    )

    device = ReplayedDevice(tmp_path / "u-net.json")
    recording = device.recording
    report = autobatch.find(
        device.workload, device=device, memory_limit=recording.memory_limit
    )
    assert {run.accumulate for run in recording.runs} == {1, 2}
    assert any(run.ran_out for run in recording.runs)
    assert report.plan.micro_batch_size >= 0.98 * device.largest


@pytest.mark.timeout(600)
def test_everything_for_a_gpu_is_one_command(tmp_path):
    needs_lightning()
    ran = subprocess.run(
        ["bash", BENCHMARKS / "on_gpu.sh", tmp_path, "--device", "cpu"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
    )

    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log == ran.stdout
    _, _, short = log.partition("=== in short\n")
    parts = ["what autobatch sees", "tests", "benchmark", "recordings"]
    assert [line.partition(":")[0] for line in short.splitlines()] == parts
    assert {path.name for path in tmp_path.iterdir()} >= {"log.txt", "gpu.json"}
    # A busy machine may not get through every part in its time
    assert (ran.returncode == 0) == ("stopped" not in short and "ended" not in short)
    assert "ended" not in short
