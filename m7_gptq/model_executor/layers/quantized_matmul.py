"""Products with a packed weight in Triton: unpack, multiply and scale in one pass, so that only codes are read.

A product with few tokens is a matter of reading the weight, if unpacking keeps up: at four bits 4 TB/s are 8 * 10**12
weights a second, for each of which a multiprocessor has three instructions and a half. So codes become floats without a
conversion, two at a time, in the registers that tensor cores read them from, and their scale is applied to sums. For
many tokens the weight is unpacked to memory once (`_dequantize_kernel`) and torch's own product is best. How the weight
lies in memory is described at `quantization.py::PackedWeight`. Sums have a fixed order: the same inputs give the same
bits.
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
MAX_ROWS = 128  # of x, above which unpacking first and an ordinary product are faster

# Outputs a program computes, its warps, and the depth of its pipeline.
OUTPUTS, WARPS, STAGES = 128, 4, 3
# Programs that keep a multiprocessor reading, and the most parts that a row of the weight is cut into.
PROGRAMS, MAX_SPLITS = 2, 16


def is_available(x: torch.Tensor, group_size: int) -> bool:
    """Whether kernels can run where `x` is, with groups of this size."""
    return has_triton(x) and group_size % 32 == 0 and (BLOCK % group_size == 0 or group_size % BLOCK == 0)


def matmul(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight of [N, K], bias [N] or None, x and bias contiguous -> x W^T + b [M, N]; meant for small M."""
    (num_rows, num_inputs), (num_outputs, num_groups) = x.shape, weight.scales.shape
    out = x.new_empty(num_rows, num_outputs)
    num_blocks, num_tiles = triton.cdiv(num_inputs, BLOCK), triton.cdiv(num_outputs, OUTPUTS)
    tile = max(16, min(64, triton.next_power_of_2(num_rows)))
    num_row_tiles = triton.cdiv(num_rows, tile)
    num_splits = choose_num_splits(num_tiles * num_row_tiles, num_blocks, x.device)
    parts = x.new_empty(num_splits, num_rows, num_outputs, dtype=torch.float32) if num_splits > 1 else out
    _matmul_kernel[(num_tiles, num_row_tiles, num_splits)](
        x, weight.qweight, weight.qzeros, weight.scales, bias, parts,
        num_rows, num_outputs, num_inputs, num_blocks, num_groups, triton.cdiv(num_blocks, num_splits),
        HAS_BIAS=bias is not None and num_splits == 1, OUTPUTS=OUTPUTS, TILE=tile,
        HALVES=x.is_cuda and weight.bits == 4 and x.dtype != torch.float32,  # the interpreter knows no PTX
        num_warps=WARPS, num_stages=STAGES, **group_constants(weight.group_size, weight.bits),
    )  # fmt: skip
    if num_splits > 1:
        _sum_parts_kernel[(triton.cdiv(num_outputs, 256), num_rows)](
            parts, bias, out, num_rows, num_outputs, num_splits, HAS_BIAS=bias is not None, TILE=256, num_warps=4
        )
    return out


def choose_num_splits(num_programs: int, num_blocks: int, device: torch.device) -> int:
    """Into how many parts a row of the weight is cut, so that programs fill the device; none of them is empty."""
    num_units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = min(MAX_SPLITS, num_blocks, triton.cdiv(num_units * PROGRAMS, num_programs))
    return triton.cdiv(num_blocks, triton.cdiv(num_blocks, wanted))


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
        scales_ptr, qzeros_ptr, output, group, mask, num_groups, BITS: tl.constexpr
    ):  # fmt: skip
        """Of outputs and groups that broadcast: float32 both."""
        scale = tl.load(scales_ptr + output * num_groups + group, mask=mask, other=0.0)
        word = tl.load(qzeros_ptr + output * BITS // 32 * num_groups + group, mask=mask, other=0)
        zero = (word >> output * BITS % 32) & (2**BITS - 1)
        return scale.to(tl.float32), zero.to(tl.float32)

    @triton.jit
    def _subtract_zero(words, zero, SHIFT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        # float32, code - zero: put into the mantissa of 2**23 a code is a float without a conversion, which is slow.
        field = ((words >> SHIFT) & (2**BITS - 1)) | 0x4B000000
        return field.to(tl.float32, bitcast=True) - (zero + 8388608.0)

    # Of two words, each pair of fields as two halves of a register. Put into the mantissa of 128 (bfloat16) or 1024
    # (float16), a code is a float without a conversion; what it was added to is taken off with the zero point.
    _UNPACK = "{ .reg .b32 pair, high;" + "".join(
        f"prmt.b32 pair, $8, $9, {0x0400 + 0x0101 * byte}; shr.u32 high, pair, 4;"
        f"lop3.b32 ${2 * byte}, pair, 0x000f000f, MAGIC, 0xea; lop3.b32 ${2 * byte + 1}, high, 0x000f000f, MAGIC, 0xea;"
        for byte in range(4)
    ) + "}"  # fmt: skip
    _UNPACK_BF16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x43004300"))
    _UNPACK_FP16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x64006400"))

    @triton.jit
    def _unpack(words, dtype: tl.constexpr, HALVES: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Words [R, W] -> codes [R, W * 32 / BITS] of `dtype`: all first fields, then all second ones, and so on."""
        if HALVES:
            f0, f1, f2, f3, f4, f5, f6, f7 = tl.inline_asm_elementwise(
                _UNPACK_BF16 if dtype == tl.bfloat16 else _UNPACK_FP16,
                "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], (tl.int16,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
        elif BITS == 4:
            f0, f1, f2, f3 = words & 15, words >> 4 & 15, words >> 8 & 15, words >> 12 & 15
            f4, f5, f6, f7 = words >> 16 & 15, words >> 20 & 15, words >> 24 & 15, words >> 28 & 15
        else:
            f0, f1, f2, f3 = words & 255, words >> 8 & 255, words >> 16 & 255, words >> 24 & 255
        # The bits of a field's number become dimensions before that of the words.
        if BITS == 4:
            even, odd = tl.join(tl.join(f0, f4), tl.join(f2, f6)), tl.join(tl.join(f1, f5), tl.join(f3, f7))
            fields = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
        else:
            fields = tl.permute(tl.join(tl.join(f0, f2), tl.join(f1, f3)), (0, 2, 3, 1))
        return tl.reshape(fields, [words.shape[0], words.shape[1] * (32 // BITS)]).to(dtype, bitcast=HALVES)

    # Sizes are no constants, but for the alignment of x's rows: each kind of them would be compiled anew.
    @triton.jit(do_not_specialize=["num_rows", "num_outputs", "num_blocks", "num_groups", "num_steps"])
    def _matmul_kernel(  # type: ignore[no-untyped-def]
        x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr,
        num_rows, num_outputs, num_inputs, num_blocks, num_groups, num_steps,
        HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr, HALVES: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # The weight is the left operand: its outputs fill the tensor cores' rows whatever the size of the batch.
        # out_ptr: [num_splits, num_rows, num_outputs], a part of the sum for each program of axis 2.
        INPUTS: tl.constexpr = WORDS * 32 // BITS  # of a block
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        row = tl.program_id(1) * TILE + tl.arange(0, TILE)
        word, column = tl.arange(0, WORDS), tl.arange(0, INPUTS)
        is_output = output < num_outputs
        words_ptr = qweight_ptr + output.to(tl.int64)[:, None] * (num_blocks * WORDS) + word[None, :]
        x_row_ptr = x_ptr + row.to(tl.int64)[None, :] * num_inputs
        first = tl.program_id(2) * num_steps
        scale, zero = _load_scale_and_zero(
            scales_ptr, qzeros_ptr, output, first * GROUPS // GROUP_BLOCKS, is_output, num_groups, BITS
        )
        offset = (128.0 if x_ptr.dtype.element_ty == tl.bfloat16 else 1024.0) if HALVES else 0.0
        total = tl.zeros([OUTPUTS, TILE], tl.float32)
        for block in range(first, tl.minimum(first + num_steps, num_blocks)):
            words = tl.load(words_ptr + block * WORDS, mask=is_output[:, None], other=0)
            codes = _unpack(words, x_ptr.dtype.element_ty, HALVES, BITS)  # [OUTPUTS, INPUTS]
            inputs = block * INPUTS + column
            mask = (inputs < num_inputs)[:, None] & (row < num_rows)[None, :]
            x = tl.load(x_row_ptr + inputs[:, None], mask=mask, other=0.0)  # [INPUTS, TILE]
            for part in tl.static_range(GROUPS):
                # Those of the next step, so that this one need not wait for them.
                group = tl.minimum((block * GROUPS + part + 1) // GROUP_BLOCKS, num_groups - 1)
                next_scale, next_zero = _load_scale_and_zero(
                    scales_ptr, qzeros_ptr, output, group, is_output, num_groups, BITS
                )
                weight = codes - (zero + offset).to(codes.dtype)[:, None]
                if GROUPS > 1:
                    weight = tl.where((column // (INPUTS // GROUPS) == part)[None, :], weight, 0.0)
                total += scale[:, None] * tl.dot(weight, x, input_precision="ieee")
                scale, zero = next_scale, next_zero
        if HAS_BIAS:
            total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
        out_row = tl.program_id(2).to(tl.int64) * num_rows + row
        tl.store(
            out_ptr + out_row[None, :] * num_outputs + output[:, None],
            total.to(out_ptr.dtype.element_ty),
            mask=(row < num_rows)[None, :] & is_output[:, None],
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
            group = tl.minimum((block * GROUPS + part) // GROUP_BLOCKS, num_groups - 1)
            scale, zero = _load_scale_and_zero(
                scales_ptr, qzeros_ptr, row[:, None], group[None, :], mask[None, :], num_groups, BITS
            )
            scale, zero = tl.reshape(scale, [BLOCKS, 1]), tl.reshape(zero, [BLOCKS, 1])
            for i in tl.static_range(part * 32 // BITS // GROUPS, (part + 1) * 32 // BITS // GROUPS):
                column = block[:, None] * (WORDS * 32 // BITS) + i * WORDS + word[None, :]
                weight = (scale * _subtract_zero(words, zero, i * BITS, BITS)).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + column, weight, mask=mask[:, None] & (column < num_inputs))
