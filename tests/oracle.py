"""The oracle: transformers on the same weights, and what a right continuation is.

Outputs are checked teacher-forced: one forward pass of the oracle over prompt and output, then every generated token
is judged by the logits in front of it. A near-tie that fell the other way then costs nothing, and everything after it
is still checked. How a token follows from logits is written down a second time in `law.py`, in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from .conftest import submodule
from .law import adjusted_logits, possible_laws

# A greedy token's logit may be this far below the row's maximum, and logits may differ by as much.
LOGIT_TOLERANCE = 1e-4
# A drawn token's interval of cumulative probability may miss the uniform number by this much.
MASS_TOLERANCE = 1e-4


class Oracle:
    """transformers' model of a checkpoint, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        eos = self.model.config.eos_token_id
        self.eos_token_ids = tuple(eos) if isinstance(eos, list) else (eos,)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[T, V]: row i is for the token that comes after token_ids[: i + 1]."""
        return self.model(torch.tensor([list(token_ids)])).logits[0]

    def check(self, prompt: Sequence[int], output: Sequence[int], params: Any) -> None:
        """Whether `output` is a continuation of `prompt` that `params` allow; a draw needs a seed of its own.

        Raises:
            AssertionError: names the first token that is not.
        """
        assert len(output) > 0, "nothing was generated"
        rows = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
        for index, (row, token) in enumerate(zip(rows, output, strict=True)):
            scores = adjusted_logits(row, params, prompt, output[:index], self.eos_token_ids)
            problem = token_problem(scores, token, params, position=len(prompt) + index)
            assert problem is None, f"token {index} of {list(output)} after {list(prompt)}: {problem}"


def token_problem(scores: Sequence[float], token: int, params: Any, position: int) -> str | None:
    """Why `token` is wrong at `position` of its sequence, after adjusted logits [V]; None if it is right."""
    if params.temperature < 1e-5:
        best = max(range(len(scores)), key=scores.__getitem__)
        gap = scores[best] - scores[token]
        return f"{token} is {gap:.2e} below the best, {best}" if gap > LOGIT_TOLERANCE else None
    drawn = uniform(params.seed, position)
    intervals = []
    for law in possible_laws(scores, params, LOGIT_TOLERANCE, MASS_TOLERANCE):
        low = sum(probability for other, probability in law.items() if other < token)
        high = low + law.get(token, 0.0)
        if token in law and low - MASS_TOLERANCE <= drawn <= high + MASS_TOLERANCE:
            return None
        intervals.append(f"[{low:.6f}, {high:.6f}]")
    return f"{token} covers {' or '.join(intervals)}, the draw was {drawn:.6f}"


def uniform(seed: int, position: int) -> float:
    """What `random_uniform` of the engine must give: the top 24 bits of a hash of (seed, position), in [0, 1)."""
    return (splitmix(splitmix(seed) + position * GOLDEN) >> 40) / 2**24


GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64 on unsigned 64-bit integers; others wrap around."""
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def engine_logits(stage: ModuleType, llm: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The engine's own logits, in whatever steps it computes them.

    Returns:
        The T tokens that went into the model (prompt and greedy output, but for its last), and their logits [T, V].
    """
    model_class = submodule(stage, "model_executor.models.llama").LlamaForCausalLM
    forward = model_class.forward
    rows: dict[int, torch.Tensor] = {}

    def recording_forward(self: Any, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
        hidden = forward(self, input_ids, positions, metadata)
        rows.update(zip(positions.tolist(), self.compute_logits(hidden).cpu(), strict=True))
        return hidden

    params = stage.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "forward", recording_forward)
        worker = getattr(getattr(llm, "engine", None), "worker", None)
        recorded = getattr(getattr(worker, "model_runner", None), "cuda_graphs", None)
        if recorded is not None:  # its steps do not pass through `forward`
            replay = recorded.replay

            def recording_replay(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
                hidden = replay(input_ids, positions, metadata)
                rows.update(zip(positions.tolist(), recorded.model.compute_logits(hidden).cpu(), strict=True))
                return hidden

            patch.setattr(recorded, "replay", recording_replay)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    token_ids = [*prompt, *output.token_ids[:-1]]
    return token_ids, torch.stack([rows[position] for position in range(len(token_ids))])
