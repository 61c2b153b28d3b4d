"""Simulated machine with NVIDIA cards: a driver library for the real `pynvml`, and `torch.cuda`."""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections import Counter
from ctypes import c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pynvml
import torch

from caching_allocator import CachingLedger, SmallAllocator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

GIB = 2**30
CONTEXT = GIB // 2  # bytes of the CUDA context of this process, outside torch's allocator
UNKNOWN = 2**64 - 1  # written by the driver if the memory of a process is unknown
DRIVER = "580.159.04"


@dataclass(eq=False)
class Card:
    """Physical card, or MIG instance of a card.

    Args:
        uuid: Without the prefix "GPU-" or "MIG-".
        total: Bytes, as NVML counts them.
        others: Bytes used by other processes; may be changed at any time.
        instances: MIG instances of the card; none if MIG is off.
        processes: Bytes by process ID; None if unknown to NVML.
        is_integrated: True if the card shares the memory of the host.
        context: Bytes of the context of this process.
        allocator: Model of the allocator for real tensors, while `allocating`.
    """

    uuid: str
    total: int = 80 * GIB
    others: int = 0
    instances: tuple[Card, ...] = ()
    processes: dict[int, int | None] = field(default_factory=dict)
    is_integrated: bool = False
    context: int = CONTEXT
    # Allocator of this process
    reserved: int = 0
    peak: int = 0
    share: float = 1.0
    retries: int = 0
    ooms: int = 0
    allocator: SmallAllocator | None = None
    allocated: Callable[[], int] = lambda: 0  # bytes of live tensors, while `allocating`

    @property
    def seen_by_cuda(self) -> int:
        """Total bytes of CUDA: a little less than NVML's, as on real cards."""
        return self.total - self.total // 150

    @property
    def held(self) -> int:
        """Bytes reserved by the allocator."""
        return self.allocator.reserved if self.allocator else self.reserved

    @property
    def free(self) -> int:
        return self.total - self.others - self.context - self.held

    @property
    def room(self) -> int:
        """Bytes available to the allocator, by its cap and by the card."""
        available = self.total - self.others - self.context
        return min(available, int(self.share * self.seen_by_cuda))

    def let_go(self) -> None:
        """Empty the cache."""
        if self.allocator:
            self.allocator.empty()

    def reset_peak(self) -> None:
        self.peak = self.held
        if self.allocator:
            self.allocator.reset_peaks()

    def stats(self) -> dict[str, int]:
        """Return the part of torch.cuda.memory_stats that is used."""
        allocator = self.allocator
        return {
            "num_alloc_retries": allocator.repeated if allocator else self.retries,
            "num_ooms": allocator.refused if allocator else self.ooms,
            "allocated_bytes.all.current": self.allocated() if allocator else self.reserved,
            "reserved_bytes.all.current": self.held,
            "reserved_bytes.all.peak": allocator.peak if allocator else max(self.peak, self.held),
        }


@dataclass(eq=False)
class FakeGpu:
    """Machine with cards; `install` puts it below `pynvml` and in place of `torch.cuda`.

    Args:
        cards: In NVML's order.
        visible: CUDA_VISIBLE_DEVICES; None unsets it.
        cuda_order: Positions in `cards` of CUDA's devices 0, 1, …, as set by CUDA_DEVICE_ORDER.
        refusals: Error code by function of the driver library, and an error message for
            "mem_get_info"; may be changed at any time.
        lacks: Functions missing in the driver library.
        has_library: True if the driver library can be loaded.
        calls: Number of calls by function of the library.
    """

    cards: tuple[Card, ...] = field(default_factory=lambda: (Card("aaaa-0"),))
    visible: str | None = None
    cuda_order: tuple[int, ...] | None = None
    refusals: dict[str, int | str] = field(default_factory=dict)
    lacks: set[str] = field(default_factory=set)
    has_library: bool = True
    calls: Counter[str] = field(default_factory=Counter)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """Install the machine until the test ends."""
        if self.visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", self.visible)
        # Caches of pynvml for the loaded library; read from nvidia-ml-py 13.615
        monkeypatch.setattr(pynvml, "CDLL", self._load)
        monkeypatch.setattr(pynvml, "nvmlLib", None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        for name, function in self._torch_cuda().items():
            monkeypatch.setattr(torch.cuda, name, function, raising=False)
        return self

    def _load(self, name: str) -> Library:
        assert name == "libnvidia-ml.so.1"
        if not self.has_library:
            raise OSError(f"{name}: cannot open shared object file")
        return Library(self)

    def lose(self) -> None:
        """Disconnect the cards: calls of the driver and of CUDA fail from now on."""
        for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetHandleByUUID"):
            self.refusals[name] = pynvml.NVML_ERROR_GPU_IS_LOST
        self.refusals["mem_get_info"] = "CUDA error: unspecified launch failure"

    @property
    def devices(self) -> list[Card]:
        """Cards visible to this process, as torch counts them."""
        order = self.cuda_order or range(len(self.cards))
        in_cuda_order = [self.cards[position] for position in order]
        if self.visible is None:
            return in_cuda_order
        named = {f"GPU-{card.uuid}": card for card in self.cards}
        named |= {f"MIG-{part.uuid}": part for card in self.cards for part in card.instances}
        return [
            in_cuda_order[int(entry)]
            if entry.isdecimal()
            else next(card for name, card in named.items() if name.startswith(entry))
            for entry in self.visible.split(",")
        ]

    def allocate(self, index: int, nbytes: int) -> None:
        """Allocate as torch does: refuse beyond the cap or the card, after one retry."""
        card = self.devices[index]
        if card.reserved + nbytes > card.share * card.seen_by_cuda or nbytes > card.free:
            card.retries += 1
            card.ooms += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        card.reserved += nbytes
        card.peak = max(card.peak, card.reserved)

    @contextlib.contextmanager
    def holding(self, index: int, nbytes: int) -> Iterator[None]:
        """Hold memory in the body."""
        self.allocate(index, nbytes)
        try:
            yield
        finally:
            self.devices[index].reserved -= nbytes

    @contextlib.contextmanager
    def allocating(self, index: int, mib: int) -> Iterator[None]:
        """Count CPU tensors of this thread on a card; `mib` bytes stand for a MiB."""
        card = self.devices[index]
        card.allocator = SmallAllocator(mib, lambda: card.room)
        ledger = CachingLedger(card.allocator)
        card.allocated = lambda: ledger.current
        with ledger.watching(None, offset=0):
            yield
        card.allocator = None

    def _torch_cuda(self) -> dict[str, object]:
        def properties(index: int) -> types.SimpleNamespace:
            card = self.devices[index]
            # torch returns the UUID of the whole card, also for an instance of it
            whole = next(each for each in self.cards if card is each or card in each.instances)
            return types.SimpleNamespace(
                name="Paper GPU",
                total_memory=card.seen_by_cuda,
                uuid=whole.uuid,
                is_integrated=int(card.is_integrated),
                multi_processor_count=108,
                max_threads_per_multi_processor=2048,
                major=8,
            )

        def mem_get_info(index: int) -> tuple[int, int]:
            if "mem_get_info" in self.refusals:
                raise RuntimeError(self.refusals["mem_get_info"])
            card = self.devices[index]
            return card.free - (card.total - card.seen_by_cuda), card.seen_by_cuda

        def set_share(share: float, index: int) -> None:
            assert isinstance(share, float)
            assert 0 <= share <= 1
            self.devices[index].share = share

        return {
            "device_count": lambda: len(self.devices),
            "current_device": lambda: 0,
            "get_device_properties": properties,
            "mem_get_info": mem_get_info,
            "memory_stats": lambda index: self.devices[index].stats(),
            "reset_peak_memory_stats": lambda index: self.devices[index].reset_peak(),
            "get_per_process_memory_fraction": lambda index: self.devices[index].share,
            "set_per_process_memory_fraction": set_share,
            "empty_cache": lambda: [card.let_go() for card in self.devices],
            "synchronize": lambda index: None,
            "get_allocator_backend": lambda: "native",
        }


class Library:
    """Replacement of libnvidia-ml.so.1: functions that return codes and fill structures of nvml.h.

    Functions that must not be used are missing: version 2 of the memory structure counts
    differently, and an index means another card to NVML than to CUDA.
    """

    def __init__(self, machine: FakeGpu) -> None:
        self._machine = machine
        self._is_open = False
        self._handles: list[Card] = []
        self._words: dict[int, ctypes.Array] = {}  # kept alive, since C has their addresses
        offered = {
            "nvmlInitWithFlags": (self._init, (c_uint,)),
            "nvmlSystemGetDriverVersion": (self._driver_version, (c_void_p, c_uint)),
            "nvmlDeviceGetHandleByUUID": (self._handle, (c_char_p, c_void_p)),
            "nvmlDeviceGetMemoryInfo": (self._memory, (c_void_p,) * 2),
            "nvmlDeviceGetMigMode": (self._mig_mode, (c_void_p,) * 3),
            "nvmlDeviceGetComputeRunningProcesses_v3": (
                self._processes,
                (c_void_p,) * 3,
            ),
            "nvmlDeviceGetGraphicsRunningProcesses_v3": (
                self._no_processes,
                (c_void_p,) * 3,
            ),
        }
        self._functions = {
            name: ctypes.CFUNCTYPE(c_int, *arguments)(self._counted(name, function))
            for name, (function, arguments) in offered.items()
        }
        self._functions["nvmlErrorString"] = ctypes.CFUNCTYPE(c_void_p, c_int)(self._error_string)

    def __getattr__(self, name: str) -> object:
        if name not in self._functions or name in self._machine.lacks:
            raise AttributeError(f"undefined symbol: {name}")
        return self._functions[name]

    def _counted(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self._machine.calls[name] += 1
            if name in self._machine.refusals:
                return self._machine.refusals[name]
            if not self._is_open and name != "nvmlInitWithFlags":
                return pynvml.NVML_ERROR_UNINITIALIZED
            return function(*arguments)

        return call

    def _init(self, flags: int) -> int:
        self._is_open = True
        return pynvml.NVML_SUCCESS

    def _driver_version(self, buffer: int, length: int) -> int:
        if length <= len(DRIVER):
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        ctypes.memmove(buffer, DRIVER.encode() + b"\0", len(DRIVER) + 1)
        return pynvml.NVML_SUCCESS

    def _handle(self, uuid: bytes, handle: int) -> int:
        for card in self._machine.cards:
            known = {f"GPU-{card.uuid}": card} | {
                f"MIG-{part.uuid}": part for part in card.instances
            }
            if uuid.decode() in known:
                self._handles.append(known[uuid.decode()])
                c_void_p.from_address(handle).value = len(self._handles)
                return pynvml.NVML_SUCCESS
        return pynvml.NVML_ERROR_NOT_FOUND

    def _memory(self, handle: int, memory: int) -> int:
        card = self._handles[handle - 1]
        free = card.free - sum(part.total - part.free for part in card.instances)
        filled = pynvml.c_nvmlMemory_t.from_address(memory)
        filled.total, filled.free, filled.used = card.total, free, card.total - free
        return pynvml.NVML_SUCCESS

    def _mig_mode(self, handle: int, current: int, pending: int) -> int:
        card = self._handles[handle - 1]
        is_cut = bool(card.instances) or card not in self._machine.cards
        for address in (current, pending):
            c_uint.from_address(address).value = is_cut
        return pynvml.NVML_SUCCESS

    def _processes(self, handle: int, count: int, filled: int | None) -> int:
        processes = self._handles[handle - 1].processes
        room = c_uint.from_address(count)
        fits = filled is not None and room.value >= len(processes)
        room.value = len(processes)
        if not processes:
            return pynvml.NVML_SUCCESS
        if not fits:
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        array = (pynvml.c_nvmlProcessInfo_v3_t * len(processes)).from_address(filled)
        for entry, (pid, held) in zip(array, processes.items(), strict=True):
            entry.pid, entry.usedGpuMemory = pid, UNKNOWN if held is None else held
        return pynvml.NVML_SUCCESS

    def _no_processes(self, handle: int, count: int, filled: int | None) -> int:
        c_uint.from_address(count).value = 0
        return pynvml.NVML_SUCCESS

    def _error_string(self, code: int) -> int:
        words = self._words.setdefault(
            code, ctypes.create_string_buffer(f"error {code} of the driver".encode())
        )
        return ctypes.addressof(words)


def three_cards() -> tuple[Card, ...]:
    """Cards that differ in the memory used by other processes: 1, 2 and 3 GiB."""
    return tuple(
        Card(uuid, others=i * GIB)
        for i, uuid in enumerate(("aaaa-1111", "bbbb-2222", "bbcc-3333"), start=1)
    )


@contextlib.contextmanager
def tensor_on(device: str, nbytes: int) -> Iterator[None]:
    """Hold a real tensor of that many bytes."""
    tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    yield
    del tensor
