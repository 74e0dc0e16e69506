"""Where a token's key and value live, and putting them there.

The cache is a flat row of slots. Blocks divide the row, and a sequence's block table says which blocks are its own,
in the order of its tokens.
"""

from __future__ import annotations

import torch


def compute_slot_mapping(
    block_table: torch.Tensor, seq_index: torch.Tensor, positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The slot of each token.

    Args:
        block_table: [N, max_blocks], each sequence's blocks in the order of its tokens.
        seq_index: int64 [T], which sequence a token belongs to.
        positions: int64 [T], where in it the token stands.

    Returns:
        int64 [T].
    """
    blocks = block_table[seq_index, positions // block_size].long()
    return blocks * block_size + positions % block_size


def write_kv_cache(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Scatter keys and values into their slots.

    Args:
        k, v: [T, num_kv_heads, head_dim].
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], written in place.
        slot_mapping: int64 [T].
    """
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


def copy_blocks(caches: list[torch.Tensor], block_copies: list[tuple[int, int]], block_size: int) -> None:
    """Copy whole blocks, in place. All are read before any is written, so a block may be copied and then replaced.

    Args:
        caches: each [num_slots + 1, num_kv_heads, head_dim].
        block_copies: (from, to); no two to the same block.
    """
    blocks = torch.tensor(block_copies, device=caches[0].device).T[..., None]  # [2, M, 1]
    source, target = (blocks * block_size + torch.arange(block_size, device=blocks.device)).flatten(1)  # slots
    for cache in caches:
        cache[target] = cache[source]
