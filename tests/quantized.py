"""Quantised checkpoints, made without the engine: codes are drawn, packed with numpy, and known to the last bit.

What the engine reads out of such files is compared with `Matrix.weight`, which never was packed. The packing follows
the description of the format in reference/gptq.md and shares nothing with the stage's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from .checkpoints import Spec, make_random_model, make_tokenizer
from .damage import edit_json, read_weights

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Matrices that are one product in the engine have the same input, and so the same Hessian and order.
_STACKED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised and written; names are those of a config.json.

    Attributes:
        has_g_idx: whether it is in the file.
        scales_dtype: of the scales in the file.
    """

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str = "gptq"
    has_g_idx: bool = True
    scales_dtype: torch.dtype = torch.float16

    def settings(self) -> dict[str, Any]:
        """What a config.json says."""
        written = asdict(self)
        for name in ("has_g_idx", "scales_dtype"):
            del written[name]
        return {"quant_method": "gptq", **written}

    def config(self, quantization: Any) -> Any:
        """The stage's own, out of its module `quantization`."""
        return quantization.QuantizationConfig.from_dict(self.settings(), Path("config.json"))

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size


@dataclass
class Matrix:
    """A quantised matrix of N outputs and K inputs.

    Attributes:
        codes: [K, N]; zeros: [G, N]; scales: float, [G, N]; g_idx: [K].
    """

    scheme: Scheme
    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    g_idx: np.ndarray

    def weight(self) -> torch.Tensor:
        """What it stands for, float32 [N, K], every element rounded once."""
        scales = self.scales.float().numpy()[self.g_idx]
        return torch.from_numpy((scales * (self.codes - self.zeros[self.g_idx]).astype(np.float32)).T.copy())

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a checkpoint holds it."""
        bits = self.scheme.bits
        qzeros = pack_words(self.zeros.T, bits).T
        if self.scheme.checkpoint_format == "gptq":
            qzeros = (qzeros - {4: 0x11111111, 8: 0x01010101}[bits]) % 2**32
        tensors = {
            "qweight": as_int32(pack_words(self.codes, bits)),
            "qzeros": as_int32(qzeros),
            "scales": self.scales.clone(),
        }
        if self.scheme.has_g_idx:
            tensors["g_idx"] = torch.from_numpy(self.g_idx.astype(np.int32))
        return tensors


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [A, B] -> unsigned words [A / n, B] of n = 32 / bits codes that follow each other on axis 0."""
    per_word = 32 // bits
    words = np.zeros((len(codes) // per_word, codes.shape[1]), dtype=np.int64)
    for place in range(per_word):
        words += codes[place::per_word].astype(np.int64) * 2 ** (bits * place)
    return words


def as_int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def make_matrix(
    scheme: Scheme,
    out_features: int,
    in_features: int,
    seed: int | list[int] = 0,
    like: Matrix | None = None,
    std: float = 0.14,
) -> Matrix:
    """A random one; groups and outputs differ much in scale, so that one taken for another is seen.

    Args:
        like: a matrix that has the same g_idx.
        std: of the weights, roughly.
    """
    rng = np.random.default_rng(seed)
    num_codes, num_groups = 2**scheme.bits, scheme.num_groups(in_features)
    codes = rng.integers(0, num_codes, (in_features, out_features), dtype=np.int16)
    zeros = np.full((num_groups, out_features), num_codes // 2, dtype=np.int16)
    if not scheme.sym:
        zeros = rng.integers(0, num_codes, zeros.shape, dtype=np.int16)
        zeros[rng.random(zeros.shape) < 0.2] = 0  # these borrow in v1, and those are the largest that a field holds
        zeros[rng.random(zeros.shape) < 0.1] = num_codes - 1
    spread = (codes - zeros[0]).std()
    scales = torch.from_numpy(rng.uniform(0.4, 1.6, zeros.shape) * std / spread).to(scheme.scales_dtype)
    g_idx = np.arange(in_features) // (in_features // num_groups)
    if scheme.desc_act:
        g_idx = rng.permutation(g_idx) if like is None else like.g_idx
    return Matrix(scheme, codes, zeros, scales, g_idx)


# ---------------------------------------------------------------------- whole checkpoints

# Sides that groups of 128 divide, and outputs that fill the CPU's int4 kernel.
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
MODELS = {
    "qwen3": Spec("qwen3", _SIZES),
    "tied": Spec("qwen3", {**_SIZES, "tie_word_embeddings": True}),
    "bias": Spec("llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
}


@dataclass
class Checkpoint:
    """A quantised checkpoint and what it stands for.

    Attributes:
        folder: of the quantised one.
        dense: of one with the same weights in float32, not quantised.
        matrices: by name, as "model.layers.0.mlp.up_proj".
    """

    folder: Path
    dense: Path
    matrices: dict[str, Matrix] = field(default_factory=dict)


def save_dense(folder: Path, model: str = "qwen3") -> Path:
    """MODELS[model] in `folder`, in float32 and not quantised."""
    transformers_logging.disable_progress_bar()
    make_random_model(MODELS[model], seed=7).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_quantized(folder: Path, scheme: Scheme, model: str = "qwen3", quantize_head: bool = False) -> Checkpoint:
    """Make MODELS[model] in folders under `folder`; the same one every time."""
    checkpoint = Checkpoint(folder / "quantized", folder / "dense")
    transformers_logging.disable_progress_bar()
    dense = make_random_model(MODELS[model], seed=7)
    with torch.no_grad():
        for name, param in dense.named_parameters():
            if name.endswith("bias"):
                param.copy_(param.half())  # as the file holds it
    names = [name for name, _ in dense.named_modules() if name.split(".")[-1] in LINEARS]
    names += ["lm_head"] if quantize_head else []
    ordered: dict[str, Matrix] = {}
    for number, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        linear = dense.get_submodule(name)
        out_features, in_features = linear.weight.shape
        stack = f"{parent}.{_STACKED.get(leaf, leaf)}"
        matrix = make_matrix(scheme, out_features, in_features, [number, scheme.bits], ordered.get(stack))
        ordered.setdefault(stack, matrix)
        checkpoint.matrices[name] = matrix
        linear.weight.data = matrix.weight()
    for where in (checkpoint.dense, checkpoint.folder):
        dense.save_pretrained(where)
        make_tokenizer().save_pretrained(where)
    weights = read_weights(checkpoint.folder)
    for name, matrix in checkpoint.matrices.items():
        del weights[f"{name}.weight"]
        weights.update({f"{name}.{leaf}": tensor for leaf, tensor in matrix.tensors().items()})
    weights = {name: tensor.half() if name.endswith("bias") else tensor for name, tensor in weights.items()}
    save_file(weights, checkpoint.folder / "model.safetensors", {"format": "pt"})
    edit_json(checkpoint.folder, quantization_config=scheme.settings())
    return checkpoint


def move_config(folder: Path, **changes: Any) -> None:
    """The quantisation config into a quantize_config.json, as older tools wrote it, which did not name the method."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder, remove=("quantization_config",))
    del config["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps({**config, **changes}))


def quantized_parts(model: Any) -> Iterator[tuple[str, Any, slice]]:
    """Of an engine's model: (name in the checkpoint, its layer, its outputs of those of the layer)."""
    for path, layer in model.named_modules():
        if getattr(layer, "quantized", None) is None:
            continue
        parent, _, leaf = path.rpartition(".")
        names = model.packed_modules_mapping.get(leaf, [leaf])
        for number, name in enumerate(names):
            yield f"{parent}.{name}".lstrip("."), layer, slice(*layer.offsets[number : number + 2])
