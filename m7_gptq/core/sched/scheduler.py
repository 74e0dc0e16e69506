"""The scheduler: before every step, who runs in it.

It knows nothing of tensors: it deals in sequences, token counts and blocks of the cache, and can be driven without a
model. Progress has one measure, `num_computed_tokens`: how many of a sequence's tokens have gone through the model, or
will have after the step that is being scheduled. A new prompt, a sequence in the middle of its output and one that
starts over after a preemption differ in nothing but how many tokens are still to be computed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ...config import EngineConfig
from ...outputs import ModelRunnerOutput, SequenceOutput
from ...request import Sequence, SequenceStatus, check_stop
from ..kv_cache_manager import KVCacheManager
from ..prefix_cache import NOTHING_COMPUTED, ComputedBlocks
from .chunk_policy import ChunkController
from .output import SchedulerOutput
from .request_queue import create_request_queue, urgency

# Without chunks, new prompts go first, but after so many of their steps in a row those that run get one.
MAX_CONSECUTIVE_PREFILLS = 8
# Share of the blocks that an admission leaves while others run, or they would soon have to preempt whom it admitted.
WATERMARK = 0.01


class Scheduler:
    """Continuous batching (Orca: Yu et al., OSDI 2022): at every step whoever is done leaves and whoever fits enters.

    Long prompts are computed in chunks that share steps with decodes, so that nobody stalls (Sarathi-Serve: Agrawal et
    al., OSDI 2024, arXiv 2403.02310).

    Args:
        config: with every None settled.

    Attributes:
        waiting: in the order of the policy.
        running: in the order of admission.
        num_preemptions: {reason: how many}.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.max_num_seqs = config.max_num_seqs or 0
        self.max_num_batched_tokens = config.max_num_batched_tokens or 0
        num_blocks = config.num_kv_blocks or 0
        self.kv_cache_manager = KVCacheManager(num_blocks, config.block_size or 0, config.enable_prefix_caching)
        self.enable_paged_kv = config.enable_paged_kv
        self.enable_chunked_prefill = config.enable_chunked_prefill
        self.max_chunk_size = config.max_chunk_size or 0
        self.chunk_controller: ChunkController | None = None
        if config.chunk_policy == "dynamic":
            target = (config.target_step_time_ms or 0.0) / 1000
            self.chunk_controller = ChunkController(target, self.max_num_batched_tokens)
        self.watermark_blocks = int(WATERMARK * num_blocks) if self.enable_paged_kv else 0
        self.policy = config.scheduling_policy
        self.waiting = create_request_queue(self.policy)
        self.running: list[Sequence] = []
        self.num_preemptions: Counter[str] = Counter()
        self._seqs: dict[str, Sequence] = {}  # unfinished
        self._retired: list[str] = []
        self._forked: list[Sequence] = []  # and have not run yet
        self._num_scheduled_tokens: dict[str, int] = {}  # in the step that is being scheduled
        self._token_budget = 0  # what is left of its tokens,
        self._prefill_budget = 0  # and of those for whoever has more than one to compute
        self._chunk_cap = 0  # most of these for one sequence
        self._admitted_ids: set[str] = set()  # of those who came in it, to compute tokens of their own
        self._num_promised_blocks = 0  # that those who run need for tokens which they already have
        self._num_prefills_in_a_row = 0

    def add_sequence(self, seq: Sequence) -> None:
        """`seq` waits from now on."""
        self._seqs[seq.seq_id] = seq
        self.waiting.add(seq)

    def has_unfinished_sequences(self) -> bool:
        return bool(self._seqs)

    def schedule(self) -> SchedulerOutput:
        """Give out the step's tokens: to those who run, then to those who wait.

        Whoever cannot get all that it has to compute gets a part, and the rest in later steps. Without chunks a prompt
        is computed whole or not at all, in a step without decodes: first those who wait, and if nobody can be
        admitted, those who run.
        """
        self._begin_step()
        if self.chunk_controller is not None:
            self._prefill_budget = self.chunk_controller.prefill_budget
            if len(self.waiting) + sum(num_tokens_left(seq) > 1 for seq in self.running) > 1:
                self._chunk_cap = min(self._chunk_cap, -(-self._prefill_budget // 2))  # the first leaves some to others
        if self.enable_chunked_prefill:
            if not self._schedule_running():  # or whoever was preempted would take its blocks back
                self._schedule_waiting()
        else:
            if self._num_prefills_in_a_row < MAX_CONSECUTIVE_PREFILLS or not self.running:
                self._schedule_waiting()
            if not self._num_scheduled_tokens:
                self._schedule_running()
        return self._make_output()

    def schedule_ahead(self, scheduled: SchedulerOutput) -> SchedulerOutput | None:
        """The step after `scheduled`, before the tokens of that are known: all that run compute theirs, unseen.

        Whoever turns out to have ended has computed one too many. Prompts that have begun go on beside them. None where
        there is more to decide, and the next `schedule` has to: somebody could come in, or lacks a block, or a token is
        drawn on the host, or steps have to be timed.
        """
        rows = {seq.seq_id: row for row, seq in enumerate(scheduled.sampled_seqs)}
        prompts = [seq for seq in self.running if seq.seq_id not in rows]
        decodes = [s for s in self.running if s.seq_id in rows and s.num_output_tokens + 1 < s.request.max_tokens]
        if self.waiting and (len(decodes + prompts) < self.max_num_seqs or self.policy == "priority"):
            return None
        if not decodes or any(num_tokens_left(seq) <= 1 for seq in prompts) or self.chunk_controller is not None:
            return None
        if any(seq.request.sampling_params.needs_host for seq in self.running):
            return None
        self._begin_step()
        for seq in decodes + (sorted(prompts, key=urgency) if self.policy == "priority" else prompts):
            num_new_tokens = 1 if seq.seq_id in rows else self._chunk_size(seq)
            if num_new_tokens > 0 and not self.kv_cache_manager.allocate_slots(seq, num_new_tokens):
                return None
            if num_new_tokens > 0:
                self._take_tokens(seq, num_new_tokens)
        return replace(self._make_output(), source_rows=[rows[seq.seq_id] for seq in decodes])

    def _begin_step(self) -> None:
        self._num_scheduled_tokens = {}
        self._admitted_ids.clear()
        self._token_budget = self._prefill_budget = self.max_num_batched_tokens
        self._chunk_cap = self.max_chunk_size

    def _make_output(self) -> SchedulerOutput:
        num_scheduled_tokens, self._num_scheduled_tokens = self._num_scheduled_tokens, {}
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self.running:
            if seq.seq_id in num_scheduled_tokens:
                is_prompt = num_tokens_left(seq) > 1 or seq.seq_id in self._admitted_ids
                (prompts if is_prompt else decodes).append(seq)
        for seq in prompts:
            if seq.seq_id in self._admitted_ids:
                self.kv_cache_manager.note_admission(seq)
        seqs = decodes + prompts  # attention computes them apart
        for seq in seqs:
            seq.num_computed_tokens += num_scheduled_tokens[seq.seq_id]
        self._num_prefills_in_a_row = self._num_prefills_in_a_row + 1 if prompts else 0
        retired, self._retired = self._retired, []
        return SchedulerOutput(
            seqs=seqs,
            num_scheduled_tokens=num_scheduled_tokens,
            seq_lens=[seq.num_computed_tokens for seq in seqs],
            sampled_seqs=[seq for seq in seqs if num_tokens_left(seq) <= 0],
            is_prefill=bool(prompts),
            is_decode=bool(decodes),
            retired_seq_ids=retired,
            block_copies=self.kv_cache_manager.take_block_copies(),
        )

    def record_step_time(self, scheduled: SchedulerOutput, seconds: float) -> None:
        """The step took so long: what chunk_policy="dynamic" goes by."""
        if self.chunk_controller is not None:
            num_prefill_tokens = sum(n for n in scheduled.num_scheduled_tokens.values() if n > 1)
            self.chunk_controller.update(num_prefill_tokens, seconds)

    def update_from_output(self, scheduled: SchedulerOutput, sampled: ModelRunnerOutput) -> list[SequenceOutput]:
        """Append the step's tokens and let go of the sequences that they finish."""
        self.kv_cache_manager.cache_blocks(scheduled.seqs, scheduled.num_scheduled_tokens, scheduled.seq_lens)
        outputs = []
        for row, seq in enumerate(scheduled.sampled_seqs):
            if seq.status is not SequenceStatus.RUNNING:  # it ended while this step was under way
                continue
            if row in sampled.errors:
                seq.status, seq.stop_reason = SequenceStatus.FINISHED_ERROR, sampled.errors[row]
            else:
                seq.token_ids.append(sampled.token_ids[row])
                check_stop(seq)
            outputs.append(SequenceOutput(seq, sampled.token_ids[row], sampled.logprobs.get(row)))
            if seq.is_finished:
                self._forget(seq)
        self.running = [seq for seq in self.running if not seq.is_finished]
        self._forked = [seq for seq in self._forked if seq.num_output_tokens == 0]
        return outputs

    def undo(self, scheduled: SchedulerOutput) -> None:
        """The step failed: nothing that it wrote can be trusted, so whoever took part waits again and starts over."""
        self.running = [seq for seq in self.running if not seq.is_finished]
        took_part = {seq.seq_id for seq in scheduled.seqs + self._forked}
        for seq in reversed([seq for seq in self.running if seq.seq_id in took_part]):
            self._preempt(seq)
        self._forked = []
        self._retired = scheduled.retired_seq_ids + self._retired

    def finish_sequence(self, seq_id: str, status: SequenceStatus) -> Sequence | None:
        """End a sequence from outside, wherever it stands, and return it; None if it is unknown or finished."""
        seq = self._seqs.get(seq_id)
        if seq is None:
            return None
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        seq.status = status
        self._forget(seq)
        return seq

    def make_stats(self) -> dict[str, float]:
        """Fields of StepRecord, after a step."""
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting),
            "num_preemptions": sum(self.num_preemptions.values()),
            "kv_slots_used": self.kv_cache_manager.num_used_slots(self.running),
            "kv_slots_allocated": self.kv_cache_manager.num_used_blocks * self.kv_cache_manager.block_size,
            "kv_slots": self.kv_cache_manager.num_blocks * self.kv_cache_manager.block_size,
            **self.kv_cache_manager.make_stats(),
        }

    def _schedule_running(self) -> bool:
        """Tokens for those who run: decodes first, then prompts that have begun, in the order of admission.

        Under "priority" the more urgent prompts go first. Where there is no block for them, the last or least urgent
        stops running.

        Returns:
            Whether somebody was preempted.
        """
        prompts = []
        was_preempted = False
        for seq in list(self.running):
            if num_tokens_left(seq) > 1:
                prompts.append(seq)
            else:
                was_preempted |= self._schedule_one(seq)
        if self.policy == "priority":
            prompts.sort(key=urgency)
        for seq in prompts:
            was_preempted |= self._schedule_one(seq)
        return was_preempted

    def _schedule_one(self, seq: Sequence) -> bool:
        was_preempted = False
        while seq.status is SequenceStatus.RUNNING:
            num_new_tokens = self._chunk_size(seq)
            if num_new_tokens == 0:
                break
            if self.kv_cache_manager.allocate_slots(seq, num_new_tokens):
                self._take_tokens(seq, num_new_tokens)
                break
            was_preempted = True
            self._preempt(max(self.running, key=urgency) if self.policy == "priority" else self.running[-1])
            self.num_preemptions["no free block"] += 1
        return was_preempted

    def _schedule_waiting(self) -> None:
        """Move sequences from waiting to running, in order, while there are blocks and tokens for them.

        What the cache has of one's tokens counts as computed from the start. Whoever would go on with a block that this
        step computes for somebody else waits for it. A sibling of one whose prompt will be computed to its end shares
        its blocks, needs no tokens, and takes part from the next step on. Those who wait let others pass.
        """
        if not self.waiting or (len(self.running) >= self.max_num_seqs and self.policy != "priority"):
            return
        aside: list[Sequence] = []
        self._num_promised_blocks = sum(map(self._num_blocks_to_come, self.running))
        manager, scheduled = self.kv_cache_manager, self._num_scheduled_tokens
        under_way = {manager.next_missing_block(seq) for seq in self.running if seq.seq_id in scheduled}
        num_followers = 0
        while self.waiting and num_followers < self.max_num_seqs:
            seq = self.waiting.peek()
            parent = self._parent_of(seq)
            if parent is not None and self._num_scheduled_tokens[parent.seq_id] < num_tokens_left(parent):
                aside.append(self.waiting.pop())
                continue
            computed = NOTHING_COMPUTED if parent is not None else manager.get_computed_blocks(seq)
            seq.num_computed_tokens = computed.num_tokens
            missing = manager.next_missing_block(seq) if parent is None else None
            if missing is not None and missing in under_way:
                seq.num_computed_tokens = 0
                aside.append(self.waiting.pop())
                num_followers += 1
                continue
            if not self._has_room_for(seq, parent, computed):
                seq.num_computed_tokens = 0
                break  # and nobody overtakes it, or it might wait for ever
            self.waiting.pop()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            if parent is not None:
                self._forked.append(seq)
                continue
            under_way.add(missing)
            self._take_tokens(seq, self._chunk_size(seq))
            self._admitted_ids.add(seq.seq_id)
            self._num_promised_blocks += self._num_blocks_to_come(seq)
        for seq in reversed(aside):
            self.waiting.prepend(seq)

    def _parent_of(self, seq: Sequence) -> Sequence | None:
        """A sibling of `seq` whose prompt, which is theirs, is computed in this step, to its end or not."""
        if not self.enable_paged_kv or seq.request.sampling_params.n == 1 or seq.num_output_tokens > 0:
            return None
        siblings = (other for other in self.running if other.request_id == seq.request_id)
        scheduled = self._num_scheduled_tokens
        return next((other for other in siblings if other.seq_id in scheduled and other.num_output_tokens == 0), None)

    def _chunk_size(self, seq: Sequence) -> int:
        """How many of its tokens it may compute in this step."""
        num_left = num_tokens_left(seq)
        if not self.enable_chunked_prefill:
            return num_left if num_left <= self._token_budget else 0
        if num_left <= 1:  # a decode, or all but the last token was found
            return num_left if self._token_budget else 0
        cap = self._chunk_cap if len(self._seqs) > 1 else num_left  # alone, it keeps nobody waiting
        return min(num_left, cap, self._prefill_budget, self._token_budget)

    def _take_tokens(self, seq: Sequence, num_new_tokens: int) -> None:
        self._num_scheduled_tokens[seq.seq_id] = num_new_tokens
        self._token_budget -= num_new_tokens
        if num_tokens_left(seq) > 1:
            self._prefill_budget -= num_new_tokens

    def _give_tokens_back(self, seq: Sequence) -> None:
        """Its tokens of this step go back to the budgets."""
        given = self._num_scheduled_tokens.pop(seq.seq_id, 0)
        self._token_budget += given
        self._prefill_budget += given if num_tokens_left(seq) > 1 else 0

    def _num_blocks_to_come(self, seq: Sequence) -> int:
        """Blocks that a running prompt will take until it is computed, and that nobody else may count on."""
        if num_tokens_left(seq) <= 1:
            return 0
        return self.kv_cache_manager.num_blocks_for(seq.num_tokens) - len(seq.block_table)

    def _has_room_for(self, seq: Sequence, parent: Sequence | None, computed: ComputedBlocks) -> bool:
        """Whether `seq` can run; it holds its blocks then. Under "priority" less urgent ones have to give theirs up.

        That departs from vLLM, where priority orders the queue, and whoever runs gives way to those who run and lack a
        block, never to one that waits. Whoever gives up no more than its tokens of this step keeps its blocks, and goes
        on in a later step.
        """
        while parent is not None or self._chunk_size(seq) > 0 or self._take_tokens_back(seq):
            if len(self.running) < self.max_num_seqs and self._allocate(seq, parent, computed):
                return True
            victim = max(self.running, key=urgency, default=seq)
            if self.policy != "priority" or victim.request.priority <= seq.request.priority:
                return False
            self._preempt(victim)
            self.num_preemptions["urgent"] += 1
        return False  # there are more tokens in the next step

    def _take_tokens_back(self, seq: Sequence) -> bool:
        """The least urgent prompt of this step gives its tokens back, if it is less urgent. Returns whether it did."""
        if self.policy != "priority" or not self.enable_chunked_prefill:
            return False
        prompts = (other for other in self.running if self._num_scheduled_tokens.get(other.seq_id, 0) > 1)
        victim = max(prompts, key=urgency, default=seq)
        if victim.request.priority <= seq.request.priority:
            return False
        self._give_tokens_back(victim)
        return True

    def _allocate(self, seq: Sequence, parent: Sequence | None, computed: ComputedBlocks) -> bool:
        num_reserved = (self.watermark_blocks if self.running else 0) + self._num_promised_blocks
        num_reserved += sum(s.seq_id not in self._num_scheduled_tokens for s in self._forked)  # copies are to come
        if parent is None:
            num_blocks_for, chunk_size = self.kv_cache_manager.num_blocks_for, self._chunk_size(seq)
            num_reserved += num_blocks_for(seq.num_tokens)  # all of it has to fit
            num_reserved -= num_blocks_for(seq.num_computed_tokens + chunk_size)
            return self.kv_cache_manager.allocate_slots(seq, chunk_size, num_reserved, computed)
        if self.kv_cache_manager.num_free_blocks <= num_reserved:
            return False  # it will need a block of its own in the next step
        self.kv_cache_manager.fork(parent, seq)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take the cache of a running sequence away. Its output is kept, to be recomputed with its prompt."""
        self.running.remove(seq)
        self._give_tokens_back(seq)
        self._num_promised_blocks -= self._num_blocks_to_come(seq)
        self._free_cache(seq)
        seq.status = SequenceStatus.PREEMPTED
        seq.num_computed_tokens = 0
        self.waiting.prepend(seq)

    def _forget(self, seq: Sequence) -> None:
        del self._seqs[seq.seq_id]
        self._free_cache(seq)

    def _free_cache(self, seq: Sequence) -> None:
        self.kv_cache_manager.free(seq)
        self._forked = [forked for forked in self._forked if forked is not seq]
        self._retired.append(seq.seq_id)


def num_tokens_left(seq: Sequence) -> int:
    """Tokens of `seq` that are still to be computed; -1 while it computes one that is not known yet."""
    return seq.num_tokens - seq.num_computed_tokens
