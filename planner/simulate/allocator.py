"""What a caching allocator reserves from the device to serve a sequence of requests.

Requests are served from cached segments, the smallest free block that is large enough first; the
rest of the block stays free, and free neighbours of one segment merge. Nothing is ever given back
to the device. This is how torch's CUDA caching allocator works (c10/cuda/CUDACachingAllocator.cpp),
for one stream and without expandable segments. This module does not know what is stored.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from planner.cluster.types import Allocator

__all__ = ["CachingAllocator"]


@dataclass(slots=True, kw_only=True)
class _Block:
    segment: int
    offset: int
    num_bytes: int
    small: bool
    before: "_Block | None" = None
    after: "_Block | None" = None
    """Neighbours in its segment."""
    free: bool = True


@dataclass(slots=True, kw_only=True)
class CachingAllocator:
    """Blocks and segments of one device."""

    sizes: Allocator
    allocated_bytes: int = 0
    """In blocks that are handed out."""
    reserved_bytes: int = 0
    """In segments. It only grows, so at the end it is the peak."""
    _num_segments: int = 0
    _free: dict[bool, list[tuple[int, int, int]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    """Of small and of other segments: (bytes, segment, offset) of free blocks, ascending."""
    _blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)
    """Free blocks by segment and offset."""

    def take(self, num_bytes: int) -> _Block | None:
        """A block for a request; None for a request of nothing."""
        if num_bytes <= 0:
            return None
        wanted = _round_up(num_bytes, self.sizes.rounding_bytes)
        small = wanted <= self.sizes.small_limit_bytes
        free = self._free[small]
        position = bisect_left(free, (wanted, -1, -1))
        if position < len(free):
            _, segment, offset = free.pop(position)
            block = self._blocks.pop((segment, offset))
        else:
            block = self._new_segment(wanted, small)
        self._split(block, wanted)
        block.free = False
        self.allocated_bytes += block.num_bytes
        return block

    def give_back(self, block: _Block | None) -> None:
        """The block is free again, and merges with free neighbours."""
        if block is None:
            return
        self.allocated_bytes -= block.num_bytes
        block.free = True
        if block.before is not None and block.before.free:
            self._forget(block.before)
            block = _merged(block.before, block)
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block = _merged(block, block.after)
        self._remember(block)

    def _new_segment(self, wanted: int, small: bool) -> _Block:
        sizes = self.sizes
        if small:
            num_bytes = sizes.small_segment_bytes
        elif wanted < sizes.large_limit_bytes:
            num_bytes = sizes.large_segment_bytes
        else:
            num_bytes = _round_up(wanted, sizes.segment_rounding_bytes)
        num_bytes = max(num_bytes, wanted)
        self.reserved_bytes += num_bytes
        self._num_segments += 1
        return _Block(segment=self._num_segments, offset=0, num_bytes=num_bytes, small=small)

    def _split(self, block: _Block, wanted: int) -> None:
        """Leave the rest of the block free, where it is worth keeping apart."""
        rest = block.num_bytes - wanted
        worth = (
            rest >= self.sizes.rounding_bytes
            if block.small
            else rest > self.sizes.small_limit_bytes
        )
        if not worth:
            return
        other = _Block(
            segment=block.segment,
            offset=block.offset + wanted,
            num_bytes=rest,
            small=block.small,
            before=block,
            after=block.after,
        )
        if block.after is not None:
            block.after.before = other
        block.after, block.num_bytes = other, wanted
        self._remember(other)

    def _remember(self, block: _Block) -> None:
        insort(self._free[block.small], (block.num_bytes, block.segment, block.offset))
        self._blocks[block.segment, block.offset] = block

    def _forget(self, block: _Block) -> None:
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.num_bytes, block.segment, block.offset)))
        del self._blocks[block.segment, block.offset]


def _round_up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


def _merged(block: _Block, after: _Block) -> _Block:
    block.num_bytes += after.num_bytes
    block.after = after.after
    if after.after is not None:
        after.after.before = block
    block.free = True
    return block
