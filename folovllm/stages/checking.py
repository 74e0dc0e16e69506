"""`check`: does the tree keep what the ledger says?

This is what keeps eight copies of one engine honest: the diff between neighbours shows what is declared and nothing
else. Breaches are errors. A size over budget and a GPU run older than the code are warnings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .ledger import LEDGER, STAGE_NAME, Stage, load_ledger, read_stage, stage_hash
from .measure import Source, analyse, changed_lines

GPU_RESULTS = "docs/results/gpu_tests.json"

# Budgets, in code lines. A step's changed lines are those added plus those removed.
MAX_FILE, MAX_FUNCTION, MAX_STAGE, HARD_MAX_STAGE = 300, 50, 4_000, 4_500
MAX_CHANGED = {"m1": 1_200, "m2": 600, "m3": 900, "m4": 900, "m5": 300, "m6": 450, "m7": 900}


@dataclass
class Report:
    """What `check` found: one row a stage (name, files, code lines, changed lines, their budget), and complaints."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The table, then the complaints, one a line."""
        table = [("stage", "files", "code lines", "changed", "budget"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for name, *numbers in table:
            cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
        lines += [f"warning: {text}" for text in self.warnings] + [f"error: {text}" for text in self.errors]
        return "\n".join([*lines, f"errors: {len(self.errors)}, warnings: {len(self.warnings)}"])


def check(root: Path) -> Report:
    """Hold the tree to its ledger. Breaches are errors; a size over budget or an outdated GPU run is a warning."""
    ledger, report = load_ledger(root), Report()
    names = {stage.name for stage in ledger}
    for path in sorted(root.glob("m[0-9]*_*/__init__.py")):
        if path.parent.name not in names:
            report.errors.append(f"{path.parent.name} is not in {LEDGER}")

    old: tuple[dict[str, bytes], dict[str, Source]] | None = None
    for stage in ledger:
        files = read_stage(root, stage.name)
        if not files:
            report.errors.append(f"{stage.name} is in {LEDGER}, but there is no such folder or it is empty")
            old = None
            continue
        sources = _check_sources(stage.name, files, names, report)
        changed = 0
        if old is not None:
            report.errors += _undeclared(stage, old[0], files)
            pairs = [(old[1].get(path), sources.get(path)) for path in {*old[1], *sources}]
            changed = sum(changed_lines(a.code if a else (), b.code if b else ()) for a, b in pairs if a != b)
        budget = MAX_CHANGED.get(stage.short) if old is not None else None
        if budget is not None and changed > budget:
            report.warnings.append(f"{stage.name} changes {changed} code lines, its budget is {budget}")
        code = sum(len(source.code) for source in sources.values())
        if code > HARD_MAX_STAGE:
            report.errors.append(f"{stage.name} has {code} code lines, at most {HARD_MAX_STAGE} are allowed")
        elif code > MAX_STAGE:
            report.warnings.append(f"{stage.name} has {code} code lines, its budget is {MAX_STAGE}")
        step = ("", "") if old is None else (str(changed), str(budget or ""))
        report.rows.append((stage.name, str(len(files)), str(code), *step))
        old = (files, sources)
    report.warnings += _outdated_gpu_runs(root, ledger)
    return report


def _check_sources(stage: str, files: dict[str, bytes], names: set[str], report: Report) -> dict[str, Source]:
    """Look at every Python file of a stage by itself: its size, what it imports, words that belong in the ledger."""
    sources: dict[str, Source] = {}
    for path, data in files.items():
        if not path.endswith(".py"):
            continue
        try:
            source = sources[path] = analyse(data.decode("utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            report.errors.append(f"{stage}/{path} is not Python: {error}")
            continue
        if len(source.code) > MAX_FILE:
            report.warnings.append(f"{stage}/{path} has {len(source.code)} code lines, its budget is {MAX_FILE}")
        for function in source.functions:
            if function.size > MAX_FUNCTION and not function.is_kernel:
                report.warnings.append(
                    f"{stage}/{path}: {function.name} has {function.size} code lines, its budget is {MAX_FUNCTION}"
                )
        for row, level, module in source.imports:
            top = module.split(".")[0]
            if level > path.count("/") + 1:
                report.errors.append(f"{stage}/{path}:{row}: a relative import climbs out of the stage")
            elif level == 0 and (top == "folovllm" or top in names or STAGE_NAME.fullmatch(top)):
                report.errors.append(f"{stage}/{path}:{row}: imports {module}; a stage has relative imports only")
        for row, words in source.markers:
            report.errors.append(f"{stage}/{path}:{row}: {words!r} names a stage, but code reads the same in all")
    return sources


def _undeclared(stage: Stage, old: dict[str, bytes], new: dict[str, bytes]) -> Iterator[str]:
    """Where the step from the files `old` to `new` differs from what the ledger says of `stage`."""
    adds, changes = set(stage.adds), set(stage.changes)
    for path in sorted({*old, *new, *adds, *changes}):
        name = f"{stage.name}/{path}"
        if path not in new:
            yield f"{name} is missing" + (
                ", though the stage before has it" if path in old else ", though it is declared"
            )
        elif path in adds and path in old:
            yield f"{name} is declared under adds, but the stage before has it already"
        elif path in changes and path not in old:
            yield f"{name} is declared under changes, but the stage before does not have it"
        elif path in changes and old[path] == new[path]:
            yield f"{name} is declared under changes, but it is the same as in the stage before"
        elif path not in old and path not in adds:
            yield f"{name} is new, but not declared under adds"
        elif path in old and old[path] != new[path] and path not in changes:
            yield f"{name} differs from the stage before, but is not declared under changes"


def _outdated_gpu_runs(root: Path, ledger: list[Stage]) -> Iterator[str]:
    """Stages whose code is not the code that the last GPU run tested."""
    if not (root / GPU_RESULTS).is_file():
        yield f"{GPU_RESULTS} is missing: no GPU run is recorded for any stage"
        return
    try:
        runs = json.loads((root / GPU_RESULTS).read_text(encoding="utf-8"))
        tested = {name: run["hash"] for name, run in runs.items()}
        not_passed = {name: run.get("tests", run["passed"]) - run["passed"] for name, run in runs.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        yield f"{GPU_RESULTS} cannot be read: it must map each stage to its run, with a hash"
        return
    for stage in ledger:
        if stage.name not in tested:
            yield f"{GPU_RESULTS} records no GPU run of {stage.name}"
        elif tested[stage.name] != stage_hash(root, stage.name):
            yield f"{stage.name} has changed since its GPU run in {GPU_RESULTS}"
        if not_passed.get(stage.name):
            yield f"{stage.name}: {not_passed[stage.name]} tests of its GPU run in {GPU_RESULTS} did not pass"
