"""Products with a packed weight in Triton: unpack, scale and multiply in one pass, so that only codes are read.

Of one token the product is a matter of reading the weight, done with ordinary multiplications (`_matvec_kernel`); for
a few more, tensor cores multiply what was unpacked in registers (`_matmul_kernel`); for many, the weight is unpacked to
memory once (`_dequantize_kernel`) and torch's own product is best. How the weight lies in memory is described at
`quantization.py::PackedWeight`. Sums have a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .fused import is_available as has_triton

if TYPE_CHECKING:
    from .quantization import PackedWeight

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU does without
    triton = None

BLOCK = 128  # inputs whose codes lie together
MAX_ROWS = 64  # of x, above which unpacking first and an ordinary product are faster

# matvec: outputs a program computes, the most blocks that it reads at a time, and warps.
MATVEC_ROWS, MATVEC_BLOCKS, MATVEC_WARPS = 4, 32, 4
# matmul: outputs a program computes, words of each that it reads at a time, warps, and depth of the pipeline.
MATMUL_OUTPUTS, MATMUL_WORDS, MATMUL_WARPS, MATMUL_STAGES = 64, 64, 4, 3
# matmul: programs that keep a multiprocessor reading, and the most parts that a row of the weight is cut into.
MATMUL_PROGRAMS, MATMUL_MAX_SPLITS = 4, 16


def is_available(x: torch.Tensor, group_size: int) -> bool:
    """Whether kernels can run where `x` is, with groups of this size."""
    return has_triton(x) and group_size % 32 == 0 and (BLOCK % group_size == 0 or group_size % BLOCK == 0)


def matmul(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight of [N, K], bias [N] or None, x and bias contiguous -> x W^T + b [M, N]; meant for small M."""
    (num_rows, num_inputs), (num_outputs, num_groups) = x.shape, weight.scales.shape
    out = x.new_empty(num_rows, num_outputs)
    num_blocks = triton.cdiv(num_inputs, BLOCK)
    sizes = (num_outputs, num_inputs, num_blocks, num_groups)
    constants = group_constants(weight.group_size, weight.bits)
    packed = weight.qweight, weight.qzeros, weight.scales
    if num_rows == 1:
        rows = max(1, min(MATVEC_ROWS, num_outputs // 1024))  # so that the whole device is reading
        blocks = min(MATVEC_BLOCKS, triton.next_power_of_2(num_blocks))
        _matvec_kernel[(triton.cdiv(num_outputs, rows),)](
            x, *packed, bias, out, *sizes,
            HAS_BIAS=bias is not None, ROWS=rows, BLOCKS=blocks, num_warps=MATVEC_WARPS, **constants,
        )  # fmt: skip
        return out
    tile = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    blocks = MATMUL_WORDS // constants["WORDS"]
    num_tiles, num_row_tiles = triton.cdiv(num_outputs, MATMUL_OUTPUTS), triton.cdiv(num_rows, tile)
    num_steps = triton.cdiv(num_blocks, blocks)
    num_splits = choose_num_splits(num_tiles * num_row_tiles, num_steps, x.device)
    parts = x.new_empty(num_splits, num_rows, num_outputs, dtype=torch.float32) if num_splits > 1 else out
    _matmul_kernel[(num_tiles, num_row_tiles, num_splits)](
        x, *packed, bias, parts, num_rows, *sizes, triton.cdiv(num_steps, num_splits),
        HAS_BIAS=bias is not None and num_splits == 1, OUTPUTS=MATMUL_OUTPUTS, TILE=tile, BLOCKS=blocks,
        num_warps=MATMUL_WARPS, num_stages=MATMUL_STAGES, **constants,
    )  # fmt: skip
    if num_splits > 1:
        _sum_parts_kernel[(triton.cdiv(num_outputs, 256), num_rows)](
            parts, bias, out, num_rows, num_outputs, num_splits, HAS_BIAS=bias is not None, TILE=256, num_warps=4
        )
    return out


def choose_num_splits(num_programs: int, num_steps: int, device: torch.device) -> int:
    """Into how many parts a row of the weight is cut, so that programs fill the device; none of them is empty."""
    num_units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = min(MATMUL_MAX_SPLITS, num_steps, triton.cdiv(num_units * MATMUL_PROGRAMS, num_programs))
    return triton.cdiv(num_steps, triton.cdiv(num_steps, wanted))


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [N, K] of `dtype`: scale * (code - zero), rounded once."""
    num_outputs, num_inputs = weight.out_features, weight.in_features
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.scales.device)
    num_blocks = triton.cdiv(num_inputs, BLOCK)
    blocks = min(32, triton.next_power_of_2(num_blocks))
    _dequantize_kernel[(num_outputs, triton.cdiv(num_blocks, blocks))](
        weight.qweight, weight.qzeros, weight.scales, out, num_inputs, num_blocks, weight.scales.shape[1],
        BLOCKS=blocks, num_warps=4, **group_constants(weight.group_size, weight.bits),
    )  # fmt: skip
    return out


def group_constants(group_size: int, bits: int) -> dict[str, int]:
    """How fields, blocks and groups lie in one another: what all kernels are compiled for."""
    return {
        "BITS": bits,
        "WORDS": BLOCK * bits // 32,  # of a block
        "GROUPS": max(1, BLOCK // group_size),  # in a block
        "GROUP_BLOCKS": max(1, group_size // BLOCK),  # blocks in a group
    }


if triton is not None:

    @triton.jit
    def _load_scale_and_zero(  # type: ignore[no-untyped-def]
        scales_ptr, qzeros_ptr, row, group, mask, num_groups, BITS: tl.constexpr
    ):  # fmt: skip
        """Of outputs [R] and groups [B]: float32 [R, B] both."""
        scale = tl.load(scales_ptr + row[:, None] * num_groups + group[None, :], mask=mask, other=0.0)
        word = tl.load(qzeros_ptr + (row * BITS // 32)[:, None] * num_groups + group[None, :], mask=mask, other=0)
        zero = (word >> (row * BITS % 32)[:, None]) & (2**BITS - 1)
        return scale.to(tl.float32), zero.to(tl.float32)

    @triton.jit
    def _subtract_zero(words, zero, SHIFT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        # float32, code - zero: put into the mantissa of 2**23 a code is a float without a conversion, which is slow.
        field = ((words >> SHIFT) & (2**BITS - 1)) | 0x4B000000
        return field.to(tl.float32, bitcast=True) - (zero + 8388608.0)

    @triton.jit
    def _matvec_kernel(  # type: ignore[no-untyped-def]
        x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr, num_outputs, num_inputs, num_blocks, num_groups,
        HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # Put into the mantissa of 1.0, two fields of a word make floats with one shift: 1 + code / 2**n. The ones and
        # the zero points are taken off the sum at the end of a group, by way of the sum of x.
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        word = tl.arange(0, WORDS)
        total = tl.zeros([ROWS, BLOCKS], tl.float32)
        for start in range(0, num_blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            mask = (row < num_outputs)[:, None] & (block < num_blocks)[None, :]
            offset = row.to(tl.int64)[:, None] * (num_blocks * WORDS) + block[None, :] * WORDS
            words = tl.load(
                qweight_ptr + offset[:, :, None] + word[None, None, :], mask=mask[:, :, None], other=0
            )  # [ROWS, BLOCKS, WORDS]
            for part in tl.static_range(GROUPS):
                group = block * GROUPS + part if GROUPS > 1 else block // GROUP_BLOCKS
                scale, zero = _load_scale_and_zero(scales_ptr, qzeros_ptr, row, group, mask, num_groups, BITS)
                dot = tl.zeros([ROWS, BLOCKS, WORDS], tl.float32)
                sum_x = tl.zeros([BLOCKS, WORDS], tl.float32)
                sum_ones = tl.zeros([BLOCKS, WORDS], tl.float32)
                for i in tl.static_range(part * 32 // BITS // GROUPS, (part + 1) * 32 // BITS // GROUPS):
                    column = block[:, None] * (WORDS * 32 // BITS) + i * WORDS + word[None, :]
                    x = tl.load(x_ptr + column, mask=column < num_inputs, other=0.0).to(tl.float32)
                    scaled_x = x * 2 ** (8 - i * BITS % 8)
                    # The byte that holds the field goes to bits 15 to 22.
                    byte = words << (15 - i * BITS // 8 * 8) if i * BITS < 16 else words >> (i * BITS // 8 * 8 - 15)
                    field = (byte & ((2**BITS - 1) << (15 + i * BITS % 8))) | 0x3F800000
                    dot += field.to(tl.float32, bitcast=True) * scaled_x[None, :, :]
                    sum_x += x
                    sum_ones += scaled_x
                offset_x = tl.sum(sum_ones, axis=1)[None, :] + zero * tl.sum(sum_x, axis=1)[None, :]
                total += scale * (tl.sum(dot, axis=2) - offset_x)
        result = tl.sum(total, axis=1)
        if HAS_BIAS:
            result += tl.load(bias_ptr + row, mask=row < num_outputs, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row < num_outputs)

    @triton.jit
    def _matmul_kernel(  # type: ignore[no-untyped-def]
        x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr,
        num_rows, num_outputs, num_inputs, num_blocks, num_groups, num_steps,
        HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # The weight is the left operand: its outputs fill the tensor cores' rows whatever the size of the batch.
        # out_ptr: [num_splits, num_rows, num_outputs], a part of the sum for each program of axis 2.
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        row = tl.program_id(1) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, BLOCKS * WORDS)  # of the words that are read at a time
        first = tl.program_id(2) * num_steps
        total = tl.zeros([OUTPUTS, TILE], tl.float32)
        for step in range(first, first + num_steps):
            block = step * BLOCKS + tl.arange(0, BLOCKS)
            words_mask = (output < num_outputs)[:, None] & (step * BLOCKS + column // WORDS < num_blocks)[None, :]
            mask = (output < num_outputs)[:, None] & (block < num_blocks)[None, :]
            offset = output.to(tl.int64)[:, None] * (num_blocks * WORDS) + step * (BLOCKS * WORDS) + column[None, :]
            words = tl.load(qweight_ptr + offset, mask=words_mask, other=0)  # [OUTPUTS, BLOCKS * WORDS]
            first_input = (step * BLOCKS + column // WORDS) * (WORDS * 32 // BITS) + column % WORDS
            for part in tl.static_range(GROUPS):
                group = block * GROUPS + part if GROUPS > 1 else block // GROUP_BLOCKS
                scale, zero = _load_scale_and_zero(scales_ptr, qzeros_ptr, output, group, mask, num_groups, BITS)
                scale = tl.reshape(
                    tl.broadcast_to(scale[:, :, None], [OUTPUTS, BLOCKS, WORDS]), [OUTPUTS, BLOCKS * WORDS]
                )
                zero = tl.reshape(
                    tl.broadcast_to(zero[:, :, None], [OUTPUTS, BLOCKS, WORDS]), [OUTPUTS, BLOCKS * WORDS]
                )
                for i in tl.static_range(part * 32 // BITS // GROUPS, (part + 1) * 32 // BITS // GROUPS):
                    inputs = first_input + i * WORDS
                    x = tl.load(
                        x_ptr + row.to(tl.int64)[None, :] * num_inputs + inputs[:, None],
                        mask=(row < num_rows)[None, :] & (inputs < num_inputs)[:, None],
                        other=0.0,
                    )  # [BLOCKS * WORDS, TILE]
                    weight = (scale * _subtract_zero(words, zero, i * BITS, BITS)).to(x.dtype)
                    total = tl.dot(weight, x, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias_ptr + output, mask=output < num_outputs, other=0.0).to(tl.float32)[:, None]
        out_row = tl.program_id(2).to(tl.int64) * num_rows + row
        tl.store(
            out_ptr + out_row[None, :] * num_outputs + output[:, None],
            total.to(out_ptr.dtype.element_ty),
            mask=(row < num_rows)[None, :] & (output < num_outputs)[:, None],
        )

    @triton.jit
    def _sum_parts_kernel(  # type: ignore[no-untyped-def]
        parts_ptr, bias_ptr, out_ptr, num_rows, num_outputs, num_splits, HAS_BIAS: tl.constexpr, TILE: tl.constexpr
    ):  # fmt: skip
        output = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = tl.program_id(1).to(tl.int64)
        mask = output < num_outputs
        total = tl.zeros([TILE], tl.float32)
        for part in range(num_splits):
            total += tl.load(parts_ptr + (part * num_rows + row) * num_outputs + output, mask=mask, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * num_outputs + output, total.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        qweight_ptr, qzeros_ptr, scales_ptr, out_ptr, num_inputs, num_blocks, num_groups,
        BLOCKS: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) + tl.arange(0, 1)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        word = tl.arange(0, WORDS)
        mask = block < num_blocks
        offset = tl.program_id(0).to(tl.int64) * (num_blocks * WORDS) + block * WORDS
        words = tl.load(qweight_ptr + offset[:, None] + word[None, :], mask=mask[:, None], other=0)
        out_ptr += tl.program_id(0).to(tl.int64) * num_inputs
        for part in tl.static_range(GROUPS):
            group = block * GROUPS + part if GROUPS > 1 else block // GROUP_BLOCKS
            scale, zero = _load_scale_and_zero(scales_ptr, qzeros_ptr, row, group, mask[None, :], num_groups, BITS)
            scale, zero = tl.reshape(scale, [BLOCKS, 1]), tl.reshape(zero, [BLOCKS, 1])
            for i in tl.static_range(part * 32 // BITS // GROUPS, (part + 1) * 32 // BITS // GROUPS):
                column = block[:, None] * (WORDS * 32 // BITS) + i * WORDS + word[None, :]
                weight = (scale * _subtract_zero(words, zero, i * BITS, BITS)).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + column, weight, mask=mask[:, None] & (column < num_inputs))
