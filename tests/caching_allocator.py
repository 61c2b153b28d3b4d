"""torch's caching allocator on paper, for the CPU's real tensors: segments, blocks that are split and joined, a cache.

After c10/cuda/CUDACachingAllocator.cpp as of torch 2.13, for one stream and without expandable segments. Like that one it
empties its cache before it refuses, counts that as a repeated allocation, and can not give a segment back while a block of it
lives: what is reserved is more than what tensors hold, and need not grow with a batch as they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch._memory.ledger import Ledger

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    import torch


@dataclass(eq=False)
class Segment:
    """What was asked of the device at once, and the blocks it is cut into, in their order."""

    is_small: bool
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    segment: Segment
    size: int
    is_free: bool = True


class CachingAllocator:
    """Counts what torch's allocator would reserve.

    Args:
        mib: Bytes of what is called a MiB.
        room: Bytes that the device has for it at most; asked each time.
    """

    def __init__(self, mib: int, room: Callable[[], int]) -> None:
        self._mib, self._room = mib, room
        self._segments: list[Segment] = []
        self.reserved = self.peak = self.repeated = self.refused = 0

    def allocate(self, nbytes: int) -> Block | None:
        """A block, or None where there is no room."""
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
        """Back into the cache, joined with its neighbours where these are free."""
        block.is_free = True
        blocks = block.segment.blocks
        at = blocks.index(block)
        if at + 1 < len(blocks) and blocks[at + 1].is_free:
            block.size += blocks.pop(at + 1).size
        if at and blocks[at - 1].is_free:
            blocks[at - 1].size += blocks.pop(at).size

    def empty(self) -> None:
        """Give segments back of which no block is in use."""
        self._segments = [
            segment
            for segment in self._segments
            if not (len(segment.blocks) == 1 and segment.blocks[0].is_free)
        ]
        self.reserved = sum(block.size for segment in self._segments for block in segment.blocks)

    def _cached(self, size: int, is_small: bool) -> Block | None:
        """The smallest free block that is large enough."""
        fitting = (
            block
            for segment in self._segments
            if segment.is_small == is_small
            for block in segment.blocks
            if block.is_free and block.size >= size
        )
        return min(fitting, key=lambda block: block.size, default=None)

    def _new(self, size: int, is_small: bool) -> Block | None:
        """A new segment as one free block."""
        mib = self._mib
        if is_small:
            asked = 2 * mib
        elif size < 10 * mib:
            asked = 20 * mib
        else:
            asked = -(-size // (2 * mib)) * 2 * mib
        if self.reserved + asked > self._room():
            self.repeated += 1
            self.empty()
        if self.reserved + asked > self._room():
            self.refused += 1
            return None
        segment = Segment(is_small)
        segment.blocks.append(Block(segment, asked))
        self._segments.append(segment)
        self.reserved += asked
        self.peak = max(self.peak, self.reserved)
        return segment.blocks[0]


class CachingLedger(Ledger):
    """A ledger that has the allocator decide what there is room for."""

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
        if growth > 0 and block is None:  # it was there before anyone looked
            block = self._allocator.allocate(growth)
        if block is not None:
            self._blocks.setdefault(int(storage._cdata), []).append(block)
        return growth

    def _credit(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.ref is ref:
            for block in self._blocks.pop(key, ()):
                self._allocator.free(block)
        super()._credit(key, ref)
