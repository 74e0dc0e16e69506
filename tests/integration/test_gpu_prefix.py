"""On a GPU: what is found in the prefix cache says what is computed anew, with recorded steps and with flash-attn.

A prompt whose beginning is found is computed in other pieces than one that is new, and a GPU rounds them otherwise. So
tokens are judged by the oracle, which lets a near-tie fall either way, and logits in bfloat16 are compared by norm.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from ..checkpoints import VOCAB_SIZE
from ..conftest import ROOT, CheckpointPath, GetOracle, submodule
from ..unit.test_cache import caches
from ..unit.test_prefix_cache import make_seq
from .test_gpu_graphs import Counting, Requests, cuda_memory, generate, graphs_of, open_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.since("m6")]

__all__ = ["cuda_memory"]  # a fixture, for this file as well

SHAPE = ROOT / "folovllm" / "models" / "shapes" / "Qwen3-0.6B"
# ‖a - b‖ / ‖b‖ of logits or hidden states in bfloat16; of unrelated ones it is more than 1.
TOLERANCE = 5e-2


def random_tokens(num: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    ids: list[int] = torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


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


def make_check(stage: ModuleType, oracle: Any, requests: Requests) -> Callable[[list[list[list[int]]]], None]:
    """A judge of `requests`' tokens, who looks at each text once."""
    right: set[tuple[int, tuple[int, ...]]] = set()

    def check(tokens: list[list[list[int]]]) -> None:
        for number, ((prompt, arguments), (token_ids,)) in enumerate(zip(requests, tokens, strict=True)):
            if (number, tuple(token_ids)) not in right:
                assert len(token_ids) == arguments["max_tokens"]
                oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))
                right.add((number, tuple(token_ids)))

    return check


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("checkpoint", ["qwen3", "llama_bias"])
def test_off_cold_warm_and_evicting(
    stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle, checkpoint: str
) -> None:
    requests, folder = make_family(14), checkpoint_path(checkpoint)
    check = make_check(stage, get_oracle(checkpoint), requests)
    options = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96}
    with open_gpu(stage, folder, enable_prefix_caching=False, **options) as llm:
        check(generate(stage, llm, requests))
        assert llm.engine.stats.steps[-1].prefix_cache_hits == 0
    with open_gpu(stage, folder, **options) as llm:
        for _ in range(2):
            check(generate(stage, llm, requests))
        last = llm.engine.stats.steps[-1]
        assert last.prefix_cache_hit_rate > 0.5 and last.num_copied_blocks > 0
    with open_gpu(stage, folder, num_kv_blocks=16, **options) as llm:
        for _ in range(2):
            check(generate(stage, llm, requests))
        last = llm.engine.stats.steps[-1]
        assert last.num_preemptions > 0 and last.prefix_cache_evictions > 0
        llm.engine.core.scheduler.kv_cache_manager.block_pool.check_integrity([])


def test_recordings_read_what_was_found(
    stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded decodes, and prompts in pieces: of most prompts only an end is new, then of all only the last token."""
    first = make_family(14)
    requests = [(prompt + random_tokens(10 + 3 * i, i), arguments) for i, (prompt, arguments) in enumerate(first)]
    check = make_check(stage, get_oracle("qwen3"), requests)
    options = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96, "cuda_graph_sizes": [1, 2, 5]}
    with open_gpu(stage, checkpoint_path("qwen3"), **options) as llm:
        generate(stage, llm, first)
        counting, graphs, played = Counting(llm, monkeypatch), graphs_of(llm), []
        replay = graphs.replay

        def noting(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
            played.append(len(input_ids))
            hidden: torch.Tensor = replay(input_ids, positions, metadata)
            return hidden

        monkeypatch.setattr(graphs, "replay", noting)
        num_steps, before = len(llm.engine.stats.steps), llm.engine.stats.steps[-1]
        check(generate(stage, llm, requests))
        middle = len(llm.engine.stats.steps)
        check(generate(stage, llm, requests))
        steps = llm.engine.stats.steps[num_steps:]
        assert len(played) == len(steps), "every step was played"
        one_each = [step for step in steps if step.num_tokens == len(step.seq_ids)]
        assert counting.replays.total() == len(one_each)
        assert any(step.phase != "decode" for step in one_each), "a prompt of which a token is left is like a decode"
        assert sum(step.num_tokens > len(step.seq_ids) for step in steps[: middle - num_steps]) > 5
        hits = steps[-1].prefix_cache_hits - before.prefix_cache_hits
        assert hits > sum(len(prompt) for prompt, _ in requests)


@pytest.mark.parametrize("block_size", [None, 16])
def test_flash_and_recordings_after_hits(
    stage: ModuleType, checkpoint_path: CheckpointPath, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of steps behind what was found, played in pieces, beside the same steps launched one by one."""
    pytest.importorskip("flash_attn")
    text, own = random_tokens(300, 7), random_tokens(200, 8)
    requests: Requests = []
    for number in range(14):
        prompt = text[: 100 + 13 * number] + own[number : number + 10 + 5 * number]
        arguments = {"temperature": 0.0, "max_tokens": 4 + 2 * number, "ignore_eos": True}
        requests.append((prompt, arguments))
    options: dict[str, Any] = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96}
    options |= {"dtype": "bfloat16", "attention_backend": "flash", "block_size": block_size, "max_model_len": 512}
    errors = []
    with open_gpu(stage, checkpoint_path("qwen3"), **options) as llm:
        params = stage.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate([text], params, use_tqdm=False)
        graphs, model = graphs_of(llm), llm.engine.worker.model
        replay = graphs.replay

        def compare(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
            played: torch.Tensor = replay(input_ids, positions, metadata).clone()
            metadata.shared = None
            with torch.inference_mode():
                expected = model(input_ids, positions, metadata)  # writes the same keys and values again
            errors.append(relative_error(played, expected))
            return played

        monkeypatch.setattr(graphs, "replay", compare)
        tokens = generate(stage, llm, requests)
        assert [len(token_ids) for (token_ids,) in tokens] == [4 + 2 * number for number in range(14)]
        last = llm.engine.stats.steps[-1]
        assert "mixed" in {step.phase for step in llm.engine.stats.steps}
        assert last.prefix_cache_hits > 0.5 * last.prefix_cache_queries and last.num_copied_blocks > 0
    assert len(errors) > 20
    assert max(errors) < TOLERANCE


def record_logits(stage: ModuleType, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Rows of logits of every step from now on, [S, V] each, on the host."""
    rows: list[torch.Tensor] = []
    model_class = submodule(stage, "model_executor.models.llama").LlamaForCausalLM
    compute_logits = model_class.compute_logits

    def recording(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = compute_logits(self, hidden)
        rows.append(logits.float().cpu())
        return logits

    patch.setattr(model_class, "compute_logits", recording)
    return rows


def check_hit_against_miss(
    stage: ModuleType, llm: Any, rows: list[torch.Tensor], text: list[int], other: list[int], num_cached: int
) -> None:
    """Logits of `other` from an empty cache, and after `text` of which `num_cached` tokens are found.

    Later rows are compared as long as both have said the same tokens. Rows for other texts are far away, so that an
    error in what was found could not hide.
    """
    params = stage.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    results = []
    for before in ([], [text]):
        assert llm.reset_prefix_cache()
        llm.generate(before, params, use_tqdm=False)
        rows.clear()
        (output,) = llm.generate([other], params, use_tqdm=False)
        assert all(row.shape[0] == 1 for row in rows) and len(rows) == 4
        results.append((output.num_cached_tokens, output.token_ids, torch.cat(rows)))
    (miss_cached, miss_tokens, miss), (hit_cached, hit_tokens, hit) = results
    assert (miss_cached, hit_cached) == (0, num_cached)
    num_equal = 1
    while num_equal < 4 and miss_tokens[:num_equal] == hit_tokens[:num_equal]:
        num_equal += 1
    errors = [relative_error(a, b) for a, b in zip(hit[:num_equal], miss[:num_equal], strict=True)]
    assert max(errors) < TOLERANCE
    rows.clear()
    llm.generate([other[-2::-1] + other[-1:]], params, use_tqdm=False)
    assert relative_error(rows[0][0], miss[0]) > 4 * TOLERANCE, "another text before the last token"


CASES = {
    # how many tokens are shared, and how many follow: how many are found in blocks of 256, and of 16
    (150, 40): (150, 150),
    (256, 1): (256, 256),
    (256, 0): (255, 255),
    (300, 40): (256, 300),
    (40, 200): (40, 40),
}


@pytest.mark.parametrize("block_size", [None, 16])
def test_flash_after_a_hit(
    stage: ModuleType, checkpoint_path: CheckpointPath, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks, parts of one, both, and a prompt of which only the last token is left, in bfloat16."""
    pytest.importorskip("flash_attn")
    text, own = random_tokens(500, 5), random_tokens(200, 6)
    options: dict[str, Any] = {"dtype": "bfloat16", "attention_backend": "flash", "block_size": block_size}
    rows = record_logits(stage, monkeypatch)
    with open_gpu(stage, checkpoint_path("qwen3"), max_model_len=512, **options) as llm:
        assert llm.config.block_size == (block_size or 256)
        for (num_shared, num_own), found in CASES.items():
            other = text[:num_shared] + own[:num_own]
            check_hit_against_miss(stage, llm, rows, text, other, found[block_size is not None])
        assert llm.engine.stats.steps[-1].num_copied_blocks > 0


def test_flash_after_a_hit_at_the_size_of_a_real_model(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-0.6B's shape with random weights: 1,000 tokens of 1,200 are found, 232 of them by a copy."""
    pytest.importorskip("flash_attn")
    text = random_tokens(1100, 1, 150_000)
    other = text[:1000] + random_tokens(200, 2, 150_000)
    rows = record_logits(stage, monkeypatch)
    sizes = {"max_model_len": 2048, "num_kv_blocks": 40, "max_num_seqs": 8, "attention_backend": "flash"}
    with stage.LLM(SHAPE, load_format="dummy", device="cuda", dtype="bfloat16", **sizes) as llm:
        assert llm.config.block_size == 256
        check_hit_against_miss(stage, llm, rows, text, other, 1000)
        assert llm.engine.stats.steps[-1].num_copied_blocks == 1


@pytest.mark.parametrize(("dtype", "backend"), [("float32", "paged"), ("bfloat16", "flash")])
def test_copies_of_blocks(stage: ModuleType, checkpoint_path: CheckpointPath, dtype: str, backend: str) -> None:
    """To the bit, up to where prompts part, in all layers; and blocks that take each other's place."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    text = random_tokens(300, 9)
    others = [[*text[:200], (text[200] + 1 + number) % VOCAB_SIZE, *text[50:100]] for number in range(3)]
    options: dict[str, Any] = {"dtype": dtype, "attention_backend": backend, "block_size": 256, "num_kv_blocks": 8}
    params = stage.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with open_gpu(stage, checkpoint_path("qwen3"), max_model_len=512, **options) as llm:
        for cache in caches(stage, llm):
            cache.zero_()  # what nobody has written might be nan, which is not equal to itself
        llm.generate([text], params, use_tqdm=False)
        manager = llm.engine.core.scheduler.kv_cache_manager
        (source,) = manager.get_computed_blocks(make_seq(stage, "?", others[0])).block_ids
        before = [cache[256 * source : 256 * (source + 1)].clone() for cache in caches(stage, llm)]
        for number, prompt in enumerate(others):
            llm.engine.add_request(f"{number}", prompt, params)
        llm.engine.step()
        tables = [seq.block_table for seq in llm.engine.core.scheduler.running]
        assert len({table[0] for table in tables} | {source}) == 4
        for cache, expected in zip(caches(stage, llm), before, strict=True):
            assert torch.equal(cache[256 * source : 256 * (source + 1)], expected), "the source is as it was"
            for table in tables:
                copy = cache[256 * table[0] : 256 * (table[0] + 1)]
                assert torch.equal(copy[:200], expected[:200])
                assert not torch.equal(copy[200], expected[200])
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        old = [cache.clone() for cache in caches(stage, llm)]
        with torch.inference_mode():
            submodule(stage, "attention.ops").copy_blocks(caches(stage, llm), [(0, 1), (1, 2), (2, 0)], 256)
        for cache, was in zip(caches(stage, llm), old, strict=True):
            assert torch.equal(cache[: 3 * 256], torch.cat([was[2 * 256 : 3 * 256], was[: 2 * 256]]))
            assert torch.equal(cache[3 * 256 : -1], was[3 * 256 : -1])


def test_hits_copies_and_evictions_take_no_memory(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """The tensors that are alive after many rounds are those that were after two."""
    requests = make_family(14)
    options = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96, "num_kv_blocks": 24}
    with open_gpu(stage, checkpoint_path("qwen3"), **options) as llm:
        taken = []
        for number in range(8):
            generate(stage, llm, requests)
            if number % 4 == 0:
                assert llm.reset_prefix_cache()
            torch.cuda.synchronize()
            gc.collect()
            taken.append(torch.cuda.memory_allocated())
        last = llm.engine.stats.steps[-1]
        assert last.num_copied_blocks > 30 and last.prefix_cache_evictions > 30
    # A copy is of 16 KiB; what a step was given stays until the next one.
    assert max(taken[2:]) <= taken[1] + 2**16, taken
