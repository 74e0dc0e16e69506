"""The harness itself: which tests run against what, shown on a throw-away tree of three stages without an engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from folovllm.stages import known_stages

from ..checkpoints import SPECS, make_tokenizer, save_checkpoint
from ..conftest import ROOT, MakeLLM, Milestone, parse_milestones, stage_number

NAMES = ["m0_init", "m1_basic", "m2_batching"]

SAMPLE = """
import pytest
from tests.conftest import submodule

def test_every(stage):
    assert submodule(stage, "inner.leaf").NAME == stage.__name__

@pytest.mark.since("m1")
def test_late(stage): pass

@pytest.mark.until("m1")
def test_early(stage): pass

@pytest.mark.slow
def test_slow(stage): pass

def test_no_stage(): pass

def test_profile():
    from hypothesis import settings
    import sys
    assert settings().max_examples == (300 if "--deep" in sys.argv else 15)
"""
LATE_MODULE = """
import pytest
pytestmark = pytest.mark.since("m2")

@pytest.mark.parametrize("value", [1, 2])
def test_whole_module(stage, value): pass
"""
GPU_MODULE = """
import pytest, torch

@pytest.mark.gpu
def test_gpu(stage): torch.zeros(1).cuda()
"""
# As the suite's own conftest, but the stages are those of the folder it runs in.
DRIVER = """
import sys
from pathlib import Path
import pytest
import tests.conftest as conftest

conftest.ROOT = Path.cwd()
conftest.known_stages = lambda: sorted(path.name for path in Path.cwd().glob("m?_*"))
options = ["-v", "-p", "no:cacheprovider", "-c", "pytest.ini"]
sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[conftest]))
"""


def make_package(folder: Path, name_in_leaf: str | None = None) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("from .inner import leaf\n")
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "leaf.py").write_text(f"NAME = {name_in_leaf or folder.name!r}\n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in NAMES:
        make_package(root / name)
    make_package(root / "practice" / "m1")
    make_package(root / "practice" / "broken", name_in_leaf="something else")
    make_package(root / "practice" / "json")
    (root / "test_sample.py").write_text(SAMPLE)
    (root / "test_late_module.py").write_text(LATE_MODULE)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    return root


def plain_environment() -> dict[str, str]:
    """Ours, without what this run of pytest may have been told."""
    told = ("HYPOTHESIS_PROFILE", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    return {name: value for name, value in os.environ.items() if name not in told}


def run(tree: Path, *options: str) -> tuple[dict[str, str], str]:
    """{test: PASSED, SKIPPED, FAILED or ERROR}, and all that was printed."""
    environment = {**plain_environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, *options]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    results = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) > 1 and "::" in words[0] and words[1] in ("PASSED", "SKIPPED", "FAILED", "ERROR"):
            results[words[0].partition("::")[2]] = words[1]
    return results, done.stdout + done.stderr


def passed(results: dict[str, str], test: str) -> list[str]:
    """The parameters with which `test` passed."""
    names = [name.partition("[") for name, result in results.items() if result == "PASSED"]
    return [parameters.rstrip("]") for name, _, parameters in names if name == test]


def test_without_options_every_stage_runs(tree: Path) -> None:
    results, printed = run(tree)
    assert passed(results, "test_every") == ["m0", "m1", "m2"], printed
    assert passed(results, "test_late") == ["m1", "m2"]
    assert passed(results, "test_early") == ["m0", "m1"]
    assert passed(results, "test_whole_module") == ["m2-1", "m2-2"]
    assert passed(results, "test_no_stage") == [""]
    assert passed(results, "test_profile") == [""]
    assert results["test_slow[m0]"] == "SKIPPED"
    assert not any("test_late[m0]" in name or "test_early[m2]" in name for name in results), "not even skipped"


@pytest.mark.parametrize(("option", "expected"), [("m0", ["m0"]), ("m2,m0", ["m2", "m0"]), ("m1_basic", ["m1"])])
def test_chosen_stages(tree: Path, option: str, expected: list[str]) -> None:
    results, printed = run(tree, "--milestone", option)
    assert passed(results, "test_every") == expected, printed
    assert passed(results, "test_late") == [stage for stage in expected if stage != "m0"]
    assert passed(results, "test_no_stage") == ([""] if len(expected) > 1 else [])


@pytest.mark.parametrize("chosen", [["m0"], ["practice/m1", "--as", "m1"]], ids=["stage", "practice"])
def test_one_stage_and_a_test_without_one(tree: Path, chosen: list[str]) -> None:
    """It runs where its file is named, and not where a folder is."""
    for argument in ("test_sample.py", "test_sample.py::test_no_stage", str(tree / "test_sample.py")):
        results, printed = run(tree, argument, "--milestone", *chosen)
        assert passed(results, "test_no_stage") == [""], printed
    results, printed = run(tree, str(tree), "--milestone", *chosen)
    assert passed(results, "test_no_stage") == [] and len(passed(results, "test_every")) == 1, printed


def test_deep_runs_what_is_slow(tree: Path) -> None:
    results, printed = run(tree, "test_sample.py", "--milestone", "m0", "--deep")
    assert passed(results, "test_slow") == ["m0"], printed
    assert passed(results, "test_profile") == [""]


def test_gpu_tests_are_skipped_without_cuda(tree: Path) -> None:
    (tree / "gpu.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_gpu(stage): import torch; torch.zeros(1).cuda()"
    )
    results, printed = run(tree, "gpu.py", "--milestone", "m0")
    assert results == {"test_gpu[m0]": "PASSED" if torch.cuda.is_available() else "SKIPPED"}, printed


def test_a_practice_folder(tree: Path) -> None:
    results, printed = run(tree, "--milestone", "practice/m1", "--as", "m1")
    assert passed(results, "test_every") == ["m1"], printed
    assert passed(results, "test_late") == ["m1"]
    assert passed(results, "test_whole_module") == []
    results, printed = run(tree, "--milestone", str(tree / "practice" / "broken"), "--as", "m2_batching")
    assert results["test_every[m2]"] == "FAILED", printed
    assert len(passed(results, "test_whole_module")) == 2


def test_a_practice_folder_with_a_taken_name(tree: Path) -> None:
    results, printed = run(tree, "--milestone", "practice/json", "--as", "m1")
    assert results["test_every[m1]"] == "ERROR"
    assert "rename the folder" in printed


@pytest.mark.parametrize(
    ("option", "practice_as", "sentence"),
    [
        ("m7", None, "unknown stage 'm7': the stages are m0_init, m1_basic, m2_batching, and there is no folder"),
        ("m0,", None, "unknown stage ''"),
        ("empty", "m1", "empty is not a Python package"),
        ("not-a-name", "m1", "not-a-name is not a Python package"),
        ("mine", None, "--milestone mine: add --as"),
        ("mine", "m9", "--as: unknown stage 'm9'"),
        ("m0", "m1", "give --milestone a folder"),
        (None, "m1", "give --milestone a folder"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, option: str | None, practice_as: str | None, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    make_package(tmp_path / "mine")
    make_package(tmp_path / "not-a-name")
    with pytest.raises(pytest.UsageError, match=sentence):
        parse_milestones(option, practice_as, NAMES, tmp_path)


def test_options_that_do(tmp_path: Path) -> None:
    make_package(tmp_path / "mine")
    stages = [Milestone(number, ROOT / name) for number, name in enumerate(NAMES)]
    assert parse_milestones(None, None, NAMES, tmp_path) == stages
    assert parse_milestones("m2,m1_basic", None, NAMES, tmp_path) == [stages[2], stages[1]]
    practice = Milestone(1, tmp_path / "mine")
    assert parse_milestones("mine/", "m1", NAMES, tmp_path) == [practice]
    assert parse_milestones("mine,m0", "m1_basic", NAMES, tmp_path) == [practice, stages[0]]


def test_a_misspelt_stage_in_a_marker_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="'1' is not the name of a stage"):
        stage_number("1")


def test_the_real_suite_on_practice_copies(tmp_path: Path) -> None:
    """A copy of the newest stage passes; the same copy with a fault in it does not."""
    newest = known_stages()[-1]
    right, wrong = tmp_path / "practice" / "right", tmp_path / "practice" / "wrong"
    for copy in (right, wrong):
        shutil.copytree(ROOT / newest, copy, ignore=shutil.ignore_patterns("__pycache__"))
    sampler = wrong / "sample" / "sampler.py"
    sampler.write_text(sampler.read_text().replace("argmax(", "argmin("))
    command = [sys.executable, "-m", "pytest", "tests/unit/test_sampler.py", "-rA", "-k", "greedy or impossible"]
    options = ["--milestone", f"{right},{wrong}", "--as", newest.split("_")[0], "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=plain_environment(), capture_output=True, text=True)
    results = Counter(line.split()[0] for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED")))
    assert results == {"PASSED": 3, "FAILED": 1}, done.stdout
    assert "FAILED tests/unit/test_sampler.py::test_greedy_is_argmax" in done.stdout


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """The environment variables that conftest sets are read when torch and transformers are imported."""
    code = "import sys, tests.conftest; print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------- what tests share


def test_engines_are_shared(make_llm: MakeLLM) -> None:
    llm = make_llm("qwen3", max_model_len=64)
    assert make_llm("qwen3", max_model_len=64) is llm
    assert make_llm("qwen3", max_model_len=65) is not llm
    assert make_llm("qwen2", max_model_len=64) is not llm
    assert (llm.config.dtype, llm.config.device, llm.config.log_level) == ("float32", "cpu", "WARNING")


def test_checkpoints_are_the_same_every_time(tmp_path: Path) -> None:
    folders = [save_checkpoint("llama3", tmp_path / name) for name in ("a", "b")]
    files = sorted(path.name for path in folders[0].iterdir())
    assert "model.safetensors.index.json" in files
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_checkpoints_differ_in_what_checkpoints_differ_in() -> None:
    options = [spec.options for spec in SPECS.values()]
    assert {spec.model_type for spec in SPECS.values()} == {"llama", "qwen2", "qwen3"}
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "head_dim"):
        assert {name in option for option in options} == {True, False}, name
    assert {option.get("num_key_value_heads", 2) for option in options} == {1, 2, 4}
    assert {spec.max_shard_size is None for spec in SPECS.values()} == {True, False}


def test_the_tokenizer_splits_what_is_not_ascii() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve 中🙂 <|im_end|>")) == "naïve 中🙂 <|im_end|>"
    assert len(tokenizer.encode("🙂")) == 4
    assert len(tokenizer.encode(" lighthouse")) == 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
