"""transformers' own `generate` as one more runner of workloads: what a stage is compared with.

Same checkpoint, dtype, device and threads as the stages, and the KV cache on, which is its default. Several requests go
in static batches: the next ones in order of arrival, padded on the left to the longest prompt, until the longest output
is done. Only the tokens that a request asked for are counted.
"""

from __future__ import annotations

import gc
import time
from types import TracebackType

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from .. import lab
from .workloads import Workload, WorkloadRequest


class _TokenClock(BaseStreamer):
    """Told of every step's tokens by `generate`, as soon as they are on the host; notes when."""

    def __init__(self, requests: list[WorkloadRequest], traces: list[lab.SequenceTrace], start: float) -> None:
        self.requests = requests
        self.traces = traces
        self.start = start
        self.prompt_is_due = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_due:  # `generate` hands over the prompt first
            self.prompt_is_due = False
            return
        now = time.perf_counter() - self.start
        for request, trace, token in zip(self.requests, self.traces, value.tolist(), strict=True):
            if len(trace.token_ids) < request.max_tokens:  # what comes after is made only because others go on
                trace.token_times.append(now)
                trace.token_ids.append(token)

    def end(self) -> None:
        pass


class HFGenerate:
    """A transformers model that runs workloads; with `load_format="dummy"` its weights are random ones of its own.

    Args:
        batch_size: requests in a batch, at least 1. With 1 they go one after the other.
    """

    def __init__(self, model: str, *, dtype: str, device: str, load_format: str = "auto", batch_size: int = 1) -> None:
        self.batch_size = batch_size
        transformers_logging.disable_progress_bar()
        wanted = getattr(torch, dtype)
        if load_format == "dummy":
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=wanted)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=wanted)
        self.model.eval().to(device)
        # A checkpoint may suggest ways of sampling that the workload does not ask for, and ids that end a text.
        suggested = self.model.generation_config
        suggested.eos_token_id = None
        suggested.temperature = suggested.top_p = suggested.top_k = suggested.repetition_penalty = None

    def run(self, workload: Workload, *, warmup: bool = True) -> lab.Result:
        """Times every token of `workload`.

        Raises:
            ValueError: its requests are not independent, want several samples, end at EOS, or differ in temperature,
                which `generate` has one of.
        """
        requests = workload.requests
        if any(r.follows is not None or r.n > 1 or not r.ignore_eos for r in requests) or (
            len({r.temperature for r in requests}) > 1
        ):
            raise ValueError(f"transformers cannot run the workload {workload.name!r} here: choose another")
        if warmup:
            self._generate([WorkloadRequest(requests[0].prompt_token_ids[-8:], 2)], 0, time.perf_counter())
        start = time.perf_counter()
        traces: list[lab.SequenceTrace] = []
        for first in range(0, len(requests), self.batch_size):
            traces += self._generate(requests[first : first + self.batch_size], first, start)
        return lab.Result("transformers", workload, time.perf_counter() - start, traces, 0, self._notes(requests))

    def _notes(self, requests: list[WorkloadRequest]) -> list[str]:
        if len(requests) == 1:
            return []
        if self.batch_size == 1:
            return ["requests one after the other"]
        return [f"static batches of {self.batch_size} in order of arrival; only useful output counts"]

    @torch.inference_mode()
    def _generate(self, requests: list[WorkloadRequest], first: int, start: float) -> list[lab.SequenceTrace]:
        """One batch, whose first request has the index `first`. Everything was `sent` at the start of the run, as to an
        engine that is given all requests at once."""
        prompts = [request.prompt_token_ids for request in requests]
        traces = [lab.SequenceTrace(first + i, 0, len(prompt), sent=0.0) for i, prompt in enumerate(prompts)]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        input_ids = [[0] * num + prompt for num, prompt in zip(padding, prompts, strict=True)]
        attention_mask = [[0] * num + [1] * (longest - num) for num in padding]
        temperature = requests[0].temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        self.model.generate(
            torch.tensor(input_ids, device=self.model.device),
            attention_mask=torch.tensor(attention_mask, device=self.model.device),
            max_new_tokens=max(request.max_tokens for request in requests),
            streamer=_TokenClock(requests, traces, start),
            **{"do_sample": False, **sampling},
        )
        return traces

    def __enter__(self) -> HFGenerate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.model
        gc.collect()
