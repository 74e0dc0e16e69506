"""From a checkpoint's name to a model in memory: find the folder, read its config, build the module, fill it.

The model is built on the meta device, where tensors have shapes and no memory, so nothing is allocated twice. Every
tensor that the model needs has exactly one name in the checkpoint; whatever is missing, unknown or of another shape
is reported in one error.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from .layers.linear import Linear, copy_weight
from .models import get_model_class
from .models.llama import LlamaForCausalLM

logger = logging.getLogger(__name__)

# What the engine reads of a repository on the hub: no pickles, no copies of the weights in other formats.
_HUB_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_IGNORE = ["*/*"]


def resolve_model(model: str | Path | None, revision: str | None = None, with_weights: bool = True) -> Path:
    """The folder of a checkpoint: `model` itself, or where the hub's `model` was downloaded to.

    Args:
        with_weights: False: only its configuration and tokenizer are downloaded.

    Raises:
        ValueError: neither a folder nor a repository that can be had.
    """
    if model is None:
        raise ValueError("no model was named: give LLM(model=...) a folder or a hub id")
    model = str(model)
    if os.path.isdir(model):
        return Path(model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model folder {model!r} does not exist")
    patterns = _HUB_PATTERNS + ["*.safetensors"] * with_weights
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_IGNORE)
    except Exception as error:  # the hub's client raises a dozen unrelated types for "not there" and "no network"
        reason = type(error).__name__
        raise ValueError(
            f"could not get {model!r} from the Hugging Face hub ({reason}); give a local folder, or use the model "
            "that comes with this repository: folovllm/models/tiny"
        ) from error
    return Path(folder)


def load_hf_config(folder: Path) -> PretrainedConfig:
    """config.json, parsed; both transformers 4 and 5 spellings.

    Raises:
        ValueError: no config.json, not JSON, or an architecture that is not supported.
    """
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise ValueError(f"{folder} holds no config.json: it is not a Hugging Face checkpoint")
    get_model_class(raw.get("architectures"))
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises several types here, some of them several lines long
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'} cannot be used: {reason}") from error


def load_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as it stands; empty when there is none."""
    return _read_json(folder / "generation_config.json") or {}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint.

    Raises:
        ValueError: the folder has none that transformers can load without running remote code.
    """
    # Without any of these, transformers makes an empty tokenizer for some architectures and says nothing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"no tokenizer could be loaded from {folder}; name one with tokenizer=FOLDER")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises several types here
        raise ValueError(f"no tokenizer could be loaded from {folder}; name one with tokenizer=FOLDER") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} has no tokenizer.json; convert it to a fast tokenizer first")
    return tokenizer


def load_model(
    folder: Path,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
) -> LlamaForCausalLM:
    """Build the model in `dtype` on `device` and fill it from the folder's safetensors ("dummy": at random).

    Raises:
        ValueError: the config asks for something unsupported, or the tensors are not the model's.
    """
    started = time.perf_counter()
    if getattr(hf_config, "quantization_config", None):
        raise ValueError(f"the checkpoint in {folder} is quantised, which is not supported; use the original one")
    model_class = get_model_class(hf_config.architectures)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = model_class(hf_config)
    finally:
        torch.set_default_dtype(default_dtype)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.eval().requires_grad_(False)
    if load_format == "dummy":
        initialize_dummy_weights(model, seed)
    else:
        load_weights(model, read_safetensors(folder))
    params = list(model.parameters())
    num_params, size = sum(p.numel() for p in params) / 1e6, sum(p.nbytes for p in params) / 2**20
    where = f"{str(dtype).removeprefix('torch.')} on {device}"
    figures = type(model).__name__, num_params, size, where, time.perf_counter() - started
    logger.info("%s: %.1f M parameters, %.1f MiB, %s, loaded in %.1f s", *figures)
    return model


def read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every tensor in the folder's safetensors files, memory-mapped one at a time.

    Raises:
        ValueError: no such file, a shard that the index names and is not there, or a damaged file.
    """
    index = _read_json(folder / "model.safetensors.index.json")
    if index is not None and "weight_map" not in index:
        raise ValueError(f"{folder / 'model.safetensors.index.json'} has no weight_map; download it again")
    files = sorted(set(index["weight_map"].values())) if index else sorted(p.name for p in folder.glob("*.safetensors"))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent or not files:
        what = ", ".join(absent) or "any *.safetensors file (other weight formats are not read)"
        raise ValueError(f"{folder} lacks {what}")
    for name in tqdm(files, desc="Loading weights", unit="file", disable=len(files) == 1):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or incomplete ({error}); download it again") from error


def load_weights(model: LlamaForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand every tensor to the module that owns it.

    Raises:
        ValueError: names all tensors that are missing, unknown, or of the wrong shape.
    """
    owners = checkpoint_names(model)
    problems: list[str] = []
    for name, tensor in weights:
        if name in owners:
            module, param_name, shard_id = owners.pop(name)
            try:
                if isinstance(module, Linear):
                    module.weight_loader(param_name, tensor, shard_id)
                else:
                    copy_weight(module.get_parameter(param_name), tensor)
            except ValueError as error:
                problems.append(f"{name} {error}")
        elif not _is_ignorable(name, model):
            problems.append(f"{name} is unknown to the model")
    problems += [f"{name} is missing" for name in owners]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {shown}")


def checkpoint_names(model: LlamaForCausalLM) -> dict[str, tuple[nn.Module, str, int]]:
    """{name in the checkpoint: (module, its parameter, which shard of it)} for every tensor that the model needs."""
    names = {}
    for path, module in model.named_modules():
        for shard_id, prefix in enumerate(shard_names(model, path)):
            for param_name, _ in module.named_parameters(recurse=False):
                names[f"{prefix}.{param_name}"] = (module, param_name, shard_id)
    return names


def shard_names(model: LlamaForCausalLM, path: str) -> list[str]:
    """The checkpoint's names for the module at `path`: several where several are stacked in it."""
    parent, _, leaf = path.rpartition(".")
    return [f"{parent}.{shard}" if parent else shard for shard in model.packed_modules_mapping.get(leaf, [leaf])]


def _is_ignorable(name: str, model: LlamaForCausalLM) -> bool:
    """Some checkpoints repeat the tied embedding as lm_head, and old ones hold the rotary frequencies."""
    return (model.lm_head is None and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")


def initialize_dummy_weights(model: nn.Module, seed: int) -> None:
    """Seeded random weights of ordinary size: matrices N(0, 0.02), norms one, biases zero."""
    for name, param in model.named_parameters():
        generator = torch.Generator(param.device).manual_seed(seed)
        seed += 1
        if param.dim() > 1:
            param.normal_(0.0, 0.02, generator=generator)
        else:
            param.fill_(0.0 if name.endswith("bias") else 1.0)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
