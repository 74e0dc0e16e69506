"""Prefix caching under any order of events, beside a model of the cache in a few lines of plain Python.

There is no neural network here. A dictionary stands for the cache's slots, in which a token that "runs" leaves the name
of its whole prefix; whoever reads must find the names of his own. In a large pool the model says to the token what is
found; in a small one, what is found at most. What the cache does by hand is in tests/unit/test_prefix_cache.py.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from .test_scheduler import POLICIES, make_output, make_scheduler

pytestmark = pytest.mark.since("m6")

MAX_MODEL_LEN = 24
EOS = 0
FAMILIES = ([1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2] * 2, [1, 2, 1, 1, 1, 1, 2, 1, 2, 2, 2, 1] * 2, [2] * 24)

Prefix = tuple[str | None, tuple[int, ...]]


class PlainCache:
    """All prefixes of whole blocks that were computed, in the order in which they were."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.known: dict[Prefix, None] = {}

    def add(self, salt: str | None, tokens: list[int], start: int, end: int) -> None:
        """Tokens from `start` up to `end` were computed."""
        size = self.block_size
        for stop in range((start // size + 1) * size, end + 1, size):
            self.known.setdefault((salt, tuple(tokens[:stop])))

    def hit(self, salt: str | None, tokens: list[int], most: int | None) -> int:
        """How many tokens are found, if of the blocks that might be copied the newest `most` are looked at."""
        size, limit, num = self.block_size, len(tokens) - 1, 0
        while num + size <= limit and (salt, tuple(tokens[: num + size])) in self.known:
            num += size
        rest, parent = tokens[num : min(num + size, limit)], (salt, tuple(tokens[:num]))
        children = [
            prefix[num:] for s, prefix in self.known if len(prefix) == num + size and (s, prefix[:num]) == parent
        ]
        children = [child for child in children if rest[:1] == list(child[:1])]
        equal = [
            next((i for i, (a, b) in enumerate(zip(c, rest, strict=False)) if a != b), len(rest)) for c in children
        ]
        best = max(equal if most is None else equal[-most:], default=0)
        return num + (best if best >= max(size // 8, 1) else 0)


class Prefixes(RuleBasedStateMachine):
    """Requests that begin alike are cut into chunks, forked, preempted, aborted; steps fail; the cache is reset."""

    def __init__(self, stage: ModuleType) -> None:
        super().__init__()
        self.stage, self.status = stage, stage.SequenceStatus
        self.num_requests = 0
        self.slots: dict[int, Any] = {}
        self.seqs: list[Any] = []  # unfinished
        self.finished: list[list[int]] = []

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 4, 8, 16]),
        extra_blocks=st.sampled_from([0, 1, 3, 8, 4000, 4000]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(24, 60),
        max_chunk_size=st.sampled_from([1, 3, 7, 2048]),
        policy=st.sampled_from(POLICIES),
        is_chunked=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        block_size: int,
        extra_blocks: int,
        max_num_seqs: int,
        budget: int,
        max_chunk_size: int,
        policy: str,
        is_chunked: bool,
    ) -> None:
        self.block_size, self.is_large = block_size, extra_blocks == 4000
        self.scheduler = make_scheduler(
            self.stage,
            enable_prefix_caching=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_chunk_size=max_chunk_size,
            enable_chunked_prefill=is_chunked,
            scheduling_policy=policy,
            block_size=block_size,
            num_kv_blocks=math.ceil(MAX_MODEL_LEN / block_size) + extra_blocks,
        )
        self.manager = self.scheduler.kv_cache_manager
        self.pool, self.cache = self.manager.block_pool, self.manager.prefix_cache
        self.plain = PlainCache(block_size)
        self.queries = self.hits = 0

    # ------------------------------------------------------------------ events

    @rule(
        family=st.sampled_from(FAMILIES),
        shared=st.integers(0, MAX_MODEL_LEN),
        own=st.lists(st.integers(1, 3), max_size=6),
        salt=st.sampled_from([None, None, "a", "b"]),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 2),
        max_tokens=st.integers(1, 8),
        goes_on=st.booleans(),
    )
    def add(
        self,
        family: list[int],
        shared: int,
        own: list[int],
        salt: str | None,
        n: int,
        priority: int,
        max_tokens: int,
        goes_on: bool,
    ) -> None:
        """A prompt that begins like others; or, where `goes_on`, like a text that was generated before."""
        before = self.finished[-1] if goes_on and self.finished else family
        prompt = (before[:shared] + own or [1])[: MAX_MODEL_LEN - 1]
        request = self.stage.Request(
            request_id=str(self.num_requests),
            prompt=None,
            prompt_token_ids=prompt,
            sampling_params=self.stage.SamplingParams(n=n, max_tokens=max_tokens),
            max_tokens=min(max_tokens, MAX_MODEL_LEN - len(prompt)),
            eos_token_ids=(EOS,),
            arrival_time=float(self.num_requests),
            priority=priority,
            cache_salt=salt,
        )
        self.num_requests += 1
        for index in range(n):
            seq = self.stage.Sequence(f"{request.request_id}-{index}", request, index, index)
            self.seqs.append(seq)
            self.scheduler.add_sequence(seq)

    @precondition(lambda self: self.seqs)
    @rule(num_steps=st.integers(1, 5), tokens=st.lists(st.integers(0, 8), min_size=1, max_size=5))
    def step(self, num_steps: int, tokens: list[int]) -> None:
        for _ in range(num_steps):
            if self.seqs:
                self.one_step([min(token, 2) for token in tokens])

    @precondition(lambda self: self.seqs)
    @rule(has_run=st.booleans())
    def failing_step(self, has_run: bool) -> None:
        """Nothing that it wrote is ever found."""
        scheduled = self.schedule()
        if has_run:
            self.run(scheduled, garbage=True)
        self.scheduler.undo(scheduled)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.seqs)))

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def abort_within_a_step(self, data: st.DataObject) -> None:
        scheduled = self.schedule()
        self.run(scheduled)
        gone = data.draw(st.sampled_from(scheduled.seqs))
        self.leave(gone)
        self.finish_step(scheduled, [1, 2])

    @rule()
    def reset(self) -> None:
        """Only while nobody holds a block."""
        is_free = not any(seq.block_table for seq in self.seqs)
        assert self.manager.reset_prefix_cache() is is_free
        if is_free:
            assert len(self.cache) == 0
            self.plain = PlainCache(self.block_size)

    # ------------------------------------------------------------------ what an event consists of

    def one_step(self, tokens: list[int]) -> None:
        scheduled = self.schedule()
        self.run(scheduled)
        self.finish_step(scheduled, tokens)

    def schedule(self) -> Any:
        waiting = list(self.scheduler.waiting)
        found = [(seq.request.cache_salt, list(seq.token_ids)) for seq in waiting]
        first = [seq.num_cached_tokens < 0 for seq in waiting]
        most = 8 if self.is_large else None
        predicted = [self.plain.hit(salt, tokens, most) for salt, tokens in found]
        free = [(block, block.block_hash) for block in self.pool.free_block_queue.get_all_free_blocks()]
        counts = sum(self.scheduler.num_preemptions.values())
        scheduled = self.scheduler.schedule()
        assert scheduled.seqs
        for seq, expected, is_first in zip(waiting, predicted, first, strict=True):
            if seq.seq_id not in scheduled.num_scheduled_tokens:
                continue
            hit = seq.num_computed_tokens - scheduled.num_scheduled_tokens[seq.seq_id]
            assert hit == expected if self.is_large else 0 <= hit <= expected
            if is_first:
                assert seq.num_cached_tokens == hit
                self.queries, self.hits = self.queries + seq.num_tokens, self.hits + hit
        self.check_who_waits(waiting, scheduled, has_preempted=sum(self.scheduler.num_preemptions.values()) > counts)
        stats = self.manager.make_stats()
        assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (self.queries, self.hits)
        if sum(self.scheduler.num_preemptions.values()) == counts:
            self.check_eviction(free, {source for source, _ in scheduled.block_copies})
        return scheduled

    def check_who_waits(self, waiting: list[Any], scheduled: Any, has_preempted: bool) -> None:
        """Nobody was admitted to compute a block that the step computes for somebody else, and nobody waits for less.

        Those of `waiting`, as the step found it, who still wait although somebody behind them was admitted: each of
        them would go on with such a block, or is a sibling of one whose prompt is not done.
        """
        size, num = self.block_size, scheduled.num_scheduled_tokens
        admitted = [seq for seq in waiting if seq.seq_id in num]
        under_way = []
        for seq in scheduled.seqs:
            end = (seq.num_computed_tokens - num[seq.seq_id]) // size * size + size
            # What a decode fills is known by a name once it is full.
            if end <= (seq.num_tokens if seq in admitted else seq.num_prompt_tokens):
                under_way.append((seq, (seq.request.cache_salt, tuple(seq.token_ids[:end]))))
        cached = self.cached()
        under_way = [(seq, prefix) for seq, prefix in under_way if prefix not in cached]
        for seq, prefix in under_way:
            if seq in admitted:
                assert sum(prefix == other for _, other in under_way) == 1, "two compute the same block"
        passed = waiting[: max((waiting.index(seq) for seq in admitted), default=0)]
        for seq in passed:
            if seq.status is self.status.WAITING and not has_preempted:
                is_sibling = any(other.request_id == seq.request_id for other in self.scheduler.running)
                start = self.manager.get_computed_blocks(seq).num_tokens // size * size
                prefix = (seq.request.cache_salt, tuple(seq.token_ids[: start + size]))
                assert is_sibling or prefix in {other for _, other in under_way}, "passed by for nothing"

    def check_eviction(self, free: list[tuple[Any, bytes | None]], sources: set[int]) -> None:
        """Whoever was free for longer went first, unless somebody has found it in this step."""
        cached = [(block, block_hash) for block, block_hash in free if block_hash is not None]
        is_gone = [block.block_hash != block_hash for block, block_hash in cached]
        last = max((i for i, gone in enumerate(is_gone) if gone), default=0)
        for (block, _), gone in zip(cached[:last], is_gone, strict=False):
            assert gone or block.ref_cnt > 0 or block.block_id in sources, "a younger one was evicted"

    def run(self, scheduled: Any, garbage: bool = False) -> None:
        """What the worker does: copies, all read before any is written, and then the tokens' own slots."""
        size = self.block_size
        targets = [target for _, target in scheduled.block_copies]
        assert len(set(targets)) == len(targets), "two copies to one block"
        assert all(self.pool.blocks[target].ref_cnt > 0 for target in targets), "a copy that nobody waits for"
        read = [[self.slots.get(source * size + i) for i in range(size)] for source, _ in scheduled.block_copies]
        for (_, target), content in zip(scheduled.block_copies, read, strict=True):
            self.slots.update({target * size + i: None if garbage else name for i, name in enumerate(content)})
        written: set[int] = set()
        for seq in scheduled.seqs:
            num = scheduled.num_scheduled_tokens[seq.seq_id]
            for position in range(seq.num_computed_tokens - num, seq.num_computed_tokens):
                slot = self.slot(seq, position)
                assert slot not in written, "two tokens in one slot"
                assert self.pool.blocks[slot // size].block_hash is None, "a block that can be found was written"
                written.add(slot)
                self.slots[slot] = None if garbage else self.name(seq, position)
        if not garbage:
            for seq in self.scheduler.running:
                for position in range(seq.num_computed_tokens):
                    assert self.slots.get(self.slot(seq, position)) == self.name(seq, position), "a wrong token"

    def finish_step(self, scheduled: Any, tokens: list[int]) -> None:
        for seq in scheduled.seqs:
            if not seq.is_finished:
                end, num = seq.num_computed_tokens, scheduled.num_scheduled_tokens[seq.seq_id]
                self.plain.add(seq.request.cache_salt, seq.token_ids, end - num, end)
        said = [tokens[row % len(tokens)] for row in range(len(scheduled.sampled_seqs))]
        for output in self.scheduler.update_from_output(scheduled, make_output(self.stage, said)):
            if output.seq.is_finished:
                self.finished.append(list(output.seq.token_ids))
                self.seqs.remove(output.seq)

    def leave(self, seq: Any) -> None:
        assert self.scheduler.finish_sequence(seq.seq_id, self.status.FINISHED_ABORTED) is seq
        self.seqs.remove(seq)

    def slot(self, seq: Any, position: int) -> int:
        return int(seq.block_table[position // self.block_size] * self.block_size + position % self.block_size)

    def name(self, seq: Any, position: int) -> Prefix:
        return seq.request.cache_salt, tuple(seq.token_ids[: position + 1])

    def cached(self) -> set[Prefix]:
        """The names of the last tokens of all blocks that can be found."""
        last = self.block_size - 1
        blocks = [block.block_id for block in self.pool.blocks if block.block_hash is not None]
        return {self.slots[block_id * self.block_size + last] for block_id in blocks}

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def it_is_sound(self) -> None:
        running = self.scheduler.running
        self.pool.check_integrity([seq.block_table for seq in running])
        assert not any(seq.block_table or seq.num_computed_tokens for seq in self.scheduler.waiting)
        used = {self.slot(seq, position) for seq in running for position in range(seq.num_computed_tokens)}
        assert self.scheduler.make_stats()["kv_slots_used"] == len(used)

    @invariant()
    def what_is_found_was_computed(self) -> None:
        """Every cached block holds, slot by slot, the tokens that it is known for; none of them twice."""
        size = self.block_size
        cached = [block for block in self.pool.blocks if block.block_hash is not None]
        assert len(cached) == len(self.cache)
        prefixes = set()
        for block in cached:
            names = [self.slots[block.block_id * size + i] for i in range(size)]
            start = block.index * size
            assert [len(tokens) for _, tokens in names] == list(range(start + 1, start + size + 1))
            assert list(names[-1][1][start:]) == list(block.token_ids)
            assert names[-1] in self.plain.known
            prefixes.add(names[-1])
        assert len(prefixes) == len(cached)
        if self.is_large:
            assert prefixes == set(self.plain.known)
            assert self.cache.num_evictions == 0

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.seqs:
                break
            self.one_step([1, 2])
        assert not self.seqs and self.manager.num_used_blocks == 0
        self.it_is_sound()
        self.what_is_found_was_computed()


def test_any_order_of_events(stage: ModuleType) -> None:
    class Machine(Prefixes):
        def __init__(self) -> None:
            super().__init__(stage)

    examples = 8 * settings().max_examples  # they cost little
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=examples, stateful_step_count=30, report_multiple_bugs=False)
    )
