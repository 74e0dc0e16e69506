"""AttentionMetadata: how the flat tokens of one forward pass divide into sequences.

The model itself sees only flat tokens; attention is the one place where tokens meet other tokens, so this travels
beside them, explicitly, down to the attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass
class AttentionMetadata:
    """Attributes:
    query_start_loc: int32 [N + 1]; sequence i's tokens are rows query_start_loc[i]:query_start_loc[i + 1].
    seq_lens: int32 [N]; tokens that the last row of sequence i attends over, itself included.
    max_query_len: rows of the longest query.
    max_seq_len: the largest of seq_lens.
    slot_mapping: int64 [T]; where each token's key and value go.
    block_table: int32 [N, max_blocks]; the blocks that hold each sequence's tokens, in order.
    block_size: slots in a block: position p of sequence i is in slot
        block_table[i, p // block_size] * block_size + p % block_size.
    num_decodes: how many sequences have one query each and come before all others.
    shared: for a backend to keep what all layers share.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    num_decodes: int = 0
    shared: Any = None

    def split(self) -> tuple[AttentionMetadata, AttentionMetadata]:
        """The decodes, and the others."""
        num, start = self.num_decodes, self.query_start_loc

        def part(rows: slice, query_start_loc: torch.Tensor, max_query_len: int) -> AttentionMetadata:
            changes: dict[str, Any] = {n: getattr(self, n)[rows] for n in ("seq_lens", "slot_mapping", "block_table")}
            changes |= {"query_start_loc": query_start_loc, "max_query_len": max_query_len}
            return replace(self, **changes, num_decodes=0, shared=None)

        # A decode is one token, so that tokens are cut where sequences are.
        return part(slice(num), start[: num + 1], 1), part(slice(num, None), start[num:] - num, self.max_query_len)
