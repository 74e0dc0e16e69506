"""FlashAttention: exact attention that never writes the matrix of scores.

FlashAttention (Dao et al. 2022, arXiv 2205.14135) and FlashAttention-2 (Dao 2023, arXiv 2307.08691). A GPU computes far
faster than its memory can follow, so what attention costs is what it moves. Scores are computed tile by tile in fast
memory, used at once through an online softmax, and forgotten; only q, k, v and the result pass through slow memory.

On CUDA the kernels are those of the flash-attn package, with our own decode kernel; on a CPU torch's take prompts.
`tiled_attention` is the algorithm in plain torch, to be read and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ...utils.triton import triton
from ..metadata import AttentionMetadata
from ..ops import compute_slot_mapping
from .abstract import AttentionBackend
from .paged import decode
from .torch_naive import MAX_SCORES, PaddedGroup, padded_attention

_PAGE_MULTIPLE = 256  # flash-attn 2 reads through a block table in pages of this many tokens only


class FlashAttentionBackend(AttentionBackend):
    """Prompts by FlashAttention, decode steps by what is fastest at reading the cache."""

    name = "flash"
    supports_cuda_graph = True

    @classmethod
    def preferred_block_size(cls, device: torch.device) -> int:
        return _PAGE_MULTIPLE if device.type == "cuda" else super().preferred_block_size(device)

    @classmethod
    def unsupported_reason(cls, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        if device.type == "cpu":
            return None
        if dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"flash-attn wants heads of at most 256 dimensions, in eights, and these have {head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "flash-attn wants a GPU of compute capability 8.0 or more"
        if triton is None:
            return "triton is missing (pip install triton)"
        try:
            from flash_attn import flash_attn_varlen_func  # noqa: F401
        except ImportError as error:
            return f"flash_attn cannot be imported: {error} (pip install flash-attn --no-build-isolation)"
        return None

    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        if metadata.max_query_len == 1:
            return decode(q, k_cache, v_cache, metadata, scale)
        attend = partial(padded_attention, attend=_attend_sdpa) if q.device.type == "cpu" else _flash_attn
        return attend(q, k_cache, v_cache, metadata, scale)


def _flash_attn(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """One call for sequences with any number of queries each. The causal mask is aligned at the last query and key."""
    from flash_attn import flash_attn_varlen_func

    if metadata.shared is None:  # by the first layer, for all
        key_start_loc = F.pad(metadata.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))  # [N + 1]
        has_pages = metadata.block_size % _PAGE_MULTIPLE == 0
        metadata.shared = key_start_loc, None if has_pages else _key_slots(metadata, key_start_loc)
    key_start_loc, slots = metadata.shared
    if slots is None:  # the kernel walks the block table itself
        pages = (-1, metadata.block_size, *k_cache.shape[1:])
        k, v, block_table = k_cache[:-1].view(pages), v_cache[:-1].view(pages), metadata.block_table
    else:
        k, v, block_table = k_cache[slots], v_cache[slots], None
    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        q,
        k,
        v,
        metadata.query_start_loc,
        key_start_loc,
        metadata.max_query_len,
        metadata.max_seq_len,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
    )


def _key_slots(metadata: AttentionMetadata, key_start_loc: torch.Tensor) -> torch.Tensor:
    """Slots of all sequences' keys, one sequence after the other: int64 [sum of seq_lens]."""
    lens = metadata.seq_lens.long()
    seq_index = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens)
    positions = torch.arange(len(seq_index), device=lens.device) - key_start_loc[seq_index]
    return compute_slot_mapping(metadata.block_table, seq_index, positions, metadata.block_size)


def _attend_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: PaddedGroup, scale: float) -> torch.Tensor:
    """q [n, Q, H, D], k and v [n, KvH, K, D] -> [n, Q, H, D], by torch's flash kernel for CPUs."""
    (num_seqs, num_queries, _, _), num_keys = q.shape, k.shape[2]
    if group.max_context_len == 0:  # the first query belongs to the first key, which is how is_causal understands it
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    key_positions = torch.arange(num_keys)
    tile_size = max(1, MAX_SCORES["cpu"] // (num_seqs * num_keys))  # a mask, too, is a matrix of queries by keys
    tiles = []
    for start in range(0, num_queries, tile_size):
        positions = group.positions[:, start : start + tile_size, None]  # [n, R, 1]
        visible = min(group.max_context_len + start + positions.shape[1], num_keys)
        mask = (key_positions[:visible] <= positions)[:, None]  # [n, 1, R, K]
        rows = q[:, start : start + tile_size].transpose(1, 2)  # [n, H, R, D]
        keys, values = k[:, :, :visible], v[:, :, :visible]
        tile = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale, enable_gqa=True)
        tiles.append(tile.transpose(1, 2))
    return torch.cat(tiles, dim=1)


@dataclass
class Traffic:
    """Bytes that a tiled computation of attention moves between slow memory and fast."""

    read: int = 0
    written: int = 0


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, query_tile: int = 64, key_tile: int = 64
) -> tuple[torch.Tensor, Traffic]:
    """FlashAttention-2's forward pass (arXiv 2307.08691, algorithm 1) for one sequence, causal.

    On a GPU everything between loading and writing stays in registers and shared memory. The queries are the last ones:
    query i of Q sees the keys up to K - Q + i.

    Args:
        q: [Q, H, D].
        k, v: [K, H, D].

    Returns:
        [Q, H, D], and what went to and fro.
    """
    traffic = Traffic()

    def load(tensor: torch.Tensor) -> torch.Tensor:
        traffic.read += tensor.nbytes
        return tensor.float().transpose(0, 1)  # [H, tile, D]

    num_queries, num_keys = len(q), len(k)
    out = torch.empty_like(q)
    for first_row in range(0, num_queries, query_tile):
        rows = load(q[first_row : first_row + query_tile]) * scale  # [H, R, D]
        row_positions = num_keys - num_queries + first_row + torch.arange(rows.shape[1], device=q.device)
        running_max = rows.new_full((*rows.shape[:2], 1), float("-inf"))
        running_sum = torch.zeros_like(running_max)
        total = torch.zeros_like(rows)  # sum of exp(score - running_max) * value
        for first_key in range(0, int(row_positions[-1]) + 1, key_tile):  # tiles that nobody sees are not even loaded
            keys = load(k[first_key : first_key + key_tile])  # [H, C, D]
            values = load(v[first_key : first_key + key_tile])
            key_positions = first_key + torch.arange(keys.shape[1], device=q.device)
            scores = rows @ keys.transpose(1, 2)  # [H, R, C]: the only scores there are
            scores = scores.masked_fill(key_positions > row_positions[:, None], float("-inf"))
            new_max = running_max.maximum(scores.amax(dim=-1, keepdim=True))
            weights = (scores - new_max).exp()
            correction = (running_max - new_max).exp()
            running_sum = running_sum * correction + weights.sum(dim=-1, keepdim=True)
            total = total * correction + weights @ values
            running_max = new_max
        tile = (total / running_sum).transpose(0, 1).to(q.dtype)
        out[first_row : first_row + query_tile] = tile
        traffic.written += tile.nbytes
    return out, traffic
