"""Paging as a whole: blocks that run out, prompts that are shared, and tokens that do not notice.

First the scheduler without a model, under any order of events in pools that are too small; then by hand what a policy
promises; then engines whose pools are so small that everybody is preempted again and again. Unwritten slots hold nan.
Where vLLM has a test for the same thing, its number in the checklist (reference/vllm_v1.md, 9) stands in the docstring.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from folovllm.stages import known_stages

from .. import strategies
from ..checkpoints import SPECS
from ..conftest import CheckpointPath, GetOracle, MakeLLM, forget_prefixes, open_llm, phases_apart, submodule
from ..unit.test_cache import caches
from .test_batching import failing_at, finish_all
from .test_engine import check_empty, result_of
from .test_kv_cache_manager import GhostCache
from .test_scheduler import MAX_MODEL_LEN, POLICIES, Drive, Events, ids, make_scheduler, num_tokens, run_events

pytestmark = pytest.mark.since("m3")

every_policy = pytest.mark.parametrize("policy", POLICIES)


def free_blocks(scheduler: Any) -> int:
    return int(scheduler.kv_cache_manager.num_free_blocks)


# ---------------------------------------------------------------------- any order of events, too few blocks


class EventsWithBlocks(Events):
    """Rows abound, or not; blocks are few. A ghost of the cache checks who reads what."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.sampled_from([0, 9, 60]),
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        extra_blocks=st.integers(0, 6),
        watermark=st.sampled_from([0, 0, 1, 2]),
    )
    def start(  # type: ignore[override]
        self, policy: str, max_num_seqs: int, extra_budget: int, block_size: int, extra_blocks: int, watermark: int
    ) -> None:
        self.policy, self.max_num_seqs, self.budget = policy, max_num_seqs, MAX_MODEL_LEN + extra_budget
        self.block_size, self.num_blocks = block_size, math.ceil(MAX_MODEL_LEN / block_size) + extra_blocks
        self.scheduler = make_scheduler(
            self.stage,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            scheduling_policy=policy,
            block_size=block_size,
            num_kv_blocks=self.num_blocks,
            **phases_apart(self.stage),
        )
        self.scheduler.watermark_blocks = self.watermark = watermark  # 1 % of so few would be none
        self.manager = self.scheduler.kv_cache_manager
        self.cache = GhostCache(self.num_blocks, block_size)
        self.num_prefills_in_a_row = 0

    @precondition(lambda self: self.seqs)
    @rule(leaver=st.none() | st.integers(0, 3))
    def failing_step(self, leaver: int | None) -> None:
        """Who took part, or shares what the step should have computed, starts over; nobody is overtaken by it."""
        waiting = list(self.scheduler.waiting)
        running = list(self.scheduler.running)
        scheduled = self.schedule()
        newcomers = [seq for seq in self.scheduler.running if seq not in running]
        rest = [seq for seq in self.scheduler.running if seq not in scheduled.seqs and seq not in newcomers]
        untouched = [seq for seq in rest if seq.num_output_tokens > 0]  # siblings that have not run yet start over, too
        before = list(self.scheduler.running)
        self.abort_one_of(scheduled.seqs, leaver)
        self.scheduler.undo(scheduled)
        self.note_departures(before)
        self.departures.update(scheduled.retired_seq_ids)  # nobody has heard
        assert self.scheduler.running == untouched
        if self.policy == "fcfs" and scheduled.is_prefill:
            siblings = [seq for seq in rest if seq not in untouched]
            assert list(self.scheduler.waiting) == [seq for seq in siblings + waiting if not seq.is_finished]

    def schedule(self) -> Any:
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        computed = {seq.seq_id: seq.num_computed_tokens for seq in running}
        counts, num_free = Counter(self.scheduler.num_preemptions), self.manager.num_free_blocks
        scheduled = self.scheduler.schedule()
        victims = self.note_departures(running)
        # An urgent one may need less than its victims had, so that one of these is admitted again in the same step.
        again = [seq for seq in running if seq in scheduled.seqs and seq.seq_id in scheduled.retired_seq_ids]
        for seq in again:
            computed[seq.seq_id] = 0
            self.departures[seq.seq_id] += 1
        victims += again
        assert not again or self.policy == "priority"
        assert Counter(scheduled.retired_seq_ids) == self.departures, "somebody's departure was lost, or told twice"
        self.departures.clear()

        seqs, nums = scheduled.seqs, num_tokens(scheduled)
        assert 0 < len(seqs) <= len(self.scheduler.running) <= self.max_num_seqs
        assert len(seqs) == len(set(ids(seqs)))
        assert min(nums) > 0 and sum(nums) == scheduled.total_num_scheduled_tokens <= self.budget
        self.cache.run(scheduled.block_copies, dict(zip(seqs, nums, strict=True)))
        for seq, num in zip(seqs, nums, strict=True):
            assert seq.status is self.status.RUNNING and seq in self.scheduler.running
            assert seq.num_computed_tokens == computed.get(seq.seq_id, 0) + num == seq.num_tokens
            self.cache.check(seq)
        assert self.manager.block_copies == []

        new = Counter(self.scheduler.num_preemptions)
        new.subtract(counts)
        assert +new == +Counter({"urgent": new["urgent"], "no free block": new["no free block"]})
        assert new["urgent"] + new["no free block"] == len(victims)
        self.check_blocks_ran_out(scheduled, running, victims, new)
        self.check_admission(scheduled, waiting, running, victims, num_free)
        return scheduled

    def check_blocks_ran_out(self, scheduled: Any, running: list[Any], victims: list[Any], new: Counter[str]) -> None:
        """Item 25: only when nobody is admitted, and then the last admitted one, or the least urgent."""
        if not new["no free block"]:
            return
        assert not scheduled.is_prefill
        stayed = [seq for seq in running if seq not in victims]
        assert scheduled.seqs == self.scheduler.running == stayed
        if self.policy == "priority":
            assert max(map(self.key, stayed)) <= min(map(self.key, victims))
        else:
            assert running[: len(stayed)] == stayed
        if not new["urgent"]:  # with one victim less they would not have fitted
            last = min(victims, key=self.key) if self.policy == "priority" else running[len(stayed)]
            # It had its own token's block at most, and whoever stayed got what they needed from the others'.
            assert self.manager.num_free_blocks <= -(-last.num_tokens // self.block_size)

    def check_admission(
        self, scheduled: Any, waiting: list[Any], running: list[Any], victims: list[Any], num_free: int
    ) -> None:
        forced = self.num_prefills_in_a_row >= 8 and running != []
        self.num_prefills_in_a_row = self.num_prefills_in_a_row + 1 if scheduled.is_prefill else 0
        stayed = [seq for seq in running if seq not in victims]
        if forced:
            assert not scheduled.is_prefill
        if not scheduled.is_prefill:
            assert scheduled.seqs == self.scheduler.running == stayed
            assert num_tokens(scheduled) == [1] * len(stayed)
            if forced or not waiting or victims:
                return
            following, budget, room, free, others = waiting[0], self.budget, len(running), num_free, stayed
            parents: dict[str, Any] = {}
            num_forked = 0
        else:
            admitted = self.scheduler.running[len(stayed) :]
            left = list(self.scheduler.waiting)
            assert self.scheduler.running[: len(stayed)] == stayed and scheduled.seqs
            if victims:
                keys = [self.key(seq) for seq in admitted + left]
                assert keys == sorted(keys), "somebody was overtaken"
            else:
                assert admitted + left == waiting, "somebody was overtaken"
            parents = {}
            expected = []
            for seq in admitted:
                parent = parents.get(seq.request_id)
                if parent is None or seq.num_output_tokens:
                    expected.append(seq)
                    if seq.num_output_tokens == 0:
                        parents[seq.request_id] = seq
                else:  # it shares what is being computed, and takes part from the next step on
                    assert seq.block_table == parent.block_table
                    assert seq.num_computed_tokens == seq.num_prompt_tokens - 1
                    assert seq.status is self.status.RUNNING
            assert scheduled.seqs == expected
            if admitted[-1] not in expected:
                own = len(admitted) - len(expected)  # blocks that siblings will copy to
                assert self.manager.num_free_blocks >= own + (self.watermark if len(admitted + stayed) > 1 else 0)
            if len(stayed) + len(admitted) > 1 and not (len(admitted) == 1 and not stayed):
                assert self.manager.num_free_blocks >= self.watermark, "the reserve was given away"
            num_forked = len(admitted) - len(expected)
            if not left:
                return
            following = left[0]
            budget = self.budget - scheduled.total_num_scheduled_tokens
            room, free, others = len(self.scheduler.running), self.manager.num_free_blocks, self.scheduler.running
        num_forked += sum(seq.num_output_tokens == 0 for seq in stayed)  # of an earlier step: they have not run yet
        reserve = (self.watermark if others else 0) + num_forked
        if following.num_output_tokens == 0 and following.request_id in parents:
            could = room < self.max_num_seqs and free > reserve
        else:
            needed = -(-following.num_tokens // self.block_size)
            could = following.num_tokens <= budget and room < self.max_num_seqs and needed + reserve <= free
        assert not could, "it would have fitted"

    @invariant()
    def nobody_shares_the_cache(self) -> None:
        """Nobody who should not: every block is held as often as it is counted."""
        running = self.scheduler.running
        self.manager.block_pool.check_integrity([seq.block_table for seq in running])
        stats = self.scheduler.make_stats()
        assert stats["num_running"] == len(running) and stats["num_waiting"] == len(self.scheduler.waiting)
        assert stats["kv_slots"] == self.num_blocks * self.block_size
        held = {block for seq in running for block in seq.block_table}
        assert stats["kv_slots_allocated"] == len(held) * self.block_size
        assert stats["kv_slots_used"] == self.cache.num_used_slots(running)
        assert stats["num_preemptions"] == sum(self.scheduler.num_preemptions.values())

    @invariant()
    def all_but_the_newest_token_is_computed(self) -> None:
        assert all(seq.num_computed_tokens == seq.num_tokens - 1 for seq in self.scheduler.running)

    def most_steps_to_the_end(self) -> int:
        """Whoever runs gets a token, also in the step in which his prompt and output are computed again."""
        return sum(seq.request.max_tokens - seq.num_output_tokens for seq in self.seqs.values())

    def teardown(self) -> None:
        """Item 21: in the end every block is free, and held by nobody."""
        super().teardown()
        if hasattr(self, "scheduler"):
            assert self.manager.num_free_blocks == self.num_blocks
            self.manager.block_pool.check_integrity([])


def test_any_order_of_events_with_few_blocks(stage: ModuleType) -> None:
    run_events(stage, EventsWithBlocks)


# ---------------------------------------------------------------------- by hand


def with_blocks(stage: ModuleType, num_kv_blocks: int, block_size: int, **options: Any) -> Drive:
    return Drive(stage, **{"num_kv_blocks": num_kv_blocks, "block_size": block_size, "max_num_seqs": 8, **options})


def test_the_last_admitted_gives_way(stage: ModuleType) -> None:
    """Item 15, test_preempt_during_execution: ten blocks, two prompts of five, and the first one wants a sixth."""
    drive = with_blocks(stage, 10, 16, max_model_len=160)
    drive.add("a", 80, 4)
    drive.add("b", 80, 4)
    drive.step()
    assert free_blocks(drive.scheduler) == 0
    scheduled = drive.step()
    assert (drive.running, drive.waiting) == (["a-0"], ["b-0"])
    assert (scheduled.is_prefill, scheduled.retired_seq_ids) == (False, ["b-0"])
    b = drive.seqs["b-0"]
    assert b.status is stage.SequenceStatus.PREEMPTED
    assert (b.num_computed_tokens, b.block_table, b.num_output_tokens) == (0, [], 1)
    assert drive.scheduler.num_preemptions == {"no free block": 1}
    assert free_blocks(drive.scheduler) == 4
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [4, 4]
    assert drive.scheduler.num_preemptions == {"no free block": 1}


def test_only_as_many_give_way_as_there_is_need(stage: ModuleType) -> None:
    """Three of four stay: the last one's blocks are enough for the two that wanted one."""
    drive = with_blocks(stage, 8, 4, max_model_len=32)
    for name in "abcd":
        drive.add(name, 8, 9)
    drive.step()
    drive.step()
    assert (drive.running, drive.waiting) == (["a-0", "b-0"], ["c-0", "d-0"])
    drive = with_blocks(stage, 8, 4, max_model_len=32)
    for name, length in (("a", 8), ("b", 7), ("c", 7), ("d", 8)):
        drive.add(name, length, 9)
    drive.step()
    drive.step()
    assert (drive.running, drive.waiting) == (["a-0", "b-0", "c-0"], ["d-0"])
    assert drive.scheduler.num_preemptions == {"no free block": 1}


@every_policy
def test_nobody_is_admitted_in_a_step_that_ran_out_of_blocks(stage: ModuleType, policy: str) -> None:
    """A small one would fit into what the victim left, and in two of the policies comes before it."""
    drive = with_blocks(stage, 10, 16, max_model_len=160, scheduling_policy=policy)
    drive.add("a", 80, 4, arrival=1.0)
    drive.add("b", 80, 4, arrival=2.0)
    drive.step()
    drive.add("small", 3, 4, arrival=1.5)
    scheduled = drive.step()
    assert (ids(scheduled.seqs), scheduled.is_prefill) == (["a-0"], False)
    assert drive.running == ["a-0"] and free_blocks(drive.scheduler) == 4
    assert drive.waiting == (["b-0", "small-0"] if policy == "fcfs" else ["small-0", "b-0"])
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {4}


def test_the_least_urgent_gives_way(stage: ModuleType) -> None:
    """Items 25 and 28: the largest (priority, arrival), wherever it stands; its output is kept and computed again."""
    drive = with_blocks(stage, 15, 16, max_model_len=240, scheduling_policy="priority", **phases_apart(stage))
    for name, priority, arrival in (("late", 3, 1.0), ("good", 0, 2.0), ("early", 3, 0.0)):
        drive.add(name, 80, 30, priority=priority, arrival=arrival)
        if name != "good":
            drive.step()
    assert drive.running == ["late-0", "good-0", "early-0"]
    scheduled = drive.step()
    assert (drive.running, drive.waiting) == (["good-0", "early-0"], ["late-0"])
    assert scheduled.retired_seq_ids == ["late-0"]
    late = drive.seqs["late-0"]
    assert (late.num_computed_tokens, late.num_output_tokens) == (0, 1)
    while late.num_computed_tokens == 0:
        scheduled = drive.step()
    assert scheduled.num_scheduled_tokens == {"late-0": 81}
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {30}
    assert set(drive.scheduler.num_preemptions) == {"no free block"}


def test_an_urgent_one_takes_blocks(stage: ModuleType) -> None:
    """Rows are free, and blocks are not: the least urgent gives his, and this step admits."""
    drive = with_blocks(stage, 10, 16, max_model_len=160, scheduling_policy="priority", **phases_apart(stage))
    drive.add("a", 70, 9, priority=1)
    drive.add("b", 70, 9, priority=2)
    drive.step()
    drive.add("equal", 70, 9, priority=2, arrival=1.0)
    drive.step()
    assert drive.running == ["a-0", "b-0"]
    drive.add("urgent", 70, 9, priority=0)
    scheduled = drive.step()
    assert drive.running == ["a-0", "urgent-0"] and ids(scheduled.seqs) == ["urgent-0"]
    assert drive.waiting == ["b-0", "equal-0"]
    assert drive.scheduler.num_preemptions == {"urgent": 1}
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {9}


def test_the_whole_prompt_must_fit(stage: ModuleType) -> None:
    """Item 51: no part of it is taken, and nobody who is smaller goes first."""
    drive = with_blocks(stage, 10, 16, max_model_len=160)
    drive.add("a", 100, 2)
    drive.add("large", 60, 2)
    drive.add("small", 5, 2)
    drive.step()
    assert (drive.running, drive.waiting, free_blocks(drive.scheduler)) == (["a-0"], ["large-0", "small-0"], 3)
    drive.run()
    assert drive.first == ["a-0", "large-0", "small-0"]


def test_the_watermark(stage: ModuleType) -> None:
    """One block in a hundred stays free for those that run; a lone request may have them all."""
    drive = with_blocks(stage, 250, 1, max_model_len=250)
    assert drive.scheduler.watermark_blocks == 2
    drive.add("a", 100, 2)
    drive.add("b", 148, 2)
    drive.add("c", 1, 2)
    drive.step()
    assert (drive.running, free_blocks(drive.scheduler)) == (["a-0", "b-0"], 2)
    drive.run()
    assert not drive.scheduler.num_preemptions
    drive.add("alone", 249, 1)
    drive.step()
    assert "alone-0" in drive.first


def test_siblings_wait_holding_nothing(stage: ModuleType) -> None:
    """Five of a request and three rows: two are forked; the next ones find no parent in their step and start afresh."""
    drive = with_blocks(stage, 20, 4, max_model_len=40, max_num_seqs=3)
    drive.add("a", 10, 3, n=5)
    scheduled = drive.step()
    assert (ids(scheduled.seqs), num_tokens(scheduled)) == (["a-0"], [10])
    assert drive.running == ["a-0", "a-1", "a-2"]
    assert {tuple(drive.seqs[name].block_table) for name in drive.running} == {(0, 1, 2)}
    assert [drive.seqs[name].block_table for name in drive.waiting] == [[], []]
    scheduled = drive.step()
    assert (ids(scheduled.seqs), scheduled.block_copies) == (["a-0", "a-1", "a-2"], [(2, 3), (2, 4)])
    drive.run()
    assert drive.first == [f"a-{index}" for index in range(5)]
    total = sum(len(step) for step in drive.steps)
    assert total == 5 * 3, "everybody got his tokens one by one"


@pytest.mark.parametrize(("num_blocks", "running"), [(3, 1), (4, 2), (5, 3), (6, 4), (9, 4)])
def test_a_sibling_comes_only_where_a_block_is_free(stage: ModuleType, num_blocks: int, running: int) -> None:
    """Each will want one of its own in the next step."""
    drive = with_blocks(stage, num_blocks, 4, max_model_len=12)
    drive.add("a", 9, 2, n=4)
    drive.step()
    assert len(drive.running) == running
    drive.run()
    assert drive.first == [f"a-{index}" for index in range(4)]


def test_a_preempted_sibling_is_recomputed_on_its_own(stage: ModuleType) -> None:
    """With its output; only those without any are forked."""
    drive = with_blocks(stage, 8, 2, max_model_len=16)
    drive.add("a", 7, 6, n=3)
    drive.step()
    assert drive.running == ["a-0", "a-1", "a-2"]
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {6}
    assert drive.scheduler.num_preemptions["no free block"] > 0
    assert free_blocks(drive.scheduler) == 8


@every_policy
def test_a_failed_step_keeps_siblings_together(stage: ModuleType, policy: str) -> None:
    """The children of a prefill that failed stay before those who came after them."""
    drive = with_blocks(stage, 40, 4, max_model_len=16, scheduling_policy=policy)
    drive.add("a", 3, 2, n=3, arrival=0.0)
    drive.add("b", 3, 2, arrival=1.0)
    before = drive.waiting
    assert before == ["a-0", "a-1", "a-2", "b-0"]
    drive.fail()
    assert drive.waiting == before and drive.running == []
    assert free_blocks(drive.scheduler) == 40
    scheduled = drive.step()
    assert ids(scheduled.seqs) == ["a-0", "b-0"] and drive.running == before
    drive.fail()
    assert drive.waiting == before
    drive.run()
    assert drive.scheduler.num_preemptions == {}


def test_nothing_is_held_for_siblings_that_are_gone(stage: ModuleType) -> None:
    """Aborted right after the step that forked them: not even the scheduler remembers them."""
    drive = with_blocks(stage, 40, 4, max_model_len=16)
    drive.add("a", 3, 2, n=3)
    drive.step()
    for index in range(3):
        drive.scheduler.finish_sequence(f"a-{index}", stage.SequenceStatus.FINISHED_ABORTED)
    assert free_blocks(drive.scheduler) == 40
    drive.scheduler.kv_cache_manager.block_pool.check_integrity([])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_aborting_in_mid_fork_frees_what_nobody_else_holds(
    stage: ModuleType, order: tuple[int, ...], num_steps: int
) -> None:
    """One after the other, before or after their first own tokens; the last one takes the shared blocks with him."""
    drive = with_blocks(stage, 30, 4, max_model_len=40)
    drive.add("other", 9, 9)
    drive.step()
    drive.add("a", 10, 9, n=3)
    for _ in range(num_steps):
        drive.step()
    pool = drive.scheduler.kv_cache_manager.block_pool
    for index in order:
        held = Counter(block for seq in drive.scheduler.running for block in seq.block_table)
        mine = drive.seqs[f"a-{index}"].block_table
        free = free_blocks(drive.scheduler)
        drive.scheduler.finish_sequence(f"a-{index}", stage.SequenceStatus.FINISHED_ABORTED)
        assert free_blocks(drive.scheduler) == free + sum(held[block] == 1 for block in mine)
        pool.check_integrity([seq.block_table for seq in drive.scheduler.running])
    assert 30 - free_blocks(drive.scheduler) == len(drive.seqs["other-0"].block_table)


# ---------------------------------------------------------------------- switched off


def test_without_paging_a_sequence_holds_one_block(stage: ModuleType) -> None:
    """And nobody shares one."""
    drive = with_blocks(stage, 3, 256, max_model_len=200, enable_paged_kv=False)
    drive.add("a", 10, 3, n=4)
    scheduled = drive.step()
    assert num_tokens(scheduled) == [10, 10, 10] and drive.waiting == ["a-3"]
    assert [drive.seqs[name].block_table for name in drive.running] == [[0], [1], [2]]
    drive.run()
    assert free_blocks(drive.scheduler) == 3


def test_without_paging_every_block_is_a_row(stage: ModuleType) -> None:
    """As many run as there are rows; a reserve would be a row that nobody may have."""
    drive = with_blocks(stage, 200, 256, max_model_len=200, max_num_seqs=200, enable_paged_kv=False)
    for number in range(200):
        drive.add(f"{number}", 1, 2)
    drive.step()
    assert len(drive.running) == 200


# ---------------------------------------------------------------------- tokens

PROMPT_AND_OUTPUT = 48

# Each holds one sequence of full length, and hardly more: block size, blocks, rows, policy.
TINY_POOLS: list[dict[str, Any]] = [
    {"block_size": 1, "num_kv_blocks": 50, "max_num_seqs": 5},
    {"block_size": 4, "num_kv_blocks": 12, "max_num_seqs": 6, "scheduling_policy": "sjf"},
    {"block_size": 4, "num_kv_blocks": 15, "max_num_seqs": 6, "scheduling_policy": "priority"},
    {"block_size": 16, "num_kv_blocks": 3, "max_num_seqs": 3},
    {"block_size": 16, "num_kv_blocks": 4, "max_num_seqs": 4, "max_num_batched_tokens": 50},
    {"block_size": 48, "num_kv_blocks": 2, "max_num_seqs": 4},
    {"block_size": 256, "num_kv_blocks": 1, "max_num_seqs": 2},
]

Request = tuple[list[int], dict[str, Any]]


def make_tiny(make_llm: MakeLLM, pool: dict[str, Any], checkpoint: str = "qwen3", **options: Any) -> Any:
    return make_llm(checkpoint, max_model_len=PROMPT_AND_OUTPUT, **pool, **options)


def poison(stage: ModuleType, llm: Any) -> None:
    """Nothing that follows may read what it has not written itself; nor may who comes after that."""
    forget_prefixes(llm)
    for cache in caches(stage, llm):
        cache.fill_(math.nan)


def check_pool(llm: Any) -> None:
    """Every block is held as often as it is counted, and the last record says how much is used."""
    scheduler = llm.engine.core.scheduler
    manager = scheduler.kv_cache_manager
    manager.block_pool.check_integrity([seq.block_table for seq in scheduler.running])
    used = {
        (seq.block_table[position // manager.block_size], position % manager.block_size)
        for seq in scheduler.running
        for position in range(seq.num_computed_tokens)
    }
    held = {block for seq in scheduler.running for block in seq.block_table}
    if llm.engine.stats.steps:
        record = llm.engine.stats.steps[-1]
        assert record.kv_slots_allocated == len(held) * manager.block_size
        assert record.kv_slots_used == len(used)
        assert record.kv_slots == manager.num_blocks * manager.block_size


def check_oracle(stage: ModuleType, oracle: Any, request: Request, output: Any) -> None:
    """Every completion is one that the oracle allows; the n of a request have seeds that follow each other."""
    prompt, arguments = request
    assert output.finished and len(output.outputs) == arguments.get("n", 1)
    for completion in output.outputs:
        own = {**arguments, "n": 1, **({"seed": arguments["seed"] + completion.index} if "seed" in arguments else {})}
        oracle.check(prompt, completion.token_ids, stage.SamplingParams(**own))
        if arguments.get("ignore_eos"):
            assert len(completion.token_ids) == arguments["max_tokens"]


def serve(stage: ModuleType, llm: Any, requests: list[Request], priorities: list[int] | None = None) -> list[Any]:
    """Outputs of requests that come all at once; the pool is sound after every step, and empty in the end."""
    llm.engine.stats.clear()
    for number, (prompt, arguments) in enumerate(requests):
        priority = priorities[number] if priorities else 0
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments), priority=priority)
    outputs: dict[str, Any] = {}
    while llm.engine.has_unfinished_requests():
        outputs.update({output.request_id: output for output in llm.engine.step() if output.finished})
        check_pool(llm)
    check_empty(stage, llm)
    assert llm.engine.core.scheduler.kv_cache_manager.num_used_blocks == 0
    return [outputs[f"{number}"] for number in range(len(requests))]


@st.composite
def families(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(priority, request); some want several sequences."""
    result = []
    for prompt, arguments in draw(strategies.requests(min_size=2, max_size=5)):
        if arguments["temperature"] > 0 and draw(st.booleans()):
            arguments |= {"n": draw(st.integers(2, 4)), "seed": abs(arguments["seed"]) % 2**40}
        result.append((draw(st.integers(0, 2)), (prompt[:36], arguments)))
    return result


@pytest.mark.parametrize("pool", TINY_POOLS, ids=lambda pool: f"{pool['num_kv_blocks']}x{pool['block_size']}")
@given(requests=families())
def test_tiny_pools_give_the_oracles_tokens(
    pool: dict[str, Any],
    requests: list[tuple[int, Request]],
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Greedy and drawn, one sequence or several, preempted whenever somebody older wants a block."""
    llm = make_tiny(make_llm, pool)
    poison(stage, llm)
    outputs = serve(stage, llm, [request for _, request in requests], [priority for priority, _ in requests])
    for (_, request), output in zip(requests, outputs, strict=True):
        check_oracle(stage, get_oracle("qwen3"), request, output)


@pytest.mark.parametrize("checkpoint", SPECS)
@every_policy
def test_preempted_again_and_again(
    checkpoint: str, policy: str, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """Six sequences that would fill twelve blocks each, in a pool of thirteen."""
    pool = {"block_size": 4, "num_kv_blocks": 13, "max_num_seqs": 6, "scheduling_policy": policy}
    llm = make_tiny(make_llm, pool, checkpoint)
    poison(stage, llm)
    before = llm.engine.core.scheduler.num_preemptions["no free block"]
    requests: list[Request] = [
        ([7 * number + 3] * (3 + number), {"temperature": number % 2, "seed": number, "max_tokens": 36})
        for number in range(6)
    ]
    requests = [(prompt, {**arguments, "ignore_eos": True}) for prompt, arguments in requests]
    outputs = serve(stage, llm, requests, [number % 3 for number in range(6)])
    for request, output in zip(requests, outputs, strict=True):
        check_oracle(stage, get_oracle(checkpoint), request, output)
    num_preemptions = llm.engine.core.scheduler.num_preemptions["no free block"] - before
    assert num_preemptions >= 6
    assert llm.engine.stats.steps[-1].num_preemptions == sum(llm.engine.core.scheduler.num_preemptions.values())


# ---------------------------------------------------------------------- forks


@pytest.mark.parametrize("offset", [0, 1, -1])
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_forks_at_every_alignment(
    block_size: int, offset: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """The prompt ends with a block, a token after it, or a token before. It is computed once and held once."""
    length = {1: 6, 4: 12, 16: 32, 256: 256}[block_size] + offset
    num_blocks = 400 // block_size + 14
    llm = make_llm(max_model_len=300, block_size=block_size, num_kv_blocks=num_blocks)
    poison(stage, llm)
    prompt = [(11 * position + 5) % 500 for position in range(length)]
    n, max_tokens = 5, 6
    arguments = {"temperature": 1.0, "seed": 8, "max_tokens": max_tokens, "ignore_eos": True}
    request: Request = (prompt, {**arguments, "n": n})
    (output,) = serve(stage, llm, [request])
    steps = list(llm.engine.stats.steps)
    check_oracle(stage, get_oracle("qwen3"), request, output)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == n
    # The parent's first token comes with the prompt, a child's from computing the prompt's last token again.
    assert [step.num_tokens for step in steps] == [length, *[n] * (max_tokens - 1), n - 1]
    assert sum(step.num_tokens for step in steps) <= length + n - 1 + n * (max_tokens - 1)
    num_prompt_blocks, num_shared = -(-length // block_size), (length - 1) // block_size
    assert steps[0].kv_slots_allocated == num_prompt_blocks * block_size
    assert steps[0].kv_slots_used == length
    own = [-(-(length + offset) // block_size) - num_shared for offset in (1, *[0] * (n - 1))]
    is_kept = length % block_size == 0  # the parent holds the prompt's last block, full, and writes after it
    assert steps[1].kv_slots_allocated == (num_shared + sum(own)) * block_size
    assert is_kept == (own[0] == 2)

    separate = [stage.SamplingParams(**{**arguments, "seed": 8 + index}) for index in range(n)]
    alone = llm.generate([prompt] * n, separate, use_tqdm=False)
    assert [each.token_ids for each in alone] == [list(completion.token_ids) for completion in output.outputs]


FAMILY: Request = (
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3],
    {"temperature": 1.2, "seed": 40, "max_tokens": 8, "ignore_eos": True, "n": 6},
)


@pytest.mark.parametrize(
    "pool",
    [
        {"block_size": 4, "num_kv_blocks": 60, "max_num_seqs": 2},  # more sequences than rows
        {"block_size": 4, "num_kv_blocks": 60, "max_num_seqs": 4},
        {"block_size": 4, "num_kv_blocks": 12, "max_num_seqs": 9},  # not enough for all children
        {"block_size": 1, "num_kv_blocks": 49, "max_num_seqs": 9},
        {"block_size": 16, "num_kv_blocks": 3, "max_num_seqs": 9},  # two blocks to copy to
        {"block_size": 48, "num_kv_blocks": 1, "max_num_seqs": 9},  # none
    ],
    ids=lambda pool: "{num_kv_blocks}x{block_size}-{max_num_seqs}".format(**pool),
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_more_children_than_rows_or_blocks(
    pool: dict[str, Any], policy: str, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """Alone, and beside a neighbour that was there before and grows."""
    llm = make_tiny(make_llm, pool, scheduling_policy=policy)
    poison(stage, llm)
    (output,) = serve(stage, llm, [FAMILY])
    check_oracle(stage, get_oracle("qwen3"), FAMILY, output)
    neighbour: Request = ([8, 8], {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True})
    outputs = serve(stage, llm, [neighbour, FAMILY, FAMILY])
    for request, output in zip([neighbour, FAMILY, FAMILY], outputs, strict=True):
        check_oracle(stage, get_oracle("qwen3"), request, output)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_family_may_be_preempted_around_its_fork(
    after: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """An urgent request wants nearly all blocks: before the fork, after it, or after the children's first tokens."""
    llm = make_tiny(
        make_llm, {"block_size": 4, "num_kv_blocks": 12, "max_num_seqs": 9, "scheduling_policy": "priority"}
    )
    poison(stage, llm)
    counts = llm.engine.core.scheduler.num_preemptions
    before = counts["urgent"]
    urgent: Request = ([6] * 40, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True})
    llm.engine.add_request("family", FAMILY[0], stage.SamplingParams(**FAMILY[1]), priority=5)
    outputs: dict[str, Any] = {}
    for _ in range(after):
        llm.engine.step()
    llm.engine.add_request("urgent", urgent[0], stage.SamplingParams(**urgent[1]), priority=0)
    finish_all(llm, outputs)
    assert (counts["urgent"] > before) == (after > 0)
    check_oracle(stage, get_oracle("qwen3"), FAMILY, outputs["family"])
    check_oracle(stage, get_oracle("qwen3"), urgent, outputs["urgent"])
    check_empty(stage, llm)
    check_pool(llm)


@pytest.mark.parametrize("block_size", [1, 4, 5, 16])
def test_the_parent_may_end_with_the_prompt(
    block_size: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """One token each: the parent is gone before its children compute theirs."""
    llm = make_tiny(make_llm, {"block_size": block_size, "num_kv_blocks": 64})
    poison(stage, llm)
    request: Request = (FAMILY[0], {**FAMILY[1], "max_tokens": 1})
    (output,) = serve(stage, llm, [request])
    assert [step.num_tokens for step in llm.engine.stats.steps] == [10, 5]
    check_oracle(stage, get_oracle("qwen3"), request, output)


@pytest.mark.parametrize("gone", [[0], [1], [0, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_siblings_survive_each_other(
    gone: list[int], after: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """Some are aborted right after the fork, the copy, or later; the others' tokens are their own."""
    llm = make_tiny(make_llm, {"block_size": 4, "num_kv_blocks": 30})
    poison(stage, llm)
    prompt, arguments = FAMILY
    llm.engine.add_request("a", prompt, stage.SamplingParams(**arguments))
    output = llm.engine.get_output("a")
    for _ in range(after):
        llm.engine.step()
    for index in gone:
        llm.engine.finish_sequence(f"a-{index}", stage.SequenceStatus.FINISHED_ABORTED)
        manager, running = llm.engine.core.scheduler.kv_cache_manager, llm.engine.core.scheduler.running
        manager.block_pool.check_integrity([seq.block_table for seq in running])
    # What was freed is filled by others at once, who must not get in the way.
    llm.engine.add_request("b", [4] * 9, stage.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    finish_all(llm)
    for completion in output.outputs:
        if completion.index in gone:
            assert completion.finish_reason == "abort"
        else:
            own = {**arguments, "n": 1, "seed": arguments["seed"] + completion.index}
            assert len(completion.token_ids) == arguments["max_tokens"]
            get_oracle("qwen3").check(prompt, completion.token_ids, stage.SamplingParams(**own))
    check_empty(stage, llm)
    check_pool(llm)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_abort_gives_back_what_the_request_held(after: int, stage: ModuleType, make_llm: MakeLLM) -> None:
    """No more and no less: afterwards the pool holds what it would without it."""
    llm = make_tiny(make_llm, {"block_size": 4, "num_kv_blocks": 30})
    manager = llm.engine.core.scheduler.kv_cache_manager
    llm.engine.add_request("stays", [5] * 6, stage.SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    llm.engine.step()
    llm.engine.add_request("goes", FAMILY[0], stage.SamplingParams(**FAMILY[1]))
    for _ in range(after):
        llm.engine.step()
    llm.engine.abort_request("goes")
    (stays,) = llm.engine.core.scheduler.running
    assert stays.request_id == "stays" and manager.num_used_blocks == len(stays.block_table)
    llm.engine.abort_request("stays")
    assert manager.num_used_blocks == 0
    check_empty(stage, llm)


@pytest.mark.parametrize("num_blocks", [14, 60])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_step_that_fails_around_a_fork(
    at: int, num_blocks: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """The one that forks, the one that copies, or a later one: after it has written, it raises; all goes on."""
    llm = make_tiny(make_llm, {"block_size": 4, "num_kv_blocks": num_blocks})
    poison(stage, llm)
    requests: list[Request] = [
        ([2, 7, 1], {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}),
        FAMILY,
        ([1] * 9, {"temperature": 1.0, "seed": 5, "max_tokens": 5, "ignore_eos": True, "n": 3}),
    ]
    outputs: dict[str, Any] = {}
    for number, (prompt, arguments) in enumerate(requests):
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments))
        if number == 0:
            llm.engine.step()
    with pytest.MonkeyPatch.context() as patch:
        failing_at(stage, patch, at, RuntimeError("once"))
        for _ in range(at):
            outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
        with pytest.raises(RuntimeError, match="once"):
            llm.engine.step()
    manager, running = llm.engine.core.scheduler.kv_cache_manager, llm.engine.core.scheduler.running
    manager.block_pool.check_integrity([seq.block_table for seq in running])
    poison_free_slots(stage, llm)
    finish_all(llm, outputs)
    for number, request in enumerate(requests):
        check_oracle(stage, get_oracle("qwen3"), request, outputs[f"{number}"])
    check_empty(stage, llm)
    assert manager.num_used_blocks == 0


def poison_free_slots(stage: ModuleType, llm: Any) -> None:
    manager = llm.engine.core.scheduler.kv_cache_manager
    for block in manager.block_pool.free_block_queue.get_all_free_blocks():
        if getattr(block, "block_hash", None) is not None:
            continue  # free, and yet to be read by whoever has the same prefix
        for cache in caches(stage, llm):
            cache[block.block_id * manager.block_size :][: manager.block_size] = math.nan


def test_copies_are_read_before_they_are_written(stage: ModuleType) -> None:
    """A block may be copied and, in the same step, take another's copy."""
    copy_blocks = submodule(stage, "attention.ops").copy_blocks
    one, other = torch.arange(9.0)[:, None, None].expand(9, 2, 3).clone(), torch.rand(9, 1, 3)
    before = other.clone()
    copy_blocks([one, other], [(0, 2), (2, 3), (3, 0)], 2)
    assert one[:, 0, 0].tolist() == [6, 7, 2, 3, 0, 1, 4, 5, 8]
    assert torch.equal(other, before[[6, 7, 2, 3, 0, 1, 4, 5, 8]])


# ---------------------------------------------------------------------- switched off: the stage before


def test_without_paging_it_is_the_stage_before(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """The same steps and the same tokens as m2's; a block is a row. (Under "sjf" the order goes by the clock.)"""
    before = importlib.import_module(known_stages()[2])
    length = 256

    def run(package: ModuleType, policy: str, **switch: Any) -> Any:
        sizes: dict[str, Any] = {"max_model_len": length, "max_num_seqs": 3, "scheduling_policy": policy}
        with open_llm(package, checkpoint_path("qwen2"), **sizes, **switch) as llm:
            engine, results = llm.engine, {}
            wanted = [([1, 2, 3], 9, 1), ([5] * 20, 4, 4), ([7], 12, 1), ([9] * 40, 6, 2), ([4, 4], 3, 1)]
            for number, (prompt, max_tokens, n) in enumerate(wanted):
                params = package.SamplingParams(temperature=1.0, seed=number, max_tokens=max_tokens, n=n)
                engine.add_request(f"{number}", prompt, params, priority=-number)
                for output in engine.step():
                    results[output.request_id] = result_of(output)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    results[output.request_id] = result_of(output)
            names = ["phase", "num_tokens", "seq_ids", "num_running", "num_waiting"]
            names += ["kv_slots_used", "kv_slots_allocated", "kv_slots"]
            return [[getattr(step, name) for name in names] for step in engine.stats.steps], results

    for policy in ("fcfs", "priority"):
        steps, results = run(stage, policy, enable_paged_kv=False, **phases_apart(stage))
        assert (steps, results) == run(before, policy)
        assert {len(step[2]) for step in steps} >= {1, 3}


# ---------------------------------------------------------------------- what is too long, and what is not


def test_a_sequence_may_take_the_whole_pool(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """The pool is smaller than what the model was made for: max_model_len is what it holds, to the last slot."""
    with open_llm(stage, checkpoint_path("qwen3"), num_kv_blocks=5, block_size=8) as llm:
        assert llm.config.max_model_len == 40
        params = stage.SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        outputs = llm.generate([[1] * 5, [2] * 39, [3] * 20], params, use_tqdm=False)
        assert [len(output.token_ids) for output in outputs] == [35, 1, 20]
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        # The first one fills 39 slots, and is gone when the record of that step is made.
        assert max(step.kv_slots_used for step in llm.engine.stats.steps) == 38
        with pytest.raises(ValueError, match="40") as error:
            llm.generate([[1] * 41], params, use_tqdm=False)
        assert "41" in str(error.value)
        with pytest.raises(ValueError, match="40"):
            llm.generate([[1] * 40], params, use_tqdm=False)
        check_empty(stage, llm)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"num_kv_blocks": 4, "block_size": 16}, 64),
        ({"num_kv_blocks": 7}, 112),
        ({"num_kv_blocks": 3, "block_size": 1}, 3),
        ({"num_kv_blocks": 1, "block_size": 100}, 100),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    options: dict[str, int], fits: int, stage: ModuleType, checkpoint_path: CheckpointPath
) -> None:
    folder = checkpoint_path("qwen3")
    with pytest.raises(ValueError, match=f"max_model_len={fits + 1} needs") as error:
        open_llm(stage, folder, max_model_len=fits + 1, **options)
    match = re.search(r"lower it to at most (\d+)", str(error.value))
    assert match and int(match[1]) == fits
    with open_llm(stage, folder, max_model_len=fits, **options) as llm:
        assert llm.config.max_model_len == fits
        params = stage.SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        outputs = llm.generate([[1]] * 2, params, use_tqdm=False)
        assert [len(output.token_ids) for output in outputs] == [fits - 1] * 2


# ---------------------------------------------------------------------- what the records say


def test_slots_by_hand(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """Blocks of four, seven of them: one of 5 tokens, three siblings of 6, and one who does not fit."""
    sizes = {"num_kv_blocks": 7, "block_size": 4, "max_model_len": 28}
    with open_llm(stage, checkpoint_path("qwen3"), **sizes, **phases_apart(stage)) as llm:

        def params(max_tokens: int, n: int = 1) -> Any:
            return stage.SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True, n=n)

        llm.engine.add_request("a", [1] * 5, params(4))
        llm.engine.add_request("b", [2] * 6, params(2, n=3))
        llm.engine.add_request("c", [3] * 15, params(1))
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        steps = llm.engine.stats.steps
    # a: 5, 6 and 7 tokens in 2 blocks. b: 6 in 2 blocks, which all three hold. Then b-0 is done; b-1 and b-2 have 4 in
    # a block that both hold and each 2 in a block of his own. c needs 4 of 7 blocks, and has to wait for them.
    assert [step.seq_ids for step in steps] == [
        ("a-0", "b-0"),
        ("a-0", "b-0", "b-1", "b-2"),
        ("a-0", "b-1", "b-2"),
        ("c-0",),
        ("a-0",),
    ]
    assert [step.num_tokens for step in steps] == [11, 4, 3, 15, 1]
    assert [step.kv_slots_used for step in steps] == [5 + 6, 6 + 4 + 2 + 2, 7, 7, 0]
    assert [step.kv_slots_allocated for step in steps] == [4 * 4, (2 + 1 + 1 + 1) * 4, 2 * 4, 2 * 4, 0]
    assert {step.kv_slots for step in steps} == {28}
    assert [step.num_preemptions for step in steps] == [0] * 5
    assert [(step.num_running, step.num_waiting) for step in steps] == [(4, 1), (3, 1), (1, 1), (1, 0), (0, 0)]


def test_blocks_for_copies_are_kept_for_more_than_one_step(stage: ModuleType) -> None:
    """Four share two blocks, and three will copy one when they decode. A prompt that comes before that does not get
    these blocks: it would be computed, and preempted in the next step."""
    drive = Drive(stage, num_kv_blocks=8, block_size=4, max_num_seqs=16, **phases_apart(stage))
    drive.add("p", 6, 9, n=4)
    drive.step()
    assert (drive.running, free_blocks(drive.scheduler)) == (["p-0", "p-1", "p-2", "p-3"], 6)
    drive.add("x", 15, 9)
    steps = [ids(drive.step().seqs) for _ in range(2)]
    assert steps == [["p-0", "p-1", "p-2", "p-3"]] * 2
    assert (drive.waiting, drive.scheduler.num_preemptions) == (["x-0"], {})

    drive = Drive(stage, num_kv_blocks=9, block_size=4, max_num_seqs=16, **phases_apart(stage))
    drive.add("p", 6, 9, n=4)
    drive.step()
    drive.add("x", 15, 9)
    assert ids(drive.step().seqs) == ["x-0"], "and there is room for just that"
    drive.step()
    assert drive.scheduler.num_preemptions == {}
