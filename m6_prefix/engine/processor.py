"""The two ends of the engine: what users give becomes Requests and Sequences, and tokens become text.

Whatever can be wrong with a prompt or its parameters is found here, before anything runs. Whatever needs the tokenizer
is here; between the two ends there are only token ids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config import EngineConfig
from ..outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SequenceOutput
from ..request import Request, Sequence, SequenceStatus, derive_seed
from ..sampling_params import SamplingParams
from .detokenizer import IncrementalDetokenizer

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

    def process(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[Sequence]:
        """The `n` sequences of a new request.

        Raises:
            ValueError: the prompt or the parameters cannot be served.
        """
        arrival_time = time.perf_counter()
        if not isinstance(priority, int):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise ValueError(f"cache_salt must be a string that is not empty, or None; got {cache_salt!r}")
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        text, token_ids = self._tokenize(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        stop_token_ids, logit_bias = params.stop_token_ids or (), params.logit_bias or ()
        for name, ids in (("the prompt", token_ids), ("stop_token_ids", stop_token_ids), ("logit_bias", logit_bias)):
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
            priority=priority,
            cache_salt=cache_salt,
        )
        seed = derive_seed(self.seed, number) if params.seed is None else params.seed
        return [Sequence(f"{request_id}-{i}", request, i, _wrap_int64(seed + i)) for i in range(params.n)]

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


def _wrap_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


@dataclass
class SequenceState:
    """The text of one sequence as far as it is known.

    Attributes:
        text: all of it, with what is still held back.
        num_held: characters at its end that may turn out to begin a stop string.
    """

    completion: CompletionOutput
    detokenizer: IncrementalDetokenizer
    num_held: int
    text: str = ""

    def show(self) -> None:
        """Move what may be seen of the text into the completion: all of it once it is finished."""
        completion = self.completion
        end = len(self.text) if completion.finish_reason else max(len(self.text) - self.num_held, 0)
        completion.delta = self.text[len(completion.text) : end]
        completion.text += completion.delta


class OutputProcessor:
    """Turns new tokens into text, finds stop strings, and keeps the outputs that users see."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._outputs: dict[str, RequestOutput] = {}
        self._states: dict[tuple[str, int], SequenceState] = {}  # by request id and index

    def add_request(self, seqs: list[Sequence]) -> None:
        """Start the output of a request, given all its sequences."""
        request, params = seqs[0].request, seqs[0].request.sampling_params
        num_held = 0 if params.include_stop_str_in_output else max(map(len, params.stop or ()), default=1) - 1
        completions = []
        for seq in seqs:
            completion = CompletionOutput(seq.index, "", [])
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
            completions.append(completion)
            detokenizer = IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids, params.skip_special_tokens)
            self._states[seq.request_id, seq.index] = SequenceState(completion, detokenizer, num_held)
        self._outputs[request.request_id] = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=completions,
            finished=False,
            metrics=RequestMetrics(request.arrival_time, token_times=[[] for _ in seqs]),
        )

    def get_output(self, request_id: str) -> RequestOutput:
        """The output of an unfinished request, which goes on growing. Raises KeyError for any other."""
        return self._outputs[request_id]

    def finish_sequence(self, seq: Sequence) -> None:
        """`seq` has ended, perhaps without a last token; its request is forgotten with the last of its sequences."""
        output = self._outputs[seq.request_id]
        completion = output.outputs[seq.index]
        if completion.finish_reason is None:
            completion.finish_reason, completion.stop_reason = seq.status.finish_reason, seq.stop_reason
            self._states[seq.request_id, seq.index].show()
        del self._states[seq.request_id, seq.index]
        output.finished = all(completion.finish_reason for completion in output.outputs)
        if not any((seq.request_id, completion.index) in self._states for completion in output.outputs):
            del self._outputs[seq.request_id]

    def note_scheduled(self, seqs: list[Sequence], started: float) -> None:
        """The step that began at `started` worked on these."""
        for seq in seqs:
            output = self._outputs.get(seq.request_id)
            if output is not None and output.prompt_token_ids is seq.request.prompt_token_ids:  # or its id is another's
                output.metrics.first_scheduled_time = output.metrics.first_scheduled_time or started
                if seq.index == 0:
                    output.num_cached_tokens = seq.num_cached_tokens

    def process_outputs(self, seq_outputs: list[SequenceOutput]) -> tuple[list[RequestOutput], list[str]]:
        """Take in the tokens of a step.

        Returns:
            The outputs of the requests that made progress, which go on growing in later steps; and the ids of sequences
            that a stop string ended, which only the text can tell.
        """
        now = time.perf_counter()
        progressed = {}
        stopped = []
        for seq_output in seq_outputs:
            request_id = seq_output.seq.request_id
            output = self._outputs[request_id]
            if request_id not in progressed:
                progressed[request_id] = output
                for completion in output.outputs:
                    completion.delta = ""
            seq, completion = seq_output.seq, output.outputs[seq_output.seq.index]
            completion.finish_reason, completion.stop_reason = seq.status.finish_reason, seq.stop_reason
            state = self._states[request_id, seq.index]
            if seq.status is not SequenceStatus.FINISHED_ERROR:
                output.metrics.record_token(seq.index, now)
                stop_string = self._add_token(state, seq_output)
                if stop_string is not None:
                    completion.finish_reason, completion.stop_reason = "stop", stop_string
                    stopped.append(seq.seq_id)
            state.show()
            output.finished = all(completion.finish_reason for completion in output.outputs)
        return list(progressed.values()), stopped

    def _add_token(self, state: SequenceState, seq_output: SequenceOutput) -> str | None:
        """Returns the stop string that the token completed, if it did."""
        seq, params = seq_output.seq, seq_output.seq.request.sampling_params
        state.completion.token_ids.append(seq_output.token_id)
        if seq_output.logprobs is not None:
            self._add_logprobs(state.completion, seq_output.logprobs, params.logprobs or 0)
        if seq.ended_by_token and not params.include_stop_str_in_output:
            return None
        new_text = state.detokenizer.step(seq_output.token_id)
        state.text += new_text
        if not params.stop or seq.num_output_tokens <= params.min_tokens:
            return None
        found = find_stop_string(state.text, len(new_text), tuple(params.stop))
        if found is None:
            return None
        string, start = found
        state.text = state.text[: start + len(string)] if params.include_stop_str_in_output else state.text[:start]
        return string

    def _add_logprobs(
        self, completion: CompletionOutput, logprobs: list[tuple[int, float, int]], num_logprobs: int
    ) -> None:
        """The sampled token, and as many of the most likely ones as this request (not its neighbours) asked for."""
        assert completion.logprobs is not None and completion.cumulative_logprob is not None  # since add_request
        wanted = logprobs if num_logprobs == -1 else logprobs[: num_logprobs + 1]
        entries: dict[int, Logprob] = {}
        for token_id, logprob, rank in wanted:
            entries.setdefault(token_id, Logprob(logprob, rank, str(self.tokenizer.decode([token_id]))))
        completion.logprobs.append(entries)
        completion.cumulative_logprob += logprobs[0][1]


def find_stop_string(text: str, num_new_chars: int, stop: tuple[str, ...]) -> tuple[str, int] | None:
    """The stop string that the text completed first, and where it begins; only the new end of the text is searched.

    Of several, the one that ends first wins; among those that end together, the one named first.
    """
    found: tuple[str, int] | None = None
    for string in stop:
        start = text.find(string, max(0, len(text) - num_new_chars - len(string) + 1))
        if start >= 0 and (found is None or start + len(string) < found[1] + len(found[0])):
            found = (string, start)
    return found
