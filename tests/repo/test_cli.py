"""The front door: the `folovllm` command and package, in front of two small stand-in stages that need no torch.

The package is copied beside the stand-ins, since it takes the folder it lies in for the repository.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from folovllm import TINY, cli

REPOSITORY = Path(__file__).resolve().parents[2]
LEDGER = '[[stage]]\nname = "m0_one"\ntitle = "One"\nidea = ""\n[[stage]]\nname = "m1_two"\ntitle = "Two"\nidea = ""\n'
STAGE = {
    "__init__.py": """
from .config import EngineConfig
from .llm import LLM, SamplingParams

__all__ = ["LLM", "EngineConfig", "SamplingParams"]
""",
    "config.py": '''
class EngineConfig:
    """Options."""
''',
    "engine/__init__.py": "",
    "engine/core.py": "from ..config import EngineConfig\n\nSELF = EngineConfig\n",
    "__main__.py": """
def main(argv=None):
    print(__package__, argv)
    return 7
""",
    "llm.py": '''
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None


@dataclasses.dataclass
class Output:
    delta: str


class LLM:
    """Answers with the conversation it was given, turn by turn; `tired` interrupts it, `wrong` is refused."""

    closed = 0

    def __init__(self, model=None, engine_config=None, **overrides):
        if not str(model).endswith("tiny"):
            raise ValueError(f"{model} is not a model")
        self.model = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        LLM.closed += 1

    def parameters(self):
        return [self, self]

    def numel(self):
        return 1_250_000

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.5)

    def preprocess_chat(self, messages):
        if messages[-1]["content"] == "wrong":
            raise ValueError("this prompt is refused")
        return [f"{message['role'][0]}:{message['content']}" for message in messages]

    def stream(self, turns, params):
        yield Output(f"{params.max_tokens}/{params.temperature}/{params.seed}")
        for turn in turns:
            yield Output(" " + turn)
        if turns[-1] == "u:tired":
            raise KeyboardInterrupt
''',
}


@pytest.fixture
def front(tmp_path: Path) -> Path:
    """A folder with the real front door and two stand-in stages, m1_two the newest."""
    shutil.copytree(
        REPOSITORY / "folovllm", tmp_path / "folovllm", ignore=shutil.ignore_patterns("models", "__pycache__")
    )
    (tmp_path / "stages.toml").write_text(LEDGER, encoding="utf-8")
    for stage in ("m0_one", "m1_two"):
        for path, text in STAGE.items():
            (tmp_path / stage / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / stage / path).write_text(text, encoding="utf-8")
    return tmp_path


def python(root: Path, *arguments: str, stage: str | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python on the front door in `root`, from a folder elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name != "FOLOVLLM_STAGE"}
    environment["PYTHONPATH"] = str(root)
    if stage is not None:
        environment["FOLOVLLM_STAGE"] = stage
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd="/", env=environment, input=stdin, capture_output=True, text=True, check=False)


def folovllm(root: Path, *arguments: str, stage: str | None = None, stdin: str = "") -> tuple[int, str, str]:
    run = python(root, "-m", "folovllm", *arguments, stage=stage, stdin=stdin)
    return run.returncode, run.stdout, run.stderr


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "chosen", "expected"),
    [
        (["a story", "--max-tokens", "5"], None, "m1_two ['a story', '--max-tokens', '5']"),
        (["--stage", "m0", "a", "--stream"], None, "m0_one ['a', '--stream']"),
        (["a", "--stage=m0_one"], "m1", "m0_one ['a']"),
        (["a"], "m0", "m0_one ['a']"),
        (["--", "--stage", "m0"], None, "m1_two ['--', '--stage', 'm0']"),
    ],
)
def test_generate_hands_its_options_to_the_stage(
    front: Path, arguments: list[str], chosen: str | None, expected: str
) -> None:
    assert folovllm(front, "generate", *arguments, stage=chosen) == (7, f"{expected}\n", "")


def test_generate_help_is_the_stages(front: Path) -> None:
    code, out, _ = folovllm(front, "generate", "--help")
    assert code == 7 and "--stage" in out and "m1_two ['--help']" in out


@pytest.mark.parametrize(
    ("arguments", "chosen", "complaint"),
    [
        (["generate", "--stage", "m9", "a"], None, "unknown stage 'm9': the stages are m0_one, m1_two"),
        (["generate", "a"], "m8", "unknown stage 'm8': the stages are m0_one, m1_two"),
        (["generate", "--stage"], None, "--stage needs a name"),
        (["chat", "--model", "elsewhere"], None, "elsewhere is not a model"),
        (["chat", "--max-tokens", "many"], None, "--max-tokens"),
        (["practise"], None, "practise"),
        (["chat", "--model"], None, "--model"),
    ],
)
def test_a_fault_of_the_user_is_one_sentence(
    front: Path, arguments: list[str], chosen: str | None, complaint: str
) -> None:
    code, out, err = folovllm(front, *arguments, stage=chosen)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=repr)
def test_help(front: Path, arguments: list[str]) -> None:
    code, out, err = folovllm(front, *arguments)
    assert (code, err) == (0, "") and out.startswith("usage: folovllm") and "practice" in out


def test_version(front: Path) -> None:
    assert re.fullmatch(r"folovllm (\d+\.\d+\.\d+|\(not installed\))\n", folovllm(front, "--version")[1])


def test_a_file_that_is_not_there(front: Path) -> None:
    expected = (2, "", "error: nothere.txt: No such file or directory\n")
    assert folovllm(front, "diff", "m0", "m1", "--html", "/no/where.html")[2].startswith("error: /no/where.html: No")
    assert folovllm(front, "eval", "--text", "nothere.txt") == expected


def test_a_wheel_generates_but_has_no_ledger(front: Path) -> None:
    (front / "stages.toml").unlink()
    assert folovllm(front, "generate", "a")[:2] == (7, "m1_two ['a']\n")
    for command in (["stages", "check"], ["diff", "m0", "m1"]):
        code, out, err = folovllm(front, *command)
        assert (code, out) == (2, "") and "needs a clone of the repository" in err


@pytest.mark.parametrize(
    ("command", "reader", "read"),
    [("diff m0 m1", "head -1", "--- /dev/null\n"), ("diff m0 m1 --stat", "true", ""), ("stages check", "true", "")],
)
def test_a_reader_that_stops_early_is_no_error(front: Path, command: str, reader: str, read: str) -> None:
    (front / "m1_two" / "long.py").write_text("x = 1\n" * 50_000, encoding="utf-8")
    line = f"{sys.executable} -m folovllm {command} | {reader}"
    environment = {**os.environ, "PYTHONPATH": str(front)}
    run = subprocess.run(line, shell=True, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == (read, "")


# ---- chat ------------------------------------------------------------------------------------------------------------

ABOUT = "This is a story model of 2.5 million parameters: small stories are all it knows.\n"


def test_chat_answers_piped_questions_and_remembers_them(front: Path) -> None:
    code, out, err = folovllm(front, "chat", stdin="one\n\ntwo\n/reset\nthree\n/quit\nnever\n")
    first = "256/0.5/None u:one"
    second = f"256/0.5/None u:one a:{first} u:two"
    assert (code, out, err) == (0, f"{ABOUT}{first}\n{second}\n256/0.5/None u:three\n", "")


def test_chat_knows_its_commands(front: Path) -> None:
    code, out, _ = folovllm(front, "chat", stdin="/help\n/ what?\n")
    assert code == 0
    assert "There is no /help: /reset" in out and out.endswith("u:/ what?\n")


def test_chat_options_reach_the_sampler(front: Path) -> None:
    options = ["--max-tokens", "9", "--temperature", "0", "--seed", "3", "--stage", "m0"]
    assert folovllm(front, "chat", *options, stdin="one") == (0, f"{ABOUT}9/0.0/3 u:one\n", "")


def test_only_the_embedded_model_is_introduced(front: Path) -> None:
    assert folovllm(front, "chat", "--model", "/elsewhere/tiny", stdin="one") == (0, "256/0.5/None u:one\n", "")


def test_a_refused_piped_question_ends_the_chat(front: Path) -> None:
    assert folovllm(front, "chat", stdin="wrong\none\n") == (2, ABOUT, "error: this prompt is refused\n")


@pytest.fixture
def stand_in(front: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The newest stand-in stage, in this process."""
    monkeypatch.syspath_prepend(str(front))
    name = "m1_two"
    assert importlib.util.find_spec(name) is not None
    module = importlib.import_module(name)
    monkeypatch.setattr(cli, "import_stage", lambda _: module)
    yield module
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]


def test_chat_at_a_terminal(
    stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends an answer, or clears the line, and the chat goes on; so does a refused question; Ctrl-D leaves."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed: list[str | BaseException] = ["tired", KeyboardInterrupt(), "wrong", "on", EOFError()]

    def read_line(prompt: str) -> str:
        assert prompt == "> "
        item = typed.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", read_line)
    assert cli.main(["chat", "--model", str(TINY)]) == 0
    captured = capsys.readouterr()
    stopped = "256/0.5/None u:tired"
    lines = captured.out.splitlines()
    assert lines[0] == ABOUT.strip() and "Ctrl-D" in lines[1]
    assert lines[2] == f"{stopped} [stopped]"
    assert lines[-1] == f"256/0.5/None u:tired a:{stopped} u:on"
    assert captured.err == "error: this prompt is refused\n"
    assert typed == [] and stand_in.LLM.closed == 1


# ---- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "name"), [(None, "m1_two"), ("m0", "m0_one"), ("m1_two", "m1_two")])
def test_the_package_is_the_stage(front: Path, chosen: str | None, name: str) -> None:
    """Names and modules are the stage's own objects, whichever is imported first."""
    program = f"""
import pickle, sys
import folovllm.engine.core as core
from folovllm.config import EngineConfig
from folovllm import LLM, SamplingParams, config, engine
from folovllm import *
import {name}.engine.core, {name} as stage
import folovllm

assert EngineConfig is stage.config.EngineConfig is folovllm.EngineConfig is core.SELF
assert core is stage.engine.core and config is stage.config and engine is stage.engine
assert LLM is stage.LLM and SamplingParams is folovllm.SamplingParams
assert type(pickle.loads(pickle.dumps(folovllm.EngineConfig()))) is stage.EngineConfig
assert stage.config.__spec__.name == "{name}.config" and stage.config.__name__ == "{name}.config"
assert TINY.parts[-3:] == ("folovllm", "models", "tiny")
assert {{"LLM", "TINY"}} <= set(dir(folovllm))
copies = [name for name in sys.modules if name.startswith("m") and name[1].isdigit() and "{name}" not in name]
assert not copies, copies
"""
    run = python(front, "-c", program, stage=chosen)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("import folovllm.nothing", "ModuleNotFoundError: No module named 'folovllm.nothing'"),
        ("import folovllm.engine.nothing", "ModuleNotFoundError: No module named 'folovllm.engine.nothing'"),
        ("import folovllm.stages.nothing", "ModuleNotFoundError: No module named 'folovllm.stages.nothing'"),
        ("from folovllm import Nothing", "ImportError: cannot import name 'Nothing' from 'folovllm'"),
        ("import folovllm; folovllm.nothing", "AttributeError: module 'folovllm' has no attribute 'nothing'"),
    ],
)
def test_what_no_stage_has_is_an_ordinary_error(front: Path, statement: str, error: str) -> None:
    assert error in python(front, "-c", statement).stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [["--help"], ["stages", "--help"], ["stages", "check"], ["diff", "m0", "m0"], ["diff", "m0", "m77"]]
)
def test_the_tools_import_neither_torch_nor_a_stage(command: list[str]) -> None:
    """Of this repository, so that nothing heavy creeps in; importing torch alone would take seconds."""
    program = f"""
import sys
from folovllm import TINY, cli
try:
    cli.main({command!r})
except SystemExit:
    pass
print([name for name in sys.modules if name in ("torch", "transformers", "numpy") or name.startswith("m0_")])
"""
    run = python(REPOSITORY, "-c", program)
    assert run.stdout.splitlines()[-1] == "[]"
