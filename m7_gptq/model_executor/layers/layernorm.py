"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), with the residual stream taken along."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn
from torch.nn import functional as F

from . import fused


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    A decoder layer adds to the residual stream and then normalises it, twice. Both are done here, on a GPU by one
    kernel.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(self, x, residual=None):  # type: ignore[no-untyped-def]
        """x: [..., hidden_size] -> the same; with a residual, which takes x in: (normed x + residual, x + residual)."""
        if residual is not None and fused.is_available(x):
            return fused.add_rms_norm(x, residual, self.weight, self.eps), residual
        if residual is not None:
            x = residual.add_(x)
        normed = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return normed if residual is None else (normed, x)
