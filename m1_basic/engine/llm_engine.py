"""LLMEngine: requests go in one by one, every step brings the work on, outputs come out.

The caller owns the loop (`LLM` is one such caller), so requests may be added and aborted between any two steps.
"""

from __future__ import annotations

import time
from collections import deque

from ..config import EngineConfig
from ..metrics.stats import EngineStats
from ..model_executor.model_loader import load_generation_config, load_hf_config, load_tokenizer, resolve_model
from ..outputs import ModelRunnerOutput, RequestOutput, SequenceOutput
from ..request import Request, Sequence, SequenceStatus, check_stop
from ..sampling_params import SamplingParams
from ..worker.gpu_worker import GPUWorker
from .processor import InputProcessor, OutputProcessor, Prompt


class LLMEngine:
    """Serves one sequence at a time, first come, first served.

    Raises:
        ValueError: a checkpoint or an option that cannot be used; the message says what to change.
    """

    def __init__(self, config: EngineConfig) -> None:
        folder = resolve_model(config.model, config.revision, with_weights=config.load_format != "dummy")
        self.hf_config = load_hf_config(folder)
        self.tokenizer = load_tokenizer(
            resolve_model(config.tokenizer, with_weights=False) if config.tokenizer else folder
        )
        self.worker = GPUWorker(config, folder, self.hf_config)
        self.config = self.worker.config
        generation_config = load_generation_config(folder)
        self.input_processor = InputProcessor(self.config, self.hf_config, self.tokenizer, generation_config)
        self.output_processor = OutputProcessor(self.tokenizer)
        self.stats = EngineStats()
        self._queue: deque[Sequence] = deque()  # unfinished sequences; the first one is being served

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            sampling_params: None: as the checkpoint's generation_config.json suggests.

        Raises:
            ValueError: the prompt or the parameters cannot be served, or the id is in use.
        """
        if any(seq.request_id == request_id for seq in self._queue):
            raise ValueError(f"request id {request_id!r} is in use; choose another")
        seqs = self.input_processor.process(request_id, prompt, sampling_params)
        self.output_processor.add_request(seqs)
        self._queue.extend(seqs)
        return seqs[0].request

    def get_output(self, request_id: str) -> RequestOutput:
        """The output of an unfinished request as far as it has come; it goes on growing. KeyError for any other."""
        return self.output_processor.get_output(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._queue)

    def abort_request(self, request_id: str) -> None:
        """Drop a request, running or waiting; one that is unknown or finished is ignored."""
        for seq in [seq for seq in self._queue if seq.request_id == request_id]:
            self.finish_sequence(seq.seq_id, SequenceStatus.FINISHED_ABORTED)

    def finish_sequence(self, seq_id: str, status: SequenceStatus) -> None:
        """End one sequence, and with the last of them its request; one that is unknown or finished is ignored."""
        for seq in [seq for seq in self._queue if seq.seq_id == seq_id]:
            seq.status = status
            self._queue.remove(seq)
            self.output_processor.finish_sequence(seq)

    def step(self) -> list[RequestOutput]:
        """Give the sequence in hand one more token: the first takes its whole prompt, every other one token.

        Returns:
            The outputs that grew. They are the engine's own and go on growing; `snapshot` one to keep it as it is.
        """
        if not self._queue:
            return []
        started = time.perf_counter()
        seq = self._queue[0]
        seq.status = SequenceStatus.RUNNING
        first, last = seq.num_computed_tokens, seq.num_tokens
        sampled = self.worker.model_runner.execute_model(seq)
        if seq.is_finished:  # a logits processor aborted it
            return []
        seq.num_computed_tokens = last
        seq_outputs = [self._update_from_output(seq, sampled)]
        self.output_processor.note_scheduled([seq], started)
        outputs, stopped = self.output_processor.process_outputs(seq_outputs)
        if seq.is_finished or stopped:
            self.finish_sequence(seq.seq_id, seq.status if seq.is_finished else SequenceStatus.FINISHED_STOPPED)
        self.stats.record(
            phase="decode" if first else "prefill",
            seq_ids=(seq.seq_id,),
            num_tokens=last - first,
            start=started,
            kv_slots_used=last,
            kv_slots=self.worker.num_slots,
        )
        return outputs

    def close(self) -> None:
        """Drop all requests and give back all memory."""
        for seq in list(self._queue):
            self.finish_sequence(seq.seq_id, SequenceStatus.FINISHED_ABORTED)
        self.worker.close()

    def _update_from_output(self, seq: Sequence, sampled: ModelRunnerOutput) -> SequenceOutput:
        """Append the new token and see whether it was the last."""
        if sampled.errors:
            seq.status, seq.stop_reason = SequenceStatus.FINISHED_ERROR, sampled.errors[0]
        else:
            seq.token_ids.append(sampled.token_ids[0])
            check_stop(seq)
        return SequenceOutput(seq, sampled.token_ids[0], sampled.logprobs.get(0))
