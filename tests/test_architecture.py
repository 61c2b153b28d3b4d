from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import autobatch

PACKAGE = Path(autobatch.__file__).parent
HEAVY = {
    "lightning",
    "matplotlib",
    "pydantic",
    "pynvml",
    "pytorch_lightning",
    "rich",
    "torch",
}

# A folder, or a module of the top folder, imports from earlier rows only.
LAYERS = (
    ("errors",),
    ("_memory", "_distributed"),
    ("_settings",),
    ("_trials",),
    ("_search", "_throughput"),
    ("_plan", "_latency", "_noise", "_accumulation"),
    ("_report",),
    ("sinks", "testing"),
    ("_subject",),
    ("_tune",),
    ("_find",),
    ("lightning",),
    ("_demo",),
    ("__main__",),
)
LAYER = {name: height for height, row in enumerate(LAYERS) for name in row}

# Arrows that point up, "_module -> _other", each with its reason.
UPWARD: dict[str, str] = {
    "_report -> _report.text": "a report prints itself",
    "_report -> _report.figure": "report.plot() loads matplotlib with the picture",
    "_report -> _report.notebook": "a notebook asks the object itself for its HTML",
}


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its name within it; the package itself is "__init__"."""
    return {
        path.relative_to(PACKAGE)
        .with_suffix("")
        .as_posix()
        .replace("/", ".")
        .removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = sources()


def imported(tree: ast.Module) -> set[str]:
    """The modules of the package that this one imports, wherever it does so, for types only as well."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            # The longest name that is a module: `from autobatch import sinks`, `from autobatch.sinks import log`
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {home_of(name) for name in names if name == "autobatch" or name.startswith("autobatch.")}


def home_of(name: str) -> str:
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


ARROWS = {
    name: imported(tree) for name, tree in MODULES.items() if name != "__init__"
}  # the package's own __init__ is the façade: it names everything, and loads nothing


def test_every_module_has_its_place_in_the_layers():
    assert {name.partition(".")[0] for name in ARROWS} == set(LAYER)


@pytest.mark.parametrize("name", ARROWS)
def test_a_module_imports_only_from_below_itself(name):
    part = name.partition(".")[0]
    upward = {
        other
        for other in ARROWS[name]
        if other == "__init__"
        or (other.partition(".")[0] != part and LAYER[other.partition(".")[0]] >= LAYER[part])
    }

    assert {f"{name} -> {other}" for other in upward} <= set(UPWARD)


def test_an_arrow_that_may_point_up_still_exists():
    arrows = {f"{name} -> {other}" for name in ARROWS for other in ARROWS[name]}

    assert set(UPWARD) <= arrows


def test_no_module_imports_itself_by_way_of_others():
    downward = {
        name: {other for other in others if f"{name} -> {other}" not in UPWARD}
        for name, others in ARROWS.items()
    }

    TopologicalSorter(downward).prepare()


def test_a_cycle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter(ARROWS | {"errors": {"_tune"}}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_in_one_sentence_what_it_holds(name):
    first, *rest = (ast.get_docstring(MODULES[name]) or "").splitlines()

    assert first.endswith(".")
    assert not rest or rest[0] == ""


def loaded_by(code: str) -> set[str]:
    program = f"import sys; {code}; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return HEAVY & set(told.stdout.split())


def test_import_autobatch_is_light():
    assert loaded_by("import autobatch; dir(autobatch)") == set()


def test_a_heavy_import_would_be_found():
    assert loaded_by("import autobatch; autobatch.find") >= {"torch", "pydantic"}


def test_all_names_what_the_lazy_table_holds():
    assert autobatch.__all__ == sorted(autobatch.__all__)
    assert set(autobatch.__all__) == set(autobatch._HOMES)


def test_type_checkers_see_the_same_names_in_the_same_places():
    told = {
        alias.name: node.module.removeprefix("autobatch.")
        for node in ast.walk(MODULES["__init__"])
        if isinstance(node, ast.ImportFrom) and node.module.startswith("autobatch")
        for alias in node.names
    }

    assert told == autobatch._HOMES


@pytest.mark.parametrize("name", autobatch.__all__)
def test_every_public_name_can_be_had(name):
    if autobatch._HOMES[name] == "lightning":
        needs_lightning()

    home = importlib.import_module(f"autobatch.{autobatch._HOMES[name]}")

    assert getattr(autobatch, name) is getattr(home, name)
    assert name in dir(autobatch)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'largest_batch'"):
        autobatch.largest_batch  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert autobatch.__version__.count(".") == 2


@pytest.mark.parametrize("name", ["errors", "lightning", "sinks", "testing"])
def test_a_public_module_offers_only_names_it_has(name):
    if name == "lightning":
        needs_lightning()

    module = importlib.import_module(f"autobatch.{name}")

    assert all(hasattr(module, offered) for offered in module.__all__)


def test_the_two_doors_have_their_keywords_in_common():
    needs_lightning()
    finds = inspect.signature(autobatch.find).parameters
    tunes = inspect.signature(autobatch.AutoBatch).parameters
    own_of_find = {"workload", "restore", "dataset_size"}
    own_of_autobatch = {
        "batch_arg_name",
        "repair_last_window",
        "retune_at_epochs",
        "set_batch_size",
        "worst_case",
    }

    assert set(finds) - own_of_find == set(tunes) - own_of_autobatch
    for name in set(finds) - own_of_find:
        # Name, default, annotation, and that it is given by keyword
        assert finds[name] == tunes[name]


def needs_lightning() -> None:
    if not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
        pytest.skip("needs Lightning")
