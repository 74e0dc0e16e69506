"""SamplingParams: how the next token of a request is chosen, and when its generation ends.

Names, defaults and accepted ranges are vLLM's. The object is frozen, so a request's parameters cannot change under
the engine and one object may serve many requests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .utils.checks import check_int, check_option_names, check_real

if TYPE_CHECKING:
    import torch

# vLLM's bound: below it the draw is the most likely token.
GREEDY_TEMPERATURE = 1e-5

# vLLM's bounds.
MAX_LOGPROBS = 20
MAX_N = 16_384

# (token ids of prompt and output so far, logits [vocab_size]) -> logits [vocab_size]
LogitsProcessor = Callable[[list[int], "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request.

    Attributes:
        n: how many continuations to make; the i-th draws with seed + i.
        presence_penalty: in [-2, 2]; subtracted from the logit of every token that the output holds.
        frequency_penalty: in [-2, 2]; the same, times how often the output holds it.
        repetition_penalty: above 0; tokens in prompt or output have positive logits divided, negative ones multiplied.
        temperature: in [0, 2]; logits are divided by it; below 1e-5 the most likely token is taken.
        top_p: in (0, 1]; keep the most likely tokens that together reach this probability.
        top_k: keep this many most likely tokens; 0 or -1: all.
        min_p: in [0, 1]; keep tokens at least this times as likely as the most likely one.
        seed: of this request's draws; None (or -1): derived from the engine's seed and the request's number.
        stop: strings that end the generation; cut off the text.
        stop_token_ids: tokens that end the generation; they stay in `token_ids` and are left out of `text`.
        ignore_eos: go on after the model's end-of-sequence token.
        max_tokens: most tokens to generate; None: as many as `max_model_len` allows.
        min_tokens: no EOS, stop token or stop string before this many tokens.
        logprobs: give the log-probabilities of this many most likely tokens (and of the chosen one); -1: of all.
        logit_bias: {token id: what to add to its logit}, each within [-100, 100].
        skip_special_tokens: leave special tokens out of `text`.
        include_stop_str_in_output: keep the stop string, or stop token, in `text`.
        logits_processors: functions (token ids of prompt and output, logits) -> logits, applied before the temperature.

    Raises:
        TypeError: an unknown parameter.
        ValueError: a value out of range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logits_processors: Sequence[LogitsProcessor] | None = None

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
        self._check_ranges()
        self._check_stop()

    def _check_ranges(self) -> None:
        check_int("n", self.n, 1)
        if self.n > MAX_N:
            raise ValueError(f"n must be at most {MAX_N}, got {self.n}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n must be 1 when sampling is greedy (all {self.n} would be the same); raise temperature")
        check_real("presence_penalty", self.presence_penalty, -2, 2)
        check_real("frequency_penalty", self.frequency_penalty, -2, 2)
        check_real("repetition_penalty", self.repetition_penalty, 0, sys.float_info.max, low_is_open=True)
        check_real("top_p", self.top_p, 0, 1, low_is_open=True)
        check_int("top_k", self.top_k, -1)
        check_real("min_p", self.min_p, 0, 1)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, -1)
            if self.logprobs > MAX_LOGPROBS:
                raise ValueError(f"logprobs must be at most {MAX_LOGPROBS}, or -1 for all, got {self.logprobs}")
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"logit_bias must be a dict from token ids to numbers, got {self.logit_bias!r}")
        for token, bias in (self.logit_bias or {}).items():
            check_int("a token id in logit_bias", token, 0)
            check_real(f"logit_bias of token {token}", bias, -100, 100)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        processors = self.logits_processors
        if not isinstance(processors, Sequence | None) or not all(map(callable, processors or ())):
            raise ValueError(f"logits_processors must be a list of functions, got {processors!r}")
        if processors is not None:
            object.__setattr__(self, "logits_processors", tuple(processors))

    def _check_stop(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, Sequence) or any(not isinstance(text, str) or not text for text in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def needs_host(self) -> bool:
        """Whether something about a draw is done on the host, or takes tokens that were drawn before."""
        lists = self.logit_bias, self.logits_processors
        return self.has_penalties or self.min_tokens > 0 or self.logprobs is not None or any(lists)
