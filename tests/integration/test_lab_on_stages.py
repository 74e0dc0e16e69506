"""The lab with real engines: what it notes of a run is what the engine did, whichever way a stage is asked."""

from __future__ import annotations

import time
from types import ModuleType

from folovllm import lab
from folovllm.bench.workloads import Workload, WorkloadRequest

from ..conftest import MakeLLM


def test_every_token_has_a_time(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=64)
    requests = [WorkloadRequest([3, 4, 5], 6), WorkloadRequest([7, 8], 4, temperature=1.0, seed=5, n=2)]
    started = time.perf_counter()
    result = lab.run(llm, Workload("two", "two requests", requests))
    elapsed = time.perf_counter() - started
    assert [(t.request, t.sample, t.num_prompt_tokens) for t in result.traces] == [(0, 0, 3), (1, 0, 2), (1, 1, 2)]
    assert [len(t.token_times) for t in result.traces] == [len(t.token_ids) for t in result.traces] == [6, 4, 4]
    for trace in result.traces:
        assert 0 <= trace.sent < trace.token_times[0] and trace.token_times[-1] <= result.seconds < elapsed
        assert all(gap > 0 for gap in trace.inter_token)
    greedy, *seeded = (
        stage.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        *(stage.SamplingParams(temperature=1.0, seed=seed, max_tokens=4, ignore_eos=True) for seed in (5, 6)),
    )
    outputs = llm.generate([[3, 4, 5], [7, 8], [7, 8]], [greedy, *seeded], use_tqdm=False)
    assert [trace.token_ids for trace in result.traces] == [output.token_ids for output in outputs]


def test_arrival_steps_are_kept(stage: ModuleType, make_llm: MakeLLM) -> None:
    """A request comes before the step that it names; the first stage cannot be stepped, and its notes say so."""
    llm = make_llm(max_model_len=64)
    requests = [WorkloadRequest([3, 4, 5], 12), WorkloadRequest([7, 8], 4, arrival_step=5)]
    steps = getattr(getattr(llm, "engine", None), "stats", None)
    if steps is not None:
        steps.clear()
    result = lab.run(llm, Workload("late", "the second comes at step 5", requests), warmup=False)
    first, second = result.traces
    assert [len(first.token_times), len(second.token_times)] == [12, 4]
    if steps is None:
        assert result.notes == ["every request was sent at the start: arrival steps were not kept"]
        assert first.sent == second.sent
        return
    assert result.notes == []
    assert first.token_times[4] < second.sent < first.token_times[5]
    took_part = [{seq_id.rsplit("-", 1)[0] for seq_id in record.seq_ids} for record in steps.steps]
    assert took_part[:5] == [{"lab-0"}] * 5 and len(set.union(*took_part)) == 2
    expected = llm.generate(
        [[3, 4, 5], [7, 8]],
        [stage.SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in (12, 4)],
        use_tqdm=False,
    )
    assert [trace.token_ids for trace in result.traces] == [output.token_ids for output in expected]
