"""The benchmarks of memory: their counts on work so small that one can count along, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import lab
from folovllm.bench import kv_usage, paged
from folovllm.bench.workloads import Workload, WorkloadRequest

SMALL = {
    # a runs for three steps, b for two, c for one.
    "mixed_cpu": Workload(
        "mixed_cpu",
        "made by a test",
        [WorkloadRequest([4] * 5, 3), WorkloadRequest([5] * 3, 2), WorkloadRequest([6] * 2, 1)],
    ),
    "parallel": Workload("parallel", "three samples", [WorkloadRequest([7] * 6, 3, temperature=1.0, seed=0, n=3)]),
}


@pytest.fixture
def small_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "workload_for", lambda llm, name: SMALL[name])


@pytest.mark.usefixtures("small_workloads")
def test_slots_and_sequences_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--milestones", "m2,m3", "--block-sizes", "4", "--device", "cpu", "--max-model-len", "32"]
    assert kv_usage.main([*options, "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["kv_bytes"] == 2 * 32 * 6144  # of the embedded model a token takes 6,144
    rows, blocks = figures["rows"]["m2"], figures["rows"]["m3, block_size=4"]

    # Two rows. After each step: a and b hold a row and c waits; b is done and c waits; c came and went; a is done.
    assert rows["workload"]["kv_slots"] == blocks["workload"]["kv_slots"] == 64
    assert rows["workload"]["used_over_allocated"] == round((8 + 6 + 6) / (64 + 32 + 32), 4)
    assert (rows["workload"]["steps_with_somebody_waiting"], rows["workload"]["running_while_others_wait"]) == (2, 1.5)
    # Blocks for all three at once: two for a and one for b are left after the first step, two for a after the second.
    assert blocks["workload"]["used_over_allocated"] == round((8 + 6) / (12 + 8), 4)
    assert (blocks["workload"]["steps"], blocks["workload"]["running_while_others_wait"]) == (3, None)
    assert rows["workload"]["tokens_computed"] == blocks["workload"]["tokens_computed"] == 7 + 4 + 2

    assert rows["parallel"]["tokens_computed_for_the_prompt"] == 3 * 6
    assert blocks["parallel"]["tokens_computed_for_the_prompt"] == 6 + 2
    # One block in common, and one each, with 3, 2 and 2 tokens in it.
    assert (blocks["parallel"]["most_blocks"], blocks["parallel"]["most_slots_allocated"]) == (4, 16)
    assert blocks["parallel"]["slots_used_then"] == 4 + 3 + 2 + 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--milestones", "m1"], "does not record whose slots"),
        (["--milestones", "m3", "--block-sizes", "16,x"], "--block-sizes must be numbers"),
        (["--milestones", "m2", "--kv-bytes", "61440"], "max_model_len=32"),
    ],
)
@pytest.mark.usefixtures("small_workloads")
def test_kv_usage_says_what_to_mend(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kv_usage.main(["--device", "cpu", "--max-model-len", "32", *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--stage", "m2"], "no attention.backends.paged"), (["--stage", "m3", "--repeats", "0"], "at least 1")],
)
def test_the_kernel_benchmark_says_what_to_mend(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paged.main(options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_kernel_benchmark_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert paged.main(["--stage", "m3"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_bytes_of_a_case_are_those_of_its_keys_and_values() -> None:
    case: Any = paged.Case(lab.load_stage("m3"), [40, 3], 16, torch.float32, torch.device("cpu"))
    query, keys, values, metadata, _ = case.arguments
    assert query.shape == (2, 16, 128) and keys.shape == values.shape == (6 * 16 + 1, 8, 128)
    assert sorted(metadata.block_table.flatten().tolist()) == list(range(6))  # no block twice
    assert case.num_bytes == 2 * 43 * 8 * 128 * 4
