"""Qwen2 (and 2.5) and Qwen3: the Llama decoder with biases on q, k and v, or with norms on q and k."""

from __future__ import annotations

from transformers import PretrainedConfig

from .llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 technical report: arXiv 2407.10671."""

    @staticmethod
    def attention_options(config: PretrainedConfig) -> dict[str, bool]:
        return {"qkv_bias": True, "o_bias": False, "qk_norm": False}


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 technical report: arXiv 2505.09388."""

    @staticmethod
    def attention_options(config: PretrainedConfig) -> dict[str, bool]:
        return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "qk_norm": True}
