"""MemoryReading, MemoryProbe, memory_budget, is_oom."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = [
    "MemoryProbe",
    "MemoryReading",
    "Watch",
    "format_bytes",
    "is_oom",
    "memory_budget",
    "parse_bytes",
    "parse_memory_limit",
]

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

# What a RuntimeError says when a batch was too large. Matched without regard to case; kernels that ran out of shared
# memory ("out of resource"), asserts and illegal accesses are bugs, and must not be found here.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, XPU, MPS, Triton, NCCL ("Cuda failure 'out of memory'"): pytorch#152302
    "Caught OutOfMemoryError in",  # DataParallel and DataLoader re-raise a replica's error with its traceback
    "Failed to CUDA calloc",  # NCCL's buffers lie outside the caching allocator: nccl#1235
    "CUBLAS_STATUS_ALLOC_FAILED",  # its handle and workspace
    "CUDNN_STATUS_ALLOC_FAILED",  # its workspace
    "CUDNN_STATUS_INTERNAL_ERROR",  # what cuDNN says when its handle finds no room
    "CUDNN_STATUS_NOT_SUPPORTED",  # no algorithm left once those that need a workspace are out
    "unable to find an engine",  # the same, from cuDNN's version 8 interface
    "unable to find a valid cuDNN algorithm",  # the same, from its version 7 interface: marqo#101
    "DefaultCPUAllocator: can't allocate memory",  # Linux, where malloc was refused
    "DefaultCPUAllocator: not enough memory",  # Windows
    "std::bad_alloc",  # host memory, from C++
    "could not create a primitive(?! descriptor)",  # oneDNN: no room for scratch; a descriptor is a bad shape
    "32-?bit ?index ?math",  # CUDA kernels that count in 32 bits; one batch less may fit: pytorch#80020
    "INT_MAX elements",  # the same, in normalisation, sorting and nonzero
)
_TOO_LARGE = re.compile("|".join(_MESSAGES), re.IGNORECASE)


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
    power = next(
        (i for i in range(len(units)) if abs(n) < 1023.5 * 1024**i), len(units) - 1
    )
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


def is_oom(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, says that memory ran out or the batch was too large for a kernel."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop()
        # An interrupt is never out-of-memory, also when it came while one was handled
        if id(error) in seen or not isinstance(error, Exception):
            continue
        seen.add(id(error))
        if _says_too_large(error):
            return True
        if isinstance(error, ExceptionGroup):
            pending.extend(error.exceptions)
        led_to_it = error.__cause__
        if not error.__suppress_context__ and not isinstance(error, _BUGS):
            led_to_it = error.__context__
        if led_to_it is not None:
            pending.append(led_to_it)
    return False


# An error of these kinds while out-of-memory was being handled is a bug in the handler
_BUGS = (AttributeError, ImportError, LookupError, NameError, TypeError)


def _says_too_large(error: Exception) -> bool:
    # Where torch was never imported no error of its kind can exist, and asking must not import it
    torch_error: type[Exception] | None = getattr(
        sys.modules.get("torch"), "OutOfMemoryError", None
    )
    if isinstance(error, MemoryError) or (
        torch_error is not None and isinstance(error, torch_error)
    ):
        return True
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None


def _bytes(value: object) -> int | None:
    """Bytes above zero, or None where the value names none."""
    amount: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value.strip())):
        unit = _BYTES_PER.get(match[2].lower())
        amount = int(Fraction(match[1]) * unit) if unit else None
    return amount if amount and amount > 0 else None
