"""The scheduler: before every step, who runs in it.

It knows nothing of tensors: it deals in sequences, token counts and rows of the cache, and can be driven without a
model. Progress has one measure, `num_computed_tokens`: how many of a sequence's tokens have gone through the model, or
will have after the step that is being scheduled. A new prompt, a sequence in the middle of its output and one that
starts over after a preemption differ in nothing but how many tokens are still to be computed.
"""

from __future__ import annotations

from collections import Counter

from ...config import EngineConfig
from ...outputs import ModelRunnerOutput, SequenceOutput
from ...request import Sequence, SequenceStatus, check_stop
from .output import SchedulerOutput
from .request_queue import create_request_queue, urgency

# New prompts go first, but after so many of their steps in a row those that run get one.
MAX_CONSECUTIVE_PREFILLS = 8


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
        self.max_model_len = config.max_model_len or 0
        self.policy = config.scheduling_policy
        self.waiting = create_request_queue(self.policy)
        self.running: list[Sequence] = []
        self.num_preemptions: Counter[str] = Counter()
        self._seqs: dict[str, Sequence] = {}  # unfinished
        self._free_rows = list(reversed(range(self.max_num_seqs)))  # of the cache
        self._retired: list[str] = []
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
        self._num_prefills_in_a_row = self._num_prefills_in_a_row + 1 if admitted else 0
        seqs = admitted or list(self.running)
        num_scheduled_tokens = {seq.seq_id: num_tokens_left(seq) for seq in seqs}
        for seq in seqs:
            seq.num_computed_tokens += num_scheduled_tokens[seq.seq_id]
        retired, self._retired = self._retired, []
        return SchedulerOutput(seqs, num_scheduled_tokens, bool(admitted), retired)

    def update_from_output(self, scheduled: SchedulerOutput, sampled: ModelRunnerOutput) -> list[SequenceOutput]:
        """Append the step's tokens and let go of the sequences that they finish."""
        outputs = []
        for row, seq in enumerate(scheduled.seqs):
            if seq.status is not SequenceStatus.RUNNING:  # a logits processor aborted it
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
        return outputs

    def undo(self, scheduled: SchedulerOutput) -> None:
        """The step failed: nothing that it wrote can be trusted, so whoever took part waits again and starts over."""
        self.running = [seq for seq in self.running if not seq.is_finished]
        for seq in reversed(scheduled.seqs):
            if seq.status is SequenceStatus.RUNNING:
                self._preempt(seq)
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
            "kv_slots_used": sum(seq.num_computed_tokens for seq in self.running),
            "kv_slots_allocated": len(self.running) * self.max_model_len,
            "kv_slots": self.max_num_seqs * self.max_model_len,
        }

    def _admit(self) -> list[Sequence]:
        """Move sequences from waiting to running, in order, while there are rows and tokens for them."""
        admitted: list[Sequence] = []
        token_budget = self.max_num_batched_tokens
        while self.waiting:
            seq = self.waiting.peek()
            num_new_tokens = num_tokens_left(seq)
            if num_new_tokens > token_budget or not self._has_room_for(seq):
                break  # and nobody overtakes it, or it might wait for ever
            self.waiting.pop()
            seq.block_table = [self._free_rows.pop()]
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            admitted.append(seq)
            token_budget -= num_new_tokens
        return admitted

    def _has_room_for(self, seq: Sequence) -> bool:
        """Whether a row is free for `seq`. Under "priority" somebody of a less urgent class has to leave his.

        That departs from vLLM, where priority orders the queue, and a running sequence keeps running.
        """
        while len(self.running) >= self.max_num_seqs:
            victim = max(self.running, key=urgency)
            if self.policy != "priority" or victim.request.priority <= seq.request.priority:
                return False
            self._preempt(victim)
            self.num_preemptions["urgent"] += 1
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
        self._free_rows.extend(seq.block_table)
        seq.block_table = []
        self._retired.append(seq.seq_id)


def num_tokens_left(seq: Sequence) -> int:
    """Tokens of `seq` that are still to be computed."""
    return seq.num_tokens - seq.num_computed_tokens
