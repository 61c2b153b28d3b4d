"""Setup of all tests: one thread, quick tuning unless marked otherwise, and text snapshots.

`pytest --overwrite` rewrites the snapshots, `git diff` shows the changes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import os
from collections import Counter
from pathlib import Path

# Networks here are small: a second thread costs more than it gives, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# Before Lightning takes it: for each Trainer it reads the metadata of all packages, to look for
# callbacks, which takes 15 ms each time
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
pytest.register_assert_rewrite("by_hand", "hugging_face")  # its assertions show their values

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # No limits on time, which a busy machine exceeds
    untimed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    # The same examples in each run, so that a failure is one of the change; `full` has as many as
    # Hypothesis draws by default, and `--hypothesis-profile=random` looks for new ones
    settings.register_profile("brief", max_examples=30, derandomize=True, **untimed)
    settings.register_profile("full", max_examples=100, derandomize=True, **untimed)
    settings.register_profile("random", max_examples=1000, **untimed)
    settings.load_profile("brief")

# Few tests that take long, the longest first: pytest-xdist would start these files last, and one
# process would wait
STARTED_FIRST = (
    "test_benchmarks.py",
    "test_sharded_find.py",
    "test_on_gpu.py",
    "test_soak.py",
    "test_strategies.py",
    "test_lightning.py",
    "test_ranks.py",
    "test_transformers_ranks.py",
    "test_host_limit.py",
    "test_waiting.py",
)
TIMES_OUT = importlib.util.find_spec("pytest_timeout") is not None
SNAPSHOTS = Path(__file__).parent / "snapshots"


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write text snapshots anew")
    if not TIMES_OUT:
        parser.addini("timeout", "seconds of a test, where pytest-timeout watches them")


def pytest_configure(config):
    if not TIMES_OUT:
        config.addinivalue_line("markers", "timeout(seconds): see the setting timeout")
    config.option.loadscopereorder = False  # pytest-xdist keeps the order of files made here


def pytest_collection_modifyitems(items):
    seconds_of = Counter()
    for item in items:  # about: one that can train does
        seconds_of[item.path] += 0.5 if hasattr(item.module, "pl") else 0.02
    first = {name: at for at, name in enumerate(STARTED_FIRST)}
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), -seconds_of[item.path]))
    files = {path: number for number, path in enumerate(dict.fromkeys(i.path for i in items))}
    items.sort(key=lambda item: files[item.path])  # of equal length, one after the other


def pytest_collection_finish(session):
    importlib.import_module("torch._dynamo")  # or else the first step of an optimizer imports it


@pytest.fixture(autouse=True, scope="module")
def _without_old_objects():
    """Keep what was imported before out of garbage collections, of which a search does many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _without_curve(request, monkeypatch):
    """Time no throughput curve, unless a test is marked `curve`: most tests tune many times."""
    if request.node.get_closest_marker("curve") is None:
        set_curve_seconds(monkeypatch, 0.0)


@pytest.fixture(autouse=True)
def _without_guide(request, monkeypatch):
    """Predict no memory, unless a test is marked `guide`: traces take longer than small trials."""
    if request.node.get_closest_marker("guide") is None:
        monkeypatch.setattr("autobatch._guide.Guide._confirmed", lambda *_: None)


def set_curve_seconds(monkeypatch, seconds):
    """Replace the one default that find() and AutoBatch read at each call."""
    monkeypatch.setattr("autobatch._settings.TIMING_SECONDS", seconds)


@pytest.fixture(
    params=[
        "paper",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                # What a driver or a compiler warns of there is not known here
                pytest.mark.filterwarnings("default"),
            ],
        ),
    ]
)
def place(request, monkeypatch):
    """A device for the claims about CUDA: see gpu_place.py."""
    from gpu_place import on_cuda, on_paper

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    with contextlib.ExitStack() as stack:
        made = on_cuda() if request.param == "cuda" else on_paper(monkeypatch)
        yield stack.enter_context(made)


@pytest.fixture
def snapshot(request):
    """Compare a text with the file of that name under tests/snapshots."""

    def matches(text: str, name: str) -> None:
        path = SNAPSHOTS / name
        if request.config.getoption("--overwrite"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; `pytest --overwrite` writes it"
        assert text == path.read_text(encoding="utf-8")

    return matches
