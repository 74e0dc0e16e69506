"""On a GPU: recorded decode steps say what steps say that are launched kernel by kernel, and what transformers says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, GetOracle

pytestmark = [pytest.mark.gpu, pytest.mark.since("m4")]

Requests = list[tuple[list[int], dict[str, Any]]]


@pytest.fixture(autouse=True)
def cuda_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def open_gpu(stage: ModuleType, folder: Any, **options: Any) -> Any:
    """An engine of paged attention in float32, as exact as it gets on a GPU."""
    sizes: dict[str, Any] = {"max_model_len": 256, "num_kv_blocks": 400, "block_size": 16, "max_num_seqs": 16}
    kind = {"device": "cuda", "dtype": "float32", "attention_backend": "paged", "log_level": "WARNING"}
    return stage.LLM(folder, **{**kind, **sizes, **options})


def make_requests(num: int, max_tokens: int = 12, staggered: bool = False, seed: int = 0) -> Requests:
    """Greedy and drawn by turns; `staggered` ones end one after the other."""
    generator = torch.Generator().manual_seed(seed)
    requests: Requests = []
    for number in range(num):
        length = int(torch.randint(1, 100, (1,), generator=generator))
        prompt = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        arguments = {"temperature": 0.5 * (number % 2), "seed": 100 * seed + number, "ignore_eos": True}
        requests.append((prompt, {**arguments, "max_tokens": max_tokens + (2 * number if staggered else 0)}))
    return requests


def generate(stage: ModuleType, llm: Any, requests: Requests) -> list[list[list[int]]]:
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def graphs_of(llm: Any) -> Any:
    return llm.engine.worker.model_runner.cuda_graphs


class Counting:
    """How often each recording is played."""

    def __init__(self, llm: Any, patch: pytest.MonkeyPatch) -> None:
        self.replays: Counter[int] = Counter()
        runner = graphs_of(llm)
        self.recorded = dict(runner.graphs)
        for size, graph in self.recorded.items():
            patch.setitem(runner.graphs, size, Counted(graph, self.replays, size))


class Counted:
    def __init__(self, graph: Any, replays: Counter[int], size: int) -> None:
        self.graph, self.replays, self.size = graph, replays, size

    def replay(self) -> None:
        self.replays[self.size] += 1
        self.graph.replay()


@pytest.mark.parametrize("checkpoint", ["qwen3", "llama_bias", "qwen2_tied"])
def test_every_batch_size(
    stage: ModuleType,
    checkpoint_path: CheckpointPath,
    get_oracle: GetOracle,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 to 9 sequences with recordings of 1, 2, 4 and 8: padded, exact, and beyond the largest."""
    folder, oracle = checkpoint_path(checkpoint), get_oracle(checkpoint)
    batches = [make_requests(num, seed=num) for num in range(1, 10)]
    with open_gpu(stage, folder, enforce_eager=True) as llm:
        assert graphs_of(llm) is None
        expected = [generate(stage, llm, requests) for requests in batches]
    with open_gpu(stage, folder, cuda_graph_sizes=[8, 1, 4, 2]) as llm:
        counting = Counting(llm, monkeypatch)
        assert sorted(counting.recorded) == [1, 2, 4, 8]
        for num, requests, tokens in zip(range(1, 10), batches, expected, strict=True):
            counting.replays.clear()
            assert generate(stage, llm, requests) == tokens, f"{num} sequences"
            size = min((size for size in (1, 2, 4, 8) if size >= num), default=None)
            assert dict(counting.replays) == ({} if size is None else {size: 11}), "the first token is the prompt's"
        assert len(graphs_of(llm).graphs) == 4, "recorded again"
    for requests, tokens in zip(batches, expected, strict=True):
        for (prompt, arguments), (token_ids,) in zip(requests, tokens, strict=True):
            oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))


def test_batches_that_shrink(
    stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default sizes, 20 sequences of which one after the other ends, and then as many others behind them."""
    requests = make_requests(20, staggered=True) + make_requests(20, seed=1)
    sizes = {"max_num_seqs": 20, "num_kv_blocks": 600}
    with open_gpu(stage, checkpoint_path("qwen3"), enforce_eager=True, **sizes) as llm:
        expected = generate(stage, llm, requests)
    with open_gpu(stage, checkpoint_path("qwen3"), **sizes) as llm:
        counting = Counting(llm, monkeypatch)
        assert sorted(counting.recorded) == [1, 2, 4, 8, 16, 20]
        assert generate(stage, llm, requests) == expected
        assert generate(stage, llm, requests[:20]) == expected[:20]
        assert set(counting.replays) == {1, 2, 4, 8, 16, 20}
    oracle = get_oracle("qwen3")
    for (prompt, arguments), (token_ids,) in zip(requests, expected, strict=True):
        oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))


def test_who_was_preempted_comes_back(
    stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few blocks for all; siblings that share some, and options that filter what is drawn from."""
    requests = make_requests(8, max_tokens=60)
    requests[1][1].update(n=3)
    requests[2][1].update(repetition_penalty=1.3, logprobs=2)
    requests[3][1].update(top_p=0.8, min_tokens=3)
    requests[5][1].update(top_k=5, presence_penalty=0.5)
    with open_gpu(stage, checkpoint_path("qwen3"), enforce_eager=True) as llm:
        expected = generate(stage, llm, requests)
        assert llm.engine.stats.steps[-1].num_preemptions == 0
    with open_gpu(stage, checkpoint_path("qwen3"), num_kv_blocks=30) as llm:
        counting = Counting(llm, monkeypatch)
        assert generate(stage, llm, requests) == expected
        assert llm.engine.stats.steps[-1].num_preemptions > 0
        assert counting.replays.total() > 60
    oracle = get_oracle("qwen3")
    for (prompt, arguments), completions in zip(requests, expected, strict=True):
        if "n" not in arguments:
            oracle.check(prompt, completions[0], stage.SamplingParams(**arguments))


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_in_half_precision(
    stage: ModuleType, checkpoint_path: CheckpointPath, dtype: str, block_size: int | None
) -> None:
    """The very same kernels where a batch has the size of a recording and texts are short: the same tokens exactly.

    Longer ones are split otherwise in a recording, and padded ones multiplied otherwise: right too, but not the same.
    """
    pytest.importorskip("flash_attn")
    options: dict[str, Any] = {"dtype": dtype, "attention_backend": "flash", "block_size": block_size}
    batches = [[(prompt[:40], arguments) for prompt, arguments in make_requests(num, seed=num)] for num in (1, 2, 4, 8)]
    tokens = []
    for enforce_eager in (True, False):
        with open_gpu(stage, checkpoint_path("qwen3"), enforce_eager=enforce_eager, **options) as llm:
            assert llm.config.block_size == (block_size or 256)
            assert (graphs_of(llm) is None) == enforce_eager
            tokens.append([generate(stage, llm, requests) for requests in batches])
    assert tokens[0] == tokens[1]


def test_naive_is_never_recorded(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    requests = make_requests(3)
    with open_gpu(stage, checkpoint_path("qwen3"), attention_backend="naive", cuda_graph_sizes=[4]) as llm:
        assert graphs_of(llm) is None
        tokens = generate(stage, llm, requests)
    with open_gpu(stage, checkpoint_path("qwen3"), cuda_graph_sizes=[4]) as llm:
        assert generate(stage, llm, requests) == tokens


def test_a_replay_does_not_wait_for_the_device(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole decode step only the drawn tokens are waited for."""
    with open_gpu(stage, checkpoint_path("qwen3"), cuda_graph_sizes=[4]) as llm:
        runner = llm.engine.worker.model_runner
        graphs, num_replays = runner.cuda_graphs, 0
        replay = graphs.replay

        def strict_replay(*arguments: Any) -> Any:
            nonlocal num_replays
            if arguments[2].max_query_len > 1:  # prompts, whose naive attention waits
                return replay(*arguments)
            num_replays += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return replay(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(graphs, "replay", strict_replay)
        prepare = runner.input_batch.prepare_inputs

        def strict_prepare(scheduled: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return prepare(scheduled)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(runner.input_batch, "prepare_inputs", strict_prepare)
        generate(stage, llm, make_requests(3))
        assert num_replays == 11
