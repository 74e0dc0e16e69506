"""The ledger tool on a throw-away tree of three stages, and the ledger of this repository itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folovllm import cli, stages
from folovllm.stages.checking import MAX_CHANGED, MAX_FILE, MAX_FUNCTION
from folovllm.stages.measure import analyse, changed_lines

LEDGER = """
[[stage]]
name = "m0_one"
title = "One"
idea = "The first."

[[stage]]
name = "m1_two"
title = "Two"
idea = "The second."
adds = ["extra.py"]
changes = ["engine/core.py"]

[[stage]]
name = "m2_three"
title = "Three"
idea = "The third."
adds = ["engine/more.py"]
changes = ["engine/core.py", "README.md"]
"""
CORE = '"""The core."""\n\nFIRST = 1\n\n\ndef middle() -> int:\n    return 2\n\n\nLAST = {last}\n'
SHARED = {"__init__.py": '"""A stage."""\n', "config.py": "from .engine.core import FIRST\n\nSIZE = FIRST\n"}
STAGES = {
    "m0_one": {**SHARED, "README.md": "first\n", "engine/core.py": CORE.format(last=10)},
    "m1_two": {**SHARED, "README.md": "first\n", "engine/core.py": CORE.format(last=20), "extra.py": "EXTRA = 1\n"},
    "m2_three": {
        **SHARED,
        "README.md": "third\n",
        "engine/core.py": CORE.format(last=30),
        "extra.py": "EXTRA = 1\n",
        "engine/more.py": "from ..config import SIZE\n\nMORE = SIZE\n",
    },
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def git(root: Path, *words: str) -> None:
    # A test run from a git hook must not reach the repository that the hook belongs to.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True, env=clean)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file and folder of the tree but git's own, so that a left-over shows."""
    paths = (path for path in root.rglob("*") if ".git" not in path.relative_to(root).parts)
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"/" for path in paths}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed clean tree, which the command line takes for its own."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    write(tmp_path / "stages.toml", LEDGER)
    for stage, files in STAGES.items():
        for path, text in files.items():
            write(tmp_path / stage / path, text)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "tree")
    monkeypatch.setattr(stages, "find_root", lambda: tmp_path)
    return tmp_path


# ---- check -----------------------------------------------------------------------------------------------------------


def test_clean_tree_has_no_error(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tree / "m1_two" / "__pycache__" / "config.cpython-311.pyc", "not a file of the stage")
    report = stages.check(tree)
    assert report.errors == []
    # core.py has four code lines, config.py two, extra.py one, more.py two; LAST is one line removed and one added.
    assert report.rows == [
        ("m0_one", "4", "6", "", ""),
        ("m1_two", "5", "7", "3", str(MAX_CHANGED["m1"])),
        ("m2_three", "6", "9", "4", str(MAX_CHANGED["m2"])),
    ]
    assert cli.main(["stages", "check"]) == 0
    assert "m2_three" in capsys.readouterr().out


def in_ledger(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: replace(root / "stages.toml", old, new)


def put(path: str, text: str) -> Callable[[Path], None]:
    return lambda root: write(root / path, text)


def in_all_stages(path: str, text: str) -> Callable[[Path], None]:
    """The same file everywhere, so that nothing but its text can be wrong."""

    def spoil(root: Path) -> None:
        for stage in STAGES:
            write(root / stage / path, text)

    return spoil


BREACHES: dict[str, tuple[Callable[[Path], object], str]] = {
    "undeclared change": (put("m1_two/config.py", "SIZE = 3\n"), "m1_two/config.py differs"),
    "undeclared new file": (put("m2_three/stray.txt", "?"), "m2_three/stray.txt is new, but not declared"),
    "vanished file": (lambda root: (root / "m2_three/extra.py").unlink(), "m2_three/extra.py is missing, though the"),
    "vanished stage": (lambda root: shutil.rmtree(root / "m1_two"), "m1_two is in stages.toml, but there is no such"),
    "stage not in the ledger": (put("m3_four/__init__.py", ""), "m3_four is not in stages.toml"),
    "declared change without one": (
        put("m1_two/engine/core.py", CORE.format(last=10)),
        "m1_two/engine/core.py is declared under changes, but it is the same",
    ),
    "declared change of a new file": (
        in_ledger('adds = ["extra.py"]\nchanges = [', 'changes = ["extra.py", '),
        "m1_two/extra.py is declared under changes, but the stage before does not have it",
    ),
    "declared add of an old file": (
        in_ledger('adds = ["extra.py"]\nchanges = ["engine/core.py"]', 'adds = ["extra.py", "engine/core.py"]'),
        "m1_two/engine/core.py is declared under adds, but the stage before has it",
    ),
    "declared add of nothing": (
        in_ledger('adds = ["extra.py"]', 'adds = ["extra.py", "ghost.py"]'),
        "m1_two/ghost.py is missing, though it is declared",
    ),
    "import of another stage": (
        in_all_stages("config.py", "from m0_one import b\n"),
        "m2_three/config.py:1: imports m0_one",
    ),
    "import of its own by name": (
        in_all_stages("config.py", "import m1_two.b\n"),
        "m1_two/config.py:1: imports m1_two.b",
    ),
    "import of a stage to come": (
        in_all_stages("config.py", "import m9_other.b\n"),
        "m0_one/config.py:1: imports m9_other.b",
    ),
    "late import of the front door": (
        in_all_stages("config.py", "def f():\n    from folovllm.lab import run\n"),
        "m0_one/config.py:2: imports folovllm.lab",
    ),
    "relative import out of the stage": (
        in_all_stages("engine/core.py", "from ...m0_one import b\n"),
        "m0_one/engine/core.py:1: a relative import climbs out",
    ),
    "folder name in code": (
        in_all_stages("config.py", "NAME = 'm1_two'\n"),
        "m0_one/config.py:1: 'm1_two' names a stage",
    ),
    "marker in a comment": (
        in_all_stages("config.py", "\nA = 1  # NEW in m3\n"),
        "m0_one/config.py:2: 'm3' names a stage",
    ),
    "marker in a docstring": (
        in_all_stages("config.py", '"""Why.\n\nM5: chunks.\n"""\n'),
        "m0_one/config.py:3: 'M5' names a stage",
    ),
    "broken syntax": (in_all_stages("config.py", "def\n"), "m1_two/config.py is not Python"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_named(tree: Path, breach: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, complaint = BREACHES[breach]
    spoil(tree)
    errors = stages.check(tree).errors
    assert [error for error in errors if error.startswith(complaint)], errors
    assert cli.main(["stages", "check"]) == 1
    assert f"error: {complaint}" in capsys.readouterr().out


def test_variables_and_ordinary_words_are_no_markers(tree: Path) -> None:
    in_all_stages("config.py", "m1, m2 = 1, 2  # a maximum each\nSTAGE = 'stage two of 3, item1'\n")(tree)
    assert stages.check(tree).errors == []


DECLARED = {"m1_two": {"extra.py", "engine/core.py"}, "m2_three": {"engine/more.py", "engine/core.py", "README.md"}}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.sampled_from(sorted(STAGES)),
    path=st.sampled_from(sorted({path for files in STAGES.values() for path in files})),
    comment=st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5),
)
def test_a_change_is_an_error_exactly_when_a_neighbour_forbids_it(
    tree: Path, where: str, path: str, comment: str
) -> None:
    """Changing one file of one stage breaks the step into that stage and the step out of it, unless declared there."""
    if path not in STAGES[where]:
        return
    names = list(STAGES)
    steps = names[max(names.index(where), 1) : names.index(where) + 2]
    text = STAGES[where][path]
    write(tree / where / path, f"{text}# {comment}\n")
    try:
        errors = stages.check(tree).errors
    finally:
        write(tree / where / path, text)
    assert len(errors) == sum(path not in DECLARED[step] for step in steps)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('idea = "The first."', 'idea = "The first."\nadds = ["a.py"]', "m0_one is the first stage"),
        ('adds = ["extra.py"]', 'adds = ["engine/core.py"]', "m1_two lists engine/core.py twice"),
        ('adds = ["extra.py"]', 'adds = "extra.py"', "adds and changes of m1_two must be lists"),
        ('name = "m1_two"', 'name = "m4_two"', "stage 1 must be called m1_something, not 'm4_two'"),
        ('title = "Two"', 'headline = "Two"', "headline"),
        ('title = "Two"', "title = Two", "cannot be read"),
    ],
)
def test_a_broken_ledger_is_refused(
    tree: Path, old: str, new: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(tree / "stages.toml", old, new)
    with pytest.raises(stages.LedgerError, match=complaint):
        stages.check(tree)
    assert cli.main(["stages", "check"]) == 2
    assert capsys.readouterr().err.startswith("error: stages.toml")


def test_a_symbolic_link_is_refused(tree: Path) -> None:
    (tree / "m1_two" / "config.py").unlink()
    (tree / "m1_two" / "config.py").symlink_to(tree / "m0_one" / "config.py")
    with pytest.raises(stages.LedgerError, match=r"m1_two/config.py is a symbolic link"):
        stages.check(tree)


def test_over_budget_is_a_warning(tree: Path) -> None:
    body = "".join(f"    x{i} = {i}\n" for i in range(MAX_FUNCTION))
    kernel = "@triton.autotune(configs=[])\n@triton.jit\ndef kernel():\n" + body
    in_all_stages("long.py", f"def f():\n{body}\n{kernel}" + "y = 1\n" * (MAX_FILE - 2 * MAX_FUNCTION))(tree)
    write(tree / "m2_three/engine/more.py", "z = 1\n" * (MAX_CHANGED["m2"] + 1))
    report = stages.check(tree)
    assert report.errors == []
    over = [text for text in report.warnings if text.startswith("m2_three")]
    assert over == [
        f"m2_three/engine/more.py has {MAX_CHANGED['m2'] + 1} code lines, its budget is {MAX_FILE}",
        f"m2_three/long.py has {MAX_FILE + 4} code lines, its budget is {MAX_FILE}",
        f"m2_three/long.py: f has {MAX_FUNCTION + 1} code lines, its budget is {MAX_FUNCTION}",
        f"m2_three changes {MAX_CHANGED['m2'] + 3} code lines, its budget is {MAX_CHANGED['m2']}",
    ]


@pytest.mark.parametrize(("lines", "is_error"), [(4_000, None), (4_001, False), (4_501, True)])
def test_the_size_of_a_whole_stage(tree: Path, lines: int, is_error: bool | None) -> None:
    already = 6
    write(tree / "m0_one" / "big.py", "y = 1\n" * (lines - already))
    report = stages.check(tree)
    text = f"m0_one has {lines} code lines"
    assert any(error.startswith(text) for error in report.errors) == (is_error is True)
    assert any(warning.startswith(text) for warning in report.warnings) == (is_error is False)


def test_gpu_runs_are_held_against_the_code(tree: Path) -> None:
    results = tree / "docs/results/gpu_tests.json"

    def about_gpu() -> list[str]:
        return [text for text in stages.check(tree).warnings if "gpu_tests" in text]

    assert about_gpu() == ["docs/results/gpu_tests.json is missing: no GPU run is recorded for any stage"]
    runs = {name: {"hash": stages.stage_hash(tree, name), "passed": 3} for name in ("m0_one", "m1_two")}
    write(results, json.dumps(runs))
    assert about_gpu() == ["docs/results/gpu_tests.json records no GPU run of m2_three"]
    write(tree / "m1_two" / "README.md", "prose is not code")
    assert len(about_gpu()) == 1
    write(tree / "m1_two" / "extra.py", "EXTRA = 2\n")
    assert "m1_two has changed since its GPU run in docs/results/gpu_tests.json" in about_gpu()
    runs["m0_one"]["tests"] = 5
    write(results, json.dumps(runs))
    assert "m0_one: 2 tests of its GPU run in docs/results/gpu_tests.json did not pass" in about_gpu()
    write(results, "[]")
    assert "cannot be read" in about_gpu()[0]


# ---- measures --------------------------------------------------------------------------------------------------------

MEASURED = '''"""A docstring
of two lines."""

# a comment
import os  # counts once


class Box:
    """Docstring."""

    text = """a string
    that is code"""

    def size(self) -> int:
        """Docstring."""

        def inner() -> int:
            return len(
                self.text,  # three
            )

        return inner()
'''


def test_code_lines_and_functions_are_counted() -> None:
    source = analyse(MEASURED)
    assert len(source.code) == 1 + 1 + 2 + 1 + 4 + 1
    assert {item.name: item.size for item in source.functions} == {"size": 6, "inner": 4}
    assert analyse('def f(): "all on one line"\n').code == ('def f(): "all on one line"',)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["\n", "# words\n", "    # words\n"]), st.integers(0, 7)), max_size=6))
def test_blank_lines_and_comments_do_not_count(extra: list[tuple[str, int]]) -> None:
    lines = ["def f(x):\n", '    """Doc."""\n', "    if x:\n", "        x += 1\n", "    return x\n", "\n", "y = f(1)\n"]
    expected = analyse("".join(lines))
    for text, place in extra:
        lines.insert(place, text)
    got = analyse("".join(lines))
    assert (got.code, got.functions) == (expected.code, expected.functions)


def test_changed_lines_are_those_removed_and_added() -> None:
    assert changed_lines(("a", "b", "c"), ("a", "x", "y", "c")) == 3
    assert changed_lines(("a",), ("a",)) == 0


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_diff_shows_what_a_stage_changes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "m1", "m2_three"]) == 0
    out = capsys.readouterr().out
    header = ("--- m1_two/engine/core.py", "+++ m2_three/engine/core.py", "--- /dev/null")
    for line in (*header, "-LAST = 20", "+LAST = 30"):
        assert f"\n{line}\n" in f"\n{out}"
    assert "config.py" not in out
    assert "files: 3, of them new: 1, lines: +5 -2" in out
    assert cli.main(["diff", "m2", "m1"]) == 0
    assert "files: 3, of them new: 0, gone: 1, lines: +2 -5" in capsys.readouterr().out


def test_diff_shows_pages_last(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, text in (("m0_one", "one\n"), ("m1_two", "two\nlines\n")):
        write(tree / stage / "README.md", text)
    found = stages.diff(tree, "m0", "m1")
    assert [item.path for item in found] == ["engine/core.py", "extra.py", "README.md"]
    assert stages.format_stat(found).splitlines()[-1] == "files: 3, of them new: 1, lines: +4 -2, of code: +2 -1"


@pytest.mark.parametrize("words", [["m0", "m1", "config.py"], ["m1", "m1"], ["m0", "m1", "config.py", "--stat"]])
def test_diff_of_what_is_the_same(tree: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(["diff", *words]) == 0
    what = "config.py" if "config.py" in words else "everything"
    assert capsys.readouterr().out == f"{what} is the same in {words[0]} and {words[1]}\n"


def test_diff_is_a_patch_that_git_applies(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tree / "m1_two" / "config.py", "no newline at the end of this long line: " + "x" * 200)
    assert cli.main(["stages", "diff", "m0", "m1", "config.py"]) == 0
    write(tree / "patch", capsys.readouterr().out)
    git(tree, "apply", "--directory=m0_one", "patch")
    assert (tree / "m0_one" / "config.py").read_bytes() == (tree / "m1_two" / "config.py").read_bytes()


@pytest.mark.parametrize("name", ["core.py", "engine/core.py", "m1_two/engine/core.py", "m0_one/engine/core.py"])
def test_diff_of_one_file(tree: Path, name: str) -> None:
    (found,) = stages.diff(tree, "m0", "m1", name)
    assert (found.path, found.status, found.added, found.removed) == ("engine/core.py", "changed", 1, 1)


def test_diff_stat(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "m0", "m1", "--stat"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:2]] == [
        ["engine/core.py", "changed", "+1", "-1"],
        ["extra.py", "new", "+1", "-0"],
    ]


def test_diff_html(tree: Path) -> None:
    replace(tree / "m1_two/engine/core.py", "LAST = 20", "LAST = '<b>&amp;'")
    assert cli.main(["diff", "m0", "m1", "--html", str(tree / "page.html")]) == 0
    page = (tree / "page.html").read_text(encoding="utf-8")
    assert page.count("<details") == 2 and "engine/core.py" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "http" not in page and "&nbsp;" not in page


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["diff", "m0", "m7"], "unknown stage 'm7': the stages are m0_one, m1_two, m2_three"),
        (["diff", "m0", "m1", "nothing.py"], "neither m0_one nor m1_two has a file nothing.py"),
        (["diff", "m0"], "NEW"),
        (["diff", "m0", "m1", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
        (["stages", "mend"], "mend"),
        (["stages", "port", "m5"], "unknown stage 'm5'"),
        (["stages", "port", "m2"], "m2_three is not later than m2_three"),
        (["stages", "port", "m1", "--to", "m0"], "m0_one is not later than m1_two"),
        (["stages", "port", "m0", "--base", "nowhere"], "git knows no revision 'nowhere'"),
        (["stages", "port", "m0", "--base=--output=x"], "git knows no revision '--output=x'"),
    ],
)
def test_a_fault_of_the_user_is_one_sentence(
    tree: Path, command: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tree)
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and complaint in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert snapshot(tree) == before


# ---- port ------------------------------------------------------------------------------------------------------------


def test_port_merges_copies_and_adds(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merge where the later stages have their own version, a copy where they do not, and a file that is new."""
    replace(tree / "m0_one/engine/core.py", "FIRST = 1", "FIRST = 100")
    write(tree / "m0_one/config.py", "SIZE = 5\n")
    write(tree / "m0_one/deep/er/new.py", "NEW = 1\n")
    (tree / "m2_three/config.py").chmod(0o755)
    assert cli.main(["stages", "port", "m0"]) == 0
    for stage, last in (("m1_two", 20), ("m2_three", 30)):
        text = (tree / stage / "engine/core.py").read_text(encoding="utf-8")
        assert text == CORE.format(last=last).replace("FIRST = 1", "FIRST = 100")
        assert (tree / stage / "config.py").read_text(encoding="utf-8") == "SIZE = 5\n"
        assert (tree / stage / "deep/er/new.py").read_text(encoding="utf-8") == "NEW = 1\n"
    assert (tree / "m2_three/config.py").stat().st_mode & 0o777 == 0o755
    assert stages.check(tree).errors == []
    assert len(capsys.readouterr().out.splitlines()) == 6

    after = snapshot(tree)
    assert cli.main(["stages", "port", "m0"]) == 0
    assert capsys.readouterr().out == "nothing to carry\n"
    assert snapshot(tree) == after


def test_port_in_two_goes_is_port_in_one(tree: Path) -> None:
    """A stage that has the fix already hands it on."""
    replace(tree / "m0_one/engine/core.py", "FIRST = 1", "FIRST = 100")
    assert stages.port(tree, "m0", to="m1").written == ["m1_two/engine/core.py"]
    assert "FIRST = 1\n" in (tree / "m2_three/engine/core.py").read_text(encoding="utf-8")
    assert stages.port(tree, "m0").written == ["m2_three/engine/core.py"]
    assert "FIRST = 100\n" in (tree / "m2_three/engine/core.py").read_text(encoding="utf-8")


def test_port_from_an_older_revision(tree: Path) -> None:
    write(tree / "m0_one/config.py", "SIZE = 5\n")
    git(tree, "commit", "--quiet", "-am", "a fix, committed before it was carried")
    assert stages.port(tree, "m0").written == []
    assert stages.port(tree, "m0", base="HEAD~1").written == ["m1_two/config.py", "m2_three/config.py"]


def test_a_conflict_is_marked_and_goes_no_further(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(tree / "m0_one/engine/core.py", "LAST = 10", "LAST = 11")
    write(tree / "m0_one/config.py", "SIZE = 5\n")
    beyond = (tree / "m2_three/engine/core.py").read_bytes()
    assert cli.main(["stages", "port", "m0"]) == 1
    marked = (tree / "m1_two/engine/core.py").read_text(encoding="utf-8")
    for line in ("<<<<<<< m1_two", "LAST = 20", "LAST = 10", "LAST = 11", ">>>>>>> m0_one"):
        assert f"\n{line}\n" in marked
    assert (tree / "m2_three/engine/core.py").read_bytes() == beyond
    assert (tree / "m2_three/config.py").read_text(encoding="utf-8") == "SIZE = 5\n"
    out = capsys.readouterr().out
    assert "conflict  m1_two/engine/core.py" in out and "`folovllm stages port m1_two`" in out

    # Unmended it is refused; mended in m1, it goes on from there.
    before = snapshot(tree)
    for start in ("m0", "m1"):
        assert cli.main(["stages", "port", start]) == 2
        assert "m1_two/engine/core.py still holds conflict markers" in capsys.readouterr().err
        assert snapshot(tree) == before
    write(tree / "m1_two/engine/core.py", CORE.format(last=20).replace("FIRST = 1", "FIRST = 11"))
    assert cli.main(["stages", "port", "m1"]) == 0
    text = (tree / "m2_three/engine/core.py").read_text(encoding="utf-8")
    assert text == CORE.format(last=30).replace("FIRST = 1", "FIRST = 11")


def test_a_conflict_further_up_is_with_the_stage_before(tree: Path) -> None:
    """The second step carries what the first one did, not the source once more."""
    replace(tree / "m2_three/engine/core.py", "FIRST = 1", "FIRST = 3")
    replace(tree / "m0_one/engine/core.py", "FIRST = 1", "FIRST = 100")
    report = stages.port(tree, "m0")
    assert report.written == ["m1_two/engine/core.py", "m2_three/engine/core.py"]
    assert report.conflicts == ["m2_three/engine/core.py"]
    marked = (tree / "m2_three/engine/core.py").read_text(encoding="utf-8")
    names = [line for line in marked.splitlines() if line.startswith(("<<<", "|||", ">>>"))]
    assert names == ["<<<<<<< m2_three", "||||||| m1_two before", ">>>>>>> m1_two"]


def test_a_new_file_that_a_later_stage_has_differently_is_a_conflict(tree: Path) -> None:
    write(tree / "m0_one/extra.py", "EXTRA = 0\n")
    report = stages.port(tree, "m0")
    assert report.written == report.conflicts == ["m1_two/extra.py"]
    assert "<<<<<<< m1_two" in (tree / "m1_two/extra.py").read_text(encoding="utf-8")


def test_a_deleted_file_is_reported_and_stays(tree: Path) -> None:
    (tree / "m0_one/config.py").unlink()
    report = stages.port(tree, "m0")
    assert report.written == [] and "m0_one/config.py was deleted" in report.remarks[0]
    assert (tree / "m2_three/config.py").is_file()


def spoil_three_files(tree: Path) -> int:
    """Changes that a port to two stages takes six writes for, two of them into new folders."""
    replace(tree / "m0_one/engine/core.py", "FIRST = 1", "FIRST = 100")
    write(tree / "m0_one/config.py", "SIZE = 5\n")
    write(tree / "m0_one/deep/er/new.py", "NEW = 1\n")
    return 6


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("fault", [OSError("disk on fire"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_a_port_that_fails_half_way_leaves_everything_as_it_was(
    tree: Path, failing: int, fault: BaseException, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the writes fails in turn, just before or just after it has taken place."""
    assert spoil_three_files(tree) > failing
    before, calls, real = snapshot(tree), [], os.replace

    def replace_or_fail(source: Path, target: Path) -> None:
        calls.append(target)
        fails = len(calls) == failing + 1
        if not fails or after:
            real(source, target)
        if fails:
            raise fault

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(type(fault)):
        stages.port(tree, "m0")
    assert len(calls) > failing
    assert snapshot(tree) == before


def test_a_port_that_cannot_be_laid_out_writes_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_three_files(tree)
    before = snapshot(tree)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copymode", fail)
    assert cli.main(["stages", "port", "m0"]) == 2
    assert snapshot(tree) == before


def test_a_port_that_cannot_merge_writes_nothing(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_three_files(tree)
    (tree / "m0_one/engine/core.py").write_bytes(b"\0binary")
    before = snapshot(tree)
    assert cli.main(["stages", "port", "m0"]) == 2
    assert "git merge-file failed in m1_two" in capsys.readouterr().err
    (tree / "m1_two/config.py").unlink()
    assert cli.main(["stages", "port", "m0"]) == 2
    assert "m1_two/config.py is missing" in capsys.readouterr().err
    write(tree / "m1_two/config.py", SHARED["config.py"])
    assert snapshot(tree) == before
    monkeypatch.setenv("PATH", "")
    assert cli.main(["stages", "port", "m0"]) == 2
    assert "git is not installed" in capsys.readouterr().err
    assert snapshot(tree) == before


def test_a_stage_that_was_never_committed_cannot_be_ported(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(tree, "rm", "-r", "--quiet", "--cached", "m1_two")
    git(tree, "commit", "--quiet", "-m", "forget m1")
    assert cli.main(["stages", "port", "m1"]) == 2
    assert "revision 'HEAD' has no m1_two" in capsys.readouterr().err


# ---- this repository -------------------------------------------------------------------------------------------------


def test_this_repository_keeps_its_ledger() -> None:
    report = stages.check(stages.find_root())
    assert report.errors == []
    assert len(report.rows) == len(stages.known_stages())
