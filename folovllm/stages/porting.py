"""`port`: carry a fix from the first stage that had the bug through all later ones.

Each file goes up one stage at a time by a three-way merge. All results are worked out in memory first and then put in
place together, so a port that fails leaves the tree as it was; a conflict is no failure, it is left marked in its file.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .ledger import LedgerError, load_ledger, read_stage, resolve_stage


@dataclass
class PortReport:
    """What `port` did: files written (paths from the root), those of them that hold conflict markers, and remarks."""

    written: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'conflict' if name in self.conflicts else 'written '}  {name}" for name in self.written]
        lines += self.remarks
        return "\n".join(lines or ["nothing to carry"])


def port(root: Path, stage: str, to: str | None = None, base: str = "HEAD") -> PortReport:
    """Carry what the working tree changes in `stage` since revision `base` into each later stage, up to `to`.

    Each file goes up step by step by a three-way merge; where a step conflicts, the file is left marked there and goes
    no further. Either all files are written or, on any error, none. Raises LedgerError and OSError.
    """
    names = [item.name for item in load_ledger(root)]
    source, last = resolve_stage(stage, names), resolve_stage(to or names[-1], names)
    later = names[names.index(source) + 1 : names.index(last) + 1]
    if not later:
        raise LedgerError(f"a fix is carried to later stages, and {last} is not later than {source}")
    before, now = _committed(root, source, base), read_stage(root, source)
    trees = {name: read_stage(root, name) for name in later}

    report, writes = PortReport(), {}
    for path in sorted({*before, *now}):
        if path not in now:
            report.remarks.append(
                f"{source}/{path} was deleted: a stage removes nothing, so the later ones keep theirs"
            )
        elif before.get(path) != now[path]:
            for name, data, has_conflict in _carry(path, source, before.get(path), now[path], trees):
                writes[f"{name}/{path}"] = data
                if has_conflict:
                    report.conflicts.append(f"{name}/{path}")
                    report.remarks.append(
                        f"{path} was carried no further than {name}: "
                        f"mend it there, then run `folovllm stages port {name}`"
                    )
    report.written = list(writes)
    _write_all(root, writes)
    return report


def _carry(
    path: str, giver: str, old: bytes | None, new: bytes, trees: dict[str, dict[str, bytes]]
) -> Iterator[tuple[str, bytes, bool]]:
    """Take the change `old` to `new` of one file up through `trees`; yields (stage, merged text, has conflicts)."""
    for name, files in trees.items():
        ours = files.get(path)
        if ours is None and old is not None:
            raise LedgerError(f"{name}/{path} is missing, so nothing was carried: run `folovllm stages check`")
        for owner, text in ((giver, new), (name, ours or b"")):
            if b"\n<<<<<<< " in b"\n" + text:
                raise LedgerError(f"{owner}/{path} still holds conflict markers, so nothing was carried")
        merged, has_conflict = new, False
        if ours is not None and ours not in (old, new):
            merged, has_conflict = _merge((ours, old or b"", new), (name, f"{giver} before", giver))
        if merged != ours:
            yield name, merged, has_conflict
            # The next step carries what happened here. A stage that has the fix already hands on what it was given.
            giver, old, new = name, ours, merged
        if has_conflict:
            return


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise LedgerError("git is not installed, and carrying a fix needs it") from None


def _committed(root: Path, stage: str, base: str) -> dict[str, bytes]:
    """The files of a stage as revision `base` has them."""
    commit = _git("-C", str(root), "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if commit.returncode:
        raise LedgerError(f"git knows no revision {base!r} in {root}")
    packed = _git("-C", str(root), "archive", "--format=tar", commit.stdout.decode().strip(), "--", stage)
    if packed.returncode:
        raise LedgerError(f"revision {base!r} has no {stage} to compare with: commit it first, or name another --base")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        found = {item.name: archive.extractfile(item) for item in archive.getmembers() if item.isfile()}
        return {name.removeprefix(f"{stage}/"): file.read() for name, file in found.items() if file is not None}


def _merge(texts: tuple[bytes, bytes, bytes], labels: tuple[str, str, str]) -> tuple[bytes, bool]:
    """Three-way merge of (ours, base, theirs): the merged text, and whether it holds conflict markers."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("ours", "base", "theirs")]
        for file, text in zip(files, texts, strict=True):
            file.write_bytes(text)
        options = [word for label in labels for word in ("-L", label)]
        run = _git("merge-file", "-p", "--diff3", *options, *map(str, files))
    if not 0 <= run.returncode <= 127:  # up to 127 it is the number of conflicts
        raise LedgerError(f"git merge-file failed in {labels[0]}: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout, run.returncode > 0


def _write_all(root: Path, writes: dict[str, bytes]) -> None:
    """Put all files in place or none: new and old texts are laid out first, then swapped in, and back on any error."""
    folder = Path(tempfile.mkdtemp(prefix=".port-", dir=root))
    moves: list[tuple[Path, Path, Path]] = []
    made: list[Path] = []
    try:
        for number, (name, data) in enumerate(writes.items()):
            target, fresh, backup = root / name, folder / f"{number}.new", folder / f"{number}.old"
            fresh.write_bytes(data)
            if target.exists():
                shutil.copy2(target, backup)
                shutil.copymode(target, fresh)
            moves.append((target, fresh, backup))
        for target, fresh, _ in moves:
            for parent in reversed(target.parents):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
            os.replace(fresh, target)
    except BaseException:
        # Should this fail too, the folder with the old texts stays.
        for target, _, backup in moves:
            if backup.exists():
                os.replace(backup, target)
            else:
                target.unlink(missing_ok=True)
        for parent in reversed(made):
            parent.rmdir()
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
