"""The pages under docs/api, made from the docstrings of the newest stage: `python -m folovllm.bench.apidocs [--check]`.

The source is read and not imported, so the pages are the same on every machine, and a test can hold them to the code.
Documented are the modules that define what a stage exports, and those named in `MORE_MODULES`, as far as it has them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ..stages import find_root, load_ledger

FOLDER = Path("docs", "api")
#: Public without being exported: what one reaches through an LLM.
MORE_MODULES = ("engine/llm_engine.py", "metrics/stats.py")

COMMAND = "python -m folovllm.bench.apidocs"
NO_DEFAULT = "–"


def make_pages(root: Path) -> dict[str, str]:
    """{file name under docs/api: Markdown}, for the newest stage of the repository at `root`."""
    stage = load_ledger(root)[-1].name
    pages = {}
    rows = []
    for module in public_modules(root / stage):
        tree = ast.parse((root / stage / module).read_text(encoding="utf-8"))
        name = module.removesuffix(".py").replace("/", ".")
        classes = ", ".join(f"`{node.name}`" for node in public(tree.body, ast.ClassDef))
        page = f"{name}.md"
        pages[page] = "\n".join(module_page(tree, name, f"../../{stage}/{module}")).rstrip() + "\n"
        rows.append(f"| [{name}]({page}) | {classes} | {summary(tree)} |")
    head = [
        "# API",
        "",
        f"What [{stage}](../../{stage}/README.md), the newest stage, offers to a program. Earlier stages offer a part",
        "of it: each does everything that the one before it does. `from folovllm import …` and",
        f"`from {stage} import …` give the same objects.",
        "",
        f"These pages are made from the docstrings by `{COMMAND}`; change those, not these.",
        "",
        "| module | defines | why it exists |",
        "|---|---|---|",
    ]
    return {"README.md": "\n".join([*head, *rows]) + "\n", **pages}


def public_modules(stage: Path) -> list[str]:
    """Paths in the stage's folder: those that `__init__.py` imports from, in its order, and MORE_MODULES."""
    tree = ast.parse((stage / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    paths = [f"{str(node.module).replace('.', '/')}.py" for node in imports]
    return [*paths, *(path for path in MORE_MODULES if (stage / path).is_file() and path not in paths)]


def summary(tree: ast.Module) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(tree) or ""
    return cell(docstring.split("\n\n")[0])


Node = TypeVar("Node", ast.ClassDef, ast.FunctionDef)


def public(body: list[ast.stmt], kind: type[Node]) -> Iterator[Node]:
    """The classes, or the functions, whose names have no underscore before them."""
    return (node for node in body if isinstance(node, kind) and not node.name.startswith("_"))


# ---- a module, a class, a method -------------------------------------------------------------------------------------


def module_page(tree: ast.Module, name: str, source: str) -> Iterator[str]:
    yield from (f"# {name}", "", f"[Source]({source})", "")
    yield from docstring_lines(tree)
    for node in public(tree.body, ast.ClassDef):
        yield from class_section(node)


def class_section(node: ast.ClassDef) -> Iterator[str]:
    """Prose, how it is made, its fields and properties as tables, and its methods."""
    yield from (f"## class {node.name}", "")
    fields = class_fields(node)
    yield from prose_lines(node)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            yield from code(signature(item, node.name))
    if fields:
        described = dict(sections(node).get("Attributes", []))
        yield from ("| field | type | default | meaning |", "|---|---|---|---|")
        for name, kind, default in fields:
            yield f"| `{name}` | {inline(kind)} | {inline(default)} | {cell(meaning_of(name, described))} |"
        yield ""
    yield from section_lines(node, skip=("Attributes",) if fields else ())
    methods = list(public(node.body, ast.FunctionDef))
    properties = [method for method in methods if is_property(method)]
    if properties:
        yield from ("| property | type | meaning |", "|---|---|---|")
        for method in properties:
            kind = ast.unparse(method.returns) if method.returns else ""
            yield f"| `{method.name}` | {inline(kind)} | {cell(ast.get_docstring(method) or '')} |"
        yield ""
    for method in methods:
        if method not in properties:
            yield from (f"### {node.name}.{method.name}", "")
            yield from code(signature(method, f"{node.name}.{method.name}"))
            yield from docstring_lines(method)


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def class_fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """(name, type, default) of a dataclass's fields or an enum's members; nothing for any other class."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    is_enum = any("Enum" in ast.unparse(base) for base in node.bases)
    found = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if any(decorator.startswith("dataclass") for decorator in decorators):
                found.append((item.target.id, ast.unparse(item.annotation), default_of(item.value)))
        elif is_enum and isinstance(item, ast.Assign):
            found += [(ast.unparse(target), "", "") for target in item.targets]
    return found


def default_of(value: ast.expr | None) -> str:
    """A field's default as a reader understands it: `field(default_factory=list)` is an empty list."""
    if value is None:
        return NO_DEFAULT
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        factory = options.get("default_factory")
        return f"{factory}()" if factory else options.get("default", NO_DEFAULT)
    return ast.unparse(value)


def meaning_of(name: str, described: dict[str, str]) -> str:
    """An entry may describe several fields at once: "top_p, min_p: float32 [N]"."""
    return next((text for names, text in described.items() if name in names.split(", ")), "")


def signature(node: ast.FunctionDef, name: str) -> str:
    """`name(parameter: type = default, …) -> type`, one parameter a line where one line is too long."""
    parameters = [p for p in parameters_of(node.args) if p not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"])


def parameters_of(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    yield from map(parameter, positional, [*required, *arguments.defaults])
    if arguments.vararg:
        yield f"*{parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from map(parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"**{parameter(arguments.kwarg, None)}"


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


# ---- docstrings ------------------------------------------------------------------------------------------------------

Documented = ast.Module | ast.ClassDef | ast.FunctionDef

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def docstring_lines(node: Documented) -> Iterator[str]:
    """A docstring as Markdown: its prose, then its sections as lists."""
    yield from prose_lines(node)
    yield from section_lines(node)


def prose_lines(node: Documented) -> Iterator[str]:
    prose = "\n".join(parts(node)[""]).strip()
    if prose:
        yield from (escape(prose), "")


def section_lines(node: Documented, skip: tuple[str, ...] = ()) -> Iterator[str]:
    for title, entries in sections(node).items():
        if title not in skip:
            yield from (f"**{title}**", "")
            yield from (f"- `{name}`: {escape(text)}" if name else f"- {escape(text)}" for name, text in entries)
            yield ""


def sections(node: Documented) -> dict[str, list[tuple[str, str]]]:
    """{"Args": [(name, text), …], …}; the name is empty where a section has text alone."""
    found = {}
    for title, lines in parts(node).items():
        if title:
            named = title not in ("Returns", "Yields")
            found[title] = list(entries_of(inspect.cleandoc("\n" + "\n".join(lines)).splitlines(), named))
    return found


def parts(node: Documented) -> dict[str, list[str]]:
    """The lines of a docstring under the title of their section; what comes before any section is under ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in (ast.get_docstring(node) or "").splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            current = line.rstrip(":")
            found[current] = []
        elif current and not line.strip():
            current = ""
        else:
            found[current].append(line)
    return found


def entries_of(lines: list[str], named: bool) -> Iterator[tuple[str, str]]:
    """Entries begin at the margin, and their further lines are indented."""
    entries: list[str] = []
    for line in lines:
        if entries and (line.startswith(" ") or not named):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    for entry in entries:
        name, colon, text = entry.partition(": ")
        yield (name, text) if named and colon else ("", entry)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def code(text: str) -> list[str]:
    return ["```python", text, "```", ""]


def inline(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text and text != NO_DEFAULT else text


def escape(text: str) -> str:
    """`<|im_end|>` is text, not HTML."""
    return text.replace("<", "&lt;")


def cell(text: str) -> str:
    return escape(" ".join(text.split())).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when --check finds a page that is not as it would be written."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write docs/api from the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    args = parser.parse_args(argv)
    root = find_root()
    differing = out_of_date(root)
    if args.check:
        for name in differing:
            print(f"{FOLDER / name} is out of date: run {COMMAND}", file=sys.stderr)
        return int(bool(differing))
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    pages = make_pages(root)
    for name in differing:
        if name in pages:
            (root / FOLDER / name).write_text(pages[name], encoding="utf-8")
        else:
            (root / FOLDER / name).unlink()
    print(f"{len(pages)} pages, {len(differing)} of them new or changed")
    return 0


def out_of_date(root: Path) -> list[str]:
    """Pages that are missing, differ from what would be written, or belong to no module any more."""
    pages = make_pages(root)
    there = {path.name: path.read_text(encoding="utf-8") for path in (root / FOLDER).glob("*.md")}
    return sorted(name for name in pages.keys() | there.keys() if pages.get(name) != there.get(name))


if __name__ == "__main__":
    sys.exit(main())
