"""Ctrl-C at lines of the library: nothing is left behind, and the next run works."""

from __future__ import annotations

import inspect
import random

import pytest

import autobatch
import interrupts

pytestmark = [pytest.mark.guide, pytest.mark.filterwarnings("ignore")]

# Lines that enter or leave a change
CHANGING = (
    "_undo.py",
    "_apply.py",
    "_autobatch.py",
    "_tuned_training.py",
    "batch_size.py",
    "_compat.py",
    "_isolation.py",
    "_run.py",
    "optimizers.py",
    "snapshot.py",
)


def problems(kind, chosen):
    """Return what interrupts at the first execution of lines leave behind."""
    make = interrupts.RUNS[kind]
    lines = chosen(list(interrupts.executed(make)))
    left = {}
    for line in lines:
        found = interrupts.interrupted_at(make, line, 1)
        if found:
            left[line] = found
    assert lines
    return left


def some_changing(lines):
    lines = [line for line in lines if line[0].endswith(CHANGING)]
    return random.Random(3).sample(lines, 8)


@pytest.mark.parametrize("kind", interrupts.RUNS)
def test_an_interrupt_at_some_lines_leaves_nothing(kind):
    assert problems(kind, some_changing) == {}


def test_an_interrupt_at_any_line_of_the_method_tune_leaves_nothing():
    tune = autobatch.AutoBatch.tune
    source, first = inspect.getsourcelines(tune)
    of_tune = {(tune.__code__.co_filename, first + at) for at in range(len(source))}

    assert problems("tune", lambda lines: [line for line in lines if line in of_tune]) == {}


@pytest.mark.sweep
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("kind", interrupts.RUNS)
def test_an_interrupt_at_any_line_leaves_nothing(kind, capsys):
    tried = []

    left = problems(kind, lambda lines: tried.extend(lines) or lines)

    with capsys.disabled():
        print(f"\n{kind}: interrupted at each of {len(tried)} executed lines")
    assert left == {}
