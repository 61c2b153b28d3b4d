from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def packages_of(script: Path) -> set[str]:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    origins = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in modules | origins}


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_run_and_print_a_report(script, tmp_path):
    for package in packages_of(script):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")

    ran = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=tmp_path,
        # Small networks gain nothing from more threads, and lose much if the cores are busy
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )

    assert ran.returncode == 0, ran.stderr
    # A report was printed
    assert re.search(r"(?m)^  (Micro-batch|Batches of) \d+ ", ran.stdout)


def test_no_example_has_the_name_of_a_package():
    """A script named `lightning.py` would be imported instead of Lightning."""
    names = {script.stem for script in EXAMPLES.glob("*.py")}

    assert names
    assert not any(map(importlib.util.find_spec, names))
