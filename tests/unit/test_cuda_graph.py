"""Recorded decode steps, without a GPU: what is recorded, and what a replay finds in the memory that it reads.

A recording is played by a stand-in that does what a CUDA graph does: the same work on the same tensors, whatever they
hold by then, its result in the same place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, open_llm, submodule
from ..inside import attention

pytestmark = pytest.mark.since("m4")

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- which sizes


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (4, [1, 2, 4]),
        (7, [1, 2, 4, 7]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (65, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 65]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
        (
            300,
            [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), 288, 300],
        ),
    ],
)
def test_the_ladder(stage: ModuleType, max_num_seqs: int, expected: list[int]) -> None:
    assert submodule(stage, "worker.cuda_graph").default_sizes(max_num_seqs) == expected


@given(max_num_seqs=st.integers(1, 1100))
def test_no_batch_is_padded_much(max_num_seqs: int, stage: ModuleType) -> None:
    """Every batch finds a size; half a batch of rows too many at most, 7 up to 64, 15 up to 256, and 31 above."""
    sizes = submodule(stage, "worker.cuda_graph").default_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for num_seqs in range(1, max_num_seqs + 1):
        padding = next(size for size in sizes if size >= num_seqs) - num_seqs
        assert padding < min(num_seqs, 8 if num_seqs <= 64 else 16 if num_seqs <= 256 else 32)


# ---------------------------------------------------------------------- stand-ins


class Recording:
    """In place of a torch.cuda.CUDAGraph: what it was recorded with stays where it is."""

    model: nn.Module
    arguments: tuple[Any, ...]
    result: torch.Tensor

    def replay(self) -> None:
        self.result.copy_(self.model(*self.arguments))


class FakeCUDA:
    """What `capture` uses of torch.cuda.

    Attributes:
        events: ("run", size) for a forward pass, ("record", size, pool) for one that is recorded.
        free: bytes; every recording takes 1000.
    """

    def __init__(self, patch: pytest.MonkeyPatch, model: nn.Module, stage: ModuleType) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.recording: tuple[Recording, Any] | None = None
        self.free = 10**6
        self.num_pools = 0
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (self.free, 10**6))
        patch.setattr(torch.cuda, "graph_pool_handle", self.make_pool)
        patch.setattr(torch.cuda, "CUDAGraph", Recording)
        patch.setattr(submodule(stage, "worker.cuda_graph"), "capture_stream", lambda device: None)
        patch.setattr(torch.cuda, "graph", self.graph)
        model.register_forward_hook(self.note)
        self.model = model

    def make_pool(self) -> str:
        self.num_pools += 1
        return f"pool {self.num_pools}"

    @contextmanager
    def graph(self, graph: Recording, pool: Any = None, stream: Any = None) -> Iterator[None]:
        self.recording = graph, pool
        yield
        self.recording = None
        self.free -= 1000

    def note(self, model: nn.Module, arguments: tuple[Any, ...], result: torch.Tensor) -> None:
        size = len(arguments[0])
        if self.recording is None:
            self.events.append(("run", size))
            return
        graph, pool = self.recording
        graph.model, graph.arguments, graph.result = model, arguments, result
        self.events.append(("record", size, pool))


class Echo(nn.Module):
    """A model whose result says what it was given, [T, 3], and that keeps a copy of its last metadata."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: dict[str, Any] = {}

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
        given = {"input_ids": input_ids, "positions": positions, **vars(metadata)}
        self.seen = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        return torch.stack([input_ids, positions, metadata.slot_mapping], dim=1).double()


def make_runner(stage: ModuleType, model: nn.Module, sizes: Any, **options: Any) -> Any:
    options = {"max_model_len": 40, "block_size": 16, "spare_slot": 1000, **options}
    return submodule(stage, "worker.cuda_graph").CUDAGraphRunner(model, sizes, **options)


def step(stage: ModuleType, lens: list[int], seed: int = 0, query_len: int = 1, block_size: int = 16) -> Any:
    """input_ids, positions and metadata of a step of sequences of these lengths; another for another seed."""
    num_blocks = [-(-length // block_size) for length in lens]
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(1, 60, (len(lens), max(num_blocks)), generator=generator, dtype=torch.int32)
    positions = torch.tensor([length - 1 for length in lens])
    metadata = submodule(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32) * query_len,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        max_query_len=query_len,
        max_seq_len=max(lens),
        slot_mapping=torch.randint(1, 900, (len(lens),), generator=generator),
        block_table=table,
        block_size=block_size,
    )
    return torch.randint(1, 500, (len(lens),), generator=generator), positions, metadata


# ---------------------------------------------------------------------- recording


def test_what_is_recorded(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest first, each after a run that is not recorded, all in one pool; and what that took."""
    model = Echo()
    cuda = FakeCUDA(monkeypatch, model, stage)
    runner = make_runner(stage, model, [4, 1, 8, 2, 4])
    assert runner.sizes == [1, 2, 4, 8]
    assert runner.capture() == 4000
    assert [event for event in cuda.events if event[0] == "record"] == [
        ("record", size, "pool 1") for size in (8, 4, 2, 1)
    ]
    for size in runner.sizes:
        assert cuda.events.index(("run", size)) < cuda.events.index(("record", size, "pool 1"))
    assert sorted(runner.graphs) == [1, 2, 4, 8]
    for size, graph in runner.graphs.items():
        _, _, metadata = graph.arguments
        assert (metadata.max_query_len, metadata.max_seq_len, metadata.block_size) == (1, 40, 16)
        assert metadata.query_start_loc.tolist() == list(range(size + 1))
        assert metadata.block_table.shape == (size, 3), "room for the longest sequence"
    assert model.seen["slot_mapping"].tolist() == [1000], "a recording writes where nobody reads"


def test_no_memory_for_recordings(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to do."""
    model = Echo()
    cuda = FakeCUDA(monkeypatch, model, stage)

    def refuse(graph: Any, pool: Any = None, stream: Any = None) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(ValueError, match=r"no memory for CUDA graphs: .*cuda_graph_sizes.*enforce_eager=True"):
        make_runner(stage, model, [2]).capture()
    assert cuda.events


@pytest.mark.parametrize(("num_seqs", "expected"), [(1, True), (5, True), (8, True), (9, False), (30, False)])
def test_what_can_be_replayed(stage: ModuleType, num_seqs: int, expected: bool) -> None:
    """Steps of single tokens, up to the largest size; a prompt never."""
    runner = make_runner(stage, Echo(), [1, 2, 8])
    assert runner.can_run(step(stage, [5] * num_seqs)[2]) == expected
    for query_len in (2, 100):
        assert not runner.can_run(step(stage, [100] * num_seqs, query_len=query_len)[2])


# ---------------------------------------------------------------------- replaying


@given(
    batches=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=6),
    sizes=st.sampled_from([[1, 2, 4, 8], [8], [3, 8], [1, 2, 3, 4, 5, 6, 7, 8]]),
)
def test_what_a_replay_reads(batches: list[list[int]], sizes: list[int], stage: ModuleType) -> None:
    """The step in the first rows; the rest has no length and writes to the spare slot, whatever stood there before."""
    model = Echo()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        FakeCUDA(patch, model, stage)
        runner = make_runner(stage, model, sizes)
        runner.capture()
        graphs = dict(runner.graphs)
        for number, lens in enumerate(batches):
            input_ids, positions, metadata = step(stage, lens, seed=number)
            given = [input_ids.clone(), positions.clone(), metadata.slot_mapping.clone()]
            result = runner.replay(input_ids, positions, metadata)
            num, seen = len(lens), model.seen
            size = min(size for size in sizes if size >= num)
            assert len(seen["input_ids"]) == size, "not the smallest that is large enough"
            assert torch.equal(result, torch.stack(given, dim=1).double())
            assert seen["seq_lens"].tolist() == lens + [0] * (size - num)
            assert seen["slot_mapping"][num:].tolist() == [1000] * (size - num)
            columns = metadata.block_table.shape[1]
            assert torch.equal(seen["block_table"][:num, :columns], metadata.block_table)
            assert seen["block_table"].shape == (size, 3)
            assert (seen["positions"] < 40).all() and (seen["input_ids"] < 500).all(), "rows too many must be valid"
            for name in ("input_ids", "positions", "slot_mapping"):
                assert seen[name].dtype == torch.int64
            assert seen["seq_lens"].dtype == seen["block_table"].dtype == torch.int32
        assert runner.graphs == graphs, "recorded again"


def test_the_longest_sequence_fits(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a length that is no multiple of the block size, in a table of as many columns as it has blocks."""
    model = Echo()
    FakeCUDA(monkeypatch, model, stage)
    runner = make_runner(stage, model, [2], max_model_len=33)
    with torch.inference_mode():
        runner.capture()
        runner.replay(*step(stage, [33, 1]))
    assert model.seen["seq_lens"].tolist() == [33, 1] and model.seen["block_table"].shape == (2, 3)


class InterpretedBackend:
    """Prompts by the naive backend, single tokens by the decode kernel, as on a GPU."""

    def __init__(self, stage: ModuleType) -> None:
        self.naive = attention(stage, "naive")
        self.decode = submodule(stage, "attention.backends.paged").paged_decode
        self.num_decodes = 0

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any, scale: float) -> torch.Tensor:
        self.num_decodes += metadata.max_query_len == 1
        attend = self.decode if metadata.max_query_len == 1 else self.naive
        result: torch.Tensor = attend(q, k, v, metadata, scale)
        return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled where there is a GPU")
def test_an_engine_that_replays(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences come, leave and are preempted between recorded steps; the tokens are those of one that does not.

    Slots that nobody wrote hold nan.
    """
    prompts = [
        [(11 * number + at) % VOCAB_SIZE for at in range(length)] for number, length in enumerate((3, 14, 30, 1))
    ]
    params = [
        stage.SamplingParams(temperature=0.4 * (number % 2), seed=number, max_tokens=max_tokens, ignore_eos=True)
        for number, max_tokens in enumerate((9, 5, 4, 7))
    ]
    sizes: dict[str, Any] = {"max_model_len": 48, "num_kv_blocks": 4, "block_size": 16, "max_num_seqs": 4}
    with open_llm(stage, checkpoint_path("qwen3"), **sizes) as llm:
        expected = [output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with open_llm(stage, checkpoint_path("qwen3"), **sizes) as llm:
        worker = llm.engine.worker
        backend = InterpretedBackend(stage)
        for layer in worker.layers:
            layer.backend = backend
            layer.k_cache.fill_(math.nan)
            layer.v_cache.fill_(math.nan)
        cuda = FakeCUDA(monkeypatch, worker.model, stage)
        runner = make_runner(stage, worker.model, [1, 4], max_model_len=48, spare_slot=worker.num_slots)
        runner.capture()
        worker.model_runner.cuda_graphs = runner
        cuda.events.clear()
        tokens = [output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        assert tokens == expected
        sizes_run = {event[1] for event in cuda.events}
        assert {1, 4} <= sizes_run and max(sizes_run) > 4, "both recordings and prompts"
        assert llm.engine.stats.steps[-1].num_preemptions > 0


# ---------------------------------------------------------------------- when there are recordings


@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": True}, {"cuda_graph_sizes": [1, 2]}, {"cuda_graph_sizes": (4,)}], ids=str
)
def test_a_cpu_has_none(stage: ModuleType, checkpoint_path: CheckpointPath, options: dict[str, Any]) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=32, num_kv_blocks=4, **options) as llm:
        assert llm.engine.worker.model_runner.cuda_graphs is None
        assert llm.config.enforce_eager == options.get("enforce_eager", False)
        (output,) = llm.generate([[5, 6]], stage.SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert len(output.token_ids) == 3


@pytest.mark.parametrize(
    ("options", "backend", "expected"),
    [
        ({}, "flash", [1, 2, 4, 8, 16, 20]),
        ({}, "paged", [1, 2, 4, 8, 16, 20]),
        ({}, "naive", None),
        ({"enforce_eager": True}, "paged", None),
        ({"enforce_eager": True, "cuda_graph_sizes": [3]}, "flash", None),
        ({"cuda_graph_sizes": [16, 3]}, "flash", [3, 16]),
    ],
    ids=str,
)
def test_who_records(stage: ModuleType, options: dict[str, Any], backend: str, expected: list[int] | None) -> None:
    """A worker on a GPU, unless told not to, or its backend cannot."""
    select = submodule(stage, "attention.backends.abstract").select_backend
    worker = SimpleNamespace(
        device=torch.device("cuda"), backend=select(backend, torch.float32, 64, None, CPU), model=Echo(), block_size=16
    )
    make = submodule(stage, "worker.gpu_worker").GPUWorker._cuda_graphs
    layer = submodule(stage, "model_executor.layers.attention").Attention(num_heads=2, num_kv_heads=1, head_dim=8)
    layer.k_cache, layer.backend = torch.zeros(78, 1, 8), worker.backend
    worker.model.layer = layer
    runner = make(worker, stage.EngineConfig(**options), max_num_seqs=20, max_model_len=64, num_slots=77)
    if expected is None:
        assert runner is None
    else:
        assert runner.sizes == expected and runner.spare_slot == 77
        assert (runner.max_model_len, runner.block_size) == (64, 16)


@pytest.mark.parametrize("sizes", [[], 8, "8", {8}, {8: 1}, ()], ids=repr)
def test_sizes_that_are_no_list(stage: ModuleType, sizes: Any) -> None:
    with pytest.raises(ValueError, match="cuda_graph_sizes must be a list of batch sizes, got"):
        stage.EngineConfig(cuda_graph_sizes=sizes)


@pytest.mark.parametrize("sizes", [[0], [4, -1], [1.5], [2, None], ["8"]], ids=repr)
def test_sizes_that_are_none(stage: ModuleType, sizes: Any) -> None:
    with pytest.raises(ValueError, match="every one of cuda_graph_sizes must be an integer of at least 1"):
        stage.EngineConfig(cuda_graph_sizes=sizes)
