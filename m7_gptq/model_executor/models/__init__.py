"""The architectures that the engine can run, by the name that config.json gives them."""

from __future__ import annotations

from .llama import LlamaForCausalLM
from .qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def get_model_class(architectures: list[str] | None) -> type[LlamaForCausalLM]:
    """The class for the first known name.

    Raises:
        ValueError: none of the names is known.
    """
    for name in architectures or []:
        if name in MODELS:
            return MODELS[name]
    raise ValueError(f"architecture {architectures} is not supported; supported are {', '.join(MODELS)}")
