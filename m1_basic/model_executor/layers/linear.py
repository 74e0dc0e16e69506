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


class Linear(nn.Module):
    """y = x W^T + b, with W of shape [out_features, in_features]. Parameters start uninitialised."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.output_sizes = [out_features]
        self.offsets = [0, out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def weight_loader(self, name: str, loaded_weight: torch.Tensor, shard_id: int) -> None:
        """Copy a checkpoint tensor into the parameter `name`.

        Args:
            shard_id: which of the stacked matrices it is; 0 where nothing is stacked.

        Raises:
            ValueError: the shapes differ.
        """
        start, stop = self.offsets[shard_id : shard_id + 2]
        copy_weight(self.get_parameter(name)[start:stop], loaded_weight)


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
        ValueError: the shapes differ.
    """
    if param.shape != loaded_weight.shape:
        raise ValueError(f"has shape {list(loaded_weight.shape)}, the model needs {list(param.shape)}")
    param.copy_(loaded_weight)
