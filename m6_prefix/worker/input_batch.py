"""InputBatch: many sequences, one flat batch.

Every sequence that runs has a row here from its first step to its last. A row keeps what is known of its
sequence; what a step needs is gathered from the rows, on the host and with numpy, and sent to the device.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from ..attention.metadata import AttentionMetadata
from ..attention.ops import compute_slot_mapping
from ..core.sched.output import SchedulerOutput
from ..request import Sequence
from ..sample.sampler import SamplingMetadata


class InputBatch:
    """Rows for up to `max_num_seqs` sequences.

    Args:
        max_blocks_per_seq: columns of the block table.
        block_size: slots in a block.

    Attributes:
        rows: {sequence id: its row}.
        block_table: int32 [max_num_seqs, max_blocks_per_seq], on the host.
        num_blocks: {sequence id: blocks that its row knows of}.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self.rows: dict[str, int] = {}
        self.num_blocks: dict[str, int] = {}
        self.block_table = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        # On the host, where the device can read them by itself: this step's and, while that is copied, the next one's.
        self._staging = [torch.empty(0, dtype=torch.uint8)] * 2
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._sampled_seqs: list[Sequence] = []  # of the step before
        self._sampling: SamplingMetadata | None = None  # theirs

    def update(self, scheduled: SchedulerOutput) -> None:
        """Take the rows of those who went and give rows to those who came."""
        for seq_id in scheduled.retired_seq_ids:
            if seq_id in self.rows:
                self._free_rows.append(self.rows.pop(seq_id))
                del self.num_blocks[seq_id]
        for seq in scheduled.seqs:
            if seq.seq_id not in self.rows:
                self.rows[seq.seq_id] = self._free_rows.pop()
                self.num_blocks[seq.seq_id] = 0
            known, num_blocks = self.num_blocks[seq.seq_id], len(seq.block_table)
            if num_blocks > known or scheduled.block_copies:
                known = max(known - 1, 0)  # only the newest may have been replaced, by a copy
                self.block_table[self.rows[seq.seq_id], known:num_blocks] = seq.block_table[known:]
                self.num_blocks[seq.seq_id] = num_blocks

    def prepare_inputs(
        self, scheduled: SchedulerOutput
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata, torch.Tensor, torch.Tensor]:
        """What the model runs on.

        Returns:
            input_ids int64 [T] (first of all source_rows, no token ids yet), positions int64 [T], how they
            divide into sequences, and of each sequence that gets a token, int64 [S]: the row after which it is drawn,
            and that token's position.
        """
        query_lens = np.array([scheduled.num_scheduled_tokens[seq.seq_id] for seq in scheduled.seqs])  # [N]
        seq_lens = np.array([seq.num_computed_tokens for seq in scheduled.seqs])  # [N]
        query_start_loc = np.concatenate([[0], query_lens.cumsum()])  # [N + 1]
        seq_index = np.repeat(np.arange(len(query_lens)), query_lens)  # [T]
        positions = np.arange(len(seq_index)) + (seq_lens - query_start_loc[1:])[seq_index]  # [T]
        new_tokens = [
            seq.token_ids[seq_len - query_len : seq_len]  # nothing, where it is not known
            for seq, query_len, seq_len in zip(scheduled.seqs, query_lens.tolist(), seq_lens.tolist(), strict=True)
        ]
        input_ids = np.fromiter(chain(scheduled.source_rows, *new_tokens), dtype=np.int64, count=len(seq_index))
        rows = [self.rows[seq.seq_id] for seq in scheduled.seqs]
        num_columns = -(-int(seq_lens.max()) // self.block_size)
        block_table = self.block_table[rows, :num_columns]
        slot_mapping = compute_slot_mapping(
            torch.from_numpy(block_table), torch.from_numpy(seq_index), torch.from_numpy(positions), self.block_size
        )
        is_sampled = seq_lens >= np.array([seq.num_tokens for seq in scheduled.seqs])  # [N]: nothing is left to compute
        samples = query_start_loc[1:][is_sampled] - 1, seq_lens[is_sampled]
        ends = query_start_loc.astype(np.int32), seq_lens.astype(np.int32)
        ids, at, slots, logits_indices, sample_positions, starts, lens, table = self._to_device(
            input_ids, positions, slot_mapping.numpy(), *samples, *ends, block_table
        )
        metadata = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=lens,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
            slot_mapping=slots,
            block_table=table,
            block_size=self.block_size,
            num_decodes=int((query_lens > 1).argmax()),
        )
        return ids, at, metadata, logits_indices, sample_positions

    def _to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """The arrays in one copy, for which nobody waits here: it is done before the step's tokens are.

        Those of wider elements come first, so that each part begins where its dtype may.
        """
        num_bytes = sum(array.nbytes for array in arrays)
        self._staging.reverse()
        if num_bytes > len(self._staging[0]):
            self._staging[0] = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        staging = self._staging[0][:num_bytes]
        np.concatenate([array.ravel().view(np.uint8) for array in arrays], out=staging.numpy())
        packed = staging.to(self.device, non_blocking=True, copy=True)
        parts = packed.split([array.nbytes for array in arrays])
        return [p.view(torch.from_numpy(a).dtype).view(a.shape) for p, a in zip(parts, arrays, strict=True)]

    def sampling_metadata(self, seqs: list[Sequence], positions: torch.Tensor) -> SamplingMetadata:
        """What the next tokens are drawn with. While the batch stays the same, only the positions are new."""
        if self._sampling is None or seqs != self._sampled_seqs:
            self._sampling = SamplingMetadata.from_sequences(seqs, self.vocab_size, self.device)
            self._sampled_seqs = seqs
        return replace(self._sampling, positions=positions)
