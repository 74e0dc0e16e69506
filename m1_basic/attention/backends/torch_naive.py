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
    return _attend(q, k_cache[: metadata.max_seq_len], v_cache[: metadata.max_seq_len], scale)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence: q [Q, H, D], k and v [K, KvH, D] -> [Q, H, D]; the last query stands at the last key's position."""
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    dtype = q.dtype
    if q.device.type == "cpu":  # half precision would build a kernel for every new shape, and each step has a new one
        q, k, v = q.float(), k.float(), v.float()
    # The G query heads that share a KV head stand together, so that its keys and values need no copies.
    grouped = (q * scale).view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [KvH, G, Q, D]
    k = k.permute(1, 2, 0)  # [KvH, D, K]
    v = v.transpose(0, 1)  # [KvH, K, D]
    tiles = []
    for start in range(0, num_queries, QUERY_TILE):
        rows = grouped[:, :, start : start + QUERY_TILE]  # [KvH, G, R, D]
        num_rows = rows.shape[2]
        first_position = num_keys - num_queries + start
        visible = first_position + num_rows  # keys that the tile's last row sees
        scores = torch.bmm(rows.flatten(1, 2), k[:, :, :visible])  # [KvH, G * R, K]
        if num_rows > 1:  # a single row sees all of them
            row_positions = torch.arange(first_position, visible, device=q.device)
            hidden = torch.arange(visible, device=q.device) > row_positions[:, None]  # [R, K]: keys in a row's future
            scores = scores.view(num_kv_heads, -1, num_rows, visible).masked_fill(hidden, float("-inf")).flatten(1, 2)
        tile = torch.bmm(scores.softmax(dim=-1), v[:, :visible])  # [KvH, G * R, D]; softmax sums in float32
        tile = tile.view(num_kv_heads, -1, num_rows, head_dim).permute(2, 0, 1, 3)
        tiles.append(tile.reshape(num_rows, num_heads, head_dim))
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles)).to(dtype)
