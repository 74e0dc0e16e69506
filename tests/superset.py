"""Is the public surface of one stage a superset of another's? Judged on the syntax trees, so nothing is imported.

The surface is what a user's program can hold on to: `__all__`, the fields, defaults and properties of EngineConfig,
SamplingParams and the outputs, and the public methods of LLM and LLMEngine. Internals may change; that includes the
methods by which the engine fills in an output.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PUBLIC_CLASSES = {
    "config.py": ["EngineConfig"],
    "sampling_params.py": ["SamplingParams"],
    "outputs.py": ["RequestMetrics", "CompletionOutput", "RequestOutput"],
    "llm.py": ["LLM"],
    "engine/llm_engine.py": ["LLMEngine"],
}
ENGINES = {"LLM", "LLMEngine"}
SPECIAL_METHODS = {"__init__", "__enter__", "__exit__"}


@dataclass
class Method:
    """A signature; defaults are source text, None where there is none."""

    positional: list[tuple[str, str | None]]
    keyword_only: dict[str, str | None]
    takes_any_positional: bool
    takes_any_keyword: bool
    is_property: bool


@dataclass
class Class:
    """Fields map to their default's source text, None where there is none."""

    fields: dict[str, str | None] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)


def compare(old: Path, new: Path) -> list[str]:
    """What a program written for the stage in folder `old` would miss in `new`; empty if nothing."""
    gone = sorted(public_names(old) - public_names(new))
    problems = [f"{name} is gone from __all__" for name in gone]
    old_classes, new_classes = public_classes(old), public_classes(new)
    for name, before in old_classes.items():
        after = new_classes.get(name)
        if after is None:
            problems.append(f"class {name} is gone")
        else:
            if name not in ENGINES:
                before.methods = {name: method for name, method in before.methods.items() if method.is_property}
            problems += [f"{name}.{problem}" for problem in compare_classes(before, after)]
    return problems


def compare_classes(old: Class, new: Class) -> Iterator[str]:
    for name, default in old.fields.items():
        if name not in new.fields:
            yield f"{name}: the field is gone"
        elif new.fields[name] != default:
            yield f"{name}: the default was {default} and is {new.fields[name]}"
    for name, default in new.fields.items():
        if name not in old.fields and default is None:
            yield f"{name}: a new field needs a default"
    for name, before in old.methods.items():
        after = new.methods.get(name)
        if before.is_property and name in new.fields:
            continue
        if after is None:
            yield f"{name}: the method is gone"
        elif after.is_property != before.is_property:
            yield f"{name}: a property has become a method, or the reverse"
        else:
            for problem in compare_parameters(before, after):
                yield f"{name}: {problem}"


def compare_parameters(old: Method, new: Method) -> Iterator[str]:
    if new.positional[: len(old.positional)] != old.positional:
        yield f"the positional parameters {_show(old.positional)} are no prefix of {_show(new.positional)}"
    for name, default in old.keyword_only.items():
        if name not in new.keyword_only:
            yield f"the keyword {name} is gone"
        elif new.keyword_only[name] != default:
            yield f"the default of {name} was {default} and is {new.keyword_only[name]}"
    added = [*new.positional[len(old.positional) :], *new.keyword_only.items()]
    known = {*(name for name, _ in old.positional), *old.keyword_only}
    for name, default in added:
        if default is None and name not in known:
            yield f"the new parameter {name} needs a default"
    if (old.takes_any_positional and not new.takes_any_positional) or (
        old.takes_any_keyword and not new.takes_any_keyword
    ):
        yield "it took any arguments and no longer does"


def public_names(stage: Path) -> set[str]:
    """The stage's `__all__`.

    Raises:
        ValueError: it is no literal list of names.
    """
    for node in ast.parse((stage / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{stage.name}/__init__.py has no __all__")


def public_classes(stage: Path) -> dict[str, Class]:
    """The public classes that the stage has."""
    found = {}
    for path, names in PUBLIC_CLASSES.items():
        if (stage / path).is_file():
            for node in ast.parse((stage / path).read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    found[node.name] = read_class(node)
    return found


def read_class(node: ast.ClassDef) -> Class:
    result = Class()
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            result.fields[item.target.id] = _default(item.value)
        elif isinstance(item, ast.FunctionDef) and (not item.name.startswith("_") or item.name in SPECIAL_METHODS):
            result.methods[item.name] = read_method(item)
    return result


def read_method(node: ast.FunctionDef) -> Method:
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = [ast.unparse(value) for value in arguments.defaults]
    return Method(
        positional=list(zip(names, [*[None] * (len(names) - len(defaults)), *defaults], strict=True)),
        keyword_only={
            argument.arg: None if value is None else ast.unparse(value)
            for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        },
        takes_any_positional=arguments.vararg is not None,
        takes_any_keyword=arguments.kwarg is not None,
        is_property=any(ast.unparse(item) in ("property", "cached_property") for item in node.decorator_list),
    )


def _default(value: ast.expr | None) -> str | None:
    """`field(repr=False)` alone gives a field no default."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {item.arg: ast.unparse(item.value) for item in value.keywords}
        return given.get("default", given.get("default_factory", "computed" if given.get("init") == "False" else None))
    return None if value is None else ast.unparse(value)


def _show(parameters: list[tuple[str, str | None]]) -> str:
    return "(" + ", ".join(name if default is None else f"{name}={default}" for name, default in parameters) + ")"
