"""The examples run offline on the embedded model, and print what their pages promise.

All but one run inside this process, as `python examples/NAME.py` would run them: importing torch and transformers takes
longer than what they do.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest

import folovllm
from folovllm.stages import find_root

from .test_harness import plain_environment

EXAMPLES = find_root() / "examples"
NAMES = ("advanced", "basic_inference", "batch_inference", "chat", "few_shot", "streaming")

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example with these arguments; what it printed. Nothing may be printed to stderr."""

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run_example


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_how_it_is_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    commands = re.findall(r"^    python (examples/\S+\.py)(.*)$", text.split('"""')[1], re.MULTILINE)
    assert commands[0][0] == f"examples/{name}.py" and commands[0][1] == ""
    for path, arguments in commands:
        assert path == f"examples/{name}.py"
        for option in re.findall(r"--[a-z-]+", arguments.split("#")[0]):
            assert f'"{option}"' in text, option


def test_basic_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "examples/basic_inference.py"],
        cwd=EXAMPLES.parent,
        env={**plain_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^(\w[\w ]*?): +(.*)$", done.stdout, re.MULTILINE))
    assert lines["stage"] == folovllm.import_stage().__name__
    assert lines["text"].startswith("Once upon a time, there was a ")
    assert lines["tokens"] == "4 in, 48 out"
    assert lines["ended by"] == "length"
    times = re.fullmatch(r"first token after (\d+\.\d{3}) s, the last after (\d+\.\d{3}) s", lines["timing"])
    assert times is not None and 0 < float(times[1]) < float(times[2])


def test_basic_on_the_first_stage(run: Run) -> None:
    """Another stage and another prompt; greedy text is the same in every stage."""
    texts = [run("basic_inference", "On Monday, Theo", "--stage", stage) for stage in ("m0", "m3")]
    assert "stage:   m0_init\n" in texts[0] and "stage:   m3_paged\n" in texts[1]
    first, second = (re.search(r"text: +(On Monday, Theo.*?)tokens:", text, re.DOTALL) for text in texts)
    assert first is not None and second is not None and first[1] == second[1]


def test_batch(run: Run) -> None:
    printed = run("batch_inference", "--copies", "2", "--max-tokens", "12")
    texts = dict(re.findall(r"^--- (\d+): (.*)$", printed, re.MULTILINE))
    assert list(map(int, texts)) == list(range(8))
    for number, start in enumerate(["Once upon a time", "Mia had a red kite", "Ali had an orange flute", "On Monday"]):
        assert texts[str(number)].startswith(start) and texts[str(number + 4)].startswith(start)
    assert len(set(texts.values())) > 4  # equal prompts, other seeds
    assert re.search(r"^m\d_\w+: 8 requests, 96 tokens in \d+\.\d\d s$", printed, re.MULTILINE)

    alone = run("batch_inference", "--copies", "1", "--max-tokens", "12", "--stage", "m1")
    assert "m1_basic: 4 requests" in alone
    assert dict(re.findall(r"^--- (\d+): (.*)$", alone, re.MULTILINE)) == {n: texts[n] for n in "0123"}


def test_streaming(run: Run) -> None:
    printed = run("streaming")
    one, several, early = re.split(r"^three streams:\n|^until the first full stop:\n", printed, flags=re.MULTILINE)
    assert one.startswith("one stream:\nOnce upon a time, ")
    assert re.search(r"\[first token after \d\.\d{3} s, longest pause \d\.\d{3} s\]", one)
    pieces = re.findall(r"(\d+):('(?:[^'\\]|\\.)*')", several)
    ids = sorted({name for name, _ in pieces}, key=int)
    assert [name for name, _ in pieces] == ids * 4  # a token of each in turn
    assert early.startswith("Once upon a time, ")
    text, note = early.split("\n[")
    assert text.count(".") == 1 and text.endswith(".")
    assert re.fullmatch(r"left after \d\d? of 500 tokens; running now: False\]\n", note)


def test_few_shot(run: Run) -> None:
    printed = run("few_shot")
    rows = re.findall(r"^(.*\?) +(.*\.) +\[(\d+) of (\d+) prompt tokens found\]$", printed, re.MULTILINE)
    assert [answer for _, answer, _, _ in rows] == [
        "Mia went to the old mill.",
        "The hunter helped Mia.",
        "Mia was upset because a goat had run away with the kite.",
    ]
    found, lengths = ([int(row[i]) for row in rows] for i in (2, 3))
    assert found[0] == 0
    assert all(length - 16 < number < length for number, length in zip(found[1:], lengths[1:], strict=True))


def test_few_shot_before_there_was_a_cache(run: Run) -> None:
    printed = run("few_shot", "--stage", "m5")
    assert printed.count("[0 of ") == 3 and "The hunter helped Mia." in printed


def test_chat(run: Run) -> None:
    printed = run("chat")
    turns = re.findall(
        r"user: +([^\n]*)\nassistant: (.*?)\n +\[(\d+) of (\d+) prompt tokens found\]", printed, re.DOTALL
    )
    assert [turn[0] for turn in turns][1:] == ["What colour was the kite?", "Thank you!"]
    assert turns[0][1].startswith("Mia was ") and "red kite" in turns[0][1]
    assert [turn[1] for turn in turns][1:] == ["The kite was red.", "You are welcome!"]
    assert int(turns[0][2]) == 0
    for _, _, found, length in turns[1:]:
        assert int(length) - 48 < int(found) < int(length)  # the history, but for what is not a full block


def test_chat_with_other_turns(run: Run) -> None:
    printed = run("chat", "--system", "You are a storyteller.", "Who are you?")
    assert "assistant: I am a small story model." in printed and printed.count("user:") == 1


def test_advanced(run: Run) -> None:
    parts = dict(re.findall(r"^== (\w+): .*\n((?:(?!== ).*\n)*)", run("advanced"), re.MULTILINE))
    assert list(parts) == ["settings", "sampling", "engine", "stages", "quantized"]
    assert re.search(r"^\d+ blocks of 16 tokens, up to 8 sequences$", parts["settings"], re.MULTILINE)
    assert len(re.findall(r"^[01]: '.*\.' \(stop: '\.'\)$", parts["sampling"], re.MULTILINE)) == 2
    assert "finished in this order: urgent, calm, dull" in parts["engine"]
    found = dict(re.findall(r"^(alice|bob): (\d+) of", parts["engine"], re.MULTILINE))
    assert int(found["alice"]) > 30 and found["bob"] == "0"
    assert "forgotten: True" in parts["engine"]
    assert "same tokens: False" not in parts["stages"] and parts["stages"].count("same tokens: True") == 7
    rows = re.findall(
        r"^(.+?) +(\d+) steps, +(\d+) tokens computed, at most +(\d+) slots held, (\d+) preempted",
        parts["stages"],
        re.MULTILINE,
    )
    figures = {name: tuple(map(int, numbers)) for name, *numbers in rows}
    assert figures["m2 off"][0] > 2 * figures["all on"][0]  # steps
    assert figures["m3 off"][2] > 2 * figures["all on"][2]  # slots
    assert figures["m5 off"][0] < figures["all on"][0]
    assert figures["m6 off"][1] > figures["all on"][1]  # tokens computed
    assert figures["few blocks"][3] > 0 == figures["all on"][3]
    assert re.search(r"weights: 11\.\d MiB -> [34]\.\d MiB", parts["quantized"])
    assert "text: ', there was a " in parts["quantized"]


def test_advanced_shows_every_switch() -> None:
    stage = folovllm.import_stage()
    text = (EXAMPLES / "advanced.py").read_text(encoding="utf-8")
    for kind in (stage.EngineConfig, stage.SamplingParams):
        call = text[text.index(f"{kind.__name__}(\n") :]
        given = set(re.findall(r"^ +(\w+)=", call[: call.index("\n    )")], re.MULTILINE))
        assert given == {field.name for field in fields(kind)}, kind.__name__
