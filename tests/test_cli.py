from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import autobatch
from autobatch import sinks
from autobatch.__main__ import main
from nvml_standin import DRIVER, GIB, Card, FakeGpu
from report_examples import example
from report_examples import printed as shown_by


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "autobatch.json"
    sinks.json_file(path)(example())
    return path


def autobatch_from_the_shell(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "autobatch", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


def one_sentence(capsys) -> str:
    """Return the only line on standard error, with nothing on standard output."""
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="autobatch")

    assert command.load() is main


def test_usage_is_printed_without_a_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])

    assert "usage: autobatch" in capsys.readouterr().err


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])

    assert capsys.readouterr().out == f"{autobatch.__version__}\n"


# demo


def test_demo_refuses_an_impossible_directory_before_it_runs(tmp_path, capsys):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("sklearn")
    (tmp_path / "file").touch()
    directory = str(tmp_path / "file" / "here")

    assert main(["demo", "--directory", directory]) == 2

    assert f"--directory={directory} cannot be created" in one_sentence(capsys)


@pytest.mark.slow
def test_demo_tunes_trains_and_reports(tmp_path):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("sklearn")

    ran = autobatch_from_the_shell("demo", "--directory", "here", cwd=tmp_path)

    assert ran.returncode == 0, ran.stderr
    # Nothing but progress, if it takes longer than a few seconds
    assert all(re.match("autobatch [-·] ", line) for line in ran.stderr.splitlines())
    report = autobatch.TuningReport.read(tmp_path / "here/autobatch.json")
    printed, _, last = ran.stdout.strip().rpartition("\n\n")
    at_first, _, later = printed.partition("\n\nautobatch · DigitsNet")
    measured_later = {"noise": None, "loading": None}
    assert at_first == str(report.model_copy(update=measured_later))
    assert f"autobatch · DigitsNet{later}" == shown_by(report, sinks.completed_on_console)
    assert report.plan.effective_batch_size == 256
    assert report.plan.accumulate_grad_batches > 1
    assert report.noise.state == "ok"
    assert report.smallest_failing is None
    assert (tmp_path / "here/tradeoff.png").read_bytes().startswith(b"\x89PNG")
    right = re.match(
        r"After \d+ updates the network recognises (.*) % of the held-out digits;", last
    )
    assert float(right[1]) > 95
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_demo_names_the_packages_it_needs(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "autobatch._demo", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert main(["demo"]) == 2

    assert "The demo needs matplotlib: pip install" in one_sentence(capsys)


# probe


def test_probe_prints_the_environment_and_every_device(capsys):
    assert main(["probe"]) == 0

    shown = capsys.readouterr().out
    labels = [line.split("  ")[1] for line in shown.splitlines() if line[:2] == "  "]
    assert labels[:2] == ["autobatch", "python"]
    assert {"torch", "lightning", "pytorch-lightning", "nvidia-ml-py"} < set(labels)
    assert labels.index("CUDA devices") < labels.index("NVML") < labels.index("total")
    assert "\nhost memory\n" in shown
    assert re.search(r"budget +\S+ [GM]iB at a memory_limit of 0\.9\n", shown)
    assert re.search(r"read from +\S", shown)


def test_probe_prints_cuda_visible_devices(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")

    main(["probe"])

    assert "CUDA_VISIBLE_DEVICES='3,1'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processes", "shown"),
    [
        ({41: 3 * GIB, 7: None}, "7: unknown, 41: 3 GiB"),
        ({}, "none listed by NVML"),
    ],
)
def test_probe_prints_the_memory_of_each_process_on_a_gpu(monkeypatch, capsys, processes, shown):
    FakeGpu((Card("aaaa", processes=processes),)).install(monkeypatch)

    assert main(["probe"]) == 0

    output = capsys.readouterr().out
    assert f"  processes          {shown}\n" in output
    assert f"  NVML               driver {DRIVER}\n" in output


def test_probe_prints_the_error_of_an_unreadable_gpu(monkeypatch, capsys):
    gpu = FakeGpu().install(monkeypatch)
    gpu.lose()

    assert main(["probe"]) == 0

    assert "NVML failed: GPU is lost. Pass device=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        ("64MiB", "64 MiB at a memory_limit of 64 MiB"),
        ("67108864", "64 MiB at a memory_limit of 64 MiB"),
    ],
)
def test_probe_accepts_a_limit_as_text_or_bytes(limit, budget, capsys):
    assert main(["probe", "--memory-limit", limit]) == 0

    assert budget in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["0", "1", "1.5", "much", "nan", "-1GiB"])
def test_probe_refuses_a_bad_limit(limit, capsys):
    assert main(["probe", f"--memory-limit={limit}"]) == 2

    assert re.match(r"autobatch: memory_limit=.*\.$", one_sentence(capsys))


# show


def test_show_prints_a_report(report, capsys):
    assert main(["show", str(report)]) == 0

    assert capsys.readouterr().out == f"{example()}\n"


def test_show_also_draws_a_report(report, tmp_path, capsys):
    path = tmp_path / "tradeoff.svg"

    assert main(["show", str(report), "--figure", str(path)]) == 0

    assert path.read_bytes().startswith(b"<?xml")
    assert capsys.readouterr().out == f"{example()}\n"


def test_show_refuses_an_unknown_figure_format_before_printing(report, tmp_path, capsys):
    path = tmp_path / "tradeoff.doc"

    assert main(["show", str(report), "--figure", str(path)]) == 2

    assert ".png, .svg or .pdf" in one_sentence(capsys)
    assert not path.exists()


def test_show_works_from_the_shell(report, tmp_path):
    shown = autobatch_from_the_shell("show", report.name, cwd=tmp_path)

    assert shown.returncode == 0
    assert shown.stdout == f"{example()}\n"
    assert shown.stderr == ""


def test_show_refuses_a_missing_file(tmp_path, capsys):
    path = tmp_path / "nowhere.json"

    assert main(["show", str(path)]) == 2

    assert one_sentence(capsys).startswith(f"autobatch: {path} cannot be read (")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a report", "is not JSON"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (b"{}", "not a report of autobatch"),
        (b"[1, 2]", "not a report of autobatch"),
        (b'{"schema_version": 1}', "is not a complete report"),
        (b"", "is not JSON"),
    ],
)
def test_show_refuses_files_that_are_not_reports(content, reason, tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_bytes(content)

    assert main(["show", str(path)]) == 2

    assert reason in one_sentence(capsys)


def test_show_refuses_a_later_schema_version(report, capsys):
    stored = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps(stored | {"schema_version": 99}), encoding="utf-8")

    assert main(["show", str(report)]) == 2

    assert "schema_version=99" in one_sentence(capsys)


def test_a_closed_pipe_ends_show_silently(report):
    read_end, write_end = os.pipe()
    os.close(read_end)

    ran = subprocess.run(
        [sys.executable, "-m", "autobatch", "show", str(report)],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )

    os.close(write_end)
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(report):
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "autobatch", "show", str(report)],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert (ran.returncode, ran.stderr) == (2, b"autobatch: [Errno 28] No space left on device\n")


def test_escape_sequences_of_a_file_do_not_reach_the_terminal(report, tmp_path, capsys):
    stored = json.loads(report.read_text(encoding="utf-8"))
    stored["settings"]["\x1b]0;title\x07"] = "\x1b[31m"
    path = tmp_path / "a\x1b[2Jb.json"
    path.write_text(json.dumps(stored), encoding="utf-8")

    assert main(["show", str(path)]) == 2

    error = capsys.readouterr().err
    assert error.rstrip("\n").isprintable()
    assert "settings. ]0;title: Extra inputs are not permitted" in error


def test_errors_are_printed_without_a_traceback(tmp_path):
    refused = autobatch_from_the_shell("show", "nowhere.json", cwd=tmp_path)

    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("autobatch: nowhere.json cannot be read")
    assert refused.stderr.count("\n") == 1


# estimate

MAKE = """
import torch
from torch import nn


def make():
    return nn.Linear(256, 256), lambda model, batch: model(batch).square().mean(), torch.ones(2, 256)


def with_sgd():
    model, step, batch = make()
    return model, step, batch, torch.optim.SGD(model.parameters())


def nothing():
    return None


def of_width(width):
    return nn.Linear(width, width)
"""


@pytest.fixture
def made(monkeypatch, tmp_path):
    (tmp_path / "networks_here.py").write_text(MAKE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("networks_here", None)


@pytest.mark.usefixtures("made")
def test_estimate_prints_each_device_and_writes_json(tmp_path, capsys):
    arguments = ["--device", "T4", "--device", "24GiB", "--json", "estimates.json"]

    status = main(["estimate", "networks_here:with_sgd", *arguments])

    printed = capsys.readouterr().out
    assert status == 0
    assert "Linear · SGD · 32-true · T4, budget" in printed
    assert "GPU of 24 GiB" in printed
    stored = json.loads((tmp_path / "estimates.json").read_text(encoding="utf-8"))
    assert [each["device"] for each in stored] == ["T4", "GPU of 24 GiB"]
    assert stored[0]["largest"]["value"] < stored[1]["largest"]["value"]
    assert f"Batches of {stored[0]['largest']['value']:,} samples fit" in printed


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no_such_module:make", "cannot be imported"),
        ("networks_here:none", "is not a function"),
        ("networks_here", "names a module and no function in it"),
        ("networks_here:nothing", "returned NoneType"),
        ("networks_here:of_width", "cannot be called without arguments"),
    ],
)
def test_estimate_refuses_what_makes_no_network(name, error, capsys):
    assert main(["estimate", name, "--device", "T4"]) == 2

    assert f"{name} {error}" in one_sentence(capsys)
