"""Products with a packed weight in Triton: unpack, scale and multiply in one pass, so that only codes are read.

A product with few tokens is a matter of reading the weight, if unpacking keeps up: at four bits 4 TB/s are 8 * 10**12
weights a second, for each of which the whole GPU has about four instructions. So codes become floats without a
conversion: they are put into the mantissa of a constant. One token and a small matrix take the ordinary cores
(`_matvec_kernel`: the shortest way from start to end), up to MAX_ROWS tokens the tensor cores (`_matmul_kernel`). For
many tokens the weight is unpacked to memory once (`_dequantize_kernel`) and torch's own product is best. How the weight
lies in memory is described at `quantization.py::PackedWeight`. Sums have a fixed order: the same inputs give the same
bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...utils.triton import tl, triton
from .fused import is_available as has_triton

if TYPE_CHECKING:
    from .quantization import PackedWeight

BLOCK = 128  # inputs whose codes lie together
MAX_ROWS = 128  # of x, above which unpacking first and an ordinary product are faster
MAX_MATVEC = 2**23  # weights, above which tensor cores are faster even for one row

OUTPUTS, MAX_TILE = 128, 64  # of the weight and rows of x that a program of `_matmul_kernel` multiplies, at most
RESIDENT = {8: 4, 16: 3, 32: 2, 64: 1}  # rows of a tile: programs that a multiprocessor is to have
MAX_COUNTED = 1024  # counters; only products of at most two tiles a multiprocessor are split, and no GPU has 512
FEW_SPLITS, MAX_SPLITS = 8, 16  # parts of a weight's row that cost little to add up, and the most there are


def is_available(x: torch.Tensor, group_size: int) -> bool:
    """Whether kernels can run where `x` is, with groups of this size."""
    return has_triton(x) and group_size % 32 == 0 and (BLOCK % group_size == 0 or group_size % BLOCK == 0)


def matmul(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight of [N, K], bias [N] or None, x and bias contiguous -> x W^T + b [M, N]; meant for small M.

    A weight takes part in one product at a time: programs count in its `arrived`.
    """
    (num_rows, num_inputs), num_blocks = x.shape, len(weight.qweight)
    num_groups, num_outputs = weight.scales.shape
    out = x.new_empty(num_rows, num_outputs)
    if num_rows == 1 and weight.num_weights <= MAX_MATVEC:
        num_warps = max(1, min(4, triton.next_power_of_2(num_blocks // 8)))
        _matvec_kernel[(triton.cdiv(num_outputs, 4),)](
            x, weight.qweight, weight.qzeros, weight.scales, bias, out,
            num_outputs, num_inputs, num_blocks, num_groups,
            HAS_BIAS=bias is not None, OUTPUTS=4, BLOCKS=8 * num_warps, num_warps=num_warps, **constants(weight),
        )  # fmt: skip
        return out
    num_tiles, tile = triton.cdiv(num_outputs, OUTPUTS), max(8, min(MAX_TILE, triton.next_power_of_2(num_rows)))
    num_row_tiles = triton.cdiv(num_rows, tile)
    num_splits = choose_num_splits(num_tiles * num_row_tiles, num_blocks, RESIDENT[tile], x.device)
    parts = x.new_empty(num_splits, num_rows, num_outputs, dtype=torch.float32) if num_splits > 1 else out
    _matmul_kernel[(num_tiles, num_row_tiles, num_splits)](
        x, weight.qweight, weight.qzeros, weight.scales, bias, out, parts, weight.arrived,
        num_rows, num_outputs, num_inputs, num_blocks, num_groups, triton.cdiv(num_blocks, num_splits), num_splits,
        HAS_BIAS=bias is not None, IS_SPLIT=num_splits > 1, OUTPUTS=OUTPUTS, TILE=tile,
        HALVES=x.is_cuda and weight.bits == 4 and x.dtype != torch.float32,  # the interpreter knows no PTX
        num_stages=2 if tile == 8 else 3, **constants(weight),
    )  # fmt: skip
    return out


def choose_num_splits(num_programs: int, num_blocks: int, num_resident: int, device: torch.device) -> int:
    """Into how many parts a row of the weight is cut, so that programs fill the device; none of them is empty.

    Args:
        num_programs: without splits.
        num_resident: programs that a multiprocessor is to have; two will do where that takes more than FEW_SPLITS.
    """
    num_units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    enough = max(FEW_SPLITS, min(MAX_SPLITS, num_units * 2 // num_programs))
    wanted = max(1, min(enough, num_blocks, num_units * num_resident // num_programs))
    return triton.cdiv(num_blocks, triton.cdiv(num_blocks, wanted))


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [N, K] of `dtype`: scale * (code - zero), rounded once."""
    num_outputs, num_inputs = weight.out_features, weight.in_features
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.scales.device)
    _dequantize_kernel[(triton.cdiv(num_outputs, 32), len(weight.qweight))](
        weight.qweight, weight.qzeros, weight.scales, out, num_outputs, num_inputs, len(weight.scales),
        OUTPUTS=32, **constants(weight),
    )  # fmt: skip
    return out


def constants(weight: PackedWeight) -> dict[str, int]:
    """How fields, blocks and groups lie in one another: what all kernels are compiled for."""
    return {
        "BITS": weight.bits,
        "WORDS": BLOCK * weight.bits // 32,  # of a block
        "GROUPS": max(1, BLOCK // weight.group_size),  # in a block: whole fields, 16 or 32 inputs each
        "GROUP_BLOCKS": max(1, weight.group_size // BLOCK),  # blocks in a group; this or GROUPS is 1
    }


if triton is not None:

    @triton.jit
    def _load_grid(  # type: ignore[no-untyped-def]
        scales_ptr, qzeros_ptr, output, group, mask, num_outputs, BITS: tl.constexpr
    ):  # fmt: skip
        """Scales and zero points, float32, of outputs and groups that broadcast."""
        offset = group * num_outputs + output
        scale = tl.load(scales_ptr + offset, mask=mask, other=0.0)
        word = tl.load(qzeros_ptr + offset * BITS // 32, mask=mask, other=0)
        zero = (word >> output * BITS % 32) & (2**BITS - 1)
        return scale.to(tl.float32), zero.to(tl.float32)

    @triton.jit(do_not_specialize=["num_blocks", "num_groups"])
    def _matvec_kernel(  # type: ignore[no-untyped-def]
        x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr, num_outputs, num_inputs, num_blocks, num_groups,
        HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # Blocks come first among the dimensions: a thread then has the same inputs of several outputs.
        FIELDS: tl.constexpr = 32 // BITS
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        word = tl.arange(0, WORDS)
        is_output = (output < num_outputs)[None, :]
        total = tl.zeros([BLOCKS, OUTPUTS, WORDS], tl.float32)
        for first in range(0, num_blocks, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            mask = is_output & (block < num_blocks)[:, None]
            row = block.to(tl.int64)[:, None] * num_outputs + output[None, :]
            words = tl.load(qweight_ptr + row[:, :, None] * WORDS + word, mask=mask[:, :, None], other=0)
            for part in tl.static_range(GROUPS):
                group = tl.minimum((block * GROUPS + part) // GROUP_BLOCKS, num_groups - 1)[:, None]
                scale, zero = _load_grid(scales_ptr, qzeros_ptr, output[None, :], group, mask, num_outputs, BITS)
                dot = tl.zeros([BLOCKS, OUTPUTS, WORDS], tl.float32)
                for field in tl.static_range(part * FIELDS // GROUPS, (part + 1) * FIELDS // GROUPS):
                    column = block[:, None] * (WORDS * FIELDS) + field * WORDS + word
                    x = tl.load(x_ptr + column, mask=column < num_inputs, other=0.0).to(tl.float32)
                    # A float of 2 ** (23 - s) has its unit at bit s, where the field begins: no shift is needed.
                    bits = (words >> (field * BITS // 16 * 16)) & ((2**BITS - 1) << (field * BITS % 16))
                    code = (bits | ((150 - field * BITS % 16) << 23)).to(tl.float32, bitcast=True)
                    dot += (code - (zero + 2 ** (23 - field * BITS % 16))[:, :, None]) * x[:, None, :]
                total += scale[:, :, None] * dot
        result = tl.sum(tl.sum(total, axis=2), axis=0)
        if HAS_BIAS:
            result += tl.load(bias_ptr + output, mask=output < num_outputs, other=0.0).to(tl.float32)
        tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < num_outputs)

    # Of two words, each pair of fields as two halves of a register, in the mantissas of 128 (bfloat16) or 1024
    # (float16); what was added is taken off with the zero point.
    _UNPACK = "{ .reg .b32 pair, high;" + "".join(
        f"prmt.b32 pair, $8, $9, {0x0400 + 0x0101 * byte}; shr.u32 high, pair, 4;"
        f"lop3.b32 ${2 * byte}, pair, 0x000f000f, MAGIC, 0xea; lop3.b32 ${2 * byte + 1}, high, 0x000f000f, MAGIC, 0xea;"
        for byte in range(4)
    ) + "}"  # fmt: skip
    _UNPACK_BF16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x43004300"))
    _UNPACK_FP16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x64006400"))

    @triton.jit
    def _unpack(words, dtype: tl.constexpr, HALVES: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The fields of words, each a tensor of `dtype`; with HALVES larger by 128 (bfloat16) or 1024 (float16)."""
        if HALVES and dtype == tl.bfloat16:
            fields = tl.inline_asm_elementwise(
                _UNPACK_BF16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], (tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        elif HALVES:
            fields = tl.inline_asm_elementwise(
                _UNPACK_FP16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], (tl.float16,) * 8, is_pure=True, pack=2
            )
        else:
            fields = ()
            for field in tl.static_range(32 // BITS):
                fields += ((words >> field * BITS & (2**BITS - 1)).to(dtype),)
        return fields

    @triton.jit
    def _join(fields, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Tensors [R, W] -> [R, 32 / BITS * W]: all first fields, then all second ones, and so on."""
        # In pairs, so that each bit of a field's number becomes a dimension: field 6, 110, is at [:, :, 1, 1, 0].
        if BITS == 4:
            f0, f1, f2, f3, f4, f5, f6, f7 = fields
            even, odd = tl.join(tl.join(f0, f4), tl.join(f2, f6)), tl.join(tl.join(f1, f5), tl.join(f3, f7))
            joined = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
        else:
            f0, f1, f2, f3 = fields
            joined = tl.permute(tl.join(tl.join(f0, f2), tl.join(f1, f3)), (0, 2, 3, 1))
        return tl.reshape(joined, [f0.shape[0], f0.shape[1] * (32 // BITS)])

    @triton.jit
    def _scale(  # type: ignore[no-untyped-def]
        fields, offset, scales_ptr, qzeros_ptr, output, block, mask, num_outputs, num_groups,
        BITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """scale * (field - offset - zero) for the fields of a block, in their dtype."""
        scaled = ()
        for field in tl.static_range(32 // BITS):
            if field * GROUPS % (32 // BITS) == 0:  # another group begins
                group = tl.minimum((block * GROUPS + field * GROUPS * BITS // 32) // GROUP_BLOCKS, num_groups - 1)
                scale, zero = _load_grid(scales_ptr, qzeros_ptr, output, group, mask, num_outputs, BITS)
            code = fields[field] - (zero + offset).to(fields[field].dtype)[:, None]
            scaled += (scale.to(code.dtype)[:, None] * code,)  # type: ignore[assignment]
        return scaled

    # Sizes are no constants, but for the alignment of rows: each kind of them would be compiled anew.
    @triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_groups", "num_steps", "num_splits"])
    def _matmul_kernel(  # type: ignore[no-untyped-def]
        x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr, parts_ptr, arrived_ptr,
        num_rows, num_outputs, num_inputs, num_blocks, num_groups, num_steps, num_splits,
        HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr, HALVES: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # The weight is the left operand: its outputs fill the tensor cores' rows whatever the size of the batch.
        FIELDS: tl.constexpr = 32 // BITS
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        offset = (128.0 if dtype == tl.bfloat16 else 1024.0) if HALVES else 0.0
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        row = tl.program_id(1) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, WORDS * FIELDS)
        is_output = output < num_outputs
        block_words = num_outputs.to(tl.int64) * WORDS
        words_ptr = qweight_ptr + output[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        x_row_ptr = x_ptr + row.to(tl.int64)[None, :] * num_inputs
        first = tl.program_id(2) * num_steps
        scale, zero = _load_grid(
            scales_ptr, qzeros_ptr, output, first * GROUPS // GROUP_BLOCKS, is_output, num_outputs, BITS
        )
        total = tl.zeros([OUTPUTS, TILE], tl.float32)
        for block in range(first, tl.minimum(first + num_steps, num_blocks)):
            words = tl.load(words_ptr + block * block_words, mask=is_output[:, None], other=0)
            inputs = block * (WORDS * FIELDS) + column
            mask = (inputs < num_inputs)[:, None] & (row < num_rows)[None, :]
            x = tl.load(x_row_ptr + inputs[:, None], mask=mask, other=0.0)  # [INPUTS, TILE]
            fields = _unpack(words, dtype, HALVES, BITS)
            if GROUPS == 1:  # the scale is that of all products here, and may wait for their sum
                # Those of the next step, so that this one need not wait for them.
                group = tl.minimum((block + 1) // GROUP_BLOCKS, num_groups - 1)
                next_scale, next_zero = _load_grid(scales_ptr, qzeros_ptr, output, group, is_output, num_outputs, BITS)
                weight = _join(fields, BITS) - (zero + offset).to(dtype)[:, None]  # [OUTPUTS, INPUTS]
                total += scale[:, None] * tl.dot(weight, x, input_precision="ieee")
                scale, zero = next_scale, next_zero
            else:
                scaled = _scale(
                    fields, offset, scales_ptr, qzeros_ptr, output, block, is_output, num_outputs, num_groups,
                    BITS, GROUPS, GROUP_BLOCKS,
                )  # fmt: skip
                total += tl.dot(_join(scaled, BITS), x, input_precision="ieee")
        mask = (row < num_rows)[None, :] & is_output[:, None]
        place = row.to(tl.int64)[None, :] * num_outputs + output[:, None]
        is_last = True
        if IS_SPLIT:  # who comes last adds up the parts of all, in their order
            part_size = num_rows.to(tl.int64) * num_outputs
            tl.store(parts_ptr + tl.program_id(2) * part_size + place, total, mask=mask)
            tl.debug_barrier()  # all threads have stored before one of them says so
            arrived_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_splits - 1
            if is_last:
                total = tl.zeros([OUTPUTS, TILE], tl.float32)
                for part in tl.range(0, num_splits, loop_unroll_factor=64 // TILE):  # several loads at once
                    total += tl.load(parts_ptr + part * part_size + place, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(arrived_ptr, 0)  # for the next product
        if is_last:
            if HAS_BIAS:
                total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        qweight_ptr, qzeros_ptr, scales_ptr, out_ptr, num_outputs, num_inputs, num_groups, OUTPUTS: tl.constexpr,
        BITS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        FIELDS: tl.constexpr = 32 // BITS
        output, block = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1)
        is_output = output < num_outputs
        row = block.to(tl.int64) * num_outputs + output
        words = tl.load(qweight_ptr + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :], mask=is_output[:, None])
        scaled = _scale(
            _unpack(words, tl.float32, False, BITS), 0.0, scales_ptr, qzeros_ptr, output, block, is_output,
            num_outputs, num_groups, BITS, GROUPS, GROUP_BLOCKS,
        )  # fmt: skip
        column = block * (WORDS * FIELDS) + tl.arange(0, WORDS * FIELDS)
        tl.store(
            out_ptr + output.to(tl.int64)[:, None] * num_inputs + column[None, :],
            _join(scaled, BITS).to(out_ptr.dtype.element_ty),
            mask=is_output[:, None] & (column < num_inputs)[None, :],
        )
