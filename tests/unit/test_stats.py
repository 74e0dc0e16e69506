"""Metrics of requests and records of steps: do the figures agree with each other, and with what was done?"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..conftest import MakeLLM, forget_prefixes, submodule

pytestmark = pytest.mark.since("m1")


def run(stage: ModuleType, llm: Any, lengths: list[tuple[int, int]], **arguments: Any) -> list[Any]:
    """Outputs of requests with (prompt tokens, output tokens)."""
    params = [
        stage.SamplingParams(**{"seed": 1, "ignore_eos": True, **arguments, "max_tokens": num}) for _, num in lengths
    ]
    outputs: list[Any] = llm.generate([[5] * num for num, _ in lengths], params, use_tqdm=False)
    return outputs


@pytest.fixture
def llm(make_llm: MakeLLM) -> Any:
    llm = make_llm(max_model_len=64)
    forget_prefixes(llm)
    llm.engine.stats.clear()
    return llm


# ---------------------------------------------------------------------- requests


@pytest.mark.parametrize("n", [1, 3])
def test_figures_of_a_request_agree(stage: ModuleType, llm: Any, n: int) -> None:
    before = time.perf_counter()
    outputs = run(stage, llm, [(4, 6), (20, 2), (3, 1)], n=n)
    after = time.perf_counter()
    for output, length in zip(outputs, (6, 2, 1), strict=True):
        metrics = output.metrics
        assert before <= metrics.arrival_time <= metrics.first_scheduled_time
        assert metrics.first_scheduled_time < metrics.first_token_time <= metrics.last_token_time <= after
        assert metrics.num_output_tokens == n * length
        assert [len(times) for times in metrics.token_times] == [length] * n
        everything = sorted(moment for times in metrics.token_times for moment in times)
        assert (everything[0], everything[-1]) == (metrics.first_token_time, metrics.last_token_time)
        assert all(earlier < later for times in metrics.token_times for earlier, later in pairwise(times))

        assert metrics.queue_time == metrics.first_scheduled_time - metrics.arrival_time >= 0
        assert metrics.ttft == metrics.first_token_time - metrics.arrival_time > metrics.queue_time
        assert metrics.e2e_latency == metrics.last_token_time - metrics.arrival_time >= metrics.ttft
        assert metrics.tokens_per_second == pytest.approx(n * length / metrics.e2e_latency)
        latencies = metrics.inter_token_latencies
        assert len(latencies) == n * (length - 1) and all(latency > 0 for latency in latencies)
        assert sum(latencies) == pytest.approx(sum(times[-1] - times[0] for times in metrics.token_times))
        if length == 1:
            assert metrics.tpot is None
        else:
            assert metrics.tpot == pytest.approx(sum(latencies) / len(latencies))


def test_a_request_that_waits_has_a_queue_time(stage: ModuleType, llm: Any) -> None:
    params = stage.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    llm.engine.add_request("a", [1, 2], params)
    time.sleep(0.02)
    outputs = []
    while llm.engine.has_unfinished_requests():
        outputs = llm.engine.step()
    assert 0.02 <= outputs[0].metrics.queue_time < outputs[0].metrics.ttft


def test_before_there_is_anything(stage: ModuleType) -> None:
    metrics = stage.RequestMetrics(arrival_time=10.0)
    assert (metrics.queue_time, metrics.ttft, metrics.tpot, metrics.e2e_latency) == (None, None, None, None)
    assert metrics.tokens_per_second is None
    assert metrics.inter_token_latencies == []


def test_figures_by_hand(stage: ModuleType) -> None:
    metrics = stage.RequestMetrics(arrival_time=10.0, first_scheduled_time=11.0, token_times=[[], []])
    for index, now in ((0, 12.0), (0, 12.5), (1, 14.0), (0, 15.0), (1, 20.0)):
        metrics.record_token(index, now)
    assert (metrics.queue_time, metrics.ttft, metrics.e2e_latency) == (1.0, 2.0, 10.0)
    assert metrics.inter_token_latencies == [0.5, 2.5, 6.0]
    assert metrics.tpot == 3.0
    assert metrics.tokens_per_second == 0.5


def test_metrics_of_a_stream_are_up_to_date(stage: ModuleType, llm: Any) -> None:
    counts = []
    for output in llm.stream([[1, 2]], stage.SamplingParams(max_tokens=4, ignore_eos=True)):
        counts.append(output.metrics.num_output_tokens)
        assert output.metrics.ttft is not None
        assert (output.metrics.tpot is None) == (len(counts) == 1)
    assert counts == [1, 2, 3, 4]


# ---------------------------------------------------------------------- steps


@pytest.mark.until("m1")  # one sequence at a time
def test_records_of_steps(stage: ModuleType, llm: Any) -> None:
    run(stage, llm, [(9, 3), (1, 2)])
    steps = llm.engine.stats.steps
    assert [step.step for step in steps] == list(range(5))
    assert [step.phase for step in steps] == ["prefill", "decode", "decode", "prefill", "decode"]
    assert [step.num_tokens for step in steps] == [9, 1, 1, 1, 1]
    assert [step.kv_slots_used for step in steps] == [9, 10, 11, 1, 2]
    assert {step.kv_slots for step in steps} == {64}
    assert [len(step.seq_ids) for step in steps] == [1] * 5
    assert len({step.seq_ids for step in steps[:3]}) == len({step.seq_ids for step in steps[3:]}) == 1
    assert steps[0].seq_ids != steps[3].seq_ids


def test_steps_add_up_to_the_work(stage: ModuleType, llm: Any) -> None:
    before = time.perf_counter()
    outputs = run(stage, llm, [(9, 3), (20, 7), (1, 2)])
    after = time.perf_counter()
    steps = llm.engine.stats.steps
    # A prompt, and all of its output but the last token, goes through the model once.
    assert sum(step.num_tokens for step in steps) == sum(
        len(output.prompt_token_ids) + len(output.token_ids) - 1 for output in outputs
    )
    assert sum(len(step.seq_ids) for step in steps) == sum(len(output.token_ids) for output in outputs)
    assert before <= steps[0].start and steps[-1].start + steps[-1].seconds <= after
    for step, following in pairwise(steps):
        assert step.start + step.seconds <= following.start
    for step in steps:
        assert step.seconds > 0
        assert 0 <= step.kv_slots_used <= step.kv_slots
        assert step.num_tokens >= len(step.seq_ids) > 0
    moments = [moment for output in outputs for moment in output.metrics.token_times[0]]
    assert all(any(step.start < moment <= step.start + step.seconds for step in steps) for moment in moments)


def test_no_step_no_record(llm: Any) -> None:
    assert llm.engine.step() == []
    assert llm.engine.stats.steps == []


def test_clear_starts_over(stage: ModuleType, llm: Any) -> None:
    run(stage, llm, [(3, 2)])
    llm.engine.stats.clear()
    assert llm.engine.stats.steps == []
    run(stage, llm, [(3, 2)])
    assert [step.step for step in llm.engine.stats.steps] == [0, 1]


# ---------------------------------------------------------------------- traces


def test_trace(stage: ModuleType, llm: Any, tmp_path: Path) -> None:
    """The Trace Event format: complete events with times in microseconds, and a name for every track."""
    run(stage, llm, [(9, 3), (1, 2)])
    llm.engine.stats.to_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    assert all({"name", "ph", "pid"} <= event.keys() for event in events)
    assert {event["ph"] for event in events} == {"X", "C", "M"}
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    steps = llm.engine.stats.steps
    for event in spans:
        assert event["ts"] >= 0 and event["dur"] > 0
        assert event["tid"] in names
        assert event["pid"] == spans[0]["pid"]
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times) and times[0] == 0
    by_track: dict[str, list[Any]] = {}
    for event in spans:
        by_track.setdefault(names[event["tid"]], []).append(event)
    assert [event["name"] for event in by_track["steps"]] == [step.phase for step in steps]
    for event, step in zip(by_track.pop("steps"), steps, strict=True):
        assert event["dur"] == pytest.approx(step.seconds * 1e6)
        assert event["ts"] == pytest.approx((step.start - steps[0].start) * 1e6, abs=1e-3)
        assert event["args"]["tokens"] == step.num_tokens
    assert set(by_track) == {seq_id for step in steps for seq_id in step.seq_ids}
    assert {name: len(track) for name, track in by_track.items()} == {
        seq_id: sum(seq_id in step.seq_ids for step in steps) for seq_id in by_track
    }
    for track in by_track.values():
        for event, following in pairwise(track):
            assert event["ts"] + event["dur"] <= following["ts"] + 1e-3
    counters = [event["args"] for event in events if event["ph"] == "C" and event["name"] == "KV slots"]
    assert [sum(counter.values()) for counter in counters] == [step.kv_slots for step in steps]
    assert [counter["used"] for counter in counters] == [step.kv_slots_used for step in steps]


def test_trace_of_nothing(llm: Any, tmp_path: Path) -> None:
    llm.engine.stats.to_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert [event["ph"] for event in trace["traceEvents"]] == ["M"]


def test_records_are_bounded_and_numbered(
    stage: ModuleType, llm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an engine that runs for weeks the last steps are kept, and a step keeps its number."""
    stats_module = submodule(stage, "metrics.stats")
    assert 10_000 <= stats_module.MAX_STEPS <= 1_000_000
    monkeypatch.setattr(stats_module, "MAX_STEPS", 7)
    llm.engine.stats.clear()
    params = stage.SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    llm.engine.add_request("a", [1, 2], params)
    for number in range(50):
        llm.engine.step()
        steps = llm.engine.stats.steps
        assert min(number + 1, 7) <= len(steps) <= 14
        assert [step.step for step in steps] == list(range(number + 1 - len(steps), number + 1))
    assert not llm.engine.has_unfinished_requests()
    llm.engine.stats.to_trace(tmp_path / "trace.json")
    llm.engine.stats.clear()
    assert llm.engine.stats.steps == []
