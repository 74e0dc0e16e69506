"""Many sequences as one flat batch: how InputBatch puts it together, and how the naive backend takes it apart.

Every figure is computed a second time, one sequence after the other, in plain Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ..checkpoints import VOCAB_SIZE
from ..conftest import submodule
from ..inside import attention
from ..property.test_scheduler import make_seqs

pytestmark = pytest.mark.since("m2")

MAX_NUM_SEQS = 5


def make_batch(stage: ModuleType, max_blocks: int = 1, block_size: int = 64) -> Any:
    input_batch = submodule(stage, "worker.input_batch").InputBatch
    return input_batch(MAX_NUM_SEQS, max_blocks, block_size, VOCAB_SIZE, torch.device("cpu"))


def make_scheduled(stage: ModuleType, seqs: list[Any], num_tokens: list[int], retired: tuple[str, ...] = ()) -> Any:
    """A SchedulerOutput, as the scheduler leaves it: `num_computed_tokens` has moved on already."""
    output = submodule(stage, "core.sched.output").SchedulerOutput
    known: dict[str, Any] = {
        "seqs": list(seqs),
        "sampled_seqs": [seq for seq in seqs if seq.num_computed_tokens == seq.num_tokens],
        "num_scheduled_tokens": {seq.seq_id: num for seq, num in zip(seqs, num_tokens, strict=True)},
        "is_prefill": True,
        "is_decode": False,
        "retired_seq_ids": list(retired),
        "block_copies": [],
        "seq_lens": [seq.num_computed_tokens for seq in seqs],
    }
    return output(**{field.name: known[field.name] for field in fields(output) if field.name in known})


def make_seq(stage: ModuleType, name: str, token_ids: list[int], blocks: list[int], **arguments: Any) -> Any:
    """A running sequence, all of whose tokens are computed or scheduled."""
    (seq,) = make_seqs(stage, name, **{"prompt_len": len(token_ids), **arguments})
    seq.token_ids[:] = token_ids
    seq.num_computed_tokens = len(token_ids)
    seq.block_table = blocks
    seq.status = stage.SequenceStatus.RUNNING
    return seq


def run_update(stage: ModuleType, batch: Any, seqs: list[Any], retired: tuple[str, ...] = ()) -> Any:
    """A decode step of `seqs`; returns its inputs: ids, positions, metadata."""
    scheduled = make_scheduled(stage, seqs, [1] * len(seqs), retired)
    batch.update(scheduled)
    return batch.prepare_inputs(scheduled)[:3]


# ---------------------------------------------------------------------- flattening


@dataclass
class Part:
    """One sequence's part of a step: `num_new` of its `length` tokens are scheduled, and `later` follow in others."""

    num_computed: int
    num_new: int
    later: int = 0

    @property
    def length(self) -> int:
        return self.num_computed + self.num_new


parts = st.lists(
    st.builds(Part, st.integers(0, 20), st.sampled_from([1, 1, 2, 7, 13]), st.sampled_from([0, 0, 3])),
    min_size=1,
    max_size=MAX_NUM_SEQS,
)


@given(parts=parts, block_size=st.sampled_from([1, 3, 16, 64]), order=st.permutations(range(200)), flip=st.booleans())
def test_flattening(parts: list[Part], block_size: int, order: list[int], flip: bool, stage: ModuleType) -> None:
    """Prefills, decodes and anything between, in one batch; a row of many blocks, or of one."""
    blocks = iter(order)
    max_blocks = math.ceil(64 / block_size)
    batch = make_batch(stage, max_blocks, block_size)
    seqs, expected_ids, expected_positions, expected_slots = [], [], [], []
    for number, part in enumerate(parts):
        token_ids = [(31 * number + 7 * position) % VOCAB_SIZE for position in range(part.length + part.later)]
        table = [next(blocks) for _ in range(math.ceil(part.length / block_size))]
        seq = make_seq(stage, f"{number}", token_ids, table)
        seq.num_computed_tokens = part.length
        seqs.append(seq)
    batch.update(make_scheduled(stage, seqs, [part.num_new for part in parts]))
    pairs = list(zip(seqs, parts, strict=True))
    if flip:  # the order of a step need not be the order of the rows
        pairs.reverse()
    for seq, part in pairs:
        for position in range(part.num_computed, part.length):
            expected_ids.append(seq.token_ids[position])
            expected_positions.append(position)
            expected_slots.append(seq.block_table[position // block_size] * block_size + position % block_size)
    scheduled = make_scheduled(stage, [seq for seq, _ in pairs], [part.num_new for _, part in pairs])
    batch.update(scheduled)
    input_ids, positions, metadata, *rest = batch.prepare_inputs(scheduled)

    assert input_ids.tolist() == expected_ids
    assert positions.tolist() == expected_positions
    assert metadata.slot_mapping.tolist() == expected_slots
    assert metadata.query_start_loc.tolist() == [
        sum(part.num_new for _, part in pairs[:end]) for end in range(len(pairs) + 1)
    ]
    assert metadata.seq_lens.tolist() == [part.length for _, part in pairs]
    assert metadata.max_query_len == max(part.num_new for part in parts)
    assert metadata.max_seq_len == max(part.length for part in parts)
    for row, (seq, _) in zip(metadata.block_table.tolist(), pairs, strict=True):
        assert row[: len(seq.block_table)] == seq.block_table
    assert metadata.block_size == block_size
    assert [x.dtype for x in (input_ids, positions, metadata.slot_mapping)] == [torch.int64] * 3
    int32 = (metadata.query_start_loc, metadata.seq_lens, metadata.block_table)
    assert [x.dtype for x in int32] == [torch.int32] * 3
    if rest:  # since m4: a token is drawn after the last row of each; with chunks only of whoever has nothing left
        has_chunks = "enable_chunked_prefill" in stage.EngineConfig.__annotations__
        ends = zip(metadata.query_start_loc.tolist()[1:], pairs, strict=True)
        sampled = [(end, part) for end, (_, part) in ends if part.later == 0 or not has_chunks]
        assert rest[0].tolist() == [end - 1 for end, _ in sampled]
        assert rest[1].tolist() == [part.length for _, part in sampled]
        assert rest[0].dtype == rest[1].dtype == torch.int64


def test_two_rows_of_a_large_cache(stage: ModuleType) -> None:
    """A slot's number may be more than 32 bits hold, as in 256 rows of 2^24; a block's may not."""
    batch = make_batch(stage, 1, 2**24)
    seqs = [make_seq(stage, f"{block}", [5] * 3, [block]) for block in (255, 0)]
    _, _, metadata = run_update(stage, batch, seqs)
    assert metadata.slot_mapping.tolist() == [255 * 2**24 + 2, 2]


# ---------------------------------------------------------------------- to the device


@pytest.mark.since("m4")
@given(
    shapes=st.lists(
        st.integers(0, 9).map(lambda n: (n,)) | st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=6
    ),
    num_long=st.integers(0, 6),
    rounds=st.integers(1, 3),
)
def test_to_device(shapes: list[tuple[int, ...]], num_long: int, rounds: int, stage: ModuleType) -> None:
    """Many arrays, first those of 64 bits, go as one and come out as they were; whoever has them keeps them."""
    batch = make_batch(stage)
    sent: list[tuple[np.ndarray, torch.Tensor]] = []
    for number in range(rounds):
        arrays = []
        for at, shape in enumerate(shapes):
            dtype = np.int64 if at < num_long else np.int32
            limits = np.iinfo(dtype)
            generator = np.random.default_rng([number, at])
            arrays.append(generator.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True))
        if not arrays:
            break
        given = [array.copy() for array in arrays]
        tensors = batch._to_device(*arrays)
        for array in arrays:
            array.fill(0)
        assert len(tensors) == len(given)
        sent += zip(given, tensors, strict=True)
    for array, tensor in sent:
        assert tensor.shape == array.shape and tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.tolist() == array.tolist()


@pytest.mark.since("m4")
def test_a_larger_step_after_a_smaller_one(stage: ModuleType) -> None:
    """What they pass through grows, and does not shrink; a table that is a slice of another is no obstacle.

    There are two of it: the device may still be reading one when the next step is prepared.
    """
    batch = make_batch(stage)
    used = []
    for length in (3, 100, 2, 80, 4000, 1, 1, 3000):
        table = np.arange(2 * length, dtype=np.int32).reshape(2, length)[:, : length // 2 + 1]
        before = {buffer.data_ptr(): bytes(buffer.numpy()) for buffer in batch._staging}
        ids, columns = batch._to_device(np.arange(length), table)
        assert ids.tolist() == list(range(length)) and columns.tolist() == table.tolist()
        used.append(batch._staging[0].data_ptr())
        (other,) = (buffer for buffer in batch._staging if buffer.data_ptr() != used[-1])
        assert bytes(other.numpy()) == before[other.data_ptr()], "the step before may still be read"
    assert all(one != other for one, other in pairwise(used))
    assert used[1] == used[3] and used[4] == used[6] and used[5] == used[3], "a new one for a smaller step"


# ---------------------------------------------------------------------- rows


class Company:
    """Sequences that come and go, each with a block of its own."""

    def __init__(self, stage: ModuleType) -> None:
        self.stage = stage
        self.batch = make_batch(stage, 1, 64)
        self.num_blocks = 0

    def make(self, name: str, **arguments: Any) -> Any:
        self.num_blocks += 1
        return make_seq(self.stage, name, [5, 6, 7], [self.num_blocks], **arguments)

    def run(self, seqs: list[Any], retired: tuple[str, ...] = ()) -> Any:
        """One step; checks that everybody's tokens go where his own blocks are."""
        _, _, metadata = run_update(self.stage, self.batch, seqs, retired)
        assert metadata.slot_mapping.tolist() == [seq.block_table[0] * 64 + seq.num_tokens - 1 for seq in seqs]
        return metadata


def test_rows_are_kept_and_used_again(stage: ModuleType) -> None:
    """Many more sequences than rows pass through; as many as there are rows at once."""
    company = Company(stage)
    running = [company.make(f"{number}-") for number in range(MAX_NUM_SEQS)]
    company.run(running)
    rows = dict(company.batch.rows)
    assert sorted(rows.values()) == list(range(MAX_NUM_SEQS))
    for number in range(3 * MAX_NUM_SEQS):
        gone = running.pop(number % len(running))
        new = company.make(f"new{number}-")
        running.append(new)
        company.run(running, (gone.seq_id,))
        assert company.batch.rows[new.seq_id] == rows.pop(gone.seq_id), "the only row that was free"
        rows[new.seq_id] = company.batch.rows[new.seq_id]
        assert company.batch.rows == rows, "somebody was moved, or is not gone"


def test_who_is_not_in_a_step_keeps_his_row(stage: ModuleType) -> None:
    """A prefill step has only the newcomers in it."""
    company = Company(stage)
    a, b = company.make("a"), company.make("b")
    company.run([a])
    company.run([b])
    before = dict(company.batch.rows)
    company.run([a, b])
    assert company.batch.rows == before and len(before) == 2


@pytest.mark.parametrize("how", ["the same sequence, preempted", "another one of that name"])
def test_who_left_and_came_back_has_new_blocks(stage: ModuleType, how: str) -> None:
    """In the very next step: what stands in his row is of before."""
    company = Company(stage)
    old, neighbour = company.make("a"), company.make("b")
    company.run([old, neighbour])
    new = company.make("a")
    if how.startswith("the same"):
        old.block_table, new = new.block_table, old
    metadata = company.run([new, neighbour], ("a-0",))
    assert metadata.block_table.tolist() == [new.block_table, neighbour.block_table]
    assert len(company.batch.rows) == 2


def test_a_departure_may_be_told_twice_or_be_of_a_stranger(stage: ModuleType) -> None:
    """Who was aborted while he waited never had a row, and who was preempted and then aborted leaves twice."""
    company = Company(stage)
    a, b = company.make("a"), company.make("b")
    company.run([a, b])
    for _ in range(3):
        company.run([b], ("a-0", "a-0", "stranger-0"))
    assert list(company.batch.rows) == ["b-0"]
    company.run([b, *(company.make(f"c{number}") for number in range(MAX_NUM_SEQS - 1))])
    assert sorted(company.batch.rows.values()) == list(range(MAX_NUM_SEQS))


# ---------------------------------------------------------------------- sampling parameters


def sampling(company: Company, seqs: list[Any], retired: tuple[str, ...] = ()) -> Any:
    metadata = company.run(seqs, retired)
    return company.batch.sampling_metadata(list(seqs), metadata.seq_lens.long())


def tensors_of(metadata: Any) -> dict[str, int]:
    """{field: which tensor it is}, but for positions, which are new at every step."""
    found = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
    return {name: id(x) for name, x in found.items() if isinstance(x, torch.Tensor) and name != "positions"}


def check_sampling(stage: ModuleType, metadata: Any, seqs: list[Any]) -> None:
    """The same as if it had been made for these sequences and nothing else."""
    fresh = submodule(stage, "sample.sampler").SamplingMetadata.from_sequences(seqs, VOCAB_SIZE, torch.device("cpu"))
    for field in fields(fresh):
        ours, expected = getattr(metadata, field.name), getattr(fresh, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(ours, expected) and ours.dtype == expected.dtype, field.name
        else:
            assert ours == expected, field.name


def test_sampling_tensors_live_as_long_as_the_batch(stage: ModuleType) -> None:
    """Made once, not at every step; the positions move on."""
    company = Company(stage)
    seqs = [
        company.make("a", temperature=0.5, top_k=3, seed=1),
        company.make("b", temperature=0.0, presence_penalty=1.0),
        company.make("c", top_p=0.5, min_p=0.1, logprobs=2, min_tokens=2),
    ]
    first = sampling(company, seqs)
    assert len(tensors_of(first)) >= 5
    for _ in range(3):
        for seq in seqs:
            seq.token_ids.append(9)
            seq.num_computed_tokens += 1
        again = sampling(company, seqs)
        assert tensors_of(again) == tensors_of(first)
        check_sampling(stage, again, seqs)
    assert first.positions.tolist() == [3, 3, 3] and again.positions.tolist() == [6, 6, 6]


@pytest.mark.parametrize("change", ["one leaves", "one comes", "one is replaced", "others take their turn", "order"])
def test_sampling_tensors_are_made_anew_when_the_batch_changes(stage: ModuleType, change: str) -> None:
    """At once, also for a namesake with other parameters."""
    company = Company(stage)
    a, b, c = (company.make(name, temperature=0.1 + at / 2, seed=at, top_k=at + 1) for at, name in enumerate("abc"))
    check_sampling(stage, sampling(company, [a, b]), [a, b])
    namesake = company.make("b", temperature=2.0, seed=9, frequency_penalty=1.0)
    after, retired = {
        "one leaves": ([b], ("a-0",)),
        "one comes": ([a, b, c], ()),
        "one is replaced": ([a, namesake], ("b-0",)),
        "others take their turn": ([c], ()),
        "order": ([b, a], ()),
    }[change]
    check_sampling(stage, sampling(company, after, retired), after)
    if "a-0" not in retired and namesake not in after:
        check_sampling(stage, sampling(company, [a, b]), [a, b])


# ---------------------------------------------------------------------- attention that pads


@given(
    parts=st.lists(
        st.builds(Part, st.integers(0, 12), st.sampled_from([1, 1, 2, 5, 9])), min_size=1, max_size=MAX_NUM_SEQS
    ),
    block_size=st.sampled_from([1, 4, 32]),
    max_keys=st.integers(1, 60),
    max_scores=st.integers(1, 150),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_naive_attention_of_several_sequences(
    parts: list[Part],
    block_size: int,
    max_keys: int,
    max_scores: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    stage: ModuleType,
) -> None:
    """As each of them alone, and what no sequence wrote may be anything.

    The limits are so small that groups and tiles end everywhere.
    """
    if not hasattr(stage.EngineConfig, "block_size"):
        block_size = 32  # a sequence has a row
    generator = torch.Generator().manual_seed(sum(part.length for part in parts))
    num_heads, num_kv_heads = heads
    head_dim, per_seq = 8, math.ceil(32 / block_size)

    def randn(rows: int, num: int) -> torch.Tensor:
        return torch.randn(rows, num, head_dim, generator=generator).to(dtype)

    order = torch.randperm(MAX_NUM_SEQS * per_seq, generator=generator).tolist()
    k_cache, v_cache = (
        torch.full((len(order) * block_size + 1, num_kv_heads, head_dim), math.nan, dtype=dtype) for _ in range(2)
    )
    table = torch.zeros(len(parts), per_seq, dtype=torch.int32)
    queries, expected, slot_mapping = [], [], []
    for number, part in enumerate(parts):
        blocks = order[number * per_seq : (number + 1) * per_seq]
        num_blocks = math.ceil(part.length / block_size)
        table[number, :num_blocks] = torch.tensor(blocks[:num_blocks])
        slots = [blocks[at // block_size] * block_size + at % block_size for at in range(part.length)]
        q, k, v = randn(part.num_new, num_heads), randn(part.length, num_kv_heads), randn(part.length, num_kv_heads)
        k_cache[slots], v_cache[slots] = k, v
        slot_mapping += slots[part.num_computed :]
        queries.append(q)
        visible = torch.ones(part.num_new, part.length).tril(part.num_computed).bool()
        k, v = (x.float().repeat_interleave(num_heads // num_kv_heads, dim=1).transpose(0, 1) for x in (k, v))
        alone = F.scaled_dot_product_attention(q.float().transpose(0, 1), k, v, attn_mask=visible, scale=0.6)
        expected.append(alone.transpose(0, 1))
    metadata = submodule(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.tensor([sum(p.num_new for p in parts[:end]) for end in range(len(parts) + 1)]).int(),
        seq_lens=torch.tensor([part.length for part in parts]).int(),
        max_query_len=max(part.num_new for part in parts),
        max_seq_len=max(part.length for part in parts),
        slot_mapping=torch.tensor(slot_mapping),
        block_table=table,
        block_size=block_size,
    )
    naive = submodule(stage, "attention.backends.torch_naive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(naive.MAX_KEYS, "cpu", max_keys)
        patch.setitem(naive.MAX_SCORES, "cpu", max_scores)
        ours = attention(stage, "naive")(torch.cat(queries), k_cache, v_cache, metadata, 0.6)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(ours.float(), torch.cat(expected), atol=tolerance, rtol=tolerance)


def test_memory_of_padding_is_bounded(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded keys of a group, and scores of one head of a tile, are no more than the limits allow."""
    naive = submodule(stage, "attention.backends.torch_naive")
    monkeypatch.setitem(naive.MAX_KEYS, "cpu", 100)
    monkeypatch.setitem(naive.MAX_SCORES, "cpu", 200)
    lens, num_kv_heads, num_heads = [30, 7, 30, 1, 22, 30, 13, 30], 2, 4
    metadata = submodule(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()]).int(),
        seq_lens=torch.tensor(lens).int(),
        max_query_len=30,
        max_seq_len=30,
        slot_mapping=torch.cat([torch.arange(length) + 30 * row for row, length in enumerate(lens)]),
        block_table=torch.arange(len(lens), dtype=torch.int32)[:, None],
        block_size=30,
    )
    num_keys, scores = [], []
    gather, bmm = naive._gather, torch.bmm

    def recording_gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        num_keys.append(slots.numel())
        gathered: torch.Tensor = gather(cache, slots)
        return gathered

    def recording_bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        scores.append(one.shape[0] * one.shape[1] * other.shape[2] // num_heads)
        return bmm(one, other)

    monkeypatch.setattr(naive, "_gather", recording_gather)
    cache = torch.zeros(30 * len(lens) + 1, num_kv_heads, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", recording_bmm)
        attention(stage, "naive")(torch.zeros(sum(lens), num_heads, 8), cache, cache, metadata, 1.0)
    assert max(num_keys) <= 100 and len(scores) > len(num_keys)
    assert len(num_keys) == 2 * 5, "1, 7 and 13 tokens stay apart; of the others three at a time"
    assert sum(num_keys[::2]) == 1 + 7 + 13 + 5 * 30, "the short ones were padded to the longest of all"
    assert max(scores[::2]) <= 200, "every other product is one of weights and values"


@pytest.mark.since("m5")
@pytest.mark.parametrize(("lens", "expected"), [([1, 1, 7, 2], 2), ([1, 3], 1), ([4], 0), ([5, 1, 1], 0), ([1, 1], 0)])
def test_how_many_decodes_come_first(stage: ModuleType, lens: list[int], expected: int) -> None:
    """Of a step of decodes alone it is 0: then nothing is to be told apart."""
    batch = make_batch(stage)
    seqs = [make_seq(stage, f"{number}", [5] * (length + 3), [number]) for number, length in enumerate(lens)]
    scheduled = make_scheduled(stage, seqs, lens)
    batch.update(scheduled)
    assert batch.prepare_inputs(scheduled)[2].num_decodes == expected
