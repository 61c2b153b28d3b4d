"""AutoBatch in a LightningCLI: from a file, from the command line, and built in."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch
from forked import run_forked
from lightning_here import HERE

pytest.importorskip("jsonargparse")
importlib.import_module(f"{HERE[0]}.cli")  # once, for all programs

PROGRAM = Path(__file__).with_name("cli_program.py")

TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.max_epochs=1",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
]


def fit(package, *arguments, built_in=False):
    words = [package, str(built_in), "fit", *TRAINER, *arguments]
    if package == HERE[0]:
        done = run_forked(PROGRAM, *words)
    else:  # only one of the two packages may be imported
        command = [sys.executable, PROGRAM, *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (li for li in done.stdout.splitlines() if li.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


# Both packages in slow tests only
PACKAGES = [HERE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HERE[1:])]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "name",
    [
        "autobatch.AutoBatch",
        pytest.param("autobatch.lightning.AutoBatch", marks=pytest.mark.slow),
    ],
)
def test_a_yaml_file_names_the_callback_and_its_arguments(package, name, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"""
trainer:
  callbacks:
    - class_path: {name}
      init_args:
        target_batch_size: 64
        memory_limit: 8GiB
        max_micro_batch_size: 16
        time_limit: null
        retune_at_epochs: [3, 5]
        search:
          class_path: autobatch.Bisection
          init_args:
            resolution: 0.05
""")

    got = fit(package, f"--config={file}")

    assert got["effective"] == 64
    assert max(got["sizes"]) <= 16
    assert got["settings"]["memory_limit"] == "8GiB"
    assert got["settings"]["time_limit"] is None
    assert got["search"] == "Bisection"
    assert got["epochs"] == [3, 5]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_line_adds_the_callback(package):
    got = fit(
        package,
        "--trainer.callbacks+=autobatch.AutoBatch",
        "--trainer.callbacks.target_batch_size=64",
        "--trainer.callbacks.memory_limit=0.5",
        "--trainer.callbacks.device=simulated:64MiB",
        "--trainer.callbacks.evaluate=true",
    )

    assert got["effective"] == 64
    assert got["settings"]["memory_limit"] == 0.5
    assert got["total"] == 64 * 2**20
    assert got["evaluates"] is True


@pytest.mark.parametrize("package", PACKAGES)
def test_a_program_builds_the_callback_in(package):
    got = fit(
        package,
        "--autobatch.target_batch_size=64",
        "--autobatch.plan.class_path=autobatch.BatchPlan",
        "--autobatch.plan.init_args.micro_batch_size=32",
        "--autobatch.plan.init_args.accumulate_grad_batches=2",
        built_in=True,
    )

    assert (got["effective"], got["sizes"]) == (64, [32])


def test_a_bad_argument_on_the_command_line_is_named():
    with pytest.raises(AssertionError, match="target_batch_size"):
        fit(HERE[0], "--autobatch.target_batch_size=many", built_in=True)


@pytest.mark.parametrize("name", ["AutoBatch", "NoiseScale"])
def test_yaml_files_hold_the_public_path(name):
    public = getattr(autobatch, name)

    assert f"{public.__module__}.{public.__qualname__}" == f"autobatch.lightning.{name}"
