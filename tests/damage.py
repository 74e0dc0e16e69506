"""Editing copies of checkpoints: what tests of the loader do to tensors, files and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    weights = read_weights(folder)
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_json(folder: Path, name: str = "config.json", remove: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    for key in remove:
        del config[key]
    (folder / name).write_text(json.dumps({**config, **changes}))


def truncate(path: Path, keep: int) -> None:
    """Leave the first `keep` bytes of a file; a negative number leaves out as many at its end."""
    path.write_bytes(path.read_bytes()[:keep])


def remove(folder: Path, pattern: str) -> None:
    """Delete the files of that name; it is a mistake of the test if there are none."""
    files = list(folder.glob(pattern))
    assert files
    for file in files:
        file.unlink()
