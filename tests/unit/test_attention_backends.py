"""Every way of computing attention against the formula, and how one of them is chosen.

Only the slots that belong to a sequence hold numbers. All others hold nan, which would spoil every sum that it entered.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..conftest import CheckpointPath, MakeLLM, open_llm, submodule
from ..inside import attention

pytestmark = pytest.mark.since("m4")

BACKENDS = ["naive", "paged", "flash"]
# Largest error of an output vector, as a share of its length.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Part:
    """One sequence's part of a step: `num_new` queries after `num_cached` tokens."""

    num_cached: int
    num_new: int

    @property
    def length(self) -> int:
        return self.num_cached + self.num_new


class Batch:
    """A step over a cache whose blocks lie anywhere; unused columns of the block table name others' blocks.

    Attributes:
        slots: of each sequence, in the order of its tokens.
    """

    def __init__(
        self,
        stage: ModuleType,
        parts: list[Part],
        block_size: int = 16,
        num_kv_heads: int = 2,
        groups: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(part.length for part in parts) + block_size)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.stage, self.parts, self.block_size = stage, parts, block_size
        num_blocks = [-(-part.length // block_size) for part in parts]
        total = sum(num_blocks) + 2
        order = torch.randperm(total, generator=generator).int()
        table = torch.randint(total, (len(parts), max(num_blocks)), generator=generator, dtype=torch.int32)
        cache_shape = (total * block_size + 1, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = (torch.full(cache_shape, math.nan, dtype=dtype, device=device) for _ in range(2))
        # Long queries: a few keys take most of the weight, so that a key more or less is seen in the result.
        # Queries are a slice, as the rotation leaves them: keys stand between those of one token and the next.
        num_heads, num_tokens = num_kv_heads * groups, sum(part.num_new for part in parts)
        self.q = (3 * randn(num_tokens, num_heads + num_kv_heads, head_dim)).to(dtype)[:, :num_heads]
        self.scale = head_dim**-0.5
        self.slots = []
        start = 0
        for row, (part, num) in enumerate(zip(parts, num_blocks, strict=True)):
            table[row, :num] = order[start : start + num]
            start += num
            slots = (table[row, :num, None].long() * block_size + torch.arange(block_size)).flatten()[: part.length]
            self.slots.append(slots.to(device))
            self.k_cache[slots] = randn(part.length, num_kv_heads, head_dim).to(dtype)
            self.v_cache[slots] = randn(part.length, num_kv_heads, head_dim).to(dtype)
        self.table = table.to(device)

    def metadata(self) -> Any:
        """Of the step; a new one for each backend, as each leaves there what its layers share."""
        num_new = [0, *(part.num_new for part in self.parts)]
        device = self.q.device
        return submodule(self.stage, "attention.metadata").AttentionMetadata(
            query_start_loc=torch.tensor(num_new, device=device).cumsum(0).int(),
            seq_lens=torch.tensor([part.length for part in self.parts], device=device).int(),
            max_query_len=max(num_new),
            max_seq_len=max(part.length for part in self.parts),
            slot_mapping=torch.cat(
                [slots[part.num_cached :] for slots, part in zip(self.slots, self.parts, strict=True)]
            ),
            block_table=self.table,
            block_size=self.block_size,
        )

    def run(self, backend: str) -> torch.Tensor:
        return attention(self.stage, backend)(self.q, self.k_cache, self.v_cache, self.metadata(), self.scale)

    def sequences(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q [Q, H, D], and k and v [K, H, D] for every query head, of one sequence after the other."""
        queries = self.q.split([part.num_new for part in self.parts])
        groups = self.q.shape[1] // self.k_cache.shape[1]
        for q, slots in zip(queries, self.slots, strict=True):
            k, v = (cache[slots].repeat_interleave(groups, dim=1) for cache in (self.k_cache, self.v_cache))
            yield q, k, v

    def exact(self) -> torch.Tensor:
        """The formula in float64, [T, H, D]."""
        rows = []
        for q, k, v in self.sequences():
            scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * self.scale
            position = torch.arange(len(k), device=q.device)
            hidden = position > position[-len(q) :, None]
            weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, v.double()))
        return torch.cat(rows)

    def check(self, ours: torch.Tensor, expected: torch.Tensor | None = None, tolerance: float | None = None) -> float:
        """The largest relative error of an output vector."""
        assert ours.dtype == self.q.dtype and ours.shape == self.q.shape
        expected = self.exact() if expected is None else expected
        error = float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        assert error <= (tolerance or TOLERANCE[self.q.dtype]), f"{error:.2e}"  # a nan is not
        return error


part = st.builds(Part, st.sampled_from([0, 0, 1, 15, 16, 17]) | st.integers(0, 300), st.sampled_from([1, 1, 2, 7, 40]))
parts = st.lists(part, min_size=1, max_size=5) | st.lists(
    st.builds(Part, st.integers(0, 300), st.just(1)), min_size=2, max_size=5
)


# ---------------------------------------------------------------------- all of them are the formula


@given(
    parts=parts,
    block_size=st.sampled_from([16, 24, 256]),
    num_kv_heads=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([8, 24, 64]),
    dtype=st.sampled_from(list(TOLERANCE)),
    limits=st.none() | st.tuples(st.integers(1, 500), st.integers(1, 2000)),
)
def test_all_backends_agree(
    parts: list[Part],
    block_size: int,
    num_kv_heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    limits: tuple[int, int] | None,
    stage: ModuleType,
) -> None:
    """Prompts, parts of prompts and single tokens in one batch; groups and tiles that end anywhere."""
    batch = Batch(stage, parts, block_size, num_kv_heads, groups, head_dim, dtype)
    expected = batch.exact()
    with pytest.MonkeyPatch.context() as patch:
        if limits is not None:
            naive = submodule(stage, "attention.backends.torch_naive")
            patch.setitem(naive.MAX_KEYS, "cpu", limits[0])
            patch.setitem(naive.MAX_SCORES, "cpu", limits[1])
        for backend in BACKENDS:
            batch.check(batch.run(backend), expected)


@given(
    parts=parts,
    dtype=st.sampled_from(list(TOLERANCE)),
    query_tile=st.integers(1, 64),
    key_tile=st.integers(1, 64),
)
def test_tiles_are_the_formula(
    parts: list[Part], dtype: torch.dtype, query_tile: int, key_tile: int, stage: ModuleType
) -> None:
    """FlashAttention as it is written down to be read, in tiles of any size."""
    tiled = submodule(stage, "attention.backends.flash_attn").tiled_attention
    batch = Batch(stage, parts, head_dim=24, dtype=dtype)
    rows = [tiled(q, k, v, batch.scale, query_tile, key_tile)[0] for q, k, v in batch.sequences()]
    batch.check(torch.cat(rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "parts", [[Part(5, 3)], [Part(5, 3), Part(0, 4), Part(7, 1)], [Part(7, 1), Part(0, 1)], [Part(0, 8)]], ids=str
)
def test_who_sees_what(stage: ModuleType, backend: str, parts: list[Part]) -> None:
    """A query of zeros weighs all keys that it sees alike, and each value is a mark of its own position.

    torch's is_causal would let the first of several queries after cached tokens see the first key only.
    """
    batch = Batch(stage, parts, head_dim=8)
    batch.q.zero_()
    for slots in batch.slots:
        batch.v_cache[slots] = torch.eye(8)[: len(slots), None].expand(-1, 2, -1)
    rows = []
    for part in parts:
        for position in range(part.num_cached, part.length):
            rows.append([1 / (position + 1)] * (position + 1) + [0.0] * (7 - position))
    expected = torch.tensor(rows)[:, None].expand_as(batch.q)
    torch.testing.assert_close(batch.run(backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_share_what_the_first_one_found(stage: ModuleType, backend: str) -> None:
    """A second layer with other values under the same metadata."""
    batch = Batch(stage, [Part(3, 4), Part(20, 1)])
    run, metadata = attention(stage, backend), batch.metadata()
    batch.check(run(batch.q, batch.k_cache, batch.v_cache, metadata, batch.scale))
    shared = metadata.shared
    batch.v_cache.mul_(-2).add_(1)
    batch.check(run(batch.q, batch.k_cache, batch.v_cache, metadata, batch.scale))
    assert metadata.shared is shared is not None


# ---------------------------------------------------------------------- how much memory it takes


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result, in elements, of all that torch computes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [[Part(0, 1500)], [Part(400, 1100)], [Part(0, 700), Part(800, 700)]], ids=str)
def test_no_matrix_of_all_scores(stage: ModuleType, backend: str, parts: list[Part]) -> None:
    """No tensor of queries by keys, neither of scores nor as a mask: 2^16 of them a head are all there may be.

    Everything else is as large as queries, keys or values are.
    """
    num_heads, head_dim = 2, 8
    batch = Batch(stage, parts, num_kv_heads=1, groups=num_heads, head_dim=head_dim)
    assert submodule(stage, "attention.backends.torch_naive").MAX_SCORES["cpu"] == 2**16
    with LargestTensor() as mode:
        ours = batch.run(backend)
    per_head = 1 if backend == "flash" else num_heads  # flash has no scores, only a mask for all heads
    assert mode.largest <= 2**16 * per_head < min(part.num_new * part.length for part in parts) / 2
    batch.check(ours)


def test_prompts_take_no_mask(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is cached torch's own causal mask does, which skips half of the work."""
    real, masks = F.scaled_dot_product_attention, []

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, **options: Any) -> torch.Tensor:
        masks.append(mask)
        return real(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    Batch(stage, [Part(0, 9), Part(0, 30)]).run("flash")
    assert masks == [None]
    Batch(stage, [Part(0, 9), Part(1, 30)]).run("flash")
    assert masks[-1] is not None


# ---------------------------------------------------------------------- the bytes that tiles move


def traffic(stage: ModuleType, num_queries: int, num_keys: int, query_tile: int, key_tile: int, **like: Any) -> Any:
    q, k, v = (torch.randn(num, 2, 8, **like) for num in (num_queries, num_keys, num_keys))
    return submodule(stage, "attention.backends.flash_attn").tiled_attention(q, k, v, 1.0, query_tile, key_tile)[1]


@pytest.mark.parametrize(
    ("sizes", "rows_read"),
    [
        ((4, 4, 2, 2), 4 + 2 * (2 + 4)),  # the first tile of queries sees one of the two of keys
        ((4, 4, 2, 4), 4 + 2 * (4 + 4)),
        ((4, 4, 4, 2), 4 + 2 * 4),
        ((5, 5, 2, 3), 5 + 2 * (3 + 5 + 5)),  # positions 0-1, 2-3, 4: the keys up to 3, 5 and 5
        ((2, 10, 1, 4), 2 + 2 * (10 + 10)),  # queries at 8 and 9: three tiles each
        ((2, 9, 1, 4), 2 + 2 * (8 + 9)),  # queries at 7 and 8
        ((1, 7, 64, 64), 1 + 2 * 7),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(stage: ModuleType, sizes: tuple[int, int, int, int], rows_read: int) -> None:
    """Queries once, keys and values once for every tile of queries that sees some of their tile."""
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        count = traffic(stage, *sizes, dtype=dtype)
        row = 2 * 8 * itemsize
        assert (count.read, count.written) == (rows_read * row, sizes[0] * row)


def test_tiles_move_less_than_the_matrix(stage: ModuleType) -> None:
    """The formula writes the scores, reads them, writes the weights and reads them; larger tiles read keys less often.

    The result is written once, whatever the tiles.
    """
    num = 512
    naive = 4 * 2 * num**2 * 4 + 4 * num * 2 * 8 * 4
    counts = [traffic(stage, num, num, tile, 64) for tile in (16, 32, 64, 128, 512)]
    read = [count.read for count in counts]
    assert read == sorted(set(read), reverse=True)
    assert {count.written for count in counts} == {num * 2 * 8 * 4}
    assert all(count.read + count.written < naive / 2 for count in counts[1:])


# ---------------------------------------------------------------------- which one is chosen


@pytest.fixture
def machine(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that has everything, as far as the choice can tell; tests take something away.

    Attributes:
        capability: what torch will say.
        lose_flash_attn, lose_triton: as if it could not be imported.
    """
    modules = [submodule(stage, f"attention.backends.{name}") for name in ("flash_attn", "paged")]
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = None  # type: ignore[attr-defined]

    def lose_triton() -> None:
        for module in modules:
            monkeypatch.setattr(module, "triton", None)

    machine = SimpleNamespace(
        capability=(9, 0),
        lose_flash_attn=lambda: monkeypatch.setitem(sys.modules, "flash_attn", None),
        break_flash_attn=lambda: delattr(package, "flash_attn_varlen_func"),
        lose_triton=lose_triton,
    )
    for module in modules:
        monkeypatch.setattr(module, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: machine.capability)
    return machine


def choose(
    stage: ModuleType,
    name: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    block_size: int | None = None,
    device: torch.device = CUDA,
) -> str:
    backend = submodule(stage, "attention.backends.abstract").select_backend(name, dtype, head_dim, block_size, device)
    chosen: str = backend.name
    return chosen


@pytest.mark.usefixtures("machine")
def test_the_best_is_chosen(stage: ModuleType) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(stage, dtype=dtype) == "flash"
    for head_dim in (8, 24, 64, 256):
        assert choose(stage, head_dim=head_dim) == "flash"
    for block_size in (1, 16, 24, 256, 512):
        assert choose(stage, block_size=block_size) == "flash"
    for name in BACKENDS:
        assert choose(stage, name) == name


def lose(machine: Any, what: str) -> dict[str, Any]:
    """Take away what flash wants; returns the arguments of `choose` that go with it."""
    if what == "capability":
        machine.capability = (7, 5)
    elif what == "flash_attn":
        machine.lose_flash_attn()
    elif what == "another flash_attn":
        machine.break_flash_attn()
    elif what == "triton":
        machine.lose_triton()
    cases: dict[str, dict[str, Any]] = {
        "float32": {"dtype": torch.float32},
        "in eights": {"head_dim": 36},
        "at most 256": {"head_dim": 264},
    }
    return cases.get(what, {})


REASONS = {
    "float32": "flash-attn computes in float16 or bfloat16, not in float32",
    "in eights": r"flash-attn wants heads .* in eights, and these have 36",
    "at most 256": r"flash-attn wants heads of at most 256 dimensions, .* and these have 264",
    "capability": r"flash-attn wants a GPU of compute capability 8\.0 or more",
    "flash_attn": r"flash_attn cannot be imported: .*flash_attn.* \(pip install flash-attn",
    "another flash_attn": r"flash_attn cannot be imported: cannot import name 'flash_attn_varlen_func'.*",
    "triton": r"triton is missing \(pip install triton\)",
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged since the last call."""
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


@pytest.mark.parametrize("what", REASONS)
def test_why_flash_cannot_serve(stage: ModuleType, machine: Any, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for, it is refused; "auto" takes the next best and says why."""
    arguments = lose(machine, what)
    with pytest.raises(ValueError, match=f"attention_backend='flash' cannot serve: {REASONS[what]}.*; use 'auto', or"):
        choose(stage, "flash", **arguments)
    paged = REASONS["triton"] if what == "triton" else None  # why not that one
    with caplog.at_level(logging.INFO, logger=stage.__name__):
        assert choose(stage, **arguments) == ("naive" if paged else "paged")
        (message,) = said(caplog)
        expected = (
            f"naive; flash cannot: {REASONS[what]}.*; paged cannot: {paged}" if paged else "paged; flash cannot: "
        )
        assert re.fullmatch(f"attention backend: {expected}{'' if paged else REASONS[what]}.*", message)
    assert choose(stage, "naive", **arguments) == "naive"
    if paged:
        with pytest.raises(ValueError, match=f"attention_backend='paged' cannot serve: {paged}"):
            choose(stage, "paged", **arguments)
    else:
        assert choose(stage, "paged", **arguments) == "paged"


@pytest.mark.usefixtures("machine")
def test_what_the_log_says_of_the_chosen_one(stage: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """Only "auto" explains itself; blocks that flash-attn cannot read through the table are worth a line."""
    with caplog.at_level(logging.INFO, logger=stage.__name__):
        for name in BACKENDS:
            choose(stage, name)
            assert said(caplog) == [f"attention backend: {name}"]
        for block_size in (None, 256, 1024):
            choose(stage, block_size=block_size)
            assert said(caplog) == ["attention backend: flash"]
        for block_size in (16, 128, 384):
            for name in ("auto", "flash"):
                choose(stage, name, block_size=block_size)
                _, message = said(caplog)
                assert "blocks of 256 tokens" in message and "a copy" in message
        choose(stage, "paged", block_size=16)
        choose(stage, block_size=16, device=CPU)
        assert said(caplog) == ["attention backend: paged", "attention backend: flash"]


def test_a_cpu_needs_nothing(stage: ModuleType, machine: Any) -> None:
    """Any dtype, any head, no package: flash is torch's there."""
    for what in REASONS:
        lose(machine, what)
    for dtype in TOLERANCE:
        for head_dim in (1, 36, 512):
            assert choose(stage, dtype=dtype, head_dim=head_dim, device=CPU) == "flash"
    for name in BACKENDS:
        assert choose(stage, name, device=CPU) == name


def test_who_wants_what_blocks(stage: ModuleType) -> None:
    """Pages of 256 are a wish of the flash-attn package alone."""
    for backend in BACKENDS:
        chosen = submodule(stage, "attention.backends.abstract").select_backend(backend, torch.float32, 64, None, CPU)
        assert chosen.preferred_block_size(CPU) == 16
        assert chosen.preferred_block_size(CUDA) == (256 if backend == "flash" else 16)
        assert chosen.supports_cuda_graph == (backend != "naive"), "it asks the device for every sequence's length"


@pytest.mark.parametrize("asked", [None, "auto", *BACKENDS])
def test_the_engine_takes_what_was_asked_for(
    stage: ModuleType, checkpoint_path: CheckpointPath, asked: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """In all its layers; None is "auto", which on a CPU is flash."""
    options: dict[str, Any] = {"max_model_len": 64, "num_kv_blocks": 4, "attention_backend": asked}
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("qwen3"), log_level="INFO", **options) as llm,
    ):
        expected = "flash" if asked in (None, "auto") else asked
        layers = llm.engine.worker.layers
        assert len(layers) == 2 and {layer.backend.name for layer in layers} == {expected}
        assert llm.config.block_size == 16
        assert said(caplog).count(f"attention backend: {expected}") == 1
        llm.generate([[5, 6, 7]], stage.SamplingParams(max_tokens=2), use_tqdm=False)


def test_the_same_tokens_whoever_attends(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Greedy and cold, with blocks to spare and without."""
    prompts = [[(7 * number + at) % 512 for at in range(length)] for number, length in enumerate((40, 3, 17, 90))]
    params = [
        stage.SamplingParams(temperature=0.5 * (number % 2), seed=number, max_tokens=20, ignore_eos=True)
        for number in range(4)
    ]
    tokens = []
    for backend in BACKENDS:
        for num_kv_blocks in (10, 40):
            llm = make_llm("qwen3", max_model_len=128, num_kv_blocks=num_kv_blocks, attention_backend=backend)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens.append([output.token_ids for output in outputs])
    assert all(other == tokens[0] for other in tokens)


@pytest.mark.parametrize("name", ["xformers", "Flash", "", "flash_attn", 3, True, ["flash"]])
def test_unknown_names(stage: ModuleType, name: Any) -> None:
    message = rf"attention_backend must be 'auto', 'flash', 'paged' or 'naive', got {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        stage.EngineConfig(attention_backend=name)


# ---------------------------------------------------------------------- on a GPU


@pytest.fixture
def cuda_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


STEPS = {
    "mixed": [Part(0, 700), Part(1000, 1), Part(513, 40), Part(0, 1), Part(255, 2), Part(30, 257)],
    "prompts": [Part(0, 1), Part(0, 255), Part(0, 1024), Part(0, 257)],
    "one long prompt": [Part(0, 3000)],
    "decodes": [Part(length, 1) for length in (0, 15, 255, 256, 1023, 4000)],
}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_agree_on_cuda(
    stage: ModuleType, backend: str, dtype: torch.dtype, head_dim: int, record_property: Any
) -> None:
    """Blocks of 16 are gathered for flash-attn, those of 256 and 512 it reads through the table."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    # On a GPU torch's products return bfloat16, and so the scores of what pads are rounded to 8 bits.
    tolerance = 6e-2 if backend != "flash" and dtype is torch.bfloat16 else None
    errors = []
    for parts in STEPS.values():
        for block_size, groups in ((16, 2), (256, 1), (256, 8), (512, 2)):
            batch = Batch(stage, parts, block_size, 2, groups, head_dim, dtype, CUDA)
            errors.append(batch.check(batch.run(backend), tolerance=tolerance))
    name = str(dtype).removeprefix("torch.")
    record_property(f"{backend}_relative_error_{name}_{head_dim}", max(errors))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_memory")
@pytest.mark.parametrize("backend", ["naive", "paged"])
def test_float32_on_cuda(stage: ModuleType, backend: str) -> None:
    for parts in STEPS.values():
        batch = Batch(stage, parts, 16, 2, 4, 64, torch.float32, CUDA)
        batch.check(batch.run(backend))


@pytest.mark.gpu
def test_flash_does_not_stop_the_host(stage: ModuleType) -> None:
    """Beyond the first layer of a step nobody waits for the device: neither prompts nor single tokens."""
    pytest.importorskip("flash_attn")
    for parts in STEPS.values():
        for block_size in (16, 256):
            batch = Batch(stage, parts, block_size, 2, 2, 64, torch.bfloat16, CUDA)
            run, metadata = attention(stage, "flash"), batch.metadata()
            arguments = (batch.q, batch.k_cache, batch.v_cache, metadata, batch.scale)
            run(*arguments)
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
