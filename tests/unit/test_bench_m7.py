"""The benchmark of quantised weights: its arithmetic, on models that one can count along."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folovllm import TINY, lab
from folovllm.bench import quantized as bench

TINY_CONFIG = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
MIB = 2**20


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model as the only shape."""
    (tmp_path / "small").symlink_to(TINY)
    monkeypatch.setattr(bench, "SHAPES_FOLDER", tmp_path)


def run(options: list[str], path: Path) -> dict[str, Any]:
    assert bench.main([*options, "--device", "cpu", "--json", str(path)]) == 0
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_memory_of_the_small_qwen_by_hand() -> None:
    config = bench.read_config("Qwen3-0.6B")
    assert bench.layer_shapes(config) == {
        "qkv": (1024, 4096),
        "o": (2048, 1024),
        "gate_up": (1024, 6144),
        "down": (3072, 1024),
    }
    linears = 28 * (1024 * 4096 + 2048 * 1024 + 1024 * 6144 + 3072 * 1024)
    before, after = bench.bytes_by_hand(config, 16, -1), bench.bytes_by_hand(config, 4, 128)
    assert before["quantised"] == 2 * linears
    assert before["total"] == 2 * 596_049_920  # the public number of its parameters
    assert after["quantised"] == linears // 2 + linears // 128 * 2 + linears // 128 // 2
    assert before["total"] - after["total"] == before["quantised"] - after["quantised"]
    assert [round(found["total"] / MIB) for found in (before, after)] == [1137, 515]
    assert 1 - after["quantised"] / before["quantised"] > 0.73


@pytest.mark.parametrize(
    ("shape", "parameters"), [("Qwen3-4B", 4_022_468_096), ("Llama-2-7B", 6_738_415_616), ("Qwen2.5-0.5B", 494_032_768)]
)
def test_all_parameters_are_counted(shape: str, parameters: int) -> None:
    assert bench.bytes_by_hand(bench.read_config(shape), 16, -1)["total"] == 2 * parameters


def test_groups_of_a_single_matrix() -> None:
    assert bench.packed_bytes(256, 10, 4, 128) == 10 * (128 + 2 * 2 + 1)
    assert bench.packed_bytes(256, 10, 8, 32) == 10 * (256 + 8 * 2 + 8)
    assert bench.packed_bytes(256, 8, 4, -1) == 8 * (128 + 2) + 4
    assert bench.fits(TINY_CONFIG, 128) and not bench.fits(TINY_CONFIG, 256)  # 640 inputs


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration text is written by the model itself: 64 tokens in place of 512."""
    monkeypatch.setattr(bench, "check_window", lambda llm, window: 64)


@pytest.mark.usefixtures("short_windows")
def test_quality_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "600", "--samples", "8"]
    figures = run([*options, "--configs", "8/-1/act,4/32", "--seeds", "2"], tmp_path / "out.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    quality = figures["quality"]
    weights = bench.bytes_by_hand(TINY_CONFIG, 16, -1)
    assert quality["bytes_bf16"] == weights["quantised"]
    assert quality["bytes_of_the_rest"] == weights["total"] - weights["quantised"]
    assert quality["tokens"] >= 590 and 1.2 < quality["perplexity"] < 1.6
    for row in quality["rows"]:
        by_hand = bench.bytes_by_hand(TINY_CONFIG, row["bits"], row["group_size"])
        assert row["bytes"] == by_hand["quantised"]
        assert len(set(row["gptq_perplexity"])) == 2  # seeds make a difference
        assert len(row["layers"]) == 4 * 6
        assert row["layer_error_ratio_p50"] < 1
    eight, four = quality["rows"]
    assert max(abs(value) for value in eight["gptq_excess"]) < 0.003
    errors = [row["layers"]["model.layers.0.mlp.down_proj"] for row in (eight, four)]
    assert errors[0][1] < errors[1][1] / 20
    # The model is whole again before each run: otherwise the second config would quantise what is quantised already.
    alone = run([*options, "--configs", "4/32", "--seeds", "1"], tmp_path / "alone.json")["quality"]["rows"][0]
    assert four["gptq_perplexity"][0] == alone["gptq_perplexity"][0]
    assert four["rtn_perplexity"] == alone["rtn_perplexity"]
    assert four["layers"] == alone["layers"]


def test_excess_and_ratios() -> None:
    def reading(perplexity: float, divergence: float = 0.0) -> bench.Reading:
        return bench.Reading(perplexity, divergence, [])

    layers = [SimpleNamespace(name="a", error=1.0, rtn_error=2.0), SimpleNamespace(name="b", error=3.0, rtn_error=2.0)]
    tensors = {"a.qweight": torch.zeros(10, dtype=torch.int32), "a.g_idx": torch.zeros(99, dtype=torch.int32)}
    runs = [reading(2.02, 0.3), reading(2.1, 0.1), reading(2.04, 0.2)]
    found = bench.quality_figures(reading(2.0), reading(2.2, 0.5), runs, [layers] * 3, tensors)
    assert found["bytes"] == 40
    assert found["rtn_excess"] == pytest.approx(0.1)
    assert found["gptq_excess"] == pytest.approx([0.01, 0.05, 0.02])
    assert found["gptq_excess_p50"] == pytest.approx(0.02) and found["excess_ratio"] == pytest.approx(0.2)
    assert found["gptq_divergence"] == [0.3, 0.1, 0.2] and found["divergence_ratio"] == pytest.approx(0.4)
    assert found["layer_error_ratio_p50"] == 1 and found["layers_worse_than_rtn"] == 3
    assert found["layers"] == {"a": [1.0, 2.0], "b": [3.0, 2.0]}
    none = bench.quality_figures(reading(2.0), reading(1.9, 0.5), runs[:1], [layers], tensors)
    assert none["excess_ratio"] is None  # no excess to compare with


def test_reading_stories_like_the_stage_itself() -> None:
    """The same perplexity as the stage's own; and the divergence of known predictions."""
    stage = lab.load_stage("m7")
    evaluator = bench.stage_module("m7", "evaluate")
    with stage.LLM(TINY, dtype="float32", device="cpu", max_model_len=512, log_level="WARNING") as llm:
        texts = bench.held_out_stories(llm, 300)
        before = bench.read_stories(llm.model, evaluator, texts[:1])
        assert before.perplexity == pytest.approx(evaluator.perplexity(llm.model, texts[0], len(texts[0]))[0], rel=1e-5)
        same = bench.read_stories(llm.model, evaluator, texts[:1], before)
        assert same.perplexity == before.perplexity and abs(same.divergence) < 1e-6
        weight = llm.model.model.layers[2].mlp.down_proj.weight
        weight.mul_(3)
        after = bench.read_stories(llm.model, evaluator, texts[:1], before)
        again = bench.read_stories(llm.model, evaluator, texts[:1])
        old, new = (llm.model.compute_logits(each.hidden[0]).softmax(-1) for each in (before, again))
        assert after.divergence == pytest.approx((old * (old / new).log()).sum(-1).mean().item(), rel=1e-3)
        assert after.divergence > 1e-5
    assert texts[0][0] == texts[0][-1] == 0  # between two ends of text


@pytest.mark.usefixtures("tiny_shape")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_and_memory(dtype: str, tmp_path: Path) -> None:
    """In float32 codes are kept as on a GPU; torch's kernel for bfloat16 has a second bfloat16 for each zero point."""
    options = ["--parts", "memory,decode", "--shapes", "small", "--batches", "1,3", "--context", "9", "--steps", "3"]
    figures = run([*options, "--dtype", dtype], tmp_path / "out.json")
    row = figures["decode"]["rows"]["small"]
    assert figures["decode"]["in_turns"]
    for number, found in row["batches"].items():
        for name in ("bf16", "gptq"):
            assert found[f"{name}_tokens_per_s"] == pytest.approx(
                1e3 * int(number) / found[f"{name}_step_ms"], rel=1e-2
            )
    by_hand, loaded = figures["memory"]["rows"]["small"]["4-bit g128"], row["bytes"]["gptq"]
    assert figures["memory"]["rows"]["small"]["loaded"] == loaded
    assert row["bytes"]["bf16"]["quantised"] == 0
    if dtype == "float32":
        assert loaded["quantised"] == by_hand["quantised"]
    else:
        groups = (by_hand["quantised"] - 5308416 // 2) * 2 // 5  # of 2.5 bytes
        assert loaded["quantised"] == 5308416 // 2 + 4 * groups
        assert loaded["total"] - loaded["quantised"] == by_hand["total"] - by_hand["quantised"]


def test_speed_up_in_turns_and_one_after_the_other() -> None:
    bf16, gptq = [10.0, 30.0, 10.0], [5.0, 10.0, 4.0]
    found = bench.decode_figures(4, bf16, gptq, in_turns=True)
    assert found["speed_up"] == 2.5  # of 2, 3 and 2.5
    assert found["bf16_step_ms"] == 10 and found["gptq_tokens_per_s"] == 800
    assert bench.decode_figures(4, bf16, gptq, in_turns=False)["speed_up"] == 2


def test_engines_take_turns() -> None:
    def engine(name: str) -> Any:
        return SimpleNamespace(
            engine=SimpleNamespace(
                step=lambda: order.append(name),
                core=SimpleNamespace(scheduler=SimpleNamespace(running=[], waiting=[])),
                worker=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=100))),
            ),
            get_default_sampling_params=lambda: lab.load_stage("m7").SamplingParams(),
        )

    order: list[str] = []
    engines = {name: engine(name) for name in "ab"}
    for llm in engines.values():
        llm.engine.add_request = lambda request_id, prompt, params, llm=llm: llm.engine.core.scheduler.running.append(
            SimpleNamespace(request_id=request_id)
        )
        llm.engine.abort_request = lambda request_id: order.append("-")
    times = bench.time_in_turns(engines, 2, 5, 3)
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert order[: 2 * (bench.WARMUP + 3)] == ["a", "b"] * (bench.WARMUP + 3) and set(order[-4:]) == {"-"}


def test_figures_of_a_kernel() -> None:
    found = bench.kernel_figures(1_000_000, 4000.0, 1e-6, None, 3e-6)
    assert found["share_of_copy"] == 0.25 and found["speed_up"] == 3 and found["fused_us"] == 1
    assert found["unpacked_us"] is None
    both = bench.kernel_figures(1_000_000, 4000.0, 9e-6, 6e-6, 3e-6)
    assert both["speed_up"] == 0.5 and both["unpacked_us"] == 6
    assert bench.kernel_figures(1, 1.0, None, 6e-6, 3e-6)["share_of_copy"] is None


@pytest.mark.parametrize(("text", "config"), [("4/32", (4, 32, False)), ("8/-1/act", (8, -1, True))])
def test_reading_a_config(text: str, config: tuple[int, int, bool]) -> None:
    assert bench.parse_config(text) == config


@pytest.mark.parametrize(
    "options",
    [
        ["--parts", "speed"],
        ["--parts", ""],
        ["--configs", "4"],
        ["--configs", "4/32/order"],
        ["--seeds", "0"],
        ["--parts", "memory", "--shapes", "GPT-2"],
        ["--parts", "decode", "--batches", "1,x"],
        ["--parts", "kernels"],
        ["--stage", "m6", "--tokens", "10"],
    ],
)
def test_what_cannot_be_measured(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*options, "--device", "cpu"]) == 2
    assert "error:" in capsys.readouterr().err
