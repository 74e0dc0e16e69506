"""The way in: what users give becomes a Request, and the Sequence that will serve it.

Whatever can be wrong with a prompt or its parameters is found here, before anything runs.
"""

from __future__ import annotations

import time
from dataclasses import fields
from itertools import count
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config import EngineConfig
from ..request import Request, Sequence, derive_seed
from ..sampling_params import SamplingParams

Prompt = str | list[int] | dict[str, Any]


class InputProcessor:
    """Validates prompts and parameters, tokenises, and gives every request its limits and seeds.

    Args:
        config: with every None settled.
        generation_config: the checkpoint's generation_config.json.
    """

    def __init__(
        self,
        config: EngineConfig,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: dict[str, Any],
    ) -> None:
        self.max_model_len = config.max_model_len or 0
        self.max_positions = hf_config.max_position_embeddings
        self.vocab_size = hf_config.vocab_size
        self.seed = config.seed
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.eos_token_ids = self._find_eos_token_ids(hf_config)
        self._counter = count()

    def process(self, request_id: str, prompt: Any, params: SamplingParams | None) -> Sequence:
        """The sequence of a new request.

        Raises:
            ValueError: the prompt or the parameters cannot be served.
        """
        arrival_time = time.perf_counter()
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        text, token_ids = self._tokenize(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        for name, ids in (("the prompt", token_ids), ("stop_token_ids", params.stop_token_ids or ())):
            out = [token for token in ids if not 0 <= token < self.vocab_size]
            if out:
                raise ValueError(f"token id {out[0]} in {name} is not in the vocabulary (0 to {self.vocab_size - 1})")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            or_raise = ", or raise max_model_len" if self.max_model_len < self.max_positions else ""
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens and max_model_len is {self.max_model_len}: shorten it to at "
                f"most {self.max_model_len - 1}{or_raise}"
            )
        number = next(self._counter)
        request = Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_tokens=min(params.max_tokens or room, room),
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            arrival_time=arrival_time,
        )
        seed = derive_seed(self.seed, number) if params.seed is None else params.seed
        return Sequence(f"{request_id}-0", request, seed)

    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json suggests them."""
        suggested = dict(self.generation_config)
        if "max_new_tokens" in suggested:
            suggested["max_tokens"] = suggested["max_new_tokens"]
        names = {field.name for field in fields(SamplingParams)} & suggested.keys()
        return SamplingParams(**{name: suggested[name] for name in names if suggested[name] is not None})

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        is_dict = isinstance(prompt, dict) and len(prompt) == 1
        text = prompt.get("prompt") if is_dict else prompt
        token_ids = prompt.get("prompt_token_ids") if is_dict else prompt
        if isinstance(text, str):
            return text, self.tokenizer.encode(text, verbose=False)  # of its length we speak ourselves
        if isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids):
            return None, list(token_ids)
        raise ValueError(
            'a prompt is text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; '
            f"got {prompt!r:.80}"
        )

    def _find_eos_token_ids(self, hf_config: PretrainedConfig) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json's, else config.json's, else the tokenizer's."""
        suggested = self.generation_config.get("eos_token_id")
        for eos in (suggested, hf_config.eos_token_id, self.tokenizer.eos_token_id):
            if eos is not None:
                return tuple(eos) if isinstance(eos, list) else (eos,)
        return ()
