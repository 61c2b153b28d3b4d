"""Real tensors in a small replay of torch's caching allocator; its laws are in the estimate's tests."""

from __future__ import annotations

import pytest
import torch

from caching_allocator import CachingLedger, SmallAllocator

KIB = 2**10


def test_tensors_are_reserved_and_refused_at_the_scale_of_the_device():
    allocator = SmallAllocator(KIB, lambda: 64 * KIB)
    ledger = CachingLedger(allocator)

    with ledger.watching(None, offset=0):
        kept = torch.zeros(30 * KIB + 1, dtype=torch.uint8)
        assert allocator.reserved == allocator.peak == 32 * KIB
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(40 * KIB, dtype=torch.uint8)
        del kept

    allocator.empty()
    assert (allocator.reserved, allocator.peak) == (0, 32 * KIB)
    assert (allocator.repeated, allocator.refused) == (1, 1)


def test_an_allocation_after_the_cache_was_emptied_counts_as_repeated():
    allocator = SmallAllocator(KIB, lambda: 100 * KIB)
    allocator.free(allocator.allocate(60 * KIB))

    assert allocator.allocate(80 * KIB) is not None
    assert (allocator.repeated, allocator.refused) == (1, 0)
