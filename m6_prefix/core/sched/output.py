"""SchedulerOutput: what the scheduler decided for one step. It is all that the model runner gets to know."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ...request import Sequence


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's batch.

    Attributes:
        seqs: who runs; decodes come first.
        num_scheduled_tokens: {sequence id: how many of its tokens}. They are the last ones before
            `seq.num_computed_tokens`, which the scheduler has moved forward already.
        seq_lens: of each of `seqs`, how many of its tokens are computed after this step. When that is taken in, the
            sequence itself may be further, if the next step is under way.
        sampled_seqs: those of them that get a token, since all that they have is computed then.
        is_prefill: whether one of them was admitted for it, or had more than one token to compute.
        is_decode: whether one of them was there before, and had a single token to compute.
        retired_seq_ids: sequences that finished or were preempted since the step before.
        block_copies: (from, to): blocks of the cache to be copied before the forward pass.
        source_rows: rows of the step before. What it draws there the first of these sequences compute, in this order;
            only the device knows these tokens yet.
    """

    seqs: list[Sequence]
    num_scheduled_tokens: dict[str, int]
    seq_lens: list[int]
    sampled_seqs: list[Sequence]
    is_prefill: bool
    is_decode: bool
    retired_seq_ids: list[str]
    block_copies: list[tuple[int, int]]
    source_rows: Collection[int] = ()

    @property
    def phase(self) -> str:
        """For the record: "prefill", "decode" or "mixed"."""
        if self.is_prefill and self.is_decode:
            return "mixed"
        return "prefill" if self.is_prefill else "decode"

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())
