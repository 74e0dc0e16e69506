"""The pool of KV cache blocks: which are free, and how many sequences hold each of the others.

A block is a number here; what it stands for (`block_size` slots in every layer's cache) is the worker's business. All
operations are O(1) a block, also taking one out of the middle of the free queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class KVCacheBlock:
    """Attributes:
    ref_cnt: how many sequences hold it; 0: it is free.
    prev_free_block, next_free_block: its neighbours in the free queue; None while it is held.
    """

    block_id: int
    ref_cnt: int = 0
    prev_free_block: KVCacheBlock | None = None
    next_free_block: KVCacheBlock | None = None


class FreeKVCacheBlockQueue:
    """Free blocks, longest free first: a doubly linked list whose links are the blocks' own.

    A deque could not take a block out of its middle, and its links would be objects to make and to throw away. The two
    ends are sentinels, so that every block in the queue has two neighbours.
    """

    def __init__(self, blocks: Iterable[KVCacheBlock]) -> None:
        self.num_free_blocks = 0
        self._head, self._tail = KVCacheBlock(-1), KVCacheBlock(-1)
        self._head.next_free_block, self._tail.prev_free_block = self._tail, self._head
        for block in blocks:
            self.append(block)

    def popleft(self) -> KVCacheBlock:
        """Take the block that has been free for longest. Raises ValueError when there is none."""
        block = self._head.next_free_block
        if block is None or block is self._tail:
            raise ValueError("no free blocks")
        self.remove(block)
        return block

    def append(self, block: KVCacheBlock) -> None:
        """`block` has become free. Raises RuntimeError if it is in the queue already."""
        self._link(self._tail.prev_free_block, block, self._tail)

    def remove(self, block: KVCacheBlock) -> None:
        """Take out a block wherever it stands. Raises RuntimeError if it is not in the queue."""
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"block {block.block_id} is not in the free queue")
        before.next_free_block, after.prev_free_block = after, before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def _link(self, before: KVCacheBlock | None, block: KVCacheBlock, after: KVCacheBlock | None) -> None:
        if block.next_free_block is not None:
            raise RuntimeError(f"block {block.block_id} is in the free queue already")
        assert before is not None and after is not None
        block.prev_free_block, block.next_free_block = before, after
        before.next_free_block = after.prev_free_block = block
        self.num_free_blocks += 1

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """In the order in which they would be taken."""
        blocks = []
        block = self._head.next_free_block
        while block is not None and block is not self._tail:
            blocks.append(block)
            block = block.next_free_block
        return blocks


class BlockPool:
    """All blocks of the cache."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)

    @property
    def num_free_blocks(self) -> int:
        return self.free_block_queue.num_free_blocks

    def get_new_blocks(self, num_blocks: int) -> list[int]:
        """Take free blocks, each to be held once. Raises ValueError, and takes none, if there are fewer."""
        if num_blocks > self.num_free_blocks:
            raise ValueError(f"{num_blocks} blocks were asked for, {self.num_free_blocks} are free")
        blocks = [self.free_block_queue.popleft() for _ in range(num_blocks)]
        for block in blocks:
            block.ref_cnt = 1
        return [block.block_id for block in blocks]

    def touch(self, block_ids: Iterable[int]) -> None:
        """One more sequence holds these blocks."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, block_ids: Iterable[int]) -> None:
        """One sequence less holds these blocks; those that nobody holds become free, in this order.

        Raises:
            RuntimeError: a block is free already.
        """
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_cnt == 0:
                raise RuntimeError(f"block {block_id} is free already")
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.free_block_queue.append(block)

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Compare the pool with the block tables of all sequences that hold something.

        Raises:
            RuntimeError: a block is lost, free twice, or not held as often as it is counted.
        """
        held = Counter(block_id for table in block_tables for block_id in table)
        free = [block.block_id for block in self.free_block_queue.get_all_free_blocks()]
        if len(free) != self.num_free_blocks or len(set(free)) != len(free):
            raise RuntimeError(f"the free queue counts {self.num_free_blocks} blocks and holds {free}")
        is_free = set(free)
        for block in self.blocks:
            if block.ref_cnt != held[block.block_id]:
                raise RuntimeError(f"{held[block.block_id]} sequences hold {block.block_id}, counted {block.ref_cnt}")
            if (block.ref_cnt == 0) != (block.block_id in is_free):
                raise RuntimeError(
                    f"block {block.block_id} is held by {block.ref_cnt} and is in the free queue, or none"
                )
