from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from conftest import set_curve_seconds
from forked import forked
from torchrun import as_by_torchrun, free_port

EXAMPLES = Path(__file__).parent.parent / "examples"


def packages_of(script: Path) -> set[str]:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    origins = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in modules | origins}


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_run_and_print_a_report(script, tmp_path, monkeypatch):
    for package in packages_of(script):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
        importlib.import_module(package)  # once, for all examples
    set_curve_seconds(monkeypatch, 2.0)
    port = free_port()
    is_job = script.stem.startswith("torchrun")
    environments = [as_by_torchrun(rank, port) for rank in (0, 1)] if is_job else [{}]

    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(forked(script, cwd=tmp_path, env=e)) for e in environments]
        ran, *others = [finish() for finish in ranks]

    assert ran.returncode == 0, ran.stderr
    # A report was printed
    assert re.search(r"(?m)^  (Micro-batch|Batches of) \d+ ", ran.stdout)
    assert [other.stdout for other in others] == [""] * len(others)


def test_no_example_has_the_name_of_a_package():
    """A script named `lightning.py` would be imported instead of Lightning."""
    names = {script.stem for script in EXAMPLES.glob("*.py")}

    assert names
    assert not any(map(importlib.util.find_spec, names))
