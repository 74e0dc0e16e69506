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
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

_CPU_CACHE_LIMIT = 4 * 2**30


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
        self.max_model_len = self._fit_max_model_len(config, longest, kv_bytes_per_token(layers, self.dtype))
        self.num_slots = self.max_model_len  # one row, and so one block, is the whole cache
        self._initialize_kv_cache(layers)
        self.config = replace(
            config,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
        )
        self.model_runner = ModelRunner(model, self.num_slots, self.device)

    def _fit_max_model_len(self, config: EngineConfig, max_model_len: int, bytes_per_token: int) -> int:
        """The longest sequence whose keys and values fit in memory, up to `max_model_len`."""
        available = available_memory(self.device)
        budget = config.kv_cache_memory_bytes or default_cache_memory(self.device, available)
        if budget > available:
            raise ValueError(
                f"kv_cache_memory_bytes={budget} is more than the {available} bytes that are free on {self.device}: "
                "lower it"
            )
        if config.max_model_len is not None and config.kv_cache_memory_bytes is None:
            budget = available  # what was asked for may take more than we would take ourselves
        fits = budget // bytes_per_token
        if fits < 2:
            raise ValueError(
                f"no memory for a KV cache: a token takes {bytes_per_token} bytes, and there are {budget}; raise "
                "kv_cache_memory_bytes, or free memory"
            )
        if config.max_model_len is not None and fits < max_model_len:
            raise ValueError(
                f"max_model_len={max_model_len} needs {max_model_len * bytes_per_token} bytes of KV cache, and there "
                f"are {budget}: lower it to at most {fits}, or raise kv_cache_memory_bytes"
            )
        if fits < max_model_len:
            logger.info("max_model_len lowered from %s to %s to fit in memory", f"{max_model_len:,}", f"{fits:,}")
        return min(max_model_len, fits)

    def _initialize_kv_cache(self, layers: list[Attention]) -> None:
        """Give every attention layer its slots, and one more that takes what nobody reads.

        They are not cleared: no slot is read before it is written, and only what is written takes memory on a CPU.
        """
        for layer in layers:
            shape = (self.num_slots + 1, layer.num_kv_heads, layer.head_dim)
            layer.k_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
            layer.v_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        total = self.num_slots * kv_bytes_per_token(layers, self.dtype)
        logger.info("KV cache: %s slots × %d layers = %.0f MiB", f"{self.num_slots:,}", len(layers), total / 2**20)

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
