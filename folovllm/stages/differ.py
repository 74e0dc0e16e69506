"""`diff`: what one stage does to another, for the terminal and as a page.

The diff between neighbours is the lesson, so it is shown whole, followed by one line a file. Code comes first, and the
pages after it.
"""

from __future__ import annotations

import difflib
import html
import re
from dataclasses import dataclass
from pathlib import Path

from .ledger import LedgerError, load_ledger, read_stage, resolve_stage


@dataclass(frozen=True)
class FileDiff:
    """One file that differs between two stages; `unified` holds the diff with its two header lines."""

    path: str
    status: str  # "new", "gone" or "changed"
    old: list[str]
    new: list[str]
    unified: list[str]

    @property
    def added(self) -> int:
        return sum(line.startswith("+") for line in self.unified[2:])

    @property
    def removed(self) -> int:
        return sum(line.startswith("-") for line in self.unified[2:])


def diff(root: Path, a: str, b: str, file: str | None = None) -> list[FileDiff]:
    """The files that differ from stage `a` to stage `b`; with `file`, only that one, or all of that name.

    `file` is a path inside the stage, or the end of one ("scheduler.py"). Raises LedgerError for unknown names.
    """
    names = [stage.name for stage in load_ledger(root)]
    a, b = resolve_stage(a, names), resolve_stage(b, names)
    return diff_trees(a, read_stage(root, a), b, read_stage(root, b), file)


def diff_trees(a: str, old: dict[str, bytes], b: str, new: dict[str, bytes], file: str | None = None) -> list[FileDiff]:
    """`diff` for any two folders `a` and `b`, given their files (path inside: content)."""
    paths = sorted({*old, *new}, key=lambda path: (_is_page(path), path))
    if file is not None:
        inside = re.sub(rf"^({re.escape(a)}|{re.escape(b)})/", "", file)
        paths = [inside] if inside in paths else [path for path in paths if path.endswith(f"/{inside}")]
        if not paths:
            raise LedgerError(f"neither {a} nor {b} has a file {file}")
    found = []
    for path in paths:
        if old.get(path) == new.get(path):
            continue
        status = "new" if path not in old else "gone" if path not in new else "changed"
        before, after = _text_lines(old.get(path, b"")), _text_lines(new.get(path, b""))
        labels = [f"{name}/{path}" if path in files else "/dev/null" for name, files in ((a, old), (b, new))]
        unified = list(difflib.unified_diff(before, after, labels[0], labels[1], lineterm=""))
        found.append(FileDiff(path, status, before, after, unified))
    return found


def _is_page(path: str) -> bool:
    return path.endswith(".md")


def _text_lines(data: bytes) -> list[str]:
    """Lines without their ends; a last line that has none says so the way git does."""
    lines = data.decode("utf-8", "replace").split("\n")
    if lines[-1]:
        lines[-1] += "\n\\ No newline at end of file"
    else:
        lines.pop()
    return lines


def format_stat(diffs: list[FileDiff]) -> str:
    """One line a file and a sum, and that of the code if there are pages as well."""
    width = max((len(item.path) for item in diffs), default=0)
    lines = [f"{item.path:<{width}}  {item.status:<7}  {f'+{item.added}':>6} {f'-{item.removed}':>6}" for item in diffs]
    total = f"files: {len(diffs)}, of them new: {sum(item.status == 'new' for item in diffs)}, "
    if gone := sum(item.status == "gone" for item in diffs):
        total += f"gone: {gone}, "
    total += f"lines: {_sum(diffs)}"
    code = [item for item in diffs if not _is_page(item.path)]
    if len(code) < len(diffs):
        total += f", of code: {_sum(code)}"
    return "\n".join([*lines, total])


def _sum(diffs: list[FileDiff]) -> str:
    return f"+{sum(item.added for item in diffs)} -{sum(item.removed for item in diffs)}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8884; --add: #2da44e33; --sub: #cf222e2b; --chg: #d4a72c40; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 110rem; margin: 2rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.4rem; }} a {{ color: inherit; }}
pre.stat {{ font: 13px/1.6 ui-monospace, monospace; }}
details {{ border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; overflow: hidden; }}
summary {{ padding: .5rem 1rem; cursor: pointer; font-weight: 600; background: #8881; }}
table.diff {{ width: 100%; table-layout: fixed; border-collapse: collapse; font: 12px/1.5 ui-monospace, monospace; }}
table.diff td {{ white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; padding: 0 .4rem; }}
table.diff tbody + tbody {{ border-top: 1px dashed var(--line); }}
td.diff_header {{ text-align: right; color: #888; user-select: none; }}
col.number {{ width: 3.5rem; }} .diff_next {{ display: none; }}
.diff_add {{ background: var(--add); }} .diff_sub {{ background: var(--sub); }} .diff_chg {{ background: var(--chg); }}
</style></head><body>
<h1>{title}</h1>
<pre class="stat">{stat}</pre>
{files}
</body></html>
"""


def format_html(diffs: list[FileDiff], title: str) -> str:
    """A page that stands by itself: the summary, then each file side by side with five lines of context."""
    maker = difflib.HtmlDiff(tabsize=4)
    sections = []
    for item in diffs:
        table = maker.make_table(item.old, item.new, context=True, numlines=5)
        # The library forbids line breaks and counts a column of jump links; the style sheet wants neither.
        table = table.replace("&nbsp;", " ").replace(' nowrap="nowrap"', "").replace(" <a href", "<a href")
        table = re.sub(r"(<colgroup></colgroup>\s*)+", '<col class="number"><col><col class="number"><col>', table)
        head = html.escape(f"{item.path}  ({item.status}, +{item.added} -{item.removed})")
        sections.append(f"<details open><summary>{head}</summary>{table}</details>")
    return _PAGE.format(title=html.escape(title), stat=html.escape(format_stat(diffs)), files="\n".join(sections))
