"""Attention as the formula says it: scores, mask, softmax, weighted sum, in plain torch.

It is the yardstick for every other way of computing it. The scores of a long prompt would be an N x N matrix for
every head, so queries go through in tiles: memory is then QUERY_TILE x N, and the keys that no row of a tile may see
are not even multiplied.
"""

from __future__ import annotations

import torch

from ..metadata import AttentionMetadata

QUERY_TILE = 256


def naive_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """Causal attention of new queries over everything cached of their sequence, themselves included.

    One sequence in one block: its keys are the first slots of the cache, a slice and not a copy.

    Args:
        q: [T, num_heads, head_dim].
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        scale: what scores are multiplied by, usually head_dim ** -0.5.

    Returns:
        [T, num_heads, head_dim].
    """
    out = torch.empty_like(q)
    _attend(q, k_cache[: metadata.max_seq_len], v_cache[: metadata.max_seq_len], scale, out)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """One sequence, written to `out`. The last query row stands at the last key's position."""
    num_queries, num_keys = len(q), len(k)
    q = q.unflatten(1, (k.shape[1], -1))  # [Q, KvH, G, D]: the G query heads that share a KV head stand together
    for start in range(0, num_queries, QUERY_TILE):
        rows = q[start : start + QUERY_TILE]  # [R, KvH, G, D]
        first_position = num_keys - num_queries + start
        visible = first_position + len(rows)  # keys that the tile's last row sees
        scores = torch.einsum("rhgd,khd->hgrk", rows * scale, k[:visible])
        if len(rows) > 1:  # a single row sees all of them
            row_positions = torch.arange(first_position, visible, device=q.device)
            hidden = torch.arange(visible, device=q.device) > row_positions[:, None]  # [R, K]: keys in a row's future
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        tile = torch.einsum("hgrk,khd->rhgd", weights, v[:visible])
        out[start : start + QUERY_TILE] = tile.flatten(1, 2)
