"""Kernels that do the work of several layers at once, against these layers in torch.

On a CPU they run under Triton's interpreter, in the dtypes that numpy has; on a GPU in all, at the sizes of a model.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..conftest import submodule
from ..oracle import uniform
from ..sampling import Row, make_sequence
from .test_sampler import LARGEST_UNIFORM, assert_law, seed_for

pytestmark = [
    pytest.mark.since("m4"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None and sys.platform != "linux", reason="there is no Triton here"
    ),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")

# Largest error of a vector, as a share of its length: what torch rounds between two operations, a kernel does not.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

dtypes = st.sampled_from([torch.float32, torch.float16])


@pytest.fixture
def cuda_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


on_gpu = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def both_ways(stage: ModuleType, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call` returns where the layers think that they have kernels, and where they think that they have none."""
    fused = submodule(stage, "model_executor.layers.fused")
    results = []
    for has_kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(fused, "is_available", lambda x, has_kernels=has_kernels: has_kernels)
            results.append(call())
    return results[0], results[1]


def check(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Every vector, the last dimension, is right up to rounding."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    difference = (ours.double() - expected.double()).norm(dim=-1)
    error = (difference / expected.double().norm(dim=-1).clamp(min=1e-6)).max()
    assert error <= TOLERANCE[ours.dtype], f"{float(error):.2e}"  # a nan is not


def test_which_tensors_have_kernels(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = submodule(stage, "model_executor.layers.fused")
    assert fused.triton is not None
    assert not fused.is_available(torch.zeros(1))
    assert fused.is_available(torch.zeros(1, device="meta")) is False
    if torch.cuda.is_available():
        assert fused.is_available(torch.zeros(1, device=CUDA))
        monkeypatch.setattr(fused, "triton", None)
        assert not fused.is_available(torch.zeros(1, device=CUDA))


# ---------------------------------------------------------------------- norms


def check_add_rms_norm(
    stage: ModuleType, num_tokens: int, size: int, eps: float, dtype: torch.dtype, device: torch.device = CPU
) -> None:
    """Also the sum, which is left in the residual, and x, which is left alone."""
    norm = submodule(stage, "model_executor.layers.layernorm").RMSNorm(size, eps).to(device, dtype)
    norm.weight.data.copy_(randn(size, dtype=dtype, seed=2))
    x = randn(num_tokens, size, dtype=dtype, device=device)
    before = x.clone()

    def call() -> Any:
        residual = 0.1 * randn(num_tokens, size, dtype=dtype, device=device, seed=1)
        normed, after = norm(x, residual)
        assert after is residual and torch.equal(x, before)
        return normed, after

    (normed, residual), (expected, expected_residual) = both_ways(stage, call)
    check(normed, expected)
    assert torch.equal(residual, expected_residual)


@interpreted
@given(num_tokens=st.integers(1, 5), size=st.integers(1, 300), eps=st.sampled_from([1e-6, 0.5]), dtype=dtypes)
def test_add_rms_norm(num_tokens: int, size: int, eps: float, dtype: torch.dtype, stage: ModuleType) -> None:
    check_add_rms_norm(stage, num_tokens, size, eps, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
def test_add_rms_norm_on_cuda(stage: ModuleType, dtype: torch.dtype) -> None:
    for num_tokens, size in ((1, 1024), (256, 1024), (3, 896), (3000, 4096), (2, 64), (1, 8200)):
        check_add_rms_norm(stage, num_tokens, size, 1e-6, dtype, CUDA)


# ---------------------------------------------------------------------- activations


def check_silu_and_mul(
    stage: ModuleType, num_tokens: int, size: int, dtype: torch.dtype, device: torch.device = CPU
) -> None:
    x = 4 * randn(num_tokens, 2 * size, dtype=dtype, device=device)
    x[0, 0], x[-1, size - 1] = 60.0, -60.0  # nothing overflows
    before = x.clone()
    ours, expected = both_ways(stage, lambda: submodule(stage, "model_executor.layers.activation").silu_and_mul(x))
    check(ours, expected)
    assert torch.equal(x, before)


@interpreted
@given(num_tokens=st.integers(1, 4), size=st.integers(1, 100) | st.sampled_from([1023, 1024, 1025, 2500]), dtype=dtypes)
def test_silu_and_mul(num_tokens: int, size: int, dtype: torch.dtype, stage: ModuleType) -> None:
    check_silu_and_mul(stage, num_tokens, size, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
def test_silu_and_mul_on_cuda(stage: ModuleType, dtype: torch.dtype) -> None:
    for num_tokens, size in ((1, 3072), (256, 3072), (3000, 1500), (2, 96), (5, 14336)):
        check_silu_and_mul(stage, num_tokens, size, dtype, CUDA)


# ---------------------------------------------------------------------- around attention


def check_norm_rotate_write(
    stage: ModuleType,
    slots: list[int],
    heads: tuple[int, int],
    head_dim: int,
    has_norm: bool,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """q comes back, k and v are in their slots, and no other slot was touched; the last slot is the spare one.

    q, k and v are slices of one tensor, as a merged projection leaves them.
    """
    layers = "model_executor.layers"
    num_heads, num_kv_heads = heads
    num_tokens, num_slots = len(slots), max(slots) + 3
    slots = [num_slots if slot < 0 else slot for slot in slots]
    norms = []
    for seed in (5, 6):
        norm = submodule(stage, f"{layers}.layernorm").RMSNorm(head_dim, 0.01)
        norm.weight.data.copy_(randn(head_dim, dtype=torch.float32, seed=seed))
        norms.append(norm.to(device, dtype) if has_norm else None)
    layer = submodule(stage, f"{layers}.attention").Attention(num_heads, num_kv_heads, head_dim, *norms)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    rotary = submodule(stage, f"{layers}.rotary_embedding").RotaryEmbedding(head_dim, 64, rope).to(device, dtype)
    positions = torch.randint(64, (num_tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    qkv = 0.3 * randn(num_tokens, sum(sizes), dtype=dtype, device=device)  # so short that eps counts
    q, k, v = (part.view(num_tokens, -1, head_dim) for part in qkv.split(sizes, dim=1))
    mapping = torch.tensor(slots, device=device)
    metadata = submodule(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.tensor([0, num_tokens], device=device).int(),
        seq_lens=torch.tensor([num_tokens], device=device).int(),
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        slot_mapping=mapping,
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        block_size=64,
    )

    def call() -> Any:
        layer.k_cache, layer.v_cache = (
            torch.full((num_slots + 1, num_kv_heads, head_dim), 7.0, dtype=dtype, device=device) for _ in range(2)
        )
        rotated = layer._norm_rotate_write(rotary(positions), q, k, v, metadata)
        return rotated, layer.k_cache, layer.v_cache

    (ours, k_cache, v_cache), (expected, expected_k, expected_v) = both_ways(stage, call)
    check(ours, expected)
    written = mapping[mapping < num_slots]
    untouched = torch.ones(num_slots, dtype=torch.bool, device=device)
    untouched[written] = False
    check(k_cache[written], expected_k[written])
    assert torch.equal(v_cache[written], expected_v[written])
    assert (k_cache[:num_slots][untouched] == 7).all() and (v_cache[:num_slots][untouched] == 7).all()
    spare = mapping == num_slots
    if spare.any():  # each element is one of those that were sent there
        assert (v_cache[num_slots] == v[spare]).any(0).all()


slot_lists = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).flatmap(
    lambda slots: st.tuples(st.just(slots), st.integers(0, 2)).map(lambda pair: pair[0] + [-1] * pair[1])
)


@interpreted
@given(
    slots=slot_lists,
    num_kv_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    head_dim=st.sampled_from([2, 24, 64, 128]),
    has_norm=st.booleans(),
    dtype=dtypes,
)
def test_norm_rotate_write(
    slots: list[int],
    num_kv_heads: int,
    groups: int,
    head_dim: int,
    has_norm: bool,
    dtype: torch.dtype,
    stage: ModuleType,
) -> None:
    check_norm_rotate_write(stage, slots, (num_kv_heads * groups, num_kv_heads), head_dim, has_norm, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("has_norm", [True, False])
def test_norm_rotate_write_on_cuda(stage: ModuleType, dtype: torch.dtype, has_norm: bool) -> None:
    for num_tokens, heads, head_dim in ((1, (16, 8), 128), (256, (16, 8), 128), (700, (14, 2), 64), (3, (3, 1), 24)):
        slots = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:num_tokens].tolist()
        check_norm_rotate_write(stage, [*slots, -1, -1], heads, head_dim, has_norm, dtype, CUDA)


# ---------------------------------------------------------------------- one token


def check_matvec(
    stage: ModuleType, sizes: tuple[int, int], bias: bool, dtype: torch.dtype, device: torch.device = CPU
) -> None:
    """A linear layer of one token; of two there is nothing special about it."""
    in_features, out_features = sizes
    linear = submodule(stage, "model_executor.layers.linear").Linear(in_features, out_features, bias)
    linear = linear.to(device, dtype).requires_grad_(False)
    linear.weight.data.copy_(randn(out_features, in_features, dtype=dtype, device=device, seed=1) / in_features**0.5)
    if bias:
        linear.bias.data.copy_(randn(out_features, dtype=dtype, seed=2))
    x = randn(2, in_features, dtype=dtype, device=device)
    ours, expected = both_ways(stage, lambda: linear(x[1:]))
    check(ours, expected)
    ours, expected = both_ways(stage, lambda: linear(x))
    assert torch.equal(ours, expected)


@interpreted
@given(
    in_features=st.integers(1, 100) | st.sampled_from([1024, 1025, 2100]),
    out_features=st.integers(1, 20),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_matvec(in_features: int, out_features: int, bias: bool, dtype: torch.dtype, stage: ModuleType) -> None:
    check_matvec(stage, (in_features, out_features), bias, dtype)


@interpreted
def test_matvec_of_many_rows(stage: ModuleType) -> None:
    """A program takes several of them."""
    check_matvec(stage, (1025, 2051), True, torch.float32)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
def test_matvec_on_cuda(stage: ModuleType, dtype: torch.dtype) -> None:
    for sizes in ((1024, 4096), (3072, 1024), (1024, 6144), (1024, 151_936), (100, 7), (896, 2050), (1500, 2047)):
        for bias in (True, False):
            check_matvec(stage, sizes, bias, dtype, CUDA)


# ---------------------------------------------------------------------- draws


def draw(stage: ModuleType, logits: torch.Tensor, rows: list[tuple[float, int, int]], tile: int | None = None) -> Any:
    """Tokens of logits [N, V] for rows of (temperature, seed, position), in tiles of 4,096 unless told."""
    module = submodule(stage, "sample.ops.draw")
    columns = zip(*rows, strict=True)
    temperature, seeds, positions = (torch.tensor(column, device=logits.device) for column in columns)
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        if tile is not None:
            patch.setattr(module, "_TILE", tile)
        drawn = module.draw_from_logits(logits, temperature.float(), seeds, positions)
    assert torch.equal(logits, before) or logits.isnan().any()
    assert drawn.dtype == torch.int64 and drawn.shape == (len(logits),)
    return drawn


def check_draws(logits: torch.Tensor, rows: list[tuple[float, int, int]], drawn: torch.Tensor) -> None:
    """Greedy ones are the first of the largest; others cover the uniform number in the cumulative distribution."""
    vocab_size = logits.shape[1]
    temperature = torch.tensor([row[0] for row in rows], device=logits.device).double()
    is_greedy = temperature == 0
    tokens = torch.arange(vocab_size, device=logits.device)
    is_best = logits == logits.amax(dim=1, keepdim=True)
    first = torch.where(is_best, tokens, vocab_size).amin(dim=1)
    assert torch.equal(drawn[is_greedy], first[is_greedy])
    probabilities = (logits.double() / temperature.masked_fill(is_greedy, 1.0)[:, None]).softmax(dim=1)
    uniforms = torch.tensor([uniform(seed, position) for _, seed, position in rows], device=logits.device).double()
    high = probabilities.cumsum(dim=1).gather(1, drawn[:, None])[:, 0]
    chosen = probabilities.gather(1, drawn[:, None])[:, 0]
    is_right = (chosen > 0) & (high - chosen - 1e-5 <= uniforms) & (uniforms <= high + 1e-5)
    assert is_right[~is_greedy].all(), drawn[~is_greedy & ~is_right]


row_of_draw = st.tuples(st.just(0.0) | st.floats(0.05, 3.0), strategies.seeds, st.integers(0, 2**40))


@interpreted
@given(
    vocab_size=st.integers(1, 70),
    tile=st.sampled_from([4, 8, 16, 64]),
    rows=st.lists(row_of_draw, min_size=1, max_size=6),
    forbidden=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), max_size=3),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 100),
    dtype=dtypes,
)
def test_draws(
    vocab_size: int,
    tile: int,
    rows: list[tuple[float, int, int]],
    forbidden: list[tuple[int, int]],
    spread: float,
    seed: int,
    dtype: torch.dtype,
    stage: ModuleType,
) -> None:
    """Vocabularies of any number of tiles, the last of them full or not; some tiles may hold nothing that may come."""
    logits = spread * randn(len(rows), vocab_size, dtype=dtype, seed=seed)
    for start, length in forbidden:
        logits[:, start : start + length] = -math.inf
    logits[:, seed % vocab_size] = 1.0
    drawn = draw(stage, logits, rows, tile)
    check_draws(logits, rows, drawn)


def exact_rows(num: int) -> list[tuple[float, int, int]]:
    """Rows whose uniform numbers are 0, 1/num, 2/num …, and the largest that there is."""
    values = [*(at / num for at in range(num)), LARGEST_UNIFORM]
    return [(1.0, seed_for(value, at), at) for at, value in enumerate(values)]


@interpreted
@pytest.mark.parametrize(("vocab_size", "tile"), [(8, 4), (16, 4), (16, 16), (4, 16)])
def test_draws_at_the_edges(stage: ModuleType, vocab_size: int, tile: int) -> None:
    """Where all sums are exact so is the draw: the first token at which the cumulative weight exceeds the threshold."""
    rows = exact_rows(vocab_size)
    logits = torch.zeros(len(rows), vocab_size)
    assert draw(stage, logits, rows, tile).tolist() == [*range(vocab_size), vocab_size - 1]
    # Two tokens in three are forbidden; those that remain share the numbers evenly.
    wide = torch.full((len(rows), 3 * vocab_size), -math.inf)
    wide[:, 1::3] = 0.0
    assert draw(stage, wide, rows, tile).tolist() == [3 * at + 1 for at in [*range(vocab_size), vocab_size - 1]]


@interpreted
def test_draws_are_what_the_sampler_draws(stage: ModuleType) -> None:
    """Where no threshold is near an edge, token for token."""
    rows = [(0.4 + 0.1 * (number % 9) if number % 5 else 0.0, 31 * number, number) for number in range(60)]
    logits = 2 * randn(len(rows), 50, dtype=torch.float32)
    assert torch.equal(draw(stage, logits, rows, 16), sample(stage, logits, rows))


def sample(stage: ModuleType, logits: torch.Tensor, rows: list[tuple[float, int, int]]) -> torch.Tensor:
    """The same in torch."""
    sampler = submodule(stage, "sample.sampler")
    columns = [torch.tensor(column, device=logits.device) for column in zip(*rows, strict=True)]
    metadata = sampler.SamplingMetadata(columns[0].float(), *columns[1:], False, None, None, None, *([[]] * 5))
    tokens: torch.Tensor = sampler.Sampler().sample(logits.float(), metadata)
    return tokens


@interpreted
def test_ties_and_tiles_of_nothing(stage: ModuleType) -> None:
    """The lowest id of equals, within a tile and between tiles."""
    logits = torch.full((4, 40), -math.inf)
    logits[0, [13, 14, 30]] = 5.0
    logits[1, [7, 8]] = -3.0
    logits[2, 39] = 0.0
    logits[3] = 1.0
    assert draw(stage, logits, [(0.0, 0, 0)] * 4, 8).tolist() == [13, 7, 39, 0]
    for seed in range(10):
        drawn = draw(stage, logits, [(1.0, seed, 3)] * 4, 8).tolist()
        assert drawn[0] in (13, 14, 30) and drawn[1] in (7, 8) and drawn[2] == 39


@interpreted
@pytest.mark.parametrize("tile", [4, 16])
def test_law_of_draws(stage: ModuleType, tile: int) -> None:
    """Uniform numbers that are spread evenly give every token its share of the draws, to within one."""
    num, temperature = 64, 0.7
    logits = randn(11, dtype=torch.float32, seed=3)
    logits[[2, 7]] = -math.inf
    rows = [(temperature, seed_for(at / num, at), at) for at in range(num)]
    drawn = draw(stage, logits.expand(num, -1).contiguous(), rows, tile)
    shares = num * (logits.double() / temperature).softmax(-1)
    assert ((torch.bincount(drawn, minlength=11) - shares).abs() <= 1).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [100, 4101, 151_936])
def test_a_row_without_an_answer_has_a_token(stage: ModuleType, temperature: float, vocab_size: int) -> None:
    """A model that overflows must not make the next step read outside its embedding, nor spoil its neighbours."""
    logits = torch.zeros(4, vocab_size, device=CUDA)
    logits[1] = math.nan
    logits[2] = -math.inf
    logits[3, -1] = math.nan
    rows = [(temperature, 1, 1)] * 4
    drawn = draw(stage, logits, rows)
    assert ((drawn >= 0) & (drawn < vocab_size)).all(), drawn
    check_draws(logits[:1], rows[:1], drawn[:1])


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("cuda_memory")
def test_draws_on_cuda(stage: ModuleType, dtype: torch.dtype) -> None:
    """Vocabularies of models; one row or many; through the sampler, which says the same."""
    for num_rows, vocab_size in ((1, 151_936), (256, 151_936), (3, 32_000), (7, 4096), (7, 4097), (2, 100)):
        rows = [(0.25 * (number % 5), 17 * number - 3, number) for number in range(num_rows)]
        logits = 3 * randn(num_rows, vocab_size, dtype=dtype, device=CUDA)
        logits[:, 50:60] = -math.inf
        logits[-1, : vocab_size - 20] = -math.inf
        logits[0, 99] = logits[0, 61] = logits[0, -1] = 50.0  # within a tile, and in another
        drawn = draw(stage, logits, rows)
        check_draws(logits, rows, drawn)
        same = (drawn == sample(stage, logits, rows)).float().mean()
        assert same > 0.99, "but for a threshold at an edge"


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
def test_law_of_draws_on_cuda(stage: ModuleType) -> None:
    num = 100_000
    logits = 2 * randn(9001, dtype=torch.float32, seed=3)[None]
    logits[:, ::7] = -math.inf
    rows = [(0.9, seed, 5) for seed in range(num)]
    drawn = [draw(stage, logits.expand(10_000, -1).to(CUDA), rows[at : at + 10_000]) for at in range(0, num, 10_000)]
    assert_law(torch.cat(drawn).cpu(), (logits[0].double() / 0.9).softmax(-1))


# ---------------------------------------------------------------------- when the sampler may use them


def metadata_of(stage: ModuleType, rows: list[dict[str, Any]]) -> Any:
    seqs = [make_sequence(stage, Row(arguments)) for arguments in rows]
    return submodule(stage, "sample.sampler").SamplingMetadata.from_sequences(seqs, 512, CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3, "seed": 4, "max_tokens": 3},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 512},
        {"top_k": 10_000},
        {"top_p": 1.0, "min_p": 0.0, "min_tokens": 0, "logprobs": None},
        {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"logit_bias": {}, "logits_processors": []},
        {"stop": ["x"], "stop_token_ids": [3], "ignore_eos": True},
    ],
    ids=str,
)
def test_plain(stage: ModuleType, arguments: dict[str, Any]) -> None:
    assert metadata_of(stage, [arguments]).is_plain
    assert metadata_of(stage, [{"temperature": 0.0}, arguments, {}]).is_plain


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_k": 1},
        {"top_k": 511},
        {"top_p": 0.99},
        {"min_p": 0.01},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logits_processors": [lambda token_ids, logits: logits]},
        {"logprobs": 0},
        {"logprobs": -1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_not_plain(stage: ModuleType, arguments: dict[str, Any]) -> None:
    """One row is enough, whichever."""
    assert not metadata_of(stage, [arguments]).is_plain
    assert not metadata_of(stage, [{}, {"temperature": 0.0}, arguments]).is_plain
    assert not metadata_of(stage, [arguments, {}]).is_plain
