"""GPUWorker: owns what lives on the device.

A CPU is a device too; the name is vLLM's.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..config import EngineConfig
from ..model_executor.model_loader import load_model
from ..utils.common import resolve_device, resolve_dtype, resolve_max_model_len
from .model_runner import ModelRunner


class GPUWorker:
    """Loads the model.

    Attributes:
        config: the engine's config with every None settled.

    Raises:
        ValueError: the model that was asked for cannot be had.
    """

    def __init__(self, config: EngineConfig, folder: Path, hf_config: PretrainedConfig) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, hf_config)
        self.max_model_len = resolve_max_model_len(config.max_model_len, hf_config)
        model = load_model(folder, hf_config, self.dtype, self.device, config.load_format, config.seed)
        self.config = replace(
            config,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
        )
        self.model_runner = ModelRunner(model, self.device)

    def close(self) -> None:
        """Drop the model and give its memory back."""
        del self.model_runner
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
