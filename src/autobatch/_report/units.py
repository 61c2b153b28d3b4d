"""Bytes, seconds, percentages, factors and counts, formatted for people.

A single number of bytes is formatted by `autobatch._memory.format_bytes`, which errors below the
report use too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DIGITS: Final = 3  # significant digits of the largest number in a column
_FEWEST_DIGITS: Final = 2  # significant digits of the smallest
_LONGEST: Final = 1e5  # a column takes a larger unit before its numbers get this large
_LONGEST_TEXT: Final = 10_000  # characters: layout takes quadratic time (rich 15.0)
_LEAST_PERCENT: Final = 0.01  # distance from 0 % and 100 % of a share that is neither


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit for people, used when the smallest number to show is at least `since`."""

    name: str
    factor: float
    since: float


SECONDS: Final = (
    Unit("h", 3600, 7200),
    Unit("min", 60, 120),
    Unit("s", 1, 1),
    Unit("ms", 1e-3, 1e-4),
    Unit("µs", 1e-6, 1e-6),
    Unit("ns", 1e-9, 1e-15),
    Unit("ms", 1e-3, 0),  # exactly zero
)
BYTES: Final = (Unit("GiB", 2**30, 2**29), Unit("MiB", 2**20, 2**19), Unit("KiB", 2**10, 0))


def unit_for(values: Iterable[float], units: Sequence[Unit]) -> Unit:
    """Return one unit that suits all of the values."""
    known = list(values)
    least, most = min(known, default=0), max(known, default=0)
    fine = next((unit for unit in units if least >= unit.since), units[-1])
    larger = units[: units.index(fine)]
    short = (unit for unit in (fine, *reversed(larger)) if most < _LONGEST * unit.factor)
    return next(short, fine)


def aligned(values: Sequence[float]) -> list[str]:
    """Return numbers with equal decimals: three digits of the largest, two of the smallest."""
    digits = [_digits(value) for value in values]
    largest, least = max(digits, default=1), min(digits, default=1)
    if largest > _DIGITS:
        return [f"{round(value, min(0, _DIGITS - _digits(value))):,.0f}" for value in values]
    decimals = min(3, max(0, _DIGITS - largest, _FEWEST_DIGITS - least))
    return [f"{value:,.{decimals}f}" for value in values]


def _digits(value: float) -> int:
    """Return the number of digits before the point; zero or less for a fraction below a tenth."""
    return math.floor(math.log10(abs(value))) + 1 if value else 1


def rounded(value: float) -> str:
    """Return a number with three significant digits, "1,430"."""
    return aligned([value])[0]


def trimmed(value: float) -> str:
    """Return a number with at most three significant digits, "7.6"."""
    text = rounded(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them, "71.6 ms"; no decimals that are all zero."""
    unit = unit_for([seconds], SECONDS)
    whole, _, decimals = rounded(seconds / unit.factor).partition(".")
    return f"{whole}.{decimals} {unit.name}" if decimals.strip("0") else f"{whole} {unit.name}"


def percent(share: float) -> str:
    """Return a share as a percentage, "92 %", with decimals near nothing and near all, "99.6 %"."""
    value = 100 * share
    if not 0 < share < 1:
        return f"{value:,.0f} %"
    value = min(max(value, _LEAST_PERCENT), 100 - _LEAST_PERCENT)
    texts = (f"{value:.{decimals}f}" for decimals in (0, 1, 2))
    text = next(text for text in texts if float(text) not in (0, 100))
    return f"{text} %"


def factor(value: float | None) -> str:
    """Return a factor with two significant digits, "×1.4"; no text for None."""
    if value is None:
        return ""
    return f"×{value:,.0f}" if value >= 10 else f"×{value:.2g}"  # noqa: PLR2004 -- two digits


def multiple(value: float, decimals: int = 2) -> str:
    """Return a multiple with equal decimals below 10, "1.65×", and two digits above, "1,100×".

    A multiple that its decimals would show as 0 has one digit, "0.02×".
    """
    if 0 < value < 0.5 * 10**-decimals:
        return f"{value:.1g}×"
    if value < 10:  # noqa: PLR2004 -- one digit before the point
        return f"{value:.{decimals}f}×"
    return f"{float(f'{value:.2g}'):,.0f}×"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, "1 trial", "5,005 updates"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(sizes: Iterable[int]) -> str:
    """Return sizes as part of a sentence, "8, 1,024 and 2,048"."""
    *first, last = (f"{size:,}" for size in sizes)
    return f"{', '.join(first)} and {last}" if first else last


def plain(text: str) -> str:
    """Return text from outside as one line without control characters, cut if it is very long."""
    shown = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())
