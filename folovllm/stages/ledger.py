"""The ledger, and the files of a stage.

`stages.toml` at the root of the repository says which files each stage adds or changes. Everything here works on a
`root` folder, so the tests run it on a throw-away tree, and nothing imports a stage, or torch.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEDGER = "stages.toml"
_BESIDE = Path(__file__).resolve().parents[2]
STAGE_NAME = re.compile(r"m\d+_[a-z0-9_]+")


class LedgerError(ValueError):
    """Something the user can mend: a wrong name, a broken ledger, a tree that git cannot read."""


@dataclass(frozen=True)
class Stage:
    """One table of the ledger; paths are relative to the stage's folder."""

    name: str
    title: str
    idea: str
    adds: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def short(self) -> str:
        """`m3` for `m3_paged`."""
        return self.name.split("_")[0]


def find_root() -> Path:
    """The clone that this package was imported from; LedgerError when it was installed without its repository."""
    if not (_BESIDE / LEDGER).is_file():
        raise LedgerError(f"there is no {LEDGER} in {_BESIDE}: this command needs a clone of the repository")
    return _BESIDE


def load_ledger(root: Path) -> list[Stage]:
    """The stages of `root`, oldest first. Raises LedgerError for anything but the shape described in stages.toml."""
    try:
        tables = tomllib.loads((root / LEDGER).read_text(encoding="utf-8")).get("stage")
        stages = [Stage(**table) for table in tables or []]
    except (tomllib.TOMLDecodeError, TypeError, OSError) as error:
        raise LedgerError(f"{LEDGER} cannot be read: {error}") from None
    if not stages:
        raise LedgerError(f"{LEDGER} names no stage")
    for number, stage in enumerate(stages):
        if not (STAGE_NAME.fullmatch(str(stage.name)) and stage.short == f"m{number}"):
            raise LedgerError(f"{LEDGER}: stage {number} must be called m{number}_something, not {stage.name!r}")
        for paths in (stage.adds, stage.changes):
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise LedgerError(f"{LEDGER}: adds and changes of {stage.name} must be lists of paths")
        listed = [*stage.adds, *stage.changes]
        if number == 0 and listed:
            raise LedgerError(f"{LEDGER}: {stage.name} is the first stage, so it lists no files")
        if twice := sorted({path for path in listed if listed.count(path) > 1}):
            raise LedgerError(f"{LEDGER}: {stage.name} lists {', '.join(twice)} twice")
    return stages


def known_stages() -> list[str]:
    """Names of the stages beside this package, oldest first; an installed wheel has no ledger, so there by folder."""
    if (_BESIDE / LEDGER).is_file():
        return [stage.name for stage in load_ledger(_BESIDE)]
    folders = (path.parent.name for path in _BESIDE.glob("m[0-9]*_*/__init__.py"))
    return sorted(name for name in folders if STAGE_NAME.fullmatch(name))


def resolve_stage(name: str, names: list[str]) -> str:
    """The one of `names` that `name` means: in full, or by its number as in `m3`. Raises LedgerError."""
    wanted = name.rstrip("/")
    for known in names:
        if wanted in (known, known.split("_")[0]):
            return known
    raise LedgerError(f"unknown stage {name!r}: the stages are {', '.join(names)}")


def read_stage(root: Path, stage: str) -> dict[str, bytes]:
    """All files of a stage, path to content, leaving out caches and hidden files. LedgerError for a symbolic link."""
    folder, files = root / stage, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix == ".pyc" or any(part == "__pycache__" or part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            raise LedgerError(f"{stage}/{name} is a symbolic link: a stage holds plain files only")
        if path.is_file():
            files[name.as_posix()] = path.read_bytes()
    return files


def stage_hash(root: Path, stage: str) -> str:
    """Names and contents of a stage's .py files as 16 hex digits: what a GPU test run writes down beside its result."""
    digest = hashlib.sha256()
    for path, data in read_stage(root, stage).items():
        if path.endswith(".py"):
            digest.update(f"{path}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]
