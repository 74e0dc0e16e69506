"""Forward passes recorded in pieces, without a GPU: cut at every attention layer, played around attention.

The stand-in for a CUDA graph does what one does: it notes every operation between the beginning and the end of its
recording, and a replay does the same to the same memory, whatever it holds by then.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, open_llm, submodule

pytestmark = pytest.mark.since("m4")


@given(max_num_tokens=st.integers(1, 20_000))
def test_every_step_finds_a_size(max_num_tokens: int, stage: ModuleType) -> None:
    """Up to what a step may have, or 2,304; at most 127 tokens too many, and never twice as many from 32 on."""
    sizes = submodule(stage, "worker.cuda_graph").default_token_sizes(max_num_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= min(max_num_tokens, 2304)
    assert sizes[-1] < max(65, min(max_num_tokens, 2304) + 128)
    for num_tokens in range(17, min(max_num_tokens, 2304) + 1):
        size = next(size for size in sizes if size >= num_tokens)
        assert size - num_tokens < min(128, num_tokens)


class Noted(TorchDispatchMode):
    """Operations under way, with what they were given and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    recorded: ClassVar[list[tuple[FakeGraph, Any]]] = []
    under_way: ClassVar[list[FakeGraph]] = []

    def capture_begin(self, pool: Any) -> None:
        assert not FakeGraph.under_way, "two recordings at a time"
        FakeGraph.under_way.append(self)
        FakeGraph.recorded.append((self, pool))
        self.noted = Noted()
        self.noted.__enter__()

    def capture_end(self) -> None:
        assert FakeGraph.under_way.pop() is self
        self.noted.__exit__(None, None, None)

    def replay(self) -> None:
        assert not FakeGraph.under_way
        for func, args, kwargs, result in self.noted.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor what was changed in place
                    old.copy_(new)


@pytest.fixture
def fake_graphs(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(submodule(stage, "worker.piecewise_graph"), "capture_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(FakeGraph, "recorded", [])
    monkeypatch.setattr(FakeGraph, "under_way", [])
    return FakeGraph


def record(stage: ModuleType, llm: Any, sizes: list[int]) -> Any:
    """A runner with recordings of so many tokens and none of decode steps; the engine uses it from now on."""
    worker = llm.engine.worker
    make = submodule(stage, "worker.cuda_graph").CUDAGraphRunner
    runner = make(worker.model, [1], llm.config.max_model_len, llm.config.block_size, worker.num_slots, sizes)
    runner.sizes = [0]  # decode steps are not recorded here: they, too, are played in pieces
    with torch.inference_mode():
        for size, piecewise in runner.piecewise.items():
            piecewise.run(lambda size=size: runner._run(size))
            assert piecewise.graphs == []
            piecewise.run(lambda size=size: runner._run(size), pool="pool")
    worker.model_runner.cuda_graphs = runner
    return runner


@pytest.mark.parametrize("checkpoint", ["qwen3", "llama_bias"])
def test_an_engine_that_plays_pieces(
    stage: ModuleType, checkpoint_path: CheckpointPath, fake_graphs: type[FakeGraph], checkpoint: str
) -> None:
    """Chunks and decodes in one step, preemption, siblings, steps that are too large: the tokens of one without.

    Slots that nobody wrote hold nan.
    """
    prompts = [
        [(11 * number + at) % VOCAB_SIZE for at in range(length)] for number, length in enumerate((3, 40, 30, 1))
    ]
    params = [
        stage.SamplingParams(
            temperature=0.4 * (number % 2), seed=number, max_tokens=max_tokens, ignore_eos=True, n=1 + number % 2
        )
        for number, max_tokens in enumerate((24, 12, 20, 7))
    ]
    options: dict[str, Any] = {"max_model_len": 64, "num_kv_blocks": 6, "block_size": 16, "max_num_seqs": 4}
    has_chunks = "max_chunk_size" in stage.EngineConfig.__annotations__
    options |= {"max_chunk_size": 9, "max_num_batched_tokens": 40} if has_chunks else {}
    with open_llm(stage, checkpoint_path(checkpoint), **options) as llm:
        expected = [[o.token_ids for o in output.outputs] for output in llm.generate(prompts, params, use_tqdm=False)]
    with open_llm(stage, checkpoint_path(checkpoint), **options) as llm:
        backend, layers = llm.engine.worker.backend, llm.engine.worker.layers
        for layer in layers:
            layer.k_cache.fill_(math.nan)
            layer.v_cache.fill_(math.nan)
        runner = record(stage, llm, [16, 2, 8])
        assert all(layer.backend is backend for layer in layers), "attention is back"
        assert sorted(runner.piecewise) == [2, 8, 16]
        assert len(fake_graphs.recorded) == 3 * (len(layers) + 1), "a piece before, between and after the layers"
        assert {pool for _, pool in fake_graphs.recorded} == {"pool"}
        played: list[int] = []
        eager: list[int] = []
        for size, piecewise in runner.piecewise.items():

            def replay(metadata: Any, size: int = size, replay: Any = piecewise.replay) -> Any:
                played.append(size)
                return replay(metadata)

            piecewise.replay = replay
        llm.engine.worker.model.register_forward_hook(lambda model, args, result: eager.append(len(args[0])))
        tokens = [[o.token_ids for o in output.outputs] for output in llm.generate(prompts, params, use_tqdm=False)]
        assert tokens == expected
        assert len(set(played)) >= 2
        assert all(size > 16 for size in eager), "it would have fitted a recording"
        phases = {step.phase for step in llm.engine.stats.steps}
        assert ("mixed" in phases) == has_chunks
        assert llm.engine.stats.steps[-1].num_preemptions > 0


def test_a_recording_that_fails_gives_attention_back(
    stage: ModuleType, checkpoint_path: CheckpointPath, fake_graphs: type[FakeGraph]
) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=32, num_kv_blocks=4) as llm:
        layers = llm.engine.worker.layers
        backend = layers[0].backend
        piecewise_graph = submodule(stage, "worker.piecewise_graph").PiecewiseGraph
        q = torch.zeros(2, 4, layers[0].num_heads, layers[0].head_dim)

        def fail() -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.cuda.OutOfMemoryError):
            piecewise_graph(layers, *q).run(fail, pool="pool")
        assert not fake_graphs.under_way
        assert all(layer.backend is backend for layer in layers)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [16, 32, 64, *range(128, 2305, 128)]),
        ({"max_num_batched_tokens": 300}, [16, 32, 64, 128, 256, 384]),
    ],
    ids=str,
)
def test_who_records_pieces(
    stage: ModuleType, checkpoint_path: CheckpointPath, options: dict[str, Any], expected: list[int]
) -> None:
    """As many sizes as a step may have tokens."""
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=32, num_kv_blocks=4) as llm:
        worker = llm.engine.worker
        worker.device = torch.device("cuda")
        try:
            runner = worker._cuda_graphs(stage.EngineConfig(**options), 20, 32, 77)
        finally:
            worker.device = torch.device("cpu")
        assert runner.token_sizes == expected == list(runner.piecewise)
