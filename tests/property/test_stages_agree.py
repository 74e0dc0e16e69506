"""Neighbouring stages give the same tokens for the same call, seeds given or not."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from folovllm.stages import known_stages

from ..conftest import CheckpointPath, MakeLLM, no_prefix_cache, open_llm, phases_apart


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


@pytest.mark.since("m5")
@pytest.mark.parametrize("policy", ["fcfs", "priority"])  # under "sjf" the order goes by the clock
@pytest.mark.parametrize("num_kv_blocks", [16, 60])
def test_without_chunks_it_is_m4(
    num_kv_blocks: int, policy: str, stage: ModuleType, checkpoint_path: CheckpointPath
) -> None:
    """Switched off: the same sequences in the same steps, phase by phase, with forks, preemptions and an abort."""
    options = {"max_model_len": 64, "max_num_seqs": 6, "max_num_batched_tokens": 70, "scheduling_policy": policy}
    wanted = [([1, 2, 3], 40, 1), ([5] * 20, 9, 4), ([7], 6, 3), ([9] * 50, 12, 2), ([4, 4], 8, 1), ([6] * 33, 30, 1)]

    def run(package: ModuleType, **switch: Any) -> Any:
        tokens: dict[str, Any] = {}
        sizes = {"num_kv_blocks": num_kv_blocks, "block_size": 4}
        with open_llm(package, checkpoint_path("qwen3"), **options, **sizes, **switch) as llm:
            for number, (prompt, max_tokens, n) in enumerate(wanted):
                params = package.SamplingParams(seed=number, max_tokens=max_tokens, n=n, ignore_eos=True)
                llm.engine.add_request(f"{number}", prompt, params, priority=-number)
                if number == 4:
                    llm.engine.abort_request("1")
                tokens.update({output.request_id: output for output in llm.engine.step()})
            while llm.engine.has_unfinished_requests():
                tokens.update({output.request_id: output for output in llm.engine.step()})
            names = ["phase", "seq_ids", "num_tokens", "num_running", "num_waiting", "kv_slots_used", "num_preemptions"]
            steps = [[getattr(step, name) for name in names] for step in llm.engine.stats.steps]
            texts = {key: [list(each.token_ids) for each in output.outputs] for key, output in tokens.items()}
            return steps, texts

    steps, texts = run(stage, **phases_apart(stage), **no_prefix_cache(stage))
    assert (steps, texts) == run(importlib.import_module(known_stages()[4]))
    assert {step[0] for step in steps} == {"prefill", "decode"}
    assert (steps[-1][-1] > 0) or num_kv_blocks == 60
    assert "mixed" in {step[0] for step in run(stage)[0]}, "with chunks the steps are others"
