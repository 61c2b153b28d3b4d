from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import sinks
from autobatch._memory import detect
from autobatch._report.layout import UNICODE, terminal
from autobatch._report.text import completed
from autobatch._report.tradeoff import LearningRateRule
from autobatch.testing import SimulatedAccelerator
from report_examples import example, full_example
from test_architecture import LAYER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = Path(autobatch.__file__).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def outline(text: str) -> list[str]:
    """The words of a report's lines, without its numbers: what every report of its kind has in common."""
    told = text.partition("\n  ! ")[0]  # notes say what is particular to a run
    lines = [re.findall(r"[^\W\d_]{2,}", line) for line in told.splitlines()]
    return [words[0] for words in lines if words]


# The code


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the README leaves to its reader, and 1 MiB wherever the host's memory would be read."""
    monkeypatch.chdir(tmp_path)
    device = SimulatedAccelerator("1MiB")
    monkeypatch.setitem(detect._PROBES, "cpu", lambda _: device)
    data = TensorDataset(torch.randn(1000, 64), torch.randint(0, 10, (1000,)))
    model = Digits()
    return {
        "data": data,
        "loader": DataLoader(data, batch_size=8, shuffle=True),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
    }


def run(block: str, names: dict[str, object]) -> None:
    exec(compile(block, "README.md", "exec"), names)


def test_the_blocks_about_a_trainer_tune_and_train_and_measure(names, capsys):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Digits()

        def training_step(self, batch, _):
            inputs, labels = batch
            return nn.functional.cross_entropy(self.model(inputs), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    names |= {"model": Module()}
    for block in blocks("python"):
        if "trainer" in block:
            run(block, names)

    assert "= 256 per update" in capsys.readouterr().out
    written = Path("lightning_logs/version_0/autobatch.json")
    assert autobatch.TuningReport.read(written).plan.effective_batch_size == 256
    assert names["report"].plan.effective_batch_size == 256
    again = Path("lightning_logs/version_1/autobatch.json")
    assert autobatch.TuningReport.read(again).noise == names["noise"].reading


def test_the_other_blocks_run_one_after_the_other(names, capsys):
    for block in blocks("python"):
        if "trainer" not in block:
            run(block, names)

    assert "= 256 per update" in capsys.readouterr().out
    assert names["noise"].reading.state != "unavailable"
    assert names["again"].plan == names["report"].plan
    assert len(names["again"].trials) == 1


# The commands


def test_the_two_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    extract = re.search(r"^readme_command\(\) {.*?^}$", script, re.MULTILINE | re.DOTALL)[0]

    commands = [
        subprocess.check_output(
            ["bash", "-c", f"{extract}\nreadme_command {n}"], cwd=ROOT, text=True
        )
        for n in (1, 2)
    ]

    assert commands == blocks("bash")
    assert '"$first"' in script
    assert '"$second"' in script


def test_the_commands_install_the_tested_versions_and_run_the_main_job_and_the_tests():
    demo, tests = (block.strip().split(" && ") for block in blocks("bash"))

    assert demo[0] == tests[0] == "python -m venv .venv"
    assert "-c constraints.txt" in demo[1]
    assert "-c constraints.txt" in tests[1]
    assert demo[2] == ".venv/bin/autobatch demo"
    assert tests[2] == ".venv/bin/pytest -n 2 --dist loadfile"


# The report


def test_the_report_is_one_that_the_demo_prints_now():
    shown = README.partition("<!-- the demo prints -->\n```text\n")[2]
    shown = shown.partition("\n```\n<!-- and ends -->")[0]

    printed, _, last = shown.rpartition("\n\n")

    header, plan = printed.splitlines()[0], printed.splitlines()[3]
    assert header.startswith(
        "autobatch · DigitsNet · AdamW · 32-true · 1 × simulated accelerator 8 MiB"
    )
    assert re.fullmatch(
        r"  Micro-batch \d+ × accumulate \d+ = 256 per update +asked for 256, exact",
        plan,
    )
    # The lines of any report with the same parts
    at_first, _, completion = printed.partition("what training showed")
    rule = LearningRateRule("AdamW", "square-root")
    expected = outline(str(example(dataset_size=5752, learning_rate=rule)))
    assert set(outline(at_first)[2:]) <= {*expected, "trials"}
    compared = terminal(completed(full_example(learning_rate=rule)), UNICODE)
    expected = outline(compared.partition("what training showed")[2])
    assert outline(completion)[:2] == expected[:2] == ["Effective", "per"]
    assert "% of the held-out digits right after" in last


# The map, and the rest


def test_the_map_names_every_folder_and_module_of_the_top():
    map_of_folders = README.partition("## Map")[2].partition("\n## ")[0]

    named = re.findall(r"\[`(\S+)`\]\(src/autobatch/\S+\)", map_of_folders)

    assert sorted(name.rstrip("/").removesuffix(".py") for name in named) == sorted(
        set(LAYER) - {"_subject", "_demo", "__main__"}
    )


def test_the_map_goes_from_the_entry_points_down():
    map_of_folders = README.partition("## Map")[2].partition("\n## ")[0]
    rows = re.findall(r"src/autobatch/(\w+)", map_of_folders)

    heights = [LAYER[name.removesuffix(".py")] for name in rows]

    assert heights == sorted(heights, reverse=True)


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)

    here = [link for link in links if "://" not in link]

    assert here
    assert [link for link in here if not (ROOT / link).exists()] == []


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:lightning/|tests/|\.ci/)?_?[a-z_]+(?:\.py|/run))`", README)
    places = (PACKAGE, ROOT)

    assert named
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_keywords_are_those_of_the_two_doors_with_their_defaults():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", README, re.MULTILINE))
    finds = inspect.signature(autobatch.find).parameters
    own = {"restore", "dataset_size", "workload"}
    common = {name: finds[name].default for name in finds.keys() - own}
    tunes = {name: default for name, default in rows.items() if name not in common}

    assert {name: rows[name] for name in common} == {
        name: repr(default).replace("'", '"') for name, default in common.items()
    }
    autobatchs = pytest.importorskip("autobatch.lightning", exc_type=ImportError).AutoBatch
    parameters = inspect.signature(autobatchs).parameters
    assert tunes == {
        name: repr(parameters[name].default).replace("'", '"')
        for name in parameters.keys() - common.keys()
    }


def test_every_sink_is_named():
    for name in ("json_file", "markdown_file", "figure_file", "log"):
        assert name in sinks.__all__
        assert name in README
