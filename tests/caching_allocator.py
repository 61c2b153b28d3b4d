"""Model of torch's caching allocator for tensors on the CPU: segments of blocks, and a cache.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.13, for one stream and without expandable
segments. It empties its cache before it refuses an allocation, counts that as a retry, and keeps a
segment while one of its blocks lives: reserved memory exceeds the memory of tensors, and does not
grow in step with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch._memory.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(eq=False)
class Segment:
    """Memory reserved at once on the device, split into blocks, in order."""

    is_small: bool
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    segment: Segment
    size: int
    is_free: bool = True


class CachingAllocator:
    """Count the memory that torch's allocator would reserve.

    Args:
        mib: Bytes that stand for one MiB; smaller values scale the model down.
        room: Function that returns the bytes available on the device.
    """

    def __init__(self, mib: int, room: Callable[[], int]) -> None:
        self._mib, self._room = mib, room
        self._segments: list[Segment] = []
        self.reserved = self.peak = self.repeated = self.refused = 0

    def allocate(self, nbytes: int) -> Block | None:
        """Return a block, or None if there is no room."""
        smallest = max(1, self._mib // 2048)
        size = max(smallest, -(-nbytes // smallest) * smallest)
        is_small = size <= self._mib
        block = self._cached(size, is_small) or self._new(size, is_small)
        if block is None:
            return None
        rest = block.size - size
        if rest >= smallest if is_small else rest > self._mib:
            blocks = block.segment.blocks
            blocks.insert(blocks.index(block) + 1, Block(block.segment, rest))
            block.size = size
        block.is_free = False
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache, merged with free neighbours."""
        block.is_free = True
        blocks = block.segment.blocks
        at = blocks.index(block)
        if at + 1 < len(blocks) and blocks[at + 1].is_free:
            block.size += blocks.pop(at + 1).size
        if at and blocks[at - 1].is_free:
            blocks[at - 1].size += blocks.pop(at).size

    def empty(self) -> None:
        """Release all segments without a block in use."""
        self._segments = [
            segment
            for segment in self._segments
            if not (len(segment.blocks) == 1 and segment.blocks[0].is_free)
        ]
        self.reserved = sum(block.size for segment in self._segments for block in segment.blocks)

    def _cached(self, size: int, is_small: bool) -> Block | None:
        """Return the smallest free block that is large enough."""
        fitting = (
            block
            for segment in self._segments
            if segment.is_small == is_small
            for block in segment.blocks
            if block.is_free and block.size >= size
        )
        return min(fitting, key=lambda block: block.size, default=None)

    def _new(self, size: int, is_small: bool) -> Block | None:
        """Return a new segment as one free block."""
        mib = self._mib
        if is_small:
            new = 2 * mib
        elif size < 10 * mib:
            new = 20 * mib
        else:
            new = -(-size // (2 * mib)) * 2 * mib
        if self.reserved + new > self._room():
            self.repeated += 1
            self.empty()
        if self.reserved + new > self._room():
            self.refused += 1
            return None
        segment = Segment(is_small)
        segment.blocks.append(Block(segment, new))
        self._segments.append(segment)
        self.reserved += new
        self.peak = max(self.peak, self.reserved)
        return segment.blocks[0]


class CachingLedger(Ledger):
    """Ledger whose refusals are decided by the allocator."""

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__("CUDA out of memory")
        self._allocator = allocator
        self._blocks: dict[int, list[Block]] = {}
        self._next: Block | None = None

    def _is_refused(self, growth: int) -> bool:
        self._next = self._allocator.allocate(growth)
        return self._next is None

    def _enter(self, storage: torch.UntypedStorage) -> int:
        growth = super()._enter(storage)
        block, self._next = self._next, None
        if growth > 0 and block is None:  # attached, and not allocated under the ledger
            block = self._allocator.allocate(growth)
        if block is not None:
            self._blocks.setdefault(int(storage._cdata), []).append(block)
        return growth

    def _hand_over(self, term: int, total: int) -> None:
        self._blocks[total] = self._blocks.pop(term, [])

    def _release(self, key: int, nbytes: int) -> None:
        for block in self._blocks.pop(key, ()):
            self._allocator.free(block)
        super()._release(key, nbytes)
