"""The replay of torch's caching allocator: laws, and the documented behaviour of the original."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch._memory.estimate.allocator import (
    MIB,
    CachingAllocator,
    ExpandableAllocator,
    segment_size,
)

# Sizes on both sides of every threshold
SIZES = st.integers(1, 3 * MIB) | st.integers(1, 64).map(lambda n: n * MIB + n % 3)
# Allocations, or releases of the block so many places from the oldest
ACTIONS = st.lists(SIZES | st.integers(0, 20).map(lambda n: -n), max_size=60)


def run(allocator, actions):
    """Yield the blocks in use after each action that was granted."""
    blocks = []
    for action in actions:
        if action > 0:
            block = allocator.allocate(action)
            if block is None:
                return
            blocks.append(block)
        elif -action < len(blocks):
            allocator.free(blocks.pop(-action))
        yield blocks


@pytest.mark.parametrize("make", [CachingAllocator, ExpandableAllocator])
@given(actions=ACTIONS)
def test_blocks_never_overlap_and_all_bytes_are_counted(make, actions):
    allocator = make()

    for blocks in run(allocator, actions):
        ordered = sorted(blocks, key=lambda block: (block.is_small, block.address))
        for block, following in pairwise(ordered):
            is_same_pool = block.is_small == following.is_small
            assert not is_same_pool or block.address + block.nbytes <= following.address
        assert allocator.allocated == sum(block.nbytes for block in blocks)
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
        assert allocator.allocated <= allocator.peak_allocated


@given(ACTIONS)
def test_everything_freed_returns_to_the_device(actions):
    allocator = CachingAllocator()
    blocks = []
    for blocks in run(allocator, actions):  # noqa: B007
        pass

    for block in list(blocks):
        allocator.free(block)
    allocator.empty()

    assert (allocator.allocated, allocator.reserved) == (0, 0)


@given(ACTIONS, st.integers(2, 200))
def test_a_capacity_is_never_exceeded_and_changes_nothing_above_the_peak(actions, mib):
    free, capped = CachingAllocator(), CachingAllocator(mib * MIB)

    steps = sum(1 for _ in run(free, actions))
    capped_steps = sum(1 for _ in run(capped, actions))

    assert capped.peak_reserved <= mib * MIB
    if free.peak_reserved <= mib * MIB:
        assert capped_steps == steps
        assert capped.peak_reserved == free.peak_reserved
        assert capped.retries == 0


@given(st.lists(SIZES, min_size=1))
def test_blocks_in_use_reserve_no_less_than_before(sizes):
    allocator = CachingAllocator()
    reserved = [allocator.reserved for _ in run(allocator, sizes)]

    assert reserved == sorted(reserved)


@pytest.mark.parametrize(
    ("nbytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (21 * MIB + 512, 22 * MIB),
    ],
)
def test_memory_is_reserved_in_segments(nbytes, segment):
    allocator = CachingAllocator()

    allocator.allocate(nbytes)

    assert segment_size(nbytes) == allocator.reserved == segment


@pytest.mark.parametrize(("wanted", "given_out"), [(98, 98), (99, 100), (100, 100)])
def test_a_cached_block_is_split_unless_the_rest_is_small(wanted, given_out):
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(100 * MIB))

    block = allocator.allocate(wanted * MIB)

    assert block.nbytes == given_out * MIB
    assert allocator.reserved == 100 * MIB


def test_the_smallest_cached_block_that_suffices_is_taken():
    allocator = CachingAllocator()
    for block in [allocator.allocate(size * MIB) for size in (100, 50, 200)]:
        allocator.free(block)

    blocks = [allocator.allocate(size * MIB) for size in (40, 90, 200)]

    assert [block.address // MIB for block in blocks] == [100, 0, 150]
    assert allocator.reserved == 350 * MIB


def test_the_cache_is_emptied_before_memory_runs_out():
    allocator = CachingAllocator(capacity=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))

    assert allocator.allocate(80 * MIB) is not None
    assert (allocator.reserved, allocator.retries) == (80 * MIB, 1)
    assert allocator.allocate(80 * MIB) is None
    assert (allocator.reserved, allocator.retries) == (80 * MIB, 1)


def test_a_segment_stays_while_one_of_its_blocks_lives():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(100 * MIB))
    small = allocator.allocate(16 * MIB)

    allocator.empty()
    assert allocator.reserved == 100 * MIB

    allocator.free(small)
    allocator.empty()
    assert allocator.reserved == 0


def test_expandable_segments_grow_by_pages_and_leave_no_holes():
    allocator = ExpandableAllocator()
    first, second = (allocator.allocate(30 * MIB) for _ in range(2))
    assert allocator.reserved == 60 * MIB

    allocator.free(second)
    allocator.allocate(50 * MIB)  # the free end grows

    assert allocator.reserved == 80 * MIB
    allocator.free(first)
    allocator.allocate(30 * MIB - 512)  # the hole, whose rest may be split off
    assert (allocator.reserved, allocator.allocated) == (80 * MIB, 80 * MIB - 512)
    allocator.allocate(1)  # of the small pool
    assert allocator.reserved == 82 * MIB


@given(ACTIONS)
def test_expandable_segments_of_growing_requests_reserve_no_more_than_the_pages_in_use(actions):
    allocator = ExpandableAllocator()

    for _ in run(allocator, [action for action in actions if action > 0]):
        assert allocator.reserved - allocator.allocated < 22 * MIB
