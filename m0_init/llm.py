"""LLM: load a checkpoint and speak.

A prompt goes one natural way: text to token ids, token ids through the model, logits to the next token, and round
again until a token ends it. Every round computes the whole sequence from the start.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from .attention.metadata import AttentionMetadata
from .config import EngineConfig
from .engine.detokenizer import IncrementalDetokenizer
from .model_executor.model_loader import (
    load_generation_config,
    load_hf_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .request import Request, Sequence, SequenceStatus, check_stop, derive_seed
from .sample.sampler import Sampler, SamplingMetadata
from .sampling_params import SamplingParams
from .utils.common import configure_logging, resolve_device, resolve_dtype, resolve_max_model_len

logger = logging.getLogger(__name__)

Prompt = str | list[int] | dict[str, Any]
Messages = list[dict[str, str]]


class LLM:
    """A language model that continues prompts.

    Args:
        model: folder of a Hugging Face checkpoint, or its id on the hub.
        engine_config: options; see `EngineConfig`.
        **overrides: single options, which win over `engine_config`.

    Raises:
        TypeError: an unknown option.
        ValueError: a checkpoint or an option that cannot be used; the message says what to change.
    """

    def __init__(
        self, model: str | Path | None = None, engine_config: EngineConfig | None = None, **overrides: Any
    ) -> None:
        if model is not None:
            overrides["model"] = str(model)
        config = replace(engine_config or EngineConfig(), **overrides)
        configure_logging(config.log_level)
        started = time.perf_counter()
        self.device = resolve_device(config.device)
        folder = resolve_model(config.model, config.revision)
        self.hf_config = load_hf_config(folder)
        dtype = resolve_dtype(config.dtype, self.hf_config)
        self.max_model_len = resolve_max_model_len(config.max_model_len, self.hf_config)
        self.config = replace(
            config,
            device=str(self.device),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
        )
        self.tokenizer = load_tokenizer(resolve_model(config.tokenizer) if config.tokenizer else folder)
        self.generation_config = load_generation_config(folder)
        self.eos_token_ids = self._find_eos_token_ids()
        self.model: Any = load_model(folder, self.hf_config, dtype, self.device, config.load_format, config.seed)
        self.sampler = Sampler()
        self._counter = count()
        params = list(self.model.parameters())
        logger.info(
            "%s: %.1f M parameters, %.1f MiB of %s weights on %s, loaded in %.1f s",
            type(self.model).__name__,
            sum(p.numel() for p in params) / 1e6,
            sum(p.nbytes for p in params) / 2**20,
            self.config.dtype,
            self.config.device,
            time.perf_counter() - started,
        )

    # ------------------------------------------------------------------ what users call

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt to its end.

        Args:
            prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these.
            sampling_params: one for all, or a list with one for each; None: `get_default_sampling_params()`.

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt or a parameter that cannot be served; nothing was generated then.
        """
        requests = self._make_requests(prompts, sampling_params)
        outputs = {}
        max_tokens = sum(request.max_tokens for request in requests)
        with tqdm(total=max_tokens, desc="Generating", unit="token", disable=not use_tqdm) as bar:
            for request in requests:
                for output in self._run(request):
                    outputs[request.request_id] = output
                    bar.update()
                bar.total -= request.max_tokens - len(output.token_ids)  # it may have ended early
        return list(outputs.values())

    def stream(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields an output after every token, with the new text in `delta`."""
        for request in self._make_requests(prompts, sampling_params):
            yield from self._run(request)

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation ([{"role": "user", "content": "Hi"}, …]), or each of a list of them."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts: list[Prompt] = [self.preprocess_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def preprocess_chat(self, messages: Messages) -> list[int]:
        """The prompt token ids of a conversation: the tokenizer's chat template, ready for the assistant's turn.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever their author chose
            raise ValueError(f"the chat template of {self.config.model} cannot render this: {error}") from error
        # The template has written the special tokens already; a second BOS would be a different prompt.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json suggests them."""
        suggested = dict(self.generation_config)
        if "max_new_tokens" in suggested:
            suggested["max_tokens"] = suggested["max_new_tokens"]
        names = {field.name for field in fields(SamplingParams)} & suggested.keys()
        return SamplingParams(**{name: suggested[name] for name in names if suggested[name] is not None})

    def close(self) -> None:
        """Give back all memory. The object cannot be used afterwards; closing twice is fine."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ in: prompts to requests

    def _make_requests(self, prompts: Any, sampling_params: Any) -> list[Request]:
        """Validate everything before anything runs."""
        self._check_open()
        prompts = as_prompt_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise ValueError(f"sampling_params must be SamplingParams or a list, got {type(sampling_params).__name__}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(sampling_params)} sampling_params; give one, or one each"
            )
        return [self._make_request(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _check_open(self) -> None:
        if self.model is None:
            raise ValueError("this LLM is closed; make a new one")

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        arrival_time = time.perf_counter()
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        text, token_ids = self._tokenize(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        vocab_size = self.hf_config.vocab_size
        for token in [*token_ids, *(params.stop_token_ids or ())]:
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is not in the vocabulary (0 to {vocab_size - 1})")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens and max_model_len is {self.max_model_len}: shorten it to at "
                f"most {self.max_model_len - 1}, or raise max_model_len"
            )
        max_tokens = min(params.max_tokens or room, room)
        return Request(
            request_id=str(next(self._counter)),
            prompt=text,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_tokens=max_tokens,
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            arrival_time=arrival_time,
        )

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        is_dict = isinstance(prompt, dict) and len(prompt) == 1
        text = prompt.get("prompt") if is_dict else prompt
        token_ids = prompt.get("prompt_token_ids") if is_dict else prompt
        if isinstance(text, str):
            return text, self.tokenizer.encode(text)
        if isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids):
            return None, list(token_ids)
        raise ValueError(
            'a prompt is text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; '
            f"got {prompt!r:.80}"
        )

    def _find_eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json's, else config.json's, else the tokenizer's."""
        for eos in (
            self.generation_config.get("eos_token_id"),
            self.hf_config.eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            if eos is not None:
                return tuple(eos) if isinstance(eos, list) else (eos,)
        return ()

    # ------------------------------------------------------------------ run, and out: tokens to text

    def _run(self, request: Request) -> Iterator[RequestOutput]:
        """Generate token by token; yields after each."""
        counter = int(request.request_id)
        seed = request.sampling_params.seed
        seq = Sequence(
            seq_id=f"{request.request_id}-0",
            request=request,
            seed=derive_seed(self.config.seed, counter) if seed is None else seed,
        )
        metrics = RequestMetrics(request.arrival_time)
        seq.status = SequenceStatus.RUNNING
        detokenizer = IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids)
        text = ""
        while not seq.is_finished:
            token_id = self._next_token(seq)
            seq.token_ids.append(token_id)
            check_stop(seq)
            metrics.record_token(time.perf_counter())
            delta = "" if seq.ended_by_token else detokenizer.step(token_id)
            text += delta
            completion = CompletionOutput(
                index=0,
                text=text,
                token_ids=seq.output_token_ids,
                finish_reason=seq.status.finish_reason,
                stop_reason=seq.stop_reason,
                delta=delta,
            )
            yield RequestOutput(
                request.request_id, request.prompt, request.prompt_token_ids, [completion], seq.is_finished, metrics
            )

    @torch.inference_mode()
    def _next_token(self, seq: Sequence) -> int:
        """One forward pass over everything so far, and one draw."""
        self._check_open()
        input_ids = torch.tensor(seq.token_ids, device=self.device)
        positions = torch.arange(seq.num_tokens, device=self.device)
        metadata = AttentionMetadata.from_lens([seq.num_tokens], [seq.num_tokens], self.device)
        hidden = self.model(input_ids, positions, metadata)
        logits = self.model.compute_logits(hidden[-1:])
        return int(self.sampler(logits, SamplingMetadata.from_sequences([seq], self.device)))


def as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    is_token_ids = len(prompts) > 0 and isinstance(prompts[0], int)
    return [list(prompts)] if is_token_ids else list(prompts)
