"""The layers one by one, against transformers, torch, or the formula written out."""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..checkpoints import SPECS, VOCAB_SIZE
from ..conftest import GetOracle, MakeLLM, submodule
from ..inside import attention
from ..oracle import LOGIT_TOLERANCE


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- norm and activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 16)])
def test_rms_norm(stage: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layernorm = submodule(stage, "model_executor.layers.layernorm")
    ours, theirs = layernorm.RMSNorm(shape[-1], eps=1e-2), LlamaRMSNorm(shape[-1], eps=1e-2)
    weight = randn(shape[-1], seed=1).to(dtype)
    for norm in (ours, theirs):
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    # An eps that matters, and in bfloat16 one rounding, of the result, and no more.
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    x = (randn(*shape) * 0.1 + torch.linspace(0, 30, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    before = x.clone()
    theirs.weight.data = weight.float()
    torch.testing.assert_close(ours(x).float(), theirs(x.float()), atol=1e-6, rtol=rtol)
    residual = randn(*shape, seed=2).to(dtype)
    normed, stream = ours(x, residual.clone())
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(normed.float(), theirs((x + residual).float()), atol=1e-6, rtol=rtol)
    assert torch.equal(x, before)


def test_silu_and_mul(stage: ModuleType) -> None:
    gate, up = randn(3, 2, 8), randn(3, 2, 8, seed=1)
    silu_and_mul = submodule(stage, "model_executor.layers.activation").silu_and_mul
    torch.testing.assert_close(silu_and_mul(torch.cat([gate, up], dim=-1)), gate * torch.sigmoid(gate) * up)


# ---------------------------------------------------------------------- rotary embedding

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large_theta": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": LLAMA3,
    "llama3_small": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("head_dim", [16, 24, 128])
@pytest.mark.parametrize("rope", ROPES)
# An angle of thousands of radians moves by 2e-4 if the last bit of its frequency was rounded differently.
@pytest.mark.parametrize(("positions", "atol"), [([0, 1, 2, 17, 3, 3, 255], 1e-4), ([4999, 0, 1000], 1e-3)])
def test_rotary_embedding(stage: ModuleType, rope: str, head_dim: int, positions: list[int], atol: float) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=5000,
        rope_parameters=ROPES[rope],
    )
    module = submodule(stage, "model_executor.layers.rotary_embedding")
    rotary = module.RotaryEmbedding(head_dim, 5000, ROPES[rope])
    at = torch.tensor(positions)
    q, k = randn(len(at), 4, head_dim), randn(len(at), 2, head_dim, seed=1)
    cos, sin = LlamaRotaryEmbedding(config)(q, at[None])
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rotated_q, rotated_k = module.rotate(q.clone(), k.clone(), rotary(at))
    torch.testing.assert_close(rotated_q, expected_q[0].transpose(0, 1), atol=atol, rtol=0)
    torch.testing.assert_close(rotated_k, expected_k[0].transpose(0, 1), atol=atol, rtol=0)


def test_rotation_depends_on_distance_alone(stage: ModuleType) -> None:
    module = submodule(stage, "model_executor.layers.rotary_embedding")
    rotary = module.RotaryEmbedding(32, 600, ROPES["llama3_small"])
    q, k = randn(1, 1, 32), randn(1, 1, 32, seed=1)

    def score(query_position: int, key_position: int) -> float:
        rotated_q, _ = module.rotate(q, k, rotary(torch.tensor([query_position])))
        _, rotated_k = module.rotate(q, k, rotary(torch.tensor([key_position])))
        return float((rotated_q * rotated_k).sum())

    assert score(7, 3) == pytest.approx(score(504, 500), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-3)


def test_unknown_rope_type(stage: ModuleType) -> None:
    rotary_embedding = submodule(stage, "model_executor.layers.rotary_embedding")
    with pytest.raises(ValueError, match=r"'yarn' is not supported.*'llama3'"):
        rotary_embedding.RotaryEmbedding(32, 64, {"rope_type": "yarn", "rope_theta": 1e4})


# ---------------------------------------------------------------------- attention


def has_cache(stage: ModuleType) -> bool:
    names = [field.name for field in fields(submodule(stage, "attention.metadata").AttentionMetadata)]
    return "block_table" in names


def attend(stage: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The naive backend over one sequence: q [Q, H, D] are the last queries of keys k, v [K, KvH, D]."""
    given: dict[str, Any] = {
        "query_start_loc": torch.tensor([0, len(q)], dtype=torch.int32),
        "seq_lens": torch.tensor([len(k)], dtype=torch.int32),
        "max_query_len": len(q),
        "max_seq_len": len(k),
    }
    if has_cache(stage):  # the sequence in the first of two blocks, garbage in every other slot
        block_size = len(k) + 3
        k, v = (torch.cat([x, torch.full((2 * block_size + 1 - len(x), *x.shape[1:]), 1e3).to(x)]) for x in (k, v))
        given["slot_mapping"] = torch.arange(given["max_seq_len"] - len(q), given["max_seq_len"])
        given["block_table"] = torch.zeros(1, 1, dtype=torch.int32)
        given["block_size"] = block_size
    metadata = submodule(stage, "attention.metadata").AttentionMetadata(**given)
    return attention(stage, "naive")(q, k, v, metadata, scale)


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's attention; the last query stands at the last key."""
    visible = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible, scale=scale).transpose(0, 1)


@given(
    length=st.integers(1, 40),
    num_queries=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 24]),
    tile=st.sampled_from([1, 2, 3, 8, 256]),
)
def test_naive_attention(
    stage: ModuleType, length: int, num_queries: int, num_kv_heads: int, groups: int, head_dim: int, tile: int
) -> None:
    """Small tiles, so that their edges fall everywhere; with a cache, queries for the end of the sequence only."""
    q, k, v = (
        randn(length, heads, head_dim, seed=seed)
        for seed, heads in enumerate([num_kv_heads * groups, num_kv_heads, num_kv_heads])
    )
    if has_cache(stage):
        q = q[-num_queries:]
    with pytest.MonkeyPatch.context() as patch:
        naive = submodule(stage, "attention.backends.torch_naive")
        if hasattr(naive, "QUERY_TILE"):
            patch.setattr(naive, "QUERY_TILE", tile)
        else:
            patch.setitem(naive.MAX_SCORES, "cpu", tile * length)
        ours = attend(stage, q, k, v, scale=0.7)
    torch.testing.assert_close(ours, reference_attention(q, k, v, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.until("m1")  # tiles have a fixed number of rows
@pytest.mark.parametrize("length", [255, 256, 257, 513])
def test_naive_attention_around_a_tile(stage: ModuleType, length: int) -> None:
    assert submodule(stage, "attention.backends.torch_naive").QUERY_TILE == 256
    q, k, v = randn(length, 4, 8), randn(length, 2, 8, seed=1), randn(length, 2, 8, seed=2)
    torch.testing.assert_close(attend(stage, q, k, v, 0.3), reference_attention(q, k, v, 0.3), atol=1e-5, rtol=1e-5)


def test_naive_attention_in_half_precision(stage: ModuleType) -> None:
    """Right up to rounding, in the dtype that came in."""
    q, k, v = randn(64, 4, 16), randn(64, 2, 16, seed=1), randn(64, 2, 16, seed=2)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    ours = attend(stage, q, k, v, scale=0.25)
    assert ours.dtype == torch.bfloat16
    exact = reference_attention(q.float(), k.float(), v.float(), 0.25)
    torch.testing.assert_close(ours.float(), exact, atol=3e-2, rtol=3e-2)


def flat_metadata(stage: ModuleType, lens: list[int]) -> Any:
    """Sequences of these lengths, all of them new, one after the other."""
    return submodule(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.tensor([0, *accumulate(lens)], dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        max_query_len=max(lens),
        max_seq_len=max(lens),
    )


@pytest.mark.until("m0")
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_flat_sequences_do_not_see_each_other(stage: ModuleType, lengths: list[int]) -> None:
    total = sum(lengths)
    q, k, v = randn(total, 4, 8), randn(total, 2, 8, seed=1), randn(total, 2, 8, seed=2)
    metadata = flat_metadata(stage, lengths)
    together = attention(stage, "naive")(q, k, v, metadata, 0.3)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    alone = torch.cat([reference_attention(*part, scale=0.3) for part in parts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- linear layers


def test_merged_linear_is_its_parts_side_by_side(stage: ModuleType) -> None:
    linear = submodule(stage, "model_executor.layers.linear")
    sizes = [6, 2, 3]
    merged = linear.MergedLinear(4, sizes, bias=True)
    merged.requires_grad_(False)
    parts = [(randn(size, 4, seed=size), randn(size, seed=10 + size)) for size in sizes]
    for shard in (2, 0, 1):  # checkpoints have an order of their own
        weight, bias = parts[shard]
        merged.weight_loader("weight", weight, shard)
        merged.weight_loader("bias", bias, shard)
    x = randn(5, 4)
    for output, (weight, bias) in zip(merged(x).split(sizes, dim=-1), parts, strict=True):
        torch.testing.assert_close(output, x @ weight.T + bias)


def test_linear_takes_only_the_right_shape(stage: ModuleType) -> None:
    linear = submodule(stage, "model_executor.layers.linear")
    plain, merged = linear.Linear(4, 6, bias=True), linear.MergedLinear(4, [6, 2])
    for layer in (plain, merged):
        layer.requires_grad_(False)
    plain.weight_loader("weight", randn(6, 4).half(), 0)
    torch.testing.assert_close(plain.weight.data, randn(6, 4).half().float())
    cases = [(plain, "weight", (4, 6)), (plain, "weight", (1, 4)), (plain, "bias", (1,)), (merged, "weight", (8, 4))]
    for layer, name, shape in cases:
        with pytest.raises(ValueError, match=r"has shape \[.*\], the model needs \["):
            layer.weight_loader(name, torch.zeros(shape), 0)


# ---------------------------------------------------------------------- the whole model


@pytest.mark.until("m0")
@pytest.mark.parametrize("checkpoint", SPECS)
def test_several_sequences_in_one_forward(stage: ModuleType, make_llm: MakeLLM, checkpoint: str) -> None:
    llm = make_llm(checkpoint)

    @torch.inference_mode()
    def logits(sequences: list[list[int]]) -> torch.Tensor:
        lens = [len(sequence) for sequence in sequences]
        input_ids = torch.tensor([token for sequence in sequences for token in sequence])
        positions = torch.cat([torch.arange(length) for length in lens])
        return llm.model.compute_logits(llm.model(input_ids, positions, flat_metadata(stage, lens)))

    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 17, 300, 2)]
    alone = torch.cat([logits([sequence]) for sequence in sequences])
    torch.testing.assert_close(logits(sequences), alone, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("checkpoint", SPECS)
def test_the_model_has_the_checkpoints_parameters(stage: ModuleType, get_oracle: GetOracle, checkpoint: str) -> None:
    """A tied head is the embedding, and takes no memory of its own."""
    theirs = get_oracle(checkpoint).model
    with torch.device("meta"):
        ours = submodule(stage, "model_executor.models").get_model_class(theirs.config.architectures)(theirs.config)
    assert (ours.lm_head is None) == SPECS[checkpoint].options.get("tie_word_embeddings", False)
    assert sum(param.numel() for param in ours.parameters()) == theirs.num_parameters()
