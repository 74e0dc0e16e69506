"""`python -m <stage>`: what it prints, and that a user's mistake is one sentence and exit code 2, not a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, CheckpointPath, submodule
from tests.damage import edit_json, remove, truncate

pytestmark = pytest.mark.since("m0")

TEXT = "Seven ships were counted"
GREEDY = ["--temperature", "0", "--max-tokens", "8"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(stage: ModuleType, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("text", "--model", folder)` -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = submodule(stage, "__main__").main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def model(checkpoint_path: CheckpointPath) -> Path:
    return checkpoint_path("qwen3")


def expected_text(stage: ModuleType, model: Path, prompt: str, **params: Any) -> str:
    llm = stage.LLM(model, device="cpu", log_level="ERROR")
    params = {"temperature": 0.0, "max_tokens": 8, **params}
    return prompt + llm.generate(prompt, stage.SamplingParams(**params), use_tqdm=False)[0].text


def test_prints_the_prompt_and_its_continuation(stage: ModuleType, run: Run, model: Path) -> None:
    code, out, err = run(TEXT, "--model", model, *GREEDY)
    assert code == 0
    assert out == expected_text(stage, model, TEXT) + "\n"
    assert len(out) > len(TEXT) + 8
    assert err == ""


@pytest.mark.parametrize("options", [GREEDY, ["--seed", "7", "--temperature", "1.2", "--max-tokens", "30"]], ids=str)
def test_stream_prints_the_same(run: Run, model: Path, options: list[str]) -> None:
    prompts = [TEXT, "你好", "The donkey asked for"]
    code, out, _ = run(*prompts, "--model", model, *options)
    assert code == 0
    assert all(prompt in out for prompt in prompts)
    assert run(*prompts, "--model", model, *options, "--stream") == (0, out, "")


def test_options_reach_the_engine(stage: ModuleType, run: Run, model: Path) -> None:
    options = {"temperature": 0.8, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    expected = expected_text(stage, model, TEXT, **options)
    _, out, _ = run(
        TEXT, "--model", model, "--temperature", 0.8, "--seed", 3, "--max-tokens", 20, "--ignore-eos", "--device", "cpu"
    )
    assert out == expected + "\n"
    _, other, _ = run(TEXT, "--model", model, "--temperature", 0.8, "--seed", 4, "--max-tokens", 20, "--ignore-eos")
    assert other != out


def test_the_checkpoints_temperature_is_the_default(run: Run, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0}))
    greedy = run(TEXT, "--model", model, *GREEDY)
    assert run(TEXT, "--model", folder, "--max-tokens", 8) == greedy


def test_dummy_weights(run: Run, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    code, out, _ = run(TEXT, "--model", folder, "--load-format", "dummy", *GREEDY)
    assert code == 0
    assert out.startswith(TEXT)


def test_log_level(run: Run, model: Path, stage: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    run(TEXT, "--model", model, *GREEDY, "--log-level", "INFO")
    assert any(record.name.startswith(stage.__name__) for record in caplog.records)
    caplog.clear()
    run(TEXT, "--model", model, *GREEDY)
    assert not [record for record in caplog.records if record.name.startswith(stage.__name__)]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def damaged(model: Path, folder: Path, damage: Callable[[Path], Any]) -> Path:
    shutil.copytree(model, folder)
    damage(folder)
    return folder


# name: (what to do to a copy of the model, other arguments, what the sentence must say)
MISTAKES: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "empty prompt": (None, [""], "the prompt is empty"),
    "second prompt empty": (None, [TEXT, ""], "the prompt is empty"),
    "model folder that does not exist": (None, [TEXT, "--model", "/nowhere/model"], "'/nowhere/model' does not exist"),
    "hub without a network": (None, [TEXT, "--model", "nobody/nothing"], "folovllm/models/tiny"),
    "folder without config.json": (lambda f: remove(f, "config.json"), [TEXT], "no config.json"),
    "unknown architecture": (lambda f: edit_json(f, architectures=["MambaForCausalLM"]), [TEXT], "MambaForCausalLM"),
    "truncated safetensors": (
        lambda f: truncate(f / "model.safetensors", -1000),
        [TEXT],
        "model.safetensors is damaged",
    ),
    "prompt longer than max_model_len": (None, [TEXT * 3, "--max-model-len", "8"], "max_model_len is 8"),
    "max_model_len beyond the model": (None, [TEXT, "--max-model-len", "513"], "512 positions"),
    "unknown dtype": (None, [TEXT, "--dtype", "float128"], "'float128'"),
    "unknown device": (None, [TEXT, "--device", "abacus"], "'abacus'"),
    "unknown load format": (None, [TEXT, "--load-format", "pickle"], "'pickle'"),
    "unknown log level": (None, [TEXT, "--log-level", "loud"], "'loud'"),
    "no token at all": (None, [TEXT, "--max-tokens", "0"], "max_tokens must be"),
    "temperature out of range": (None, [TEXT, "--temperature", "3"], "temperature must be in"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "stream"])
@pytest.mark.parametrize(("damage", "arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence_and_exit_code_2(
    run: Run,
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any] | None,
    arguments: list[str],
    message: str,
    stream: bool,
) -> None:
    if damage is not None:
        model = damaged(model, tmp_path / "model", damage)
    # The last --model counts.
    code, out, err = run("--model", model, *(["--stream"] if stream else []), *arguments)
    assert code == 2
    assert out == ""  # nothing was generated
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize("arguments", [[TEXT, "--no-such-option"], [TEXT, "--max-tokens", "many"]], ids=str)
def test_what_argparse_refuses_has_exit_code_2_as_well(run: Run, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2


# ---- as a program ----------------------------------------------------------------------------------------------------


def python_m(stage: ModuleType, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = Path(str(stage.__file__)).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", stage.__name__, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_as_a_program_with_the_embedded_model(stage: ModuleType, tiny_path: Path) -> None:
    """No --model: the model that comes with the repository."""
    done = python_m(stage, "Once upon a time", "--device", "cpu", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_text(stage, tiny_path, "Once upon a time") + "\n"


def test_as_a_program_a_mistake_leaves_no_traceback(stage: ModuleType, model: Path) -> None:
    done = python_m(stage, "", "--model", str(model))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the prompt is empty: give at least one token\n"
