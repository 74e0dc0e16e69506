"""The decode kernel against the formula: on a CPU under Triton's interpreter, on a GPU at the sizes of real batches.

Only the slots that belong to a sequence hold numbers. All others hold nan, which would spoil every sum that it entered.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ..conftest import CheckpointPath, open_llm, submodule
from ..inside import attention

pytestmark = pytest.mark.since("m3")

# Largest error of an output vector, as a share of its length. Weights are rounded to the values' dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def paged(stage: ModuleType) -> ModuleType:
    """The backend; without Triton a CPU needs no kernel, and there is nothing to test."""
    if importlib.util.find_spec("triton") is None and sys.platform != "linux":
        pytest.skip("there is no Triton for this system")
    return submodule(stage, "attention.backends.paged")


def test_linux_has_triton(stage: ModuleType) -> None:
    """Else all that follows would be skipped, or fail without saying why."""
    if sys.platform == "linux":
        assert importlib.util.find_spec("triton"), "pip install triton"
        assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


class Case:
    """A decode step over a cache whose blocks lie anywhere; unused columns of the block table name others' blocks.

    Attributes:
        arguments: of every function that computes attention of one query a sequence.
    """

    def __init__(
        self,
        stage: ModuleType,
        lens: list[int],
        block_size: int,
        num_kv_heads: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        generator = torch.Generator(device).manual_seed(sum(lens) + block_size)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        num_blocks = [math.ceil(length / block_size) for length in lens]
        total, columns = sum(num_blocks) + 2, max(num_blocks)
        order = torch.randperm(total, generator=generator, device=device).int()
        table = torch.randint(total, (len(lens), columns), generator=generator, device=device, dtype=torch.int32)
        cache_shape = (total * block_size + 1, num_kv_heads, head_dim)
        k_cache, v_cache = (torch.full(cache_shape, math.nan, dtype=dtype, device=device) for _ in range(2))
        # Long queries: a few keys take most of the weight, so that a key more or less is seen in the result.
        # Queries are a slice, as the rotation leaves them: keys stand between those of one sequence and the next.
        num_heads = num_kv_heads * groups
        self.q = (3 * randn(len(lens), num_heads + num_kv_heads, head_dim)).to(dtype)[:, :num_heads]
        self.scale = head_dim**-0.5
        self.lens, self.slots = lens, []
        start = 0
        for row, (length, num) in enumerate(zip(lens, num_blocks, strict=True)):
            table[row, :num] = order[start : start + num]
            start += num
            slots = (table[row, :num, None].long() * block_size + torch.arange(block_size, device=device)).flatten()
            self.slots.append(slots[:length])
            k_cache[slots[:length]] = randn(length, num_kv_heads, head_dim).to(dtype)
            v_cache[slots[:length]] = randn(length, num_kv_heads, head_dim).to(dtype)
        metadata = submodule(stage, "attention.metadata").AttentionMetadata(
            query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            max_query_len=1,
            max_seq_len=max(lens),
            slot_mapping=torch.stack([slots[-1] for slots in self.slots]),
            block_table=table,
            block_size=block_size,
        )
        self.k_cache, self.v_cache = k_cache, v_cache
        self.arguments: tuple[Any, ...] = (self.q, k_cache, v_cache, metadata, self.scale)

    def exact(self) -> torch.Tensor:
        """torch's attention in float32, one sequence at a time, [N, H, D]."""
        rows = []
        for query, slots in zip(self.q, self.slots, strict=True):
            groups = self.q.shape[1] // self.k_cache.shape[1]
            k, v = (cache[slots].float().repeat_interleave(groups, 1) for cache in (self.k_cache, self.v_cache))
            heads = (query[:, None].float(), k.transpose(0, 1), v.transpose(0, 1))
            rows.append(F.scaled_dot_product_attention(*heads, scale=self.scale)[:, 0])
        return torch.stack(rows)

    def check(self, ours: torch.Tensor, tolerance: float | None = None) -> float:
        """The largest relative error of an output vector."""
        assert ours.dtype == self.q.dtype and ours.shape == self.q.shape
        expected = self.exact()
        error = ((ours.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        assert error <= (tolerance or TOLERANCE[self.q.dtype]), f"{error:.2e}"  # a nan is not
        return float(error)


def splits(paged: ModuleType, patch: pytest.MonkeyPatch, num: int) -> None:
    """The kernel takes `num` programs for each sequence, however little each has to do."""
    patch.setattr(paged, "choose_num_splits", lambda *_: (num, num, 1024))


small = {
    "lens": st.lists(st.integers(1, 300), min_size=1, max_size=3),
    "block_size": st.sampled_from([16, 32, 48, 256]),
    "groups": st.integers(1, 8),
    "head_dim": st.sampled_from([24, 64, 128]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
}


# ---------------------------------------------------------------------- the reference


@given(**{**small, "block_size": st.sampled_from([1, 3, 16, 256])}, num_kv_heads=st.integers(1, 3))
def test_the_reference_is_the_formula(
    lens: list[int],
    block_size: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    num_kv_heads: int,
    stage: ModuleType,
    paged: ModuleType,
) -> None:
    """Block by block with a running maximum, or all at once; and so do the backend that gathers, and the default."""
    case = Case(stage, lens, block_size, num_kv_heads, groups, head_dim, dtype)
    case.check(paged.paged_decode_reference(*case.arguments))
    for backend in ("naive", "paged"):
        case.arguments[3].shared = None  # each of them keeps its own
        case.check(attention(stage, backend)(*case.arguments))


# ---------------------------------------------------------------------- the kernel, interpreted

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled where there is a GPU")


@interpreted
@given(**small, num_splits=st.integers(1, 5))
def test_the_kernel_is_the_formula(
    lens: list[int],
    block_size: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    num_splits: int,
    stage: ModuleType,
    paged: ModuleType,
) -> None:
    case = Case(stage, lens, block_size, 2, groups, head_dim, dtype)
    with pytest.MonkeyPatch.context() as patch:
        splits(paged, patch, num_splits)
        ours = paged.paged_decode(*case.arguments)
    case.check(ours)
    reference = paged.paged_decode_reference(*case.arguments)
    torch.testing.assert_close(ours, reference, atol=5 * TOLERANCE[dtype], rtol=5 * TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_the_kernel_around_blocks_and_tiles(stage: ModuleType, paged: ModuleType, length: int) -> None:
    """With splits, some without any key; beside a sequence of one token and a longer one."""
    case = Case(stage, [length, 1, 300], 16, 1, 2, 24, torch.float32)
    for num_splits in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            splits(paged, patch, num_splits)
            case.check(paged.paged_decode(*case.arguments))


@interpreted
@pytest.mark.parametrize("largest", [50.0, 3000.0])
def test_large_scores_do_not_overflow(stage: ModuleType, paged: ModuleType, largest: float) -> None:
    """The largest one comes first, in the middle, or last: every sum is relative to the maximum so far."""
    for at in (0, 100, 199):
        case = Case(stage, [200], 16, 1, 1, 64, torch.float32)
        case.q[:] = 1.0
        case.k_cache[case.slots[0][at]] = largest
        for num_splits in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                splits(paged, patch, num_splits)
                case.check(paged.paged_decode(*case.arguments))
        case.check(paged.paged_decode_reference(*case.arguments))


@interpreted
def test_the_choice_of_splits_leaves_nothing_out(stage: ModuleType, paged: ModuleType) -> None:
    """As many as the function itself chooses, for one sequence and for several."""
    for lens in ([600], [600, 3], [257, 256, 255, 1]):
        case = Case(stage, lens, 16, 1, 1, 24, torch.float32)
        case.check(paged.paged_decode(*case.arguments))


@interpreted
@pytest.mark.parametrize("lens", [[700, 3, 64, 129], [1, 128, 1024], [1000] * 6])
def test_only_the_long_are_split_where_programs_abound(stage: ModuleType, paged: ModuleType, lens: list[int]) -> None:
    """Some in several programs and some in one, in the same launch."""
    case = Case(stage, lens, 16, 2, 2, 24, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for num in ((1, 2, 128), (1, 7, 128), (2, 5, 128), (1, 3, 65)):
            patch.setattr(paged, "choose_num_splits", lambda *_, num=num: num)
            case.check(paged.paged_decode(*case.arguments))


@given(num_programs=st.integers(1, 4096), max_seq_len=st.integers(1, 200_000))
def test_how_many_splits(num_programs: int, max_seq_len: int, paged: ModuleType) -> None:
    """Enough to fill the device, unless the parts became short or many; more only for what is long."""
    enough, most, long = chosen = paged.choose_num_splits(num_programs, max_seq_len, CPU)
    assert 1 <= enough <= most <= 64
    assert most == 1 or max_seq_len / most > paged._MIN_SPLIT / 2
    more = paged.choose_num_splits(num_programs + 1, max_seq_len, CPU)
    longer = paged.choose_num_splits(num_programs, max_seq_len + 1, CPU)
    assert more[0] <= enough and (more[2] < long or more[1] <= most), "more programs have no more room"
    assert all(a <= b for a, b in zip(chosen, longer, strict=True))
    assert (enough > 1) == (max_seq_len > paged._MIN_SPLIT and num_programs <= 8)  # a CPU passes for four units
    if enough == 1:
        assert (most > 1) == (max_seq_len >= 2 * long and num_programs <= 96)


@interpreted
@pytest.mark.since("m5")
@given(
    decodes=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    chunks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=3),
)
@pytest.mark.parametrize("decode", ["paged_decode", "decode_one_by_one"])
def test_decodes_apart(
    decodes: list[int], chunks: list[tuple[int, int]], decode: str, stage: ModuleType, paged: ModuleType
) -> None:
    """Single queries by one function, chunks (of so many queries after so many keys) by another: as by one for all."""
    lens = decodes + [num_queries + context for num_queries, context in chunks]
    case = Case(stage, lens, 16, 2, 2, 24, torch.float32)
    query_lens = torch.tensor([1] * len(decodes) + [num_queries for num_queries, _ in chunks])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(int(query_lens.sum()), *case.q.shape[1:], generator=generator)
    metadata = dataclasses.replace(
        case.arguments[3],
        query_start_loc=F.pad(query_lens.cumsum(0), (1, 0)).int(),
        max_query_len=int(query_lens.max()),
        num_decodes=len(decodes),
    )
    naive = attention(stage, "naive")
    expected = naive(q, case.k_cache, case.v_cache, dataclasses.replace(metadata), case.scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "decode_one_by_one", getattr(paged, decode))  # what a CPU takes
        for _ in range(2):  # layers of the same step
            ours = paged.decode_apart(q, case.k_cache, case.v_cache, metadata, case.scale, naive)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- which one is called


@pytest.mark.until("m3")
@pytest.mark.parametrize("backend", [None, "paged", "naive"])
def test_the_backend_is_chosen_by_name(stage: ModuleType, checkpoint_path: CheckpointPath, backend: str | None) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=32, num_kv_blocks=4, attention_backend=backend) as llm:
        names = {layer.backend.__name__ for layer in llm.engine.worker.layers}
        assert names == {"naive_attention" if backend == "naive" else "paged_attention"}
    with pytest.raises(ValueError, match="attention_backend must be 'naive' or 'paged', got 'flash'"):
        stage.EngineConfig(attention_backend="flash")


# ---------------------------------------------------------------------- on a GPU

SIZES = [  # sequences, longest, KV heads
    (1, 1, 8),
    (1, 8192, 8),
    (3, 77, 1),
    (8, 8192, 2),
    (64, 1000, 2),
    (256, 1024, 2),
]


@pytest.fixture
def cuda_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("groups", "head_dim"), [(1, 64), (2, 128), (4, 64), (8, 128)])
def test_the_compiled_kernel(
    stage: ModuleType, paged: ModuleType, dtype: torch.dtype, groups: int, head_dim: int, record_property: Any
) -> None:
    """Batches of 1 to 256, contexts of 1 to 8,192, blocks of 16 to 256, in what splits it chooses."""
    errors = []
    for number, (num_seqs, longest, num_kv_heads) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(number)
        lens = torch.randint(1, longest + 1, (num_seqs,), generator=generator).tolist()
        lens[-1] = longest
        for block_size in (16, 64, 256):
            case = Case(stage, lens, block_size, num_kv_heads, groups, head_dim, dtype, torch.device("cuda"))
            errors.append(case.check(paged.paged_decode(*case.arguments)))
            assert torch.equal(attention(stage, "paged")(*case.arguments), paged.paged_decode(*case.arguments))
    name = str(dtype).removeprefix("torch.")
    record_property(f"paged_decode_relative_error_{name}_{groups}x{head_dim}", max(errors))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 32])
def test_the_compiled_kernel_in_any_number_of_splits(stage: ModuleType, paged: ModuleType, num_splits: int) -> None:
    """Also where some of them have no key at all."""
    for lens in ([1], [300, 1, 64, 65], [4096, 63]):
        case = Case(stage, lens, 16, 2, 4, 128, torch.float16, torch.device("cuda"))
        with pytest.MonkeyPatch.context() as patch:
            splits(paged, patch, num_splits)
            case.check(paged.paged_decode(*case.arguments))
