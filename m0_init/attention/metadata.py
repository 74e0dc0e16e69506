"""AttentionMetadata: how the flat tokens of one forward pass divide into sequences.

The model itself sees only flat tokens; attention is the one place where tokens meet other tokens, so this travels
beside them, explicitly, down to the attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class AttentionMetadata:
    """Attributes:
    query_start_loc: int32 [N + 1]; sequence i's tokens are rows query_start_loc[i]:query_start_loc[i + 1].
    seq_lens: int32 [N]; tokens that the last row of sequence i attends over, itself included.
    max_query_len: rows of the longest query.
    max_seq_len: the largest of seq_lens.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
