"""ModelRunner: a sequence's tokens become tensors, tensors become logits, logits become its next token."""

from __future__ import annotations

import torch

from ..attention.metadata import AttentionMetadata
from ..attention.ops import compute_slot_mapping
from ..model_executor.models.llama import LlamaForCausalLM
from ..outputs import ModelRunnerOutput
from ..request import Sequence
from ..sample.sampler import Sampler, SamplingMetadata


class ModelRunner:
    """Runs the model over the tokens of a sequence that are not in the cache yet.

    Args:
        model: with its attention layers' caches bound.
        block_size: slots in a block; one block holds a whole sequence.
    """

    def __init__(self, model: LlamaForCausalLM, block_size: int, device: torch.device) -> None:
        self.model = model
        self.block_size = block_size
        self.device = device
        self.sampler = Sampler()
        # One sequence at a time, so one block, and always the same.
        self.block_table = torch.zeros(1, 1, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def execute_model(self, seq: Sequence) -> ModelRunnerOutput:
        """Compute what is left of `seq` (all of the prompt, later one token) and draw its next token."""
        input_ids, positions, metadata = self._prepare_inputs(seq)
        hidden = self.model(input_ids, positions, metadata)
        logits = self.model.compute_logits(hidden[-1:])
        sampled = self.sampler(logits, SamplingMetadata.from_sequences([seq], logits.shape[-1], self.device))
        logprobs = sampled.logprobs.tolists() if sampled.logprobs else {}
        return ModelRunnerOutput(sampled.token_ids.tolist(), logprobs, sampled.errors)

    def _prepare_inputs(self, seq: Sequence) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        start, end = seq.num_computed_tokens, seq.num_tokens
        input_ids = torch.tensor(seq.token_ids[start:end], device=self.device)
        positions = torch.arange(start, end, device=self.device)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=self.device),
            max_query_len=end - start,
            max_seq_len=end,
            slot_mapping=compute_slot_mapping(
                self.block_table, torch.zeros_like(positions), positions, self.block_size
            ),
            block_table=self.block_table,
            block_size=self.block_size,
        )
        return input_ids, positions, metadata
