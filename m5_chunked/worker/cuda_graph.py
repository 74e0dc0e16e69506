"""CUDA graphs: decode steps that were recorded once and are replayed with one launch.

A decode step of a small model is hundreds of kernels that run for microseconds each, and the host needs longer to
launch them than the device to run them. A recorded graph launches all of them at once; but it always does the same
thing with the same memory. So a step's inputs are copied to where the recording reads, and there is a graph for each
of a number of batch sizes: a batch takes the next larger one, and the rows that are too many compute nothing that
anybody reads.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from tqdm import tqdm

from ..attention.metadata import AttentionMetadata
from ..model_executor.models.llama import LlamaForCausalLM


def default_sizes(max_num_seqs: int) -> list[int]:
    """Close together where a batch is small and each row too many counts; the largest is `max_num_seqs`."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 32)]
    return [*(size for size in ladder if size < max_num_seqs), max_num_seqs]


class CUDAGraphRunner:
    """Records decode steps of a model and replays them.

    Args:
        sizes: of the batches to record.
        max_model_len: of the longest sequence, in tokens.
        block_size: slots in a block.
        spare_slot: where the rows that are too many write.
    """

    def __init__(
        self, model: LlamaForCausalLM, sizes: Iterable[int], max_model_len: int, block_size: int, spare_slot: int
    ) -> None:
        self.model = model
        self.sizes = sorted(set(sizes))
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.spare_slot = spare_slot
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.hidden: dict[int, torch.Tensor] = {}  # [size, H], where each graph leaves them
        # What all graphs read, a graph of n rows the first n.
        most, device = self.sizes[-1], next(model.parameters()).device
        self.input_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.slot_mapping = torch.full((most,), spare_slot, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(most, -(-max_model_len // block_size), dtype=torch.int32, device=device)
        self.query_start_loc = torch.arange(most + 1, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def capture(self) -> int:
        """Record a step of each size, the largest first: the others then find room in its memory.

        Returns:
            Bytes that the recordings take on the device.

        Raises:
            ValueError: there is no memory for them.
        """
        try:
            for size in self.sizes:  # kernels are compiled, and libraries get their buffers, before the recording
                self._run(size)
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.input_ids.device)[0]
            pool = torch.cuda.graph_pool_handle()
            for size in tqdm(self.sizes[::-1], "Capturing CUDA graphs", disable=None, leave=False):
                self.graphs[size] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[size], pool=pool):
                    self.hidden[size] = self._run(size)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                "no memory for CUDA graphs: give cuda_graph_sizes fewer or smaller sizes, leave more memory "
                "(gpu_memory_utilization, kv_cache_memory_bytes, num_kv_blocks), or do without (enforce_eager=True)"
            ) from error
        return free - torch.cuda.mem_get_info(self.input_ids.device)[0]

    def can_run(self, metadata: AttentionMetadata) -> bool:
        """Whether it is a decode step, and no larger than the largest that was recorded."""
        return metadata.max_query_len == 1 and len(metadata.seq_lens) <= self.sizes[-1]

    def replay(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """What the model's forward would return for a step that `can_run`: [N, H], until the next replay."""
        num_seqs, num_columns = metadata.block_table.shape
        size = next(size for size in self.sizes if size >= num_seqs)
        self.input_ids[:num_seqs] = input_ids
        self.positions[:num_seqs] = positions
        self.slot_mapping[:num_seqs] = metadata.slot_mapping
        self.seq_lens[:num_seqs] = metadata.seq_lens
        self.block_table[:num_seqs, :num_columns] = metadata.block_table
        if size > num_seqs:
            self.slot_mapping[num_seqs:size] = self.spare_slot
            self.seq_lens[num_seqs:size] = 0
        self.graphs[size].replay()
        return self.hidden[size][:num_seqs]

    def _run(self, size: int) -> torch.Tensor:
        metadata = AttentionMetadata(
            query_start_loc=self.query_start_loc[: size + 1],
            seq_lens=self.seq_lens[:size],
            max_query_len=1,
            max_seq_len=self.max_model_len,  # whatever is decided by it must hold for every step to come
            slot_mapping=self.slot_mapping[:size],
            block_table=self.block_table[:size],
            block_size=self.block_size,
        )
        return self.model(self.input_ids[:size], self.positions[:size], metadata)
