"""HostProbe: host memory from /proc and control groups."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from autobatch._memory import PROBE_REMEDY, MemoryReading
from autobatch.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._memory import Watch

# Parameters of mallopt (glibc 2.41, malloc.h)
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
# Bytes of an allocation from which malloc maps it by itself, and returns it when it is freed. glibc
# begins with the smaller one, and goes up to the larger one when large tensors are freed
_SEPARATE: Final = 128 * 1024
_KEPT: Final = 32 * 1024**2
# Heap over live tensors: of steps on the CPU, the largest that was seen is 3
_FRAGMENTED: Final = 4
# Spare bytes over live tensors of a trial, above which the heap may keep what these leave
_FEW_IN_HEAP: Final = 16


class HostProbe:
    """Memory of this machine, or of the container around this process.

    Args:
        root: Directory that contains `proc` and `sys`.
    """

    name = "host memory"

    def __init__(self, root: str | Path = "/") -> None:
        from autobatch._memory.ledger import Ledger  # it imports torch

        self._root = Path(root)
        self._ledger = Ledger()
        self._outside: int | None = None  # bytes of this process that the ledger does not see
        self._at_once = False  # whether malloc returns freed tensors
        self._needs_at_once = False  # whether a size within the budget could exceed it otherwise
        self.read()  # fails here rather than in the first trial

    @property
    def source(self) -> str:
        return min(self._limits(), key=lambda limit: limit.total).name

    def read(self) -> MemoryReading:
        """Return the present memory; the peak is the size at the start plus the ledger's rise."""
        limits = self._limits()
        total = min(limit.total for limit in limits)
        reserved = self._resident()
        peak = reserved if self._outside is None else self._outside + self._ledger.peak
        return MemoryReading(
            total=total,
            used=total - min(limit.free for limit in limits),
            reserved=reserved,
            peak=peak,
            failures=self._ledger.failures,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch]:
        """Charge tensors to a ledger; refuse an allocation that exceeds `budget` bytes.

        malloc returns freed tensors at once in the body, so that memory is what the ledger counts.
        """
        resident = self._resident()
        # malloc may put a tensor into free parts of its heap, which are not returned afterwards
        self._outside = outside = resident - self._ledger.current + self._free_heap()
        self._return_tensors(at_once=True)
        try:
            with self._ledger.watching(budget - outside, offset=outside) as watch:
                yield watch
        finally:
            # Once a size needs it, for all: tensors of others would leave free parts in the heap
            growth = outside + self._ledger.peak - resident
            self._needs_at_once |= _FEW_IN_HEAP * growth > budget - resident
            self._return_tensors(at_once=self._needs_at_once)

    def attach(self, *objects: Any) -> None:
        """Charge existing objects: modules, optimizers, tensors in any container."""
        self._ledger.attach(*objects)

    def release(self) -> None:
        """Return freed heap to the system, which would otherwise count it as used."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)

    def keep_within(self, spare: int, growth: int) -> None:
        """Let malloc return freed tensors at once if they could fill the spare bytes otherwise.

        By itself, malloc keeps freed tensors for new ones, which is faster, and holds up to a few
        times the memory of the live ones.

        Args:
            spare: Bytes from the memory of this process to the budget.
            growth: Bytes by which live tensors grow in a step.
        """
        self._return_tensors(at_once=_FRAGMENTED * growth > spare)

    def clock(self) -> float:
        """Return the time in seconds; nothing is queued on the host."""
        return time.perf_counter()

    def _return_tensors(self, *, at_once: bool) -> None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        is_set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
        if mallopt is None or is_set_by_user or at_once == self._at_once:
            return
        self._at_once = at_once
        threshold = _SEPARATE if at_once else _KEPT
        mallopt(_M_MMAP_THRESHOLD, threshold)
        mallopt(_M_TRIM_THRESHOLD, threshold if at_once else 2 * threshold)  # as glibc has them

    def _free_heap(self) -> int:
        """Return the free bytes in the heap of malloc; 0 where it does not say."""
        info = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if info is None or self._root != Path("/"):  # files of another process
            return 0
        info.restype = _MallocInfo
        return int(info().fordblks)

    def _limits(self) -> list[MemoryLimit]:
        """Machine, and every control group with a limit around this process."""
        machine = machine_limit(self._root)
        if machine is None:
            raise ProbeError(
                f"{self._root / 'proc/meminfo'} does not say how much memory there is, "
                f"so host memory cannot be read. {PROBE_REMEDY}"
            )
        return [machine, *control_groups(self._root)]

    def _resident(self) -> int:
        """Bytes that are freed when this process ends; pages of files are shared and left out."""
        path = self._root / "proc/self/status"
        status = text_of(path)
        anonymous, shared = bytes_in(status, "RssAnon"), bytes_in(status, "RssShmem")
        if anonymous is not None and shared is not None:
            return anonymous + shared
        resident = bytes_in(status, "VmRSS")  # kernels before 4.5 have only the sum
        if resident is None:
            raise ProbeError(
                f"{path} does not say how much memory this process holds, "
                f"so no trial could be judged. {PROBE_REMEDY}"
            )
        return resident


class _MallocInfo(ctypes.Structure):
    """The struct `mallinfo2` of glibc 2.33 and later."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory left on the host, in bytes; None if unknown."""

    available: int | None  # memory this process may still allocate
    shared: int | None  # size of the file system through which processes share tensors

    @classmethod
    def read(cls, root: str | Path = "/") -> Self:
        """Return the present memory; `root` contains `proc`, `sys` and `dev`."""
        root = Path(root)
        machine = machine_limit(root)
        limits = [*([machine] if machine else []), *control_groups(root)]
        available = min((limit.free for limit in limits), default=None)
        return cls(available, _size_of(root / "dev/shm"))


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Limit on the memory of this process, in bytes."""

    name: str
    total: int
    used: int

    @property
    def free(self) -> int:
        return self.total - self.used


def machine_limit(root: Path) -> MemoryLimit | None:
    """Memory of the machine; None if the kernel does not report it."""
    path = root / "proc/meminfo"
    text = text_of(path)
    total, available = bytes_in(text, "MemTotal"), bytes_in(text, "MemAvailable")
    if total is None or available is None:
        return None
    return MemoryLimit(str(path), total, total - available)


def control_groups(root: Path) -> Iterator[MemoryLimit]:
    """Yield control groups with a memory limit, outermost first; limits of all parents apply."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1: a tree per controller
            mount /= "memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host, of which only the mount point is visible
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = mount.joinpath(*parts[:depth])
            total, used = (text_of(group / name).strip() for name in (limit, usage))
            if total.isdecimal() and used.isdecimal():  # not "max"
                reclaimable = bytes_in(text_of(group / "memory.stat"), cache) or 0
                name = f"the memory limit of control group /{'/'.join(parts[:depth])}"
                yield MemoryLimit(name, int(total), max(0, int(used) - reclaimable))


def text_of(path: Path) -> str:
    """Content of a kernel file; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def bytes_in(text: str, field: str) -> int | None:
    """Amount of a field in the text of a kernel file."""
    match = re.search(rf"^{field}:?\s+(\d+)( kB)?$", text, re.MULTILINE)
    return int(match[1]) * (1024 if match[2] else 1) if match else None


def _size_of(path: Path) -> int | None:
    try:
        status = os.statvfs(path)
    except (AttributeError, OSError):  # Windows has no such call
        return None
    return status.f_frsize * status.f_blocks
