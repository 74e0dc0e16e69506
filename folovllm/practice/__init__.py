"""`folovllm practice m5`: build a stage yourself, from the one before it, with tests that turn green task by task.

Every stage but the first has a sheet beside this file: what to build, in which files, in what order, which shared tests
each task turns green, and hints. A learner works on a copy under practice/, which git ignores; the copy becomes what
`pytest tests --milestone practice/m5 --as m5` tests. Nothing that a learner wrote is ever overwritten or deleted.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..stages import FileDiff, LedgerError, diff_trees, load_ledger, read_stage, resolve_stage

SHEETS = Path(__file__).resolve().parent
TASKS = "TASKS.md"
# Not part of the work: our page of the stage, and the sheet.
_PAGES = ("README.md", TASKS)


@dataclass(frozen=True)
class Task:
    """One task of a sheet.

    Attributes:
        files: of the stage, that are worked on.
        names: that the tests know, of what is made there.
        tests: {path of a test file: words of its `-k`, each the name of a test or its beginning}.
        num_hints: that fold out.
    """

    title: str
    files: list[str]
    names: list[str]
    tests: dict[str, list[str]]
    num_hints: int


def read_sheet(text: str) -> list[Task]:
    """The tasks of a sheet, in order."""
    tasks = []
    for section in re.split(r"^## Task \d+: ", text, flags=re.MULTILINE)[1:]:
        tests: dict[str, list[str]] = {}
        for command in re.findall(r"^pytest .+$", section, re.MULTILINE):
            _, path, *options = shlex.split(command)
            tests.setdefault(path, []).extend(options[options.index("-k") + 1].split(" or "))
        files, names = _listed("Files", section), _listed("Names", section)
        tasks.append(Task(section.splitlines()[0], files, names, tests, section.count("<details>")))
    return tasks


def _listed(what: str, section: str) -> list[str]:
    line = re.search(rf"^{what}: (.+)$", section, re.MULTILINE)
    return re.findall(r"`([^`]+)`", line[1]) if line else []


def find_stages(root: Path, name: str) -> tuple[str, str]:
    """The stage that `name` means, and the one before it. Raises LedgerError where there is none before it."""
    names = [stage.name for stage in load_ledger(root)]
    stage = resolve_stage(name, names)
    if stage == names[0]:
        raise LedgerError(f"{stage} is where it begins: to practise, take {names[1]} or a later one")
    return stage, names[names.index(stage) - 1]


def folder_of(root: Path, stage: str) -> Path:
    """Where a learner works: practice/m5 for m5_chunked."""
    return root / "practice" / stage.split("_")[0]


def start(root: Path, name: str) -> Path:
    """Copy the stage before `name` to the learner's folder, with the task sheet; returns the folder.

    Raises:
        LedgerError: an unknown stage, or one with nothing before it.
        ValueError: the folder is there.
    """
    stage, before = find_stages(root, name)
    folder = folder_of(root, stage)
    if folder.exists():
        raise ValueError(
            f"{folder} is there, and stays as it is: go on with it, or begin again with --fresh, which moves it aside"
        )
    sheet = SHEETS / f"{folder.name}.md"
    for path, data in read_stage(root, before).items():
        if path not in _PAGES:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    shutil.copyfile(sheet, folder / TASKS)
    return folder


def move_aside(root: Path, name: str) -> Path | None:
    """Rename the learner's folder, if it is there, to the first of practice/m5_old1, m5_old2, … that is free."""
    folder = folder_of(root, find_stages(root, name)[0])
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}_old{number}")).exists():
        number += 1
    return folder.rename(aside)


def compare(root: Path, name: str, file: str | None = None) -> list[FileDiff]:
    """What our stage has otherwise than the learner's copy; with `file`, only that file.

    Raises:
        LedgerError: an unknown stage or file.
        ValueError: there is no copy.
    """
    stage, _ = find_stages(root, name)
    folder = folder_of(root, stage)
    if not folder.is_dir():
        raise ValueError(f"there is no {folder}: begin with folovllm practice {folder.name}")
    mine, ours = (
        {path: data for path, data in files.items() if path not in _PAGES}
        for files in (read_stage(root, f"practice/{folder.name}"), read_stage(root, stage))
    )
    return diff_trees(f"practice/{folder.name}", mine, stage, ours, file)


def overview(root: Path) -> str:
    """One line a stage: its title, and whether there is a copy."""
    lines = []
    for stage in load_ledger(root)[1:]:
        folder = folder_of(root, stage.name)
        tasks = read_sheet((SHEETS / f"{stage.short}.md").read_text(encoding="utf-8"))
        begun = f"begun: practice/{folder.name}" if folder.is_dir() else f"folovllm practice {stage.short}"
        lines.append(f"{stage.short}  {stage.title:<34}  {len(tasks)} tasks  {begun}")
    return "\n".join(lines)
