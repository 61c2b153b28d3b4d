"""Memory of a device: readings, limits and the budget, in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]+)", re.IGNORECASE)
_BYTES_PER = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


_MOST_PERCENT: Final = 100  # up to which whole numbers may be meant as percentages
# Last sentence of every ProbeError: the remedy
PROBE_REMEDY: Final = (
    "Pass device= a MemoryProbe of your own, or autobatch.testing.SimulatedAccelerator('8GiB')."
)


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory of a device at one moment, in bytes; `failures` and `retries` are counts.

    Args:
        total: Capacity of the device.
        used: Memory used by all processes together.
        reserved: Memory of this process, apart from its device context.
        peak: Maximum of `reserved` since the trial began.
        failures: Allocations refused or retried so far.
        cap: The user's own limit for this process; None if there is none.
        retries: Failures that succeeded after the allocator had emptied its cache.
        allocated: Maximum of the bytes in use since the trial began, without cached and
            fragmented memory; None if the device cannot tell.
        requested: The same, before the allocator rounds sizes up to blocks.
    """

    total: int
    used: int
    reserved: int
    peak: int
    failures: int
    cap: int | None = None
    retries: int = 0
    allocated: int | None = None
    requested: int | None = None

    @property
    def refused(self) -> int:
        """Allocations that failed for good, so far."""
        return self.failures - self.retries

    @property
    def foreign(self) -> int:
        """Bytes this process cannot free: other processes, and its own device context."""
        return max(0, self.used - self.reserved)


class Watch(Protocol):
    """Allocations of a running trial, from a probe that sees each of them."""

    def mark(self) -> None:
        """Begin a new optimizer step."""

    @property
    def profile(self) -> tuple[int, ...]:
        """Bytes held after each allocation of the last complete step."""


class MemoryProbe(Protocol):
    """Device whose memory can be read and capped."""

    @property
    def name(self) -> str:
        """Name of the device for people."""

    @property
    def source(self) -> str:
        """Origin of the readings, and the reason for it."""

    def read(self) -> MemoryReading:
        """Return the present memory."""

    def limited(self, budget: int) -> AbstractContextManager[Watch | None]:
        """Reset the peak; in the body, an allocation beyond `budget` bytes is out of memory."""

    def attach(self, *objects: Any) -> None:
        """Account for objects on the device, if it does not count them itself."""

    def release(self) -> None:
        """Return cached memory to the device."""

    def clock(self) -> float:
        """Return the time in seconds after all queued work is done."""


def parse_bytes(name: str, value: int | str) -> int:
    """Return bytes from a whole number or a text such as "10GiB"; errors name the parameter."""
    amount = _bytes(value)
    if amount is None:
        raise ValueError(
            f"{name}={value!r} must be a whole number of bytes above 0, or text such as '10GiB'."
        )
    return amount


def parse_memory_limit(value: float | str) -> float | int:
    """Return a share of the device as a float, or bytes as an int."""
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        value = int(value) if isinstance(value, Integral) else float(value)  # a NumPy scalar
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if type(value) is int and 1 <= value <= _MOST_PERCENT:
        share = 1.0 if value == 1 else value / 100
        raise ValueError(
            f"memory_limit={value} could mean bytes or a share of the device; write {share} for "
            f"{share:.0%} of it."
        )
    amount = _bytes(value)
    if amount is None:
        raise ValueError(
            f"memory_limit={value!r} must be a share above 0.0 and up to 1.0, "
            "a whole number of bytes above 0, or text such as '10GiB'."
        )
    return amount


def format_bytes(n: int) -> str:
    """Return bytes for people: "7.6 GiB", "512 MiB", "12 B"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    # 1023.9 KiB would be rounded to 1024: the next unit begins half a unit early
    power = next((i for i in range(len(units)) if abs(n) < 1023.5 * 1024**i), len(units) - 1)
    amount = n / 1024**power
    decimals = 1 if abs(amount) < 99.95 else 0  # noqa: PLR2004 -- three digits are enough
    shown = f"{amount:.{decimals}f}".removesuffix(".0")
    return f"{shown} {units[power]}"


def memory_budget(reading: MemoryReading, limit: float) -> int:
    """Return the bytes this process may hold; zero or less if other processes use too much."""
    if isinstance(limit, float):
        budget = int(limit * reading.total) - reading.foreign
    else:
        budget = min(limit, reading.total - reading.foreign)
    return budget if reading.cap is None else min(budget, reading.cap)


def _bytes(value: object) -> int | None:
    amount: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value.strip())):
        unit = _BYTES_PER.get(match[2].lower())
        amount = int(Fraction(match[1]) * unit) if unit else None
    return amount if amount and amount > 0 else None
