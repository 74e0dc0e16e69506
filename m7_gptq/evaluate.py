"""Perplexity: how well a model foresees a text, by the engine's own forward passes.

A text is cut into windows, each of which the model reads from its first token to its last; the perplexity is e to the
mean surprise of all tokens that have a predecessor in their window. Only the whole windows' hidden states are needed,
so nothing goes through the scheduler, and the engine's cache stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from .attention.metadata import AttentionMetadata
from .model_executor.layers.attention import Attention
from .model_executor.models.llama import LlamaForCausalLM

BATCH_TOKENS = 4096  # of a forward pass
_LOGITS_ROWS = 512
_BLOCK_MULTIPLE = 256  # slots of a window: what all attention backends can read


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, token_ids: torch.Tensor, window: int) -> tuple[float, int]:
    """Of token_ids, int64 [T], cut into windows, of which the last may be shorter.

    Returns:
        Perplexity, at least 1, less is better; how many tokens were foreseen.

    Raises:
        ValueError: less than two tokens, or a window of less.
    """
    if window < 2:
        raise ValueError(f"a window of {window} tokens foresees nothing; it takes two at least")
    if len(token_ids) < 2:
        raise ValueError("a text of less than two tokens has no perplexity; give a longer one")
    surprise, num_tokens = 0.0, 0
    for ids in token_ids.to(next(model.parameters()).device).split(window):
        with window_metadata(model, 1, len(ids)) as (positions, metadata):
            hidden = model(ids, positions, metadata)
        for rows, wanted in zip(hidden[:-1].split(_LOGITS_ROWS), ids[1:].split(_LOGITS_ROWS), strict=True):
            surprise += F.cross_entropy(model.compute_logits(rows).float(), wanted, reduction="sum").item()
        num_tokens += len(ids) - 1
    return math.exp(surprise / num_tokens), num_tokens


@contextmanager
def window_metadata(
    model: LlamaForCausalLM, num_seqs: int, length: int
) -> Iterator[tuple[torch.Tensor, AttentionMetadata]]:
    """Positions and metadata of a pass over whole sequences of equal length, and room for their keys and values.

    One cache serves all layers: each writes keys and values of all tokens before it reads them. The layers get back
    what they had.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    weight = model.model.embed_tokens.weight
    block_size = -(-length // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE
    block = torch.arange(num_seqs, device=weight.device)
    position = torch.arange(length, device=weight.device)
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(0, num_seqs * length + 1, length, dtype=torch.int32, device=weight.device),
        seq_lens=torch.full((num_seqs,), length, dtype=torch.int32, device=weight.device),
        max_query_len=length,
        max_seq_len=length,
        slot_mapping=(block[:, None] * block_size + position).flatten(),
        block_table=block[:, None].int(),
        block_size=block_size,
    )
    shape = (num_seqs * block_size + 1, layers[0].num_kv_heads, layers[0].head_dim)
    k_cache, v_cache = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    before = [(layer.k_cache, layer.v_cache) for layer in layers]
    try:
        for layer in layers:
            layer.k_cache, layer.v_cache = k_cache, v_cache
        yield position.repeat(num_seqs), metadata
    finally:
        for layer, (k_cache, v_cache) in zip(layers, before, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache
