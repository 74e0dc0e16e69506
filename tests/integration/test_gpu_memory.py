"""On a GPU: how much of it an engine takes. In a file of its own: no engine of another test may be alive beside it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from ..conftest import ROOT

pytestmark = pytest.mark.gpu

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
