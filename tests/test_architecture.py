from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import typing
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import autobatch
from autobatch import errors

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
    ("errors", "_undo"),
    ("_memory", "_distributed"),
    ("_settings",),
    ("_trials",),
    ("_search", "_throughput"),
    ("_plan", "_latency", "_noise", "_accumulation"),
    ("_report",),
    ("_loaders",),
    ("_estimate",),
    ("_progress",),
    ("report", "sinks", "testing"),
    ("_subject", "_prior_plan"),
    ("_guide",),
    ("_tune",),
    ("_find",),
    ("lightning", "transformers"),
    ("_demo",),
    ("__main__",),
)
LAYER = {name: height for height, row in enumerate(LAYERS) for name in row}

# Imports of a higher row, "_module -> _other", each with its reason. There are no others.
UPWARD: dict[str, str] = {}
# Imports inside a function that would be a cycle within their folder
DEFERRED: dict[str, str] = {
    "_estimate -> _estimate.figure": "estimate.plot() loads matplotlib with the picture",
    "_estimate -> _estimate.text": "an estimate prints itself",
    "_report -> _report.text": "a report prints itself",
    "_report -> _report.figure": "report.plot() loads matplotlib with the picture",
}
# Modules that users import from
PUBLIC = ("errors", "lightning", "report", "sinks", "testing", "transformers")


def sources() -> dict[str, ast.Module]:
    """Return every module by its name within the package; the package itself is "__init__"."""
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
    """Return the modules of the package that a module imports, in functions and for types too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            # Of `autobatch.sinks` and `autobatch.sinks.log`, the longest that is a module
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


def part_of(name: str) -> str:
    """Return the folder of a module, or the module itself where it is at the top."""
    return name.partition(".")[0]


def points_up(name: str, other: str) -> bool:
    if other == "__init__":  # the façade is above everything
        return True
    return part_of(name) != part_of(other) and LAYER[part_of(other)] >= LAYER[part_of(name)]


def test_every_folder_and_top_module_has_a_layer():
    assert {part_of(name) for name in ARROWS} == set(LAYER)


@pytest.mark.parametrize("name", ARROWS)
def test_modules_import_only_from_lower_layers(name):
    upward = {f"{name} -> {other}" for other in ARROWS[name] if points_up(name, other)}

    assert upward <= set(UPWARD)


def test_only_the_documented_upward_imports_exist():
    arrows = {f"{name} -> {other}" for name in ARROWS for other in ARROWS[name]}
    upward = {
        f"{name} -> {other}" for name in ARROWS for other in ARROWS[name] if points_up(name, other)
    }

    assert upward == set(UPWARD)
    assert set(DEFERRED) <= arrows


def test_imports_form_no_cycle():
    excepted = UPWARD | DEFERRED
    downward = {
        name: {other for other in others if f"{name} -> {other}" not in excepted}
        for name, others in ARROWS.items()
    }

    TopologicalSorter(downward).prepare()


def test_an_import_cycle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter(ARROWS | {"errors": {"_tune"}}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_module_docstrings_begin_with_one_sentence(name):
    first, *rest = (ast.get_docstring(MODULES[name]) or "").splitlines()

    assert first.endswith(".")
    assert not rest or rest[0] == ""


def test_docstrings_begin_with_a_verb_or_noun_phrase():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [
        (name, node)
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]

    found = [
        f"{name}, line {getattr(node, 'lineno', 1)}: {(ast.get_docstring(node) or '')[:60]}"
        for name, node in documented
        if re.match(r"(What|Whether|Where|How|Which|Why)\b", ast.get_docstring(node) or "")
    ]

    assert not found, "\n".join(found)


def loaded_by(code: str) -> set[str]:
    program = f"import sys; {code}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return HEAVY & set(run.stdout.split())


def test_importing_autobatch_loads_no_heavy_package():
    assert loaded_by("import autobatch; dir(autobatch)") == set()


def test_loading_a_heavy_package_would_be_found():
    assert loaded_by("import autobatch; autobatch.find") >= {"torch", "pydantic"}


def test_all_lists_exactly_the_lazily_loaded_names():
    assert autobatch.__all__ == sorted(autobatch.__all__)
    assert set(autobatch.__all__) == set(autobatch._HOMES)


def test_type_checkers_see_the_same_names_and_modules():
    seen = {
        alias.name: node.module.removeprefix("autobatch.")
        for node in ast.walk(MODULES["__init__"])
        if isinstance(node, ast.ImportFrom) and node.module.startswith("autobatch")
        for alias in node.names
    }

    assert seen == autobatch._HOMES


@pytest.mark.parametrize("name", autobatch.__all__)
def test_every_public_name_can_be_imported(name):
    if autobatch._HOMES[name] == "lightning":
        needs_lightning()

    home = importlib.import_module(f"autobatch.{autobatch._HOMES[name]}")

    assert getattr(autobatch, name) is getattr(home, name)
    assert name in dir(autobatch)


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'largest_batch'"):
        autobatch.largest_batch  # noqa: B018


def test_version_comes_from_the_distribution():
    assert autobatch.__version__.count(".") == 2


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_define_every_name_in_all(name):
    if name == "lightning":
        needs_lightning()

    module = importlib.import_module(f"autobatch.{name}")

    assert all(hasattr(module, offered) for offered in module.__all__)


def annotations_of(kind: type) -> list[str]:
    """Return the annotations of public fields, and of the results of properties and methods."""
    fields = [
        text for name, text in vars(kind).get("__annotations__", {}).items() if name[0] != "_"
    ]
    getters = [
        member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        for name, member in vars(kind).items()
        if name[0] != "_"
    ]
    return fields + [getattr(each, "__annotations__", {}).get("return", "None") for each in getters]


def classes_in(annotation: str, kind: type) -> set[type]:
    """Return the classes of autobatch that an annotation of a class names."""
    from_elsewhere = {"Path": object, "Axes": object, "Figure": object}  # for type checkers only
    value = eval(annotation, vars(sys.modules[kind.__module__]) | from_elsewhere)
    found, open_ = set(), [value]
    while open_:
        each = open_.pop()
        open_ += typing.get_args(each)
        if isinstance(each, type) and each.__module__.startswith("autobatch"):
            found.add(each)
    return found


def test_every_type_of_a_report_and_of_an_estimate_is_in_the_public_module():
    from autobatch import report

    public = {getattr(report, name) for name in report.__all__}
    seen, open_ = set(), [report.TuningReport, report.Estimate]
    while open_:
        kind = open_.pop()
        seen.add(kind)
        for annotation in annotations_of(kind):
            open_ += classes_in(annotation, kind) - seen - set(open_)

    assert {report.CurvePoint, report.Settings, report.StreamRow, report.Banded} <= seen
    assert seen <= public


def test_every_autobatch_error_is_defined_and_drawn_in_errors():
    elsewhere = {
        node.name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if name != "errors" and {getattr(base, "id", "") for base in node.bases} & {*errors.__all__}
    }
    drawn = ast.get_docstring(MODULES["errors"])

    assert elsewhere == set()
    assert all(f"{name} " in drawn or f"{name}\n" in drawn for name in errors.__all__)


def test_find_and_autobatch_share_their_keywords():
    needs_lightning()
    finds = inspect.signature(autobatch.find).parameters
    tunes = inspect.signature(autobatch.AutoBatch).parameters
    own_of_find = {"workload", "restore", "dataset_size", "data_parallel_size"}
    own_of_autobatch = {
        "batch_arg_name",
        "evaluate",
        "on_out_of_memory",
        "repair_last_window",
        "retune_at_epochs",
        "set_batch_size",
        "worst_case",
    }

    assert set(finds) - own_of_find == set(tunes) - own_of_autobatch
    for name in set(finds) - own_of_find:
        # Name, default, annotation, and that it is given by keyword
        assert finds[name] == tunes[name]


def test_find_and_the_tune_of_transformers_share_their_keywords():
    finds = inspect.signature(autobatch.find).parameters
    tunes = inspect.signature(autobatch.transformers.tune).parameters
    own_of_find = {
        "workload",
        "restore",
        "dataset_size",
        "data_parallel_size",
        "latency_limit",
        "percentile",
    }
    own_of_tune = {"trainer", "worst_case", "apply", "resume_from_checkpoint"}

    assert set(finds) - own_of_find == set(tunes) - own_of_tune
    assert all(finds[name] == tunes[name] for name in set(finds) - own_of_find)
    evaluates = inspect.signature(autobatch.transformers.tune_evaluation).parameters
    assert all(tunes[name] == each for name, each in evaluates.items())


def needs_lightning() -> None:
    if not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
        pytest.skip("needs Lightning")
