"""transformers' own `generate` as one more runner of workloads: what a stage is compared with.

Same checkpoint, dtype, device and threads as the stages, and the KV cache on, which is its default. Requests go one
after the other, since what is compared is the path of a single request.
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
    """Told of every token by `generate`, as soon as the token is on the host; notes when."""

    def __init__(self, trace: lab.SequenceTrace, start: float) -> None:
        self.trace = trace
        self.start = start
        self.prompt_is_due = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_due:  # `generate` hands over the prompt first
            self.prompt_is_due = False
            return
        self.trace.token_times.append(time.perf_counter() - self.start)
        self.trace.token_ids += value.flatten().tolist()

    def end(self) -> None:
        pass


class HFGenerate:
    """A transformers model that runs workloads; with `load_format="dummy"` its weights are random ones of its own."""

    def __init__(self, model: str, *, dtype: str, device: str, load_format: str = "auto") -> None:
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
        """Times every token of `workload`, whose requests must be independent, of one sample each, and ignore EOS.

        Raises:
            ValueError: they are not.
        """
        if any(r.follows is not None or r.n > 1 or not r.ignore_eos for r in workload.requests):
            raise ValueError(f"transformers cannot run the workload {workload.name!r} here: choose another")
        if warmup:
            first = workload.requests[0]
            self._generate(WorkloadRequest(first.prompt_token_ids[-8:], 2), 0, time.perf_counter())
        start = time.perf_counter()
        traces = [self._generate(request, index, start) for index, request in enumerate(workload.requests)]
        notes = ["requests one after the other"] if len(workload.requests) > 1 else []
        return lab.Result("transformers", workload, time.perf_counter() - start, traces, 0, notes)

    @torch.inference_mode()
    def _generate(self, request: WorkloadRequest, index: int, start: float) -> lab.SequenceTrace:
        """`sent` is the start of the run, as for an engine that is given all requests at once."""
        trace = lab.SequenceTrace(index, 0, len(request.prompt_token_ids), sent=0.0)
        input_ids = torch.tensor([request.prompt_token_ids], device=self.model.device)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0} if request.temperature else {}
        self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request.max_tokens,
            streamer=_TokenClock(trace, start),
            **{"do_sample": False, **sampling},
        )
        return trace

    def __enter__(self) -> HFGenerate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.model
        gc.collect()
