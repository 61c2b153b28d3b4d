"""HostProbe: host memory from /proc and control groups."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autobatch._memory import PROBE_REMEDY, MemoryReading
from autobatch.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._memory import Watch


class HostProbe:
    """The memory of this machine, or of the container it pretends to be.

    Args:
        root: Where `proc` and `sys` are.
    """

    name = "host memory"

    def __init__(self, root: str | Path = "/") -> None:
        from autobatch._memory.ledger import Ledger  # it imports torch

        self._root = Path(root)
        self._ledger = Ledger()
        self._outside: int | None = None  # bytes held that the ledger does not see
        self.read()  # can not be read: better known now than in the first trial

    @property
    def source(self) -> str:
        """Where the readings come from, and why from there."""
        return min(self._levels(), key=lambda level: level.total).name

    def read(self) -> MemoryReading:
        """Read the memory as it is now; the peak is this process's size when the trial began plus the ledger's rise."""
        levels = self._levels()
        total = min(level.total for level in levels)
        reserved = self._resident()
        peak = reserved if self._outside is None else self._outside + self._ledger.peak
        return MemoryReading(
            total=total,
            used=total - min(level.total - level.used for level in levels),
            reserved=reserved,
            peak=peak,
            failures=self._ledger.failures,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch]:
        """Charge tensors to a ledger; refuse the one that would take this process past `budget`."""
        self._outside = outside = self._resident() - self._ledger.current
        with self._ledger.watching(budget - outside, offset=outside) as watch:
            yield watch

    def attach(self, *objects: Any) -> None:
        """Tell the ledger what already lives: modules, optimizers, tensors in any container."""
        self._ledger.attach(*objects)

    def release(self) -> None:
        """Give freed heap back to the system, which would otherwise count it as held."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)

    def clock(self) -> float:
        """Seconds; nothing is queued on the host."""
        return time.perf_counter()

    def _levels(self) -> list[Level]:
        """The machine, and each control group around this process that has a limit."""
        machine = machine_level(self._root)
        if machine is None:
            raise ProbeError(
                f"{self._root / 'proc/meminfo'} does not say how much memory there is, so the host's memory can not be "
                f"read. {PROBE_REMEDY}"
            )
        return [machine, *control_groups(self._root)]

    def _resident(self) -> int:
        """Bytes this process would give back by ending; pages of files are anyone's."""
        path = self._root / "proc/self/status"
        status = text_of(path)
        anonymous, shared = bytes_in(status, "RssAnon"), bytes_in(status, "RssShmem")
        if anonymous is not None and shared is not None:
            return anonymous + shared
        resident = bytes_in(status, "VmRSS")  # kernels before 4.5 do not tell them apart
        if resident is None:
            raise ProbeError(
                f"{path} does not say how much memory this process holds, so no trial could be judged. {PROBE_REMEDY}"
            )
        return resident


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What is left of the host's memory, in bytes; None where nothing says.

    Args:
        available: What this process may still take.
        shared: The size of the file system through which processes share tensors.
    """

    available: int | None
    shared: int | None

    @classmethod
    def here(cls, root: str | Path = "/") -> Self:
        """As it is now, where `proc`, `sys` and `dev` are in `root`."""
        root = Path(root)
        machine = machine_level(root)
        levels = [*([machine] if machine else []), *control_groups(root)]
        available = min((level.total - level.used for level in levels), default=None)
        return cls(available, _size_of(root / "dev/shm"))


@dataclass(frozen=True, slots=True)
class Level:
    """One of the limits this process lives under, in bytes."""

    name: str
    total: int
    used: int


def machine_level(root: Path) -> Level | None:
    """The machine; None where it does not say how much memory it has."""
    path = root / "proc/meminfo"
    said = text_of(path)
    total, available = bytes_in(said, "MemTotal"), bytes_in(said, "MemAvailable")
    if total is None or available is None:
        return None
    return Level(str(path), total, total - available)


def control_groups(root: Path) -> Iterator[Level]:
    """Control groups with a memory limit, from the outermost to this process's own; a parent's limit holds too."""
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
        # In a container the path may be the host's, of which only the mount's own directory is there to see
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = mount.joinpath(*parts[:depth])
            total, used = (text_of(group / name).strip() for name in (limit, usage))
            if total.isdecimal() and used.isdecimal():  # not "max"
                reclaimable = bytes_in(text_of(group / "memory.stat"), cache) or 0
                name = f"the memory limit of control group /{'/'.join(parts[:depth])}"
                yield Level(name, int(total), max(0, int(used) - reclaimable))


def text_of(path: Path) -> str:
    """What a file of the kernel's says; nothing where it has none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def bytes_in(text: str, field: str) -> int | None:
    """The amount that such a file gives for a field."""
    match = re.search(rf"^{field}:?\s+(\d+)( kB)?$", text, re.MULTILINE)
    return int(match[1]) * (1024 if match[2] else 1) if match else None


def _size_of(path: Path) -> int | None:
    try:
        said = os.statvfs(path)
    except (AttributeError, OSError):  # Windows has no such call
        return None
    return said.f_frsize * said.f_blocks
