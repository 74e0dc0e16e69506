"""ModelRunner: what was scheduled becomes tensors, tensors become logits, logits become the next tokens."""

from __future__ import annotations

import torch

from ..core.sched.output import SchedulerOutput
from ..model_executor.models.llama import LlamaForCausalLM
from ..outputs import ModelRunnerOutput
from ..sample.sampler import Sampler
from .input_batch import InputBatch


class ModelRunner:
    """Runs the model over the tokens that are scheduled.

    Args:
        model: with its attention layers' caches bound.
    """

    def __init__(self, model: LlamaForCausalLM, input_batch: InputBatch) -> None:
        self.model = model
        self.input_batch = input_batch
        self.sampler = Sampler()

    @torch.inference_mode()
    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """One forward pass over the scheduled tokens of all sequences, and one draw for each sequence."""
        self.input_batch.update(scheduled)
        input_ids, positions, metadata = self.input_batch.prepare_inputs(scheduled)
        hidden = self.model(input_ids, positions, metadata)
        logits = self.model.compute_logits(hidden[metadata.query_start_loc[1:] - 1])  # [N, V]: each one's last row
        sampled = self.sampler(logits, self.input_batch.sampling_metadata(scheduled.seqs, metadata.seq_lens.long()))
        logprobs = sampled.logprobs.tolists() if sampled.logprobs else {}
        return ModelRunnerOutput(sampled.token_ids.tolist(), logprobs, sampled.errors)
