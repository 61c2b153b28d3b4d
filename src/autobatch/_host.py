"""What the host has: memory of the machine, limits of the control groups around this process, shared memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HostMemory",
    "Level",
    "bytes_in",
    "control_groups",
    "machine_level",
    "text_of",
]


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
