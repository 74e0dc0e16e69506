"""Request and Sequence: what a user asked for, and a stream of tokens being made for it.

A Request never changes after it was validated. A Sequence is the mutable half: it starts as a copy of the prompt and
grows by one token a step until `check_stop` gives it one of the finished statuses.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

from .sampling_params import SamplingParams


class SequenceStatus(enum.IntEnum):
    """Where a sequence stands. The order matters: everything from FINISHED_STOPPED on is final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        return self >= SequenceStatus.FINISHED_STOPPED

    @property
    def finish_reason(self) -> str | None:
        """The word that users see in `CompletionOutput.finish_reason`; None while unfinished."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: "stop",
    SequenceStatus.FINISHED_LENGTH: "length",
    SequenceStatus.FINISHED_ABORTED: "abort",
    SequenceStatus.FINISHED_ERROR: "error",
}


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked.

    Attributes:
        prompt: the text, or None when the prompt came as token ids.
        max_tokens: most tokens to generate: the parameters' own limit, or what max_model_len leaves.
        eos_token_ids: the model's tokens that end it; none if they are to be ignored.
        arrival_time: seconds on the clock of `time.perf_counter`.
        priority: smaller is more urgent; counts under scheduling_policy="priority".
        cache_salt: only requests with the same one find each other's tokens in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int
    eos_token_ids: tuple[int, ...]
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None


@dataclass(eq=False)
class Sequence:
    """One stream of tokens, prompt and output together.

    Attributes:
        index: its number within the request.
        seed: 64-bit seed of this sequence's draws.
        token_ids: the prompt's ids followed by the generated ones.
        num_computed_tokens: tokens whose keys and values are in the cache, or will be after the scheduled step.
        block_table: the blocks of the cache that hold them, in order.
        block_hashes: by which full blocks of its tokens are found in the prefix cache, as far as somebody has asked.
        num_cached_tokens: how many were found there when it was first admitted; -1 before that.
        stop_reason: the stop token that ended it, or the message of an error; None for EOS and for length.
    """

    seq_id: str
    request: Request
    index: int
    seed: int
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    num_cached_tokens: int = field(default=-1, init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    stop_reason: int | str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def ended_by_token(self) -> bool:
        """The last token is an EOS or a stop token: it belongs to `token_ids` and not to the text."""
        return self.status is SequenceStatus.FINISHED_STOPPED


def check_stop(seq: Sequence) -> None:
    """Finish `seq` if its newest token was its last one.

    The order is vLLM's: an EOS on the last token that was allowed reports "stop", not "length".
    """
    request = seq.request
    token = seq.token_ids[-1]
    if token in request.eos_token_ids:
        seq.status = SequenceStatus.FINISHED_STOPPED
    elif token in (request.sampling_params.stop_token_ids or ()):
        seq.status = SequenceStatus.FINISHED_STOPPED
        seq.stop_reason = token
    elif seq.num_output_tokens == request.max_tokens:
        seq.status = SequenceStatus.FINISHED_LENGTH


def derive_seed(engine_seed: int, counter: int) -> int:
    """The 64-bit seed of the `counter`-th request of an engine, for requests that bring none of their own."""
    digest = hashlib.blake2b(f"{engine_seed}/{counter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
