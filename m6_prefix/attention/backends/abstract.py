"""AttentionBackend: one way of computing attention over the cache, and what it can and cannot serve.

Keys and values of the step's own tokens are in the cache before a backend is called, so that it sees one kind of work
only: some queries for each sequence, and everything that is cached of it. Which backend is best depends on the
device, the dtype and what is installed; `select_backend` chooses, and says why.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..metadata import AttentionMetadata

logger = logging.getLogger(__name__)


class AttentionBackend(ABC):
    """Attributes:
    name: by which users ask for it.
    supports_cuda_graph: whether a decode step may be recorded: it launches the same kernels with the same arguments
        whatever the sequences' lengths are, and never waits for the device.
    """

    name: ClassVar[str]
    supports_cuda_graph: ClassVar[bool] = False

    @classmethod
    def preferred_block_size(cls, device: torch.device) -> int:
        """Slots that a block should have, unless the user asks for another number."""
        return 16

    @classmethod
    def unsupported_reason(cls, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        """Why it cannot serve these, and what would help; None if it can."""
        return None

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        """Causal attention of every sequence's new queries over everything cached of it, themselves included.

        Args:
            q: [T, num_heads, head_dim]; a slice will do, if its heads are contiguous.
            k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
            scale: what scores are multiplied by, usually head_dim ** -0.5.

        Returns:
            [T, num_heads, head_dim].
        """


def select_backend(
    name: str, dtype: torch.dtype, head_dim: int, block_size: int | None, device: torch.device
) -> AttentionBackend:
    """The backend of that name; "auto": the first of flash, paged and naive that can serve.

    Raises:
        ValueError: the backend that was asked for cannot serve; the message says why.
    """
    from .flash_attn import FlashAttentionBackend  # these import this module
    from .paged import PagedBackend
    from .torch_naive import NaiveBackend

    candidates: list[type[AttentionBackend]] = [FlashAttentionBackend, PagedBackend, NaiveBackend]
    reasons = {c.name: c.unsupported_reason(dtype, head_dim, device) for c in candidates}
    if name != "auto" and reasons[name] is not None:
        raise ValueError(f"attention_backend={name!r} cannot serve: {reasons[name]}; use 'auto', or change that")
    chosen = next(c for c in candidates if c.name == name or (name == "auto" and reasons[c.name] is None))
    passed_over = [f"{c.name} cannot: {reasons[c.name]}" for c in candidates[: candidates.index(chosen)]]
    logger.info("attention backend: %s", "; ".join([chosen.name, *passed_over] if name == "auto" else [name]))
    pages = FlashAttentionBackend.preferred_block_size(device)
    if chosen is FlashAttentionBackend and device.type == "cuda" and block_size is not None and block_size % pages:
        logger.info("flash-attn reads blocks of %d tokens where they are; of others, prompts read a copy", pages)
    return chosen()
