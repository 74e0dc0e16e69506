"""Penalties on tokens that have been used before.

The repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1) looks at prompt and output; presence and
frequency penalties (of OpenAI's API) look at the output alone.
"""

from __future__ import annotations

import torch


def apply_penalties(
    logits: torch.Tensor,
    prompt_counts: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Returns penalised logits.

    Args:
        logits: float32 [N, V].
        prompt_counts, output_counts: [N, V], how often each token occurs.
        presence, frequency, repetition: float32 [N].
    """
    factor = torch.where((prompt_counts + output_counts) > 0, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * output_counts - presence[:, None] * (output_counts > 0)


def count_tokens(token_ids: list[list[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """How often each token occurs in each of N lists: float32 [N, vocab_size]."""
    counts = torch.zeros(len(token_ids), vocab_size, device=device)
    for row, ids in zip(counts, token_ids, strict=True):
        if ids:
            index = torch.tensor(ids, device=device)
            row.scatter_add_(0, index, torch.ones_like(index, dtype=row.dtype))
    return counts
