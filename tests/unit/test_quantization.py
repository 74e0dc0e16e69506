"""Quantised weights: read to the last bit, whatever the file's format, and multiplied right.

The reference is `tests/quantized.py`, which draws codes and packs them by itself. Where the engine computes in what a
file holds, nothing may differ; torch's int4 kernel rounds scales to bfloat16, and is held to what that can do.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import ROOT, CheckpointPath, submodule
from ..damage import edit_json, edit_weights, read_weights
from ..inside import model_of
from ..quantized import LEAVES, Checkpoint, Matrix, Scheme, make_matrix, move_config, quantized_parts, save_quantized
from .conftest import CopyOf, load_llm

pytestmark = pytest.mark.since("m7")

CPU = torch.device("cpu")
SHAPE = ROOT / "folovllm" / "models" / "shapes" / "Qwen3-0.6B"

# Largest error of an output vector, as a share of its length.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def quantization(stage: ModuleType) -> ModuleType:
    return submodule(stage, "model_executor.layers.quantization")


MakeQuantized = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> MakeQuantized:
    """`quantized(Scheme(), model="bias")`: made once, and not to be changed."""
    made: dict[str, Checkpoint] = {}

    def get(scheme: Scheme, **options: Any) -> Checkpoint:
        key = repr((scheme, options))
        if key not in made:
            made[key] = save_quantized(tmp_path_factory.mktemp("quantized"), scheme, **options)
        return made[key]

    return get


def load_layer(
    stage: ModuleType, matrices: Sequence[Matrix], dtype: torch.dtype, bias: torch.Tensor | None = None
) -> Any:
    """A linear layer that holds `matrices`, stacked, as the loader fills it."""
    linears = submodule(stage, "model_executor.layers.linear")
    scheme = matrices[0].scheme
    in_features = len(matrices[0].codes)
    sizes = [matrix.codes.shape[1] for matrix in matrices]
    if len(sizes) > 1:
        layer = linears.MergedLinear(in_features, sizes, bias=bias is not None)
    else:
        layer = linears.Linear(in_features, sizes[0], bias=bias is not None)
    config = scheme.config(submodule(stage, "model_executor.layers.quantization"))
    layer.create_quantized_weights(config, scheme.scales_dtype)
    layer.requires_grad_(False)
    for number, matrix in enumerate(matrices):
        for leaf in LEAVES:
            missing = config.default_g_idx(in_features)  # the loader's word for a g_idx that is not in the file
            layer.weight_loader(leaf, matrix.tensors().get(leaf, missing), number)
    layer.process_weights_after_loading(dtype)
    if bias is not None:
        layer.bias.data = bias.to(dtype)
    return layer


def full_weight(matrices: Sequence[Matrix]) -> torch.Tensor:
    return torch.cat([matrix.weight() for matrix in matrices])


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst row."""
    return float(((ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())


schemes = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128, -1]),
    desc_act=st.booleans(),
    sym=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    scales_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)


@st.composite
def stacks(draw: st.DrawFn, schemes: st.SearchStrategy[Scheme] = schemes, largest: int = 3) -> list[Matrix]:
    """One to three matrices over the same input, of any sides that can be packed."""
    scheme = draw(schemes)
    word = 32 // scheme.bits
    group_size = word if scheme.group_size == -1 else scheme.group_size
    in_features = group_size * draw(st.integers(1, 60 if scheme.group_size == -1 else 384 // group_size))
    sizes = draw(st.lists(st.integers(1, 100 // word), min_size=1, max_size=largest))
    matrices: list[Matrix] = []
    for number, size in enumerate(sizes):
        like = matrices[0] if matrices else None
        matrices.append(
            make_matrix(scheme, word * size, in_features, seed=[number, draw(st.integers(0, 99))], like=like)
        )
    return matrices


# ---------------------------------------------------------------------- the file format


@given(
    bits=st.sampled_from([4, 8]),
    dim=st.sampled_from([0, 1]),
    words=st.integers(1, 5),
    others=st.integers(1, 7),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
def test_packing_and_back(
    bits: int, dim: int, words: int, others: int, seed: int, dtype: torch.dtype, quantization: ModuleType
) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (words * 32 // bits, others))
    expected = quantized_words(codes, bits)
    ours = torch.from_numpy(codes).to(dtype)
    if dim == 1:
        ours, expected = ours.T, expected.T
    packed = quantization.pack(ours, bits, dim)
    assert packed.dtype == torch.int32 and torch.equal(packed, expected)
    unpacked = quantization.unpack(packed, bits, dim)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked.long(), ours.long())


def quantized_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Plain Python, code by code: the lowest bits are the first one's, and the highest bit is the sign."""
    per_word = 32 // bits
    columns = []
    for column in codes.T.tolist():
        words = []
        for start in range(0, len(column), per_word):
            digits = [format(code, f"0{bits}b") for code in reversed(column[start : start + per_word])]
            word = int("".join(digits), 2)
            words.append(word - 2**32 if word >= 2**31 else word)
        columns.append(words)
    return torch.tensor(columns, dtype=torch.int32).T


@pytest.mark.parametrize("bits", [4, 8])
def test_words_that_are_not_full(quantization: ModuleType, bits: int) -> None:
    codes = torch.zeros(32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="3 codes do not fill words"):
        quantization.pack(codes, bits, 1)


@given(scheme=schemes, zeros=st.lists(st.integers(0, 15), min_size=8, max_size=8), seed=st.integers(0, 99))
def test_zero_points_and_back(scheme: Scheme, zeros: list[int], seed: int, quantization: ModuleType) -> None:
    """Zeros among them: less one they borrow from the field above, and from the word's end the whole word wraps."""
    config = scheme.config(quantization)
    rows = np.array([zeros, zeros[::-1], [0] * 8, [2**scheme.bits - 1] * 8, [0, 1] * 4, [1, 0] * 4])
    written = quantization.write_zeros(torch.from_numpy(rows), config)
    matrix = make_matrix(scheme, 8, 6 * 128)
    matrix.zeros = rows
    assert torch.equal(written, matrix.tensors()["qzeros"])
    read = quantization.unpack(quantization.read_zeros(written, config), scheme.bits, 1)
    assert torch.equal(read.long(), torch.from_numpy(rows))


def test_the_formats_of_zero_points_in_hexadecimal(quantization: ModuleType) -> None:
    """As reference/gptq.md has them, and as files have them."""
    for bits, v1, v2 in ((4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)):
        zeros = torch.full((1, 32 // bits), 2 ** (bits - 1))
        for name, expected in (("gptq", v1), ("gptq_v2", v2)):
            config = quantization.QuantizationConfig(bits=bits, checkpoint_format=name)
            assert quantization.write_zeros(zeros, config).item() % 2**32 == expected
    # 0, 1, 0, 0 … less one in every field: 0xF borrows, so the 1 becomes -1 as well.
    config = quantization.QuantizationConfig()
    word = quantization.write_zeros(torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0]]), config)
    assert word.item() % 2**32 == (0x10 - 0x11111111) % 2**32


# ---------------------------------------------------------------------- layers


@given(stack=stacks(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_layers_hold_the_very_weight(stack: list[Matrix], dtype: torch.dtype, stage: ModuleType) -> None:
    """Stacked or not, in any format, bits, groups and order: rounded once, to the dtype that is computed in."""
    layer = load_layer(stage, stack, dtype)
    assert not hasattr(layer, "weight") and not hasattr(layer, "qweight")  # nothing is kept twice
    expected = full_weight(stack)
    assert torch.equal(layer.quantized.dequantize(torch.float32), expected)
    assert torch.equal(layer.quantized.dequantize(dtype), expected.to(dtype))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert relative_error(layer(x), x.double() @ expected.double().T) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "checkpoint_format"),
    list(itertools.product((4, 8), (32, 64, 128, -1), (True, False), (False, True), ("gptq", "gptq_v2"))),
)
def test_every_combination(
    stage: ModuleType, bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str
) -> None:
    """None of them is left to chance: a stack of two in float32, and in what bfloat16 computes with."""
    scheme = Scheme(bits, group_size, desc_act, sym, checkpoint_format)
    first = make_matrix(scheme, 64, 256, seed=1)
    stack = [first, make_matrix(scheme, 128, 256, seed=2, like=first)]
    layer = load_layer(stage, stack, torch.float32)
    assert torch.equal(layer.quantized.dequantize(torch.float32), full_weight(stack))
    check_bfloat16(stage, stack, rows=(1, 5))


@pytest.mark.parametrize("bits", [4, 8])
def test_bias(stage: ModuleType, bits: int) -> None:
    """In float32 and, where there is one, in the int4 kernel."""
    stack = [make_matrix(Scheme(bits, 64), 64, 128, seed=number) for number in range(2)]
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3))
    weight = full_weight(stack).double()
    for dtype in (torch.float32, torch.bfloat16):
        layer = load_layer(stage, stack, dtype, bias)
        for num_rows in (1, 3, 200):
            x = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
            expected = x.double() @ weight.T + bias.to(dtype).double()
            assert relative_error(layer(x), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("desc_act", [False, True])
def test_inputs_of_any_layout(stage: ModuleType, dtype: torch.dtype, desc_act: bool) -> None:
    """Slices and transposed tensors, as nn.Linear takes them."""
    stack = [make_matrix(Scheme(desc_act=desc_act, group_size=32), 64, 128)]
    layer = load_layer(stage, stack, dtype)
    wide = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    tall = torch.randn(128, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    for x in (wide[:, 100:228], tall.T, wide[::2, :128]):
        assert not x.is_contiguous()
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_no_rows_at_all(stage: ModuleType) -> None:
    layer = load_layer(stage, [make_matrix(Scheme(), 64, 128)], torch.float32)
    assert layer(torch.zeros(0, 128)).shape == (0, 64)


# ---------------------------------------------------------------------- torch's int4 kernel on a CPU


def uses_int4_kernel(layer: Any, quantization: ModuleType) -> bool:
    return isinstance(layer.quantized, quantization.CPUInt4Weight)


@pytest.fixture(scope="session")
def int4(quantization: ModuleType) -> ModuleType:
    if quantization._int4_block_rows() == 0:  # ARM packs in an order of its own
        pytest.skip("torch's int4 kernel of this CPU is not read back")
    return quantization


def check_bfloat16(stage: ModuleType, stack: list[Matrix], rows: Sequence[int]) -> Any:
    """A layer in bfloat16: its weight as near as scales and shifts in bfloat16 allow, and its products."""
    quantization = submodule(stage, "model_executor.layers.quantization")
    layer = load_layer(stage, stack, torch.bfloat16)
    expected = full_weight(stack)
    ours = layer.quantized.dequantize(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    if uses_int4_kernel(layer, quantization):
        # w = scale * (code - 8) + shift, both factors rounded to eight bits, and so is the sum.
        parts = []
        for matrix in stack:
            scale = matrix.scales.float().numpy()[matrix.g_idx]
            around = np.abs(scale * (matrix.codes - 8)) + np.abs(scale * (8 - matrix.zeros[matrix.g_idx]))
            parts.append(torch.from_numpy(around.T.astype(np.float32)))
        bound = 2.0**-8 * (torch.cat(parts) + expected.abs())
        excess = float(((ours.float() - expected).abs() / bound.clamp(min=1e-20)).max())
        assert excess <= 1.01, excess
    else:
        assert torch.equal(ours, expected.bfloat16())
    for num_rows in rows:
        x = torch.randn(num_rows, layer.in_features, generator=torch.Generator().manual_seed(num_rows)).bfloat16()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, x.double() @ ours.double().T) < TOLERANCE[torch.bfloat16]
        assert relative_error(y, x.double() @ expected.double().T) < 2 * TOLERANCE[torch.bfloat16]
    return layer


int4_schemes = st.builds(
    Scheme,
    group_size=st.sampled_from([32, 64, 96, 128, 192, 256, 512, -1]),
    desc_act=st.booleans(),
    sym=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
)


@given(
    scheme=int4_schemes,
    out_features=st.sampled_from([64, 128, 192]),
    seed=st.integers(0, 99),
    num_rows=st.integers(1, 9),
)
def test_the_int4_kernel(
    scheme: Scheme, out_features: int, seed: int, num_rows: int, stage: ModuleType, int4: ModuleType
) -> None:
    """Groups of three times 32 too, which the kernel takes in smaller ones."""
    in_features = 384 if scheme.group_size == -1 else scheme.group_size * (1 + seed % 3)
    stack = [make_matrix(scheme, out_features, in_features, seed=seed)]
    assert uses_int4_kernel(check_bfloat16(stage, stack, rows=[num_rows]), int4)


@pytest.mark.parametrize("desc_act", [False, True])
def test_few_rows_and_many(
    stage: ModuleType, int4: ModuleType, desc_act: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to MAX_ROWS the kernel multiplies, and beyond it the weight is unpacked: once, whatever the number."""
    scheme = Scheme(group_size=64, desc_act=desc_act, sym=False, checkpoint_format="gptq_v2")
    stack = [make_matrix(scheme, 64, 256)]
    most = int4.CPUInt4Weight.MAX_ROWS
    layer = check_bfloat16(stage, stack, rows=(1, 2, most - 1, most, most + 1, 2 * most))
    unpack = Mock(side_effect=int4._unpack_int4)
    monkeypatch.setattr(int4, "_unpack_int4", unpack)
    x = torch.randn(most + 1, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    few = layer(x[:most])
    unpack.assert_not_called()
    many = layer(x)
    unpack.assert_called_once()
    assert relative_error(few, many[:most].double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("scheme", "out_features", "dtype"),
    [
        (Scheme(bits=8), 64, torch.bfloat16),
        (Scheme(), 64, torch.float32),
        (Scheme(), 64, torch.float16),
        (Scheme(), 40, torch.bfloat16),
        (Scheme(group_size=16), 64, torch.bfloat16),
        (Scheme(group_size=48), 64, torch.bfloat16),
    ],
    ids=["8 bits", "float32", "float16", "40 outputs", "groups of 16", "groups of 48"],
)
def test_what_the_int4_kernel_cannot_hold(
    stage: ModuleType, quantization: ModuleType, scheme: Scheme, out_features: int, dtype: torch.dtype
) -> None:
    stack = [make_matrix(scheme, out_features, 384)]
    layer = load_layer(stage, stack, dtype)
    assert not uses_int4_kernel(layer, quantization)
    assert torch.equal(layer.quantized.dequantize(torch.float32), stack[0].weight())


def test_a_cpu_whose_packing_is_unknown(
    stage: ModuleType, quantization: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the weight is unpacked every time, which is slow and right."""
    quantization._int4_block_rows.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "_unpack_int4", lambda packed, inputs, rows: torch.zeros(inputs, 128).byte())
        assert quantization._int4_block_rows() == 0
        layer = load_layer(stage, [make_matrix(Scheme(), 64, 128)], torch.bfloat16)
        assert isinstance(layer.quantized, quantization.PackedWeight)
    quantization._int4_block_rows.cache_clear()


# ---------------------------------------------------------------------- checkpoints


def check_model(model: Any, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Every matrix of the file is in the model, at its place, to the last bit; all else is as in the dense one."""
    missing = dict(checkpoint.matrices)
    for name, layer, rows in quantized_parts(model):
        weight = layer.quantized.dequantize(dtype)[rows]
        assert torch.equal(weight, missing.pop(name).weight().to(dtype)), name
    assert not missing
    dense = read_weights(checkpoint.dense)
    for name, param in model.named_parameters():
        if name in dense:
            assert torch.equal(param, dense[name].to(dtype)), name


def load(stage: ModuleType, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The bare model of a checkpoint."""
    loader = submodule(stage, "model_executor.model_loader")
    return loader.load_model(folder, loader.load_hf_config(folder), dtype, CPU, **options)


CHECKPOINTS: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "v1": (Scheme(), {}),
    "v2 without g_idx": (Scheme(sym=False, checkpoint_format="gptq_v2", has_g_idx=False), {"model": "tied"}),
    "act-order": (Scheme(group_size=32, desc_act=True, sym=False), {}),
    "8 bits, all inputs": (Scheme(bits=8, group_size=-1), {"model": "bias"}),
    "biases, scales in bfloat16": (Scheme(group_size=64, scales_dtype=torch.bfloat16), {"model": "bias"}),
    "the head too": (Scheme(group_size=64), {"quantize_head": True}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(stage: ModuleType, quantized: MakeQuantized, name: str) -> None:
    scheme, options = CHECKPOINTS[name]
    checkpoint = quantized(scheme, **options)
    model = load(stage, checkpoint.folder)
    check_model(model, checkpoint)
    if options.get("model") == "bias":
        dense = read_weights(checkpoint.dense)
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            bias = model.get_submodule(f"model.layers.1.{path}").bias
            assert bias.dtype == torch.float32 and torch.equal(bias, dense[f"model.layers.1.{path}.bias"])
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)


def test_the_config_may_be_in_quantize_config_json(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path) -> None:
    checkpoint = quantized(Scheme(group_size=32, desc_act=True, sym=False))
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))
    move_config(folder)
    check_model(load(stage, folder), checkpoint)
    move = json.loads((folder / "quantize_config.json").read_text())
    # Of both, config.json counts.
    (folder / "quantize_config.json").write_text(json.dumps({**move, "bits": 3}))
    edit_json(folder, quantization_config=checkpoint.matrices["model.layers.0.mlp.up_proj"].scheme.settings())
    check_model(load(stage, folder), checkpoint)


@pytest.mark.parametrize("key", ["desc_act", "sym", "checkpoint_format"])
def test_what_the_config_may_leave_out(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path, key: str) -> None:
    """Old files say neither the format, which is v1, nor whether there is an order. null is like nothing."""
    checkpoint = quantized(Scheme())
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))
    settings = Scheme().settings()
    for value in ({}, {key: None}):
        edit_json(folder, quantization_config={**{k: v for k, v in settings.items() if k != key}, **value})
        check_model(load(stage, folder), checkpoint)
    edit_json(folder, quantization_config={**settings, "damp_percent": 0.01, "meta": {"quantizer": ["x:1"]}})
    check_model(load(stage, folder), checkpoint)


def test_a_layer_may_be_left_as_it_is(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path) -> None:
    """A product that is not quantised at all, beside others that are."""
    checkpoint = quantized(Scheme())
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))
    dense, whole = read_weights(checkpoint.dense), "model.layers.0.mlp.down_proj"

    def edit(weights: dict[str, torch.Tensor]) -> None:
        for leaf in LEAVES:
            del weights[f"{whole}.{leaf}"]
        weights[f"{whole}.weight"] = dense[f"{whole}.weight"]

    edit_weights(folder, edit)
    model = load(stage, folder)
    assert torch.equal(model.get_submodule(whole).weight, dense[f"{whole}.weight"])
    rest = {name: matrix for name, matrix in checkpoint.matrices.items() if name != whole}
    check_model(model, Checkpoint(folder, checkpoint.dense, rest))


def test_biases_of_zeros_are_passed_over(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path) -> None:
    """Older quantisers gave one to every layer."""
    checkpoint = quantized(Scheme())
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))
    edit_weights(
        folder,
        lambda weights: weights.update(
            {f"{name}.bias": torch.zeros(m.codes.shape[1]).half() for name, m in checkpoint.matrices.items()}
        ),
    )
    check_model(load(stage, folder), checkpoint)


@pytest.mark.parametrize("asked", [None, "gptq"])
def test_asking_for_what_is_there(stage: ModuleType, quantized: MakeQuantized, asked: str | None) -> None:
    checkpoint = quantized(Scheme())
    check_model(load(stage, checkpoint.folder, quantization=asked), checkpoint)


# ---------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq"}, "quantised by 'awq'.*supported is 'gptq'"),
    "no method": ({"quant_method": None}, "quantised by None.*supported is 'gptq'"),
    "3 bits": ({"bits": 3}, "3 bits are not supported; supported are 4 and 8"),
    "bits that are a word": ({"bits": "4"}, "'4' bits are not supported"),
    "a format of a kernel": ({"checkpoint_format": "marlin"}, "'marlin' is not supported; supported are gptq, gptq_v2"),
    "no group at all": ({"group_size": 0}, "group_size must be .*got 0"),
    "a group of -2": ({"group_size": -2}, "group_size must be .*got -2"),
    "an order that is a word": ({"desc_act": "false"}, "desc_act must be true or false, got 'false'"),
    "symmetry that is a number": ({"sym": 1}, "sym must be true or false, got 1"),
    "a group size that is a word": ({"group_size": "128"}, "group_size must be .*got '128'"),
}


PLACES = [(name, "config.json") for name in REFUSED] + [
    (name, "quantize_config.json") for name, (changes, _) in REFUSED.items() if "quant_method" not in changes
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_refusals(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path, name: str, place: str) -> None:
    """By name, and with the file that says so."""
    changes, message = REFUSED[name]
    folder = Path(shutil.copytree(quantized(Scheme()).folder, tmp_path / "copy"))
    if place == "config.json":
        edit_json(folder, quantization_config={**Scheme().settings(), **changes})
    else:
        move_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_llm(stage, folder)
    assert str(folder / place) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_what_the_config_must_say(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(quantized(Scheme()).folder, tmp_path / "copy"))
    settings = Scheme().settings()
    del settings[key]
    edit_json(folder, quantization_config=settings)
    with pytest.raises(ValueError, match="lacks bits or group_size"):
        load_llm(stage, folder)


def test_asking_for_what_is_not_there(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    folder = checkpoint_path("qwen3")
    with pytest.raises(ValueError, match=r"quantization='gptq' was asked for.*is not quantised.*folovllm quantize"):
        load_llm(stage, folder, quantization="gptq")
    with pytest.raises(ValueError, match=r"quantization must be 'gptq' or None .*got 'awq'"):
        load_llm(stage, folder, quantization="awq")


def test_a_config_that_promises_codes_which_are_not_there(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3")
    edit_json(folder, quantization_config=Scheme().settings())
    with pytest.raises(ValueError, match=r"holds no \*\.qweight: remove quantization_config, or"):
        load_llm(stage, folder)


def test_codes_without_a_config(stage: ModuleType, quantized: MakeQuantized, tmp_path: Path) -> None:
    """Nobody guesses bits and groups."""
    folder = Path(shutil.copytree(quantized(Scheme()).folder, tmp_path / "copy"))
    edit_json(folder, remove=("quantization_config",))
    with pytest.raises(ValueError, match=r"_proj\.qweight is unknown to the model.* quantization_config"):
        load_llm(stage, folder)


# ---------------------------------------------------------------------- memory


def bytes_by_hand(scheme: Scheme, out_features: int, in_features: int, int4_kernel: bool) -> int:
    """Codes, zero points, scales, and with an order its indices. The int4 kernel has shifts in place of zero points."""
    weights = out_features * in_features
    pairs = out_features * scheme.num_groups(in_features)
    grid = 4 * pairs if int4_kernel else 2 * pairs + pairs * scheme.bits // 8
    return weights * scheme.bits // 8 + grid + (8 * in_features if scheme.desc_act else 0)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 128), (4, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_layer(
    stage: ModuleType, quantization: ModuleType, dtype: torch.dtype, bits: int, group_size: int, desc_act: bool
) -> None:
    scheme = Scheme(bits, group_size, desc_act)
    stack = [make_matrix(scheme, 64, 256, seed=1)]
    layer = load_layer(stage, stack, dtype)
    taken = sum(tensor.nbytes for tensor in layer.parameters())
    assert sum(tensor.nbytes for tensor in layer.buffers()) <= 4096  # numbers that kernels count with
    # With one group there is no order to speak of.
    by_hand = Scheme(bits, group_size, desc_act and group_size != -1)
    assert taken == bytes_by_hand(by_hand, 64, 256, uses_int4_kernel(layer, quantization))
    if (bits, group_size) == (4, 128) and not desc_act:
        assert taken <= 0.27 * 2 * 64 * 256  # at least 73 % less than in bfloat16


@pytest.mark.parametrize("int4_kernel", [False, True])
def test_bytes_at_the_size_of_a_real_model(stage: ModuleType, quantization: ModuleType, int4_kernel: bool) -> None:
    """Qwen3-0.6B by its shapes, on the meta device: what the README says of its memory."""
    loader = submodule(stage, "model_executor.model_loader")
    linears = submodule(stage, "model_executor.layers.linear")
    hf_config = loader.load_hf_config(SHAPE)
    with torch.device("meta"):
        model = submodule(stage, "model_executor.models").get_model_class(hf_config.architectures)(hf_config)
    before = {path: module for path, module in model.named_modules() if isinstance(module, linears.Linear)}
    shapes = {path: tuple(layer.weight.shape) for path, layer in before.items()}
    loader.create_quantized_weights(model, quantization.QuantizationConfig(), None)
    assert {path for path, layer in before.items() if layer.quant_config} == set(shapes) - {"lm_head"}
    stored = sum(p.nbytes for name, p in model.named_parameters() if name.split(".")[-1] in LEAVES)
    rest = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-1] not in LEAVES)
    bfloat16 = 2 * sum(rows * columns for rows, columns in shapes.values())
    packed = sum(bytes_by_hand(Scheme(), rows, columns, int4_kernel) for rows, columns in shapes.values())
    assert packed <= 0.27 * bfloat16
    mib = 2**20
    if not int4_kernel:
        assert [round(x / mib) for x in (2 * rest + bfloat16, 2 * rest + packed, packed)] == [1137, 515, 218]
        # A checkpoint has words of the same size, and an index for each input of each matrix.
        indices = sum(4 * layer.in_features * len(layer.output_sizes) for layer in before.values())
        assert stored == packed + indices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_log_says(
    stage: ModuleType, quantized: MakeQuantized, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MiB of all weights, and of those that are quantised; parameters are counted as if nothing were packed."""
    checkpoint = quantized(Scheme(group_size=32))
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        load_llm(stage, checkpoint.folder, dtype=dtype, log_level="INFO") as llm,
    ):
        model = model_of(llm)
    params = sum(tensor.numel() for tensor in read_weights(checkpoint.dense).values())
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert f": {params / 1e6:.1f} M parameters, " in messages
    total = sum(p.nbytes for p in model.parameters())
    found = re.search(
        r" M parameters, ([\d.]+) MiB, .*\nof these, ([\d.]+) MiB are 4-bit weights$", messages, re.MULTILINE
    )
    assert found, messages
    stacked = {id(layer): layer for _, layer, _ in quantized_parts(model)}
    packed = sum(p.nbytes for layer in stacked.values() for p in layer.quantized.parameters())
    assert [float(number) for number in found.groups()] == [round(total / 2**20, 1), round(packed / 2**20, 1)]


def test_the_log_of_others_says_nothing_of_it(
    stage: ModuleType, checkpoint_path: CheckpointPath, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=stage.__name__):
        load(stage, checkpoint_path("qwen3"))
    assert not [record for record in caplog.records if "-bit" in record.getMessage()]


# ---------------------------------------------------------------------- dummy weights


@pytest.fixture
def bare(quantized: MakeQuantized, tmp_path: Path) -> Iterator[Path]:
    """A shape without weights, that does not say how it is quantised."""
    folder = Path(shutil.copytree(quantized(Scheme()).dense, tmp_path / "shape"))
    (folder / "model.safetensors").unlink()
    yield folder


def test_dummy_weights_are_quantised_if_asked_for(stage: ModuleType, bare: Path) -> None:
    """4 bits in groups of 128, of ordinary size, a function of the seed; the head is not."""
    models = [load(stage, bare, load_format="dummy", quantization="gptq", seed=seed) for seed in (1, 1, 2)]
    a, b, c = (
        {name: layer.quantized.dequantize(torch.float32) for name, layer, _ in quantized_parts(model)}
        for model in models
    )
    assert len(a) == 14
    for name, weight in a.items():
        assert weight.std() == pytest.approx(0.02, rel=0.1), name
        assert abs(float(weight.mean())) < 4e-3, name  # codes reach further down than up: half a step
        assert torch.equal(weight, b[name]) and not torch.equal(weight, c[name]), name
        assert len(weight[0].unique()) <= 16
    assert models[0].lm_head.quantized is None


@pytest.mark.parametrize(("bits", "desc_act"), [(8, False), (4, True)])
def test_dummy_weights_of_a_config_that_says_how(stage: ModuleType, bare: Path, bits: int, desc_act: bool) -> None:
    edit_json(bare, quantization_config=Scheme(bits, 64, desc_act).settings())
    model = load(stage, bare, load_format="dummy")
    for name, layer, _ in quantized_parts(model):
        weight = layer.quantized.dequantize(torch.float32)
        assert weight.std() == pytest.approx(0.02, rel=0.1), name
        assert len(layer.quantized.scales) == layer.in_features // 64
        assert weight.unique().numel() > 2 ** (bits - 1)
