"""On a GPU: what is found in the prefix cache says what is computed anew, with recorded steps and with flash-attn."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, GetOracle
from .test_gpu_graphs import Requests, cuda_memory, generate, open_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.since("m6")]

__all__ = ["cuda_memory"]  # a fixture, for this file as well


def make_family(num: int) -> Requests:
    """Prompts that share beginnings of one text, cut anywhere; greedy and drawn by turns."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB_SIZE, (120,), generator=generator).tolist()
    requests: Requests = []
    for number in range(num):
        shared = int(torch.randint(20, 120, (1,), generator=generator))
        own = torch.randint(VOCAB_SIZE, (number % 5,), generator=generator).tolist()
        arguments = {"temperature": 0.5 * (number % 2), "seed": number, "max_tokens": 20, "ignore_eos": True}
        requests.append((text[:shared] + own, arguments))
    return requests


@pytest.mark.parametrize("checkpoint", ["qwen3", "llama_bias"])
def test_off_cold_warm_and_evicting(
    stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle, checkpoint: str
) -> None:
    requests, folder = make_family(14), checkpoint_path(checkpoint)
    options = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96}
    with open_gpu(stage, folder, enable_prefix_caching=False, **options) as llm:
        expected = generate(stage, llm, requests)
        assert llm.engine.stats.steps[-1].prefix_cache_hits == 0
    with open_gpu(stage, folder, **options) as llm:
        for _ in range(2):
            assert generate(stage, llm, requests) == expected
        last = llm.engine.stats.steps[-1]
        assert last.prefix_cache_hit_rate > 0.5 and last.num_copied_blocks > 0
    with open_gpu(stage, folder, num_kv_blocks=24, **options) as llm:
        for _ in range(2):
            assert generate(stage, llm, requests) == expected
        last = llm.engine.stats.steps[-1]
        assert last.num_preemptions > 0 and last.prefix_cache_evictions > 0
    for (prompt, arguments), (token_ids,) in zip(requests, expected, strict=True):
        get_oracle(checkpoint).check(prompt, token_ids, stage.SamplingParams(**arguments))


@pytest.mark.parametrize("block_size", [None, 16])
def test_flash_after_a_hit(stage: ModuleType, checkpoint_path: CheckpointPath, block_size: int | None) -> None:
    """The first token's logarithms of probabilities, computed after a hit and computed whole, in bfloat16."""
    pytest.importorskip("flash_attn")
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCAB_SIZE, (256,), generator=generator).tolist()
    other = [*text[:150], *torch.randint(VOCAB_SIZE, (40,), generator=generator).tolist()]
    options: dict[str, Any] = {"dtype": "bfloat16", "attention_backend": "flash", "block_size": block_size}
    params = stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=5)
    with open_gpu(stage, checkpoint_path("qwen3"), max_model_len=512, **options) as llm:
        (miss,) = llm.generate([other], params, use_tqdm=False)
        assert llm.reset_prefix_cache()
        llm.generate([text], params, use_tqdm=False)
        (hit,) = llm.generate([other], params, use_tqdm=False)
        assert (miss.num_cached_tokens, hit.num_cached_tokens) == (0, 150)
        assert llm.engine.stats.steps[-1].num_copied_blocks > 0
    expected, found = (output.outputs[0].logprobs[0] for output in (miss, hit))
    shared = expected.keys() & found.keys()
    assert len(shared) >= 4
    assert max(abs(expected[token].logprob - found[token].logprob) for token in shared) < 0.3
