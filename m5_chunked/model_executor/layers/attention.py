"""Attention: everything that happens between the qkv projection and the output projection.

The model hands over flat q, k and v and gets flat context vectors back. Norms of q and k, rotation, and how keys and
values of earlier tokens are found are this layer's business alone.
"""

from __future__ import annotations

import torch
from torch import nn

from ...attention.backends.abstract import AttentionBackend
from ...attention.metadata import AttentionMetadata
from ...attention.ops import write_kv_cache
from . import fused
from .layernorm import RMSNorm
from .rotary_embedding import Rotation, rotate


class Attention(nn.Module):
    """Causal multi-head attention with grouped KV heads (GQA: Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        q_norm, k_norm: normalise every head before the rotation (Qwen3); None: no norm.

    Attributes:
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], given by the worker before the first forward.
        backend: computes attention over the cache, given by the worker too.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    backend: AttentionBackend

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(
        self, rotation: Rotation, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """rotation of T tokens, q [T, num_heads * head_dim], k and v [T, num_kv_heads * head_dim] -> like q."""
        q = q.view(-1, self.num_heads, self.head_dim)
        k = k.view(-1, self.num_kv_heads, self.head_dim)
        v = v.view(-1, self.num_kv_heads, self.head_dim)
        q = self._norm_rotate_write(rotation, q, k, v, metadata)
        return self.backend.forward(q, self.k_cache, self.v_cache, metadata, self.scale).flatten(1)

    def _norm_rotate_write(
        self, rotation: Rotation, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Keys and values go into the cache; q comes back, ready to be used."""
        if fused.is_available(q):
            norms: tuple[torch.Tensor | None, torch.Tensor | None, float] = None, None, 0.0
            if self.q_norm is not None and self.k_norm is not None:
                norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            return fused.norm_rotate_write(q, k, v, *norms, rotation, self.k_cache, self.v_cache, metadata.slot_mapping)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, k, rotation)
        write_kv_cache(k, v, self.k_cache, self.v_cache, metadata.slot_mapping)
        return q
