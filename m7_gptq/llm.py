"""LLM: load a checkpoint and speak.

A prompt goes one natural way: text to token ids, token ids through the engine step by step, tokens back to text.
This class only adds requests, turns the crank and collects what comes out; `engine/llm_engine.py` is where it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .config import EngineConfig
from .engine.llm_engine import LLMEngine
from .engine.processor import Prompt
from .model_executor.models.llama import LlamaForCausalLM
from .outputs import RequestOutput
from .request import Request
from .sampling_params import SamplingParams
from .utils.common import configure_logging

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
        self.engine = LLMEngine(config)
        self.config = self.engine.config
        self.tokenizer = self.engine.tokenizer
        self.hf_config = self.engine.hf_config
        self._counter = count()
        self._closed = False

    @property
    def model(self) -> LlamaForCausalLM:
        """The module that computes logits."""
        return self.engine.worker.model_runner.model

    # ------------------------------------------------------------------ what users call

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: list[int] | None = None,
        cache_salt: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt to its end.

        Args:
            prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these.
            sampling_params: one for all, or a list with one for each; None: `get_default_sampling_params()`.
            priority: one number a prompt, smaller is more urgent; counts under scheduling_policy="priority".
            cache_salt: one for all, or a list with one for each: only requests with the same one share what they have
                computed, so that nobody can tell from the time to the first token what others have asked.

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt or a parameter that cannot be served; nothing was generated then.
        """
        requests = self._add_requests(prompts, sampling_params, priority, cache_salt)
        max_tokens = {request.request_id: request.max_tokens * request.sampling_params.n for request in requests}
        num_tokens = dict.fromkeys(max_tokens, 0)
        outputs = {}
        try:
            with tqdm(total=sum(max_tokens.values()), desc="Generating", unit="token", disable=not use_tqdm) as bar:
                for output in self._run(requests):
                    request_id, progress = output.request_id, output.metrics.num_output_tokens
                    bar.update(progress - num_tokens[request_id])
                    num_tokens[request_id] = progress
                    if output.finished:
                        outputs[request_id] = output
                        bar.total -= max_tokens[request_id] - progress  # it may have ended early
        finally:
            self._abort(requests)
        return [outputs[request.request_id] for request in requests]

    def stream(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: list[int] | None = None,
        cache_salt: str | list[str | None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields an output after every token, with the new text in `delta`.

        Leaving the loop early aborts what is unfinished.
        """
        requests = self._add_requests(prompts, sampling_params, priority, cache_salt)
        num_shown: dict[tuple[str, int], int] = {}  # characters of each completion
        try:
            for output in map(RequestOutput.snapshot, self._run(requests)):
                for completion in output.outputs:
                    key = output.request_id, completion.index
                    completion.delta = completion.text[num_shown.get(key, 0) :]
                    num_shown[key] = len(completion.text)
                yield output
        finally:
            self._abort(requests)

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        cache_salt: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation ([{"role": "user", "content": "Hi"}, …]), or each of a list of them."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts: list[Prompt] = [self.preprocess_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, cache_salt=cache_salt)

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
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json suggests them."""
        return self.engine.input_processor.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget all that has been computed, so that the next prompt is computed whole.

        Returns:
            False, and nothing is forgotten, while requests run.
        """
        self._check_open()
        return self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Give back all memory. The object cannot be used afterwards; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ turning the crank

    def _add_requests(self, prompts: Any, sampling_params: Any, priority: Any, cache_salt: Any) -> list[Request]:
        """Queue all prompts, or none if one of them cannot be served."""
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
        priority = [0] * len(prompts) if priority is None else priority
        if not isinstance(priority, (list, tuple)) or len(priority) != len(prompts):
            raise ValueError(f"priority must be a list of {len(prompts)} integers, one a prompt; got {priority!r}")
        if not isinstance(cache_salt, (list, tuple)):
            cache_salt = [cache_salt] * len(prompts)
        if len(cache_salt) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(cache_salt)} cache_salts; give one, or one each")
        requests: list[Request] = []
        try:
            for prompt, params, rank, salt in zip(prompts, sampling_params, priority, cache_salt, strict=True):
                requests.append(self.engine.add_request(f"llm-{next(self._counter)}", prompt, params, rank, salt))
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _run(self, requests: list[Request]) -> Iterator[RequestOutput]:
        """Turn the crank until these requests are finished; yields an output when it has grown, whoever turned."""
        unfinished = {request.request_id: self.engine.get_output(request.request_id) for request in requests}
        num_seen = dict.fromkeys(unfinished, 0)
        while unfinished:
            self._check_open()
            # Others may have stepped, or ended, what is ours.
            grown = [o for i, o in unfinished.items() if o.finished or o.metrics.num_output_tokens > num_seen[i]]
            for output in grown or self.engine.step():
                if output.request_id in unfinished:
                    num_seen[output.request_id] = output.metrics.num_output_tokens
                    if output.finished:
                        del unfinished[output.request_id]
                    yield output

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM is closed; make a new one")

    def _abort(self, requests: list[Request]) -> None:
        """Drop those of these requests that are not finished."""
        for request in requests:
            self.engine.abort_request(request.request_id)


def as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    is_token_ids = len(prompts) > 0 and isinstance(prompts[0], int)
    return [list(prompts)] if is_token_ids else list(prompts)
