"""Neighbouring stages give the same tokens for the same call, seeds given or not."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from folovllm.stages import known_stages

from ..conftest import CheckpointPath, MakeLLM, open_llm


@pytest.mark.since("m1")
def test_as_the_stage_before(stage: ModuleType, make_llm: MakeLLM, checkpoint_path: CheckpointPath) -> None:
    """Also for requests without a seed, whose seeds come from the order in which they were made."""
    names = known_stages()
    if stage.__name__ not in names:
        pytest.skip("a practice copy has no stage before it")
    before = importlib.import_module(names[names.index(stage.__name__) - 1])
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
    tokens = []
    for package in (before, stage):
        params = [package.SamplingParams(seed=seed, max_tokens=8, ignore_eos=True) for seed in (1, None, 2, None)]
        with open_llm(package, checkpoint_path("qwen3")) as llm:
            tokens.append([output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]
