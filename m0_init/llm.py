"""LLM: load a checkpoint and speak.

A prompt goes one natural way: text to token ids, token ids through the model, logits to the next token, and round
again until a token ends it. Every round computes the whole sequence from the start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .config import EngineConfig
from .engine.detokenizer import IncrementalDetokenizer
from .engine.processor import InputProcessor, Prompt
from .model_executor.model_loader import load_generation_config, load_hf_config, load_tokenizer, resolve_model
from .model_executor.models.llama import LlamaForCausalLM
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .request import Sequence, SequenceStatus, check_stop
from .sampling_params import SamplingParams
from .utils.common import configure_logging
from .worker.gpu_worker import GPUWorker

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
        folder = resolve_model(config.model, config.revision, with_weights=config.load_format != "dummy")
        self.hf_config = load_hf_config(folder)
        self.tokenizer = load_tokenizer(
            resolve_model(config.tokenizer, with_weights=False) if config.tokenizer else folder
        )
        self.worker = GPUWorker(config, folder, self.hf_config)
        self.config = self.worker.config
        generation_config = load_generation_config(folder)
        self.input_processor = InputProcessor(self.config, self.hf_config, self.tokenizer, generation_config)
        self._counter = count()
        self._closed = False

    @property
    def model(self) -> LlamaForCausalLM:
        """The module that computes logits."""
        return self.worker.model_runner.model

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
        seqs = self._make_sequences(prompts, sampling_params)
        outputs = {}
        max_tokens = sum(seq.request.max_tokens for seq in seqs)
        with tqdm(total=max_tokens, desc="Generating", unit="token", disable=not use_tqdm) as bar:
            for seq in seqs:
                for output in self._run(seq):
                    outputs[output.request_id] = output
                    bar.update()
                bar.total -= seq.request.max_tokens - len(output.token_ids)  # it may have ended early
        return list(outputs.values())

    def stream(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields an output after every token, with the new text in `delta`."""
        for seq in self._make_sequences(prompts, sampling_params):
            yield from self._run(seq)

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
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json suggests them."""
        return self.input_processor.default_sampling_params()

    def close(self) -> None:
        """Give back all memory. The object cannot be used afterwards; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self.worker.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ one prompt after the other

    def _make_sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
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
        return [
            self.input_processor.process(f"llm-{next(self._counter)}", prompt, params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _run(self, seq: Sequence) -> Iterator[RequestOutput]:
        """Generate token by token; yields after each."""
        request = seq.request
        metrics = RequestMetrics(request.arrival_time)
        detokenizer = IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids)
        text = ""
        seq.status = SequenceStatus.RUNNING
        while not seq.is_finished:
            self._check_open()
            token_id = self.worker.model_runner.execute_model(seq)
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

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM is closed; make a new one")


def as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    is_token_ids = len(prompts) > 0 and isinstance(prompts[0], int)
    return [list(prompts)] if is_token_ids else list(prompts)
