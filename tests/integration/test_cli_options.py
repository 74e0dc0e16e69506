"""`python -m <stage>`: prompts from stdin, JSON for programs, and the options of the whole sampler."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, CheckpointPath, MakeLLM, submodule

pytestmark = pytest.mark.since("m1")

PROMPTS = ["Seven ships were counted", "The donkey asked for", "你好"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(checkpoint_path: CheckpointPath) -> Path:
    return checkpoint_path("qwen3")


@pytest.fixture
def run(stage: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path) -> Run:
    """`run("text", "--json", stdin="…")` -> (exit code, stdout, stderr)."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        options = ["--model", str(model), "--max-tokens", "8", *map(str, arguments)]
        code = submodule(stage, "__main__").main(options)
        return (code, *capsys.readouterr())

    return call


def expected(stage: ModuleType, make_llm: MakeLLM, prompts: list[str], **arguments: Any) -> list[Any]:
    params = stage.SamplingParams(**{"max_tokens": 8, **arguments})
    outputs: list[Any] = make_llm().generate(prompts, params, use_tqdm=False)
    return outputs


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_from_stdin(run: Run) -> None:
    """A prompt a line; the last line may lack its end."""
    from_arguments = run(*PROMPTS, "--temperature", 0)
    assert from_arguments[0] == 0
    assert run("--temperature", 0, stdin="\n".join(PROMPTS) + "\n") == from_arguments
    assert run("--temperature", 0, stdin="\n".join(PROMPTS)) == from_arguments


def test_arguments_win_over_stdin(run: Run) -> None:
    assert run(PROMPTS[0], "--temperature", 0, stdin="never read") == run(PROMPTS[0], "--temperature", 0)


def test_empty_lines_are_no_prompts(run: Run) -> None:
    arguments = ("--temperature", 0, "--max-tokens", 4)
    assert run(*arguments, stdin=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n\n") == run(*PROMPTS[:2], *arguments)


@pytest.mark.parametrize("stdin", ["", "\n\n"])
def test_no_prompt_at_all(run: Run, stdin: str) -> None:
    """Neither an argument nor a line: that is said, and no model is loaded for it."""
    assert run("--model", "nowhere", stdin=stdin) == (
        2,
        "",
        "error: no prompt: give one, or one a line on the standard input\n",
    )


def test_a_closed_pipe_is_no_mistake(stage: ModuleType, model: Path) -> None:
    """As in `| head -c 1`: nobody reads any more, so it ends, without a traceback and without a complaint."""
    folder = Path(str(stage.__file__)).parent.parent
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", stage.__name__, "--model", str(model), "--max-tokens", "4", *PROMPTS]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
            stdout=writing,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_stdin_of_a_real_process(stage: ModuleType, model: Path, run: Run) -> None:
    """In UTF-8, through a pipe."""
    expected = run(*PROMPTS, "--temperature", 0, "--json")[1]
    folder = Path(str(stage.__file__)).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", stage.__name__, "--model", model, "--temperature", "0", "--max-tokens", "8", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        input="\n".join(PROMPTS),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line, other in zip(done.stdout.splitlines(), expected.splitlines(), strict=True):
        for key in ("prompt", "text", "token_ids"):
            assert json.loads(line)[key] == json.loads(other)[key]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--temperature", 1.2, "--seed", 7], {"temperature": 1.2, "seed": 7}),
        (["--seed", 7, "--top-p", 0.3], {"seed": 7, "top_p": 0.3}),
        (["--seed", 7, "--top-k", 3], {"seed": 7, "top_k": 3}),
        (["--temperature", 0, "--stop", "e"], {"temperature": 0.0, "stop": ["e"]}),
        (["--temperature", 0, "--stop", "e", "--stop", "zzz"], {"temperature": 0.0, "stop": ["e", "zzz"]}),
        (["--temperature", 0, "--max-tokens", 3], {"temperature": 0.0, "max_tokens": 3}),
        (
            ["--temperature", 0, "--max-tokens", 40, "--ignore-eos"],
            {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True},
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_reach_the_engine(
    stage: ModuleType, make_llm: MakeLLM, run: Run, options: list[Any], arguments: dict[str, Any]
) -> None:
    outputs = expected(stage, make_llm, PROMPTS, **arguments)
    assert run(*PROMPTS, *options) == (0, "".join(f"{each.prompt}{each.text}\n" for each in outputs), "")
    _, out, _ = run(*PROMPTS, *options, "--json")
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == [each.token_ids for each in outputs]


def test_every_sampling_option_matters(run: Run) -> None:
    """Else the test above might compare nothing with nothing."""
    seeded = run(*PROMPTS, "--seed", 7)
    for options in (["--seed", 8], ["--temperature", 0.2], ["--top-p", 0.3], ["--top-k", 3], ["--stop", "e"]):
        assert run(*PROMPTS, "--seed", 7, *options) != seeded
    assert run(*PROMPTS, "--seed", 7) == seeded


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_json(stage: ModuleType, make_llm: MakeLLM, run: Run) -> None:
    """One object a line, whatever is in the text."""
    code, out, err = run(*PROMPTS, "--temperature", 0, "--stop", "e", "--json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len(PROMPTS)
    outputs = expected(stage, make_llm, PROMPTS, temperature=0.0, stop="e")
    for line, output in zip(lines, outputs, strict=True):
        result = json.loads(line)
        completion = output.outputs[0]
        assert result["prompt"] == output.prompt
        assert result["text"] == output.text
        assert result["token_ids"] == output.token_ids
        assert result["finish_reason"] == completion.finish_reason
        assert result["stop_reason"] == completion.stop_reason
        assert result["num_prompt_tokens"] == len(output.prompt_token_ids)
        assert 0 < result["ttft"] <= result["e2e_latency"]
        assert result["tokens_per_second"] == pytest.approx(len(output.token_ids) / result["e2e_latency"])
        assert (result["tpot"] is None) == (len(output.token_ids) == 1)


def test_json_keeps_line_ends_inside_its_line(run: Run) -> None:
    prompt = 'two\nlines\u2028and "quotes" \\ é'
    _, out, _ = run(prompt, "--temperature", 0, "--json")
    (line,) = out.rstrip("\n").split("\n")
    assert json.loads(line)["prompt"] == prompt


def test_stream_and_json_exclude_each_other(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(*PROMPTS, "--stream", "--json")
    assert error.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_stream_prints_the_same(run: Run) -> None:
    options = [*PROMPTS, "--seed", 3, "--stop", "e", "--stop", "th"]
    assert run(*options, "--stream") == run(*options)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", 0], "top_p must be"),
        (["--top-p", 1.5], "top_p must be"),
        (["--top-k", -2], "top_k must be"),
        (["--stop", ""], "stop must be"),
        (["--seed", 2**63], "seed must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [[], ["--json"], ["--stream"]], ids=str)
def test_a_mistake_is_one_sentence_and_exit_code_2(run: Run, options: list[Any], message: str, how: list[str]) -> None:
    code, out, err = run(PROMPTS[0], *options, *how)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
