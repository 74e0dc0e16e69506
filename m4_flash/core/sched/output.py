"""SchedulerOutput: what the scheduler decided for one step. It is all that the model runner gets to know."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ...request import Sequence


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's batch.

    Attributes:
        seqs: who runs.
        num_scheduled_tokens: {sequence id: how many of its tokens}. They are the last ones before
            `seq.num_computed_tokens`, which the scheduler has moved forward already.
        is_prefill: whether these are newly admitted, or else in the middle of their output.
        retired_seq_ids: sequences that finished or were preempted since the step before.
        block_copies: (from, to): blocks of the cache to be copied before the forward pass.
        source_rows: rows of the step before. What it draws there the first of these sequences compute, in this order;
            only the device knows these tokens yet.
    """

    seqs: list[Sequence]
    num_scheduled_tokens: dict[str, int]
    is_prefill: bool
    retired_seq_ids: list[str]
    block_copies: list[tuple[int, int]]
    source_rows: Collection[int] = ()

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())
