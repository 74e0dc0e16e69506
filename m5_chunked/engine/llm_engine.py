"""LLMEngine: requests go in one by one, every step brings the work on, outputs come out.

The caller owns the loop (`LLM` is one such caller), so requests may be added and aborted between any two steps.
"""

from __future__ import annotations

import time

from ..config import EngineConfig
from ..metrics.stats import EngineStats
from ..model_executor.model_loader import load_generation_config, load_hf_config, load_tokenizer, resolve_model
from ..outputs import RequestOutput
from ..request import Request, Sequence, SequenceStatus
from ..sampling_params import SamplingParams
from .core import EngineCore
from .processor import InputProcessor, OutputProcessor, Prompt


class LLMEngine:
    """Serves many requests at once.

    Raises:
        ValueError: a checkpoint or an option that cannot be used; the message says what to change.
    """

    def __init__(self, config: EngineConfig) -> None:
        folder = resolve_model(config.model, config.revision, with_weights=config.load_format != "dummy")
        self.hf_config = load_hf_config(folder)
        self.tokenizer = load_tokenizer(
            resolve_model(config.tokenizer, with_weights=False) if config.tokenizer else folder
        )
        self.core = EngineCore(config, folder, self.hf_config)
        self.worker = self.core.worker
        self.config = self.core.config
        generation_config = load_generation_config(folder)
        self.input_processor = InputProcessor(self.config, self.hf_config, self.tokenizer, generation_config)
        self.output_processor = OutputProcessor(self.tokenizer)
        self.stats = EngineStats()
        self._unfinished: dict[str, list[Sequence]] = {}  # request id: its unfinished sequences

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a request.

        Args:
            sampling_params: None: as the checkpoint's generation_config.json suggests.
            priority: smaller is more urgent; counts under scheduling_policy="priority".

        Raises:
            ValueError: the prompt or the parameters cannot be served, or the id is in use.
        """
        if request_id in self._unfinished:
            raise ValueError(f"request id {request_id!r} is in use; choose another")
        seqs = self.input_processor.process(request_id, prompt, sampling_params, priority)
        self.output_processor.add_request(seqs)
        self._unfinished[request_id] = seqs
        for seq in seqs:
            self.core.scheduler.add_sequence(seq)
        return seqs[0].request

    def get_output(self, request_id: str) -> RequestOutput:
        """The output of an unfinished request as far as it has come; it goes on growing. KeyError for any other."""
        return self.output_processor.get_output(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.core.scheduler.has_unfinished_sequences()

    def abort_request(self, request_id: str) -> None:
        """Drop a request, running or waiting; one that is unknown or finished is ignored."""
        for seq in list(self._unfinished.get(request_id, ())):
            self.finish_sequence(seq.seq_id, SequenceStatus.FINISHED_ABORTED)

    def finish_sequence(self, seq_id: str, status: SequenceStatus) -> None:
        """End one sequence, and with the last of them its request; one that is unknown or finished is ignored."""
        seq = self.core.scheduler.finish_sequence(seq_id, status)
        if seq is not None:
            self._forget(seq)

    def step(self) -> list[RequestOutput]:
        """One iteration: every sequence that is scheduled gets one more token, or comes nearer to its first.

        Returns:
            The outputs that grew. They are the engine's own and go on growing; `snapshot` one to keep it as it is.
        """
        if not self.has_unfinished_requests():
            return []
        started = time.perf_counter()
        scheduled, seq_outputs = self.core.step()
        if scheduled.is_prefill:
            self.output_processor.note_scheduled(scheduled.seqs, started)
        outputs, stopped = self.output_processor.process_outputs(seq_outputs)
        for seq_output in seq_outputs:
            if seq_output.seq.is_finished:
                self._forget(seq_output.seq)
        for seq_id in stopped:
            self.finish_sequence(seq_id, SequenceStatus.FINISHED_STOPPED)
        self.stats.record(
            phase=scheduled.phase,
            seq_ids=tuple(seq.seq_id for seq in scheduled.seqs),
            num_tokens=scheduled.total_num_scheduled_tokens,
            start=started,
            **self.core.scheduler.make_stats(),
        )
        return outputs

    def close(self) -> None:
        """Drop all requests and give back all memory."""
        for request_id in list(self._unfinished):
            self.abort_request(request_id)
        self.worker.close()

    def _forget(self, seq: Sequence) -> None:
        """`seq` has finished; with the last of its sequences the request is forgotten."""
        self.output_processor.finish_sequence(seq)
        self._unfinished[seq.request_id].remove(seq)
        if not self._unfinished[seq.request_id]:
            del self._unfinished[seq.request_id]
        if not self.core.scheduler.running:
            self.core.ahead = None  # it would be a step of nobody
