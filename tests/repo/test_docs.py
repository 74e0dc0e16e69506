"""Documents keep up with the code: every `path::Symbol` names something that exists, and every link leads somewhere.

Checked are README.md and its neighbours, everything under docs/, the stages' pages, and the prose of the notebooks.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from folovllm.stages import find_root

ROOT = find_root()
DOCUMENTS = ["*.md", "docs/**/*.md", "m[0-9]*_*/README.md", "folovllm/**/*.md", "examples/**/*.md", "notebooks/*.ipynb"]
ELSEWHERE = ("vllm/",)  # vLLM's own files, which the notes point to and which are not here

REFERENCE = re.compile(r"`([\w-]*[./][\w./-]*)::([^`\s]+)`")  # `path::Symbol` itself is none: it names no file
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)|^ *\[[^\]]+\]: *(\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE
)
HEADING = re.compile(r"^ {0,3}#{1,6} +(.+?) *#* *$", re.MULTILINE)


def documents(root: Path) -> list[Path]:
    return sorted({path for pattern in DOCUMENTS for path in root.glob(pattern)})


def problems_in(document: Path, root: Path) -> list[str]:
    """One line for every reference and every link of a document that leads nowhere."""
    text = prose(document)
    return [*broken_references(text, root), *broken_links(text, document, root)]


def prose(document: Path) -> str:
    """The Markdown of a document; of a notebook, that of its Markdown cells."""
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


# ---- `path::Symbol` --------------------------------------------------------------------------------------------------


def broken_references(text: str, root: Path) -> Iterator[str]:
    for path, symbol in sorted(set(REFERENCE.findall(text))):
        if path.startswith(ELSEWHERE):
            continue
        if not (root / path).is_file():
            yield f"{path}::{symbol}: there is no such file"
        elif symbol.removesuffix("()") not in symbols(root / path):
            yield f"{path}::{symbol}: the file defines no such thing"


@functools.cache
def symbols(path: Path) -> frozenset[str]:
    """All that a Python file defines outside of functions: functions, classes, constants, and `Class.member`."""
    return frozenset(_defined(ast.parse(path.read_text(encoding="utf-8")), ""))


def _defined(node: ast.AST, prefix: str) -> Iterator[str]:
    for item in ast.iter_child_nodes(node):
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + item.name
            if isinstance(item, ast.ClassDef):
                yield from _defined(item, f"{prefix}{item.name}.")
        elif isinstance(item, (ast.Assign, ast.AnnAssign)):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            yield from (prefix + name.id for name in names)
        elif isinstance(item, (ast.If, ast.Try, ast.With)):
            yield from _defined(item, prefix)


# ---- links -----------------------------------------------------------------------------------------------------------


def broken_links(text: str, document: Path, root: Path) -> Iterator[str]:
    shown = CODE_SPAN.sub("", FENCE.sub("", text))
    for target in sorted({"".join(groups) for groups in LINK.findall(shown)}):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        linked = (document.parent / path).resolve() if path else document
        if not linked.is_relative_to(root.resolve()):
            yield f"({target}): leads out of the repository"
        elif not linked.exists():
            yield f"({target}): there is no such file"
        elif anchor and linked.suffix in (".md", ".ipynb") and anchor not in anchors(linked):
            yield f"({target}): there is no such heading"


@functools.cache
def anchors(document: Path) -> frozenset[str]:
    """What a link to a heading may say after the `#`: as GitHub spells it, and in a notebook also as Jupyter does."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", prose(document))):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        repeated = sum(1 for name in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", name))
        found.add(f"{slug}-{repeated}" if repeated else slug)
        if document.suffix == ".ipynb":
            found.add(words.replace(" ", "-"))
    return frozenset(found)


# ---- the documents of this repository --------------------------------------------------------------------------------


def test_there_are_documents() -> None:
    assert ROOT / "README.md" in documents(ROOT)


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in documents(ROOT)])
def test_references_and_links_resolve(name: str) -> None:
    assert problems_in(ROOT / name, ROOT) == []


# ---- the checker itself ----------------------------------------------------------------------------------------------

CODE = """
LIMIT = 3
FIRST, SECOND = 1, 2
if LIMIT:
    SOMETIMES: int = 1

def run():
    inner = 1

class Engine:
    name: str = ""
    class Part:
        def turn(self): ...
    @property
    def state(self): ...
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "m0_x").mkdir()
    (tmp_path / "m0_x" / "code.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "docs" / "other.md").write_text(
        "# Big *words*, here!\n## Twice\n## Twice\n```\n# no heading\n```\n## 3.1 `LLM` and [a link](other.md)\n",
        encoding="utf-8",
    )
    return tmp_path


def check(root: Path, text: str) -> list[str]:
    document = root / "docs" / "page.md"
    document.write_text(text, encoding="utf-8")
    return problems_in(document, root)


@pytest.mark.parametrize(
    "symbol",
    [
        "LIMIT",
        "FIRST",
        "SECOND",
        "SOMETIMES",
        "run",
        "run()",
        "Engine",
        "Engine.name",
        "Engine.state",
        "Engine.Part.turn",
    ],
)
def test_a_symbol_that_exists(root: Path, symbol: str) -> None:
    assert check(root, f"See `m0_x/code.py::{symbol}`.") == []


@pytest.mark.parametrize("symbol", ["limit", "inner", "run.inner", "Engine.stop", "turn", "Part", "Engine.Part.name"])
def test_a_symbol_that_does_not_exist(root: Path, symbol: str) -> None:
    assert check(root, f"See `m0_x/code.py::{symbol}`.") == [f"m0_x/code.py::{symbol}: the file defines no such thing"]


def test_a_file_that_does_not_exist(root: Path) -> None:
    # The path starts at the root of the repository, not at the document.
    elsewhere = "`path::Symbol`, `vllm/v1/core/sched/scheduler.py::Scheduler`"
    assert check(root, f"{elsewhere}, `code.py::run`, `m0_x/code::run`, `../m0_x/code.py::run`") == [
        "../m0_x/code.py::run: there is no such file",
        "code.py::run: there is no such file",
        "m0_x/code::run: there is no such file",
    ]


@pytest.mark.parametrize(
    "link",
    [
        "[a](other.md)",
        "[a](other.md#twice) [b](other.md#twice-1) [c](other.md#big-words-here)",
        "[a](other.md#31-llm-and-a-link)",
        "[a](../m0_x/code.py)",
        "[a](../m0_x)",
        "# Here\n[a](#here)",
        "[a](https://nowhere.invalid/x.md) [b](mailto:nobody@nowhere.invalid)",
        "`[a](gone.md)`\n```\n[a](gone.md)\n```",
        '[a](other.md "with a title")',
    ],
)
def test_a_link_that_leads_somewhere(root: Path, link: str) -> None:
    assert check(root, link) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](gone.md)", "(gone.md): there is no such file"),
        ("![a](gone.png)", "(gone.png): there is no such file"),
        ('<img src="gone.png">', "(gone.png): there is no such file"),
        ("[a][b]\n\n[b]: gone.md", "(gone.md): there is no such file"),
        ("[a](docs/other.md)", "(docs/other.md): there is no such file"),
        ("[a](other.md#twice-2)", "(other.md#twice-2): there is no such heading"),
        ("[a](other.md#no-heading)", "(other.md#no-heading): there is no such heading"),
        ("[a](#here)", "(#here): there is no such heading"),
        ("[a](../../outside.md)", "(../../outside.md): leads out of the repository"),
        ("`code` [a](gone.md) `code`", "(gone.md): there is no such file"),
    ],
)
def test_a_link_that_leads_nowhere(root: Path, link: str, problem: str) -> None:
    assert check(root, link) == [problem]


def test_the_prose_of_a_notebook(root: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# The Question\n", "`m0_x/code.py::gone` and `m0_x/code.py::run`"]},
        {"cell_type": "code", "source": ["# `m0_x/code.py::not_looked_at`"]},
        {"cell_type": "markdown", "source": "[up](#The-Question) [up](#the-question) [down](#the-answer)"},
    ]
    notebook = root / "docs" / "page.ipynb"
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert problems_in(notebook, root) == [
        "m0_x/code.py::gone: the file defines no such thing",
        "(#the-answer): there is no such heading",
    ]


def test_every_kind_of_document_is_looked_at(root: Path) -> None:
    names = ["README.md", "docs/learn/00_init.md", "m0_x/README.md", "notebooks/00_init.ipynb"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    found = {path.relative_to(root).as_posix() for path in documents(root)}
    assert found == {*names, "docs/other.md"}
