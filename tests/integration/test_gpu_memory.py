"""On a GPU: how much of it an engine takes. In a file of its own: no engine of another test may be alive beside it."""

from __future__ import annotations

import gc
from types import ModuleType

import pytest
import torch

from ..conftest import ROOT, submodule

pytestmark = [pytest.mark.gpu, pytest.mark.exclusive]

SHAPE = ROOT / "folovllm" / "models" / "shapes" / "Qwen3-0.6B"


@pytest.mark.since("m3")
def test_the_cache_takes_the_share_that_was_asked_for(stage: ModuleType) -> None:
    """Weights, activations of the largest step and cache together, and not much less."""
    torch.cuda.empty_cache()
    with stage.LLM(SHAPE, load_format="dummy", device="cuda", max_model_len=8192, gpu_memory_utilization=0.4) as llm:
        long = stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        llm.generate([[1 + number % 9 for number in range(8000)]], long, use_tqdm=False)
        short = stage.SamplingParams(temperature=1.0, top_p=0.9, seed=1, max_tokens=3, ignore_eos=True)
        llm.generate([[number + 1] for number in range(256)], short, use_tqdm=False)
        free, total = torch.cuda.mem_get_info()
        assert 0.3 < 1 - free / total < 0.42  # the driver's own memory comes on top
        assert llm.config.num_kv_blocks * llm.config.block_size > 8192
        cuda_graphs = getattr(llm.engine.worker.model_runner, "cuda_graphs", None)
        if cuda_graphs is not None:  # recordings are a part of the share, too
            assert sorted(cuda_graphs.graphs) == submodule(stage, "worker.cuda_graph").default_sizes(256)


@pytest.mark.since("m4")
def test_recordings_are_given_back(stage: ModuleType) -> None:
    """All that an engine took, but for what stays with the process after the first."""
    left = []
    for _ in range(2):
        options = {"max_model_len": 1024, "num_kv_blocks": 100, "max_num_seqs": 48}
        with stage.LLM(SHAPE, load_format="dummy", device="cuda", **options) as llm:
            assert len(llm.engine.worker.model_runner.cuda_graphs.graphs) == 9
            params = stage.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
            llm.generate([[number + 1] for number in range(48)], params, use_tqdm=False)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.mem_get_info()[0])
        assert torch.cuda.memory_allocated() < 96 * 2**20  # what cuBLAS keeps for itself, twice 32 MiB
    assert left[1] > left[0] - 64 * 2**20
