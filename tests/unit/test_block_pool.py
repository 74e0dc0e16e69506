"""Blocks that are free and blocks that are held: the queue, the pool, and what `check_integrity` finds.

Where vLLM has a test for the same thing, its number in the checklist (reference/vllm_v1.md, 9.5) stands in the
docstring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import submodule

pytestmark = pytest.mark.since("m3")


def block_pool(stage: ModuleType) -> ModuleType:
    return submodule(stage, "core.block_pool")


def make_queue(stage: ModuleType, num_blocks: int) -> tuple[list[Any], Any]:
    """The blocks, and a queue that holds all of them."""
    module = block_pool(stage)
    blocks = [module.KVCacheBlock(number) for number in range(num_blocks)]
    return blocks, module.FreeKVCacheBlockQueue(blocks)


def free_ids(queue: Any) -> list[int]:
    """What is free, in order; the links agree in both directions, and with the count."""
    blocks: list[Any] = queue.get_all_free_blocks()
    assert len(blocks) == queue.num_free_blocks
    for block in blocks:
        assert block.next_free_block.prev_free_block is block is block.prev_free_block.next_free_block
    return [block.block_id for block in blocks]


def is_unlinked(block: Any) -> bool:
    return block.prev_free_block is None and block.next_free_block is None


# ---------------------------------------------------------------------- the queue


def test_a_new_block(stage: ModuleType) -> None:
    """Item 30: held by nobody and in no queue; blocks are told apart by identity, and no dictionary comes with each."""
    make = block_pool(stage).KVCacheBlock
    block = make(7)
    assert (block.block_id, block.ref_cnt) == (7, 0)
    assert is_unlinked(block)
    assert block != make(7)
    assert not hasattr(block, "__dict__")


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 5])
def test_initial_order_is_by_number(stage: ModuleType, num_blocks: int) -> None:
    """Item 31: …_queue_initialization, and …_get_all_free_blocks."""
    _, queue = make_queue(stage, num_blocks)
    assert free_ids(queue) == list(range(num_blocks))


def test_popleft_append_and_remove(stage: ModuleType) -> None:
    """Item 31: …_queue_operations. Whoever is out of the queue has no neighbours left."""
    blocks, queue = make_queue(stage, 5)
    assert queue.popleft() is blocks[0] and is_unlinked(blocks[0])
    assert free_ids(queue) == [1, 2, 3, 4]
    queue.remove(blocks[2])
    assert is_unlinked(blocks[2])
    assert free_ids(queue) == [1, 3, 4]
    queue.append(blocks[0])
    assert free_ids(queue) == [1, 3, 4, 0]
    queue.remove(blocks[1])
    queue.remove(blocks[0])
    assert free_ids(queue) == [3, 4]
    queue.append(blocks[2])
    assert [queue.popleft().block_id for _ in range(3)] == [3, 4, 2]
    assert free_ids(queue) == []


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_popleft_of_an_empty_queue(stage: ModuleType, num_blocks: int) -> None:
    """Item 31; and nothing is broken by it."""
    blocks, queue = make_queue(stage, num_blocks)
    for _ in blocks:
        queue.popleft()
    for _ in range(2):
        with pytest.raises(ValueError, match="no free blocks"):
            queue.popleft()
    assert free_ids(queue) == []
    for block in reversed(blocks):
        queue.append(block)
    assert free_ids(queue) == list(reversed(range(num_blocks)))


def test_remove_of_a_block_that_is_not_there(stage: ModuleType) -> None:
    blocks, queue = make_queue(stage, 3)
    queue.remove(blocks[1])
    for block in (blocks[1], block_pool(stage).KVCacheBlock(9)):
        with pytest.raises(RuntimeError, match=f"block {block.block_id} is not in the free queue"):
            queue.remove(block)
    assert free_ids(queue) == [0, 2]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_append_of_a_block_that_is_there(stage: ModuleType, number: int) -> None:
    """The links would make a ring."""
    blocks, queue = make_queue(stage, 3)
    with pytest.raises(RuntimeError, match=f"block {number} is in the free queue already"):
        queue.append(blocks[number])
    assert free_ids(queue) == [0, 1, 2]


@given(
    num_blocks=st.integers(1, 6),
    events=st.lists(st.tuples(st.sampled_from(["popleft", "append", "remove"]), st.integers(0, 5)), max_size=60),
)
def test_any_order_of_events_in_the_queue(stage: ModuleType, num_blocks: int, events: list[tuple[str, int]]) -> None:
    """As a deque would have it; drained and refilled on the way (item 32)."""
    blocks, queue = make_queue(stage, num_blocks)
    expected = deque(range(num_blocks))
    for event, number in events:
        block = blocks[number % num_blocks]
        if event == "popleft" and expected:
            assert queue.popleft() is blocks[expected.popleft()]
        elif event == "append" and block.block_id not in expected:
            queue.append(block)
            expected.append(block.block_id)
        elif event == "remove" and block.block_id in expected:
            queue.remove(block)
            expected.remove(block.block_id)
        assert free_ids(queue) == list(expected)
        assert all(is_unlinked(block) != (block.block_id in expected) for block in blocks)


def test_removing_does_not_walk_the_queue(stage: ModuleType) -> None:
    """Item 31: O(1). Of a queue of 1,001 blocks, taking out the middle one touches its two neighbours only."""
    touched: set[int] = set()

    class Watched(block_pool(stage).KVCacheBlock):  # type: ignore[misc, name-defined]
        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name.endswith("_free_block"):
                touched.add(object.__getattribute__(self, "block_id"))
            return value

    blocks = [Watched(number) for number in range(1001)]
    queue = block_pool(stage).FreeKVCacheBlockQueue(blocks)
    touched.clear()
    queue.remove(blocks[500])
    assert touched <= {499, 500, 501}
    assert queue.num_free_blocks == 1000


# ---------------------------------------------------------------------- the pool


def test_blocks_are_given_by_age_and_held_once(stage: ModuleType) -> None:
    pool = block_pool(stage).BlockPool(5)
    assert (pool.num_free_blocks, len(pool.blocks)) == (5, 5)
    assert pool.get_new_blocks(2) == [0, 1]
    assert [block.ref_cnt for block in pool.blocks] == [1, 1, 0, 0, 0]
    assert pool.num_free_blocks == 3
    pool.free_blocks([1, 0])
    assert pool.get_new_blocks(5) == [2, 3, 4, 1, 0], "whoever was freed first is used first"
    assert pool.get_new_blocks(0) == []


def test_a_shared_block_is_free_when_the_last_one_lets_go(stage: ModuleType) -> None:
    pool = block_pool(stage).BlockPool(3)
    table = pool.get_new_blocks(2)
    pool.touch(table)
    pool.touch([0])
    assert [block.ref_cnt for block in pool.blocks] == [3, 2, 0]
    pool.free_blocks(table)
    assert pool.num_free_blocks == 1
    pool.free_blocks(table)
    assert free_ids(pool.free_block_queue) == [2, 1]
    pool.free_blocks([0])
    assert free_ids(pool.free_block_queue) == [2, 1, 0]


def test_touching_a_free_block_takes_it(stage: ModuleType) -> None:
    """Out of the middle of the queue."""
    pool = block_pool(stage).BlockPool(4)
    pool.touch([2])
    assert free_ids(pool.free_block_queue) == [0, 1, 3]
    pool.check_integrity([[2]])


def test_a_block_is_not_freed_twice(stage: ModuleType) -> None:
    pool = block_pool(stage).BlockPool(2)
    with pytest.raises(RuntimeError, match="block 1 is free already"):
        pool.free_blocks([1])
    pool.check_integrity([])


def test_asking_for_more_than_there_is_takes_nothing(stage: ModuleType) -> None:
    pool = block_pool(stage).BlockPool(3)
    pool.get_new_blocks(1)
    with pytest.raises(ValueError, match="3 blocks were asked for, 2 are free"):
        pool.get_new_blocks(3)
    assert free_ids(pool.free_block_queue) == [1, 2]
    assert [block.ref_cnt for block in pool.blocks] == [1, 0, 0]
    pool.check_integrity([[0]])


# ---------------------------------------------------------------------- what check_integrity finds


def lose(pool: Any) -> None:
    pool.free_block_queue.popleft()


def free_twice(pool: Any) -> None:
    pool.free_blocks([0])
    pool.free_blocks([0])


def skip_one(pool: Any) -> None:
    pool.blocks[3].next_free_block = pool.blocks[5]


def free_while_held(pool: Any) -> None:
    pool.free_block_queue.append(pool.blocks[0])


def count_too_many(pool: Any) -> None:
    pool.blocks[1].ref_cnt += 1


def count_too_few(pool: Any) -> None:
    pool.blocks[0].ref_cnt -= 1


def count_one_that_is_free(pool: Any) -> None:
    pool.blocks[4].ref_cnt = 1


def miscount_the_queue(pool: Any) -> None:
    pool.free_block_queue.num_free_blocks -= 1


FAULTS: list[Callable[[Any], None]] = [
    lose,
    free_twice,
    skip_one,
    free_while_held,
    count_too_many,
    count_too_few,
    count_one_that_is_free,
    miscount_the_queue,
]


def sound_pool(stage: ModuleType) -> Any:
    """Six blocks: one table holds 0 and 1, another 0 and 2."""
    pool = block_pool(stage).BlockPool(6)
    pool.get_new_blocks(3)
    pool.touch([0])
    pool.check_integrity([[0, 1], [0, 2]])
    return pool


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault.__name__))
def test_faults_are_found(stage: ModuleType, fault: Callable[[Any], None]) -> None:
    pool = sound_pool(stage)
    fault(pool)
    with pytest.raises(RuntimeError):
        pool.check_integrity([[0, 1], [0, 2]])


@pytest.mark.parametrize(
    "tables",
    [[[0, 1], [2]], [[0, 1]], [[0, 1], [0, 2, 3]], [[0, 1], [0, 1]], [[0, 1], [0, 2], [0]], [], [[0, 0, 1], [2, 2]]],
)
def test_tables_that_do_not_fit_the_counts_are_found(stage: ModuleType, tables: list[list[int]]) -> None:
    with pytest.raises(RuntimeError, match=r"\d sequences hold \d, counted \d"):
        sound_pool(stage).check_integrity(tables)
