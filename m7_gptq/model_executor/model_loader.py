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
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from .layers.linear import Linear, copy_weight
from .layers.quantization import CHECKPOINT_TENSORS, PackedWeight, QuantizationConfig, QuantizedWeight
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
    quantization: str | None = None,
) -> LlamaForCausalLM:
    """Build the model in `dtype` on `device` and fill it from the folder's safetensors ("dummy": at random).

    Raises:
        ValueError: the config asks for something unsupported, or the tensors are not the model's.
    """
    started = time.perf_counter()
    quantization_config = resolve_quantization(folder, hf_config, quantization, load_format)
    model_class = get_model_class(hf_config.architectures)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = model_class(hf_config)
    finally:
        torch.set_default_dtype(default_dtype)
    if quantization_config is not None:
        create_quantized_weights(model, quantization_config, None if load_format == "dummy" else read_dtypes(folder))
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.eval().requires_grad_(False)
    if load_format == "dummy":
        initialize_dummy_weights(model, seed)
    else:
        load_weights(model, read_safetensors(folder))
    process_weights_after_loading(model, dtype)
    params = list(model.parameters())
    quantized = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    packed = [p for weight in quantized for p in weight.parameters()]
    num_params = sum(p.numel() for p in params) + sum(w.num_weights for w in quantized) - sum(p.numel() for p in packed)
    size, where = sum(p.nbytes for p in params) / 2**20, f"{str(dtype).removeprefix('torch.')} on {device}"
    figures = type(model).__name__, num_params / 1e6, size, where, time.perf_counter() - started
    logger.info("%s: %.1f M parameters, %.1f MiB, %s, loaded in %.1f s", *figures)
    if quantization_config is not None:
        size = sum(p.nbytes for p in packed) / 2**20
        logger.info("of these, %.1f MiB are %d-bit weights", size, quantization_config.bits)
        if params[0].is_cuda and not all(isinstance(w, PackedWeight) and w.has_kernels(dtype) for w in quantized):
            advice = "use dtype float16 or bfloat16, and groups of 32, 64, a multiple of 128, or -1"
            logger.warning("every step unpacks whole weights: %s", advice)
    return model


def resolve_quantization(
    folder: Path, hf_config: PretrainedConfig, asked: str | None, load_format: str
) -> QuantizationConfig | None:
    """How the checkpoint is quantised; "dummy" weights of a shape that is not, if asked for: 4 bits, groups of 128.

    Raises:
        ValueError: the checkpoint's method is not supported, or is not what was asked for.
    """
    raw, source = getattr(hf_config, "quantization_config", None), folder / "config.json"
    if raw is None:
        source = folder / "quantize_config.json"
        raw = (found := _read_json(source)) and {"quant_method": "gptq", **found}
    if raw:
        return QuantizationConfig.from_dict(raw, source)
    if asked is not None:
        if load_format == "dummy":
            return QuantizationConfig()
        raise ValueError(
            f"quantization={asked!r} was asked for, but the checkpoint in {folder} is not quantised: leave it out, or "
            "make a quantised copy with `folovllm quantize`"
        )
    return None


def create_quantized_weights(
    model: LlamaForCausalLM, config: QuantizationConfig, dtypes: dict[str, torch.dtype] | None
) -> None:
    """Make room for quantised weights in every layer that the checkpoint has them of.

    Args:
        dtypes: of the checkpoint's tensors, by name; None: all layers but the head are quantised.

    Raises:
        ValueError: a layer that cannot be, or that is in part, or none that is.
    """
    found = False
    for path, module in list(model.named_modules()):
        if not isinstance(module, Linear):
            continue
        names = shard_names(model, path)
        quantized = [module is not model.lm_head if dtypes is None else f"{name}.qweight" in dtypes for name in names]
        if any(quantized) and not all(quantized):
            raise ValueError(
                f"of {', '.join(names)} some are quantised and some are not, and they are one product here: quantise "
                "all of them, or none"
            )
        if all(quantized):
            found = True
            try:
                module.create_quantized_weights(config, (dtypes or {}).get(f"{names[0]}.scales", torch.float16))
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
    if not found:
        raise ValueError(
            "config.json or quantize_config.json says that the checkpoint is quantised, but it holds no *.qweight: "
            "remove quantization_config, or that file"
        )


def process_weights_after_loading(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring every quantised layer into the form that it computes with.

    Raises:
        ValueError: names the layer that makes no sense.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear):
            try:
                module.process_weights_after_loading(dtype)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error


def read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every tensor in the folder's safetensors files, memory-mapped one at a time.

    Raises:
        ValueError: no such file, a shard that the index names and is not there, or a damaged file.
    """
    for key, file in _open_safetensors(folder):
        yield key, file.get_tensor(key)


def read_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """{name: dtype} of every tensor in the folder's safetensors files; what is neither F32 nor BF16 counts as float16.

    Raises like `read_safetensors`.
    """
    floats = {"F32": torch.float32, "BF16": torch.bfloat16}
    return {key: floats.get(file.get_slice(key).get_dtype(), torch.float16) for key, file in _open_safetensors(folder)}


def _open_safetensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, the open file that holds it) of every tensor."""
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
                    yield key, file
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or incomplete ({error}); download it again") from error


def load_weights(model: LlamaForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand every tensor to the module that owns it.

    Raises:
        ValueError: names all tensors that are missing, unknown, or of the wrong shape.
    """
    owners = checkpoint_names(model)
    expected = set(owners)
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
        elif not _is_ignorable(name, model) and not _is_empty_bias(name, tensor, expected):
            problems.append(f"{name} is unknown to the model")
    for name, (module, param_name, shard_id) in owners.items():
        config = module.quant_config if isinstance(module, Linear) else None
        if isinstance(module, Linear) and config is not None and param_name == "g_idx" and not config.desc_act:
            module.weight_loader(param_name, config.default_g_idx(module.in_features), shard_id)
        else:
            problems.append(f"{name} is missing")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        if any(f".{leaf} " in problem for leaf in CHECKPOINT_TENSORS for problem in problems):
            shown += "; if its quantization_config describes it rightly, quantise it again (`folovllm quantize`)"
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


def _is_empty_bias(name: str, tensor: torch.Tensor, expected: set[str]) -> bool:
    """Older quantisers gave every layer a bias, of zeros where the model has none."""
    prefix, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{prefix}.qweight" in expected and not tensor.any()


def initialize_dummy_weights(model: nn.Module, seed: int) -> None:
    """Seeded random weights of ordinary size: matrices N(0, 0.02), quantised or not, norms one, biases zero."""
    for name, param in model.named_parameters():
        generator = torch.Generator(param.device).manual_seed(seed)
        seed += 1
        path, _, leaf = name.rpartition(".")
        if leaf in CHECKPOINT_TENSORS:
            config = cast(Linear, model.get_submodule(path)).quant_config
            cast(QuantizationConfig, config).fill_dummy(leaf, param, generator)
        elif param.dim() > 1:
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
