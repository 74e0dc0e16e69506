"""The snippets of the original documents, each in every stage: it runs as printed, or one sentence says what to write.

They go through the front door, `folovllm`, as a reader's own program would.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import folovllm
from folovllm.stages import known_stages
from tests.conftest import ROOT, MakeLLM, stage_number
from tests.snippets import COMMANDS, QUICK_REFERENCE, README, RUNS, Command, Snippet

SNIPPETS = [*QUICK_REFERENCE, *README]
NEWEST = stage_number(known_stages()[-1])


@pytest.fixture
def front_door(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`folovllm` leads to the stage under test, as FOLOVLLM_STAGE would have it do from the start of a program."""
    forget_stage_modules()
    monkeypatch.setattr(folovllm, "_stage", lambda: stage)
    yield
    forget_stage_modules()


def forget_stage_modules() -> None:
    """`folovllm.config` and the like are some stage's modules, and Python remembers whose."""
    for name, module in list(sys.modules.items()):
        if name.startswith("folovllm.") and not module.__name__.startswith("folovllm."):
            del sys.modules[name]
            vars(folovllm).pop(name.split(".")[1], None)


@pytest.fixture
def names(front_door: None, stage: ModuleType, make_llm: MakeLLM) -> dict[str, Any]:
    """What the text around a snippet has made already."""
    return {
        "EngineConfig": stage.EngineConfig,
        "LLM": stage.LLM,
        "SamplingParams": stage.SamplingParams,
        "llm": make_llm("tiny", dtype="auto"),
        "params": stage.SamplingParams(max_tokens=4),
        "prompt": "Once upon a time",
        "prompts": ["Once upon a time", "The future of AI is"],
    }


def run(snippet: Snippet, model: Path, names: dict[str, Any]) -> str:
    """What became of it: RUNS, or "TypeError: the message"."""
    try:
        exec(compile(snippet.prepare(model), snippet.name, "exec"), names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return RUNS


@pytest.mark.since("m0")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_snippet(request: pytest.FixtureRequest, names: dict[str, Any], tiny_path: Path, snippet: Snippet) -> None:
    import torch

    if snippet.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    expected = snippet.outcome(request.node.callspec.params["stage"].number)
    found = run(snippet, tiny_path, names)
    if expected == RUNS:
        assert found == RUNS
    else:
        assert re.search(expected, found), found
        assert "\n" not in found


@pytest.mark.since("m0")
def test_the_front_door_leads_to_the_stage(front_door: None, stage: ModuleType) -> None:
    """Otherwise the snippets' own imports would test another stage."""
    found: dict[str, Any] = {}
    exec("from folovllm import LLM\nfrom folovllm.config import EngineConfig\nimport folovllm.request as r", found)
    assert found["LLM"] is stage.LLM
    assert found["EngineConfig"] is stage.EngineConfig
    assert found["r"].Request is stage.Request


# ---- the table itself ------------------------------------------------------------------------------------------------


def test_the_names_of_the_rows_differ() -> None:
    names = [snippet.name for snippet in SNIPPETS]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == set()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_a_row_knows_what_happens_in_every_stage(snippet: Snippet) -> None:
    numbers = [stage_number(since) for since in snippet.outcomes]
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))
    # Once a snippet runs it runs for good: a later stage takes nothing away.
    assert RUNS not in list(snippet.outcomes.values())[:-1]


def test_the_outcome_of_a_stage() -> None:
    snippet = Snippet("", "", {"m0": "first", "m3": "second", "m6": RUNS})
    assert [snippet.outcome(number) for number in range(8)] == ["first"] * 3 + ["second"] * 3 + [RUNS] * 2


@pytest.mark.parametrize(("code", "found"), [("1", RUNS), ("1 / 0", "ZeroDivisionError: division by zero")])
def test_running_tells_what_became_of_it(code: str, found: str) -> None:
    assert run(Snippet("", code, {"m0": RUNS}), Path(), {}) == found


def test_preparing_replaces_the_model_and_the_length() -> None:
    code = 'LLM(model="Qwen/Qwen2.5-0.6B", x=1)\nSamplingParams(max_tokens=128, top_k=50)'
    expected = "LLM(model='/a/b', x=1)\nSamplingParams(max_tokens=8, top_k=50)"
    assert Snippet("", code, {"m0": RUNS}).prepare(Path("/a/b")) == expected


# ---- commands --------------------------------------------------------------------------------------------------------


def due(commands: list[Command]) -> list[Command]:
    return [command for command in commands if stage_number(command.since) <= NEWEST]


def test_the_installation_can_be_verified() -> None:
    code = "import folovllm; print('Installation successful!')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Installation successful!\n"), done.stderr


@pytest.mark.parametrize("command", due(COMMANDS), ids=lambda command: command.line)
def test_command(command: Command) -> None:
    """make knows what it would do; a script exists and has the options that it is shown with."""
    program, *arguments = shlex.split(command.line)
    if program == "make":
        call = ["make", "--dry-run", *arguments]
    else:
        assert (ROOT / arguments[0]).is_file()
        call = [sys.executable, arguments[0], "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for argument in arguments:
        if program != "make" and argument.startswith("--"):
            assert argument in done.stdout


def test_commands_fall_due_with_their_stage() -> None:
    assert {command.line for command in due(COMMANDS)} >= {
        f"make {name}" for name in ["format", "lint", "test", "coverage"]
    }
    assert due([Command("x", since=f"m{NEWEST + 1}")]) == []
