"""CudaProbe: torch's CUDA allocator and NVML."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from autobatch._memory import PROBE_REMEDY, MemoryReading, format_bytes
from autobatch._memory.host import HostMemory
from autobatch.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Iterator


# Counts of torch's allocator: allocations tried again with the cache emptied, and those refused; the last of these is
# torch 2.13's, before cudaMalloc is asked
_RETRIES: Final = "num_alloc_retries"
_REFUSALS: Final = ("num_ooms", "num_oom_rejections")


class CudaProbe:
    """A CUDA device: what all processes hold from NVML, what this one holds from torch's allocator.

    Args:
        index: As torch counts devices; None is the current one.
    """

    def __init__(self, index: int | None) -> None:
        import torch

        self._nvml: _NvmlDevice | None = None
        try:
            self._index = torch.cuda.current_device() if index is None else index
            properties = torch.cuda.get_device_properties(self._index)
        except (AssertionError, RuntimeError) as error:
            raise ProbeError(f"cuda:{index} can not be opened: {error}. {PROBE_REMEDY}") from error
        self.name = f"{properties.name} (cuda:{self._index})"
        self.device = f"cuda:{self._index}"
        self._total = properties.total_memory  # bytes; torch's caps are shares of this
        self._is_integrated = bool(getattr(properties, "is_integrated", False))
        self._refused = ""  # why NVML is not asked
        self._own: float | None = None  # the user's cap, while that of a trial is there
        try:
            self._nvml = _NvmlDevice(self._index, properties.uuid, self._total)
        except Exception as error:
            self._fall_back(error)
        self.read()  # can not be read: better known now than in the first trial

    @property
    def source(self) -> str:
        """Where the readings come from, and why from there."""
        said = "NVML"
        if self._nvml is None:
            said = f"torch.cuda.mem_get_info, because {self._refused}"
        if self._is_integrated:
            said += (
                "; no more than the host has left is counted as free, because they share one memory"
            )
        return said

    def read(self) -> MemoryReading:
        """Read the memory as it is now."""
        import torch

        free, total = self._free_and_total()
        try:
            stats = torch.cuda.memory_stats(self._index)
        except RuntimeError as error:
            # Not every allocator that can be plugged in counts
            raise ProbeError(
                f"torch's allocator does not tell what it holds of cuda:{self._index}: {_first_line(error)}. {PROBE_REMEDY}"
            ) from error
        return MemoryReading(
            total=total,
            used=total - free,
            reserved=stats.get("reserved_bytes.all.current", 0),
            peak=stats.get("reserved_bytes.all.peak", 0),
            failures=sum(stats.get(count, 0) for count in (_RETRIES, *_REFUSALS)),
            cap=self._own_cap(),
            retries=stats.get(_RETRIES, 0),
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[None]:
        """Reset the peak, and cap torch's allocator at `budget` or at the user's own cap, whichever is lower."""
        import torch

        self._own = own = self._own_share()
        share = min(own, max(budget, 0) / self._total)
        torch.cuda.reset_peak_memory_stats(self._index)
        torch.cuda.set_per_process_memory_fraction(share, self._index)
        try:
            yield
        except BaseException:
            # A device that has failed for good refuses this as well, and what failed it is what has to be told
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_per_process_memory_fraction(own, self._index)
            raise
        else:
            torch.cuda.set_per_process_memory_fraction(own, self._index)
        finally:
            self._own = None

    def _own_cap(self) -> int | None:
        """The cap that the user has set, in bytes."""
        share = self._own_share() if self._own is None else self._own
        return None if share >= 1.0 else int(share * self._total)

    def _own_share(self) -> float:
        """The cap that the user has set, as a share; 1.0 is none."""
        import torch

        # Older versions of torch set a cap but can not tell it: there a cap of the user's is lifted afterwards
        ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if ask is None:
            return 1.0
        try:
            own: float = ask(self._index)
        except RuntimeError:  # an allocator that knows no caps
            return 1.0
        return min(1.0, own)  # cudaMallocAsync tells of far more where none is set

    def attach(self, *objects: Any) -> None:
        """Nothing: CUDA's allocator knows what lives on the device."""

    def release(self) -> None:
        """Give cached memory back to the device."""
        import torch

        torch.cuda.empty_cache()

    def clock(self) -> float:
        """Seconds, read after all queued work is done."""
        import torch

        torch.cuda.synchronize(self._index)
        return time.perf_counter()

    def processes(self) -> dict[int, int | None] | None:
        """Bytes that each process holds, by its id, or None where NVML does not know; None where it tells of none at all."""
        if self._nvml is None:
            return None
        try:
            return self._nvml.processes()
        except Exception:
            return None  # nothing depends on it, and memory may be told all the same

    def _free_and_total(self) -> tuple[int, int]:
        free, total = self._from_driver()
        available = HostMemory.here().available if self._is_integrated else None
        return free if available is None else min(free, available), total

    def _from_driver(self) -> tuple[int, int]:
        import torch

        if self._nvml is not None:
            try:
                return self._nvml.free_and_total()
            except Exception as error:
                self._fall_back(error)
        try:
            return torch.cuda.mem_get_info(self._index)
        except RuntimeError as error:
            raise ProbeError(
                f"The memory of cuda:{self._index} can not be read: {_first_line(error)}; {self._refused}. {PROBE_REMEDY}"
            ) from error

    def _fall_back(self, error: Exception) -> None:
        """Read from CUDA from now on: the two count differently, so they are never mixed."""
        self._nvml = None
        self._refused = _why(error)


class _NvmlDevice:
    """The physical device behind one of torch's; raises, with any error, where NVML can not be trusted."""

    def __init__(self, index: int, uuid: object, total: int) -> None:
        import pynvml

        self._expected = total
        self._pynvml = pynvml
        pynvml.nvmlInit()  # NVML counts these; the end of the process undoes them
        # By UUID, never by index: NVML knows neither CUDA_VISIBLE_DEVICES nor CUDA_DEVICE_ORDER
        instance = _mig_instance(index)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(instance or f"GPU-{uuid}")
        if instance is None and self._mig_is_on():
            raise _NotThisDeviceError("MIG is on and CUDA_VISIBLE_DEVICES names no instance")

    def free_and_total(self) -> tuple[int, int]:
        # Version 1 of the call; version 2 counts what the driver reserves in another place
        memory = self._pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        if abs(memory.total - self._expected) > self._expected // 10:
            raise _NotThisDeviceError(
                f"NVML's total is {format_bytes(memory.total)} where CUDA's is {format_bytes(self._expected)}"
            )
        return memory.free, memory.total

    def processes(self) -> dict[int, int | None]:
        """Bytes by process; None where the driver does not know, as on Windows and in WSL."""
        found: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            ask = getattr(self._pynvml, f"nvmlDeviceGet{kind}RunningProcesses")
            for process in ask(self._handle):
                found[process.pid] = process.usedGpuMemory
        return found

    def _mig_is_on(self) -> bool:
        try:
            current, _pending = self._pynvml.nvmlDeviceGetMigMode(self._handle)
        except self._pynvml.NVMLError:  # a device that has no such mode
            return False
        return bool(current)


class _NotThisDeviceError(Exception):
    """What NVML shows is not the device torch uses."""


def _mig_instance(index: int) -> str | None:
    """The MIG UUID by which this process was given a device; torch's own UUID may be that of the whole card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[index].strip() if index < len(visible) else ""
    return name if name.startswith("MIG-") else None


# What NVML's words leave open, by the code of the error in nvml.h
_MEANING: Final = {
    3: "the driver does not count the memory of this device",  # NOT_SUPPORTED: unified memory, Jetson
    12: "no libnvidia-ml.so.1 is installed",  # LIBRARY_NOT_FOUND
    18: "the driver was updated while it ran; restart the machine",  # LIB_RM_VERSION_MISMATCH
}


def _why(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "pynvml can not be imported"
    if isinstance(error, AttributeError):
        return "the module pynvml is not the one from nvidia-ml-py"
    if isinstance(error, _NotThisDeviceError):
        return str(error)
    said = f"NVML said: {error}".rstrip(".")
    meaning = _MEANING.get(getattr(error, "value", 0))
    return f"{said} ({meaning})" if meaning else said


def _first_line(error: Exception) -> str:
    """What CUDA says, without its advice on debugging."""
    return str(error).partition("\n")[0].rstrip(".")
