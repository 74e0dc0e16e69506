"""`folovllm quantize`: a quantised copy of a checkpoint, made by the newest stage.

The algorithm is `quantize.py` of the stage. Here is what it is fed with, what is written, which other tools load too,
and what is printed. Nothing is at the place of the new checkpoint until all of it is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from . import import_stage
from .evaluate import SAMPLE_SEED, check_window, encode, sample_token_ids, stage_module, tell

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HELD_OUT = 16  # windows that perplexity is measured on, at most


@dataclass(frozen=True)
class QuantizationReport:
    """What came of it; `print` it.

    Attributes:
        layers: the stage's `LayerError`s, in the order of the model.
        perplexity_before, perplexity_after: of a text that calibration has not seen.
        bytes_before, bytes_after: of the weights, all of them.
    """

    layers: list[Any]
    perplexity_before: float
    perplexity_after: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'error':>9}  {'rounding':>9}  ratio"]
        for layer in self.layers:
            ratio = layer.error / layer.rtn_error if layer.rtn_error else 1.0
            lines.append(f"{layer.name:<{width}}  {layer.error:9.2e}  {layer.rtn_error:9.2e}  {ratio:5.2f}")
        before, after = self.perplexity_before, self.perplexity_after
        lines.append(f"perplexity: {before:.4f} -> {after:.4f} ({(after / before - 1) * 100:+.2f} %)")
        sizes = [num_bytes / 2**20 for num_bytes in (self.bytes_before, self.bytes_after)]
        lines.append(f"weights: {sizes[0]:.1f} MiB -> {sizes[1]:.1f} MiB")
        return "\n".join(lines)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    act_order: bool = False,
    sym: bool = True,
    method: str = "gptq",
    calibration: str | None = None,
    num_samples: int = 64,
    sample_length: int | None = None,
    damping: float = 0.01,
    seed: int = 0,
    use_tqdm: bool = True,
    stage: str | None = None,
    **options: Any,
) -> QuantizationReport:
    """Write a quantised copy of a checkpoint, which other tools load too (GPTQ; v1 if symmetric, else v2).

    Args:
        model: folder or hub id of the original.
        out: folder to be made; it must not be there yet, or be empty.
        act_order: round the inputs that matter most first.
        sym: a grid that is symmetric around zero.
        method: "gptq", or "rtn": every weight to the nearest.
        calibration: text whose activations the weights are fitted to; None: what the model itself says.
        num_samples: windows of it, of `sample_length` tokens (None: 512, or what the model can).
        damping: added to the Hessian's diagonal, as a share of its mean.
        seed: of the sampled text, or of the choice of windows.
        use_tqdm: tell on stderr what is being done, with a bar for what takes long.
        stage: which stage computes; None: FOLOVLLM_STAGE, or the newest.
        **options: of the engine (`EngineConfig`); dtype is float32 and gpu_memory_utilization 0.5 unless given.

    Raises:
        ValueError: something that cannot be quantised so, or a place that is taken.
    """
    if method not in ("gptq", "rtn"):
        raise ValueError(f"method must be 'gptq' or 'rtn', got {method!r}")
    if num_samples < 1 or damping <= 0:
        raise ValueError(f"num_samples must be at least 1 and damping above 0, got {num_samples} and {damping}")
    quantizer, perplexity = stage_module(stage, "quantize"), stage_module(stage, "evaluate").perplexity
    loader = import_module(f"{import_stage(stage).__name__}.model_executor.model_loader")
    config = quantizer.QuantizationConfig(bits, group_size, act_order, sym, "gptq" if sym else "gptq_v2")
    folder, out = loader.resolve_model(model), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; name another folder, or remove it")
    if loader.resolve_quantization(folder, loader.load_hf_config(folder), None, "auto"):
        raise ValueError(f"the checkpoint in {folder} is quantised already; use the original one")
    # On a GPU, half of the memory is left for Hessians and their inverses.
    defaults = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.5}
    with import_stage(stage).LLM(folder, **{**defaults, **options}) as llm:
        length = check_window(llm, sample_length)
        samples, held_out = _choose_samples(llm, calibration, num_samples, length, seed, use_tqdm)
        tell(f"Measuring the perplexity of {held_out.numel():,} other tokens", use_tqdm)
        before, _ = perplexity(llm.model, held_out.flatten(), held_out.shape[1])
        tensors, errors = quantizer.quantize_layers(llm.model, samples, config, method, damping, use_tqdm)
        tell("Measuring the perplexity once more", use_tqdm)
        after, _ = perplexity(llm.model, held_out.flatten(), held_out.shape[1])
    sizes = _write_checkpoint(dict(loader.read_safetensors(folder)), folder, out, tensors, config.to_dict())
    return QuantizationReport(errors, before, after, *sizes)


def _choose_samples(
    llm: Any, text: str | None, num_samples: int, length: int, seed: int, use_tqdm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to calibrate with and windows to measure by, int64 [n, length] both."""
    if text is None:
        tell(f"Letting the model write {num_samples} + {_HELD_OUT} texts of {length} tokens", use_tqdm)
        samples = sample_token_ids(llm, num_samples, length, seed, use_tqdm)
        return samples, sample_token_ids(llm, _HELD_OUT, length, SAMPLE_SEED + seed, use_tqdm)
    token_ids = encode(llm, text)
    windows = token_ids[: len(token_ids) // length * length].view(-1, length)
    if len(windows) < 2:
        raise ValueError(
            f"the calibration text has {len(token_ids)} tokens, and two windows of {length} are the least: give a "
            "longer one, or a smaller sample_length"
        )
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    num_samples = min(num_samples, max(1, len(windows) - _HELD_OUT), len(windows) - 1)
    return windows[:num_samples], windows[num_samples : num_samples + _HELD_OUT]


def _write_checkpoint(
    original: dict[str, torch.Tensor],
    folder: Path,
    out: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
) -> tuple[int, int]:
    """The original with `tensors` in place of what they stand for; bytes of the weights, before and after."""
    bytes_before, merged = 0, dict(tensors)
    for name, tensor in original.items():
        bytes_before += tensor.nbytes
        prefix, _, leaf = name.rpartition(".")
        if leaf != "weight" or f"{prefix}.qweight" not in tensors:
            merged[name] = tensor
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        for path in (path for pattern in _COPIED for path in folder.glob(pattern)):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, temporary / path.name)
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        contents = {"config.json": {**hf_config, "quantization_config": settings}, "quantize_config.json": settings}
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_torch_state_dict(merged, temporary)
        for path in temporary.glob("*.safetensors"):  # written for the owner alone, unlike the rest
            path.chmod((temporary / "config.json").stat().st_mode)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return bytes_before, sum(tensor.nbytes for tensor in merged.values())
