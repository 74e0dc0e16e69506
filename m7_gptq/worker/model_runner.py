"""ModelRunner: what was scheduled becomes tensors, tensors become logits, logits become the next tokens.

On a GPU all of this is launched and not waited for: the host is free while the device works.
"""

from __future__ import annotations

import torch

from ..attention.ops import copy_blocks
from ..core.sched.output import SchedulerOutput
from ..model_executor.models.llama import LlamaForCausalLM
from ..outputs import ModelRunnerOutput
from ..sample.sampler import Sampler, SamplerOutput
from .cuda_graph import CUDAGraphRunner
from .input_batch import InputBatch


class AsyncModelRunnerOutput:
    """What a step draws, while the device may be busy with it."""

    def __init__(self, sampled: SamplerOutput) -> None:
        self._sampled = sampled
        # Queued now: behind the launch of another step it would wait for that step, too.
        self._token_ids = sampled.token_ids.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if sampled.token_ids.is_cuda else None

    def get_output(self) -> ModelRunnerOutput:
        """Waits until it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        logprobs = self._sampled.logprobs.tolists() if self._sampled.logprobs else {}
        return ModelRunnerOutput(self._token_ids.tolist(), logprobs, self._sampled.errors)


class ModelRunner:
    """Runs the model over the tokens that are scheduled.

    Args:
        model: with its attention layers' caches bound.
        kv_caches: all of these, K and V of every layer.
        cuda_graphs: recorded steps; None: every step is launched kernel by kernel.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        input_batch: InputBatch,
        kv_caches: list[torch.Tensor],
        cuda_graphs: CUDAGraphRunner | None,
    ) -> None:
        self.model = model
        self.input_batch = input_batch
        self.sampler = Sampler()
        self.kv_caches = kv_caches
        self.cuda_graphs = cuda_graphs
        self._token_ids: torch.Tensor  # int64 [N], that the last step drew

    @torch.inference_mode()
    def execute_model(self, scheduled: SchedulerOutput) -> AsyncModelRunnerOutput:
        """One forward pass over the scheduled tokens, and one draw for each sequence that has no more to compute."""
        if scheduled.block_copies:
            copy_blocks(self.kv_caches, scheduled.block_copies, self.input_batch.block_size)
        self.input_batch.update(scheduled)
        input_ids, positions, metadata, logits_indices, sample_positions = self.input_batch.prepare_inputs(scheduled)
        if scheduled.source_rows:
            unknown = input_ids[: len(scheduled.source_rows)]
            unknown.copy_(self._token_ids[unknown])
        if self.cuda_graphs is not None and self.cuda_graphs.can_run(metadata):
            hidden = self.cuda_graphs.replay(input_ids, positions, metadata)
        else:
            hidden = self.model(input_ids, positions, metadata)
        if not scheduled.sampled_seqs:
            return AsyncModelRunnerOutput(SamplerOutput(logits_indices))  # there are none, and so no tokens
        logits = self.model.compute_logits(hidden[logits_indices])  # [S, V]
        sampled = self.sampler(logits, self.input_batch.sampling_metadata(scheduled.sampled_seqs, sample_positions))
        self._token_ids = sampled.token_ids
        return AsyncModelRunnerOutput(sampled)
