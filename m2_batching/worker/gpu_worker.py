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
from transformers import PretrainedConfig

from ..config import EngineConfig
from ..model_executor.layers.attention import Attention
from ..model_executor.model_loader import load_model
from ..utils.common import resolve_device, resolve_dtype, resolve_max_model_len
from .input_batch import InputBatch
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

_CPU_CACHE_LIMIT = 4 * 2**30
_DEFAULT_NUM_SEQS = {"cpu": 16, "cuda": 256}
_DEFAULT_NUM_BATCHED_TOKENS = 8192
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
        self.dtype = resolve_dtype(config.dtype, hf_config)
        longest = resolve_max_model_len(config.max_model_len, hf_config)
        model = load_model(folder, hf_config, self.dtype, self.device, config.load_format, config.seed)
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        self.max_model_len, max_num_seqs = self._fit_cache(config, longest, kv_bytes_per_token(layers, self.dtype))
        self.num_slots = max_num_seqs * self.max_model_len  # a row, and so a block, for each sequence
        self._initialize_kv_cache(layers)
        self.config = replace(
            config,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens
            or max(self.max_model_len, max_num_seqs, _DEFAULT_NUM_BATCHED_TOKENS),
        )
        input_batch = InputBatch(max_num_seqs, 1, self.max_model_len, hf_config.vocab_size, self.device)
        self.model_runner = ModelRunner(model, input_batch)

    def _fit_cache(self, config: EngineConfig, longest: int, bytes_per_token: int) -> tuple[int, int]:
        """max_model_len and max_num_seqs: what was asked for, and otherwise the most that memory has rows for."""
        available = available_memory(self.device)
        budget = config.kv_cache_memory_bytes or default_cache_memory(self.device, available)
        if budget > available:
            raise ValueError(
                f"kv_cache_memory_bytes={budget} is more than the {available} bytes that are free on {self.device}: "
                "lower it"
            )
        rows, length = config.max_num_seqs or 1, config.max_model_len or 2  # the least that will do
        if config.kv_cache_memory_bytes is None:  # what was asked for may take more than we would take ourselves
            budget = min(available, max(budget, rows * length * bytes_per_token))
        fits = budget // bytes_per_token
        if fits < 2:
            raise ValueError(
                f"no memory for a KV cache: a token takes {bytes_per_token} bytes, and there are {budget}; raise "
                "kv_cache_memory_bytes, or free memory"
            )
        if fits < rows * length:
            raise ValueError(
                f"max_model_len={length} × max_num_seqs={rows} needs {rows * length * bytes_per_token} bytes of KV "
                f"cache, and there are {budget}: lower them until their product is at most {fits}"
            )
        max_num_seqs, max_model_len = config.max_num_seqs, config.max_model_len
        if max_num_seqs is None:
            most = min(_DEFAULT_NUM_SEQS[self.device.type], config.max_num_batched_tokens or fits)
            # Rather a few rows that are long enough than many short ones.
            max_num_seqs = min(most, max(1, fits // (max_model_len or min(longest, _COMFORTABLE_MODEL_LEN))))
        if max_model_len is None:
            max_model_len = min(longest, fits // max_num_seqs, config.max_num_batched_tokens or longest)
            if max_model_len < longest:
                logger.info("max_model_len lowered from %s to %s", f"{longest:,}", f"{max_model_len:,}")
        return max_model_len, max_num_seqs

    def _initialize_kv_cache(self, layers: list[Attention]) -> None:
        """Give every attention layer its slots, and one more that takes what nobody reads.

        They are not cleared: no slot is read before it is written, and only what is written takes memory on a CPU.
        """
        for layer in layers:
            shape = (self.num_slots + 1, layer.num_kv_heads, layer.head_dim)
            layer.k_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
            layer.v_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        total = self.num_slots * kv_bytes_per_token(layers, self.dtype)
        rows, length = self.num_slots // self.max_model_len, f"{self.max_model_len:,}"
        logger.info("KV cache: %d rows of %s slots × %d layers = %.0f MiB", rows, length, len(layers), total / 2**20)

    def close(self) -> None:
        """Drop model and cache and give the memory back."""
        del self.model_runner
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def kv_bytes_per_token(layers: list[Attention], dtype: torch.dtype) -> int:
    """Bytes of key and value that one token leaves in all layers together."""
    return sum(2 * layer.num_kv_heads * layer.head_dim * dtype.itemsize for layer in layers)


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_cache_memory(device: torch.device, available: int) -> int:
    """What the cache may take unless told otherwise: most of a GPU, a modest part of a computer with other work."""
    return int(available * 0.8) if device.type == "cuda" else min(available // 4, _CPU_CACHE_LIMIT)
