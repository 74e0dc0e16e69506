"""GPUWorker: owns what lives on the device: the model, the memory budget and the KV cache.

A CPU is a device too; the name is vLLM's.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from ..attention.backends.paged import paged_attention
from ..attention.backends.torch_naive import naive_attention
from ..attention.metadata import AttentionMetadata
from ..config import EngineConfig
from ..model_executor.layers.attention import Attention
from ..model_executor.model_loader import load_model
from ..sample.sampler import Sampler, SamplingMetadata
from ..utils.common import resolve_device, resolve_dtype, resolve_max_model_len
from .input_batch import InputBatch
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

_CPU_CACHE_LIMIT = 4 * 2**30
_DEFAULT_NUM_SEQS = 256
_DEFAULT_NUM_BATCHED_TOKENS = 8192
_DEFAULT_BLOCK_SIZE = 16
# Without paging a sequence takes as much as the longest one might need, so its length is not chosen by what fits.
_COMFORTABLE_MODEL_LEN = 4096


class GPUWorker:
    """Loads the model and reserves the KV cache.

    Attributes:
        config: the engine's config with every None settled.

    Raises:
        ValueError: the model or the cache that was asked for cannot be had.
    """

    def __init__(self, config: EngineConfig, folder: Path, hf_config: PretrainedConfig) -> None:
        self.device = resolve_device(config.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches on the current device
        self.dtype = resolve_dtype(config.dtype, hf_config)
        positions = resolve_max_model_len(config.max_model_len, hf_config)
        model = self.model = load_model(folder, hf_config, self.dtype, self.device, config.load_format, config.seed)
        self.layers = [module for module in model.modules() if isinstance(module, Attention)]
        for layer in self.layers:
            layer.backend = naive_attention if config.attention_backend == "naive" else paged_attention
        max_num_seqs = config.max_num_seqs or min(_DEFAULT_NUM_SEQS, config.max_num_batched_tokens or _DEFAULT_NUM_SEQS)
        self.block_size, num_blocks, self.max_model_len = self._fit_cache(config, positions, max_num_seqs)
        self._initialize_kv_cache(num_blocks * self.block_size)
        self.config = replace(
            config,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=resolve_num_batched_tokens(config, self.max_model_len, max_num_seqs),
            block_size=self.block_size,
            num_kv_blocks=num_blocks,
        )
        max_blocks_per_seq = -(-self.max_model_len // self.block_size)
        size = self.num_slots * kv_bytes_per_token(self.layers, self.dtype) / 2**20
        most = num_blocks / max_blocks_per_seq
        logger.info(
            f"KV cache: {num_blocks:,} blocks of {self.block_size:,} tokens × {len(self.layers)} layers = {size:.0f} "
            f"MiB; maximum concurrency for {self.max_model_len:,} tokens per request: {most:.1f}×"
        )
        input_batch = InputBatch(max_num_seqs, max_blocks_per_seq, self.block_size, hf_config.vocab_size, self.device)
        kv_caches = [cache for layer in self.layers for cache in (layer.k_cache, layer.v_cache)]
        self.model_runner = ModelRunner(model, input_batch, kv_caches)

    def _fit_cache(self, config: EngineConfig, positions: int, max_num_seqs: int) -> tuple[int, int, int]:
        """block_size, number of blocks, and max_model_len: what was asked for, and otherwise the most that fits."""
        longest = min(positions, config.max_num_batched_tokens or positions)
        block_size = config.block_size or _DEFAULT_BLOCK_SIZE
        bytes_per_token = kv_bytes_per_token(self.layers, self.dtype)
        budget = self._cache_memory(config, -(-longest // block_size) * block_size, max_num_seqs)
        num_tokens = max(budget, 0) // bytes_per_token
        if not config.enable_paged_kv:
            if config.block_size is not None:
                raise ValueError("block_size goes with enable_paged_kv=True only: without, a block is a whole sequence")
            if config.max_model_len is None:
                longest = max(2, min(longest, _COMFORTABLE_MODEL_LEN, num_tokens))
            block_size = max(longest, min(-(-longest // 256) * 256, num_tokens))
        most = max_num_seqs * -(-longest // block_size)  # nobody could ever use more
        num_blocks = config.num_kv_blocks or min(most, num_tokens // block_size)
        fits = num_blocks * block_size
        if config.max_model_len is not None and max(fits, num_tokens) >= 2 and fits < longest:
            raise ValueError(
                f"max_model_len={longest} needs {-(-longest // block_size)} blocks of {block_size} tokens, and there "
                f"are {num_blocks}: lower it to at most {fits or num_tokens}, or raise what limits the cache "
                "(num_kv_blocks, kv_cache_memory_bytes, gpu_memory_utilization)"
            )
        if fits < 2:
            raise ValueError(
                f"no memory for a KV cache: a block of {block_size} tokens takes {block_size * bytes_per_token} bytes, "
                f"and there are {max(budget, 0)}; raise what limits the cache (num_kv_blocks, kv_cache_memory_bytes, "
                "gpu_memory_utilization), or free memory"
            )
        if fits * bytes_per_token > available_memory(self.device):
            raise ValueError(
                f"num_kv_blocks={num_blocks} of {block_size} tokens need {fits * bytes_per_token} bytes, and there are "
                f"{available_memory(self.device)}: lower it"
            )
        if min(longest, fits) < positions:
            logger.info("max_model_len lowered from %s to %s", f"{positions:,}", f"{min(longest, fits):,}")
        return block_size, num_blocks, min(longest, fits)

    def _cache_memory(self, config: EngineConfig, longest: int, max_num_seqs: int) -> int:
        """Bytes for keys and values."""
        available = available_memory(self.device)
        if config.kv_cache_memory_bytes is not None:
            if config.kv_cache_memory_bytes > available:
                raise ValueError(
                    f"kv_cache_memory_bytes={config.kv_cache_memory_bytes} is more than the {available} bytes that are "
                    f"free on {self.device}: lower it"
                )
            return config.kv_cache_memory_bytes
        if config.num_kv_blocks is not None:
            return available
        if self.device.type == "cuda":
            num_tokens = resolve_num_batched_tokens(config, longest, max_num_seqs)
            peak = self._profile_activations(num_tokens, longest, max_num_seqs)
            free, total = torch.cuda.mem_get_info(self.device)
            return int(total * config.gpu_memory_utilization) - (total - free) - peak
        budget = min(available // 4, _CPU_CACHE_LIMIT)  # a modest part of a computer with other work
        needed = longest * kv_bytes_per_token(self.layers, self.dtype)
        if config.max_model_len is not None:  # what was asked for may take more than we would take ourselves
            budget = min(available, max(budget, needed))
        return budget

    @torch.inference_mode()
    def _profile_activations(self, num_tokens: int, longest: int, max_num_seqs: int) -> int:
        """Bytes that the largest step takes beside weights and cache, found by taking one.

        A backend that pads works hardest for one sequence as long as can be among many of a single token.
        """
        lens = [1] * max_num_seqs
        for i in range(max_num_seqs):
            lens[i] += min(longest - 1, num_tokens - sum(lens))
        positions = torch.zeros(sum(lens), dtype=torch.int64, device=self.device)  # any will do
        lens_tensor = torch.tensor(lens, dtype=torch.int32, device=self.device)
        metadata = AttentionMetadata(
            query_start_loc=F.pad(lens_tensor.cumsum(0, dtype=torch.int32), (1, 0)),
            seq_lens=lens_tensor,
            max_query_len=max(lens),
            max_seq_len=max(lens),
            slot_mapping=torch.zeros_like(positions),
            block_table=torch.zeros(max_num_seqs, longest, dtype=torch.int32, device=self.device),
            block_size=1,
        )
        self._initialize_kv_cache(num_slots=1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        hidden = self.model(torch.zeros_like(positions), positions, metadata)
        logits = self.model.compute_logits(hidden[:max_num_seqs]).float()
        ones = torch.ones(max_num_seqs, device=self.device)
        sampling = SamplingMetadata(
            temperature=ones, seeds=ones.long(), positions=ones.long(), all_greedy=False, top_k=None, top_p=ones * 0.9,
            min_p=None, logit_bias=[], min_tokens=[], penalties=[], logits_processors=[], logprobs=[],
        )  # fmt: skip
        Sampler().sample(logits, sampling)
        peak = torch.cuda.max_memory_reserved(self.device) - before  # with what the allocator keeps for itself
        del hidden, logits, metadata, positions
        gc.collect()
        torch.cuda.empty_cache()
        return peak

    def _initialize_kv_cache(self, num_slots: int) -> None:
        """Give every attention layer its slots, and one more that takes what nobody reads.

        They are not cleared: no slot is read before it is written, and only what is written takes memory on a CPU.
        """
        self.num_slots = num_slots
        for layer in self.layers:
            shape = (num_slots + 1, layer.num_kv_heads, layer.head_dim)
            layer.k_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
            layer.v_cache = torch.empty(shape, dtype=self.dtype, device=self.device)

    def close(self) -> None:
        """Drop model and cache and give the memory back."""
        del self.model_runner, self.model, self.layers
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def kv_bytes_per_token(layers: list[Attention], dtype: torch.dtype) -> int:
    """Bytes of key and value that one token leaves in all layers together."""
    return sum(2 * layer.num_kv_heads * layer.head_dim * dtype.itemsize for layer in layers)


def resolve_num_batched_tokens(config: EngineConfig, max_model_len: int, max_num_seqs: int) -> int:
    """Most tokens in a step: what was asked for, and otherwise enough for the longest prompt and for all decodes."""
    return config.max_num_batched_tokens or max(max_model_len, max_num_seqs, _DEFAULT_NUM_BATCHED_TOKENS)


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
