"""Penalties on tokens that have been used before.

The repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1) looks at prompt and output; presence and
frequency penalties (of OpenAI's API) look at the output alone.
"""

from __future__ import annotations

import torch

from ...request import Sequence


def apply_penalties(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """logits float32 [N, V] of these sequences -> penalised logits."""
    params = [seq.request.sampling_params for seq in seqs]
    columns = [(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params]
    presence, frequency, repetition = torch.tensor(columns, device=logits.device).T.unsqueeze(-1)  # each [N, 1]
    prompt_counts = count_tokens([seq.request.prompt_token_ids for seq in seqs], logits.shape[-1], logits.device)
    output_counts = count_tokens([seq.output_token_ids for seq in seqs], logits.shape[-1], logits.device)
    factor = torch.where(prompt_counts + output_counts > 0, repetition, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * output_counts - presence * (output_counts > 0)


def count_tokens(token_ids: list[list[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """How often each token occurs in each of N lists: float32 [N, vocab_size]."""
    counts = torch.zeros(len(token_ids), vocab_size, device=device)
    for row, ids in zip(counts, token_ids, strict=True):
        if ids:
            index = torch.tensor(ids, device=device)
            row.scatter_add_(0, index, torch.ones_like(index, dtype=row.dtype))
    return counts
