"""Memory of a device: readings, limits and the budget."""

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


# The end of every ProbeError: the way out.
PROBE_REMEDY: Final = (
    "Pass device= a MemoryProbe of your own, or autobatch.testing.SimulatedAccelerator('8GiB')."
)


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What a device's memory looks like at one moment; all in bytes but `failures` and `retries`.

    Args:
        total: What the device has.
        used: What all processes hold together.
        reserved: What this process holds and could give back.
        peak: The most this process has held since the trial began.
        failures: Allocations that were refused, or had to be retried, so far.
        cap: What the user lets this process hold at most; None where nothing was said.
        retries: How many of the failures were retries, once the allocator had emptied its cache.
    """

    total: int
    used: int
    reserved: int
    peak: int
    failures: int
    cap: int | None = None
    retries: int = 0

    @property
    def refused(self) -> int:
        """Allocations that were refused for good, so far."""
        return self.failures - self.retries

    @property
    def foreign(self) -> int:
        """Bytes that are not ours to free: other processes, and this process's own device context."""
        return max(0, self.used - self.reserved)


class Watch(Protocol):
    """What a probe that sees every allocation gives out while a trial runs."""

    def mark(self) -> None:
        """A new optimizer step begins."""

    @property
    def profile(self) -> tuple[int, ...]:
        """Bytes held after each allocation of the last complete step."""


class MemoryProbe(Protocol):
    """One device whose memory can be read and capped."""

    @property
    def name(self) -> str:
        """What a person calls the device."""

    @property
    def source(self) -> str:
        """Where the readings come from, and why from there."""

    def read(self) -> MemoryReading:
        """Read the memory as it is now."""

    def limited(self, budget: int) -> AbstractContextManager[Watch | None]:
        """Reset the peak; until the end, allocations that would take this process past `budget` bytes raise out-of-memory."""

    def attach(self, *objects: Any) -> None:
        """Tell the probe what already lives on the device; a no-op where the device knows."""

    def release(self) -> None:
        """Give cached memory back to the device."""

    def clock(self) -> float:
        """Seconds, read after all queued work is done."""


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes, from a whole number or from text such as "10GiB"; `name` is the parameter an error speaks of."""
    amount = _bytes(value)
    if amount is None:
        raise ValueError(
            f"{name}={value!r} must be a whole number of bytes above 0, or text such as '10GiB'."
        )
    return amount


def parse_memory_limit(value: float | str) -> float | int:
    """A share of the device as a float, or bytes as an int."""
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        value = int(value) if isinstance(value, Integral) else float(value)  # numpy's
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if value == 1 and type(value) is int:
        raise ValueError(
            "memory_limit=1 could mean one byte or the whole device; write 1.0 for the whole device."
        )
    amount = _bytes(value)
    if amount is None:
        raise ValueError(
            f"memory_limit={value!r} must be a share above 0.0 and up to 1.0, a whole number of bytes above 0, "
            "or text such as '10GiB'."
        )
    return amount


def format_bytes(n: int) -> str:
    """Bytes for people: "7.6 GiB", "512 MiB", "12 B"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    # 1023.9 KiB would round to 1024: the next unit begins half a unit early
    power = next((i for i in range(len(units)) if abs(n) < 1023.5 * 1024**i), len(units) - 1)
    amount = n / 1024**power
    decimals = 1 if abs(amount) < 99.95 else 0  # noqa: PLR2004 -- three digits are enough
    shown = f"{amount:.{decimals}f}".removesuffix(".0")
    return f"{shown} {units[power]}"


def memory_budget(reading: MemoryReading, limit: float) -> int:
    """Bytes this process may hold under a parsed limit; zero or less where others hold too much."""
    if isinstance(limit, float):
        budget = int(limit * reading.total) - reading.foreign
    else:
        budget = min(limit, reading.total - reading.foreign)
    return budget if reading.cap is None else min(budget, reading.cap)


def _bytes(value: object) -> int | None:
    """Bytes above zero, or None where the value names none."""
    amount: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value.strip())):
        unit = _BYTES_PER.get(match[2].lower())
        amount = int(Fraction(match[1]) * unit) if unit else None
    return amount if amount and amount > 0 else None
