"""The benchmarks of attention, decode steps and fused kernels: what they count, on work that one can count along."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from folovllm import TINY, lab
from folovllm.bench import attention, decode_step, fused
from folovllm.bench.decode_step import Activity

CPU = torch.device("cpu")


# ---- attention -------------------------------------------------------------------------------------------------------


def test_a_prompt_by_every_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--stage", "m4", "--device", "cpu", "--lengths", "40,200", "--repeats", "1", "--json", str(path)]
    assert attention.main(options) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    short, long = figures["rows"]
    assert (short["length"], long["length"]) == (40, 200)
    assert short["input_bytes"] == 40 * (8 + 4 + 4) * 64 * 4  # heads of the embedded model, float32
    for row in figures["rows"]:
        result_bytes = row["length"] * 8 * 64 * 4
        assert all(one["ms"] > 0 and one["peak_bytes"] >= result_bytes for one in row["rows"].values())
    assert long["rows"]["textbook"]["peak_bytes"] >= 2 * 8 * 200**2 * 4  # scores and weights


def test_a_textbook_that_would_need_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TEXTBOOK_LIMIT", 3 * 8 * 64**2 * 4)
    stage, heads = lab.load_stage("m4"), (8, 4, 64)
    rows = [attention.prompt_row(stage, length, heads, torch.float32, CPU, 1) for length in (64, 65)]
    assert rows[0]["rows"]["textbook"] and rows[1]["rows"]["textbook"] is None
    assert rows[1]["bytes_moved"]["textbook"] > rows[0]["bytes_moved"]["textbook"]


def test_the_textbook_is_attention() -> None:
    q, k, v = torch.randn(50, 8, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)
    found = attention.textbook(q, k, v)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_bytes_that_the_textbook_moves() -> None:
    # Per score: written, masked (read and written), into the softmax and out of it, read again. The rest is linear in
    # the length but for one mask.
    short, long = (attention.textbook_bytes(length, (4, 2, 8), torch.float32) for length in (1000, 2000))
    quadratic = (long - 2 * short) / (2000**2 - 2 * 1000**2)
    assert 6 * 4 * 4 <= quadratic <= 6 * 4 * 4 + 4


def test_bytes_that_tiles_move() -> None:
    # 128 tokens in tiles of 64, 3 heads of width 5: q and the result once; keys and values of 1 tile, then of 2.
    stage = lab.load_stage("m4")
    assert attention.tiled_bytes(stage, 128, (3, 1, 5), torch.float32, 64) == (2 * 128 + 2 * (64 + 128)) * 3 * 5 * 4


def test_peak_bytes_are_those_held_at_once() -> None:
    def function() -> torch.Tensor:
        torch.empty(1000, dtype=torch.uint8)  # gone at once
        first = torch.empty(5000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        return torch.cat([second, second])  # 3,000 + 6,000

    assert 9000 <= attention.peak_bytes(function, CPU) < 9500


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--stage", "m3"], "no attention.backends.flash_attn"),
        (["--lengths", "12,x"], "--lengths must be numbers"),
        (["--repeats", "0"], "at least 1"),
        (["--device", "cpu", "--model", "nowhere"], "no config.json"),
    ],
)
def test_attention_says_what_to_mend(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_what_needs_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for script, options in ((attention, ["--decode"]), (attention, ["--device", "cuda"]), (fused, ["--stage", "m4"])):
        assert script.main(options) == 2
        assert "CUDA" in capsys.readouterr().err


# ---- decode steps ----------------------------------------------------------------------------------------------------


def test_decode_steps_and_their_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--milestones", "m3,m4:enforce_eager=True", "--device", "cpu", "--sizes", "3x40,1x16", "--steps", "2"]
    assert decode_step.main([*options, "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert list(figures["rows"]) == ["m3", "m4:enforce_eager=True"]
    for sizes in figures["rows"].values():
        row = sizes["3x40"]
        assert row["kv_bytes"] == 3 * 40 * 6144  # of the embedded model a token takes 6,144
        assert row["weight_bytes"] == pytest.approx(5.8e6 * 2, rel=0.05)
        assert row["bound_ms"] == pytest.approx(
            (row["kv_bytes"] + row["weight_bytes"]) / figures["copy_gb_per_s"] / 1e6, rel=0.01
        )
        assert 0 < row["share_of_bound"] == round(row["bound_ms"] / row["step_ms"], 3)


def test_steps_run_around_the_context_that_was_asked_for() -> None:
    with lab.load_stage("m4").LLM(TINY, device="cpu", log_level="ERROR") as llm:
        decode_step.time_steps(llm, 2, 50, 10, 1.0)
        decoded = [step for step in llm.engine.stats.steps if step.phase == "decode"]
        assert {step.num_running for step in decoded} == {2} and not llm.engine.has_unfinished_requests()
        timed = decoded[decode_step.WARMUP :]
        assert len(timed) == 10 and abs(sum(step.kv_slots_used for step in timed) / len(timed) / 2 - 50) <= 2


def test_nobody_is_done_before_the_profile_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def profiled(engine: Any) -> None:
        for _ in range(decode_step.PROFILED + 1):
            engine.step()
        still_running.append(len(engine.core.scheduler.running))

    still_running: list[int] = []
    monkeypatch.setattr(decode_step, "clear", profiled)
    # A prompt is a step, and after every eighth those that run get a token.
    options = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 24}
    with lab.load_stage("m4").LLM(TINY, device="cpu", log_level="ERROR", **options) as llm:
        decode_step.time_steps(llm, 24, 70, 2, 1.0)
    assert still_running == [24]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sizes", "3x"], "--sizes must be sequences x tokens"),
        (["--steps", "0"], "at least 1"),
        (["--sizes", "1x20", "--steps", "40"], "fewer --steps"),
        (
            ["--milestones", "m4:num_kv_blocks=4:max_model_len=64", "--sizes", "4x40", "--steps", "1"],
            "memory holds no more",
        ),
    ],
)
def test_decode_steps_say_what_to_mend(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_step.main(["--device", "cpu", "--milestones", "m4", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_profile_is_divided_into_steps() -> None:
    activities = []
    for start in (0.0, 1000.0, 2000.0):
        activities += [
            Activity("Memcpy HtoD", start + 100, 2.0),
            Activity("gemm", start + 110, 50.0),
            Activity("gemm", start + 160, 30.0),
            Activity("Memcpy DtoH", start + 200, 2.0),
        ]
    activities.append(Activity("gemm", 3000.0, 9.0))  # of a step that is not complete
    found: dict[str, Any] = decode_step.summarise(decode_step.divide(activities), step_ms=1.0)
    assert (found["busy_ms"], found["idle_ms"], found["activities"]) == (0.084, 0.916, 4)
    assert found["kernels"][0] == {"name": "gemm", "microseconds": 80.0, "calls": 2.0}
    assert found["timeline"] == {
        "names": ["Memcpy HtoD", "gemm", "Memcpy DtoH"],
        "index": "0 1 1 2",
        "start_us": "898.0 908.0 958.0 998.0",  # since the end of the step before
        "duration_us": "2.0 50.0 30.0 2.0",
    }


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_decode_kernel", "_decode_kernel"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH"),
        ("void at::native::elementwise_kernel<128, 4>(int, float)", "elementwise_kernel"),
        ("void at::native::(anonymous namespace)::rms_norm<float>(int)", "rms_norm"),
    ],
)
def test_kernels_go_by_what_people_call_them(name: str, short: str) -> None:
    assert decode_step.short_name(name) == short


# ---- fused kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and sys.platform != "linux", reason="there is no Triton for this system"
)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_both_sides_of_each_pair_do_the_same(num_tokens: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = fused.Sizes(64, 96, num_heads=4, num_kv_heads=2, head_dim=32, vocab=9000)
    pairs = fused.pairs(lab.load_stage("m4"), num_tokens, sizes, torch.float32, device)
    names = {"add_rms_norm", "silu_and_mul", "norm_rotate_write", "draw_from_logits"}
    assert {pair.kernel for pair in pairs} == names | ({"matvec"} if num_tokens == 1 else set())
    for pair in pairs:
        torch.testing.assert_close(pair.after(0), pair.before(0), atol=1e-4, rtol=1e-4)
