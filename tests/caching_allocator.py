"""Tensors on the CPU that live in the replay of torch's caching allocator, at a smaller scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch._memory.estimate.allocator import MIB, CachingAllocator
from autobatch._memory.ledger import Ledger
from autobatch._memory.storages import address_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from autobatch._memory.estimate.allocator import Block


class SmallAllocator:
    """The replay for a device of which a MiB is fewer bytes.

    Args:
        mib: Bytes that stand for one MiB, a power of two.
        room: Function that returns the bytes available on the device.
    """

    def __init__(self, mib: int, room: Callable[[], int]) -> None:
        self._replay, self._scale, self._room = CachingAllocator(), MIB // mib, room
        self.refused = 0

    @property
    def reserved(self) -> int:
        return self._replay.reserved // self._scale

    @property
    def peak(self) -> int:
        return self._replay.peak_reserved // self._scale

    @property
    def repeated(self) -> int:
        """Allocations before which the cache was emptied, granted or not."""
        return self._replay.retries + self.refused

    def reset_peaks(self) -> None:
        self._replay.reset_peaks()

    def empty(self) -> None:
        self._replay.empty()

    def free(self, block: Block) -> None:
        self._replay.free(block)

    def allocate(self, nbytes: int) -> Block | None:
        """Return a block, or None if there is no room."""
        self._replay.capacity = self._room() * self._scale
        block = self._replay.allocate(nbytes * self._scale)
        self.refused += block is None
        return block


class CachingLedger(Ledger):
    """Ledger whose refusals are decided by the allocator."""

    def __init__(self, allocator: SmallAllocator) -> None:
        super().__init__("CUDA out of memory")
        self._allocator = allocator
        self._blocks: dict[int, list[Block]] = {}
        self._next: Block | None = None

    def _is_refused(self, growth: int) -> bool:
        self._next = self._allocator.allocate(growth)
        return self._next is None

    def _enter(self, storage: torch.UntypedStorage) -> int:
        growth = super()._enter(storage)
        key, block = address_of(storage), self._next
        self._next = None
        if growth < 0:  # a resize gives the whole block back: FSDP empties storages
            self._free(key)
        if growth > 0 and block is None:  # attached, and not allocated under the ledger
            block = self._allocator.allocate(growth)
        if block is not None:
            self._blocks.setdefault(key, []).append(block)
        return growth

    def _hand_over(self, term: int, total: int) -> None:
        self._blocks[total] = self._blocks.pop(term, [])

    def _release(self, key: int, nbytes: int) -> None:
        self._free(key)
        super()._release(key, nbytes)

    def _free(self, key: int) -> None:
        for block in self._blocks.pop(key, ()):
            self._allocator.free(block)
