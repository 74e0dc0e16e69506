"""Looking inside an engine without knowing how its stage is built."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .conftest import submodule

_BACKENDS = {
    "naive": ("torch_naive", "NaiveBackend"),
    "paged": ("paged", "PagedBackend"),
    "flash": ("flash_attn", "FlashAttentionBackend"),
}


def attention(stage: ModuleType, backend: str) -> Callable[..., torch.Tensor]:
    """What computes attention: f(q, k_cache, v_cache, metadata, scale). Before m4 a backend was just that function."""
    module_name, class_name = _BACKENDS[backend]
    module = submodule(stage, f"attention.backends.{module_name}")
    function: Callable[..., torch.Tensor]
    if hasattr(module, class_name):
        function = getattr(module, class_name)().forward
    else:
        function = getattr(module, f"{backend}_attention")
    return function


def model_of(llm: Any) -> Any:
    """The model, wherever the stage keeps it: the first module that hangs from the engine or from one of its parts."""
    package = type(llm).__module__.partition(".")[0]
    parts, seen = [llm], {id(llm)}
    for part in parts:  # grows while it runs: breadth first
        for value in vars(part).values():
            if isinstance(value, nn.Module):
                return value
            is_part = type(value).__module__.partition(".")[0] == package and hasattr(value, "__dict__")
            if is_part and id(value) not in seen:
                seen.add(id(value))
                parts.append(value)
    raise LookupError(f"{llm} holds no model")
