"""On a GPU: steps in which chunks of prompts and decodes come together, recorded in pieces or launched one by one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ..conftest import CheckpointPath, GetOracle, submodule
from .test_gpu_graphs import cuda_memory, generate, graphs_of, make_requests, open_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.since("m5")]

__all__ = ["cuda_memory"]  # a fixture, for this file as well


def count_pieces(llm: Any, patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, size of the recording) of every step that is played in pieces from now on."""
    played: list[tuple[int, int]] = []
    for size, piecewise in graphs_of(llm).piecewise.items():

        def replay(metadata: Any, size: int = size, replay: Any = piecewise.replay) -> Any:
            played.append((len(metadata.slot_mapping), size))
            return replay(metadata)

        patch.setattr(piecewise, "replay", replay)
    return played


@pytest.mark.parametrize("checkpoint", ["qwen3", "llama_bias", "qwen2_tied"])
@pytest.mark.parametrize("max_chunk_size", [7, 64])
def test_mixed_steps(
    stage: ModuleType,
    checkpoint_path: CheckpointPath,
    get_oracle: GetOracle,
    checkpoint: str,
    max_chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few rows and many requests, so that prompts come among decodes; then with too few blocks for all who run."""
    requests = make_requests(14, staggered=True)
    options = {"max_num_seqs": 5, "max_chunk_size": max_chunk_size, "max_num_batched_tokens": 96}
    with open_gpu(stage, checkpoint_path(checkpoint), enforce_eager=True, **options) as llm:
        expected = generate(stage, llm, requests)
        assert "mixed" in {step.phase for step in llm.engine.stats.steps}
    with open_gpu(stage, checkpoint_path(checkpoint), **options) as llm:
        played = count_pieces(llm, monkeypatch)
        assert generate(stage, llm, requests) == expected
        phases = [step.phase for step in llm.engine.stats.steps]
        assert len(played) == len(phases) - phases.count("decode"), "every step with a prompt, and no other"
        assert len({size for _, size in played}) >= 2
        assert any(num_tokens < size for num_tokens, size in played)
    with open_gpu(stage, checkpoint_path(checkpoint), num_kv_blocks=24, **options) as llm:
        assert generate(stage, llm, requests) == expected
        assert llm.engine.stats.steps[-1].num_preemptions > 0
    oracle = get_oracle(checkpoint)
    for (prompt, arguments), (token_ids,) in zip(requests, expected, strict=True):
        oracle.check(prompt, token_ids, stage.SamplingParams(**arguments))


@pytest.mark.parametrize("block_size", [None, 16])
def test_flash_reads_chunks_and_decodes_alike(
    stage: ModuleType, checkpoint_path: CheckpointPath, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of mixed steps, played in pieces, beside those of the same steps launched one by one."""
    pytest.importorskip("flash_attn")
    options: dict[str, Any] = {"max_num_seqs": 5, "max_chunk_size": 32, "max_num_batched_tokens": 96}
    options |= {"dtype": "bfloat16", "attention_backend": "flash", "block_size": block_size}
    errors = []
    with open_gpu(stage, checkpoint_path("qwen3"), **options) as llm:
        graphs, model = graphs_of(llm), llm.engine.worker.model
        replay = graphs.replay

        def compare(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
            played: torch.Tensor = replay(input_ids, positions, metadata).clone()
            metadata.shared = None
            with torch.inference_mode():
                expected = model(input_ids, positions, metadata)  # writes the same keys and values again
            errors.append(float((played - expected).float().norm() / expected.float().norm()))
            return played

        monkeypatch.setattr(graphs, "replay", compare)
        generate(stage, llm, make_requests(14, staggered=True))
        assert "mixed" in {step.phase for step in llm.engine.stats.steps}
    assert len(errors) > 20
    assert max(errors) < 2e-2


def test_pieces_take_no_memory_of_their_own(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """What passes between pieces and attention is shared by all recordings; close() gives it back."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with open_gpu(stage, checkpoint_path("qwen3"), max_model_len=256) as llm:
        recorded = list(graphs_of(llm).piecewise.values())
        sizes = submodule(stage, "worker.cuda_graph").default_token_sizes(8192)
        assert len(recorded) == len(sizes)
        assert len({graph.q.data_ptr() for graph in recorded}) == 1
        assert all(len(graph.graphs) == len(llm.engine.worker.layers) + 1 for graph in recorded)
        del recorded
    assert torch.cuda.memory_allocated() <= before
