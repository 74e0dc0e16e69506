"""GPTQ weights (Frantar et al. 2022, arXiv 2210.17323): the file format, and a linear layer's weight in four bits.

A matrix is stored as integer codes of 4 or 8 bits, and every group of inputs has a scale and a zero point for each
output: w = scale * (code - zero). A decode step of few tokens spends its time reading weights, so a quarter of the
bytes is up to a quarter of the time. What a checkpoint holds is packed for storage; after loading it is packed once
more, for the kernel that will read it, and the checkpoint's tensors are dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import quantized_matmul
from .quantized_matmul import BLOCK, MAX_COUNTED

# Of a quantised layer in a checkpoint; g_idx may be absent.
CHECKPOINT_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")
_FULL_WORD = 2**32


@dataclass(frozen=True)
class QuantizationConfig:
    """How the weights of a checkpoint are quantised; names are those of its config.json.

    Attributes:
        bits: of a code: 4 or 8.
        group_size: inputs that share a scale and a zero point; -1: all of them.
        desc_act: inputs were quantised in order of importance ("act-order"), so a group's inputs lie anywhere.
        sym: the zero point is the middle code everywhere.
        checkpoint_format: "gptq" holds zero points less one, "gptq_v2" the zero points.

    Raises:
        ValueError: a value that is not supported.
    """

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"weights of {self.bits!r} bits are not supported; supported are 4 and 8")
        if type(self.group_size) is not int or (self.group_size < 1 and self.group_size != -1):
            raise ValueError(f"group_size must be a positive integer, or -1 for all inputs; got {self.group_size!r}")
        for name in ("desc_act", "sym"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.checkpoint_format not in _FORMATS:
            raise ValueError(
                f"checkpoint_format {self.checkpoint_format!r} is not supported; supported are {', '.join(_FORMATS)}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: Path) -> QuantizationConfig:
        """From what the file `source` says; keys that are not known here are left alone.

        Raises:
            ValueError: another method than GPTQ, a key that is missing, or a value that is not supported.
        """
        if raw.get("quant_method") != "gptq":
            method = raw.get("quant_method")
            raise ValueError(f"{source}: quantised by {method!r}, which is not supported; supported is 'gptq'")
        if not {"bits", "group_size"} <= raw.keys():
            raise ValueError(f"{source}: the quantisation config lacks bits or group_size")
        try:
            return cls(**{field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` and other tools read it."""
        return {"quant_method": "gptq", **asdict(self)}

    @property
    def pack_factor(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size

    def default_g_idx(self, in_features: int) -> torch.Tensor:
        """int32 [K], the group of each input where they are in order."""
        return torch.arange(in_features, dtype=torch.int32) // (in_features // self.num_groups(in_features))

    def tensor_shapes(
        self, in_features: int, output_sizes: list[int], scales_dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """{name: (shape, dtype)} of a layer's tensors as they are loaded, the stacked matrices side by side.

        Raises:
            ValueError: a matrix of this shape cannot be packed so.
        """
        if self.group_size != -1 and in_features % self.group_size:
            raise ValueError(
                f"has {in_features} inputs, which groups of {self.group_size} do not divide; quantise it with a "
                "group_size that does, or with -1"
            )
        for size in (in_features, *output_sizes):
            if size % self.pack_factor:
                raise ValueError(f"has a side of {size}, which does not fill words of {self.pack_factor} codes")
        num_groups, out_features = self.num_groups(in_features), sum(output_sizes)
        return {
            "qweight": ((in_features // self.pack_factor, out_features), torch.int32),
            "qzeros": ((num_groups, out_features // self.pack_factor), torch.int32),
            "scales": ((num_groups, out_features), scales_dtype),
            "g_idx": ((len(output_sizes), in_features), torch.int32),
        }

    def select_shard(self, name: str, param: torch.Tensor, shard_id: int, start: int, stop: int) -> torch.Tensor:
        """Of one of `tensor_shapes`, the view that holds the stacked matrix of outputs `start` to `stop`."""
        if name == "g_idx":
            return param[shard_id]
        step = self.pack_factor if name == "qzeros" else 1
        return param[:, start // step : stop // step]

    def fill_dummy(self, name: str, param: torch.Tensor, generator: torch.Generator) -> None:
        """Random codes, and scales that make weights of standard deviation 0.02."""
        if name == "qweight":
            param.random_(-(_FULL_WORD // 2), _FULL_WORD // 2, generator=generator)
        elif name == "qzeros":
            zeros = torch.full((1, self.pack_factor), 2 ** (self.bits - 1))
            param.fill_(write_zeros(zeros, self).item())
        elif name == "scales":
            param.fill_(0.02 * 12**0.5 / 2**self.bits)
        else:
            param.copy_(self.default_g_idx(param.shape[1]))


# ------------------------------------------------------------------ the file format


def pack(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes of any integer type, 0 to 2**bits - 1 -> int32 words of 32 / bits along `dim` >= 0, the first code lowest.

    Raises:
        ValueError: the words would not be full.
    """
    pack_factor = 32 // bits
    if codes.shape[dim] % pack_factor:
        raise ValueError(f"{codes.shape[dim]} codes do not fill words of {pack_factor}")
    parts = codes.int().unflatten(dim, (-1, pack_factor)).movedim(dim + 1, -1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return _wrap((parts << shifts).sum(-1))


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words -> uint8 codes, `dim` longer by 32 / bits: the inverse of `pack`."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # the sign that a shift copies down is masked out
    return codes.to(torch.uint8).movedim(-1, dim + 1).flatten(dim, dim + 1)


def read_zeros(qzeros: torch.Tensor, config: QuantizationConfig) -> torch.Tensor:
    """A checkpoint's qzeros -> words that hold the zero points themselves, whatever the format."""
    return _wrap(qzeros.long() + _ones(config)) if config.checkpoint_format == "gptq" else qzeros


def write_zeros(zeros: torch.Tensor, config: QuantizationConfig) -> torch.Tensor:
    """Zero points [G, N] -> qzeros int32 [G, N / pack_factor] in the format of `config`."""
    words = pack(zeros, config.bits, dim=1)
    return _wrap(words.long() - _ones(config)) if config.checkpoint_format == "gptq" else words


def _ones(config: QuantizationConfig) -> int:
    """A one in every field: v1 files hold whole words less this, so that a zero point of 0 borrows from the next."""
    return sum(1 << shift for shift in range(0, 32, config.bits))


def _wrap(words: torch.Tensor) -> torch.Tensor:
    """int64 modulo 2**32 as int32."""
    return ((words + _FULL_WORD // 2) % _FULL_WORD - _FULL_WORD // 2).to(torch.int32)


# ------------------------------------------------------------------ what a layer holds


class QuantizedWeight(nn.Module, ABC):
    """A weight of shape [N, K] in the form that a kernel reads.

    Attributes:
        out_features, in_features: N and K.
        order: int64 [K], the inputs sorted by group; None: they are.
    """

    out_features: int
    in_features: int
    order: torch.Tensor | None

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [M, K] -> x W^T + b [M, N]."""
        if self.order is not None:
            x = x[:, self.order]
        return self.multiply(x, bias)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K], its inputs where the model has them."""
        weight = self.dequantize_sorted(dtype)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)

    @abstractmethod
    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` for inputs sorted by group."""

    @abstractmethod
    def dequantize_sorted(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K], inputs sorted by group."""


class PackedWeight(QuantizedWeight):
    """For the Triton kernels on CUDA; elsewhere the weight is unpacked every time, which is slow and exact.

    Attributes:
        qweight: int32 [blocks of 128 inputs, N, W], so that what a program reads in a step lies together. Field i of
            word j is the block's input i * W + j: neighbouring words then need neighbouring inputs.
        qzeros, scales: int32 [G, N / pack_factor] and [G, N], as the checkpoint has them, but for a v1 file's borrow.
        arrived: int32, programs of a product that have stored their part of a tile; zeros between products.
    """

    arrived: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None, bits: int
    ) -> None:
        super().__init__()
        self.bits = bits
        self.out_features, self.in_features = codes.shape
        blocks = F.pad(codes, (0, -self.in_features % BLOCK)).view(
            self.out_features, -1, 32 // bits, BLOCK * bits // 32
        )
        self.qweight = _frozen(pack(blocks, bits, dim=2).squeeze(2).transpose(0, 1).contiguous())
        self.qzeros, self.scales = _frozen(qzeros), _frozen(scales)
        self.order = None if order is None else _frozen(order)
        self.register_buffer("arrived", torch.zeros(MAX_COUNTED, dtype=torch.int32, device=codes.device))

    @property
    def group_size(self) -> int:
        """One group of all inputs reaches to the end of the last block."""
        num_groups = len(self.scales)
        return self.in_features // num_groups if num_groups > 1 else len(self.qweight) * BLOCK

    def has_kernels(self, dtype: torch.dtype) -> bool:
        """Whether products of few rows read the codes themselves; in float32 there are no tensor cores to use."""
        return dtype != torch.float32 and quantized_matmul.is_available(self.scales, self.group_size)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if 0 < len(x) <= quantized_matmul.MAX_ROWS and self.has_kernels(x.dtype):
            return quantized_matmul.matmul(x.contiguous(), self, bias)
        return F.linear(x, self.dequantize_sorted(x.dtype), bias)

    def dequantize_sorted(self, dtype: torch.dtype) -> torch.Tensor:
        if quantized_matmul.is_available(self.scales, self.group_size):
            return quantized_matmul.dequantize(self, dtype)
        fields = self.qweight.view(torch.uint8).unflatten(2, (-1, 4)).permute(1, 0, 3, 2)  # [N, blocks, bytes, words]
        if self.bits == 4:
            fields = torch.stack([fields & 15, fields >> 4], dim=3)  # [N, blocks, bytes, fields of a byte, words]
        codes = fields.flatten(1)[:, : self.in_features].unflatten(1, (len(self.scales), -1)).float()  # [N, G, group]
        zeros, scales = unpack(self.qzeros, self.bits, dim=1).float(), self.scales.float()
        return codes.sub_(zeros.T[..., None]).mul_(scales.T[..., None]).flatten(1).to(dtype)


class CPUInt4Weight(QuantizedWeight):
    """For torch's int4 kernel on CPUs, in bfloat16. The kernel wants w = scale * (code - 8) + shift, in bfloat16 both.

    Attributes:
        packed: uint8, in the kernel's own order.
        scales_and_shifts: bfloat16 [G, N, 2].
    """

    # Rows of x from which unpacking the weight and one ordinary product is faster than the kernel, which works row by
    # row: 3,072 x 1,024 on one core takes it 40 us a row, unpacking 1.7 ms, and the product 0.4 ms and 13 us a row.
    MAX_ROWS = 96
    GROUP_SIZES = (256, 128, 64, 32)

    def __init__(
        self, codes: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        group_size = self.in_features // len(scales)
        self.group_size = next(size for size in self.GROUP_SIZES if group_size % size == 0)
        shifts = (8 - unpack(qzeros, 4, dim=1).float()) * scales.float()
        pairs = torch.stack([scales.float(), shifts], dim=-1).to(torch.bfloat16)  # [G, N, 2]
        self.scales_and_shifts = _frozen(pairs.repeat_interleave(group_size // self.group_size, dim=0))
        self.packed = _frozen(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        self.order = None if order is None else _frozen(order)

    @classmethod
    def can_hold(cls, out_features: int, group_size: int, config: QuantizationConfig, dtype: torch.dtype) -> bool:
        """Whether the kernel takes it, and we can read it back."""
        if config.bits != 4 or dtype != torch.bfloat16 or all(group_size % size for size in cls.GROUP_SIZES):
            return False
        return _int4_block_rows() > 0 and out_features % _int4_block_rows() == 0

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) > self.MAX_ROWS:
            y = x @ self._dequantize_transposed()
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self.packed, self.group_size, self.scales_and_shifts
            )
        return y if bias is None else y + bias

    def dequantize_sorted(self, dtype: torch.dtype) -> torch.Tensor:
        return self._dequantize_transposed().T.to(dtype).contiguous()

    def _dequantize_transposed(self) -> torch.Tensor:
        """bfloat16 [K, N], group by group: what is handed from one operation to the next then stays in the cache."""
        codes = _unpack_int4(self.packed, self.in_features, _int4_block_rows()).view(
            -1, self.group_size, self.out_features
        )
        out = torch.empty(codes.shape, dtype=torch.bfloat16)
        scales, shifts = self.scales_and_shifts.float().movedim(-1, 0).contiguous()  # [G, N] each
        for group in range(len(codes)):
            out[group] = codes[group].float().sub_(8).mul_(scales[group]).add_(shifts[group])
        return out.view(self.in_features, self.out_features)


@cache
def _int4_block_rows() -> int:
    """Outputs that torch's int4 kernel packs together, which depends on the CPU; 0: in an order unknown to us."""
    codes = torch.randint(0, 16, (128, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for rows in (64, 32):
        if torch.equal(_unpack_int4(packed, 32, rows).T.int(), codes):
            return rows
    return 0


def _unpack_int4(packed: torch.Tensor, in_features: int, rows: int) -> torch.Tensor:
    """uint8 codes [K, N]. Of each input, a block's first half of outputs lies in low nibbles, the second in high."""
    blocks = packed.view(-1, in_features, 1, rows // 2)  # [N / rows, K, 1, bytes]
    codes = torch.cat([blocks & 15, blocks >> 4], dim=2)
    return codes.permute(1, 0, 2, 3).reshape(in_features, -1)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def build_weight(config: QuantizationConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> QuantizedWeight:
    """A layer's loaded tensors (`QuantizationConfig.tensor_shapes`) in the form that computes best in `dtype`.

    Raises:
        ValueError: g_idx makes no sense, or differs between matrices that are stacked.
    """
    qweight, qzeros, scales, g_idx = (tensors[name] for name in CHECKPOINT_TENSORS)
    if not (g_idx == g_idx[0]).all():
        raise ValueError("has another g_idx in each of its matrices, which are one product here; quantise it again")
    in_order = config.default_g_idx(g_idx.shape[1]).to(g_idx.device)
    sorted_g_idx, by_group = g_idx[0].sort(stable=True)
    order = None if torch.equal(g_idx[0], in_order) else by_group
    if not torch.equal(sorted_g_idx, in_order):
        raise ValueError("has a g_idx that does not put group_size inputs into each group; quantise it again")
    codes = unpack(qweight, config.bits, dim=0)  # [K, N]
    if order is not None:
        codes = codes[order]
    codes, qzeros = codes.T.contiguous(), read_zeros(qzeros, config)
    group_size = codes.shape[1] // len(scales)
    if codes.device.type == "cpu" and CPUInt4Weight.can_hold(len(codes), group_size, config, dtype):
        return CPUInt4Weight(codes, qzeros, scales, order)
    return PackedWeight(codes, qzeros, scales, order, config.bits)
