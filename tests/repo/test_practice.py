"""`folovllm practice`: the copies, and the sheets: our stage passes every test that a sheet names, the copy fails it.

All tests of a sheet run in one process, on both copies, as most of its time goes into imports.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from folovllm import practice
from folovllm.cli import main
from folovllm.stages import LedgerError, find_root, known_stages, load_ledger, read_stage

from .test_harness import plain_environment

ROOT = find_root()
STAGES = {stage.short: stage for stage in load_ledger(ROOT)}
SHEETS = list(STAGES)[1:]


@functools.cache
def sheet(short: str) -> str:
    return (practice.SHEETS / f"{short}.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- the sheets


def test_every_stage_but_the_first_has_a_sheet() -> None:
    assert sorted(path.stem for path in practice.SHEETS.glob("*.md")) == SHEETS


@pytest.mark.parametrize("short", SHEETS)
def test_a_sheet_is_complete(short: str) -> None:
    tasks = practice.read_sheet(sheet(short))
    assert 4 <= len(tasks) <= 7
    assert re.findall(r"^## Task (\d+)", sheet(short), re.MULTILINE) == [str(n + 1) for n in range(len(tasks))]
    assert sheet(short).count("<details>") == sheet(short).count("</details>")
    for task in tasks:
        assert 2 <= task.num_hints <= 3, task.title
        assert task.tests, task.title
        assert all(words and all(words) for words in task.tests.values()), task.title
    for command in re.findall(r"^pytest .+$", sheet(short), re.MULTILINE):
        assert f"--milestone practice/{short} --as {short} -k " in command


@pytest.mark.parametrize("short", SHEETS)
def test_a_sheet_names_the_files_of_its_stage(short: str) -> None:
    """Each file that the ledger lists is worked on in some task, and no other."""
    named = {file for task in practice.read_sheet(sheet(short)) for file in task.files}
    listed = {*STAGES[short].adds, *STAGES[short].changes} - {"README.md"}
    empty = {file for file in listed if not (ROOT / STAGES[short].name / file).read_bytes()}
    assert named | empty == listed


@pytest.mark.parametrize("short", SHEETS)
def test_names_are_those_of_the_stage(short: str) -> None:
    for task in practice.read_sheet(sheet(short)):
        code = "".join((ROOT / STAGES[short].name / file).read_text(encoding="utf-8") for file in task.files)
        known = set(re.findall(r"\w+", code))
        for name in task.names:
            assert set(re.findall(r"\w+", name)) <= known, f"{task.title}: {name}"


# Each a group of its own, for pytest-xdist: or one worker would get them all.
@pytest.mark.parametrize("short", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SHEETS])
def test_ours_passes_what_the_untouched_copy_fails(short: str, tmp_path: Path) -> None:
    root = small_repository(tmp_path, short)
    untouched = practice.start(root, short)
    ours = tmp_path / "practice" / f"{short}_ours"
    shutil.copytree(ROOT / STAGES[short].name, ours, ignore=shutil.ignore_patterns("__pycache__"))
    tasks = practice.read_sheet(sheet(short))

    results = run_tests(tasks, {"ours": ours, "untouched": untouched}, short, tmp_path / "report.xml")
    for number, task in enumerate(tasks, start=1):
        for path, words in task.tests.items():
            for word in words:
                found = {
                    copy: Counter(outcome for name, outcome in cases if name[0] == path and word in name[1])
                    for copy, cases in results.items()
                }
                where = f"task {number}, {path}, {word}: {found}"
                assert found["ours"]["passed"] > 0 and set(found["ours"]) <= {"passed", "skipped"}, where
                assert found["untouched"]["failed"] > 0 and set(found["untouched"]) <= {"failed", "skipped"}, where


def run_tests(
    tasks: list[practice.Task], copies: dict[str, Path], short: str, report: Path
) -> dict[str, list[tuple[tuple[str, str], str]]]:
    """{copy: [((path of the test file, name of the test), "passed", "failed" or "skipped")]}."""
    paths = sorted({path for task in tasks for path in task.tests})
    words = sorted({word for task in tasks for group in task.tests.values() for word in group})
    options = ["--milestone", ",".join(map(str, copies.values())), "--as", short, "-k", " or ".join(words)]
    quiet = ["-q", "--tb=no", "-p", "no:cacheprovider", "--timeout", "120", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *paths, *options, *quiet],
        cwd=ROOT,
        env={**plain_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]  # some failed: those of the untouched copy
    results: dict[str, list[tuple[tuple[str, str], str]]] = {name: [] for name in copies}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        number = re.search(rf"[\[-]{short}_?(\d)[\]-]", case.attrib["name"])  # pytest numbers ids that are the same
        assert number is not None, case.attrib["name"]
        outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        outcome = next((outcomes[child.tag] for child in case if child.tag in outcomes), "passed")
        results[list(copies)[int(number[1])]].append(((path, case.attrib["name"]), outcome))
    return results


# ---------------------------------------------------------------------- the copies


def small_repository(folder: Path, short: str) -> Path:
    """The ledger, the stage and the one before it: all that a copy is made of."""
    names = known_stages()
    number = names.index(STAGES[short].name)
    shutil.copyfile(ROOT / "stages.toml", folder / "stages.toml")
    for name in names[number - 1 : number + 1]:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository around m5, in which the command works."""
    monkeypatch.setattr("folovllm.stages.find_root", lambda: tmp_path)
    return small_repository(tmp_path, "m5")


def test_a_copy_is_the_stage_before_and_the_sheet(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["practice", "m5"]) == 0
    copy, before = read_stage(root, "practice/m5"), read_stage(root, "m4_flash")
    assert copy.pop("TASKS.md").decode() == sheet("m5")
    del before["README.md"]
    assert copy == before
    printed = capsys.readouterr().out
    assert "practice/m5 is a copy of m4_flash" in printed
    assert "practice/m5/TASKS.md" in printed


def test_what_a_learner_wrote_is_never_overwritten(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["practice", "m5_chunked"]) == 0
    (root / "practice" / "m5" / "config.py").write_text("first")
    assert main(["practice", "m5"]) == 2
    assert "stays as it is" in capsys.readouterr().err
    assert (root / "practice" / "m5" / "config.py").read_text() == "first"
    for number in (1, 2):
        assert main(["practice", "m5", "--fresh"]) == 0
        assert f"is practice/m5_old{number} now" in capsys.readouterr().out
        assert (root / "practice" / "m5" / "config.py").read_bytes() == (root / "m4_flash" / "config.py").read_bytes()
        (root / "practice" / "m5" / "config.py").write_text(f"again {number}")
    assert (root / "practice" / "m5_old1" / "config.py").read_text() == "first"
    assert (root / "practice" / "m5_old2" / "config.py").read_text() == "again 1"


def test_fresh_where_there_is_nothing(root: Path) -> None:
    assert main(["practice", "m5", "--fresh"]) == 0
    assert [path.name for path in (root / "practice").iterdir()] == ["m5"]


def test_comparing_with_ours(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["practice", "m5"])
    capsys.readouterr()
    assert main(["practice", "m5", "--compare", "--stat"]) == 0
    stat = capsys.readouterr().out
    for path in {*STAGES["m5"].adds, *STAGES["m5"].changes} - {"README.md"}:
        assert f"{path} " in stat
    assert "TASKS.md" not in stat and "README.md" not in stat

    assert main(["practice", "m5", "--compare", "chunk_policy.py"]) == 0
    printed = capsys.readouterr().out
    assert "--- /dev/null" in printed and "+++ m5_chunked/core/sched/chunk_policy.py" in printed
    assert "+class ChunkController" in printed

    for path, data in read_stage(root, "m5_chunked").items():
        target = root / "practice" / "m5" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    mine = root / "practice" / "m5" / "config.py"
    mine.write_text(mine.read_text().replace('chunk_policy: str = "fixed"', 'chunk_policy: str = "mine"'))
    assert main(["practice", "m5", "--compare"]) == 0
    printed = capsys.readouterr().out
    assert "--- practice/m5/config.py" in printed
    assert '-    chunk_policy: str = "mine"' in printed and '+    chunk_policy: str = "fixed"' in printed
    assert "files: 1, of them new: 0, lines: +1 -1" in printed
    assert main(["practice", "m5", "--compare", "llm.py"]) == 0
    assert capsys.readouterr().out == "llm.py is the same in your copy and in ours\n"

    page = root / "page.html"
    assert main(["practice", "m5", "--compare", "--html", str(page)]) == 0
    assert "practice m5 --compare" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m0"], "m0_init is where it begins"),
        (["m9"], "unknown stage 'm9'"),
        (["m5", "--compare"], "begin with folovllm practice m5"),
        (["--compare"], "which stage?"),
        (["--fresh"], "which stage?"),
        (["m5", "--stat"], "--stat and --html go with --compare"),
    ],
)
def test_mistakes(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["practice", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "practice").exists()


def test_comparing_a_file_that_is_not_there(root: Path) -> None:
    practice.start(root, "m5")
    with pytest.raises(LedgerError, match=r"neither practice/m5 nor m5_chunked has a file nothing\.py"):
        practice.compare(root, "m5", "nothing.py")


def test_the_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    practice.start(root, "m5")
    assert main(["practice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == SHEETS
    for line, short in zip(lines, SHEETS, strict=True):
        assert STAGES[short].title in line
        assert line.endswith("begun: practice/m5" if short == "m5" else f"folovllm practice {short}")


def test_git_ignores_practice() -> None:
    assert "/practice/" in (ROOT / ".gitignore").read_text().splitlines()
