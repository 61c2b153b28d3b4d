"""CudaProbe: torch's CUDA allocator and NVML."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._memory import PROBE_REMEDY, MemoryReading, format_bytes
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.host import HostMemory
from autobatch.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._memory.estimate.scratch import Gpu

# Counters of torch's allocator. Retries succeeded after the cache was emptied; rejections, since
# torch 2.13, are refused before cudaMalloc is called
_RETRIES: Final = "num_alloc_retries"
_REFUSALS: Final = ("num_ooms", "num_oom_rejections")
_ALLOCATOR_SETTINGS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_CUDNN_ATTENTION: Final = 91500  # version from which torch 2.13 prefers cuDNN's attention

# Explanations of NVML's errors, by their code in nvml.h
_EXPLANATIONS: Final = {
    3: "the driver does not count the memory of this device",  # NOT_SUPPORTED: unified memory
    12: "no libnvidia-ml.so.1 is installed",  # LIBRARY_NOT_FOUND
    18: "the driver was updated while it ran; restart the machine",  # LIB_RM_VERSION_MISMATCH
}


class CudaProbe:
    """CUDA device: memory of all processes from NVML, of this process from torch's allocator.

    Args:
        index: Index of the device as torch counts; None is the current device.
    """

    def __init__(self, index: int | None) -> None:
        self._nvml: _NvmlDevice | None = None
        try:
            self._index = torch.cuda.current_device() if index is None else index
            properties = torch.cuda.get_device_properties(self._index)
        except (AssertionError, RuntimeError) as error:
            raise ProbeError(f"cuda:{index} cannot be opened: {error}. {PROBE_REMEDY}") from error
        self.name = f"{properties.name} (cuda:{self._index})"
        self.device = f"cuda:{self._index}"
        self._total = properties.total_memory  # bytes; torch's caps are shares of this
        self._is_integrated = bool(getattr(properties, "is_integrated", False))
        self._nvml_problem = ""  # reason for not using NVML
        self._user_share: float | None = None  # the user's cap, while that of a trial replaces it
        try:
            self._nvml = _NvmlDevice(self._index, properties.uuid, self._total)
        except Exception as error:
            self._fall_back(error)
        self.read()  # fails here rather than in the first trial

    @property
    def source(self) -> str:
        source = "NVML"
        if self._nvml is None:
            source = f"torch.cuda.mem_get_info, because {self._nvml_problem}"
        if self._is_integrated:
            source += (
                "; no more than the free memory of the host is counted as free, "
                "because they share one memory"
            )
        return source

    def read(self) -> MemoryReading:
        free, total = self._free_and_total()
        try:
            stats = torch.cuda.memory_stats(self._index)
        except RuntimeError as error:
            # Not every pluggable allocator keeps statistics
            raise ProbeError(
                f"torch's allocator has no statistics for cuda:{self._index}: "
                f"{_first_line(error)}. {PROBE_REMEDY}"
            ) from error
        return MemoryReading(
            total=total,
            used=total - free,
            reserved=stats.get("reserved_bytes.all.current", 0),
            peak=stats.get("reserved_bytes.all.peak", 0),
            failures=sum(stats.get(count, 0) for count in (_RETRIES, *_REFUSALS)),
            cap=self._user_cap(),
            retries=stats.get(_RETRIES, 0),
            allocated=stats.get("allocated_bytes.all.peak"),
            requested=stats.get("requested_bytes.all.peak"),
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[None]:
        """Reset the peak; cap torch's allocator at `budget` bytes, or at the user's lower cap."""
        self._user_share = user_share = self._allocator_share()
        share = min(user_share, max(budget, 0) / self._total)
        torch.cuda.reset_peak_memory_stats(self._index)
        try:
            torch.cuda.set_per_process_memory_fraction(share, self._index)
            yield
        except BaseException:
            # A device that has failed for good refuses this as well: the first error counts
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_per_process_memory_fraction(user_share, self._index)
            raise
        else:
            torch.cuda.set_per_process_memory_fraction(user_share, self._index)
        finally:
            self._user_share = None

    def attach(self, *objects: Any) -> None:
        """Do nothing: CUDA's allocator accounts for all objects on the device."""

    def release(self) -> None:
        torch.cuda.empty_cache()

    def clock(self) -> float:
        torch.cuda.synchronize(self._index)
        return time.perf_counter()

    def gpu(self) -> Gpu:
        """Return the properties that predicted peaks depend on.

        Raises:
            UntraceableError: Memory is not torch's own allocator's with its default settings.
        """
        from autobatch._memory.estimate.gpus import gpu_of

        check_allocator()
        if torch.version.hip or torch.cuda.get_allocator_backend() != "native":
            raise UntraceableError("the allocator is not the native one of CUDA")
        properties = torch.cuda.get_device_properties(self._index)
        cudnn = torch.backends.cudnn.version() or 0
        return gpu_of(
            f"{properties.major}{properties.minor}",
            properties.multi_processor_count,
            properties.max_threads_per_multi_processor,
            has_new_cudnn=cudnn >= _CUDNN_ATTENTION,
        )

    def processes(self) -> dict[int, int | None] | None:
        """Memory per process ID in bytes (None if NVML has no number); None without NVML."""
        if self._nvml is None:
            return None
        try:
            return self._nvml.processes()
        except Exception:
            return None  # for display only; memory may be readable all the same

    def _user_cap(self) -> int | None:
        """Cap set by the user, in bytes."""
        share = self._allocator_share() if self._user_share is None else self._user_share
        return None if share >= 1.0 else int(share * self._total)

    def _allocator_share(self) -> float:
        """Present cap as a share of the device; 1.0 if there is none."""
        # Older torch has a setter but no getter: a cap of the user is then lifted after a trial
        getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if getter is None:
            return 1.0
        try:
            share: float = getter(self._index)
        except RuntimeError:  # the allocator does not support caps
            return 1.0
        return min(1.0, share)  # cudaMallocAsync returns far more than 1 if there is no cap

    def _free_and_total(self) -> tuple[int, int]:
        free, total = self._free_and_total_of_driver()
        available = HostMemory.read().available if self._is_integrated else None
        return free if available is None else min(free, available), total

    def _free_and_total_of_driver(self) -> tuple[int, int]:
        if self._nvml is not None:
            try:
                return self._nvml.free_and_total()
            except Exception as error:
                self._fall_back(error)
        try:
            return torch.cuda.mem_get_info(self._index)
        except RuntimeError as error:
            raise ProbeError(
                f"The memory of cuda:{self._index} cannot be read: {_first_line(error)}; "
                f"{self._nvml_problem}. {PROBE_REMEDY}"
            ) from error

    def _fall_back(self, error: Exception) -> None:
        """Read from CUDA from now on: both count differently and are never mixed."""
        self._nvml = None
        self._nvml_problem = _explain(error)


def check_allocator() -> None:
    """Raise `UntraceableError` if torch's allocator has other settings than its defaults."""
    for name in _ALLOCATOR_SETTINGS:
        if os.environ.get(name):
            raise UntraceableError(f"{name}={os.environ[name]} changes the allocator")


class _NvmlDevice:
    """NVML's handle of a torch device; raises any kind of error if NVML cannot be trusted."""

    def __init__(self, index: int, uuid: object, total: int) -> None:
        import pynvml

        self._expected_total = total
        self._pynvml = pynvml
        pynvml.nvmlInit()  # reference-counted by NVML; released when the process ends
        # By UUID, never by index: NVML ignores CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER
        instance = _mig_instance(index)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(instance or f"GPU-{uuid}")
        if instance is None and self._is_mig_on():
            raise _WrongDeviceError("MIG is on and CUDA_VISIBLE_DEVICES does not name an instance")

    def free_and_total(self) -> tuple[int, int]:
        # Version 1 of the call; version 2 counts memory reserved by the driver separately
        memory = self._pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        if abs(memory.total - self._expected_total) > self._expected_total // 10:
            raise _WrongDeviceError(
                f"NVML's total is {format_bytes(memory.total)} "
                f"but CUDA's is {format_bytes(self._expected_total)}"
            )
        return memory.free, memory.total

    def processes(self) -> dict[int, int | None]:
        """Bytes by process ID; None if the driver has no number, as on Windows and in WSL."""
        found: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            processes = getattr(self._pynvml, f"nvmlDeviceGet{kind}RunningProcesses")
            for process in processes(self._handle):
                found[process.pid] = process.usedGpuMemory
        return found

    def _is_mig_on(self) -> bool:
        try:
            current, _pending = self._pynvml.nvmlDeviceGetMigMode(self._handle)
        except self._pynvml.NVMLError:  # the device does not support MIG
            return False
        return bool(current)


class _WrongDeviceError(Exception):
    """NVML shows another device than the one torch uses."""


def _mig_instance(index: int) -> str | None:
    """UUID of the MIG instance in use; torch's own UUID may belong to the whole card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[index].strip() if index < len(visible) else ""
    return name if name.startswith("MIG-") else None


def _explain(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "pynvml cannot be imported"
    if isinstance(error, AttributeError):
        return "the module pynvml is not the one from nvidia-ml-py"
    if isinstance(error, _WrongDeviceError):
        return str(error)
    message = f"NVML failed: {error}".rstrip(".")
    explanation = _EXPLANATIONS.get(getattr(error, "value", 0))
    return f"{message} ({explanation})" if explanation else message


def _first_line(error: Exception) -> str:
    """Message of CUDA without its advice on debugging."""
    return str(error).partition("\n")[0].rstrip(".")
