"""The benchmark of chunked prefill: what it counts, on work that one can count along."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from folovllm import TINY, lab
from folovllm.bench import chunked
from folovllm.bench.workloads import Workload, WorkloadRequest

OPTIONS = {"max_model_len": 256, "log_level": "WARNING", "device": "cpu"}


def small_arrivals() -> Workload:
    steady = [WorkloadRequest([3 + index] * 8, 30) for index in range(2)]
    late = [WorkloadRequest([9] * 100, 3, arrival_step=10), WorkloadRequest([7] * 5, 6, arrival_step=10)]
    return Workload("long_arrivals", "small", steady + late)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "workload_for", lambda llm, name: small_arrivals())


@pytest.mark.usefixtures("small")
def test_a_long_prompt_among_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--milestones", "m4,m5:max_chunk_size=30", "--repeats", "1", "--device", "cpu", "--max-model-len", "256"]
    assert chunked.main([*options, "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    whole, parts = (figures["timelines"][name] for name in ("m4", "m5:max_chunk_size=30"))
    assert whole["first_step"] == parts["first_step"] == 5
    assert whole["phases"].split()[4:8] == ["decode", "prefill", "decode", "decode"]
    assert whole["prompt_tokens"].split()[4:8] == ["0", "105", "0", "0"]
    assert parts["phases"].split()[4:10] == ["decode", "mixed", "mixed", "mixed", "mixed", "decode"]
    assert parts["prompt_tokens"].split()[4:10] == ["0", "35", "30", "30", "10", "0"]  # the short one fits beside
    assert parts["tokens"].split()[4:10] == ["2", "37", "33", "33", "13", "4"]  # two decodes, then three, then four
    assert figures["ratio_to_first"]["m4"]["steady_itl_max_ms"] == 1
    assert all(value > 0 for value in figures["median"]["m4"].values())


def test_whose_time_is_whose() -> None:
    workload = small_arrivals()
    traces = [
        lab.SequenceTrace(0, 0, 8, 0.0, [1.0, 2.0, 5.0]),
        lab.SequenceTrace(1, 0, 8, 0.0, [1.0, 3.0]),
        lab.SequenceTrace(2, 0, 100, 1.5, [4.5, 9.0]),
        lab.SequenceTrace(3, 0, 5, 1.5, [2.0, 9.0]),
    ]
    figures = chunked.figures_of(lab.Result("m5_chunked", workload, 10.0, traces, 0, []))
    assert figures["steady_itl_p50_ms"] == 2000 and figures["steady_itl_max_ms"] == 3000
    assert figures["long_ttft_p50_ms"] == 3000 and figures["short_ttft_p50_ms"] == 500
    assert figures["output_tokens_per_s"] == 0.9


def test_prompt_tokens_of_each_step() -> None:
    steps = [
        SimpleNamespace(seq_ids=("a", "b"), num_tokens=14),
        SimpleNamespace(seq_ids=("a", "b", "c"), num_tokens=23),
        SimpleNamespace(seq_ids=("b", "c"), num_tokens=2),  # a prompt's last token alone is a prompt's token, too
    ]
    assert chunked.prompt_tokens(steps, {"a": 1, "b": 3, "c": 1}) == [14, 22, 1]
    assert chunked.prompt_tokens(steps, {"a": 2, "b": 3, "c": 0}) == [14, 21, 1]  # c is not done


def test_steps_with_a_backlog() -> None:
    dynamic: dict[str, Any] = {"chunk_policy": "dynamic", "target_step_time_ms": 0.001}  # never reached
    with lab.load_stage("m5").LLM(TINY, **OPTIONS, **dynamic, max_num_batched_tokens=128, num_kv_blocks=200) as llm:
        steps, chunks = chunked.run_backlog(llm, 3, 100, 6)
        assert not llm.engine.has_unfinished_requests()
    assert len(steps) == len(chunks) == 6
    assert chunks == [32] * 6  # the least that a prompt gets
    assert all(step.num_tokens == chunk + 3 for step, chunk in zip(steps, chunks, strict=True))
    figures = chunked.step_figures([SimpleNamespace(seconds=s) for s in (0.02, 0.03, 0.9, 0.04)], [5, 6, 0, 7], 10.0)
    assert figures["steps"] == 3 and figures["median_ms"] == 30 and figures["median_over_target"] == 3


@pytest.mark.parametrize(
    "options",
    [["--milestones", "m5,m5"], ["--milestones", ""], ["--target", "soon"], ["--repeats", "0"], ["--milestones", "m0"]],
)
def test_what_cannot_be_measured(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chunked.main([*options, "--device", "cpu"]) == 2
    assert "error:" in capsys.readouterr().err
