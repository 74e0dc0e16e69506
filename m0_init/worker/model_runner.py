"""ModelRunner: a sequence's tokens become tensors, tensors become logits, logits become its next token."""

from __future__ import annotations

import torch

from ..attention.metadata import AttentionMetadata
from ..model_executor.models.llama import LlamaForCausalLM
from ..request import Sequence
from ..sample.sampler import Sampler, SamplingMetadata


class ModelRunner:
    """Runs the model over all tokens of a sequence."""

    def __init__(self, model: LlamaForCausalLM, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.sampler = Sampler()

    @torch.inference_mode()
    def execute_model(self, seq: Sequence) -> int:
        """Compute `seq` from its first token to its last, and draw the next one."""
        input_ids, positions, metadata = self._prepare_inputs(seq)
        hidden = self.model(input_ids, positions, metadata)
        logits = self.model.compute_logits(hidden[-1:])
        return int(self.sampler(logits, SamplingMetadata.from_sequences([seq], self.device)))

    def _prepare_inputs(self, seq: Sequence) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        start, end = 0, seq.num_tokens
        input_ids = torch.tensor(seq.token_ids[start:end], device=self.device)
        positions = torch.arange(start, end, device=self.device)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=self.device),
            max_query_len=end - start,
            max_seq_len=end,
        )
        return input_ids, positions, metadata
