"""What the guides show works: their Python runs as printed, and the messages that they explain are the engine's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folovllm.stages import find_root, known_stages

ROOT = find_root()
GUIDES = ["docs/getting_started.md", "docs/quick_reference.md", "docs/life_of_a_request.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", GUIDES)
def test_the_snippets_of_a_guide_run(document: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One after the other, as a reader would paste them into one session."""
    monkeypatch.chdir(tmp_path)  # nothing is left behind in the repository
    names: dict[str, Any] = {}
    found = blocks(document)
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{document}, block {number}", "exec"), names)


def test_what_a_request_leaves_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """The listings in the story of a request are what its code prints."""
    document = "docs/life_of_a_request.md"
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n.*?^```\n\n```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert shown
    names: dict[str, Any] = {}
    for code in blocks(document):
        exec(compile(code, document, "exec"), names)
    printed = capsys.readouterr().out
    for listing in shown:
        assert listing in printed


# ---- messages --------------------------------------------------------------------------------------------------------


def messages_explained() -> list[str]:
    """The first column of the table of messages."""
    section = (ROOT / "docs/quick_reference.md").read_text(encoding="utf-8").split("## When something goes wrong")[1]
    table = section.split("| symptom |")[0]
    return [match for line in table.splitlines() for match in re.findall(r"`([^`]+)`", line.split(" | ")[0])]


def strings(folder: Path) -> Iterator[str]:
    """Every string constant, and every constant part of an f-string."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_are_the_engines() -> None:
    said = "\0".join(strings(ROOT / known_stages()[-1]))
    explained = messages_explained()
    assert len(explained) > 20
    unknown = [
        message
        for message in explained
        if not all(part.strip(" ,;:(") in said for part in re.split("…", message) if part.strip(" ,;:("))
    ]
    assert unknown == []
