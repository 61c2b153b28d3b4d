"""Replay of torch's caching allocator: segments, blocks and a cache, without a device.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.13, for one stream and default settings, and for
expandable segments, which no GPU was compared with.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

MIB: Final = 2**20
# Sizes are multiples of this, and a rest below it is not split off
_SMALLEST: Final = 512
_LARGEST_SMALL: Final = MIB
_SMALL_SEGMENT: Final = 2 * MIB
_LARGE_SEGMENT: Final = 20 * MIB
# Larger requests have a segment of their own, a multiple of 2 MiB
_LARGEST_SHARED: Final = 10 * MIB
_OWN_SEGMENT_STEP: Final = 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """Part of a segment, between its neighbours."""

    address: int
    nbytes: int
    is_small: bool
    requested: int = 0  # bytes asked for, of a block in use
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


@dataclass
class CachingAllocator:
    """Bytes that torch's allocator gives out and reserves; the peaks may be reset at any time."""

    capacity: int | None = None  # most bytes that may be reserved; None for no limit
    requested: int = 0
    allocated: int = 0
    reserved: int = 0
    peak_requested: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    retries: int = 0  # allocations that succeeded after the cache was emptied
    _small: list[Block] = field(default_factory=list)  # free blocks, by size and address
    _large: list[Block] = field(default_factory=list)
    _next_address: int = 0

    def allocate(self, nbytes: int) -> Block | None:
        """Return a block in use; None if memory ran out."""
        wanted = max(_SMALLEST, round_up(nbytes, _SMALLEST))
        block = self._cached(wanted) or self._new_segment(wanted)
        if block is None:
            self.empty()
            block = self._new_segment(wanted)
            if block is None:
                return None
            self.retries += 1
        self._split(block, wanted)
        block.is_free = False
        self._count(block, nbytes)
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache, merged with its free neighbours."""
        self._uncount(block)
        block.is_free = True
        if (after := block.after) is not None and after.is_free:
            self._take(after)
            _absorb_next(block)
        if (before := block.before) is not None and before.is_free:
            self._take(before)
            _absorb_next(before)
            block = before
        self._put(block)

    def empty(self) -> None:
        """Return all segments without a block in use to the device."""
        for pool in (self._small, self._large):
            self.reserved -= sum(block.nbytes for block in pool if block.is_whole_segment)
            pool[:] = [block for block in pool if not block.is_whole_segment]

    def reset_peaks(self) -> None:
        self.peak_requested, self.peak_allocated = self.requested, self.allocated
        self.peak_reserved = self.reserved

    def _count(self, block: Block, requested: int) -> None:
        block.requested = requested
        self.requested += requested
        self.peak_requested = max(self.peak_requested, self.requested)
        self.allocated += block.nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def _uncount(self, block: Block) -> None:
        self.requested -= block.requested
        self.allocated -= block.nbytes

    def _cached(self, wanted: int) -> Block | None:
        """Return the smallest free block that is large enough, at the lowest address."""
        pool = self._small if wanted <= _LARGEST_SMALL else self._large
        at = bisect_left(pool, wanted, key=attrgetter("nbytes"))
        return pool.pop(at) if at < len(pool) else None

    def _new_segment(self, wanted: int) -> Block | None:
        nbytes = segment_size(wanted)
        if not self._reserve(nbytes):
            return None
        block = Block(self._next_address, nbytes, is_small=wanted <= _LARGEST_SMALL)
        self._next_address += nbytes
        return block

    def _reserve(self, nbytes: int) -> bool:
        """Count bytes of the device; False if they exceed the capacity."""
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            return False
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _leaves_a_rest(self, block: Block, rest: int) -> bool:
        return rest >= _SMALLEST if block.is_small else rest > _LARGEST_SMALL

    def _split(self, block: Block, wanted: int) -> None:
        """Return the rest of a block to the cache, unless it is too small for that."""
        rest = block.nbytes - wanted
        if not self._leaves_a_rest(block, rest):
            return
        part = Block(block.address + wanted, rest, block.is_small, before=block, after=block.after)
        if part.after is not None:
            part.after.before = part
        block.after, block.nbytes = part, wanted
        self._put(part)

    def _put(self, block: Block) -> None:
        insort(self._small if block.is_small else self._large, block, key=_order)

    def _take(self, block: Block) -> None:
        pool = self._small if block.is_small else self._large
        del pool[bisect_left(pool, _order(block), key=_order)]


@dataclass
class ExpandableAllocator(CachingAllocator):
    """The allocator with `expandable_segments:True`: one segment per pool, which grows at its end.

    Pages are not given back, so memory runs out where torch would unmap free ones.
    """

    _first: dict[bool, Block] = field(default_factory=dict)  # of each segment; never merged away

    def empty(self) -> None:
        """Keep all pages."""

    def _cached(self, wanted: int) -> Block | None:
        """Return the smallest free block that is large enough; the growing one only as the last."""
        pool = self._small if wanted <= _LARGEST_SMALL else self._large
        at = bisect_left(pool, wanted, key=attrgetter("nbytes"))
        if at + 1 < len(pool) and pool[at].after is None:
            at += 1
        return pool.pop(at) if at < len(pool) else None

    def _new_segment(self, wanted: int) -> Block | None:
        """Return the last block of the segment, which has grown by whole pages."""
        is_small = wanted <= _LARGEST_SMALL
        last = self._first.get(is_small)
        while last is not None and last.after is not None:
            last = last.after
        free = last if last is not None and last.is_free else None
        page = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT
        grown = round_up(wanted - (free.nbytes if free else 0), page)
        if not self._reserve(grown):
            return None
        if free is not None:
            self._take(free)
            free.nbytes += grown
            return free
        address = 0 if last is None else last.address + last.nbytes
        block = Block(address, grown, is_small, before=last)
        if last is None:
            self._first[is_small] = block
        else:
            last.after = block
        return block

    def _leaves_a_rest(self, block: Block, rest: int) -> bool:  # noqa: ARG002 -- as its base
        return rest >= _SMALLEST


@dataclass
class UncachedAllocator(CachingAllocator):
    """Allocator of a device that counts live bytes: it neither rounds nor keeps any."""

    def allocate(self, nbytes: int) -> Block | None:
        if not self._reserve(nbytes):
            return None
        block = Block(0, nbytes, is_small=False)
        self._count(block, nbytes)
        return block

    def free(self, block: Block) -> None:
        self._uncount(block)
        self.reserved -= block.nbytes


def segment_size(nbytes: int) -> int:
    """Return the bytes that the allocator asks the device for, to serve a request."""
    if nbytes <= _LARGEST_SMALL:
        return _SMALL_SEGMENT
    if nbytes < _LARGEST_SHARED:
        return _LARGE_SEGMENT
    return round_up(nbytes, _OWN_SEGMENT_STEP)


def _absorb_next(block: Block) -> None:
    """Merge a block with the one after it."""
    gone = block.after
    if gone is None:
        return
    block.nbytes += gone.nbytes
    block.after = gone.after
    if block.after is not None:
        block.after.before = block


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of a step that is not below a number."""
    return -(-number // step) * step


_order = attrgetter("nbytes", "address")
