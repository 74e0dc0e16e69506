"""The benchmark scripts for latency, throughput and comparison, with an engine and a clock that a test can foresee."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from folovllm import lab
from folovllm.bench import compare, hf_generate, latency, options, throughput
from folovllm.bench.workloads import Workload, WorkloadRequest
from tests.conftest import CheckpointPath, MakeLLM
from tests.unit.test_lab import Clock, Params


class FakeLLM:
    """Opens like a stage's LLM and answers one request after the other; every token takes `ms_per_token`."""

    opened: list[dict[str, Any]]

    def __init__(self, clock: Clock, ms_per_token: float, model: str, **settings: Any) -> None:
        if model == "nowhere":
            raise ValueError("no such model: nowhere")
        self.clock, self.seconds = clock, ms_per_token / 1e3
        max_model_len = settings["max_model_len"] or 2048
        self.config = SimpleNamespace(max_model_len=max_model_len, device="cpu", dtype="float32")
        self.hf_config = SimpleNamespace(vocab_size=64)
        self.settings = settings
        self.max_tokens: list[int] = []

    def get_default_sampling_params(self) -> Params:
        return Params()

    def generate(self, prompts: list[list[int]], params: Params, *, use_tqdm: bool) -> None:
        self.clock.now += 100

    def stream(self, prompts: list[list[int]], params: list[Params]) -> Iterator[Any]:
        self.max_tokens += [each.max_tokens for each in params]
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            for step in range(1, each.max_tokens + 1):
                self.clock.now += self.seconds
                completion = SimpleNamespace(index=0, token_ids=[7] * step)
                finished = step == each.max_tokens
                yield SimpleNamespace(
                    request_id=str(index), prompt_token_ids=prompt, outputs=[completion], finished=finished
                )

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """The engines that a script opened: a token of m0 takes 4 ms, one of m1 1 ms. The newest stage is m1."""
    clock = Clock()
    engines: list[FakeLLM] = []

    def load_stage(name: str | None) -> Any:
        def open_llm(model: str, **settings: Any) -> FakeLLM:
            engines.append(FakeLLM(clock, {"m0": 4.0, "m1": 1.0}[name or "m1"], model, **settings))
            return engines[-1]

        if name not in ("m0", "m1", None):
            raise ValueError(f"no stage {name!r}")
        return SimpleNamespace(LLM=open_llm)

    monkeypatch.setattr(lab, "load_stage", load_stage)
    monkeypatch.setattr(lab.time, "perf_counter", clock)
    return engines


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


# ---- latency ---------------------------------------------------------------------------------------------------------


def test_latency_of_a_batch(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = [
        "--input-len",
        "4",
        "--output-len",
        "10",
        "--batch-size",
        "3",
        "--num-iters",
        "4",
        "--num-iters-warmup",
        "1",
    ]
    assert latency.main([*sizes, "--dtype", "float32", "--json", str(tmp_path / "out.json")]) == 0
    printed, figures = last_line(capsys)
    assert figures == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert figures["latencies"] == pytest.approx([0.030] * 4) and figures["avg_latency"] == pytest.approx(0.030)
    assert list(figures["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert "Avg latency: 0.0300 seconds" in printed and "99% percentile latency: 0.0300 seconds" in printed
    assert opened[0].max_tokens == [10] * 3 * 5 and opened[0].settings["dtype"] == "float32"
    assert figures["environment"]["command"] and figures["description"] == "3 requests, prompt 4, output 10"


def test_prompts_of_a_batch_differ_and_are_the_same_every_time() -> None:
    args = latency.make_parser().parse_args(["--batch-size", "3", "--input-len", "9"])
    batch = latency.make_batch(args, vocab_size=50)
    assert batch == latency.make_batch(args, vocab_size=50)
    prompts = [request.prompt_token_ids for request in batch.requests]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(len(prompt) == 9 and max(prompt) < 50 for prompt in prompts)
    assert all(request.ignore_eos and request.temperature == 1 for request in batch.requests)


@pytest.mark.parametrize("option", ["--input-len", "--output-len", "--batch-size", "--num-iters"])
def test_latency_refuses_what_it_cannot_do(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert latency.main([option, "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} must be at least 1, got 0\n"


# ---- throughput ------------------------------------------------------------------------------------------------------


def test_throughput(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--batch-size", "4"]) == 0
    printed, figures = last_line(capsys)
    # 4 x 128 tokens of 1 ms, and as many in the prompts
    assert "Throughput: 7.81 requests/s, 2000.00 total tokens/s, 1000.00 output tokens/s\n" in printed
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (512, 512)
    assert "only 4 of the requests" in figures["description"]


@pytest.mark.parametrize("size", ["0", "17"])
def test_throughput_sends_no_more_than_there_is(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert throughput.main(["--batch-size", size]) == 2
    assert "between 1 and 16, the requests of uniform" in capsys.readouterr().err


def test_throughput_with_all_requests(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--stage", "m0"]) == 0
    assert last_line(capsys)[1]["requests"] == len(opened[0].max_tokens) == 16


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_stages_side_by_side(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compare.main(["--milestones", "m0,m1", "--repeats", "3", "--json", str(tmp_path / "out.json")]) == 0
    printed, figures = last_line(capsys)
    assert figures == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert figures["median"]["m0"]["itl_p50_ms"] == 4 and figures["median"]["m1"]["itl_p50_ms"] == 1
    assert figures["median"]["m1"]["decode_tokens_per_s"] == 1000
    assert figures["ratio_to_first"]["m0"]["output_tokens_per_s"] == 1
    assert figures["ratio_to_first"]["m1"]["output_tokens_per_s"] == pytest.approx(4, rel=1e-3)
    assert len(figures["runs"]["m1"]) == 3
    assert figures["fastest"]["m1"]["itl_p50_ms"] == 1
    assert "m0" in printed and "4.00" in printed
    assert "quarter" not in printed  # of a workload that has no such figure


def test_stages_take_turns() -> None:
    order: list[str] = []

    def runner(name: str) -> compare.Runner:
        def run(workload: Workload) -> lab.Result:
            order.append(name)
            return lab.Result(name, workload, 1.0, [], 0, [])

        return run

    workload = Workload("single", "", [])
    results = compare.run_in_turns({name: runner(name) for name in "abc"}, workload, 3)
    assert "".join(order) == "abccbaabc"
    assert {name: len(found) for name, found in results.items()} == {"a": 3, "b": 3, "c": 3}


def test_one_stage_with_two_settings(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    """Both are given the work that the shorter one can do."""
    rows = "m1:max_model_len=600,m1:max_model_len=1000:dtype=bfloat16"
    assert compare.main(["--milestones", rows, "--workload", "decode_growth", "--repeats", "1"]) == 0
    printed, figures = last_line(capsys)
    assert [engine.settings["max_model_len"] for engine in opened] == [600, 1000]
    assert [engine.settings["dtype"] for engine in opened] == ["auto", "bfloat16"]
    assert [engine.max_tokens for engine in opened] == [[584], [584]]
    assert figures["stages"] == dict.fromkeys(rows.split(","), "tests")
    growth = figures["median"][rows.split(",")[1]]
    assert growth["last_over_first_quarter"] == growth["ms_at_context_512"] == 1
    curve = figures["growth"][rows.split(",")[0]]
    assert len(curve["contexts"]) == len(curve["ms_per_token"]) and set(curve["ms_per_token"]) == {1.0}
    assert "quarter" in printed  # a heading may be broken over two lines


def test_more_requests_than_the_workload_has(opened: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--milestones", "m1", "--workload", "uniform", "--num-requests", "20", "--repeats", "1"]
    assert compare.main(arguments) == 0
    assert last_line(capsys)[1]["description"].startswith("20 requests")
    assert len(opened[0].max_tokens) == 20


def test_ratios_are_taken_within_a_repeat() -> None:
    """A machine that becomes three times slower moves the medians and not the ratio."""
    base: list[dict[str, float | None]] = [{"x": 1.0}, {"x": 3.0}, {"x": 9.0}]
    runs: list[dict[str, float | None]] = [{"x": 2.0}, {"x": 6.0}, {"x": 90.0}]
    assert compare.medians(runs) == {"x": 6.0}
    assert compare.ratios(runs, base) == {"x": 2.0}
    assert compare.ratios([{"x": None}], [{"x": 1.0}]) == {"x": None}


def test_growth_within_a_run() -> None:
    times = [0.0]
    for context in range(17, 1017):
        times.append(times[-1] + (0.001 if context < 560 else 0.003))
    trace = lab.SequenceTrace(0, 0, num_prompt_tokens=16, sent=0.0, token_times=times)
    workload = Workload("decode_growth", "", [WorkloadRequest([0] * 16, 1001)])
    figures = compare.growth_figures(lab.Result("m0", workload, 1.0, [trace], 0, []))
    assert figures == {
        "first_quarter_ms": 1.0,
        "last_quarter_ms": 3.0,
        "last_over_first_quarter": 3.0,
        "ms_at_context_512": 1.0,
    }
    trace.token_times = times[:3]
    assert compare.growth_figures(lab.Result("m0", workload, 1.0, [trace], 0, [])) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--milestones", "m0,m0"], "names a row twice"),
        (["--milestones", "m0", "--repeats", "0"], "--repeats must be at least 1"),
        (["--milestones", "m0", "--transformers-batch-size", "0"], "--transformers-batch-size must be at least 1"),
        (["--milestones", "m0", "--num-requests", "3"], "goes with the workload uniform"),
        (["--milestones", "m0:paged"], "write a stage"),
        (["--milestones", "m7"], "no stage 'm7'"),
        (["--milestones", "m0", "--model", "nowhere"], "no such model"),
        (["--milestones", "m0", "--transformers", "--model", "someone/something"], "needs a folder"),
    ],
)
def test_faults_of_the_user(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m1", ("m1", {})),
        ("m3:block_size=16:enable_paged_kv=False", ("m3", {"block_size": 16, "enable_paged_kv": False})),
        (
            "m4:attention_backend=naive:num_kv_blocks=None",
            ("m4", {"attention_backend": "naive", "num_kv_blocks": None}),
        ),
    ],
)
def test_variants(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert options.parse_variant(text) == expected


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_a_picture_of_what_was_measured(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One panel for each measure that there is, and no other."""
    out = tmp_path / "out.svg"
    assert compare.main(["--milestones", "m0,m1", "--repeats", "2", "--plot", str(out)]) == 0
    assert last_line(capsys)[1]["median"]["m0"]["peak_kv_slots"] is None  # the fake says nothing about a cache
    drawn = comments_of(out)
    shown = [title for title in compare.PLOTTED if title in drawn]
    assert shown == [title for title, (key, _) in compare.PLOTTED.items() if key != "peak_kv_slots"]
    assert {"m0", "m1", "1,000.0", "250.0", "4.00", "1.00"} <= drawn
    assert "tiny, float32, cpu; median of 2" in drawn


def test_a_row_without_a_measure_has_no_bar(tmp_path: Path) -> None:
    row: dict[str, float | None] = {"output_tokens_per_s": 20.0, "ttft_p50_ms": 5.0, "itl_p99_ms": 2.0}
    runs: dict[str, list[dict[str, float | None]]] = {
        "m0": [{**row, "peak_kv_slots": None}],
        "m3:block_size=4": [{**row, "peak_kv_slots": 1234}, {**row, "peak_kv_slots": 1236}],
        compare.TRANSFORMERS: [{**row, "peak_kv_slots": None}],
    }
    figures: dict[str, Any] = {
        **{"model": "tiny", "dtype": "float32", "device": "cpu"},
        **{"workload": "single", "description": "one request", "repeats": 2},
        "median": {name: compare.medians(found) for name, found in runs.items()},
        "runs": runs,
    }
    compare.plot(figures, tmp_path / "out.svg")
    drawn = comments_of(tmp_path / "out.svg")
    assert {*runs, *compare.PLOTTED, "1,235", " –"} <= drawn
    compare.plot(figures, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def comments_of(svg: Path) -> set[str]:
    """The texts of a picture: matplotlib notes each as a comment beside its outlines."""
    return {html.unescape(text) for text in re.findall("<!-- (.*?) -->", svg.read_text(encoding="utf-8"), re.DOTALL)}


@pytest.mark.parametrize(
    ("out", "message"), [("out.doc", "must end in one of"), ("out", "must end in"), ("none/out.png", "no folder")]
)
def test_no_picture_is_refused_before_anything_is_measured(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str, message: str
) -> None:
    assert compare.main(["--milestones", "m0", "--plot", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --plot ") and message in error and error.count("\n") == 1
    assert not opened


def test_matplotlib_is_needed_for_the_picture_only(
    opened: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--milestones", "m0", "--repeats", "1"]
    assert compare.main([*arguments, "--plot", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib: pip install matplotlib\n"
    assert not opened
    assert compare.main(arguments) == 0


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.since("m0")
def test_transformers_makes_the_tokens_that_the_stage_makes(
    stage: ModuleType, make_llm: MakeLLM, checkpoint_path: CheckpointPath
) -> None:
    requests = [WorkloadRequest([5, 6, 7, 8], 6), WorkloadRequest([9, 10], 4)]
    workload = Workload("test", "made by a test", requests)
    with hf_generate.HFGenerate(str(checkpoint_path("qwen2")), dtype="float32", device="cpu") as model:
        result = model.run(workload)
    ours = lab.run(make_llm("qwen2"), workload)
    assert [trace.token_ids for trace in result.traces] == [trace.token_ids for trace in ours.traces]
    assert [len(trace.token_times) for trace in result.traces] == [6, 4]
    for trace in result.traces:
        assert all(gap > 0 for gap in trace.inter_token) and trace.ttft > 0
    assert result.traces[0].token_times[-1] < result.traces[1].token_times[0] <= result.seconds
    assert result.notes == ["requests one after the other"]


@pytest.mark.since("m0")
def test_transformers_in_static_batches(stage: ModuleType, make_llm: MakeLLM, checkpoint_path: CheckpointPath) -> None:
    """Left-padded to the longest prompt, run to the longest output; nobody's tokens change, useful ones count."""
    lengths = [(4, 6), (9, 2), (1, 3), (2, 5), (7, 1)]
    prompts = [[5 + (7 * i + j) % 40 for j in range(length)] for i, (length, _) in enumerate(lengths)]
    requests = [WorkloadRequest(prompt, output) for prompt, (_, output) in zip(prompts, lengths, strict=True)]
    workload = Workload("test", "made by a test", requests)
    steps: list[int] = []
    with hf_generate.HFGenerate(str(checkpoint_path("qwen2")), dtype="float32", device="cpu", batch_size=3) as model:
        model.model.register_forward_pre_hook(lambda *_: steps.append(1))
        result = model.run(workload, warmup=False)
    assert len(steps) == 6 + 5  # the longest output of each batch
    ours = lab.run(make_llm("qwen2"), workload)
    assert [trace.token_ids for trace in result.traces] == [trace.token_ids for trace in ours.traces]
    assert [len(trace.token_times) for trace in result.traces] == [output for _, output in lengths]
    assert [(trace.request, trace.num_prompt_tokens) for trace in result.traces] == [
        (index, length) for index, (length, _) in enumerate(lengths)
    ]
    first, second = result.traces[:3], result.traces[3:]
    assert len({trace.token_times[0] for trace in first}) == len({trace.token_times[0] for trace in second}) == 1
    assert max(trace.token_times[-1] for trace in first) < second[0].token_times[0]
    assert result.notes == ["static batches of 3 in order of arrival; only useful output counts"]


def test_transformers_has_one_temperature(checkpoint_path: CheckpointPath) -> None:
    requests = [WorkloadRequest([1], 2), WorkloadRequest([2], 2, temperature=0.5)]
    with (
        hf_generate.HFGenerate(str(checkpoint_path("qwen2")), dtype="float32", device="cpu") as model,
        pytest.raises(ValueError, match="cannot run the workload 'two'"),
    ):
        model.run(Workload("two", "", requests))


def test_transformers_with_dummy_weights(checkpoint_path: CheckpointPath) -> None:
    with hf_generate.HFGenerate(
        str(checkpoint_path("qwen3")), dtype="bfloat16", device="cpu", load_format="dummy"
    ) as model:
        assert model.model.dtype.itemsize == 2
        result = model.run(Workload("test", "", [WorkloadRequest([1, 2], 3, temperature=0.7)]), warmup=False)
    assert result.num_output_tokens == 3 and result.notes == []
    with pytest.raises(ValueError, match="cannot run the workload 'parallel'"):
        model.run(Workload("parallel", "", [WorkloadRequest([1], 2, n=2)]))
