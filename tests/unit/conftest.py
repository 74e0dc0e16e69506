"""What the tests of the loader share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import CheckpointPath

CopyOf = Callable[[str], Path]


@pytest.fixture
def copy_of(checkpoint_path: CheckpointPath, tmp_path: Path) -> CopyOf:
    """`copy_of("qwen3")`: that checkpoint in a folder of the test's own."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint_path(name), tmp_path / name))

    return copy


def load_llm(stage: ModuleType, model: Path | str, **options: Any) -> Any:
    """A quiet engine on the CPU, in the dtype that the checkpoint asks for."""
    return stage.LLM(model, **{"device": "cpu", "log_level": "ERROR", "max_model_len": 64, **options})
