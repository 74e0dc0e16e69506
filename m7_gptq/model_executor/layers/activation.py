"""The gated activation of the feed-forward block (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import fused


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate | up]: [..., 2 * d] -> [..., d]."""
    if fused.is_available(x):
        return fused.silu_and_mul(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
