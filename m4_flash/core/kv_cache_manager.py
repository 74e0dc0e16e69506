"""KVCacheManager: which blocks hold a sequence's keys and values.

PagedAttention (Kwon et al., SOSP 2023, arXiv 2309.06180), sections 4.1 to 4.4. A sequence holds as many blocks as its
tokens fill, in any order and anywhere, and gets the next one when it needs it. Sequences may hold the same block as
long as none writes into it; whoever is about to is given a copy of its own first.
"""

from __future__ import annotations

from ..request import Sequence
from .block_pool import BlockPool


class KVCacheManager:
    """Gives blocks to sequences (`Sequence.block_table`) and takes them back.

    Attributes:
        block_copies: (from, to), to be carried out before the next forward pass (`take_block_copies`).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.block_pool = BlockPool(num_blocks)
        self.block_copies: list[tuple[int, int]] = []

    @property
    def num_blocks(self) -> int:
        return len(self.block_pool.blocks)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that somebody holds, each counted once."""
        return self.num_blocks - self.block_pool.num_free_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.num_free_blocks

    def num_used_slots(self, seqs: list[Sequence]) -> int:
        """Slots that hold a token of one of `seqs`, which are all that hold blocks."""
        # Only a last block can have empty slots. If several end in it, whoever has come furthest counts; if it is in
        # the middle of somebody's table, it is full.
        empty: dict[int, list[int]] = {}
        for seq in seqs:
            num_empty = len(seq.block_table) * self.block_size - seq.num_computed_tokens
            empty.setdefault(seq.block_table[-1], []).append(num_empty)
        blocks = self.block_pool.blocks
        num_empty = sum(min(nums) for block_id, nums in empty.items() if blocks[block_id].ref_cnt == len(nums))
        return self.num_used_blocks * self.block_size - num_empty

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate_slots(self, seq: Sequence, num_new_tokens: int, num_reserved_blocks: int = 0) -> bool:
        """Give `seq` slots for its next tokens, after its `num_computed_tokens`: all of them or none.

        Args:
            num_reserved_blocks: free blocks that must be left.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        table, pool = seq.block_table, self.block_pool
        num_new = self.num_blocks_for(seq.num_computed_tokens + num_new_tokens) - len(table)
        first = seq.num_computed_tokens // self.block_size  # the block that is written first
        is_shared = first < len(table) and pool.blocks[table[first]].ref_cnt > 1
        if num_new + is_shared + num_reserved_blocks > pool.num_free_blocks:
            return False
        if is_shared:  # copy on write
            (copy,) = pool.get_new_blocks(1)
            self.block_copies.append((table[first], copy))
            pool.free_blocks([table[first]])
            table[first] = copy
        if num_new > 0:
            table += pool.get_new_blocks(num_new)
        return True

    def take_block_copies(self) -> list[tuple[int, int]]:
        """The copies that the next forward pass has to find done, once."""
        copies, self.block_copies = self.block_copies, []
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` holds the blocks of the prompt that `parent` has, or will have, computed.

        Its own first token comes from computing the last token of the prompt again.
        """
        child.block_table = parent.block_table[: self.num_blocks_for(child.num_prompt_tokens)]
        child.num_computed_tokens = child.num_prompt_tokens - 1
        self.block_pool.touch(child.block_table)

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`, the last one first."""
        self.block_pool.free_blocks(reversed(seq.block_table))
        seq.block_table = []
        # Nobody needs a copy that nobody holds, and its block may be given to somebody else in this very step.
        self.block_copies = [(a, b) for a, b in self.block_copies if self.block_pool.blocks[b].ref_cnt > 0]
