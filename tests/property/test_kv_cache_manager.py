"""Pool and manager under any order of events: no block is lost, none is given twice, and nobody reads another's tokens.

There is no model here. A list stands for the cache, in which every token that "runs" leaves whose it is and where it
stands; copies are carried out on it as the runner would, and each sequence must read back what it is made of.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ..conftest import submodule
from .test_scheduler import make_seqs

pytestmark = pytest.mark.since("m3")


def run_machine(machine: type[RuleBasedStateMachine], stage: ModuleType) -> None:
    class Machine(machine):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(stage)

    examples = 8 * settings().max_examples  # they cost little
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=examples, stateful_step_count=30)
    )


# ---------------------------------------------------------------------- the pool


class Pool(RuleBasedStateMachine):
    """Tables that hold blocks, some the same ones."""

    def __init__(self, stage: ModuleType) -> None:
        super().__init__()
        self.stage = stage

    @initialize(num_blocks=st.integers(0, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = submodule(self.stage, "core.block_pool").BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.free = list(range(num_blocks))  # in order

    @rule(num=st.integers(0, 9))
    def take(self, num: int) -> None:
        if num > len(self.free):
            with pytest.raises(ValueError, match=f"{num} blocks were asked for, {len(self.free)} are free"):
                self.pool.get_new_blocks(num)
            return
        taken, self.free = self.free[:num], self.free[num:]
        assert self.pool.get_new_blocks(num) == taken
        self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        part = table[: data.draw(st.integers(0, len(table)))]
        self.pool.touch(part)
        self.tables.append(list(part))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free_blocks(reversed(table))
        held = {block for other in self.tables for block in other}
        self.free += [block for block in reversed(table) if block not in held]

    @invariant()
    def it_is_sound(self) -> None:
        self.pool.check_integrity(self.tables)
        assert [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()] == self.free
        assert self.pool.num_free_blocks == len(self.free)
        counts = Counter(block for table in self.tables for block in table)
        assert [block.ref_cnt for block in self.pool.blocks] == [counts[at] for at in range(len(self.pool.blocks))]


def test_any_order_of_events_in_the_pool(stage: ModuleType) -> None:
    run_machine(Pool, stage)


# ---------------------------------------------------------------------- the manager

Token = tuple[str, int]


class GhostCache:
    """A cache that remembers whose token every slot holds: the prompt's, which all siblings share, or one's own."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[Token | None] = [None] * (num_blocks * block_size)

    def run(self, block_copies: list[tuple[int, int]], num_new: dict[Any, int]) -> None:
        """What the runner does with a step: the copies, all read before any is written, and then the forward pass.

        Args:
            num_new: {sequence: how many of its computed tokens are of this step}.
        """
        targets = [target for _, target in block_copies]
        assert len(set(targets)) == len(targets), "two copies to one block"
        read = [self.slots[source * self.block_size : (source + 1) * self.block_size] for source, _ in block_copies]
        for target, content in zip(targets, read, strict=True):
            self.slots[target * self.block_size : (target + 1) * self.block_size] = content
        written = set()
        for seq, num in num_new.items():
            for position in range(seq.num_computed_tokens - num, seq.num_computed_tokens):
                slot = self.slot(seq, position)
                assert slot not in written, "two tokens in one slot"
                written.add(slot)
                self.slots[slot] = self.token(seq, position)

    def check(self, seq: Any) -> None:
        """`seq` reads what it, or a sibling, has written."""
        read = [self.slots[self.slot(seq, position)] for position in range(seq.num_computed_tokens)]
        assert read == [self.token(seq, position) for position in range(seq.num_computed_tokens)]

    def slot(self, seq: Any, position: int) -> int:
        return int(seq.block_table[position // self.block_size] * self.block_size + position % self.block_size)

    def token(self, seq: Any, position: int) -> Token:
        return (seq.request_id if position < seq.num_prompt_tokens else seq.seq_id), position

    def num_used_slots(self, seqs: list[Any]) -> int:
        """Slots that hold a token of one of `seqs`, counted one by one."""
        return len({self.slot(seq, position) for seq in seqs for position in range(seq.num_computed_tokens)})


class Manager(RuleBasedStateMachine):
    """Sequences are admitted, forked, decoded, preempted in the middle of a step, and leave."""

    def __init__(self, stage: ModuleType) -> None:
        super().__init__()
        self.stage = stage
        self.seqs: list[Any] = []
        self.num_requests = 0

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = submodule(self.stage, "core.kv_cache_manager").KVCacheManager(num_blocks, block_size)
        self.block_size = block_size
        self.cache = GhostCache(num_blocks, block_size)
        assert (self.manager.num_blocks, self.manager.num_free_blocks) == (num_blocks, num_blocks)

    # ------------------------------------------------------------------ events

    @rule(prompt_len=st.integers(1, 12), num_siblings=st.integers(0, 3), num_reserved=st.sampled_from([0, 0, 1, 3]))
    def admit(self, prompt_len: int, num_siblings: int, num_reserved: int) -> None:
        """A prompt, and siblings that share it before it has run."""
        parent, *children = make_seqs(self.stage, f"{self.num_requests}", prompt_len, n=num_siblings + 1)
        self.num_requests += 1
        if not self.allocate(parent, prompt_len, num_reserved):
            return
        assert len(parent.block_table) == -(-prompt_len // self.block_size)
        self.seqs.append(parent)
        parent.num_computed_tokens = prompt_len
        for child in children:
            before = self.manager.num_free_blocks
            self.manager.fork(parent, child)
            assert child.block_table == parent.block_table and child.block_table is not parent.block_table
            assert child.num_computed_tokens == prompt_len - 1
            assert self.manager.num_free_blocks == before, "sharing costs nothing"
            self.seqs.append(child)
        self.run([parent], prompt_len)

    @precondition(lambda self: self.seqs)
    @rule(
        order=st.randoms(use_true_random=False),
        victims=st.lists(st.integers(0, 12), max_size=2),
        num_idle=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def decode(self, order: Any, victims: list[int], num_idle: int) -> None:
        """One token of each, but for a few; `victims`, and whoever finds no block, lose theirs in the middle of it."""
        going = list(self.seqs)
        order.shuffle(going)
        del going[:num_idle]
        for number, seq in enumerate(going):
            if number in victims and self.seqs:
                self.free(order.choice(self.seqs))
            if seq in self.seqs and not self.allocate(seq, 1):
                self.free(seq)
        going = [seq for seq in going if seq in self.seqs]
        for seq in going:
            seq.num_computed_tokens += 1
        self.run(going, 1)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.free(data.draw(st.sampled_from(self.seqs)))

    # ------------------------------------------------------------------ what an event consists of

    def allocate(self, seq: Any, num_new: int, num_reserved: int = 0) -> bool:
        """Item 45: all or nothing. Item 46: the block that a copy goes to counts as needed."""
        before, num_free = self.state(), self.manager.num_free_blocks
        table, num_copies = list(seq.block_table), len(self.manager.block_copies)
        first = seq.num_computed_tokens // self.block_size
        is_shared = first < len(table) and self.manager.block_pool.blocks[table[first]].ref_cnt > 1
        needed = -(-(seq.num_computed_tokens + num_new) // self.block_size) - len(table) + is_shared
        fits = needed + num_reserved <= num_free
        assert self.manager.allocate_slots(seq, num_new, num_reserved) is fits
        if not fits:
            assert self.state() == before, "something changed"
            return False
        assert self.manager.num_free_blocks == num_free - needed
        assert len(seq.block_table) * self.block_size >= seq.num_computed_tokens + num_new
        copies = self.manager.block_copies[num_copies:]
        assert copies == ([(table[first], seq.block_table[first])] if is_shared else [])
        kept = first if is_shared else len(table)
        assert seq.block_table[:kept] == table[:kept]
        assert self.manager.block_pool.blocks[seq.block_table[first]].ref_cnt == 1, "it would write into another's"
        return True

    def free(self, seq: Any) -> None:
        """Of its blocks those become free that nobody else holds, the last one first."""
        self.seqs.remove(seq)
        held = {block for other in self.seqs for block in other.block_table}
        expected = [block for block in reversed(seq.block_table) if block not in held]
        before = self.free_blocks()
        self.manager.free(seq)
        assert self.free_blocks() == before + expected
        assert seq.block_table == []
        seq.num_computed_tokens = 0

    def run(self, seqs: list[Any], num_new: int) -> None:
        copies, self.manager.block_copies = self.manager.block_copies, []
        self.cache.run(copies, dict.fromkeys(seqs, num_new))

    def free_blocks(self) -> list[int]:
        return [block.block_id for block in self.manager.block_pool.free_block_queue.get_all_free_blocks()]

    def state(self) -> Any:
        counts = [block.ref_cnt for block in self.manager.block_pool.blocks]
        return self.free_blocks(), counts, list(self.manager.block_copies), [list(seq.block_table) for seq in self.seqs]

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def it_is_sound(self) -> None:
        self.manager.block_pool.check_integrity([seq.block_table for seq in self.seqs])
        assert self.manager.block_copies == []
        held = {block for seq in self.seqs for block in seq.block_table}
        assert self.manager.num_used_blocks == len(held)
        assert self.manager.num_used_blocks + self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_used_slots(self.seqs) == self.cache.num_used_slots(self.seqs)

    @invariant()
    def everybody_reads_his_own_tokens(self) -> None:
        for seq in self.seqs:
            self.cache.check(seq)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for seq in list(self.seqs):
                self.free(seq)
            assert sorted(self.free_blocks()) == list(range(self.manager.num_blocks))
            self.manager.block_pool.check_integrity([])


def test_any_order_of_events_in_the_manager(stage: ModuleType) -> None:
    run_machine(Manager, stage)


# ---------------------------------------------------------------------- by hand


def make_manager(stage: ModuleType, num_blocks: int, block_size: int) -> Any:
    return submodule(stage, "core.kv_cache_manager").KVCacheManager(num_blocks, block_size)


@given(prompt_len=st.integers(1, 40), block_size=st.integers(1, 20), num_siblings=st.integers(1, 7))
def test_full_blocks_of_a_shared_prompt_are_held_once(
    prompt_len: int, block_size: int, num_siblings: int, stage: ModuleType
) -> None:
    """After everybody's first own token: what only the prompt fills is one block for all, the last one is each one's.

    A child computes the prompt's last token again, so the block with that token is copied too; the last child to come
    may write into what all others have left.
    """
    manager = make_manager(stage, 200, block_size)
    parent, *children = make_seqs(stage, "a", prompt_len, n=num_siblings + 1)
    assert manager.allocate_slots(parent, prompt_len)
    parent.num_computed_tokens = prompt_len
    for child in children:
        manager.fork(parent, child)
    num_prompt_blocks = -(-prompt_len // block_size)
    assert manager.num_used_blocks == num_prompt_blocks
    for seq in (parent, *children):
        assert manager.allocate_slots(seq, 1)
        seq.num_computed_tokens += 1
    num_shared = (prompt_len - 1) // block_size
    tables = [seq.block_table for seq in (parent, *children)]
    assert all(table[:num_shared] == tables[0][:num_shared] for table in tables)
    own = [block for table in tables for block in table[num_shared:]]
    assert len(set(own)) == len(own)
    is_full = prompt_len % block_size == 0
    # Of a full last block the parent keeps the first copy; of one that is not, everybody but the last child gets one.
    assert len(manager.block_copies) == num_siblings
    assert manager.num_used_blocks == num_shared + num_siblings + 1 + is_full
    manager.block_pool.check_integrity(tables)


def test_a_failed_allocation_gives_no_part(stage: ModuleType) -> None:
    """Item 45, where a part would fit: two blocks are needed and one is free, or a copy and a new block."""
    manager = make_manager(stage, 4, 2)
    a, b = make_seqs(stage, "a", 5, n=2)
    assert manager.allocate_slots(a, 5)  # blocks 0, 1, 2
    a.num_computed_tokens = 5
    (c,) = make_seqs(stage, "c", 3)
    assert not manager.allocate_slots(c, 3)
    assert (c.block_table, manager.num_free_blocks) == ([], 1)
    assert not manager.allocate_slots(c, 2, num_reserved_blocks=1)
    manager.fork(a, b)
    assert not manager.allocate_slots(a, 2), "a copy of block 2, and a block after it"
    assert (a.block_table, manager.block_copies, manager.num_free_blocks) == ([0, 1, 2], [], 1)
    assert manager.allocate_slots(a, 1)
    assert (a.block_table, manager.block_copies, manager.num_free_blocks) == ([0, 1, 3], [(2, 3)], 0)
    assert manager.allocate_slots(b, 1), "block 2 is his alone by now"
    assert (b.block_table, manager.block_copies) == ([0, 1, 2], [(2, 3)])


def test_a_copy_that_nobody_waits_for_is_not_made(stage: ModuleType) -> None:
    """Preempted in the step in which it was given a copy: the block goes to somebody else, with other contents."""
    manager = make_manager(stage, 2, 4)
    parent, child = make_seqs(stage, "a", 2, n=2)
    assert manager.allocate_slots(parent, 2)
    parent.num_computed_tokens = 2
    manager.fork(parent, child)
    assert manager.allocate_slots(child, 1)
    assert manager.block_copies == [(0, 1)]
    manager.free(child)
    assert manager.block_copies == []
    (other,) = make_seqs(stage, "b", 3)
    assert manager.allocate_slots(other, 3)
    assert (other.block_table, manager.block_copies) == ([1], [])


def test_blocks_are_freed_tail_first(stage: ModuleType) -> None:
    """Item 42: who needs a block next takes a tail, not a head that others might still find useful."""
    manager = make_manager(stage, 8, 2)
    (a,), (b,) = make_seqs(stage, "a", 6), make_seqs(stage, "b", 4)
    assert manager.allocate_slots(a, 6) and manager.allocate_slots(b, 4)
    manager.free(b)
    manager.free(a)
    free = manager.block_pool.free_block_queue.get_all_free_blocks()
    assert [block.block_id for block in free] == [5, 6, 7, 4, 3, 2, 1, 0]


def test_a_block_that_is_full_for_one_has_no_empty_slot(stage: ModuleType) -> None:
    """It is the last one of two siblings, which compute its last token again, and in the middle of their parent's."""
    manager = make_manager(stage, 8, 4)
    parent, *children = make_seqs(stage, "a", 8, n=3)
    assert manager.allocate_slots(parent, 8)
    parent.num_computed_tokens = 8
    for child in children:
        manager.fork(parent, child)
    assert [child.num_computed_tokens for child in children] == [7, 7]
    assert manager.num_used_slots([parent, *children]) == 8
    assert manager.allocate_slots(parent, 1)
    parent.num_computed_tokens = 9
    assert manager.num_used_slots([parent, *children]) == 9
    manager.free(parent)
    assert manager.num_used_slots(children) == 7
