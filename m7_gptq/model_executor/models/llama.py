"""The Llama decoder (Touvron et al. 2023, arXiv 2302.13971), from which the other models differ in details only.

Shapes: T tokens of any number of sequences lie flat in one dimension, H is hidden_size, V the vocabulary. Module
names are the checkpoint's, so that a tensor's name says where it belongs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from ...attention.metadata import AttentionMetadata
from ..layers.activation import silu_and_mul
from ..layers.attention import Attention
from ..layers.layernorm import RMSNorm
from ..layers.linear import Linear, MergedLinear
from ..layers.rotary_embedding import RotaryEmbedding, Rotation


class LlamaAttention(nn.Module):
    """Projections around `Attention`.

    Args:
        qkv_bias, o_bias: whether these projections add a bias.
        qk_norm: whether every head of q and k is normalised.
    """

    def __init__(self, config: PretrainedConfig, *, qkv_bias: bool, o_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        head_dim = get_head_dim(config)
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv_proj = MergedLinear(config.hidden_size, [q_size, kv_size, kv_size], bias=qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=o_bias)
        # Registered here before `Attention` has them too, so that their names are the checkpoint's.
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.attn = Attention(num_heads, num_kv_heads, head_dim, self.q_norm, self.k_norm)

    def forward(self, rotation: Rotation, hidden: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.output_sizes, dim=-1)
        return self.o_proj(self.attn(rotation, q, k, v, metadata))


class LlamaMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(config.hidden_size, [config.intermediate_size] * 2, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(hidden)))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, self_attn: LlamaAttention) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config, bias=getattr(config, "mlp_bias", False))

    def forward(
        self, rotation: Rotation, hidden: torch.Tensor, residual: torch.Tensor, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream is what came in as `hidden + residual`, and goes out the same way."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(rotation, hidden, metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaModel(nn.Module):
    def __init__(self, config: PretrainedConfig, attention: dict[str, bool]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(get_head_dim(config), config.max_position_embeddings, config.rope_parameters)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, LlamaAttention(config, **attention)) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)  # [T, H]
        rotation = self.rotary_emb(positions)
        residual = torch.zeros_like(hidden)
        for layer in self.layers:
            hidden, residual = layer(rotation, hidden, residual, metadata)
        return self.norm(hidden, residual)[0]


class LlamaForCausalLM(nn.Module):
    """Llama 2 and 3. Build it on the meta device; the loader gives it memory and weights.

    Raises:
        ValueError: the config asks for something that is not implemented (see `check_config`).
    """

    # Our module: the checkpoint's modules that are stacked in it, in order.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.model = LlamaModel(config, self.attention_options(config))
        # A tied head is the embedding itself: no tensor of its own, neither here nor in the checkpoint.
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @staticmethod
    def attention_options(config: PretrainedConfig) -> dict[str, bool]:
        """How this architecture's attention differs from the others': arguments of LlamaAttention."""
        return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "qk_norm": False}

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """input_ids [T], positions [T] -> hidden states [T, H] after the last norm."""
        return self.model(input_ids, positions, metadata)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H] of the rows where a token is wanted -> logits [N, V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.model.embed_tokens.weight)


def get_head_dim(config: PretrainedConfig) -> int:
    """Given by the config, or hidden_size divided among the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_config(config: PretrainedConfig) -> None:
    """Refuse, by name, what would otherwise run and give wrong tokens.

    Raises:
        ValueError: an activation or attention pattern that is not implemented.
    """
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; supported is 'silu'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError("sliding-window attention is not supported; set use_sliding_window to false in config.json")
