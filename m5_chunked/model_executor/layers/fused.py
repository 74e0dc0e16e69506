"""What surrounds attention, in fewer and bigger kernels.

Each of these steps is a handful of small operations in torch. On a GPU each operation is a kernel that reads what the
one before has just written, and takes longer to launch than to run. A kernel in Triton does all of a step in one pass;
the layers use them where `is_available`, and otherwise do the same in torch.
"""

from __future__ import annotations

import torch

from ...utils.triton import tl, triton

_HEADS = 8  # that a program normalises and rotates


def is_available(x: torch.Tensor) -> bool:
    """Whether kernels can run on `x`."""
    return triton is not None and x.device.type == "cuda"


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x, in place, and the RMS norm of that: all [T, H], contiguous."""
    out = torch.empty_like(x)
    num_columns = x.shape[-1]
    _add_rms_norm_kernel[(x.numel() // num_columns,)](
        x, residual, weight, out, num_columns, eps, PADDED=triton.next_power_of_2(num_columns), num_warps=4
    )
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate | up]: [T, 2 * d], contiguous -> [T, d]."""
    num_rows, num_columns = x.numel() // x.shape[-1], x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], num_columns)
    _silu_and_mul_kernel[(num_rows, triton.cdiv(num_columns, 1024))](x, out, num_columns, TILE=1024, num_warps=4)
    return out


def norm_rotate_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    rotation: tuple[torch.Tensor, torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Norm of every head of q and k (if there are weights), rotation, and keys and values into their slots.

    Args:
        q: [T, num_heads, head_dim]; k, v: [T, num_kv_heads, head_dim]; slices will do, if their heads are contiguous.
        rotation: cosines and sines, each [T, 1, head_dim], contiguous (`RotaryEmbedding`).
        slot_mapping: int64 [T].

    Returns:
        q, normed and rotated: [T, num_heads, head_dim].
    """
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    out = q.new_empty(q.shape)
    cos, sin = rotation
    _norm_rotate_write_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))](
        q, k, v, q_weight, k_weight, cos, sin, slot_mapping, out, k_cache, v_cache, eps,
        q.stride(0), k.stride(0), v.stride(0), cos.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HAS_NORM=q_weight is not None, HEADS=_HEADS,
        HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return out


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [1, K], weight [N, K], bias [N] or None, all contiguous -> x W^T + b [1, N].

    One token makes a product of a matrix and a vector, where reading the matrix is all the work.
    """
    num_rows, num_columns = weight.shape
    out = x.new_empty(1, num_rows)
    rows, tile, num_warps = (1, 1024, 8) if num_rows <= 2048 else (4, 512, 4)  # so that the whole device is reading
    _matvec_kernel[(triton.cdiv(num_rows, rows),)](
        x, weight, bias, out, num_rows, num_columns,
        HAS_BIAS=bias is not None, ROWS=rows, TILE=tile, num_warps=num_warps,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr, residual_ptr, weight_ptr, out_ptr, num_columns, eps, PADDED: tl.constexpr
    ):  # fmt: skip
        column = tl.arange(0, PADDED)
        mask = column < num_columns
        offset = tl.program_id(0).to(tl.int64) * num_columns + column
        total = tl.load(x_ptr + offset, mask=mask, other=0.0) + tl.load(residual_ptr + offset, mask=mask, other=0.0)
        tl.store(residual_ptr + offset, total, mask=mask)
        total = total.to(tl.float32)
        normed = total * tl.rsqrt(tl.sum(total * total, axis=0) / num_columns + eps)
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _silu_and_mul_kernel(x_ptr, out_ptr, num_columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = column < num_columns
        gate = tl.load(x_ptr + row * 2 * num_columns + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * 2 * num_columns + num_columns + column, mask=mask, other=0.0).to(tl.float32)
        result = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + row * num_columns + column, result.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
    def _norm_rotate_write_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slot_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
        eps, q_stride, k_stride, v_stride, rotation_stride,
        NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HAS_NORM: tl.constexpr, HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ):  # fmt: skip
        # A program takes some heads of one token, counted through q, k and v.
        token = tl.program_id(0).to(tl.int64)
        q_head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        k_head, v_head = q_head - NUM_HEADS, q_head - NUM_HEADS - NUM_KV_HEADS
        dim = tl.arange(0, PADDED_DIM)[None, :]
        partner = (dim + HEAD_DIM // 2) % HEAD_DIM  # the other coordinate of the pair that is rotated
        in_head = dim < HEAD_DIM
        is_q = in_head & (q_head < NUM_HEADS)
        is_k = in_head & (k_head >= 0) & (k_head < NUM_KV_HEADS)
        is_v = in_head & (v_head >= 0) & (v_head < NUM_KV_HEADS)

        q_row, k_row = q_ptr + token * q_stride + q_head * HEAD_DIM, k_ptr + token * k_stride + k_head * HEAD_DIM
        x = (tl.load(q_row + dim, mask=is_q, other=0.0) + tl.load(k_row + dim, mask=is_k, other=0.0)).to(tl.float32)
        swapped = tl.load(q_row + partner, mask=is_q, other=0.0) + tl.load(k_row + partner, mask=is_k, other=0.0)
        swapped = swapped.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
            q_weight, k_weight = tl.load(q_weight_ptr + dim, mask=in_head), tl.load(k_weight_ptr + dim, mask=in_head)
            x = x * scale * tl.where(is_q, q_weight, k_weight).to(tl.float32)
            q_weight = tl.load(q_weight_ptr + partner, mask=in_head)
            k_weight = tl.load(k_weight_ptr + partner, mask=in_head)
            swapped = swapped * scale * tl.where(is_q, q_weight, k_weight).to(tl.float32)
        cos = tl.load(cos_ptr + token * rotation_stride + dim, mask=in_head).to(tl.float32)
        sin = tl.load(sin_ptr + token * rotation_stride + dim, mask=in_head).to(tl.float32)
        rotated = (x * cos + swapped * sin).to(out_ptr.dtype.element_ty)

        slot = tl.load(slot_ptr + token)
        tl.store(out_ptr + (token * NUM_HEADS + q_head) * HEAD_DIM + dim, rotated, mask=is_q)
        tl.store(k_cache_ptr + (slot * NUM_KV_HEADS + k_head) * HEAD_DIM + dim, rotated, mask=is_k)
        value = tl.load(v_ptr + token * v_stride + v_head * HEAD_DIM + dim, mask=is_v)
        tl.store(v_cache_ptr + (slot * NUM_KV_HEADS + v_head) * HEAD_DIM + dim, value, mask=is_v)

    @triton.jit
    def _matvec_kernel(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, num_columns,
        HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_rows
        total = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, num_columns, TILE):
            column = start + tl.arange(0, TILE)
            mask = row_mask[:, None] & (column < num_columns)[None, :]
            weight = tl.load(
                weight_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :], mask=mask, other=0.0
            )
            x = tl.load(x_ptr + column, mask=column < num_columns, other=0.0)
            total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        result = tl.sum(total, axis=1)
        if HAS_BIAS:
            result += tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row_mask)
