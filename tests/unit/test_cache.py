"""The KV cache: what it costs, what stands in it, and that nothing is read but what was written for the sequence."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..checkpoints import SPECS
from ..conftest import CheckpointPath, GetOracle, MakeLLM, no_prefix_cache, open_llm, submodule
from ..oracle import LOGIT_TOLERANCE

pytestmark = pytest.mark.since("m1")

every_checkpoint = pytest.mark.parametrize("checkpoint", list(SPECS))
MAX_MODEL_LEN = 64

# Bytes of K and V of a token in all layers, float32: 2 · layers · KV heads · head_dim · 4.
BYTES_PER_TOKEN = {
    "qwen3": 2 * 2 * 2 * 32 * 4,
    "qwen3_tied": 2 * 2 * 1 * 16 * 4,
    "qwen2": 2 * 2 * 4 * 16 * 4,
    "qwen2_tied": 2 * 2 * 2 * 16 * 4,
    "llama3": 2 * 2 * 1 * 16 * 4,
    "llama_bias": 2 * 2 * 4 * 24 * 4,
}


def attention_layers(stage: ModuleType, llm: Any) -> list[Any]:
    attention = submodule(stage, "model_executor.layers.attention").Attention
    return [module for module in llm.engine.worker.model_runner.model.modules() if isinstance(module, attention)]


def caches(stage: ModuleType, llm: Any) -> list[torch.Tensor]:
    """K and V of every layer, [num_slots + 1, num_kv_heads, head_dim] each."""
    return [cache for layer in attention_layers(stage, llm) for cache in (layer.k_cache, layer.v_cache)]


class Steps:
    """What went through the model: for every forward pass its positions and slots."""

    def __init__(self) -> None:
        self.positions: list[list[int]] = []
        self.slots: list[list[int]] = []

    def slot_of(self) -> dict[int, int]:
        """Position -> slot; a position keeps its slot."""
        slot_of: dict[int, int] = {}
        for positions, slots in zip(self.positions, self.slots, strict=True):
            for position, slot in zip(positions, slots, strict=True):
                assert slot_of.setdefault(position, slot) == slot
        return slot_of


@contextmanager
def recorded(stage: ModuleType) -> Iterator[Steps]:
    model_class = submodule(stage, "model_executor.models.llama").LlamaForCausalLM
    forward, steps = model_class.forward, Steps()

    def recording_forward(self: Any, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
        steps.positions.append(positions.tolist())
        steps.slots.append(metadata.slot_mapping.tolist())
        hidden: torch.Tensor = forward(self, input_ids, positions, metadata)
        return hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "forward", recording_forward)
        yield steps


def greedy(stage: ModuleType, llm: Any, prompt: list[int], max_tokens: int) -> list[int]:
    params = stage.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    token_ids: list[int] = llm.generate([prompt], params, use_tqdm=False)[0].token_ids
    return token_ids


# ---------------------------------------------------------------------- what stands in it


@every_checkpoint
@given(prompt=strategies.prompts(max_size=30), max_tokens=st.integers(1, 8))
def test_the_cache_holds_the_oracles_keys_and_values(
    checkpoint: str, prompt: list[int], max_tokens: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """After rotation, in every layer, for prompt and output: but for the last token, which was never put in."""
    llm = make_llm(checkpoint, max_model_len=MAX_MODEL_LEN, **no_prefix_cache(stage))
    with recorded(stage) as steps:
        output = greedy(stage, llm, prompt, max_tokens)
    token_ids = [*prompt, *output[:-1]]
    slot_of = steps.slot_of()
    assert sorted(slot_of) == list(range(len(token_ids)))
    slots = torch.tensor([slot_of[position] for position in range(len(token_ids))])
    assert len(set(slots.tolist())) == len(token_ids)
    with torch.inference_mode():
        expected = get_oracle(checkpoint).model(torch.tensor([token_ids]), use_cache=True).past_key_values
    for layer, theirs in zip(attention_layers(stage, llm), expected.layers, strict=True):
        for ours, their in ((layer.k_cache, theirs.keys), (layer.v_cache, theirs.values)):
            torch.testing.assert_close(ours[slots], their[0].transpose(0, 1), atol=LOGIT_TOLERANCE, rtol=0)


def test_token_by_token_is_the_same_as_at_once(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN, **no_prefix_cache(stage))

    def contents(prompt: list[int], max_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        with recorded(stage) as steps:
            output = greedy(stage, llm, prompt, max_tokens)
        slot_of = steps.slot_of()
        slots = torch.tensor([slot_of[position] for position in range(len(slot_of))])
        return [*prompt, *output], [cache[slots] for cache in caches(stage, llm)]

    token_ids, slowly = contents([5, 6, 7], 20)
    again, at_once = contents(token_ids[:-1], 1)
    assert again == token_ids
    for one, other in zip(slowly, at_once, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_prefill_then_one_token_a_step(stage: ModuleType, make_llm: MakeLLM) -> None:
    with recorded(stage) as steps:
        greedy(stage, make_llm(max_model_len=MAX_MODEL_LEN), list(range(9)), 5)
    assert steps.positions == [list(range(9)), [9], [10], [11], [12]]


def test_a_decode_step_writes_one_slot(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    params = stage.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    llm.engine.add_request("a", [3, 4, 5], params)
    with recorded(stage) as steps:
        while llm.engine.has_unfinished_requests():
            before = [cache.clone() for cache in caches(stage, llm)]
            llm.engine.step()
            for old, new in zip(before, caches(stage, llm), strict=True):
                differs = old.view(torch.int32) != new.view(torch.int32)  # bit by bit: NaN is not equal to NaN
                changed = differs[:-1].flatten(1).any(1).nonzero().flatten().tolist()
                assert changed == sorted(steps.slots[-1])
    assert [len(slots) for slots in steps.slots] == [3, 1, 1, 1, 1, 1]


def test_a_slot_follows_from_block_table_and_position(stage: ModuleType) -> None:
    """block_table[sequence, position // block_size] * block_size + position % block_size."""
    compute_slot_mapping = submodule(stage, "attention.ops").compute_slot_mapping
    table = torch.tensor([[7, 2, 0], [5, 1, 3]], dtype=torch.int32)
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    positions = torch.tensor([0, 3, 4, 11, 2, 7, 8])
    slots = compute_slot_mapping(table, index, positions, 4)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [28, 31, 8, 3, 22, 7, 12]


def test_writing_scatters_and_leaves_the_rest_alone(stage: ModuleType) -> None:
    write_kv_cache = submodule(stage, "attention.ops").write_kv_cache
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    k_cache, v_cache = torch.zeros(9, 2, 4), torch.ones(9, 2, 4)
    write_kv_cache(k, v, k_cache, v_cache, torch.tensor([6, 0, 3]))
    assert torch.equal(k_cache[[6, 0, 3]], k) and torch.equal(v_cache[[6, 0, 3]], v)
    rest = [1, 2, 4, 5, 7, 8]
    assert not k_cache[rest].any() and (v_cache[rest] == 1).all()


# ---------------------------------------------------------------------- nothing else is read


@every_checkpoint
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_others_left_in_the_cache_is_not_read(
    checkpoint: str, poison: float, stage: ModuleType, make_llm: MakeLLM
) -> None:
    """Unused slots and the spare one may hold anything, even what spoils every sum."""
    llm = make_llm(checkpoint, max_model_len=MAX_MODEL_LEN, **no_prefix_cache(stage))
    requests = [([1, 2, 3], 10), (list(range(40)), 10), ([7], MAX_MODEL_LEN - 1), ([8] * 63, 1)]
    clean = [greedy(stage, llm, *request) for request in requests]
    try:
        for request, expected in zip(requests, clean, strict=True):
            for cache in caches(stage, llm):
                cache.fill_(poison)
            assert greedy(stage, llm, *request) == expected
            assert all(not cache[-1].isfinite().any() for cache in caches(stage, llm)), "the spare slot was written"
    finally:
        for cache in caches(stage, llm):
            cache.zero_()


@every_checkpoint
@pytest.mark.parametrize("part", ["k_cache", "v_cache"])
def test_a_slot_that_goes_bad_after_the_prefill_is_noticed(
    checkpoint: str, part: str, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """The mutant for decode: after the first step, one slot of one layer holds what belongs to its neighbour."""
    llm, oracle = make_llm(checkpoint, max_model_len=MAX_MODEL_LEN, **no_prefix_cache(stage)), get_oracle(checkpoint)
    params = stage.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompts = [list(range(start, start + 60, 7)) for start in (3, 100, 200, 300)]

    def outputs(corrupt: bool) -> list[list[int]]:
        results = []
        for prompt in prompts:
            with recorded(stage) as steps:
                stream = llm.stream([prompt], params)
                next(stream)
                slot_of = steps.slot_of()
                cache = getattr(attention_layers(stage, llm)[0], part)
                if corrupt:
                    cache[slot_of[2]] = cache[slot_of[1]]
                results.append(list(stream)[-1].token_ids)
        return results

    def check(results: list[list[int]]) -> None:
        for prompt, output in zip(prompts, results, strict=True):
            oracle.check(prompt, output, params)

    check(outputs(corrupt=False))
    with pytest.raises(AssertionError, match="below the best"):
        check(outputs(corrupt=True))


# ---------------------------------------------------------------------- what it costs


@every_checkpoint
@pytest.mark.until("m1")  # one sequence, so max_model_len slots
def test_reserved_bytes(checkpoint: str, stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(checkpoint, max_model_len=MAX_MODEL_LEN)
    reserved = sum(cache.nbytes for cache in caches(stage, llm))
    assert reserved == (MAX_MODEL_LEN + 1) * BYTES_PER_TOKEN[checkpoint]


@pytest.mark.since("m2")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is resident")
def test_slots_that_nobody_used_take_no_memory(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """On a CPU what is reserved is an address range: it becomes memory page by page, as it is written."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 2**29
    rows = size // (512 * BYTES_PER_TOKEN["qwen3"])
    options = {"max_model_len": 512, "max_num_seqs": rows, "kv_cache_memory_bytes": size}
    before = resident()
    with open_llm(stage, checkpoint_path("qwen3"), **options) as llm:
        assert sum(cache.nbytes for cache in caches(stage, llm)) > 0.9 * size
        assert len(greedy(stage, llm, [1, 2, 3], 5)) == 5
        assert resident() - before < size / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_in_the_models_dtype(stage: ModuleType, checkpoint_path: CheckpointPath, dtype: str) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), dtype=dtype, max_model_len=16) as llm:
        assert {cache.dtype for cache in caches(stage, llm)} == {getattr(torch, dtype)}


@pytest.mark.until("m1")
def test_the_log_says_what_is_reserved(
    stage: ModuleType, checkpoint_path: CheckpointPath, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("llama_bias"), log_level="INFO"),
    ):
        pass
    mebibytes = 512 * BYTES_PER_TOKEN["llama_bias"] / 2**20
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("KV cache")]
    assert line.startswith("KV cache: 512 slots × 2 layers = ")
    assert float(line.split("= ")[1].removesuffix(" MiB")) == pytest.approx(mebibytes, abs=0.5)


@pytest.mark.until("m1")
@pytest.mark.parametrize("num_tokens", [2, 100, 511])
def test_max_model_len_is_lowered_to_fit(
    stage: ModuleType, checkpoint_path: CheckpointPath, num_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory = num_tokens * BYTES_PER_TOKEN["qwen3"] + BYTES_PER_TOKEN["qwen3"] - 1
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=memory, log_level="INFO") as llm,
    ):
        assert llm.config.max_model_len == num_tokens
        assert len(greedy(stage, llm, [1], 1000)) == num_tokens - 1
    assert f"max_model_len lowered from 512 to {num_tokens}" in caplog.text


def test_memory_to_spare_changes_nothing(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=2**28) as llm:
        assert llm.config.max_model_len == 512
    with open_llm(stage, checkpoint_path("qwen3")) as llm:
        assert llm.config.max_model_len == 512


def test_an_explicit_max_model_len_is_never_lowered(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """It is refused, with a length that fits: that one works, and one more is refused again."""
    memory = 100 * BYTES_PER_TOKEN["qwen3"] + 17
    folder = checkpoint_path("qwen3")

    def refusal(max_model_len: int) -> str:
        with pytest.raises(ValueError, match=f"max_model_len={max_model_len} ") as error:
            open_llm(stage, folder, max_model_len=max_model_len, kv_cache_memory_bytes=memory)
        return str(error.value)

    match = re.search(r"at most ([\d,]+)", refusal(512))
    assert match
    fits = int(match[1].replace(",", ""))
    assert 2 <= fits <= 100
    with open_llm(stage, folder, max_model_len=fits, kv_cache_memory_bytes=memory) as llm:
        assert llm.config.max_model_len == fits
        assert len(greedy(stage, llm, [1], 1000)) == fits - 1
    refusal(fits + 1)


def test_no_memory_for_any_cache(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    with pytest.raises(ValueError, match="no memory for a KV cache"):
        open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=BYTES_PER_TOKEN["qwen3"] * 2 - 1)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1GB"])
def test_kv_cache_memory_bytes_is_a_positive_integer(stage: ModuleType, value: Any) -> None:
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        stage.EngineConfig(kv_cache_memory_bytes=value)
    assert stage.EngineConfig().kv_cache_memory_bytes is None
    assert stage.EngineConfig(kv_cache_memory_bytes=1).kv_cache_memory_bytes == 1
