"""The model of torch's allocator, against the documented and observed behaviour of the original."""

from __future__ import annotations

import pytest
import torch

from caching_allocator import CachingAllocator, CachingLedger

MIB = 2**20


def allocator(room=1000 * MIB):
    return CachingAllocator(MIB, lambda: room)


@pytest.mark.parametrize(
    ("nbytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 1024, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (21 * MIB + 1, 22 * MIB),
    ],
)
def test_memory_is_reserved_in_segments(nbytes, segment):
    it = allocator()

    it.allocate(nbytes)

    assert it.reserved == it.peak == segment


def test_blocks_share_a_segment_until_it_is_full():
    it = allocator()

    for _ in range(3):
        it.allocate(6 * MIB)

    assert it.reserved == 20 * MIB
    it.allocate(6 * MIB)
    assert it.reserved == 40 * MIB


def test_a_small_rest_of_a_large_block_is_not_split_off():
    it = allocator()
    it.free(it.allocate(100 * MIB))

    assert it.allocate(99 * MIB).size == 100 * MIB


def test_freed_blocks_are_reused_smallest_fitting_first():
    it = allocator()
    for block in [it.allocate(size * MIB) for size in (100, 50, 200)]:
        it.free(block)

    it.allocate(40 * MIB)
    it.allocate(90 * MIB)
    it.allocate(200 * MIB)

    assert it.reserved == 350 * MIB


def test_free_neighbours_are_merged():
    it = allocator()
    it.free(it.allocate(100 * MIB))
    parts = [it.allocate(size * MIB) for size in (30, 30, 40)]

    for block in (parts[0], parts[2], parts[1]):
        it.free(block)

    it.allocate(100 * MIB)
    assert it.reserved == 100 * MIB


def test_a_segment_stays_while_one_of_its_blocks_lives():
    it = allocator()
    it.free(it.allocate(100 * MIB))
    small = it.allocate(16 * MIB)

    it.empty()
    assert it.reserved == 100 * MIB
    it.allocate(100 * MIB)
    assert it.reserved == 200 * MIB

    it.free(small)
    it.empty()
    assert it.reserved == 100 * MIB


def test_emptying_the_cache_before_a_refusal_counts_as_a_retry():
    it = allocator(room=100 * MIB)
    it.free(it.allocate(60 * MIB))

    assert it.allocate(80 * MIB) is not None
    assert (it.repeated, it.refused) == (1, 0)

    assert it.allocate(80 * MIB) is None
    assert (it.repeated, it.refused) == (2, 1)


def test_real_tensors_are_reserved_and_refused():
    it = allocator(room=64 * MIB)
    ledger = CachingLedger(it)

    with ledger.watching(None, offset=0):
        kept = torch.zeros(32 * MIB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(40 * MIB, dtype=torch.uint8)
        del kept

    it.empty()
    assert it.reserved == 0
    assert it.refused == 1
