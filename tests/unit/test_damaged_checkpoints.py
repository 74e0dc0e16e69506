"""A damaged checkpoint is one clear ValueError that names the culprit.

Damage is done to copies of good random checkpoints, one way at a time, and is reported to the user of `LLM`: that is
where nobody wants to meet a KeyError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.damage import edit_json, edit_weights, remove, truncate
from tests.unit.conftest import CopyOf, load_llm

pytestmark = pytest.mark.since("m0")

UP = "model.layers.1.mlp.up_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


# name: (checkpoint, what happens to its folder, what the message must say)
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing tensor": ("qwen3", lambda f: edit_weights(f, lambda w: w.pop(UP)), f"{UP} is missing"),
    "missing shard of a merged tensor": ("qwen3", lambda f: edit_weights(f, lambda w: w.pop(K)), f"{K} is missing"),
    "missing head": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")),
        "lm_head.weight is missing",
    ),
    "extra tensor": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(96, 64)})),
        r"model\.layers\.7\.mlp\.up_proj\.weight is unknown",
    ),
    "extra bias": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.update({K.replace("weight", "bias"): torch.zeros(64)})),
        r"k_proj\.bias is unknown",
    ),
    "mis-shaped tensor": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.update({UP: torch.zeros(95, 64)})),
        rf"{UP} has shape \[95, 64\].* \[96, 64\]",
    ),
    "transposed tensor": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.update({K: torch.zeros(63, 64)})),
        rf"{K} has shape \[63, 64\].* \[64, 64\]",
    ),
    "tensor that would broadcast": (
        "qwen3",
        lambda f: edit_weights(f, lambda w: w.update({NORM: torch.zeros(1)})),
        rf"{NORM} has shape \[1\].* \[64\]",
    ),
    "config of another size": ("qwen3", lambda f: edit_json(f, intermediate_size=128), r"has shape \[96, 64\]"),
    "config with more layers": ("qwen3", lambda f: edit_json(f, num_hidden_layers=3, layer_types=None), r"layers\.2\."),
    "half a weights file": (
        "qwen3",
        lambda f: truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size // 2),
        r"model\.safetensors is damaged",
    ),
    "a weights file cut in its header": (
        "qwen3",
        lambda f: truncate(f / "model.safetensors", 100),
        r"model\.safetensors is damaged",
    ),
    "an empty weights file": (
        "qwen3",
        lambda f: truncate(f / "model.safetensors", 0),
        r"model\.safetensors is damaged",
    ),
    "a weights file that is something else": (
        "qwen3",
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"model\.safetensors is damaged",
    ),
    "half a shard": (
        "llama3",
        lambda f: truncate(last_shard(f), 5000),
        r"model-0000\d-of-0000\d\.safetensors is damaged",
    ),
    "missing shard": ("llama3", lambda f: last_shard(f).unlink(), r"lacks model-0000\d-of-0000\d\.safetensors"),
    "index that is not JSON": (
        "llama3",
        lambda f: truncate(f / "model.safetensors.index.json", 50),
        r"model\.safetensors\.index\.json is not valid JSON",
    ),
    "index without a weight map": (
        "llama3",
        lambda f: edit_json(f, "model.safetensors.index.json", remove=("weight_map",)),
        r"model\.safetensors\.index\.json",
    ),
    "weights in another format": (
        "qwen3",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"lacks any \*\.safetensors",
    ),
    "no config.json": ("qwen3", lambda f: remove(f, "config.json"), r"qwen3 holds no config\.json"),
    "config that is not JSON": ("qwen3", lambda f: truncate(f / "config.json", 60), r"config\.json is not valid JSON"),
    "config that is a list": ("qwen3", lambda f: (f / "config.json").write_text("[]"), r"config\.json"),
    "config without architectures": ("qwen3", lambda f: edit_json(f, remove=("architectures",)), "architecture"),
    "unknown architecture": (
        "qwen3",
        lambda f: edit_json(f, architectures=["GPT2LMHeadModel"]),
        r"GPT2LMHeadModel.*Qwen3ForCausalLM",
    ),
    "config without model_type": ("qwen3", lambda f: edit_json(f, remove=("model_type",)), "model_type"),
    "unknown model_type": ("qwen3", lambda f: edit_json(f, model_type="qwen99"), "qwen99"),
    "config with a size that is a word": ("qwen3", lambda f: edit_json(f, hidden_size="large"), "hidden_size"),
    "quantised checkpoint": (
        "qwen3",
        lambda f: edit_json(f, quantization_config={"quant_method": "awq", "bits": 4}),
        "quantised",
    ),
    "sliding window of Qwen3": (
        "qwen3",
        lambda f: edit_json(f, remove=("layer_types",), use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding-window",
    ),
    "sliding window of Qwen2": (
        "qwen2",
        lambda f: edit_json(f, layer_types=["full_attention", "sliding_attention"], sliding_window=8),
        "sliding-window",
    ),
    "another activation": ("llama3", lambda f: edit_json(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "unknown rope type": (
        "llama3",
        lambda f: edit_json(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "rope_type 'yarn'",
    ),
    "unknown rope type, as transformers 4 spelt it": (
        "llama3",
        lambda f: edit_json(f, remove=("rope_parameters",), rope_scaling={"type": "linear", "factor": 4.0}),
        "rope_type 'linear'",
    ),
    "llama3 rope without its numbers": (
        "llama3",
        lambda f: edit_json(f, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        "low_freq_factor",
    ),
    "generation config that is not JSON": (
        "qwen3",
        lambda f: (f / "generation_config.json").write_text("{"),
        r"generation_config\.json is not valid JSON",
    ),
    "no tokenizer": (
        "qwen3",
        lambda f: remove(f, "tokenizer*"),
        "no tokenizer .* tokenizer=FOLDER",
    ),
    "tokenizer that is not JSON": ("qwen3", lambda f: truncate(f / "tokenizer.json", 200), "no tokenizer .*qwen3"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_in_one_sentence(
    stage: ModuleType, copy_of: CopyOf, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    folder = copy_of(name)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_llm(stage, folder)
    assert "\n" not in str(error.value)


def test_several_problems_are_reported_together(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3")

    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights[UP]
        weights[K] = torch.zeros(1, 64)
        weights["model.extra.weight"] = torch.zeros(1)

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM") as error:
        load_llm(stage, folder)
    for problem in (f"{UP} is missing", f"{K} has shape [1, 64]", "model.extra.weight is unknown"):
        assert problem in str(error.value)
    assert "more" not in str(error.value)


def test_a_flood_of_problems_is_counted(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3")
    edit_weights(folder, lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name])
    with pytest.raises(ValueError, match="is missing") as error:
        load_llm(stage, folder)
    shown = str(error.value).count("is missing")
    assert 3 <= shown < 11
    assert f"and {11 - shown} more" in str(error.value)  # a Qwen3 layer has eleven tensors
