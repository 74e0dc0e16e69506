"""KVCacheManager: which blocks hold a sequence's keys and values.

PagedAttention (Kwon et al., SOSP 2023, arXiv 2309.06180), sections 4.1 to 4.4. A sequence holds as many blocks as its
tokens fill, in any order and anywhere, and gets the next one when it needs it. Sequences may hold the same block as
long as none writes into it; whoever is about to is given a copy of its own first. What has been computed once can be
found by its tokens (`prefix_cache.py`), and is held by all who have it in common.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..metrics.stats import PrefixCacheStats
from ..request import Sequence
from .block_pool import BlockPool
from .prefix_cache import NOTHING_COMPUTED, ComputedBlocks, PrefixCache


class KVCacheManager:
    """Gives blocks to sequences (`Sequence.block_table`) and takes them back.

    Attributes:
        block_copies: (from, to), to be carried out before the next forward pass (`take_block_copies`).
        num_copied_blocks: how many were.
        prefix_cache: None: nobody finds what others have computed.
        prefix_cache_stats: what those who were admitted found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = False) -> None:
        self.block_size = block_size
        self.prefix_cache = PrefixCache(block_size) if enable_prefix_caching else None
        self.prefix_cache_stats = PrefixCacheStats()
        self.block_pool = BlockPool(num_blocks, self.prefix_cache)
        self.block_copies: list[tuple[int, int]] = []
        self.num_copied_blocks = 0

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

    def get_computed_blocks(self, seq: Sequence) -> ComputedBlocks:
        """What the cache has of the tokens of `seq`, which holds no blocks. Changes nothing."""
        return NOTHING_COMPUTED if self.prefix_cache is None else self.prefix_cache.match(seq)

    def next_missing_block(self, seq: Sequence) -> bytes | None:
        """The hash of the block that `seq` computes next; None if it will not be full, or can be found."""
        return None if self.prefix_cache is None else self.prefix_cache.next_missing(seq)

    def allocate_slots(
        self,
        seq: Sequence,
        num_new_tokens: int,
        num_reserved_blocks: int = 0,
        computed: ComputedBlocks = NOTHING_COMPUTED,
    ) -> bool:
        """Give `seq` slots for its next tokens, after its `num_computed_tokens`: all of them or none.

        Args:
            num_reserved_blocks: free blocks that must be left.
            computed: what `get_computed_blocks` has found for the `num_computed_tokens` of a sequence without blocks.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        table, hits, pool = seq.block_table, computed.block_ids, self.block_pool
        num_new = self.num_blocks_for(seq.num_computed_tokens + num_new_tokens) - len(table) - len(hits)
        num_free_hits = sum(pool.blocks[block_id].ref_cnt == 0 for block_id in hits) if hits else 0
        first, held = seq.num_computed_tokens // self.block_size, table or hits
        written = pool.blocks[held[first]] if first < len(held) else None  # the block that is written first
        num_holders = written.ref_cnt + bool(hits) if written is not None else 0
        if num_new + num_free_hits + (num_holders > 1) + num_reserved_blocks > pool.num_free_blocks:
            return False
        if hits:
            pool.touch(hits)
            table += hits
        if written is not None and (num_holders > 1 or written.block_hash is not None):  # shared, or can be found
            # Copy on write. It is let go first, so that it can itself be taken if no other is free: a step reads all
            # that it copies before it writes.
            pool.free_blocks([table[first]])
            (table[first],) = pool.get_new_blocks(1)
            self.block_copies.append((written.block_id, table[first]))
        if num_new > 0:
            table += pool.get_new_blocks(num_new)
        return True

    def take_block_copies(self) -> list[tuple[int, int]]:
        """The copies that the next forward pass has to find done, once."""
        copies, self.block_copies = self.block_copies, []
        self.num_copied_blocks += len(copies)
        return copies

    def note_admission(self, seq: Sequence) -> None:
        """`seq` has been admitted, and need not compute its first `num_computed_tokens`."""
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            if self.prefix_cache is not None:
                self.prefix_cache_stats.record(seq.num_tokens, seq.num_cached_tokens)

    def cache_blocks(self, seqs: list[Sequence], num_new_tokens: Mapping[str, int], seq_lens: list[int]) -> None:
        """A step has computed so many tokens of each, up to its first `seq_lens`: what they fill can be found."""
        if self.prefix_cache is None:
            return
        for seq, end in zip(seqs, seq_lens, strict=True):
            num_new = num_new_tokens[seq.seq_id]
            if end % self.block_size < num_new and seq.block_table:  # or it was aborted, and its blocks are gone
                for index in range((end - num_new) // self.block_size, end // self.block_size):
                    self.prefix_cache.add(seq, index, self.block_pool.blocks[seq.block_table[index]])

    def reset_prefix_cache(self) -> bool:
        """Forget all that has been computed. Returns False, and forgets nothing, while somebody holds blocks."""
        if self.num_used_blocks > 0:
            return False
        if self.prefix_cache is not None:
            self.prefix_cache.reset()
        self.prefix_cache_stats.forget_recent()
        return True

    def make_stats(self) -> dict[str, float]:
        """Fields of StepRecord, after a step."""
        cache, stats = self.prefix_cache, self.prefix_cache_stats
        return {
            "kv_slots_cached": 0 if cache is None else len(cache) * self.block_size,
            "num_copied_blocks": self.num_copied_blocks,
            "prefix_cache_evictions": 0 if cache is None else cache.num_evictions,
            "prefix_cache_queries": stats.queries,
            "prefix_cache_hits": stats.hits,
            "prefix_cache_hit_rate": stats.hit_rate,
        }

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` holds the blocks of the prompt that `parent` has, or will have, computed.

        Its own first token comes from computing the last token of the prompt again.
        """
        child.block_table = parent.block_table[: self.num_blocks_for(child.num_prompt_tokens)]
        child.num_computed_tokens = child.num_prompt_tokens - 1
        child.block_hashes = parent.block_hashes[: child.num_prompt_tokens // self.block_size]
        child.num_cached_tokens = 0  # nobody has looked for it in the cache
        self.block_pool.touch(child.block_table)

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`, the last one first."""
        self.block_pool.free_blocks(reversed(seq.block_table))
        seq.block_table = []
        # Nobody needs a copy that nobody holds, and its block may be given to somebody else in this very step.
        self.block_copies = [(a, b) for a, b in self.block_copies if self.block_pool.blocks[b].ref_cnt > 0]
