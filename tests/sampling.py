"""The sampler on its own: rows of logits in, tokens out, with the history and parameters that a row needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .conftest import submodule


@dataclass
class Row:
    """One row of a batch: arguments of SamplingParams, and the sequence so far."""

    arguments: dict[str, Any]
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    eos_token_ids: tuple[int, ...] = ()


def sample_rows(stage: ModuleType, logits: torch.Tensor, rows: Sequence[Row]) -> Any:
    """What the stage's sampler says to logits [N, V] for N rows: `token_ids`, `logprobs`, `errors`."""
    seqs = [make_sequence(stage, row) for row in rows]
    return _run(stage, logits, seqs)


def draws(stage: ModuleType, logits: torch.Tensor, row: Row, num: int) -> torch.Tensor:
    """`num` tokens drawn from logits [V] for the same row with as many seeds, [num]."""
    seqs = []
    request = make_sequence(stage, row).request
    for seed in range(num):
        seq = stage.Sequence(f"0-{seed}", request, seed, seed)
        seq.token_ids.extend(row.output)
        seqs.append(seq)
    return torch.tensor(_run(stage, logits.expand(num, -1), seqs).token_ids)


def make_sequence(stage: ModuleType, row: Row) -> Any:
    params = stage.SamplingParams(**row.arguments)
    request = stage.Request(
        request_id="0",
        prompt=None,
        prompt_token_ids=row.prompt,
        sampling_params=params,
        max_tokens=1000,
        eos_token_ids=() if params.ignore_eos else row.eos_token_ids,
        arrival_time=0.0,
    )
    seq = stage.Sequence("0-0", request, 0, params.seed or 0)
    seq.token_ids.extend(row.output)
    return seq


def _run(stage: ModuleType, logits: torch.Tensor, seqs: list[Any]) -> Any:
    sampler = submodule(stage, "sample.sampler")
    metadata = sampler.SamplingMetadata.from_sequences(seqs, logits.shape[-1], logits.device)
    output = sampler.Sampler()(logits.clone(), metadata)
    logprobs = output.logprobs.tolists() if output.logprobs else None
    return SimpleNamespace(token_ids=output.token_ids.tolist(), logprobs=logprobs, errors=output.errors)


def says(token_ids: Sequence[int], num_prompt_tokens: int) -> Any:
    """A logits processor that makes any model say `token_ids`, and then the last of them for ever."""

    def processor(so_far: list[int], logits: torch.Tensor) -> torch.Tensor:
        index = min(len(so_far) - num_prompt_tokens, len(token_ids) - 1)
        forced = torch.full_like(logits, float("-inf"))
        forced[token_ids[index]] = 0.0
        return forced

    return processor
