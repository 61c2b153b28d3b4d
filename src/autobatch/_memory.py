"""MemoryReading, MemoryProbe, memory_budget, is_oom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["MemoryProbe", "MemoryReading", "Watch"]


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What a device's memory looks like at one moment; all in bytes but `failures`.

    Args:
        total: What the device has.
        used: What all processes hold together.
        reserved: What this process holds and could give back.
        peak: The most this process has held since the trial began.
        failures: Allocations that were refused, or had to be retried, so far.
    """

    total: int
    used: int
    reserved: int
    peak: int
    failures: int

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
