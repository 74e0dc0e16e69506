"""SamplingParams: how the next token of a request is chosen, and when its generation ends.

Names, defaults and accepted ranges are vLLM's. The object is frozen, so a request's parameters cannot change under
the engine and one object may serve many requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .utils.checks import check_int, check_option_names, check_real

# vLLM's bound: below it the draw is the most likely token.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request.

    Attributes:
        temperature: in [0, 2]; logits are divided by it; below 1e-5 the most likely token is taken.
        seed: of this request's draws; None (or -1): derived from the engine's seed and the request's number.
        stop_token_ids: tokens that end the generation; they stay in `token_ids` and are left out of `text`.
        ignore_eos: go on after the model's end-of-sequence token.
        max_tokens: most tokens to generate; None: as many as `max_model_len` allows.

    Raises:
        TypeError: an unknown parameter.
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16

    def __new__(cls, *args: Any, **options: Any) -> SamplingParams:
        check_option_names(cls.__name__, options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_real("temperature", self.temperature, 0, 2)
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a 64-bit integer, got {self.seed!r}")
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        stop_token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(stop_token_ids, Sequence) or any(not isinstance(token, int) for token in stop_token_ids):
            raise ValueError(f"stop_token_ids must be a list of integers, got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(stop_token_ids))
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE
