"""On a GPU: an engine with packed weights says what it says with these weights unpacked, launched or recorded.

In float32 tokens are judged by transformers on the dequantised weights, which lets a near-tie fall either way. In
bfloat16 logits are compared by norm, and have to be about as near to those of float32 as unpacked weights are.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from ..checkpoints import VOCAB_SIZE
from ..conftest import ROOT, submodule
from ..oracle import Oracle
from ..quantized import Checkpoint, Scheme, quantized_parts, save_quantized
from .test_gpu_graphs import Counting, cuda_memory, generate, graphs_of, make_requests, open_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.since("m7")]

__all__ = ["cuda_memory"]  # a fixture, for this file as well

SHAPE = ROOT / "folovllm" / "models" / "shapes" / "Qwen3-0.6B"

CASES: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "groups of 128": (Scheme(), {}),
    "groups of 32, act-order": (Scheme(group_size=32, desc_act=True, sym=False, checkpoint_format="gptq_v2"), {}),
    "8 bits, biases": (Scheme(bits=8, group_size=64), {"model": "bias"}),
    "groups no kernel takes": (Scheme(group_size=16), {"model": "tied"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    checkpoints: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in checkpoints:
            scheme, options = CASES[name]
            checkpoints[name] = save_quantized(tmp_path_factory.mktemp("gpu"), scheme, **options)
        return checkpoints[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_weights_and_tokens(
    stage: ModuleType, made: Callable[[str], Checkpoint], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix to the last bit; greedy and drawn tokens, launched and recorded, alone and in batches."""
    checkpoint = made(name)
    oracle = Oracle(checkpoint.dense)
    batches = [make_requests(num, seed=num) for num in (1, 3, 8, 11)]
    for graphs in (False, True):
        options: dict[str, Any] = {"cuda_graph_sizes": [1, 2, 4, 8]} if graphs else {"enforce_eager": True}
        with open_gpu(stage, checkpoint.folder, **options) as llm:
            if not graphs:
                for part, layer, rows in quantized_parts(llm.model):
                    weight = layer.quantized.dequantize(torch.float32)[rows].cpu()
                    assert torch.equal(weight, checkpoint.matrices[part].weight()), part
            else:
                counting = Counting(llm, monkeypatch)
                assert sorted(counting.recorded) == [1, 2, 4, 8]
            for requests in batches:
                tokens = generate(stage, llm, requests)
                for (prompt, arguments), (token_ids,) in zip(requests, tokens, strict=True):
                    assert len(token_ids) == arguments["max_tokens"]
                    oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))
            if graphs:
                assert set(counting.replays) == {1, 4, 8}


@pytest.mark.parametrize("name", CASES)
def test_recordings_in_bfloat16(
    stage: ModuleType, made: Callable[[str], Checkpoint], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of every recorded decode step beside the same step launched, which writes the same keys again."""
    folder = made(name).folder
    errors: list[float] = []
    with open_gpu(stage, folder, dtype="bfloat16", cuda_graph_sizes=[1, 2, 4, 8]) as llm:
        graphs, model = graphs_of(llm), llm.engine.worker.model
        replay = graphs.replay

        def compare(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
            played: torch.Tensor = replay(input_ids, positions, metadata).clone()
            metadata.shared = None
            with torch.inference_mode():
                expected = model(input_ids, positions, metadata)
            errors.append(float((played.float() - expected.float()).norm() / expected.float().norm()))
            return played

        monkeypatch.setattr(graphs, "replay", compare)
        for num in (1, 2, 4, 7):
            tokens = generate(stage, llm, make_requests(num, seed=num))
            assert all(len(token_ids) == 12 for (token_ids,) in tokens)
    assert len(errors) >= 4 * 11
    assert max(errors) < 5e-2


@pytest.mark.parametrize("name", CASES)
def test_logits_in_bfloat16(stage: ModuleType, made: Callable[[str], Checkpoint], name: str) -> None:
    """Few tokens at a time, through the product kernel, and many, through unpacking."""
    checkpoint = made(name)
    token_ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1))
    evaluate = submodule(stage, "evaluate")
    rows: dict[tuple[str, int], torch.Tensor] = {}
    for kind, folder, dtype in (
        ("exact", checkpoint.dense, "float32"),
        ("dense", checkpoint.dense, "bfloat16"),
        ("quantised", checkpoint.folder, "bfloat16"),
    ):
        with open_gpu(stage, folder, dtype=dtype, enforce_eager=True) as llm:
            for length in (2, 20, 200):
                with torch.inference_mode(), evaluate.window_metadata(llm.model, 1, length) as (positions, metadata):
                    hidden = llm.model(token_ids[:length].cuda(), positions, metadata)
                    rows[kind, length] = llm.model.compute_logits(hidden).float().cpu()
    for length in (2, 20, 200):
        exact = rows["exact", length]
        errors = {kind: float((rows[kind, length] - exact).norm() / exact.norm()) for kind in ("dense", "quantised")}
        assert errors["quantised"] < 2 * errors["dense"] + 1e-2 < 0.4, errors


def test_the_same_tokens_again(stage: ModuleType, made: Callable[[str], Checkpoint]) -> None:
    """Sums of the kernels have a fixed order: in bfloat16 too a run repeats itself."""
    with open_gpu(stage, made("groups of 128").folder, dtype="bfloat16", enable_prefix_caching=False) as llm:
        requests = make_requests(7, max_tokens=30)
        assert generate(stage, llm, requests) == generate(stage, llm, requests)


def test_chunks_and_what_was_found(stage: ModuleType, made: Callable[[str], Checkpoint]) -> None:
    """Prompts in parts beside decodes, hits, and sequences that were put off, in float32."""
    checkpoint = made("groups of 32, act-order")
    oracle = Oracle(checkpoint.dense)
    requests = make_requests(10, max_tokens=30)
    sizes = {"max_num_seqs": 5, "max_chunk_size": 16, "max_num_batched_tokens": 48}
    for num_kv_blocks, event in ((16, "num_preemptions"), (200, "prefix_cache_hits")):
        with open_gpu(stage, checkpoint.folder, num_kv_blocks=num_kv_blocks, **sizes) as llm:
            for _ in range(2):
                for (prompt, arguments), (token_ids,) in zip(requests, generate(stage, llm, requests), strict=True):
                    oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))
            assert getattr(llm.engine.stats.steps[-1], event) > 0


@pytest.mark.exclusive
def test_memory_at_the_size_of_a_real_model(stage: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen3-0.6B's shape: what the log says is what the GPU holds."""
    taken = {}
    options: dict[str, Any] = {"load_format": "dummy", "device": "cuda", "dtype": "bfloat16", "max_model_len": 1024}
    options |= {"enforce_eager": True, "max_num_seqs": 8, "log_level": "INFO", "gpu_memory_utilization": 0.2}
    for quantization in (None, "gptq"):
        gc.collect()
        torch.cuda.empty_cache()
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, logger=stage.__name__),
            stage.LLM(SHAPE, quantization=quantization, **options) as llm,
        ):
            taken[quantization] = sum(tensor.nbytes for tensor in llm.model.parameters())
            params = stage.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
            (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
            assert len(output.token_ids) == 4
            messages = "\n".join(record.getMessage() for record in caplog.records)
        found = re.search(
            r" (\d+)\.\d MiB, bfloat16 on cuda.*\nof these, (\d+)\.\d MiB are 4-bit weights$", messages, re.M
        )
        assert (found is None) == (quantization is None), messages
        if found:
            assert found.groups() == ("515", "218")
        del llm
    assert [round(taken[kind] / 2**20) for kind in (None, "gptq")] == [1137, 515]


def test_quantising_on_a_gpu(stage: ModuleType, made: Callable[[str], Checkpoint]) -> None:
    """What was fitted there is what the tensors of the checkpoint stand for."""
    quantizer, quantization = submodule(stage, "quantize"), submodule(stage, "model_executor.layers.quantization")
    config = quantization.QuantizationConfig(4, 32, True)
    samples = torch.randint(VOCAB_SIZE, (6, 100), generator=torch.Generator().manual_seed(1))
    dense = made("groups of 128").dense
    with open_gpu(stage, dense, enforce_eager=True) as llm:
        original = {name: param.clone() for name, param in llm.model.named_parameters()}
        tensors, errors = quantizer.quantize_layers(llm.model, samples, config, use_tqdm=False)
        fitted = {name: param.cpu() for name, param in llm.model.named_parameters()}
        assert not all(torch.equal(original[name].cpu(), fitted[name]) for name in fitted)
    assert len(errors) == 8
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        leaves = {leaf: tensors[f"{path}.{leaf}"] for leaf in quantization.CHECKPOINT_TENSORS}
        leaves["g_idx"] = leaves["g_idx"][None]  # of the one matrix
        weight = quantization.build_weight(config, leaves, torch.float32)
        assert torch.equal(weight.dequantize(torch.float32), fitted[f"{path}.weight"]), path
