"""Products with packed weights in Triton, against the weight that was never packed.

On a CPU they run under Triton's interpreter, in the dtypes that numpy has; on a GPU in all, at the sizes of models, and
recorded. Nothing here knows how many outputs a program computes or how deep it reads.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import submodule
from ..quantized import Matrix, Scheme, make_matrix
from .test_quantization import full_weight, load_layer

pytestmark = [
    pytest.mark.since("m7"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None and sys.platform != "linux", reason="there is no Triton here"
    ),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")

# Largest error of an output vector, as a share of its length: sums of float32 in another order, and on tensor cores the
# weight rounded to the dtype of x.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

on_gpu = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@pytest.fixture(scope="session")
def kernels(stage: ModuleType) -> ModuleType:
    return submodule(stage, "model_executor.layers.quantized_matmul")


@pytest.fixture
def cuda_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def packed(
    stage: ModuleType, stack: list[Matrix], dtype: torch.dtype, device: torch.device = CPU, bias: bool = False
) -> Any:
    """A layer whose weight is in the form that the kernels read, on any device."""
    quantization = submodule(stage, "model_executor.layers.quantization")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization.CPUInt4Weight, "can_hold", lambda *_: False)
        rows = sum(matrix.codes.shape[1] for matrix in stack)
        layer = load_layer(stage, stack, dtype, randn(rows, dtype=dtype, seed=9) if bias else None)
    assert isinstance(layer.quantized, quantization.PackedWeight)
    return layer.to(device)


def randn(*shape: int, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Every row is right up to rounding; the largest relative error."""
    expected = x.double() @ weight.to(x.device).double().T
    if bias is not None:
        expected += bias.double()
    assert ours.dtype == x.dtype and ours.shape == expected.shape and ours.is_contiguous()
    error = ((ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)).max()
    assert error <= TOLERANCE[x.dtype], f"{float(error):.2e}"  # a nan is not
    return float(error)


def test_where_there_are_kernels(stage: ModuleType, kernels: ModuleType) -> None:
    """On CUDA, for groups that lie in a block, or that blocks lie in."""
    device = CUDA if torch.cuda.is_available() else CPU
    x = torch.zeros(1, device=device)
    for group_size in (32, 64, 128, 256, 1024):
        assert kernels.is_available(x, group_size) == torch.cuda.is_available()
    for group_size in (1, 8, 16, 48, 96, 160, 192, 320):
        assert not kernels.is_available(x, group_size)
    assert not kernels.is_available(torch.zeros(1, device="meta"), 128)


@pytest.fixture
def enabled(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers believe that they may use the kernels."""
    monkeypatch.setattr(kernels, "has_triton", lambda x: True)


# ---------------------------------------------------------------------- under the interpreter

# (bits, group_size, inputs): groups in a block and blocks in a group, a last block that is not full, one group of all.
LAYOUTS = [
    (4, 32, 160),
    (4, 64, 128),
    (4, 128, 384),
    (4, 256, 512),
    (4, -1, 256),
    (4, -1, 160),
    (8, 32, 96),
    (8, 64, 192),
    (8, 128, 256),
    (8, -1, 200),
]
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from([torch.float32, torch.float16])


@interpreted
@given(
    layout=layouts,
    words=st.integers(1, 10),
    sym=st.booleans(),
    bias=st.booleans(),
    num_rows=st.sampled_from([1, 2, 5]),
    dtype=dtypes,
)
def test_products(
    layout: tuple[int, int, int],
    words: int,
    sym: bool,
    bias: bool,
    num_rows: int,
    dtype: torch.dtype,
    stage: ModuleType,
    kernels: ModuleType,
) -> None:
    bits, group_size, in_features = layout
    scheme = Scheme(bits, group_size, sym=sym, checkpoint_format="gptq_v2")
    stack = [make_matrix(scheme, words * 32 // bits, in_features, seed=words)]
    layer = packed(stage, stack, dtype, bias=bias)
    x = randn(num_rows, in_features, dtype=dtype)
    ours = kernels.matmul(x, layer.quantized, layer.bias)
    check(ours, x, full_weight(stack), layer.bias)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_row_and_two_of_every_layout(stage: ModuleType, kernels: ModuleType, layout: tuple[int, int, int]) -> None:
    bits, group_size, in_features = layout
    stack = [make_matrix(Scheme(bits, group_size, sym=False), 24, in_features)]
    layer = packed(stage, stack, torch.float32, bias=True)
    for num_rows in (1, 2):
        x = randn(num_rows, in_features, dtype=torch.float32)
        check(kernels.matmul(x, layer.quantized, layer.bias), x, full_weight(stack), layer.bias)


@interpreted
@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 33, 64, 65])
def test_numbers_of_rows(stage: ModuleType, kernels: ModuleType, num_rows: int) -> None:
    """Tiles that are full and that are not, and more of them than one."""
    stack = [make_matrix(Scheme(group_size=64, sym=False), 40, 192)]
    layer = packed(stage, stack, torch.float32, bias=True)
    x = randn(num_rows, 192, dtype=torch.float32, seed=num_rows)
    check(kernels.matmul(x, layer.quantized, layer.bias), x, full_weight(stack), layer.bias)


@interpreted
def test_many_outputs(stage: ModuleType, kernels: ModuleType) -> None:
    """More than a program computes, the last of which has few left."""
    stack = [make_matrix(Scheme(), 296, 128)]
    layer = packed(stage, stack, torch.float32, bias=True)
    for num_rows in (1, 2):
        x = randn(num_rows, 128, dtype=torch.float32)
        check(kernels.matmul(x, layer.quantized, layer.bias), x, full_weight(stack), layer.bias)


@interpreted
def test_many_inputs(stage: ModuleType, kernels: ModuleType) -> None:
    """More than a program reads at a time, with a rest."""
    stack = [make_matrix(Scheme(group_size=64), 8, 4288)]
    layer = packed(stage, stack, torch.float32)
    for num_rows in (1, 2):
        x = randn(num_rows, 4288, dtype=torch.float32)
        check(kernels.matmul(x, layer.quantized, None), x, full_weight(stack), None)


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_number_of_splits(stage: ModuleType, kernels: ModuleType, dtype: torch.dtype, bias: bool) -> None:
    """The bias counts once, whatever the number of parts; in half precision parts are added in float32."""
    stack = [make_matrix(Scheme(group_size=128, sym=False), 16, 1152)]
    layer = packed(stage, stack, dtype, bias=bias)
    x = randn(3, 1152, dtype=dtype)
    for num_splits in (1, 2, 3, 2):  # the last finds the counters as those before have left them
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "choose_num_splits", lambda *_, num=num_splits: num)
            check(kernels.matmul(x, layer.quantized, layer.bias), x, full_weight(stack), layer.bias)
        assert not layer.quantized.arrived.any()


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_row_on_tensor_cores(
    stage: ModuleType, kernels: ModuleType, layout: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one token meets a large matrix."""
    bits, group_size, in_features = layout
    stack = [make_matrix(Scheme(bits, group_size, sym=False), 24, in_features)]
    layer = packed(stage, stack, torch.float16, bias=True)
    monkeypatch.setattr(kernels, "MAX_MATVEC", 0)
    x = randn(1, in_features, dtype=torch.float16)
    check(kernels.matmul(x, layer.quantized, layer.bias), x, full_weight(stack), layer.bias)


@given(num_programs=st.integers(1, 3000), num_steps=st.integers(1, 500), num_resident=st.integers(2, 4))
def test_the_choice_of_splits(num_programs: int, num_steps: int, num_resident: int, kernels: ModuleType) -> None:
    """None of them is empty; never more where there are more programs, or less to do."""
    chosen = kernels.choose_num_splits(num_programs, num_steps, num_resident, CPU)
    assert 1 <= chosen <= num_steps
    assert (chosen - 1) * -(-num_steps // chosen) < num_steps
    assert kernels.choose_num_splits(num_programs + 1, num_steps, num_resident, CPU) <= chosen
    assert kernels.choose_num_splits(num_programs, num_steps, num_resident - 1, CPU) <= chosen
    assert kernels.choose_num_splits(kernels.MAX_COUNTED + 1, num_steps, num_resident, CPU) == 1
    assert num_steps < 2 or kernels.choose_num_splits(1, num_steps, num_resident, CPU) > 1


@interpreted
@given(layout=layouts, seed=st.integers(0, 99), sym=st.booleans(), dtype=dtypes)
def test_dequantised_to_the_bit(
    layout: tuple[int, int, int],
    seed: int,
    sym: bool,
    dtype: torch.dtype,
    stage: ModuleType,
    kernels: ModuleType,
) -> None:
    bits, group_size, in_features = layout
    stack = [make_matrix(Scheme(bits, group_size, sym=sym), 32 // bits, in_features, seed=seed)]
    ours = kernels.dequantize(packed(stage, stack, dtype).quantized, dtype)
    assert ours.dtype == dtype and torch.equal(ours, full_weight(stack).to(dtype))


@interpreted
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (4, 128)])
def test_layers_with_an_order(stage: ModuleType, bits: int, group_size: int) -> None:
    """Stacked, with act-order: inputs are sorted before the product and weights are put back after unpacking."""
    scheme = Scheme(bits, group_size, desc_act=True, sym=False)
    first = make_matrix(scheme, 16, 256, seed=1)
    stack = [first, make_matrix(scheme, 8, 256, seed=2, like=first)]
    layer = packed(stage, stack, torch.float16, bias=True)
    assert layer.quantized.order is not None
    assert torch.equal(layer.quantized.dequantize(torch.float32), full_weight(stack))
    for num_rows in (1, 3):
        x = randn(num_rows, 256, dtype=torch.float16)
        check(layer(x), x, full_weight(stack), layer.bias)


@interpreted
@pytest.mark.usefixtures("enabled")
def test_few_rows_and_many(stage: ModuleType, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to MAX_ROWS in one pass; beyond it the weight is unpacked first, and so it is in float32, for any number.

    Groups that no kernel takes are right too.
    """
    calls: list[str] = []
    for name in ("matmul", "dequantize"):
        function = getattr(kernels, name)

        def noting(*arguments: Any, name: str = name, function: Any = function) -> torch.Tensor:
            calls.append(name)
            result: torch.Tensor = function(*arguments)
            return result

        monkeypatch.setattr(kernels, name, noting)
    monkeypatch.setattr(kernels, "MAX_ROWS", 3)
    for group_size, dtype, expected in (
        (64, torch.float16, ["matmul", "matmul", "dequantize"]),
        (64, torch.float32, ["dequantize"] * 3),
        (96, torch.float16, []),
        (16, torch.float16, []),
    ):
        stack = [make_matrix(Scheme(group_size=group_size), 8, 192)]
        layer = packed(stage, stack, dtype, bias=True)
        calls.clear()
        for num_rows in (1, 3, 4):
            x = randn(num_rows, 192, dtype=dtype)
            check(layer(x), x, full_weight(stack), layer.bias)
        assert calls == expected


@interpreted
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("num_rows", [1, 3])
def test_inputs_that_are_not_contiguous(stage: ModuleType, num_rows: int) -> None:
    """What nn.Linear takes, a layer takes: slices of wider tensors, and transposed ones."""
    stack = [make_matrix(Scheme(), 16, 128)]
    layer = packed(stage, stack, torch.float16)
    wide = randn(num_rows, 300, dtype=torch.float16)
    tall = randn(128, 2 * num_rows, dtype=torch.float16)
    for x in (wide[:, 100:228], tall.T[::2], wide[:1, :128].expand(num_rows, -1)):
        check(layer(x), x, full_weight(stack), None)


@interpreted
@pytest.mark.parametrize("num_rows", [1, 3])
def test_extreme_codes(stage: ModuleType, kernels: ModuleType, num_rows: int) -> None:
    """All codes and zero points at either end, so that every word's sign and every field's edge is met."""
    for bits in (4, 8):
        most = 2**bits - 1
        matrix = make_matrix(Scheme(bits, 128, sym=False, checkpoint_format="gptq_v2"), 8, 128)
        matrix.codes[:] = np.array([0, most, 0, most, 1, most - 1, 2 ** (bits - 1), 0])
        matrix.codes[::5] = most - matrix.codes[::5]
        matrix.zeros[:] = np.array([0, 0, most, most, most, 0, 0, most])
        layer = packed(stage, [matrix], torch.float32)
        x = randn(num_rows, 128, dtype=torch.float32) + 1
        check(kernels.matmul(x, layer.quantized, None), x, matrix.weight(), None)
        if num_rows == 1:
            assert torch.equal(kernels.dequantize(layer.quantized, torch.float32), matrix.weight())


@interpreted
def test_each_output_is_of_its_own_row(stage: ModuleType, kernels: ModuleType) -> None:
    """One input at a time finds every weight in its place."""
    stack = [make_matrix(Scheme(group_size=32, sym=False), 16, 160)]
    layer = packed(stage, stack, torch.float32)
    weight = full_weight(stack)
    x = torch.eye(160)
    for columns in (slice(0, 64), slice(64, 128), slice(96, 160)):
        ours = kernels.matmul(x[columns], layer.quantized, None)
        torch.testing.assert_close(ours, weight.T[columns], rtol=1e-4, atol=1e-5)
    for column in (0, 77, 159):
        ours = kernels.matmul(x[column, None], layer.quantized, None)
        torch.testing.assert_close(ours, weight.T[column, None], rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_same_bits_again(stage: ModuleType, kernels: ModuleType, num_rows: int) -> None:
    stack = [make_matrix(Scheme(group_size=64), 24, 640)]
    layer = packed(stage, stack, torch.float32, bias=True)
    x = randn(num_rows, 640, dtype=torch.float32)
    before = x.clone()
    first = kernels.matmul(x, layer.quantized, layer.bias)
    assert torch.equal(kernels.matmul(x, layer.quantized, layer.bias), first)
    assert torch.equal(x, before)


# ---------------------------------------------------------------------- on a GPU

# Outputs and inputs of real models, and odd ones.
SIZES = [(6144, 1024), (1024, 3072), (4096, 4096), (1024, 11008), (1000, 1152), (8, 128), (2056, 160), (24, 8192)]


def schemes_for(out_features: int, in_features: int) -> list[Scheme]:
    """All that divide the inputs; few for large matrices, which take a second to make."""
    kinds = [(4, 128), (4, 32), (8, 128), (8, 32), (4, 64), (4, -1), (8, -1), (4, 256)]
    if out_features * in_features > 2**21:
        kinds = kinds[:3]
    return [Scheme(bits, size, sym=False) for bits, size in kinds if size == -1 or in_features % size == 0]


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_on_cuda(
    stage: ModuleType, kernels: ModuleType, dtype: torch.dtype, size: tuple[int, int], record_property: Any
) -> None:
    """Batches of 1 to 64, and beyond what the kernel is meant for; with a bias and without."""
    out_features, in_features = size
    errors = []
    schemes = schemes_for(out_features, in_features)
    if (out_features, in_features) not in ((1024, 3072), (2056, 160)) or dtype == torch.float16:
        schemes = schemes[:2]  # each is compiled for, which takes seconds
    for scheme in schemes:
        stack = [make_matrix(scheme, out_features, in_features)]
        layer = packed(stage, stack, dtype, CUDA, bias=True)
        weight = full_weight(stack).to(CUDA)
        for num_rows in (1, 3, 16, 33, 64) if scheme.group_size != 128 else (1, 2, 3, 8, 16, 17, 32, 33, 64):
            x = randn(num_rows, in_features, dtype=dtype, device=CUDA, seed=num_rows)
            for bias in (layer.bias, None):
                if dtype != torch.float32 and kernels.is_available(x, layer.quantized.group_size):
                    errors.append(check(kernels.matmul(x, layer.quantized, bias), x, weight, bias))
        for num_rows in (1, 64, 65, 300):  # by whatever way the layer chooses
            x = randn(num_rows, in_features, dtype=dtype, device=CUDA, seed=num_rows)
            check(layer(x), x, weight, layer.bias)
    assert len(errors) >= 10 or dtype == torch.float32  # which is unpacked beforehand
    name = str(dtype).removeprefix("torch.")
    if errors:
        record_property(f"quantized_matmul_relative_error_{name}_{out_features}x{in_features}", max(errors))


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
def test_dequantised_to_the_bit_on_cuda(stage: ModuleType, kernels: ModuleType, dtype: torch.dtype) -> None:
    for out_features, in_features in SIZES:
        for scheme in schemes_for(out_features, in_features):
            stack = [make_matrix(scheme, out_features, in_features)]
            layer = packed(stage, stack, dtype, CUDA)
            expected = full_weight(stack).to(CUDA).to(dtype)
            if kernels.is_available(layer.quantized.scales, layer.quantized.group_size):
                assert torch.equal(kernels.dequantize(layer.quantized, dtype), expected), (scheme, in_features)
            assert torch.equal(layer.quantized.dequantize(dtype), expected), (scheme, in_features)


@pytest.mark.gpu
@halves
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_any_number_of_splits_on_cuda(
    stage: ModuleType, kernels: ModuleType, dtype: torch.dtype, num_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few the outputs are, and however many."""
    monkeypatch.setattr(kernels, "choose_num_splits", lambda *_: num_splits)
    for out_features in (64, 4096):
        stack = [make_matrix(Scheme(sym=False), out_features, 4096)]
        layer = packed(stage, stack, dtype, CUDA, bias=True)
        weight = full_weight(stack).to(CUDA)
        for num_rows in (2, 16, 64):
            x = randn(num_rows, 4096, dtype=dtype, device=CUDA)
            check(kernels.matmul(x, layer.quantized, layer.bias), x, weight, layer.bias)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_stacks_with_an_order_on_cuda(stage: ModuleType, bits: int, desc_act: bool) -> None:
    scheme = Scheme(bits, 128, desc_act=desc_act, sym=False)
    first = make_matrix(scheme, 2048, 1024, seed=1)
    stack = [first, *(make_matrix(scheme, 1024, 1024, seed=seed, like=first) for seed in (2, 3))]
    weight = full_weight(stack).to(CUDA)
    layer = packed(stage, stack, torch.bfloat16, CUDA, bias=True)
    assert (layer.quantized.order is not None) == desc_act
    assert torch.equal(layer.quantized.dequantize(torch.bfloat16), weight.bfloat16())
    wide = randn(200, 3000, dtype=torch.bfloat16, device=CUDA)
    for num_rows in (1, 2, 40, 200):
        x = wide[:num_rows, :1024].contiguous()
        check(layer(x), x, weight, layer.bias)
        check(layer(wide[:num_rows, 1000:2024]), wide[:num_rows, 1000:2024], weight, layer.bias)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("num_rows", [1, 2, 16, 64])
def test_the_same_bits_again_on_cuda(stage: ModuleType, num_rows: int) -> None:
    """Sums have a fixed order, and no row depends on what its neighbours hold."""
    stack = [make_matrix(Scheme(), 3072, 4096)]
    layer = packed(stage, stack, torch.bfloat16, CUDA, bias=True)
    x = randn(num_rows, 4096, dtype=torch.bfloat16, device=CUDA)
    first = layer(x)
    for _ in range(20):
        assert torch.equal(layer(x), first)
    other = x.clone()
    other[1:] = 3.0
    assert torch.equal(layer(other)[0], first[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("desc_act", [False, True])
def test_recorded_products(stage: ModuleType, kernels: ModuleType, dtype: torch.dtype, desc_act: bool) -> None:
    """A CUDA graph of each number of rows says what the launches say, of inputs that came after it was recorded."""
    scheme = Scheme(group_size=64, desc_act=desc_act)
    stack = [make_matrix(scheme, 1024, 3072)]
    layer = packed(stage, stack, dtype, CUDA, bias=True)
    with torch.inference_mode():
        for num_rows in (1, 2, 16, 17, 64, 128):
            x = randn(num_rows, 3072, dtype=dtype, device=CUDA)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    layer(x)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(x)
            for seed in (1, 2):
                x.copy_(randn(num_rows, 3072, dtype=dtype, device=CUDA, seed=seed))
                graph.replay()
                torch.cuda.synchronize()
                played = out.clone()
                if num_rows <= kernels.MAX_ROWS:  # beyond, it is torch's product, which may take another way
                    assert torch.equal(played, layer(x)), num_rows
                check(played, x, full_weight(stack), layer.bias)


@pytest.mark.gpu
def test_more_tiles_than_are_counted_are_not_split(kernels: ModuleType) -> None:
    assert kernels.choose_num_splits(kernels.MAX_COUNTED + 1, 500, max(kernels.RESIDENT.values()), CUDA) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
def test_graphs_of_one_weight_in_turn(stage: ModuleType) -> None:
    """Programs that share a row count those that are done; what one graph counts with, another finds at zero."""
    stack = [make_matrix(Scheme(), 3072, 4096)]
    layer = packed(stage, stack, torch.bfloat16, CUDA, bias=True)
    recorded = []
    for num_rows in (1, 2, 40, 128):
        x = randn(num_rows, 4096, dtype=torch.bfloat16, device=CUDA)
        expected = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        recorded.append((graph, x, out, expected))
    wrong = torch.zeros((), device=CUDA)
    for _ in range(500):
        for graph, _, out, expected in recorded:
            graph.replay()
            wrong += (out != expected).any()
    assert not wrong and not layer.quantized.arrived.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
def test_large_inputs_do_not_overflow_on_cuda(stage: ModuleType) -> None:
    """Activations of real models reach thousands; sums are in float32."""
    stack = [make_matrix(Scheme(sym=False), 256, 4096, std=0.02)]
    for dtype in (torch.bfloat16, torch.float16):
        layer = packed(stage, stack, dtype, CUDA)
        for num_rows in (1, 4):
            x = randn(num_rows, 4096, dtype=torch.float32, device=CUDA)
            x[:, ::100] *= 300
            x = x.to(dtype)
            check(layer(x), x, full_weight(stack), None)
