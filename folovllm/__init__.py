"""The front door: `from folovllm import LLM` gives the newest stage's, or that of the stage FOLOVLLM_STAGE names.

`folovllm.config`, `folovllm.engine.llm_engine`, … *are* that stage's modules, not copies: whatever this package does
not have itself is looked up there. Nothing is imported before it is asked for, so `import folovllm` costs no torch. The
choice is made once, at the first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).resolve().parent

#: The embedded model, a folder in Hugging Face format.
TINY = _HERE / "models" / "tiny"


def import_stage(name: str | None = None) -> ModuleType:
    """The package of a stage: `name` (m0 or m0_init), or FOLOVLLM_STAGE, or the newest. ValueError if unknown."""
    from .stages import LedgerError, known_stages, resolve_stage

    known = known_stages()
    if not known:
        raise LedgerError("no stage is installed beside the folovllm package")
    full = resolve_stage(name or os.environ.get("FOLOVLLM_STAGE") or known[-1], known)
    if importlib.util.find_spec(full) is None:
        # An editable install knows only the folders that were there when it was made.
        sys.path.append(str(_HERE.parent))
    return importlib.import_module(full)


@functools.cache
def _stage() -> ModuleType:
    return import_stage()


def _is_own(name: str) -> bool:
    """Whether this folder has the module `name`, so that no stage is asked for it."""
    return (_HERE / name).is_dir() or (_HERE / f"{name}.py").is_file()


class _StageModules(MetaPathFinder, Loader):
    """Finds `folovllm.x.y` as `<stage>.x.y`, unless `x` is this package's own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __name__ or not name or _is_own(name.split(".")[0]):
            return None
        found = importlib.util.find_spec(f"{_stage().__name__}.{name}")
        return found and ModuleSpec(fullname, self, origin=found.name)

    def exec_module(self, module: ModuleType) -> None:
        # A module may put another in its own place while it is executed; the import system then hands that one out.
        assert module.__spec__ is not None and module.__spec__.origin is not None
        sys.modules[module.__name__] = importlib.import_module(module.__spec__.origin)


# Ahead of the others: to them a stage's folder looks like a place to load a second copy from.
sys.meta_path.insert(0, _StageModules())


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [*_stage().__all__, "TINY"]
    if not name.startswith("_") and not _is_own(name) and name in _stage().__all__:
        return getattr(_stage(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_stage().__all__, "TINY"])
