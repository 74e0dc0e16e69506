"""The scripts of folovllm.bench, as a person at a terminal meets them."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import pytest

from folovllm import lab
from folovllm.bench import notebooks
from folovllm.bench import run as bench_run
from folovllm.bench import scheduler as bench_scheduler
from folovllm.bench.workloads import Workload, WorkloadRequest


def write_notebook(path: Path, *sources: str) -> Path:
    cells = [
        nbformat.v4.new_code_cell(source, metadata={"execution": {"iopub.status.idle": "now"}}) for source in sources
    ]
    metadata = {"language_info": {"name": "python", "version": "3.0.0"}, "signature": "x"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def test_notebooks_are_executed_in_place_and_the_same_way_twice(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "one.ipynb", "x = 6 * 7", "import os; print(x, os.path.exists('pyproject.toml'))")
    assert notebooks.main([str(path)]) == 0
    first = path.read_bytes()
    cells = nbformat.read(path, as_version=4).cells
    assert cells[1].outputs[0].text == "42 True\n" and cells[1].execution_count == 2
    assert not cells[0].metadata and b"3.0.0" not in first
    assert notebooks.main([str(path)]) == 0
    assert path.read_bytes() == first


def test_check_writes_nothing_and_fails_on_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_notebook(tmp_path / "good.ipynb", "print(1)")
    bad = write_notebook(tmp_path / "bad.ipynb", "print(1)", "1 / 0")
    before = good.read_bytes(), bad.read_bytes()
    assert notebooks.main(["--check", str(bad), str(good)]) == 1
    assert (good.read_bytes(), bad.read_bytes()) == before
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "good.ipynb" in printed and "1 of 2 notebooks" in printed


def test_a_notebook_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.main([str(tmp_path / "none.ipynb")]) == 2
    assert "none.ipynb" in capsys.readouterr().err


class EchoLLM:
    """Opens like a stage's LLM; lab.run is replaced where it is used, so it never has to generate."""

    config = SimpleNamespace(dtype="float32", device="cpu")

    def __init__(self, model: str, **options: Any) -> None:
        if model == "nowhere":
            raise ValueError("no such model: nowhere")

    def __enter__(self) -> "EchoLLM":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def fake_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = lab.SequenceTrace(request=0, sample=0, num_prompt_tokens=3, sent=0.0, token_times=[0.25, 0.5, 1.0])
    workload = Workload("single", "made by a test", [WorkloadRequest([1, 2, 3], 3)])
    result = lab.Result("m0_init", workload, 2.0, [trace], 3 << 20, ["it was cold"])
    monkeypatch.setattr(lab, "load_stage", {"m0": SimpleNamespace(LLM=EchoLLM)}.__getitem__)
    monkeypatch.setattr(lab, "run", lambda llm, workload: result)


@pytest.mark.usefixtures("fake_stage")
def test_bench_prints_a_table_and_ends_in_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_run.main(["--stage", "m0", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert figures["output_tokens_per_s"] == 1.5 and figures["ttft_p50_ms"] == 250 and figures["tpot_p50_ms"] == 375
    assert figures["device"] == "cpu" and figures["environment"]["command"]
    assert "375.00" in printed and "1.5 tokens/s" in printed and "peak memory 3 MiB" in printed
    assert "Note: it was cold." in printed


@pytest.mark.usefixtures("fake_stage")
def test_there_is_no_json_at_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert bench_run.main(["--stage", "m0"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "{" not in printed


@pytest.mark.usefixtures("fake_stage")
def test_bench_reports_a_fault_of_the_user_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_run.main(["--stage", "m0", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: no such model: nowhere\n"
    with pytest.raises(SystemExit) as exit_info:
        bench_run.main(["--workload", "singel"])
    assert exit_info.value.code == 2


# ---- the scheduler without a model -----------------------------------------------------------------------------------


@pytest.mark.since("m2")
def test_everything_in_a_step_but_the_model(
    stage: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = stage.__name__.partition("_")[0]
    arguments = ["--stage", name, "--num-seqs", "70", "--steps", "5", "--json", str(tmp_path / "out.json")]
    assert bench_scheduler.main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert figures["stage"] == stage.__name__ and (figures["num_seqs"], figures["steps"]) == (70, 5)
    parts = [figures["ms"][part]["p50"] for part in ("schedule", "update_from_output", "process_outputs")]
    assert min(parts) > 0 and figures["ms"]["together"]["p50"] >= max(parts)
    assert "process_outputs" in printed and figures["environment"]["command"]


@pytest.mark.since("m2")
def test_all_sequences_run_and_their_text_grows(stage: ModuleType) -> None:
    engine = bench_scheduler.Engine(stage, num_seqs=70, max_new_tokens=100)  # more than one step of prefills
    outputs = [engine.output_processor.get_output(str(number)) for number in range(70)]
    assert all(output.token_ids for output in outputs)
    before = [(len(output.token_ids), len(output.text)) for output in outputs]
    for _ in range(3):
        num_seqs, seconds = engine.step()
        assert num_seqs == 70 and len(seconds) == 3
    after = [(len(output.token_ids), len(output.text)) for output in outputs]
    assert [tokens - 3 for tokens, _ in after] == [tokens for tokens, _ in before]
    assert sum(text for _, text in after) > sum(text for _, text in before)


def test_a_stage_without_a_scheduler(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_scheduler.main(["--stage", "m1"]) == 2
    assert capsys.readouterr().err == "error: m1_basic has no scheduler: choose a later stage\n"
    assert bench_scheduler.main(["--stage", "m2", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1, got 0\n"
