"""PagedAttention: attention that reads keys and values where they lie, block by block through the block table.

Decoding is all about reading the cache once and fast. On CUDA one Triton kernel walks each sequence's block table,
keeping a running maximum and sum (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867), so that nothing is
gathered, padded or written but the result. A CPU gathers, and so do prompts, where the products outweigh the copies.
"""

from __future__ import annotations

import torch

from ...utils.triton import tl, triton
from ..metadata import AttentionMetadata
from .torch_naive import naive_attention


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """Causal attention of every sequence's new queries over everything cached of it, themselves included.

    Args and result as in `naive_attention`.
    """
    if triton is not None and q.device.type == "cuda" and metadata.max_query_len == 1:
        return paged_decode(q, k_cache, v_cache, metadata, scale)
    return naive_attention(q, k_cache, v_cache, metadata, scale)


def paged_decode_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """What the kernel does, one block of one sequence at a time: slow, and to be read before the kernel.

    Args and result as in `paged_decode`.
    """
    block_size, groups = metadata.block_size, q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q)
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        query = q[i].float() * scale  # [H, D]
        running_max = torch.full((q.shape[1], 1), float("-inf"), device=q.device)
        running_sum = torch.zeros_like(running_max)
        total = torch.zeros_like(query)  # sum of exp(score - running_max) * value
        for start in range(0, seq_len, block_size):
            first_slot = int(metadata.block_table[i, start // block_size]) * block_size
            slots = slice(first_slot, first_slot + min(block_size, seq_len - start))
            k = k_cache[slots].float().repeat_interleave(groups, dim=1)  # [B, H, D]
            v = v_cache[slots].float().repeat_interleave(groups, dim=1)
            scores = torch.einsum("hd,bhd->hb", query, k)
            new_max = running_max.maximum(scores.amax(dim=1, keepdim=True))
            weights = (scores - new_max).exp()
            correction = (running_max - new_max).exp()  # what was summed so far was relative to the old maximum
            running_sum = running_sum * correction + weights.sum(dim=1, keepdim=True)
            total = total * correction + torch.einsum("hb,bhd->hd", weights, v)
            running_max = new_max
        out[i] = (total / running_sum).to(q.dtype)
    return out


# Keys that a program reads at a time, the fewest worth a program of their own, and the most programs for a sequence.
_TILE = 64
_MIN_SPLIT = 64
_MAX_SPLITS = 32


def paged_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """Attention of one query a sequence, in Triton.

    A program takes one KV head of one sequence, with all query heads that share it, so keys and values are read once.
    Where these are too few to fill the device, each sequence is split among several programs, as is one that is much
    longer than the others, and a second kernel puts their partial results together (Flash-Decoding: Dao et al. 2023).

    Args:
        q: [N, num_heads, head_dim]; a slice will do, if its heads are contiguous.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim].

    Returns:
        [N, num_heads, head_dim].
    """
    (num_seqs, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[1]
    enough, num_splits, long_split = choose_num_splits(num_seqs * num_kv_heads, metadata.max_seq_len, q.device)
    out = q.new_empty(q.shape)
    # What each program leaves: a weighted sum of values relative to its maximum, and log(sum of weights) + maximum.
    shape = (num_seqs, num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    groups = num_heads // num_kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_dim}
    tile = _TILE if padded_dim * q.element_size() <= 512 else _TILE // 2  # what a multiprocessor has room for
    _decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        q, k_cache, v_cache, metadata.block_table, metadata.seq_lens, out, partial, partial_lse,
        scale * 1.4426950408889634,  # log2(e): the kernel works with powers of two
        q.stride(0), metadata.block_table.stride(0), enough, num_splits, long_split,
        NUM_KV_HEADS=num_kv_heads, GROUPS=groups, PADDED_GROUPS=max(16, triton.next_power_of_2(groups)),
        BLOCK_SIZE=metadata.block_size, TILE=tile, **constants,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if num_splits > 1:
        _combine_kernel[(num_seqs, num_heads)](
            partial, partial_lse, metadata.seq_lens, out, enough, num_splits, long_split,
            TILE=tile, MAX_SPLITS=_MAX_SPLITS, **constants,
        )  # fmt: skip
    return out


def choose_num_splits(num_programs: int, max_seq_len: int, device: torch.device) -> tuple[int, int, int]:
    """How many programs share the work of one, which would take one KV head of one sequence.

    Returns:
        As many as fill the device, for every sequence; as many as the longest may take, so that a step does not wait
        for it; and how many keys each of these has at least. Neither leaves a program with very little to do.
    """
    num_units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    enough, room = 4 * num_units // num_programs, 48 * num_units // num_programs
    long_split = 1024 if enough > 1 else 576  # where programs abound, the last to end are those of the longest
    most = max(enough, min(room, max_seq_len // long_split))
    most = max(1, min(most, triton.cdiv(max_seq_len, _MIN_SPLIT), _MAX_SPLITS))
    return max(1, min(enough, most)), most, long_split


if triton is not None:

    @triton.jit
    def _split_len(seq_len, enough, num_splits, long_split, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        parts = tl.minimum(tl.maximum(seq_len // long_split, enough), num_splits)
        return tl.maximum(tl.cdiv(tl.cdiv(seq_len, parts), TILE), 1) * TILE

    # What changes from step to step is no constant: each new value of a constant would be compiled anew.
    @triton.jit(
        do_not_specialize=["q_stride", "table_stride", "enough", "num_splits", "long_split"],
        do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr"],
    )
    def _decode_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr, out_ptr, partial_ptr, lse_ptr, scale,
        q_stride, table_stride, enough, num_splits, long_split,
        NUM_KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
        TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ):  # fmt: skip
        seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        seq_len = tl.load(seq_lens_ptr + seq)
        split_len = _split_len(seq_len, enough, num_splits, long_split, TILE)
        start = split * split_len
        if (split > 0) & (start >= seq_len):
            return
        end = tl.minimum(start + split_len, seq_len)

        group = tl.arange(0, PADDED_GROUPS)  # query heads of this KV head; padded, as a product needs 16 rows
        dim = tl.arange(0, PADDED_DIM)
        head = kv_head * GROUPS + group
        rows = (seq * NUM_KV_HEADS * GROUPS + head).to(tl.int64)
        q_mask = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
        q_row = q_ptr + seq.to(tl.int64) * q_stride
        q = tl.load(q_row + head[:, None] * HEAD_DIM + dim[None, :], mask=q_mask, other=0.0)  # [G, D]

        running_max = tl.full([PADDED_GROUPS], -1e30, tl.float32)
        running_sum = tl.zeros([PADDED_GROUPS], tl.float32)
        total = tl.zeros([PADDED_GROUPS, PADDED_DIM], tl.float32)
        for tile in range(start, end, TILE):
            position = tile + tl.arange(0, TILE)
            is_key = position < end
            block = tl.load(table_ptr + seq * table_stride + position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            offset = (slot * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
            mask = is_key[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + offset, mask=mask, other=0.0)  # [TILE, D]
            v = tl.load(v_ptr + offset, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G, TILE]
            scores = tl.where(is_key[None, :], scores, -float("inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            correction = tl.exp2(running_max - new_max)
            running_sum = running_sum * correction + tl.sum(weights, axis=1)
            total = total * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            running_max = new_max

        result = total / tl.where(seq_len > 0, running_sum, 1.0)[:, None]  # a row of padding: 0
        if split_len < seq_len:
            lse = running_max + tl.log2(running_sum)
            index = rows * num_splits + split
            tl.store(partial_ptr + index[:, None] * HEAD_DIM + dim[None, :], result, mask=q_mask)
            tl.store(lse_ptr + index, lse, mask=group < GROUPS)
        else:
            tl.store(
                out_ptr + rows[:, None] * HEAD_DIM + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=q_mask
            )

    @triton.jit(
        do_not_specialize=["enough", "num_splits", "long_split"], do_not_specialize_on_alignment=["seq_lens_ptr"]
    )
    def _combine_kernel(  # type: ignore[no-untyped-def]
        partial_ptr, lse_ptr, seq_lens_ptr, out_ptr, enough, num_splits, long_split,
        TILE: tl.constexpr, MAX_SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ):  # fmt: skip
        seq_len = tl.load(seq_lens_ptr + tl.program_id(0))
        split_len = _split_len(seq_len, enough, num_splits, long_split, TILE)
        if seq_len <= split_len:  # it was not split
            return
        row = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, PADDED_DIM)
        is_split = split * split_len < seq_len
        index = row * num_splits + split
        lse = tl.load(lse_ptr + index, mask=is_split, other=-1e30)
        weights = tl.where(is_split, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
        mask = is_split[:, None] & (dim < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + index[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)  # [S, D]
        result = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
        tl.store(out_ptr + row * HEAD_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
