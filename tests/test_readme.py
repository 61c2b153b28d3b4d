"""README.md and docs: every block of code runs, and names, defaults and links are right."""

from __future__ import annotations

import importlib
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
from autobatch.report import LearningRateRule
from autobatch.testing import SimulatedAccelerator
from report_examples import example, full_example
from report_examples import printed as shown_by
from test_architecture import LAYER, PUBLIC

ROOT = Path(__file__).parent.parent
PACKAGE = Path(autobatch.__file__).parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]
KEYWORDS = PAGES["docs/keywords.md"]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def python_of(page: str, *, trainer: bool) -> list[str]:
    """Return the blocks of a page that use a Trainer, or those that do not."""
    return [block for block in blocks("python", page) if ("trainer" in block) == trainer]


def outline(text: str) -> list[str]:
    """Return the first word of each line above the notes, which are particular to a run."""
    above = text.partition("\n  ! ")[0]
    lines = [re.findall(r"[^\W\d_]{2,}", line) for line in above.splitlines()]
    return [words[0] for words in lines if words]


# Code


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """The names that pages leave to their reader; host memory is 1 MiB."""
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


@pytest.fixture
def module():
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

    return Module()


def run(page: str, names: dict[str, object], *, trainer: bool) -> None:
    for block in python_of(PAGES[page], trainer=trainer):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page, text in PAGES.items()
        if python_of(text, trainer=True) and page != "docs/transformers.md"  # test_transformers.py
    ],
)
def test_code_with_a_trainer_runs(page, names, module, capsys):
    names["model"] = module

    run(page, names, trainer=True)

    assert "= 256 per update" in capsys.readouterr().out
    written = Path("lightning_logs/version_0/autobatch.json")
    assert autobatch.TuningReport.read(written).plan.effective_batch_size == 256
    if "noise" in names:
        assert autobatch.TuningReport.read(written).noise == names["noise"].reading


@pytest.mark.parametrize("page", [p for p, text in PAGES.items() if python_of(text, trainer=False)])
def test_code_without_a_trainer_runs(page, names, capsys):
    run(page, names, trainer=False)

    printed = capsys.readouterr().out
    if "print(autobatch.find(" in PAGES[page]:
        assert "= 256 per update" in printed
    if "again" in names:
        assert names["again"].plan == names["report"].plan
        assert len(names["again"].trials) == 1
    if "noise" in names:
        assert names["noise"].reading.state != "unavailable"


# Commands


def test_ci_runs_the_two_commands_of_the_readme():
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


def test_commands_install_tested_versions_then_run_demo_and_tests():
    demo, tests = (block.strip().split(" && ") for block in blocks("bash"))

    assert demo[0] == tests[0] == "python -m venv .venv"
    assert "-c constraints.txt" in demo[1]
    assert "-c constraints.txt" in tests[1]
    assert demo[2] == ".venv/bin/autobatch demo"
    assert tests[2] == ".venv/bin/pytest -n 2 --dist loadfile"


# The demo's report


def quoted(page: str) -> str:
    shown = PAGES[page].partition("<!-- the demo prints -->\n```text\n")[2]
    return shown.partition("\n```\n<!-- and ends -->")[0]


def test_report_page_quotes_current_demo_output():
    printed, _, last = quoted("docs/report.md").rpartition("\n\n")

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
    guide = "by predicted memory"
    expected = outline(str(example(dataset_size=5752, learning_rate=rule, guide=guide)))
    assert set(outline(at_first)[2:]) <= {*expected, "trials"}
    compared = shown_by(full_example(learning_rate=rule), sinks.completed_on_console)
    expected = outline(compared.partition("what training showed")[2])
    assert outline(completion)[:2] == expected[:2] == ["Effective", "per"]
    assert "% of the held-out digits; " in last


def test_readme_quotes_the_first_block_of_that_output():
    first, _, _ = quoted("docs/report.md").partition("\n\n  Effective batch")

    assert quoted("README.md") == first
    assert len(first.splitlines()) <= 24


# Folders, links and names


def map_of_folders() -> str:
    return README.partition("## Folders")[2]


def test_map_names_every_folder_and_top_module():
    named = re.findall(r"\[`(\S+)`\]\(src/autobatch/\S+\)", map_of_folders())

    assert sorted(name.rstrip("/").removesuffix(".py") for name in named) == sorted(
        set(LAYER) - {"_subject", "_demo", "__main__"}
    )


def test_map_is_ordered_from_entry_points_downwards():
    rows = re.findall(r"src/autobatch/(\w+)", map_of_folders())

    heights = [LAYER[name.removesuffix(".py")] for name in rows]

    assert heights == sorted(heights, reverse=True)


def test_architecture_page_names_every_folder_and_top_module():
    named = re.findall(r"(?m)^[├└]── (\w+)(?:\.py|/)", PAGES["docs/architecture.md"])

    assert sorted(named) == sorted({*LAYER, "__init__"})


def test_architecture_page_names_existing_functions_on_the_path():
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| `([\w./]+)` \|", PAGES["docs/architecture.md"])
    frames = [(name, file) for name, file in rows if "." not in file.removesuffix(".py")]

    assert len(frames) == 16
    for name, file in frames:
        text = (PACKAGE / file).read_text(encoding="utf-8")
        owner, _, function = name.rpartition(".")
        assert re.search(rf"\bdef {function}\b", text)
        assert not owner or re.search(rf"\bclass {owner}\b", text)


def test_readme_has_at_most_1000_words():
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])

    local = [link.partition("#") for link in links if "://" not in link]

    folder = (ROOT / page).parent
    assert [path for path, _, _ in local if not (folder / path).exists()] == []
    for path, _, anchor in local:
        text = (folder / path).read_text(encoding="utf-8") if anchor else ""
        assert not anchor or re.search(rf"(?im)^#+ {anchor.replace('-', ' ')}$", text)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = re.findall(r"`((?:\w+/)*_?[a-z_]+\.py|(?:tests|\.ci|benchmarks)/[\w./]+)`", PAGES[page])
    optional = {"tests/recordings"}  # made by the first recording

    missing = {
        name for name in named if not any((place / name).exists() for place in (PACKAGE, ROOT))
    }

    assert missing <= optional


def test_docs_index_lists_every_page():
    listed = re.findall(r"(?m)^([a-z-]+)$", PAGES["docs/index.md"])

    assert {f"docs/{name}.md" for name in [*listed, "index"]} == {
        page for page in PAGES if page.startswith("docs/")
    }


def defaults_in(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE))


def defaults_of(function) -> dict[str, str]:
    return {
        name: repr(parameter.default).replace("'", '"')
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_readme_lists_the_common_keywords_with_their_defaults():
    of_find = defaults_of(autobatch.find)
    own_of_find = {"restore", "dataset_size", "data_parallel_size"}
    common = {name: of_find[name] for name in of_find.keys() - own_of_find}

    assert defaults_in(README) == common


def test_keyword_page_lists_all_keywords_with_their_defaults():
    lightning = pytest.importorskip("autobatch.lightning", exc_type=ImportError)

    assert defaults_in(KEYWORDS) == (
        defaults_of(lightning.AutoBatch) | defaults_of(lightning.NoiseScale)
    )
    assert all(f"| `{name}` |" in KEYWORDS for name in ("restore", "dataset_size"))


def test_readme_comparison_agrees_with_the_full_table():
    full = PAGES["docs/comparison.md"].replace("`", "").replace("bare peaks", "peak memory only")
    cells = [
        [cell.strip().replace("`", "") for cell in row.split("|")[1:-1]]
        for row in re.findall(r"(?m)^\| .* \| \d\.\d\d \| \d+ \| \d+ \|$", README)
    ]

    assert len(cells) == 5
    for name, *numbers in cells:
        row = re.search(rf"(?m)^\| {name} +\|(.*)$", full)[1].split("|")
        assert [cell.split()[0] for cell in row[:3]] == numbers


def test_report_page_names_every_sink():
    for name in ("console", "json_file", "markdown_file", "figure_file", "log"):
        assert name in sinks.__all__
        assert f"`sinks.{name}" in PAGES["docs/report.md"]


def test_api_page_documents_every_public_name():
    page = PAGES["docs/api.md"]

    in_modules = {
        name
        for module in set(PUBLIC) - {"lightning"}
        if f"automodule:: autobatch.{module}" in page
        for name in importlib.import_module(f"autobatch.{module}").__all__
    }
    assert all(f":: autobatch.{name}" in page or name in in_modules for name in autobatch.__all__)
    assert all(f"automodule:: autobatch.{name}" in page for name in set(PUBLIC) - {"lightning"})
