"""Measures of one Python file: code lines, function sizes, imports, and words that name a stage.

A code line holds code: blank lines, comments and docstrings do not count. What runs over many files is cached by their
text, since most files are the same in all stages.
"""

from __future__ import annotations

import ast
import difflib
import functools
import io
import re
import tokenize
from dataclasses import dataclass

from .ledger import STAGE_NAME

_STAGE_FOLDER = re.compile(rf"\b{STAGE_NAME.pattern}\b")
# In comments and strings only: `m1` is a fine name for a variable.
_MARKER = re.compile(r"\bm\d\b|\b(?:milestone|stage) \d\b", re.IGNORECASE)
_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Function:
    """A function's size in code lines, the functions inside it included, its decorators not."""

    name: str
    size: int
    is_kernel: bool


@dataclass(frozen=True)
class Source:
    """What `check` wants to know of one Python file."""

    code: tuple[str, ...]
    functions: tuple[Function, ...]
    imports: tuple[tuple[int, int, str], ...]  # line, level (dots), module
    markers: tuple[tuple[int, str], ...]  # line, the words found there


@functools.cache  # most files are the same in all stages
def analyse(text: str) -> Source:
    """Measure one Python file. Raises SyntaxError."""
    tree = ast.parse(text)
    lines = text.splitlines()
    nodes = list(ast.walk(tree))
    doc_rows: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            doc_rows.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))

    rows: set[int] = set()
    prose = [
        (node.lineno, node.value) for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            prose.append((token.start[0], token.string))
        is_docstring = token.type == tokenize.STRING and token.start[0] in doc_rows
        if token.type not in _NOT_CODE and not is_docstring:
            rows.update(range(token.start[0], token.end[0] + 1))

    functions = []
    imports: list[tuple[int, int, str]] = []
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = len(rows.intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
            is_kernel = any(ast.unparse(item).split("(")[0] == "triton.jit" for item in node.decorator_list)
            functions.append(Function(node.name, size, is_kernel))
        elif isinstance(node, ast.Import):
            imports += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.lineno, node.level, node.module or ""))
    markers = {(row, match[0]) for row, line in enumerate(lines, 1) for match in _STAGE_FOLDER.finditer(line)}
    for row, words in prose:
        markers |= {(row + words.count("\n", 0, match.start()), match[0]) for match in _MARKER.finditer(words)}
    code = tuple(lines[row - 1].strip() for row in sorted(rows))
    return Source(code, tuple(functions), tuple(imports), tuple(sorted(markers)))


def changed_lines(old: tuple[str, ...], new: tuple[str, ...]) -> int:
    """Lines removed plus lines added between two lists of code lines."""
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(i2 - i1 + j2 - j1 for tag, i1, i2, j1, j2 in codes if tag != "equal")
