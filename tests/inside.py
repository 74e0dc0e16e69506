"""Looking inside an engine without knowing how its stage is built."""

from __future__ import annotations

from typing import Any

from torch import nn


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
