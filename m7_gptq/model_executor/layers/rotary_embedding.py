"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): a position is a rotation of pairs of coordinates.

The cosines and sines of every position are computed once, when the model is built. Checkpoints pair coordinate i with
i + head_dim / 2 ("rotate half"), and so do we. Looking up is the model's part, once a forward pass; rotating is every
layer's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

Rotation = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding(nn.Module):
    """The rotation of every position.

    Args:
        max_position: positions 0 … max_position - 1 have an angle.
        rope_parameters: `rope_type` ("default" or "llama3"), `rope_theta`, and what the type needs.

    Raises:
        ValueError: a rope type that is not known here.
    """

    def __init__(self, head_dim: int, max_position: int, rope_parameters: dict[str, Any]) -> None:
        super().__init__()
        # The model is built on the meta device; this table is no parameter, so it is computed for real at once.
        with torch.device("cpu"):
            angles = torch.outer(torch.arange(max_position).float(), inverse_frequencies(head_dim, rope_parameters))
            cos, sin = angles.cos(), angles.sin()  # [max_position, head_dim / 2]
            # Laid out for whole heads: (x1, x2) * (cos, cos) + (x2, x1) * (-sin, sin) rotates every pair (x1, x2).
            cos_sin = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
        self.register_buffer("cos_sin", cos_sin.to(torch.get_default_dtype()), persistent=False)
        self.cos_sin: torch.Tensor

    def forward(self, positions: torch.Tensor) -> Rotation:
        """positions [T] -> cosines and sines, each [T, 1, head_dim]."""
        cos, sin = self.cos_sin[:, positions].unsqueeze(2)
        return cos, sin


def rotate(q: torch.Tensor, k: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, num_heads, head_dim], k [T, num_kv_heads, head_dim] -> the same, each token by its own rotation."""
    cos, sin = rotation
    heads = torch.cat([q, k], dim=1)  # both in one go
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    q, k = torch.addcmul(heads * cos, swapped, sin).split([q.shape[1], k.shape[1]], dim=1)
    return q, k


def inverse_frequencies(head_dim: int, rope_parameters: dict[str, Any]) -> torch.Tensor:
    """Radians per position for each of the head_dim / 2 pairs, float32.

    "llama3" (Llama 3.1 model card and reference code) slows down the low frequencies by `factor` so that a model
    trained on `original_max_position_embeddings` reaches further, leaves the high ones alone, and blends in between.
    """
    rope_type = rope_parameters["rope_type"]
    inv_freq = 1.0 / rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope_type == "default":
        return inv_freq
    if rope_type != "llama3":
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported are 'default' and 'llama3'")
    turns = rope_parameters["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: as it was
    return (1 - keep) * inv_freq / rope_parameters["factor"] + keep * inv_freq
