"""What a request does to its logits before anything else: biases, tokens it may not use yet, functions of its own.

Every function here is given the rows that use it, (row, sequence), so that the others cost nothing.
"""

from __future__ import annotations

import torch

from ..request import Sequence

Rows = list[tuple[int, Sequence]]


def apply_logit_bias(logits: torch.Tensor, rows: Rows) -> None:
    """Add every sequence's `logit_bias` to its row of logits [N, V], in place."""
    for row, seq in rows:
        bias = seq.request.sampling_params.logit_bias or {}
        index = torch.tensor(list(bias), device=logits.device)
        logits[row, index] += torch.tensor(list(bias.values()), device=logits.device)


def apply_min_tokens(logits: torch.Tensor, rows: Rows) -> None:
    """Forbid, in place, what would end a sequence that has not yet produced its `min_tokens`."""
    for row, seq in rows:
        params = seq.request.sampling_params
        if seq.num_output_tokens < params.min_tokens:
            ends = [*seq.request.eos_token_ids, *(params.stop_token_ids or ())]
            logits[row, torch.tensor(ends, dtype=torch.int64, device=logits.device)] = float("-inf")


def apply_logits_processors(logits: torch.Tensor, rows: Rows) -> dict[int, str]:
    """Run the users' own functions, in place.

    Returns:
        {row: message} for every row whose function failed; such a row's logits are unspecified.
    """
    errors = {}
    for row, seq in rows:
        try:
            for processor in seq.request.sampling_params.logits_processors or ():
                logits[row] = _checked(processor(list(seq.token_ids), logits[row].clone()), logits[row])
        except Exception as error:  # a user's code may raise anything; only its own request may suffer
            errors[row] = f"{type(error).__name__}: {error}"
            logits[row] = 0.0
    return errors


def _checked(result: object, row: torch.Tensor) -> torch.Tensor:
    if not isinstance(result, torch.Tensor) or result.shape != row.shape:
        shape = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(f"a logits processor must return the logits, of shape {list(row.shape)}; it returned {shape}")
    if not result.max().isfinite():
        raise ValueError("a logits processor returned NaN, +inf or nothing but -inf: no token can be drawn from that")
    return result
