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
from functools import partial

import torch
from tqdm import tqdm

from ..attention.metadata import AttentionMetadata
from ..model_executor.layers.attention import Attention
from ..model_executor.models.llama import LlamaForCausalLM
from .piecewise_graph import PiecewiseGraph, capture_stream

# In a larger step the device has more to do than the host.
_MOST_TOKENS = 2304


def default_sizes(max_num_seqs: int) -> list[int]:
    """Close together where a batch is small and each row too many counts; the largest is `max_num_seqs`."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 32)]
    return [*(size for size in ladder if size < max_num_seqs), max_num_seqs]


def default_token_sizes(max_num_tokens: int) -> list[int]:
    """For steps with prompts: matrix products work in tiles of 128 rows, so that filling one up costs nothing."""
    most = -(-min(max_num_tokens, _MOST_TOKENS) // 128) * 128
    return [16, 32, 64, *range(128, most + 1, 128)]


class CUDAGraphRunner:
    """Records decode steps of a model and replays them; steps with prompts in pieces.

    Args:
        sizes: of the batches to record.
        max_model_len: of the longest sequence, in tokens.
        block_size: slots in a block.
        spare_slot: where the rows that are too many write.
        token_sizes: tokens of the steps with prompts to record.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        sizes: Iterable[int],
        max_model_len: int,
        block_size: int,
        spare_slot: int,
        token_sizes: Iterable[int] = (),
    ) -> None:
        self.model = model
        self.sizes = sorted(set(sizes))
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.spare_slot = spare_slot
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.hidden: dict[int, torch.Tensor] = {}  # [size, H], where each graph leaves them
        self.token_sizes = sorted(set(token_sizes))
        most, device = self.sizes[-1], next(model.parameters()).device
        most_tokens = max([most, *self.token_sizes])
        # What all graphs read, a graph of n rows the first n.
        self.input_ids = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        self.slot_mapping = torch.full((most_tokens,), spare_slot, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(most, -(-max_model_len // block_size), dtype=torch.int32, device=device)
        self.query_start_loc = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.piecewise: dict[int, PiecewiseGraph] = {}
        if self.token_sizes:
            layers = [module for module in model.modules() if isinstance(module, Attention)]
            q, out = layers[0].k_cache.new_zeros(2, most_tokens, layers[0].num_heads, layers[0].head_dim)
            self.piecewise = {size: PiecewiseGraph(layers, q, out) for size in self.token_sizes}

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
            for size, piecewise in self.piecewise.items():
                piecewise.run(partial(self._run, size))
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.input_ids.device)[0]
            pool, stream = torch.cuda.graph_pool_handle(), capture_stream(self.input_ids.device)
            for size in tqdm(self.token_sizes[::-1], "Capturing CUDA graphs of prompts", disable=None, leave=False):
                self.piecewise[size].run(partial(self._run, size), pool)
            for size in tqdm(self.sizes[::-1], "Capturing CUDA graphs", disable=None, leave=False):
                self.graphs[size] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[size], pool=pool, stream=stream):
                    self.hidden[size] = self._run(size)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                "no memory for CUDA graphs: give cuda_graph_sizes fewer or smaller sizes, leave more memory "
                "(gpu_memory_utilization, kv_cache_memory_bytes, num_kv_blocks), or do without (enforce_eager=True)"
            ) from error
        return free - torch.cuda.mem_get_info(self.input_ids.device)[0]

    def can_run(self, metadata: AttentionMetadata) -> bool:
        """Whether it is no larger than the largest that was recorded."""
        return self._is_recorded_decode(metadata) or len(metadata.slot_mapping) <= max(self.token_sizes, default=0)

    def _is_recorded_decode(self, metadata: AttentionMetadata) -> bool:
        return metadata.max_query_len == 1 and len(metadata.seq_lens) <= self.sizes[-1]

    def replay(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """What the model's forward would return for a step that `can_run`: [N, H], until the next replay."""
        num_tokens, (num_seqs, num_columns) = len(input_ids), metadata.block_table.shape
        is_decode = self._is_recorded_decode(metadata)
        size = next(size for size in (self.sizes if is_decode else self.token_sizes) if size >= num_tokens)
        self.input_ids[:num_tokens] = input_ids
        self.positions[:num_tokens] = positions
        self.slot_mapping[:num_tokens] = metadata.slot_mapping
        self.slot_mapping[num_tokens:size] = self.spare_slot
        if not is_decode:
            return self.piecewise[size].replay(metadata)[:num_tokens]
        self.seq_lens[:num_seqs] = metadata.seq_lens
        self.seq_lens[num_seqs:size] = 0
        self.block_table[:num_seqs, :num_columns] = metadata.block_table
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
