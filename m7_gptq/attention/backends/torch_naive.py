"""Attention as the formula says it: pad, scores, mask, softmax, weighted sum, in plain torch.

It is the yardstick for every other way of computing it. Sequences of different lengths are padded to the longest one,
here and nowhere else; where that would waste much, sequences of like lengths make a group. A CPU, to which a launch
is cheap, decodes them one by one. The scores of long prompts would be an N x N matrix for every head, so queries go
through in tiles: memory is then bounded, and the keys that no row of a tile may see are not even multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from ..metadata import AttentionMetadata
from .abstract import AttentionBackend

# In memory at once: keys of a layer, and scores of one of its heads; on a CPU no more than its caches hold.
MAX_KEYS = {"cpu": 2**12, "cuda": 2**17}
MAX_SCORES = {"cpu": 2**16, "cuda": 2**22}


class NaiveBackend(AttentionBackend):
    """Everything in matrix products of torch."""

    name = "naive"

    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        if metadata.max_query_len == 1 and q.device.type == "cpu":
            return decode_one_by_one(q, k_cache, v_cache, metadata, scale)
        return padded_attention(q, k_cache, v_cache, metadata, scale, _attend)


def padded_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PaddedGroup, float], torch.Tensor],
) -> torch.Tensor:
    """Gather what each sequence attends over, in groups padded to their longest, and leave the rest to `attend`.

    Other arguments and result as in `AttentionBackend.forward`.
    """
    if metadata.shared is None:
        metadata.shared = list(pad(metadata))  # by the first layer, for all
    out = torch.empty_like(q)
    for group in metadata.shared:
        k, v = _gather(k_cache, group.slots), _gather(v_cache, group.slots)
        padded = attend(q[group.rows], k, v, group, scale)  # [n, Q, H, D]
        out[group.tokens] = padded.flatten(0, 1)[group.cells]
    return out


def decode_one_by_one(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """One query a sequence, and one sequence after the other (selective batching: Orca, section 3).

    All other layers gain by a batch, for its rows share their weights; but no two sequences share a key. Nothing is
    padded or masked, and what a sequence reads stays in a CPU's caches while it is needed.

    Args and result as in `AttentionBackend.forward`.
    """
    if metadata.shared is None:  # by the first layer, for all
        positions = torch.arange(metadata.max_seq_len)
        blocks = metadata.block_table[:, positions // metadata.block_size]
        slots = blocks * metadata.block_size + positions % metadata.block_size  # [N, K]
        metadata.shared = [row[:num] for row, num in zip(slots, metadata.seq_lens.tolist(), strict=True)]
    queries = (q.float() * scale).view(len(q), k_cache.shape[1], -1, q.shape[2])  # [N, KvH, G, D]
    out = []
    for query, slots in zip(queries, metadata.shared, strict=True):
        k, v = k_cache.index_select(0, slots).float(), v_cache.index_select(0, slots).float()  # [K, KvH, D]
        weights = torch.bmm(query, k.permute(1, 2, 0)).softmax(dim=-1)  # [KvH, G, K]
        out.append(torch.bmm(weights, v.transpose(0, 1)))  # [KvH, G, D]
    return torch.stack(out).view_as(q).to(q.dtype)


@dataclass
class PaddedGroup:
    """Some sequences of a batch, n of them. Padding repeats a sequence's last token: nothing undefined is ever read.

    Attributes:
        rows: int64 [n, Q]; their rows among the flat tokens.
        positions: int64 [n, Q]; where in its sequence each of these stands.
        cells: int64 [t]; which of the n * Q are not padding.
        tokens: int64 [t]; rows of these among the flat tokens.
        slots: int64 [n, K]; where the keys and values that they attend over live.
        max_context_len: most tokens that one of them had before these.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    cells: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    max_context_len: int


def pad(metadata: AttentionMetadata) -> Iterator[PaddedGroup]:
    """Divide a batch into groups that can be padded to their longest."""
    query_lens, seq_lens = metadata.query_start_loc.diff().tolist(), metadata.seq_lens.tolist()
    everybody = range(len(seq_lens))

    def size(i: int) -> tuple[int, int]:
        return query_lens[i].bit_length(), seq_lens[i].bit_length()

    max_scores = MAX_SCORES[metadata.seq_lens.device.type]
    if len(seq_lens) * metadata.max_query_len * metadata.max_seq_len <= max_scores:
        groups = [list(everybody)]  # so little that launches cost more than padding
    else:
        groups = [list(group) for _, group in groupby(sorted(everybody, key=size), key=size)]
    for group in groups:
        most = max(1, MAX_KEYS[metadata.seq_lens.device.type] // max(seq_lens[i] for i in group))
        for start in range(0, len(group), most):
            yield _pad_group(metadata, group[start : start + most], query_lens, seq_lens)


def _pad_group(
    metadata: AttentionMetadata, group: list[int], query_lens: list[int], seq_lens: list[int]
) -> PaddedGroup:
    device = metadata.seq_lens.device
    index = torch.tensor(group, device=device)
    starts, ends = metadata.query_start_loc[index, None].long(), metadata.query_start_loc[index + 1, None].long()
    lens = metadata.seq_lens[index, None].long()  # [n, 1]
    rows = starts + torch.arange(max(query_lens[i] for i in group), device=device)  # [n, Q]
    cells = (rows < ends).flatten().nonzero().squeeze(-1)
    rows = rows.minimum(ends - 1)
    key_positions = torch.arange(max(seq_lens[i] for i in group), device=device).minimum(lens - 1)  # [n, K]
    blocks = metadata.block_table[index].gather(1, key_positions // metadata.block_size)
    slots = blocks * metadata.block_size + key_positions % metadata.block_size
    context_len = max(seq_lens[i] - query_lens[i] for i in group)
    return PaddedGroup(rows, rows + lens - ends, cells, rows.flatten()[cells], slots, context_len)


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What `slots` [n, K] hold: [n, KvH, K, D]."""
    _, num_kv_heads, head_dim = cache.shape
    # Every head of a slot is a row of its own here, so that this order needs no second copy.
    heads = torch.arange(num_kv_heads, device=cache.device)[:, None]
    cache_rows = slots[:, None] * num_kv_heads + heads  # [n, KvH, K]
    return cache.view(-1, head_dim).index_select(0, cache_rows.flatten()).view(*cache_rows.shape, head_dim)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: PaddedGroup, scale: float) -> torch.Tensor:
    """q [n, Q, H, D], k and v [n, KvH, K, D] -> [n, Q, H, D]; each query sees the keys up to its own position."""
    (num_seqs, num_queries, num_heads, head_dim), (_, num_kv_heads, num_keys, _) = q.shape, k.shape
    dtype = q.dtype
    if q.device.type == "cpu":  # half precision would build a kernel for every new shape, and each step has a new one
        q, k, v = q.float(), k.float(), v.float()
    # The G query heads that share a KV head stand together, so that its keys and values need no copies.
    grouped = (q * scale).view(num_seqs, num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    k = k.flatten(0, 1).transpose(1, 2)  # [n * KvH, D, K]
    v = v.flatten(0, 1)  # [n * KvH, K, D]
    key_positions = torch.arange(num_keys, device=q.device)
    tile_size = max(1, MAX_SCORES[q.device.type] // (num_seqs * num_keys))
    tiles = []
    for start in range(0, num_queries, tile_size):
        rows = grouped[:, :, :, start : start + tile_size]  # [n, KvH, G, R, D]
        num_rows = rows.shape[3]
        visible = min(group.max_context_len + start + num_rows, num_keys)  # keys that the tile's last row may see
        scores = torch.bmm(rows.reshape(num_seqs * num_kv_heads, -1, head_dim), k[:, :, :visible])  # [n*KvH, G*R, K]
        if num_seqs * num_queries > 1:  # a single row sees all of them
            hidden = key_positions[:visible] > group.positions[:, start : start + tile_size, None]  # [n, R, K]
            by_row = scores.view(num_seqs, num_heads, num_rows, visible)
            scores = by_row.masked_fill(hidden[:, None], float("-inf")).view_as(scores)
        tile = torch.bmm(scores.softmax(dim=-1), v[:, :visible])  # [n * KvH, G * R, D]; softmax sums in float32
        tiles.append(tile.view(num_seqs, num_heads, num_rows, head_dim).transpose(1, 2))
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)).to(dtype)
