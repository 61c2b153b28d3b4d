"""Size of the code, length of its call paths, and state of its prose, as one table.

    python benchmarks/measure.py [--root CHECKOUT] [--json PATH] [--paths]

Sources are read with `ast` and `tokenize`; call paths are recorded with `sys.setprofile` in a
subprocess that imports the package of the given checkout. Counted are:

- frames: functions of the package on the call stack when the user's code runs for the first time,
  in `find` and in `fit`, Lightning's own functions left out;
- modules that call each other back: pairs of modules of which each calls a function of the other
  during one `find`;
- following `target_batch_size`: the functions of one `find` that get the target as an argument, or
  use a name with "target", in the order of their first call. Files entered are the distinct files,
  returns are changes to a file that was left before;
- tests with private names: test functions that use a name imported from a private module, or a
  private name, directly or through a function of their file; `autobatch.__main__` is public.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

from pages import table

TARGET = 1016  # samples per update; a number that occurs nowhere else
# Files of the folder `_report` that hold data; the others present a report
DATA_OF_REPORT = {"__init__.py", "files.py", "result.py", "schema.py", "tradeoff.py"}


@dataclass(frozen=True)
class Paths:
    """Call paths of the package, recorded at run time."""

    find: list[str]  # frames from find() to the user's loop
    fit: list[str]  # frames from on_fit_start to training_step
    calling_back: list[str]  # pairs of files
    target: list[str]  # files, in the order in which they handle the target


# Sources


def parsed(folder: Path) -> dict[Path, ast.Module]:
    return {
        path.relative_to(folder): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def presents_a_report(path: Path) -> bool:
    is_data = path.name in DATA_OF_REPORT and "figure" not in path.parts
    return path.parts[0] == "_report" and not is_data


def docstrings(trees: dict[Path, ast.Module]) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for tree in trees.values() for node in ast.walk(tree))
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return [text for text in found if text]


def comments(folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*.py"):
        readline = io.StringIO(path.read_text(encoding="utf-8")).readline
        tokens = tokenize.generate_tokens(readline)
        found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return found


def words(texts: list[str]) -> list[str]:
    return [word.lower() for text in texts for word in re.findall(r"[A-Za-z']+", text)]


# Tests


def is_private(node: ast.ImportFrom, alias: ast.alias) -> bool:
    module = (node.module or "").split(".")
    if module[0] != "autobatch":
        return False
    names = (*module, alias.name)
    return any(name.startswith("_") and not name.endswith("__") for name in names)


def private_names(tree: ast.Module) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if is_private(node, alias)
    }


def names_used(function: ast.AST) -> set[str]:
    """Return the names in a function, its arguments (fixtures) among them."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}


def tests_with_private_names(trees: dict[Path, ast.Module]) -> tuple[int, int]:
    """Return the number of test functions that use a private name, and of all."""
    private = total = 0
    for tree in trees.values():
        functions = {
            node.name: names_used(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        suspect = private_names(tree)
        while more := {
            name for name, used in functions.items() if used & suspect and name not in suspect
        }:
            suspect |= more
        tests = [name for name in functions if name.startswith("test_")]
        private += sum(name in suspect for name in tests)
        total += len(tests)
    return private, total


# Call paths


def package_folder() -> str:
    import autobatch

    return str(Path(autobatch.__file__).parent)


def frames_on_stack(folder: str) -> list[str]:
    frames, frame = [], inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            frames.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return frames[::-1]


class Recorder:
    """Records calls between modules of the package, and functions that handle the target."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._seen = set()
        self.calls = set()  # (calling file, called file)
        self.files = []  # of functions with the target, in the order of their first calls

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._folder):
            return
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith(self._folder):
            self.calls.add((caller.f_code.co_filename, code.co_filename))
        if code not in self._seen and code.co_name != "<module>":
            self._seen.add(code)
            if self._handles_target(frame):
                self.files.append(code.co_filename)

    def _handles_target(self, frame) -> bool:
        code = frame.f_code
        if any("target" in name for name in (*code.co_names, *code.co_varnames)):
            return True
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in arguments]
        return any(type(value) is int and value == TARGET for value in values)


def recorded_find(folder: str) -> tuple[Recorder, list[str]]:
    import autobatch
    from autobatch.testing import PaperDevice

    paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21, seconds_per_sample=1e-4)
    stack = []

    def train(batch_size, accumulate):
        if not stack:
            stack.extend(frames_on_stack(folder))
        yield from paper.workload(batch_size, accumulate)

    recorder = Recorder(folder)
    sys.setprofile(recorder)
    try:
        autobatch.find(train, device=paper, target_batch_size=TARGET, dataset_size=50_000)
    finally:
        sys.setprofile(None)
    return recorder, stack


class FirstStepError(Exception):
    """Ends a fit at the first training step of a trial."""


def frames_of_fit(folder: str) -> list[str]:
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import autobatch
    from autobatch.testing import SimulatedAccelerator

    stack = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, *_):
            stack.extend(frames_on_stack(folder))
            raise FirstStepError

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tuner = autobatch.AutoBatch(target_batch_size=256, device=SimulatedAccelerator("1MiB"))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[tuner],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.zeros(1000, 8)), batch_size=8)
    try:
        trainer.fit(Module(), loader)
    except FirstStepError:
        return stack
    raise SystemExit("fit ended without a training step")


def record_paths() -> Paths:
    folder = package_folder()
    recorder, find_stack = recorded_find(folder)
    fit_stack = frames_of_fit(folder)
    pairs = [
        f"{Path(caller).relative_to(folder)} - {Path(called).relative_to(folder)}"
        for caller, called in sorted(recorder.calls)
        if caller < called and (called, caller) in recorder.calls
    ]
    files = [str(Path(file).relative_to(folder)) for file in recorder.files]
    changes = [file for before, file in zip(["", *files], files, strict=False) if file != before]
    return Paths(find_stack, fit_stack, pairs, changes)


def paths_of(root: Path) -> Paths:
    """Record the call paths of the package of another checkout, in a new interpreter."""
    ran = subprocess.run(  # noqa: S603 -- this script itself
        [sys.executable, __file__, "--trace"],
        check=False, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return Paths(**json.loads(ran.stdout.splitlines()[-1]))


# The table


def measure(root: Path, paths: Paths) -> dict[str, str]:
    package = root / "src" / "autobatch"
    trees = parsed(package)
    prose = words([*docstrings(trees), *comments(package)])
    private, tests = tests_with_private_names(parsed(root / "tests"))
    folders = {path.parts[0] for path in trees if len(path.parts) > 1}
    lines = {path: lines_of(package / path) for path in trees}
    shown = sum(count for path, count in lines.items() if presents_a_report(path))
    return {
        "files in the top folder of the package": f"{len(trees) - nested(trees)} + {len(folders)} folders",
        "lines of the package": f"{sum(lines.values()):,} in {len(lines)} files",
        "lines that present a report": f"{shown:,}",
        "frames from find / fit to the user's step": f"{len(paths.find)} / {len(paths.fit)}",
        "pairs of modules that call each other back": f"{len(paths.calling_back)}",
        "target_batch_size: files entered / returns to a file left": (
            f"{len(set(paths.target))} / {len(paths.target) - len(set(paths.target))}"
        ),
        "what / where per 1,000 words of docstrings and comments": " / ".join(
            f"{1000 * prose.count(word) / len(prose):.1f}" for word in ("what", "where")
        ),
        "words of README": f"{len((root / 'README.md').read_text(encoding='utf-8').split()):,}",
        "tests that use a private name": f"{private / tests:.0%} of {tests:,}",
    }


def nested(trees: dict[Path, ast.Module]) -> int:
    return sum(len(path.parts) > 1 for path in trees)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", type=Path, help="write the numbers into this file as well")
    parser.add_argument("--paths", action="store_true", help="print the recorded paths as well")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trace:
        print(json.dumps(asdict(record_paths())))
        return
    root = given.root.resolve()
    paths = paths_of(root)
    found = measure(root, paths)
    print(table(["measure", "value"], [list(row) for row in found.items()]))
    if given.paths:
        for name, steps in asdict(paths).items():
            print(f"\n{name}", *steps, sep="\n  ")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
