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
from .output import SchedulerOutput
from .request_queue import create_request_queue, urgency

# New prompts go first, but after so many of their steps in a row those that run get one.
MAX_CONSECUTIVE_PREFILLS = 8
# Share of the blocks that an admission leaves while others run, or they would soon have to preempt whom it admitted.
WATERMARK = 0.01


class Scheduler:
    """Continuous batching (Orca: Yu et al., OSDI 2022): at every step whoever is done leaves and whoever fits enters.

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
        self.kv_cache_manager = KVCacheManager(num_blocks, config.block_size or 0)
        self.enable_paged_kv = config.enable_paged_kv
        self.watermark_blocks = int(WATERMARK * num_blocks) if self.enable_paged_kv else 0
        self.policy = config.scheduling_policy
        self.waiting = create_request_queue(self.policy)
        self.running: list[Sequence] = []
        self.num_preemptions: Counter[str] = Counter()
        self._seqs: dict[str, Sequence] = {}  # unfinished
        self._retired: list[str] = []
        self._forked: list[Sequence] = []  # and have not run yet
        self._num_prefills_in_a_row = 0

    def add_sequence(self, seq: Sequence) -> None:
        """`seq` waits from now on."""
        self._seqs[seq.seq_id] = seq
        self.waiting.add(seq)

    def has_unfinished_sequences(self) -> bool:
        return bool(self._seqs)

    def schedule(self) -> SchedulerOutput:
        """Admit what fits, as a step of prefills; where nobody can be admitted, decode all that run."""
        admitted: list[Sequence] = []
        if self._num_prefills_in_a_row < MAX_CONSECUTIVE_PREFILLS or not self.running:
            admitted = self._admit()
        if not admitted:
            self._allocate_for_running()
        seqs = admitted or list(self.running)
        return self._make_output(seqs, {seq.seq_id: num_tokens_left(seq) for seq in seqs}, is_prefill=bool(admitted))

    def schedule_ahead(self, scheduled: SchedulerOutput) -> SchedulerOutput | None:
        """The step after `scheduled`, before the tokens of that are known: all that run compute theirs, unseen.

        Whoever turns out to have ended has computed one too many. None where there is more to decide than that, and the
        next `schedule` has to: somebody could come in, or did not take part, or lacks a block, or draws on the host.
        """
        rows = {seq.seq_id: row for row, seq in enumerate(scheduled.seqs)}
        seqs = [seq for seq in self.running if seq.num_output_tokens + 1 < seq.request.max_tokens]
        if self.waiting and (len(seqs) < self.max_num_seqs or self.policy == "priority"):
            return None
        if not seqs or any(seq.seq_id not in rows for seq in self.running):
            return None
        if any(seq.request.sampling_params.needs_host for seq in seqs):
            return None
        if not all(self.kv_cache_manager.allocate_slots(seq, 1) for seq in seqs):
            return None
        output = self._make_output(seqs, {seq.seq_id: 1 for seq in seqs}, is_prefill=False)
        return replace(output, source_rows=[rows[seq.seq_id] for seq in seqs])

    def _make_output(
        self, seqs: list[Sequence], num_scheduled_tokens: dict[str, int], is_prefill: bool
    ) -> SchedulerOutput:
        for seq in seqs:
            seq.num_computed_tokens += num_scheduled_tokens[seq.seq_id]
        self._num_prefills_in_a_row = self._num_prefills_in_a_row + 1 if is_prefill else 0
        retired, self._retired = self._retired, []
        return SchedulerOutput(
            seqs=seqs,
            num_scheduled_tokens=num_scheduled_tokens,
            is_prefill=is_prefill,
            retired_seq_ids=retired,
            block_copies=self.kv_cache_manager.take_block_copies(),
        )

    def update_from_output(self, scheduled: SchedulerOutput, sampled: ModelRunnerOutput) -> list[SequenceOutput]:
        """Append the step's tokens and let go of the sequences that they finish."""
        outputs = []
        for row, seq in enumerate(scheduled.seqs):
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

    def make_stats(self) -> dict[str, int]:
        """Fields of StepRecord, after a step."""
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting),
            "num_preemptions": sum(self.num_preemptions.values()),
            "kv_slots_used": self.kv_cache_manager.num_used_slots(self.running),
            "kv_slots_allocated": self.kv_cache_manager.num_used_blocks * self.kv_cache_manager.block_size,
            "kv_slots": self.kv_cache_manager.num_blocks * self.kv_cache_manager.block_size,
        }

    def _allocate_for_running(self) -> None:
        """Slots for the next tokens of all who run. Where there are none, the last or least urgent stops running."""
        for seq in list(self.running):
            while seq.status is SequenceStatus.RUNNING:
                if self.kv_cache_manager.allocate_slots(seq, num_tokens_left(seq)):
                    break
                self._preempt(max(self.running, key=urgency) if self.policy == "priority" else self.running[-1])
                self.num_preemptions["no free block"] += 1

    def _admit(self) -> list[Sequence]:
        """Move sequences from waiting to running, in order, while there are blocks and tokens for them.

        Returns:
            Those whose tokens are to be computed now. A sibling of one of them, with the same prompt, shares its blocks
            instead and takes part from the next step on.
        """
        admitted: list[Sequence] = []
        parents: dict[str, Sequence] = {}  # by request
        token_budget = self.max_num_batched_tokens
        while self.waiting:
            seq = self.waiting.peek()
            parent = parents.get(seq.request_id) if seq.num_output_tokens == 0 else None
            num_new_tokens = 0 if parent else num_tokens_left(seq)
            if num_new_tokens > token_budget or not self._has_room_for(seq, parent):
                break  # and nobody overtakes it, or it might wait for ever
            self.waiting.pop()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            token_budget -= num_new_tokens
            (self._forked if parent else admitted).append(seq)
            if self.enable_paged_kv and parent is None and seq.num_output_tokens == 0:
                parents[seq.request_id] = seq
        return admitted

    def _has_room_for(self, seq: Sequence, parent: Sequence | None) -> bool:
        """Whether `seq` can run; it holds its blocks then. Under "priority" less urgent ones have to give theirs up.

        That departs from vLLM, where priority orders the queue, and whoever runs gives way to those who run and lack a
        block, never to one that waits.
        """
        while len(self.running) >= self.max_num_seqs or not self._allocate(seq, parent):
            victim = max(self.running, key=urgency, default=seq)
            if self.policy != "priority" or victim.request.priority <= seq.request.priority:
                return False
            self._preempt(victim)
            self.num_preemptions["urgent"] += 1
        return True

    def _allocate(self, seq: Sequence, parent: Sequence | None) -> bool:
        num_reserved = (self.watermark_blocks if self.running else 0) + len(self._forked)  # whose copies are to come
        if parent is None:
            return self.kv_cache_manager.allocate_slots(seq, num_tokens_left(seq), num_reserved)
        if self.kv_cache_manager.num_free_blocks <= num_reserved:
            return False  # it will need a block of its own in the next step
        self.kv_cache_manager.fork(parent, seq)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take the cache of a running sequence away. Its output is kept, to be recomputed with its prompt."""
        self.running.remove(seq)
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
