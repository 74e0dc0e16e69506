"""Prompts in chunks: any order of events in the scheduler, and tokens that do not depend on how a prompt is cut.

The state machine knows what a step must be, whatever the sizes: the budget is kept, decodes are served, prompts get
on, and nobody reads what has not been computed. Then engines whose steps are small cut the prompts of any company of
requests, and the oracle judges their tokens. What the scheduler does by hand is in
tests/unit/test_chunked_scheduler.py.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from ..conftest import CheckpointPath, GetOracle, MakeLLM, open_llm, submodule
from .test_batching import failing_at
from .test_engine import check_empty
from .test_kv_cache_manager import GhostCache
from .test_paged import Request, check_oracle, check_pool, families, poison
from .test_scheduler import MAX_MODEL_LEN, POLICIES, Drive, Events, ids, make_scheduler, num_tokens, run_events

pytestmark = pytest.mark.since("m5")

# ---------------------------------------------------------------------- any order of events


class EventsWithChunks(Events):
    """Budgets, chunks and pools of any size; a ghost of the cache checks who reads what."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.sampled_from([0, 0, 1, 3, 9, 60]),
        max_chunk_size=st.sampled_from([1, 2, 3, 5, 16, 2048]),
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        extra_blocks=st.sampled_from([0, 1, 2, 4, 8, 40]),
    )
    def start(  # type: ignore[override]
        self,
        policy: str,
        max_num_seqs: int,
        extra_budget: int,
        max_chunk_size: int,
        block_size: int,
        extra_blocks: int,
    ) -> None:
        self.policy, self.max_num_seqs, self.max_chunk_size = policy, max_num_seqs, max_chunk_size
        self.budget = max(max_num_seqs, 2) + extra_budget
        num_blocks = math.ceil(MAX_MODEL_LEN / block_size) + extra_blocks
        self.scheduler = make_scheduler(
            self.stage,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_chunk_size=max_chunk_size,
            scheduling_policy=policy,
            block_size=block_size,
            num_kv_blocks=num_blocks,
        )
        self.manager = self.scheduler.kv_cache_manager
        self.cache = GhostCache(num_blocks, block_size)
        self.siblings: set[str] = set()  # that share a prompt and have no token yet

    @precondition(lambda self: self.seqs)
    @rule(leaver=st.none() | st.integers(0, 3))
    def failing_step(self, leaver: int | None) -> None:
        """Who took part, or was forked from one who did, starts over; the others keep what they have."""
        before = list(self.scheduler.running)
        scheduled = self.schedule()
        running = list(self.scheduler.running)
        forked = [seq for seq in running if seq not in before and seq not in scheduled.seqs]
        untouched = [seq for seq in running if seq not in scheduled.seqs and seq not in forked]
        self.abort_one_of(scheduled.seqs, leaver)
        self.scheduler.undo(scheduled)
        self.note_departures(running)
        self.departures.update(scheduled.retired_seq_ids)  # nobody has heard
        assert self.scheduler.running == untouched

    def schedule(self) -> Any:
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        computed = {seq.seq_id: seq.num_computed_tokens for seq in running}
        left = {seq.seq_id: seq.num_tokens - seq.num_computed_tokens for seq in running}
        counts = Counter(self.scheduler.num_preemptions)
        is_alone = len(self.seqs) == 1
        scheduled = self.scheduler.schedule()
        victims = self.note_departures(running)
        again = [seq for seq in running if seq not in victims and seq.seq_id in scheduled.retired_seq_ids]
        for seq in again:  # an urgent one needed less than its victims had
            computed[seq.seq_id] = 0
            self.departures[seq.seq_id] += 1
        victims += again
        assert not again or self.policy == "priority"
        assert Counter(scheduled.retired_seq_ids) == self.departures, "somebody's departure was lost, or told twice"
        self.departures.clear()
        new = Counter(self.scheduler.num_preemptions)
        new.subtract(counts)
        assert new["urgent"] + new["no free block"] == len(victims)
        assert not new["urgent"] or self.policy == "priority"

        seqs, nums = scheduled.seqs, num_tokens(scheduled)
        assert 0 < len(seqs) <= len(self.scheduler.running) <= self.max_num_seqs
        assert min(nums) > 0 and sum(nums) == scheduled.total_num_scheduled_tokens <= self.budget
        self.nums = dict(scheduled.num_scheduled_tokens)
        self.cache.run(scheduled.block_copies, dict(zip(seqs, nums, strict=True)))
        for seq, num in zip(seqs, nums, strict=True):
            assert seq.status is self.status.RUNNING and seq in self.scheduler.running
            assert seq.num_computed_tokens == computed.get(seq.seq_id, 0) + num <= seq.num_tokens
            assert is_alone or num <= self.max_chunk_size
            if seq.num_computed_tokens == seq.num_tokens:
                self.cache.check(seq)
        stayed = [seq for seq in running if seq not in victims]
        for seq in stayed:
            if left[seq.seq_id] == 1:
                assert scheduled.num_scheduled_tokens[seq.seq_id] == 1, "a decode was skipped"
        if new["no free block"]:  # whoever stayed got what there was, and nobody came
            assert self.scheduler.running == stayed
        # What is left of the budget is left because nobody could take it.
        rest = self.budget - sum(nums)
        newcomers = [seq for seq in self.scheduler.running if seq not in stayed]
        for seq in stayed:
            if rest:
                most = left[seq.seq_id] if is_alone else min(left[seq.seq_id], self.max_chunk_size)
                num = scheduled.num_scheduled_tokens.get(seq.seq_id, 0)
                # Or an urgent one took all that it had, and needed less.
                gave_way = num == 0 and any(new.request.priority < seq.request.priority for new in newcomers)
                assert num == most or (gave_way and self.policy == "priority"), "some were left that it could have had"
        if not victims:
            assert newcomers == [seq for seq in waiting if seq in newcomers]
            left_behind = list(self.scheduler.waiting)
            assert left_behind == [seq for seq in waiting if seq not in newcomers]
            for seq in waiting[: waiting.index(newcomers[-1])] if newcomers else []:
                if seq in left_behind:  # then it waits for its prompt, which somebody is computing
                    parent = next(p for p in seqs if p.request_id == seq.request_id and p.num_output_tokens == 0)
                    assert parent.num_computed_tokens < parent.num_tokens, "somebody was overtaken"
        self.siblings -= {seq.seq_id for seq in newcomers}
        self.siblings |= {seq.seq_id for seq in newcomers if seq not in seqs}
        self.siblings &= {seq.seq_id for seq in self.scheduler.running if seq.num_output_tokens == 0}
        if not new["no free block"]:
            self.check_nobody_waits_in_vain(seqs, newcomers, rest)
        for seq in newcomers:
            if seq not in seqs:  # a sibling of one whose prompt is computed now
                parent = next(p for p in seqs if p.request_id == seq.request_id and p.block_table == seq.block_table)
                assert parent in scheduled.sampled_seqs
                assert seq.num_computed_tokens == seq.num_prompt_tokens - 1
        return scheduled

    def check_nobody_waits_in_vain(self, seqs: list[Any], newcomers: list[Any], rest: int) -> None:
        """The first of those who wait, but for siblings of a prompt under way, could not have come."""
        running, size = self.scheduler.running, self.manager.block_size
        following, can_share = None, False
        for seq in self.scheduler.waiting:
            parents = [p for p in seqs if p.request_id == seq.request_id and p.num_output_tokens == 0]
            can_share = seq.num_output_tokens == 0 and parents != []
            if not can_share or all(p.num_computed_tokens == p.num_tokens for p in parents):
                following = seq
                break
        if following is None:
            return
        if self.policy == "priority":  # nobody less urgent has what it needs: tokens of a prompt, or a row
            num_tokens_of = [1 if seq not in seqs else self.nums[seq.seq_id] for seq in running]
            urgent = [seq.request.priority <= following.request.priority for seq in running]
            assert all(u or n == 1 for u, n in zip(urgent, num_tokens_of, strict=True)), "a less urgent one has tokens"
            assert rest == 0 or all(urgent), "a less urgent one runs"
        has_row = len(running) < self.max_num_seqs
        if has_row and (rest > 0 or can_share):
            promised = sum(
                -(-seq.num_tokens // size) - len(seq.block_table)
                for seq in running
                if seq.num_computed_tokens < seq.num_tokens
            )
            # Siblings that have no token of their own yet will copy a block, or have just done so.
            reserve = promised + sum(seq.seq_id in self.siblings for seq in running)
            needed = 1 if can_share else -(-following.num_tokens // size)
            assert needed + reserve > self.manager.num_free_blocks, "it would have fitted"

    @invariant()
    def nobody_shares_the_cache(self) -> None:
        """Nobody who should not: every block is held as often as it is counted."""
        running = self.scheduler.running
        self.manager.block_pool.check_integrity([seq.block_table for seq in running])
        stats = self.scheduler.make_stats()
        assert stats["kv_slots_allocated"] == len({b for s in running for b in s.block_table}) * self.manager.block_size
        assert 0 <= stats["kv_slots_used"] <= stats["kv_slots_allocated"]

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "scheduler"):
            assert self.manager.num_free_blocks == self.manager.num_blocks

    def most_steps_to_the_end(self) -> int:
        """The oldest is never preempted for good: each step brings it on, and in its turn everybody is the oldest."""
        return sum(seq.num_prompt_tokens + seq.request.max_tokens + 2 for seq in self.seqs.values()) * 2


def test_any_order_of_events_with_chunks(stage: ModuleType) -> None:
    run_events(stage, EventsWithChunks)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    prompt_len=st.integers(2, 200),
    chunk=st.integers(1, 64),
    budget=st.integers(9, 64),
    flood=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_prompts_get_on_in_a_flood_of_arrivals(
    policy: str, prompt_len: int, chunk: int, budget: int, flood: list[tuple[int, int]], stage: ModuleType
) -> None:
    """Once it has begun, every step brings a prompt nearer to its end, however many come after it."""
    sizes = {"max_num_seqs": 8, "max_model_len": 256, "block_size": 16, "num_kv_blocks": 1000}
    options = {"max_num_batched_tokens": budget, "max_chunk_size": chunk, "scheduling_policy": policy}
    drive = Drive(stage, **sizes, **options)
    drive.add("x", prompt_len, 1, arrival=0.0)
    x, steps, before = drive.seqs["x-0"], 0, 0
    while not x.is_finished:
        for number, (length, max_tokens) in enumerate(flood):
            drive.add(f"{steps}.{number}", length, max_tokens, arrival=1000.0 + steps)
        drive.step()
        steps += 1
        assert x.num_computed_tokens >= min(before + 1, prompt_len)
        before = x.num_computed_tokens
    # Seven others run at most, and leave it two tokens of the budget or more.
    assert steps <= math.ceil(prompt_len / min(chunk, budget - 7))


# ---------------------------------------------------------------------- tokens

LENGTH = 48

CUTS: list[dict[str, Any]] = [
    {"max_chunk_size": 1, "max_num_batched_tokens": 6, "max_num_seqs": 6, "num_kv_blocks": 60, "block_size": 4},
    {"max_chunk_size": 5, "max_num_batched_tokens": 16, "max_num_seqs": 5, "num_kv_blocks": 13, "block_size": 4},
    {"max_chunk_size": 16, "max_num_seqs": 4, "num_kv_blocks": 4, "block_size": 16, "scheduling_policy": "priority"},
    {"max_num_batched_tokens": 7, "max_num_seqs": 6, "num_kv_blocks": 50, "block_size": 1, "scheduling_policy": "sjf"},
    {"max_num_batched_tokens": 11, "max_num_seqs": 3, "enable_paged_kv": False, "scheduling_policy": "priority"},
    {"chunk_policy": "dynamic", "target_step_time_ms": 0.001, "max_num_seqs": 6, "num_kv_blocks": 20, "block_size": 4},
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut.values())))
@given(requests=families(), gaps=st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_tokens_do_not_depend_on_how_prompts_are_cut(
    cut: dict[str, Any],
    requests: list[tuple[int, Request]],
    gaps: list[int],
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Greedy and drawn, one sequence or several, whenever they come, preempted or not: the oracle's tokens."""
    llm = make_llm(max_model_len=LENGTH, **cut)
    poison(stage, llm)
    llm.engine.stats.clear()
    outputs: dict[str, Any] = {}

    def step() -> None:
        outputs.update({output.request_id: output for output in llm.engine.step() if output.finished})
        check_pool(llm)

    for number, (priority, (prompt, arguments)) in enumerate(requests):
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments), priority=priority)
        for _ in range(gaps[number]):
            step()
    while llm.engine.has_unfinished_requests():
        step()
    check_empty(stage, llm)
    for number, (_, request) in enumerate(requests):
        check_oracle(stage, get_oracle("qwen3"), request, outputs[f"{number}"])
    budget = llm.config.max_num_batched_tokens
    assert all(record.num_tokens <= budget for record in llm.engine.stats.steps)


@pytest.mark.parametrize("at", range(8))
def test_a_failed_chunk_costs_no_token(at: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    """The step that fails is a chunk, a mixed one, the one that forks, or a decode."""
    llm = make_llm(max_model_len=LENGTH, **CUTS[1])
    poison(stage, llm)
    requests: list[Request] = [
        ([2, 7, 1], {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}),
        ([4, 1, 3] * 6, {"temperature": 1.0, "seed": 3, "max_tokens": 6, "ignore_eos": True, "n": 3}),
    ]
    for number, (prompt, arguments) in enumerate(requests):
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments))
    outputs: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        failing_at(stage, patch, at, RuntimeError("once"))
        for _ in range(at):
            outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
        with pytest.raises(RuntimeError, match="once"):
            llm.engine.step()
    check_pool_after_failure(llm)
    while llm.engine.has_unfinished_requests():
        outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
    for number, request in enumerate(requests):
        check_oracle(stage, get_oracle("qwen3"), request, outputs[f"{number}"])
    check_empty(stage, llm)


def check_pool_after_failure(llm: Any) -> None:
    scheduler = llm.engine.core.scheduler
    scheduler.kv_cache_manager.block_pool.check_integrity([seq.block_table for seq in scheduler.running])
    assert all(seq.num_computed_tokens == 0 and not seq.block_table for seq in scheduler.waiting)


def test_steps_of_mixed_batches(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Else the tests above would see prompts and decodes apart."""
    llm = make_llm(max_model_len=LENGTH, **CUTS[1])
    llm.engine.stats.clear()
    params = stage.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    llm.generate([[1, 2], [3] * 20, [4] * 9], params, use_tqdm=False)
    records = llm.engine.stats.steps
    assert Counter(record.phase for record in records)["mixed"] >= 3
    assert ids(llm.engine.core.scheduler.running) == []


@pytest.mark.parametrize("is_async", [False, True])
def test_the_scheduler_is_told_how_long_steps_take(
    is_async: bool, stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds, by a clock that goes on by 5 ms whenever somebody looks; so none may begin before that."""
    options: dict[str, Any] = {"chunk_policy": "dynamic", "target_step_time_ms": 30.0, "async_scheduling": is_async}
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=64, num_kv_blocks=20, **options) as llm:
        told: list[tuple[bool, float]] = []
        looks = count()
        clock = SimpleNamespace(perf_counter=lambda: 0.005 * next(looks))
        monkeypatch.setattr(submodule(stage, "engine.core"), "time", clock)
        core = llm.engine.core
        monkeypatch.setattr(
            core.scheduler,
            "record_step_time",
            lambda scheduled, seconds: told.append((not scheduled.source_rows, seconds)),
        )
        llm.generate([[1, 2, 3], [4]], stage.SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        assert len(llm.engine.stats.steps) == 5
        assert told == [(True, pytest.approx(0.005))] * 5
