"""What is known by its tokens: hashes, matches, parts of blocks, who is evicted first, and what is counted.

Sequences are made by hand and their tokens made up. Where vLLM has a test for the same thing, its number in the
checklist (reference/vllm_v1.md, 9.5 and 9.6) stands in the docstring. Any order of events is in
tests/property/test_prefix_cache.py, tokens of whole engines in tests/integration/test_prefix_caching.py.
"""

from __future__ import annotations

import gc
import hashlib
import random
from array import array
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from folovllm import lab

from ..conftest import submodule
from ..property.test_scheduler import Drive, ids, make_scheduler

pytestmark = pytest.mark.since("m6")


def make_seq(
    stage: ModuleType,
    name: str,
    tokens: list[int],
    salt: str | None = None,
    max_tokens: int = 100,
    priority: int = 0,
    arrival: float = 0.0,
) -> Any:
    request = stage.Request(
        request_id=name,
        prompt=None,
        prompt_token_ids=tokens,
        sampling_params=stage.SamplingParams(),
        max_tokens=max_tokens,
        eos_token_ids=(),
        arrival_time=arrival,
        priority=priority,
        cache_salt=salt,
    )
    return stage.Sequence(f"{name}-0", request, 0, 0)


class Manager:
    """A KVCacheManager, and sequences that are computed as soon as they have blocks."""

    def __init__(self, stage: ModuleType, num_blocks: int, block_size: int, **options: Any) -> None:
        self.stage = stage
        options = {"enable_prefix_caching": True, **options}
        self.manager = submodule(stage, "core.kv_cache_manager").KVCacheManager(num_blocks, block_size, **options)
        self.pool, self.cache = self.manager.block_pool, self.manager.prefix_cache
        self.num_seqs = 0

    def admit(self, tokens: list[int], salt: str | None = None) -> Any:
        """A sequence that holds its blocks, all of them computed; None if there are not enough."""
        seq = make_seq(self.stage, f"{self.num_seqs}", tokens, salt)
        self.num_seqs += 1
        computed = self.manager.get_computed_blocks(seq)
        seq.num_computed_tokens = computed.num_tokens
        num_new = seq.num_tokens - computed.num_tokens
        if not self.manager.allocate_slots(seq, num_new, computed=computed):
            return None
        self.manager.note_admission(seq)
        self.compute(seq, num_new)
        return seq

    def append(self, seq: Any, tokens: list[int]) -> None:
        for token in tokens:
            seq.token_ids.append(token)
            assert self.manager.allocate_slots(seq, 1)
            self.compute(seq, 1)

    def compute(self, seq: Any, num: int) -> None:
        seq.num_computed_tokens += num
        self.manager.cache_blocks([seq], {seq.seq_id: num}, [seq.num_computed_tokens])

    def match(self, tokens: list[int], salt: str | None = None) -> tuple[list[int], int]:
        return tuple(self.manager.get_computed_blocks(make_seq(self.stage, "?", tokens, salt)))  # type: ignore[return-value]

    def free(self) -> list[int]:
        return [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]

    def cached(self) -> list[int]:
        return [block.block_id for block in self.pool.blocks if block.block_hash is not None]

    def state(self) -> Any:
        counts = [(block.ref_cnt, block.block_hash) for block in self.pool.blocks]
        return self.free(), counts, list(self.manager.block_copies), len(self.cache), self.cache.num_evictions


# ---------------------------------------------------------------------- hashes


def test_a_hash_covers_tokens_parent_and_salt(stage: ModuleType) -> None:
    """Items 33 and 35: the chain by hand; the salt is in the first block's parent, and so in all that follow."""
    module = submodule(stage, "core.prefix_cache")
    for salt, root in ((None, b"root"), ("x", b"saltx"), ("root", b"saltroot")):
        parent = hashlib.sha256(root).digest()
        assert module.root_hash(salt) == parent
        expected = []
        for tokens in ([1, 2], [3, 4]):
            parent = hashlib.sha256(parent + array("I", tokens).tobytes()).digest()
            expected.append(parent)
        assert module.extend_hashes(make_seq(stage, "a", [1, 2, 3, 4, 5], salt), 2) == expected
    all_hashes = [
        module.extend_hashes(make_seq(stage, "a", tokens, salt), 2)[-1]
        for tokens, salt in (([1, 2], None), ([1, 2], "x"), ([2, 1], None), ([1, 2, 1, 2], None), ([3, 4, 1, 2], None))
    ]
    assert len(set(all_hashes)) == len(all_hashes)


def test_only_full_blocks_are_hashed_and_only_once(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items 34 and 41: extended as tokens come; what stands there is never computed again."""
    module = submodule(stage, "core.prefix_cache")
    seq = make_seq(stage, "a", [7] * 9)
    calls: list[bytes] = []
    sha256: Callable[[bytes], Any] = hashlib.sha256

    def counted(data: bytes) -> Any:
        calls.append(data)
        return sha256(data)

    monkeypatch.setattr(module.hashlib, "sha256", counted)
    hashes = module.extend_hashes(seq, 4)
    assert hashes is seq.block_hashes and len(hashes) == 2 and len(calls) == 3, "the root and two blocks"
    first = list(hashes)
    for num_tokens in range(10, 17):
        seq.token_ids.append(num_tokens)
        assert len(module.extend_hashes(seq, 4)) == num_tokens // 4
    assert hashes[:2] == first and len(calls) == 5


# ---------------------------------------------------------------------- whole blocks


def test_a_prompt_of_55_tokens(stage: ModuleType) -> None:
    """Items 38, 39 and 41: three of four blocks are cached; another prompt shares them; the last when it is full."""
    m = Manager(stage, 12, 16)
    head = [t for t in range(3) for _ in range(16)]
    a = m.admit([*head, *[3] * 7])
    assert (a.block_table, m.cached()) == ([0, 1, 2, 3], [0, 1, 2])
    b = m.admit([*head, *[4] * 5])
    assert (b.block_table, b.num_cached_tokens) == ([0, 1, 2, 4], 48)
    assert [block.ref_cnt for block in m.pool.blocks[:5]] == [2, 2, 2, 1, 1]
    m.append(a, [3] * 8)
    assert m.cached() == [0, 1, 2]
    m.append(a, [3])
    assert m.cached() == [0, 1, 2, 3] and len(a.block_table) == 4
    m.append(a, [9])
    assert len(a.block_table) == 5
    m.pool.check_integrity([a.block_table, b.block_table])


def test_the_order_in_which_blocks_go(stage: ModuleType) -> None:
    """Items 40 and 42: those that nobody can find first; then who was let go first, tail before head."""
    m = Manager(stage, 9, 2)
    a, b = m.admit([1, 2, 3, 4, 5]), m.admit([6, 7, 8, 9, 10, 11])
    assert (a.block_table, b.block_table) == ([0, 1, 2], [3, 4, 5])
    m.manager.free(a)
    assert m.free() == [2, 6, 7, 8, 1, 0]
    m.manager.free(b)
    assert m.free() == [2, 6, 7, 8, 1, 0, 5, 4, 3]
    c = m.admit([1, 2, 3, 4, 20])  # finds what a has left
    assert (c.block_table, m.free()) == ([0, 1, 2], [6, 7, 8, 5, 4, 3])
    m.manager.free(c)
    assert m.free() == [2, 6, 7, 8, 5, 4, 3, 1, 0]
    d = m.admit(list(range(30, 41)))
    assert (d.block_table, m.cache.num_evictions) == ([2, 6, 7, 8, 5, 4], 2)
    assert m.match([6, 7, 8, 9, 10, 11, 12]) == ([3], 2)
    assert m.match([1, 2, 3, 4, 5])[:2] == ([0, 1], 4)


def test_vllms_two_requests_that_are_let_go(stage: ModuleType) -> None:
    """Item 40, with vLLM's figures: [5, 4 | 6 … 10 | 3, 2, 1], and they are given in that order; ours count from 0."""
    m = Manager(stage, 10, 16)
    head = [t for t in range(3) for _ in range(16)]
    a, b = m.admit([*head, *[3] * 7]), m.admit([*head, *[3] * 5])
    assert (a.block_table, b.block_table) == ([0, 1, 2, 3], [0, 1, 2, 4])
    m.manager.free(a)
    m.manager.free(b)
    assert m.free() == [4, 3, 5, 6, 7, 8, 9, 2, 1, 0]
    c = m.admit([99] * (16 * 9))
    assert c.block_table == [4, 3, 5, 6, 7, 8, 9, 2, 1]
    assert m.match([*head, 5])[0] == [0], "of the old prefix only its head is left"


def test_vllms_oldest_request_goes_first(stage: ModuleType) -> None:
    """Item 42, with vLLM's figures: [6, 10, 5, 4, 3, 2, 1], then + [9, 8, 7]; a hit takes 1 and 2 out, and a new 6."""
    m = Manager(stage, 10, 16)
    first = list(range(5 * 16 + 7))
    a, b = m.admit(first), m.admit(list(range(100, 100 + 3 * 16)))
    assert (a.block_table, b.block_table) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    m.manager.free(a)
    assert m.free() == [5, 9, 4, 3, 2, 1, 0]
    m.manager.free(b)
    assert m.free() == [5, 9, 4, 3, 2, 1, 0, 8, 7, 6]
    c = m.admit([*first[:32], 500, 501, 502])
    assert (c.block_table, c.num_cached_tokens, m.free()) == ([0, 1, 5], 32, [9, 4, 3, 2, 8, 7, 6])
    assert m.manager.num_free_blocks == 7


def test_a_block_is_forgotten_when_it_is_used_again_and_not_before(stage: ModuleType) -> None:
    """Item 43."""
    m = Manager(stage, 2, 4)
    m.manager.free(m.admit([1] * 8))
    assert (m.cached(), m.manager.num_free_blocks) == ([0, 1], 2)
    m.manager.free(m.admit([2] * 4))
    assert m.match([1] * 9) == ([0], 4)
    assert m.match([2] * 5) == ([1], 4)
    assert m.cache.num_evictions == 1


def test_hits_are_not_evicted_for_the_rest_of_the_prompt(stage: ModuleType) -> None:
    """Item 44: they are the oldest, and the free ones are just enough."""
    m = Manager(stage, 4, 2)
    m.manager.free(m.admit([1, 2, 3, 4]))
    m.manager.free(m.admit([5, 6, 7, 8]))
    c = m.admit([1, 2, 3, 4, 9, 9, 9])
    assert c.block_table[:2] == [0, 1] and sorted(c.block_table) == [0, 1, 2, 3]
    assert m.match([1, 2, 3, 4, 5])[0] == [0, 1]


@pytest.mark.parametrize("num_reserved", [0, 1])
def test_a_failed_allocation_changes_nothing(stage: ModuleType, num_reserved: int) -> None:
    """Items 45 and 46: two free blocks are hit; one is left, where two, or one and a reserve, are due."""
    m = Manager(stage, 4, 2)
    m.manager.free(m.admit([1, 2, 3, 4]))
    other = m.admit([9])
    assert m.manager.num_free_blocks == 3
    seq = make_seq(stage, "b", [1, 2, 3, 4, 5] if num_reserved else [1, 2, 3, 4, 5, 6, 7])
    computed = m.manager.get_computed_blocks(seq)
    assert computed.num_tokens == 4
    seq.num_computed_tokens = 4
    before = m.state()
    assert not m.manager.allocate_slots(seq, seq.num_tokens - 4, num_reserved, computed)
    assert (m.state(), seq.block_table) == (before, [])
    assert m.manager.allocate_slots(seq, 1, 0, computed)
    assert m.manager.num_free_blocks == 0
    m.pool.check_integrity([seq.block_table, other.block_table])


def test_switched_off(stage: ModuleType) -> None:
    """Item 47: nothing hits, nothing is counted, and freed blocks keep their order."""
    m = Manager(stage, 4, 2, enable_prefix_caching=False)
    m.manager.free(m.admit([1, 2, 3]))
    assert m.cache is None and m.free() == [2, 3, 1, 0]
    a = m.admit([1, 2, 3])
    assert (a.num_cached_tokens, a.block_table) == (0, [2, 3])
    assert m.admit([1] * 5) is None
    stats = m.manager.make_stats()
    assert (stats["prefix_cache_queries"], stats["kv_slots_cached"], stats["prefix_cache_hit_rate"]) == (0, 0, 0.0)
    assert lab.render_prefix_cache(m.manager) == "no prefix cache"


def test_salts(stage: ModuleType) -> None:
    """Item 48: who has another one, or none, finds nothing, not even a part of a block."""
    m = Manager(stage, 8, 4)
    m.admit([1] * 9, "x")
    assert m.match([1] * 9, "x")[1] == 8
    assert [m.match([1] * 9, salt)[1] for salt in (None, "y", "root")] == [0, 0, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17])
def test_salts_of_prompts_of_any_length(stage: ModuleType, length: int) -> None:
    """Item 48: whole blocks and parts of them, the whole prompt and one that parts from it: the tenant's own only."""
    m = Manager(stage, 80, 4)
    tokens = list(range(50, 50 + length))
    seqs = [m.admit(tokens, salt) for salt in (None, "x", "y", "", "saltx", "root")]
    tables = [seq.block_table for seq in seqs]
    assert len({block for table in tables for block in table}) == sum(map(len, tables)), "nobody shares a block"
    assert [seq.num_cached_tokens for seq in seqs] == [0] * 6 and m.manager.block_copies == []
    found = length // 4 * 4
    for table, salt in zip(tables, (None, "x", "y", "", "saltx", "root"), strict=True):
        assert m.match([*tokens, 9], salt) == (table[: length // 4], found)
        expected = (table[: length // 4], min(found, length - 1))
        assert m.match(tokens, salt) == expected, "all but the last token, which is needed again"
        if found:
            assert m.match([*tokens[: found - 1], 9, 9], salt) == (table[: found // 4], found - 1)
    assert m.match([*tokens, 9], "z") == m.match([*tokens[:2], 9, 9], "z") == ([], 0)


def test_the_first_of_two_equal_blocks_is_the_one(stage: ModuleType) -> None:
    """Item 49: computed in the same step by two; the other one is of use to its owner only."""
    m = Manager(stage, 8, 2)
    a, b = (make_seq(stage, name, [1, 2, 3]) for name in "ab")
    for seq in (a, b):
        assert m.manager.allocate_slots(seq, 3)
    m.compute(a, 3)
    m.compute(b, 3)
    assert (m.cached(), m.match([1, 2, 3])) == ([0], ([0], 2))
    m.manager.free(a)
    m.manager.free(b)
    assert m.free()[-1] == 0 and m.free()[0] == 2


def test_blocks_behind_one_that_is_gone_are_not_found(stage: ModuleType) -> None:
    """Two compute the same first block at once, only one of which is cached, and goes before what follows the other.

    As soon as somebody has computed the first block anew, what follows is found again.
    """
    m = Manager(stage, 6, 2)
    a, b = make_seq(stage, "a", [1, 2, 9]), make_seq(stage, "b", [1, 2, 3, 4, 5])
    for seq in (a, b):
        assert m.manager.allocate_slots(seq, seq.num_tokens)
    m.compute(a, 3)
    m.compute(b, 5)
    m.manager.free(a)
    m.manager.free(b)
    assert m.match([1, 2, 3, 4, 5]) == ([0, 3], 4)
    assert len(m.free()) == 6
    c = m.admit(list(range(50, 59)))  # five blocks: all that nobody can find, and the oldest of the others
    assert m.cache.num_evictions == 1 and 0 in c.block_table
    assert m.match([1, 2, 3, 4, 5]) == m.match([1, 2, 3]) == ([], 0)
    m.pool.check_integrity([c.block_table])
    m.manager.free(c)
    d = m.admit([1, 2])
    assert m.match([1, 2, 3, 4, 5]) == ([*d.block_table, 3], 4)


def test_nothing_is_left_of_what_was_evicted(stage: ModuleType) -> None:
    """A server that runs for weeks must not remember all the first tokens that it has ever seen."""
    m = Manager(stage, 4, 2)
    for number in range(50):
        m.manager.free(m.admit([number, 7, number, 8, number, 9]))
    assert m.cache.num_evictions == 3 * 50 - 4
    assert len(m.cache) == len(m.cache._blocks) == 4
    assert len(m.cache._children) == 4, "one for each of the cached blocks"


def test_the_garbage_collector_has_nothing_to_look_at(stage: ModuleType) -> None:
    """A cache of 100,000 blocks must not make its passes longer: bytes, and dictionaries of nothing else."""
    m = Manager(stage, 400, 4)
    m.manager.free(m.admit(list(range(800))))
    assert len(m.cache) == 200
    for block in m.pool.blocks[:200]:
        assert not any(map(gc.is_tracked, (block.token_bytes, block.block_hash, block.parent_hash)))
    gc.collect()
    before = len(gc.get_objects())
    m.manager.free(m.admit(list(range(1000, 1800))))
    gc.collect()
    assert len(m.cache) == 400
    assert len(gc.get_objects()) - before < 50, "200 more blocks"


def test_reset(stage: ModuleType) -> None:
    """Item 50: only while nobody holds a block."""
    m = Manager(stage, 4, 2)
    a = m.admit([1, 2, 3])
    assert not m.manager.reset_prefix_cache() and m.match([1, 2, 3])[1] == 2
    m.manager.free(a)
    assert m.manager.reset_prefix_cache()
    assert (len(m.cache), m.cached(), m.match([1, 2, 3])) == (0, [], ([], 0))
    m.pool.check_integrity([])
    assert m.cache.num_evictions == 0, "a block that is forgotten was not taken from anybody"
    m.manager.free(m.admit([1, 2, 3]))
    assert m.match([1, 2, 3])[1] == 2
    m.manager.free(m.admit([7] * 8))
    stats = m.manager.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], stats["prefix_cache_hit_rate"]) == (14, 0, 0.0)
    m.manager.free(m.admit([7] * 4))
    assert m.manager.make_stats()["prefix_cache_hit_rate"] == 3 / 15
    assert m.manager.reset_prefix_cache() and m.cache.num_evictions == 2, "counted since the engine started"
    stats = m.manager.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], stats["prefix_cache_hit_rate"]) == (18, 3, 0.0)
    m.manager.free(m.admit([7] * 4))
    m.manager.free(m.admit([7] * 4))
    assert m.manager.make_stats()["prefix_cache_hit_rate"] == 3 / 8, "the rate is that of what came since"


def test_a_cached_block_is_never_written(stage: ModuleType) -> None:
    """Somebody who would is given a copy, though nobody else holds the block."""
    m = Manager(stage, 6, 4)
    a = m.admit([1] * 8)
    a.num_computed_tokens = 7  # its last token again, as a sibling would
    assert m.manager.allocate_slots(a, 1)
    assert (a.block_table, m.manager.block_copies) == ([0, 2], [(1, 2)])
    assert m.match([1] * 9)[0] == [0, 1]


# ---------------------------------------------------------------------- parts of blocks


def test_a_full_hit_computes_one_token(stage: ModuleType) -> None:
    """The prompt ends with a block, whose last token is needed again: the block is copied but for it."""
    m = Manager(stage, 8, 4)
    m.admit([1, 2, 3, 4, 5, 6, 7, 8])
    assert m.match([1, 2, 3, 4, 5, 6, 7, 8]) == ([0, 1], 7)
    b = m.admit([1, 2, 3, 4, 5, 6, 7, 8])
    assert (b.block_table, b.num_cached_tokens, m.manager.take_block_copies()) == ([0, 2], 7, [(1, 2)])
    assert m.manager.make_stats()["num_copied_blocks"] == 1
    assert m.match([1]) == ([], 0)


def test_the_longest_of_the_newest_eight(stage: ModuleType) -> None:
    """Of those that begin with the right token; among equally long ones the newest."""
    m = Manager(stage, 40, 16)
    m.admit([1, 2, 3, 4, 5, *[0] * 11])
    tables = [m.admit([1, 2, 3, *[10 + i] * 13]).block_table for i in range(7)]
    for i in range(9):
        m.admit([2 + i, *[3] * 15])  # other first tokens do not count
    prompt = [1, 2, 3, 4, 5, 6]
    assert m.match(prompt) == ([0], 5)
    m.admit([1, 2, 9, *[0] * 13])
    assert m.match(prompt) == ([tables[-1][0]], 3)


@pytest.mark.parametrize(("block_size", "least"), [(1, None), (2, 1), (8, 1), (16, 2), (32, 4), (256, 32)])
def test_a_copy_must_be_worth_it(stage: ModuleType, block_size: int, least: int | None) -> None:
    """An eighth of a block; fewer tokens are computed in less time than a block is copied in."""
    m = Manager(stage, 8, block_size)
    m.admit([1] * block_size)
    if least is None:
        assert m.match([1, 1]) == ([0], 1)
        return
    assert m.match([1] * least + [2] * 5) == ([0], least)
    assert m.match([1] * (least - 1) + [2] * block_size) == ([], 0)


@pytest.mark.parametrize("with_parts", [True, False])
def test_short_prefixes_in_large_blocks(stage: ModuleType, with_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt, then 63 that share 200 tokens with it, blocks of 256: all found, and nothing without parts of blocks.

    The scheduler alone, all 63 at once; whole blocks that are equal are found either way.
    """
    if not with_parts:
        monkeypatch.setattr(submodule(stage, "core.prefix_cache"), "MIN_COPIED_SHARE", 2.0)
    sizes = {"max_model_len": 1024, "block_size": 256, "num_kv_blocks": 300, "max_num_seqs": 100}
    drive = Drive(stage, enable_prefix_caching=True, max_num_batched_tokens=40_000, **sizes)
    rng = random.Random(0)
    head = [rng.randrange(1, 512) for _ in range(200)]
    seqs = [make_seq(stage, "0", [*head, 1000, *[3] * 150], max_tokens=1)]
    for number in range(1, 64):
        own = [1000 + number, *[3] * rng.randint(99, 199)]
        seqs.append(make_seq(stage, f"{number}", head + own, max_tokens=1))
    for group in (seqs[:1], seqs[1:]):
        for seq in group:
            drive.scheduler.add_sequence(seq)
        scheduled = drive.step()
        assert ids(scheduled.seqs) == ids(group)
    assert min(seq.num_prompt_tokens for seq in seqs) >= 300
    found = [seq.num_cached_tokens for seq in seqs]
    assert found == [0] + [200 if with_parts else 0] * 63
    stats = drive.scheduler.make_stats()
    assert (stats["num_copied_blocks"], stats["prefix_cache_hits"]) == ((63, 63 * 200) if with_parts else (0, 0))
    manager = drive.scheduler.kv_cache_manager
    assert manager.get_computed_blocks(make_seq(stage, "?", seqs[5].token_ids[:300])).num_tokens >= 256


def test_the_source_may_be_the_block_that_is_taken(stage: ModuleType) -> None:
    """The copy comes before all that the step writes; it has been of use, so others go before it if there are any."""
    m = Manager(stage, 2, 4)
    m.manager.free(m.admit([1, 2, 3, 4]))
    b = m.admit([1, 2, 9])
    assert (b.block_table, m.manager.block_copies) == ([1], [(0, 1)])
    assert m.cached() == [0]
    m = Manager(stage, 1, 4)
    m.manager.free(m.admit([1, 2, 3, 4]))
    b = m.admit([1, 2, 9])
    assert (b.block_table, m.manager.block_copies, m.cached()) == ([0], [(0, 0)], [])


@pytest.mark.parametrize("is_held", [False, True])
def test_a_sequence_that_needs_the_whole_pool(stage: ModuleType, is_held: bool) -> None:
    """A whole block and a part of another one, which is copied into itself, unless somebody holds it."""
    m = Manager(stage, 2, 4)
    a = m.admit([1, 2, 3, 4, 5, 6, 7, 8])
    if not is_held:
        m.manager.free(a)
    seq = make_seq(stage, "b", [1, 2, 3, 4, 5, 6, 9, 9])
    computed = m.manager.get_computed_blocks(seq)
    assert computed == ([0, 1], 6)
    seq.num_computed_tokens = 6
    before = m.state()
    assert m.manager.allocate_slots(seq, 2, computed=computed) is not is_held
    if is_held:
        assert m.state() == before and seq.block_table == []
        return
    assert (seq.block_table, m.manager.block_copies, m.cached()) == ([0, 1], [(1, 1)], [0])
    m.compute(seq, 2)
    assert m.match([1, 2, 3, 4, 5, 6, 9, 9, 1]) == ([0, 1], 8)
    assert m.match([1, 2, 3, 4, 5, 6, 7, 8, 1]) == ([0, 1], 6), "the other text is gone"


def test_a_part_of_a_block_that_others_hold(stage: ModuleType) -> None:
    """It takes one free block more than is written anew, and no reserve."""
    m = Manager(stage, 4, 4)
    a = m.admit([1, 2, 3, 4, 5, 6, 7, 8])
    seq = make_seq(stage, "b", [1, 2, 3, 4, 5, 6, 9, 9, 9])
    computed = m.manager.get_computed_blocks(seq)
    seq.num_computed_tokens = computed.num_tokens
    assert not m.manager.allocate_slots(seq, 3, 1, computed)
    assert m.manager.allocate_slots(seq, 3, 0, computed)
    assert (seq.block_table, m.manager.block_copies) == ([0, 2, 3], [(1, 2)])
    assert [block.ref_cnt for block in m.pool.blocks] == [2, 1, 1, 1]
    m.pool.check_integrity([a.block_table, seq.block_table])


def test_what_has_been_copied_is_kept_for_longer(stage: ModuleType) -> None:
    """It is the oldest, but has been of use: the other one goes first, also for this very allocation."""
    m = Manager(stage, 2, 4)
    for tokens in ([1, 2, 3, 4], [5, 6, 7, 8]):
        m.manager.free(m.admit(tokens))
    assert m.free() == [0, 1]
    b = m.admit([1, 2, 9])
    assert (b.block_table, m.manager.block_copies, m.cached()) == ([1], [(0, 1)], [0])


def test_a_copy_for_somebody_who_loses_his_place_is_withdrawn(stage: ModuleType) -> None:
    """Its target may be somebody else's in the same step; the copies of others stay."""
    m = Manager(stage, 8, 4)
    m.admit([1, 2, 3, 4])
    a, b = m.admit([1, 2, 8]), m.admit([1, 2, 3, 9])
    assert m.manager.block_copies == [(0, 1), (0, 2)]
    m.manager.free(a)
    assert m.manager.block_copies == [(0, 2)]
    c = m.admit([70, 71])
    assert (b.block_table, c.block_table) == ([2], [1])
    assert m.manager.take_block_copies() == [(0, 2)] and m.manager.take_block_copies() == []
    assert m.manager.make_stats()["num_copied_blocks"] == 1


# ---------------------------------------------------------------------- figures, pictures, soundness


def test_the_hit_rate_is_of_the_last_thousand(stage: ModuleType) -> None:
    """Item 36: 0 before the first; what is older than a thousand sequences does not count."""
    stats = submodule(stage, "metrics.stats").PrefixCacheStats()
    assert stats.hit_rate == 0.0
    stats.record(1000, 900)
    assert stats.hit_rate == 0.9
    for _ in range(999):
        stats.record(10, 0)
    assert stats.hit_rate == 900 / 10_990
    stats.record(10, 5)
    assert (stats.hit_rate, stats.queries, stats.hits) == (5 / 10_000, 11_000, 905)


def test_the_tree(stage: ModuleType) -> None:
    """Rows of blocks are joined up to where prefixes part; who lost his parent stands for himself."""
    m = Manager(stage, 8, 2)
    a, b = m.admit([1, 2, 3, 4, 5, 6]), m.admit([1, 2, 3, 4, 7, 8])
    (root,) = m.cache.as_tree()
    assert (root.block_ids, root.token_ids, root.ref_cnt) == ([0, 1], [1, 2, 3, 4], 2)
    assert [(node.token_ids, node.ref_cnt, node.is_orphan) for node in root.children] == [
        ([5, 6], 1, False),
        ([7, 8], 1, False),
    ]
    text = lab.render_prefix_cache(m.manager).splitlines()
    assert text == [
        "prefix cache: 4 blocks of 2 tokens",
        "└─ 2 × [1 2 3 4] held by 2",
        "   ├─ 1 × [5 6] held by 1",
        "   └─ 1 × [7 8] held by 1",
    ]
    m.manager.free(a)
    m.manager.free(b)
    assert lab.render_prefix_cache(m.manager, lambda ids: "".join(map(str, ids))).splitlines()[1:] == [
        "└─ 2 × [1234] free, 2 go before it",
        "   ├─ 1 × [56] free, 0 go before it",
        "   └─ 1 × [78] free, 1 go before it",
    ]
    m.cache.evict(m.pool.blocks[0])
    assert [node.is_orphan for node in m.cache.as_tree()] == [True]
    assert "… 3 4" in lab.render_prefix_cache(m.manager)


def test_the_tree_parts_where_others_hold_the_blocks(stage: ModuleType) -> None:
    """A row of which two hold the beginning, and one all but the last block, which is free."""
    m = Manager(stage, 8, 2)
    c = m.admit([1, 2, 3, 4, 5, 6])
    m.admit([1, 2, 3, 4, 9])
    m.admit([1, 2, 7])
    m.manager.free(c)
    assert lab.render_prefix_cache(m.manager).splitlines()[1:] == [
        "└─ 1 × [1 2] held by 2",
        "   └─ 1 × [3 4] held by 1",
        "      └─ 1 × [5 6] free, 0 go before it",
    ]


@pytest.mark.parametrize("damage", ["hash", "map", "children"])
def test_corruption_is_found(stage: ModuleType, damage: str) -> None:
    m = Manager(stage, 4, 2)
    m.manager.free(m.admit([1, 2, 3]))
    m.pool.check_integrity([])
    if damage == "hash":
        m.pool.blocks[0].block_hash = None
    elif damage == "map":
        m.cache._blocks.clear()
    else:
        m.cache._children.clear()
    with pytest.raises(RuntimeError, match="cached"):
        m.pool.check_integrity([])


def test_a_preempted_sequence_finds_its_own_blocks(stage: ModuleType) -> None:
    """It counts once, with what it found when it first came."""
    scheduler = make_scheduler(stage, enable_prefix_caching=True, num_kv_blocks=20, block_size=4)
    seq = make_seq(stage, "a", list(range(10, 20)))
    scheduler.add_sequence(seq)
    output = submodule(stage, "outputs").ModelRunnerOutput
    for _ in range(3):
        scheduler.update_from_output(scheduler.schedule(), output([5], {}, {}))
    scheduler.undo(scheduler.schedule())
    assert (seq.num_computed_tokens, seq.num_tokens) == (0, 13)
    scheduled = scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"a-0": 1}, "twelve tokens in three blocks"
    assert seq.num_cached_tokens == 0
    stats = scheduler.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (10, 0)


def test_who_lost_his_blocks_finds_what_is_left_of_them(stage: ModuleType) -> None:
    """Two who grow in eight blocks: the second is preempted, the first takes its last block, three are found again."""
    sizes = {"max_model_len": 32, "block_size": 4, "num_kv_blocks": 8, "max_num_seqs": 2}
    drive = Drive(stage, enable_prefix_caching=True, **sizes)
    a, b = make_seq(stage, "a", list(range(100, 112)), max_tokens=7), make_seq(stage, "b", list(range(200, 212)))
    for seq in (a, b):
        drive.scheduler.add_sequence(seq)
    drive.step()
    for _ in range(4):
        drive.step()
    assert (len(a.block_table), len(b.block_table), b.num_tokens) == (4, 4, 17)
    table = list(b.block_table)
    hashes = list(b.block_hashes)
    assert ids(drive.step().seqs) == ["a-0"] and drive.waiting == ["b-0"]
    assert a.block_table[-1] == table[-1], "tail before head"
    assert b.block_hashes == hashes and len(hashes) == 4, "never computed twice"
    assert drive.scheduler.num_preemptions == {"no free block": 1}
    assert ids(drive.step().seqs) == ["a-0"] and a.is_finished
    scheduled = drive.step()
    assert scheduled.num_scheduled_tokens == {"b-0": 5}, "twelve of its seventeen tokens were there"
    assert b.block_table[:3] == table[:3] and b.num_cached_tokens == 0
    stats = drive.scheduler.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (24, 0), "it came once"


def test_who_is_looked_up_again_and_again_counts_once(stage: ModuleType) -> None:
    """Item 19: there is no room for the second until the first is done; what it finds is what it finds then."""
    sizes = {"max_model_len": 32, "block_size": 4, "num_kv_blocks": 8, "max_num_seqs": 4}
    drive = Drive(stage, enable_prefix_caching=True, **sizes)
    a = make_seq(stage, "a", list(range(100, 120)), max_tokens=5)
    b = make_seq(stage, "b", [*range(100, 116), *range(300, 316)][:31], max_tokens=1)
    drive.scheduler.add_sequence(a)
    drive.step()
    drive.scheduler.add_sequence(b)
    for _ in range(4):
        assert ids(drive.step().seqs) == ["a-0"]
        assert (b.num_computed_tokens, b.block_table, b.num_cached_tokens) == (0, [], -1)
        assert drive.scheduler.make_stats()["prefix_cache_queries"] == 20
    assert a.is_finished
    assert drive.step().num_scheduled_tokens == {"b-0": 15}
    stats = drive.scheduler.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], b.num_cached_tokens) == (51, 16, 16)


@pytest.mark.parametrize("is_free", [True, False])
def test_a_hit_that_nobody_holds_takes_a_free_block(stage: ModuleType, is_free: bool) -> None:
    """Item 46, at admission: of blocks that others hold none are needed, of free ones as many as are hit.

    `other` runs and leaves 5 blocks of 10; 4 are found, 2 are new.
    """
    sizes = {"max_model_len": 40, "block_size": 4, "num_kv_blocks": 10, "max_num_seqs": 4}
    drive = Drive(stage, enable_prefix_caching=True, **sizes)
    prefix = list(range(100, 116))
    first = make_seq(stage, "first", prefix, max_tokens=1 if is_free else 9)
    other = make_seq(stage, "other", list(range(300, 319 if is_free else 303)), max_tokens=9)
    for seq in (first, other):
        drive.scheduler.add_sequence(seq)
    drive.step()
    num_free = 5
    assert drive.scheduler.kv_cache_manager.num_free_blocks == num_free
    drive.scheduler.add_sequence(make_seq(stage, "last", [*prefix, *range(500, 507)], max_tokens=1))
    scheduled = drive.step()
    assert ("last-0" in scheduled.num_scheduled_tokens) is not is_free
    if not is_free:
        assert scheduled.num_scheduled_tokens["last-0"] == 7


def test_siblings_do_not_count(stage: ModuleType) -> None:
    """They get the prompt's blocks from the first of them; nor do they count when they come back after a failure."""
    sizes = {"max_model_len": 32, "block_size": 4, "num_kv_blocks": 40, "max_num_seqs": 8}
    drive = Drive(stage, enable_prefix_caching=True, **sizes)
    drive.add("a", 10, 8, n=3)
    for _ in range(3):
        drive.step()
    assert drive.running == ["a-0", "a-1", "a-2"]
    drive.fail()
    assert drive.running == []
    drive.step()
    assert drive.running == ["a-0", "a-1", "a-2"]
    stats = drive.scheduler.make_stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], stats["prefix_cache_hit_rate"]) == (10, 0, 0.0)
    assert [seq.num_cached_tokens for seq in drive.seqs.values()] == [0, 0, 0]
    drive.run()


@pytest.mark.parametrize("num_blocks", [106, 105])
def test_hits_do_not_eat_the_reserve(stage: ModuleType, num_blocks: int) -> None:
    """While somebody runs, a hundredth of the blocks is left free, whatever is found.

    One who runs, and three blocks of a text that nobody holds; the newcomer finds these and needs two more.
    """
    sizes = {"max_model_len": 500, "block_size": 4, "num_kv_blocks": num_blocks, "max_num_seqs": 8}
    drive = Drive(stage, enable_prefix_caching=True, **sizes)
    prefix = list(range(900, 912))
    drive.scheduler.add_sequence(make_seq(stage, "first", prefix, max_tokens=1))
    drive.step()
    runs = make_seq(stage, "runs", list(range(398)), max_tokens=40)
    drive.scheduler.add_sequence(runs)
    drive.step()
    manager = drive.scheduler.kv_cache_manager
    assert (len(runs.block_table), drive.scheduler.watermark_blocks) == (100, 1)
    assert manager.num_free_blocks == num_blocks - 100
    last = make_seq(stage, "last", [*prefix, *range(600, 607)], max_tokens=1)
    assert manager.get_computed_blocks(last).num_tokens == 12
    drive.scheduler.add_sequence(last)
    assert ("last-0" in drive.step().num_scheduled_tokens) is (num_blocks == 106)


def test_slots_in_use_beside_siblings(stage: ModuleType) -> None:
    """A block that one has filled and the other has yet to: after the next step, which takes both on, each has two."""
    m = Manager(stage, 8, 8)
    a, sibling = m.admit(list(range(8))), make_seq(stage, "b", list(range(8)))
    m.manager.fork(a, sibling)
    assert (sibling.block_table, sibling.num_computed_tokens) == ([0], 7)
    assert m.manager.num_used_slots([a, sibling]) == 8
    m.append(a, [20])
    assert m.manager.allocate_slots(sibling, 1)
    m.compute(sibling, 1)
    assert (sibling.block_table, m.manager.block_copies) == ([2], [(0, 2)]), "a cached block is never written"
    assert m.manager.num_used_slots([a, sibling]) == 17
    m.pool.check_integrity([a.block_table, sibling.block_table])


def test_a_salt_may_be_any_text(stage: ModuleType) -> None:
    """Also what no encoding has a place for; and no two of them are one."""
    m = Manager(stage, 8, 4)
    m.admit([1] * 9, "\ud800")
    assert m.match([1] * 9, "\ud800")[1] == 8
    assert [m.match([1] * 9, salt)[1] for salt in ("\ud801", "?", None)] == [0, 0, 0]
