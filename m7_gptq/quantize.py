"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes of 4 or 8 bits that change a model little.

Rounding a weight changes what its layer says. GPTQ rounds a matrix input by input, and after each moves the inputs that
are still to be rounded so that they make up for the error, as far as the layer's real inputs allow: their second
moments, the Hessian of the squared error, say by how much. Layers are done in order, each with inputs that come out of
the layers before it as they are by then. `folovllm quantize` writes what comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .evaluate import BATCH_TOKENS, window_metadata
from .model_executor.layers.linear import Linear
from .model_executor.layers.quantization import QuantizationConfig, pack, write_zeros
from .model_executor.model_loader import shard_names
from .model_executor.models.llama import LlamaForCausalLM

_BLOCK = 128  # inputs, more or less, whose errors are passed on to all later inputs at once


@dataclass(frozen=True)
class LayerError:
    """||(W - W') X||^2 / ||W X||^2 over the calibration inputs X of the linear layer `name`.

    Attributes:
        error: of the weights that were written.
        rtn_error: if every weight had been rounded to the nearest.
    """

    name: str
    error: float
    rtn_error: float


@dataclass
class QuantizedMatrix:
    """A matrix [N, K] in codes; `zeros` and `scales` are [N, G], `g_idx` [K] says which group an input is in."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        return self.scales[:, self.g_idx] * (self.codes - self.zeros[:, self.g_idx])


@torch.inference_mode()
def quantize_layers(
    model: LlamaForCausalLM,
    samples: torch.Tensor,
    config: QuantizationConfig,
    method: str = "gptq",
    damping: float = 0.01,
    use_tqdm: bool = True,
) -> tuple[dict[str, torch.Tensor], list[LayerError]]:
    """Quantise all linear layers but the head, in place: their weights become what the codes stand for.

    Args:
        samples: int64 [S, L], token ids to calibrate with.
        method: "gptq", or "rtn": every weight to the nearest.
        damping: is added to the Hessian's diagonal, as a share of its mean.

    Returns:
        The tensors of the checkpoint by name, on the CPU, and the layers' errors.

    Raises:
        ValueError: names a layer that cannot be packed so; nothing was changed then.
    """
    # In the order in which data flows through them.
    linears = {f"model.{path}": m for path, m in model.model.named_modules() if isinstance(m, Linear)}
    for path, linear in linears.items():
        try:
            config.tensor_shapes(linear.in_features, linear.output_sizes, torch.float16)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    tensors: dict[str, torch.Tensor] = {}
    errors = []
    length = samples.shape[1]
    batches = samples.to(model.model.embed_tokens.weight.device).split(max(1, BATCH_TOKENS // length))
    hidden = [model.model.embed_tokens(batch.flatten()) for batch in batches]
    with tqdm(total=len(linears), desc="Quantising", unit="layer", disable=not use_tqdm) as bar:
        for index, layer in enumerate(model.model.layers):
            for path in [path for path in linears if path.startswith(f"model.layers.{index}.")]:
                linear = linears[path]
                hessian = _collect_hessian(model, layer, linear, hidden, length)
                weight = linear.weight.float()
                rounded = round_to_nearest(weight, config)
                matrix = rounded if method == "rtn" else gptq(weight, hessian, config, damping)
                fitted = matrix.dequantize()
                changes = [output_error(weight, w, hessian) for w in (fitted, rounded.dequantize())]
                errors.append(LayerError(path, *changes))
                linear.weight.copy_(fitted)
                for shard_id, name in enumerate(shard_names(model, path)):
                    rows = slice(*linear.offsets[shard_id : shard_id + 2])
                    tensors.update(checkpoint_tensors(name, matrix, rows, config))
                bar.update()
            hidden = [_run_layer(model, layer, x, length) for x in hidden]
    return tensors, errors


def _run_layer(model: LlamaForCausalLM, layer: nn.Module, hidden: torch.Tensor, length: int) -> torch.Tensor:
    """One decoder layer over sequences of `length` tokens: the residual stream [T, H] before and after."""
    with window_metadata(model, len(hidden) // length, length) as (positions, metadata):
        rotation = model.model.rotary_emb(positions)
        change, residual = layer(rotation, hidden, torch.zeros_like(hidden), metadata)
    return change + residual


def _collect_hessian(
    model: LlamaForCausalLM, layer: nn.Module, linear: Linear, hidden: list[torch.Tensor], length: int
) -> torch.Tensor:
    """Mean of x x^T over the inputs x of `linear`, float32 [K, K]."""
    hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
    num_inputs = sum(len(x) for x in hidden)

    def add(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].float()
        hessian.addmm_(x.T, x, alpha=1 / num_inputs)

    hook = linear.register_forward_pre_hook(add)
    try:
        for x in hidden:
            _run_layer(model, layer, x, length)
    finally:
        hook.remove()
    return hessian


def output_error(weight: torch.Tensor, fitted: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared change of the layer's outputs, relative to their mean square."""
    delta = weight - fitted
    return (((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum()).item()


# ------------------------------------------------------------------ one matrix


def find_grid(weight: torch.Tensor, config: QuantizationConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that cover each row of weight [N, group]: float32 [N, 1] both.

    The scale is already rounded to float16, as the checkpoint holds it.
    """
    most = 2**config.bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if config.sym:
        high = torch.maximum(-low, high)
        low = -high
    smallest = torch.finfo(torch.float16).tiny  # below it float16 rounds so coarsely that the grid would not cover
    scale = ((high - low) / most).clamp(min=smallest).half().float()
    zero = torch.full_like(scale, 2 ** (config.bits - 1)) if config.sym else (-low / scale).round().clamp(0, most)
    return scale, zero


def encode_weights(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, config: QuantizationConfig
) -> torch.Tensor:
    """The nearest codes, as floats."""
    return ((weight / scale).round() + zero).clamp(0, 2**config.bits - 1)


def round_to_nearest(weight: torch.Tensor, config: QuantizationConfig) -> QuantizedMatrix:
    """Every weight [N, K] to the nearest point of its group's grid."""
    num_groups = config.num_groups(weight.shape[1])
    groups = weight.unflatten(1, (num_groups, -1)).flatten(0, 1)  # [N * G, group]
    scale, zero = find_grid(groups, config)
    codes = encode_weights(groups, scale, zero, config).view(weight.shape)
    g_idx = config.default_g_idx(weight.shape[1]).to(weight.device)
    return QuantizedMatrix(codes, zero.view(-1, num_groups), scale.view(-1, num_groups), g_idx)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, config: QuantizationConfig, damping: float = 0.01
) -> QuantizedMatrix:
    """Algorithm 1 of the paper, for weight [N, K] and the second moments [K, K] of its inputs; changes neither."""
    num_inputs = weight.shape[1]
    g_idx = config.default_g_idx(num_inputs).to(weight.device)
    order = torch.arange(num_inputs, device=weight.device)
    if config.desc_act:
        order = hessian.diag().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order], damping)
    weight, codes = weight[:, order], torch.empty_like(weight)
    group_size = num_inputs // config.num_groups(num_inputs)
    # A group's grid is found when it begins, and needs inputs that are up to date.
    block_size = _BLOCK if group_size % _BLOCK == 0 else max(_BLOCK // group_size, 1) * group_size
    scales, zeros = [], []
    for start in range(0, num_inputs, block_size):
        stop = min(start + block_size, num_inputs)
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            if i % group_size == 0:
                scale, zero = find_grid(weight[:, i : i + group_size], config)
                scales.append(scale)
                zeros.append(zero)
            column = weight[:, i : i + 1]
            codes[:, i : i + 1] = encode_weights(column, scale, zero, config)
            error = (column - scale * (codes[:, i : i + 1] - zero)) / inverse[i, i]
            errors[:, i - start : i - start + 1] = error
            weight[:, i + 1 : stop] -= error @ inverse[i : i + 1, i + 1 : stop]
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    unsorted_codes, unsorted_g_idx = torch.empty_like(codes), torch.empty_like(g_idx)
    unsorted_codes[:, order], unsorted_g_idx[order] = codes, g_idx
    return QuantizedMatrix(unsorted_codes, torch.cat(zeros, 1), torch.cat(scales, 1), unsorted_g_idx)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse: row i says how later inputs make up for an error of input i."""
    mean = hessian.diag().mean().clamp(min=1e-12)
    # An input that was never active costs nothing, whatever its weight becomes; any positive moment will do.
    damped = hessian + torch.diag(torch.where(hessian.diag() == 0, mean, 0.0) + damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


# ------------------------------------------------------------------ what a checkpoint holds of it


def checkpoint_tensors(
    name: str, matrix: QuantizedMatrix, rows: slice, config: QuantizationConfig
) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the outputs `rows` of a matrix, on the CPU."""
    tensors = {
        "qweight": pack(matrix.codes[rows].T.to(torch.uint8), config.bits, dim=0),
        "qzeros": write_zeros(matrix.zeros[rows].T.to(torch.uint8), config),
        "scales": matrix.scales[rows].T.half(),
        "g_idx": matrix.g_idx.clone(),  # files do not like tensors that share memory
    }
    return {f"{name}.{leaf}": tensor.contiguous().cpu() for leaf, tensor in tensors.items()}
