"""Bytes, seconds and percentages, formatted for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DIGITS = 3  # significant ones of the largest number in a column
_DIGITS_LEAST = 2  # and of the smallest
_LONGEST = 1e5  # a number that no column shows, as long as there is a larger unit


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit for people, used when the smallest number to show is at least `since`."""

    name: str
    factor: float
    since: float


SECONDS = (
    Unit("h", 3600, 7200),
    Unit("min", 60, 120),
    Unit("s", 1, 1),
    Unit("ms", 1e-3, 1e-4),
    Unit("µs", 1e-6, 1e-6),
    Unit("ns", 1e-9, 1e-15),
    Unit("ms", 1e-3, 0),  # nothing at all
)
BYTES = (
    Unit("GiB", 2**30, 2**29),
    Unit("MiB", 2**20, 2**19),
    Unit("KiB", 2**10, 0),
)


def unit_for(values: Iterable[float], units: Sequence[Unit]) -> Unit:
    """The one unit in which all of these are shown."""
    known = list(values)
    least, most = min(known, default=0), max(known, default=0)
    fine = [unit for unit in units if least >= unit.since] or [units[-1]]
    larger = units[: units.index(fine[0])]
    short = [unit for unit in (fine[0], *reversed(larger)) if most < _LONGEST * unit.factor]
    return next(iter(short), fine[0])


def aligned(values: Sequence[float]) -> list[str]:
    """The numbers of a column with the same decimals: three digits of the largest, two of the smallest."""
    digits = [_digits(value) for value in values]
    largest, least = max(digits, default=1), min(digits, default=1)
    if largest > _DIGITS:
        return [f"{round(value, min(0, _DIGITS - _digits(value))):,.0f}" for value in values]
    decimals = min(3, max(0, _DIGITS - largest, _DIGITS_LEAST - least))
    return [f"{value:,.{decimals}f}" for value in values]


def _digits(value: float) -> int:
    """Digits before the point; zero or less for a fraction below a tenth."""
    return math.floor(math.log10(abs(value))) + 1 if value else 1


def quantity(value: float, units: Sequence[Unit]) -> str:
    """One number with its unit, "48.2 s"; decimals that are all zero are left out."""
    unit = unit_for([value], units)
    whole, _, decimals = aligned([value / unit.factor])[0].partition(".")
    return f"{whole}.{decimals} {unit.name}" if decimals.strip("0") else f"{whole} {unit.name}"


def percent(share: float) -> str:
    """A share as a whole percentage; what is not quite nothing, or not quite all, says so."""
    if 0 < share < 0.005:  # noqa: PLR2004 -- would round to 0
        return "<1 %"
    if 0.995 <= share < 1:  # noqa: PLR2004 -- would round to 100
        return ">99 %"
    return f"{100 * share:.0f} %"


def plain(text: str) -> str:
    """One line without control characters, whatever a name or a file held."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
