"""Linear layers that know how to fill themselves from a checkpoint.

Checkpoints keep q, k and v (and gate and up) apart; one matrix product over all of them stacked is faster than three,
so MergedLinear holds the stack and each checkpoint tensor goes to its own rows. Models only ever use these classes,
so a layer may store its weight in another form without any model knowing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from . import fused
from .quantization import CHECKPOINT_TENSORS, QuantizationConfig, QuantizedWeight, build_weight


class Linear(nn.Module):
    """y = x W^T + b, with W of shape [out_features, in_features]. Parameters start uninitialised.

    Attributes:
        quantized: the weight, where a checkpoint holds it quantised and is loaded; there is no `weight` then.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.output_sizes = [out_features]
        self.offsets = [0, out_features]
        self.quant_config: QuantizationConfig | None = None
        self.quantized: QuantizedWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized is not None:
            return self.quantized(x, self.bias)
        if x.shape[0] == 1 and fused.is_available(x):
            return fused.matvec(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def weight_loader(self, name: str, loaded_weight: torch.Tensor, shard_id: int) -> None:
        """Copy a checkpoint tensor into the parameter `name`.

        Args:
            shard_id: which of the stacked matrices it is; 0 where nothing is stacked.

        Raises:
            ValueError: the shapes differ.
        """
        param, (start, stop) = self.get_parameter(name), self.offsets[shard_id : shard_id + 2]
        if self.quant_config is not None and name in CHECKPOINT_TENSORS:
            part = self.quant_config.select_shard(name, param, shard_id, start, stop)
        else:
            part = param[start:stop]
        copy_weight(part, loaded_weight)

    def create_quantized_weights(self, config: QuantizationConfig, scales_dtype: torch.dtype = torch.float16) -> None:
        """Make room for a quantised weight in place of `weight`.

        Its parameters are named and shaped as in a checkpoint, but that g_idx has a row for each stacked matrix.

        Raises:
            ValueError: a matrix of this shape cannot be packed so.
        """
        shapes = config.tensor_shapes(self.in_features, self.output_sizes, scales_dtype)
        device = self.weight.device
        del self.weight
        self.quant_config = config
        for name, (shape, dtype) in shapes.items():
            param = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, param)

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        """Put a quantised weight into the form that is computed with, in `dtype`; others stay as they are.

        Raises:
            ValueError: what was loaded makes no sense.
        """
        if self.quant_config is not None:
            tensors = {name: self.get_parameter(name).data for name in CHECKPOINT_TENSORS}
            for name in CHECKPOINT_TENSORS:
                delattr(self, name)
            self.quantized = build_weight(self.quant_config, tensors, dtype)


class MergedLinear(Linear):
    """Several linear layers over the same input as one product; the outputs stand side by side.

    Args:
        output_sizes: out_features of each, in the order in which they are stacked.
    """

    def __init__(self, in_features: int, output_sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__(in_features, sum(output_sizes), bias)
        self.output_sizes = list(output_sizes)
        self.offsets = [0, *accumulate(output_sizes)]


def copy_weight(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """Copy with conversion of dtype and device, and never with broadcasting.

    Raises:
        ValueError: the shapes differ, or one holds integers and the other does not.
    """
    if param.is_floating_point() != loaded_weight.is_floating_point():
        raise ValueError(f"is of {loaded_weight.dtype}, the model needs {param.dtype}")
    if param.shape != loaded_weight.shape:
        raise ValueError(f"has shape {list(loaded_weight.shape)}, the model needs {list(param.shape)}")
    param.copy_(loaded_weight)
