"""ModelRunner: what was scheduled becomes tensors, tensors become logits, logits become the next tokens."""

from __future__ import annotations

import torch

from ..attention.ops import copy_blocks
from ..core.sched.output import SchedulerOutput
from ..model_executor.models.llama import LlamaForCausalLM
from ..outputs import ModelRunnerOutput
from ..sample.sampler import Sampler
from .cuda_graph import CUDAGraphRunner
from .input_batch import InputBatch


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

    @torch.inference_mode()
    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """One forward pass over the scheduled tokens, and one draw for each sequence that has no more to compute."""
        if scheduled.block_copies:
            copy_blocks(self.kv_caches, scheduled.block_copies, self.input_batch.block_size)
        self.input_batch.update(scheduled)
        input_ids, positions, metadata, logits_indices, sample_positions = self.input_batch.prepare_inputs(scheduled)
        sampling = None
        if scheduled.sampled_seqs:  # before the forward pass: what is sent to a device that is busy waits for it
            sampling = self.input_batch.sampling_metadata(scheduled.sampled_seqs, sample_positions)
        if self.cuda_graphs is not None and self.cuda_graphs.can_run(metadata):
            hidden = self.cuda_graphs.replay(input_ids, positions, metadata)
        else:
            hidden = self.model(input_ids, positions, metadata)
        if sampling is None:
            if hidden.device.type == "cuda":  # no token to wait for, but the next step stages its inputs anew
                torch.cuda.synchronize(hidden.device)
            return ModelRunnerOutput([], {}, {})
        logits = self.model.compute_logits(hidden[logits_indices])  # [S, V]
        sampled = self.sampler(logits, sampling)
        logprobs = sampled.logprobs.tolists() if sampled.logprobs else {}
        return ModelRunnerOutput(sampled.token_ids.tolist(), logprobs, sampled.errors)
