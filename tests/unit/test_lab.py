"""The lab measures any engine from the outside. Here the engine is a fake on a clock of its own, so every figure is
known beforehand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from folovllm import lab
from folovllm.bench.workloads import Workload, WorkloadRequest


@dataclass(frozen=True, kw_only=True)
class Params:
    temperature: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    max_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class ParamsWithN(Params):
    n: int = 1


class Clock:
    """Stands in for time.perf_counter; only the fake engine moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeLLM:
    """Answers last request first, two requests interleaved where there are two. A step takes 1 ms for every token of
    context, so it grows as an engine's without a cache does. Token k of an answer is 100 + k."""

    def __init__(self, clock: Clock, params_type: type[Params] = Params) -> None:
        self.clock = clock
        self.params_type = params_type
        self.calls: list[tuple[list[list[int]], list[Any]]] = []
        self.closed = False
        self.hf_config = SimpleNamespace(vocab_size=64)
        self.config = SimpleNamespace(max_model_len=512, device="cpu", dtype="float32")

    def get_default_sampling_params(self) -> Params:
        return self.params_type()

    def generate(self, prompts: list[list[int]], params: Params, *, use_tqdm: bool) -> None:
        assert not use_tqdm
        self.calls.append((prompts, [params]))
        self.clock.now += 5

    def stream(self, prompts: list[list[int]], params: list[Any]) -> Iterator[Any]:
        self.calls.append((prompts, params))
        jobs = [(f"id{len(prompts) - i}", *job) for i, job in enumerate(zip(prompts, params, strict=True))][::-1]
        for step in range(1, max(each.max_tokens for each in params) + 1):
            for request_id, prompt, each in jobs:
                if step > each.max_tokens:
                    continue
                self.clock.now += (len(prompt) + step - 1) / 1000
                answer = [100 + k for k in range(step)]
                outputs = [SimpleNamespace(index=i, token_ids=answer) for i in range(getattr(each, "n", 1))]
                yield SimpleNamespace(
                    request_id=request_id, prompt_token_ids=prompt, outputs=outputs, finished=step == each.max_tokens
                )

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lab.time, "perf_counter", clock)
    return clock


def workload(*requests: WorkloadRequest) -> Workload:
    return Workload("test", "made by a test", list(requests))


def test_times_of_one_request(clock: Clock) -> None:
    result = lab.run(FakeLLM(clock), workload(WorkloadRequest([1] * 10, 4)))
    (trace,) = result.traces
    assert trace.ttft == pytest.approx(0.010)
    assert trace.inter_token == pytest.approx([0.011, 0.012, 0.013])
    assert trace.e2e == result.seconds == pytest.approx(0.046)
    assert trace.token_ids == [100, 101, 102, 103]
    assert result.output_tokens_per_s == pytest.approx(4 / 0.046)
    summary = result.summary()
    assert summary["stage"] == __name__.partition(".")[0]
    assert summary["tpot_p50_ms"] == summary["tpot_p99_ms"] == pytest.approx(12)
    assert summary["itl_p50_ms"] == pytest.approx(12)
    assert summary["itl_p99_ms"] == pytest.approx(12.98)
    assert summary["peak_memory_bytes"] > 1 << 20
    assert json.loads(json.dumps(summary)) == summary


def test_peak_of_the_cache(clock: Clock) -> None:
    """Of the steps of the run alone; a stage with one row gives all of it to whoever runs."""
    request = workload(WorkloadRequest([1] * 10, 4))
    llm: Any = FakeLLM(clock)
    assert lab.run(llm, request).summary()["peak_kv_slots"] is None
    steps = [SimpleNamespace(kv_slots=512, kv_slots_allocated=400)]
    llm.engine = SimpleNamespace(stats=SimpleNamespace(steps=steps))
    stream = llm.stream

    def stream_in_steps(*what: Any) -> Iterator[Any]:
        for slots, output in zip((16, 32, 32, 16), stream(*what), strict=True):
            steps.append(SimpleNamespace(kv_slots=512, kv_slots_allocated=slots))
            yield output

    llm.stream = stream_in_steps
    assert lab.run(llm, request).summary()["peak_kv_slots"] == 32

    def stream_with_one_row(*what: Any) -> Iterator[Any]:
        for output in stream(*what):
            steps.append(SimpleNamespace(kv_slots=512))
            yield output

    llm.stream = stream_with_one_row
    assert lab.run(llm, request).peak_kv_slots == 512


def test_warmup_is_not_counted_and_leaves_no_prefix(clock: Clock) -> None:
    llm = FakeLLM(clock)
    prompt = list(range(20))
    result = lab.run(llm, workload(WorkloadRequest(prompt, 2)))
    assert result.seconds < 1 and result.num_output_tokens == 2
    ((warm,), (params,)), _ = llm.calls
    assert warm == prompt[-8:] and params.max_tokens == 2
    cold = FakeLLM(clock)
    lab.run(cold, workload(WorkloadRequest(prompt, 2)), warmup=False)
    assert len(cold.calls) == 1


def test_outputs_in_any_order_are_filed_under_their_requests(clock: Clock) -> None:
    requests = [WorkloadRequest([1, 2], 3), WorkloadRequest([3], 5), WorkloadRequest([1, 2], 2, temperature=0.6)]
    llm = FakeLLM(clock)
    result = lab.run(llm, workload(*requests), warmup=False)
    assert [trace.request for trace in result.traces] == [0, 1, 2]
    assert [trace.num_prompt_tokens for trace in result.traces] == [2, 1, 2]
    assert len(result.traces[1].token_times) == 5
    assert result.num_output_tokens == 10
    assert llm.calls[0][1][2] == Params(max_tokens=2, temperature=0.6, ignore_eos=True)
    assert not result.notes


@pytest.mark.parametrize("params_type", [Params, ParamsWithN])
def test_samples(clock: Clock, params_type: type[Params]) -> None:
    """One request with n where the stage has it, else n requests, whose seeds make them draw the same."""
    llm = FakeLLM(clock, params_type)
    result = lab.run(llm, workload(WorkloadRequest([7], 2, seed=5, n=3, temperature=1.0)), warmup=False)
    assert [(trace.request, trace.sample) for trace in result.traces] == [(0, 0), (0, 1), (0, 2)]
    assert result.num_output_tokens == 6
    ((prompts, params),) = llm.calls
    if params_type is ParamsWithN:
        assert [(each.seed, each.n) for each in params] == [(5, 3)]
        assert result.notes == []
    else:
        assert prompts == [[7]] * 3 and [each.seed for each in params] == [5, 6, 7]
        assert "no n" in result.notes[0]


def test_a_turn_waits_for_the_turn_before_and_carries_its_history(clock: Clock) -> None:
    requests = [
        WorkloadRequest([1], 2),
        WorkloadRequest([2], 1),
        WorkloadRequest([3], 1, follows=0),
        WorkloadRequest([4], 1, follows=2),
    ]
    llm = FakeLLM(clock)
    result = lab.run(llm, workload(*requests), warmup=False)
    assert [prompts for prompts, _ in llm.calls] == [[[1], [2]], [[1, 100, 101, 3]], [[1, 100, 101, 3, 100, 4]]]
    assert [trace.num_prompt_tokens for trace in result.traces] == [1, 1, 4, 6]
    assert result.traces[2].sent == pytest.approx(max(trace.token_times[-1] for trace in result.traces[:2]))
    assert result.traces[2].ttft == pytest.approx(0.004)


def test_arrival_steps_are_not_kept_and_that_is_said(clock: Clock) -> None:
    result = lab.run(FakeLLM(clock), workload(WorkloadRequest([1], 1), WorkloadRequest([2], 1, arrival_step=3)))
    assert "arrival steps" in result.notes[0]


def test_workloads_by_name_are_drawn_for_the_engine(clock: Clock) -> None:
    result = lab.run(FakeLLM(clock), "decode_growth")
    (request,) = result.workload.requests
    assert request.max_tokens == 512 - 16 and max(request.prompt_token_ids) < 64


def test_a_stage_by_name_is_opened_and_closed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_llm(**options: Any) -> FakeLLM:
        opened.append((FakeLLM(clock), options))
        return opened[-1][0]

    monkeypatch.setattr(lab, "load_stage", {"m9": SimpleNamespace(LLM=open_llm)}.__getitem__)
    lab.run("m9", "single", dtype="float32")
    ((llm, options),) = opened
    assert llm.closed and options == {"model": str(lab.TINY), "dtype": "float32"}
    with pytest.raises(TypeError, match="dtype"):
        lab.run(llm, "single", dtype="float32")


def test_growth_is_the_median_of_a_window(clock: Clock) -> None:
    result = lab.run(FakeLLM(clock), workload(WorkloadRequest([1] * 10, 34)))
    times = result.traces[0].token_times
    result.traces[0].token_times = [*times[:5], *(time + 9 for time in times[5:])]  # a hiccup at the fifth gap
    contexts, seconds = lab.growth(result, window=11)
    assert contexts == pytest.approx([16, 27, 38])
    # The token computed over a context of c takes c ms; the slow one counts as the largest of its window.
    assert seconds == pytest.approx([0.017, 0.027, 0.038])
    with pytest.raises(ValueError, match="less than one window"):
        lab.growth(result, window=34)


def test_pictures(clock: Clock, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    result = lab.run(FakeLLM(clock), workload(WorkloadRequest([1] * 10, 41)))
    axes = lab.plot_time_per_token({"m0": result, "m1": result}, degrees={"m0": 2, "m1": 1})
    points, quadratic, _, linear = axes.lines
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("context (tokens)", "time per token (ms)")
    assert points.get_color() == lab.COLOURS[0] and linear.get_color() == lab.COLOURS[1]
    for fit in (quadratic, linear):  # what they are fitted to is a line
        assert np.allclose(fit.get_ydata(), points.get_ydata())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["m0", "m0, quadratic fit", "m1", "m1, linear fit"]
    chart = lab.bars({"weights": 1234.5, "logits": 2.0}, "Memory", "MiB")
    assert [text.get_text() for text in chart.texts] == ["1,234.5", "2.0"]
    chart.figure.savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def step(seq_ids: str, seconds: float = 1.0, phase: str = "decode", start: float = 0.0) -> Any:
    return SimpleNamespace(seq_ids=tuple(seq_ids), seconds=seconds, phase=phase, start=start)


def test_lanes_are_used_again_once_they_are_free() -> None:
    # b ends where c could not enter yet; c takes b's lane, d the first that is free after a.
    steps = [step("ab"), step("ab"), step("ac"), step("cd"), step("de")]
    assert lab.assign_lanes(steps) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert lab.assign_lanes([step("ab"), step("c")]) == {"a": 0, "b": 1, "c": 0}


def test_what_rows_do_with_their_time() -> None:
    # a runs for 1 + 2 s and stands still for 4 s while b begins; the third row is never used.
    steps = [step("a", 1.0), step("b", 4.0, "prefill"), step("ab", 2.0), step("b", 1.0)]
    shares = lab.row_shares(steps, num_rows=3)
    assert shares == pytest.approx({"busy": 10 / 24, "stalled": 4 / 24, "empty": 10 / 24})


def test_a_picture_of_steps() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    steps = [step("ab", 0.5, "prefill", 7.0), step("a", 0.1, "decode", 7.5), step("a", 0.1, "decode", 7.6)]
    axes = lab.plot_steps(steps, {"a": 0, "b": 1}, "Steps")
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["prefill", "decode"]
    colours = [matplotlib.colors.to_hex(handle.get_facecolor()[0]).upper() for handle in handles]
    assert colours == [lab.PHASE_COLOURS[label] for label in labels]
    spans = [
        [(round(x0), round(x1)) for x0, x1 in (path.get_extents().intervalx for path in collection.get_paths())]
        for collection in axes.collections
    ]
    assert spans == [[(0, 500)], [(0, 500)], [(500, 600), (600, 700)]]  # milliseconds from the first step
    assert lab.plot_steps(steps, {"a": 0, "b": 1}, "Again", axes) is axes and axes.get_title(loc="left") == "Again"


def test_colours_belong_to_stages() -> None:
    assert lab.colour_of("m3_paged", 0) == lab.colour_of("m3", 5) == lab.COLOURS[3]
    assert len({lab.colour_of(f"m{k}", 0) for k in range(8)}) == 8
    assert lab.colour_of("transformers", 2) == lab.COLOURS[2]


def test_results_carry_their_environment(tmp_path: Path) -> None:
    path = lab.save_result("probe", {"tokens_per_s": 1.5}, tmp_path / "results")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "probe.json" and written["tokens_per_s"] == 1.5
    environment = written["environment"]
    assert environment["cores"] >= 1 and environment["memory_gib"] > 0 and environment["cpu"]
    assert environment["numpy"] == np.__version__
    assert "pytest" in environment["command"] or "-c" in environment["command"]  # -c: a worker of xdist
    assert lab.environment("make bench")["command"] == "make bench"


def test_summary_of_one_token_answers_has_no_gaps(clock: Clock) -> None:
    summary = lab.run(FakeLLM(clock), workload(WorkloadRequest([1], 1))).summary()
    assert summary["tpot_p50_ms"] is None and summary["itl_p99_ms"] is None and summary["ttft_p50_ms"] == 1
