"""What the engine hands back: one RequestOutput a request, holding one CompletionOutput a generated sequence.

The same objects serve `generate` (once, complete) and `stream` (once a step, cumulative, with what is new in `delta`).
The engine keeps one object a request and lets it grow, since a copy of everything at every step would cost more than
the step; `snapshot` makes the copy where somebody wants to keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NoReturn

from .request import Sequence


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds on the clock of `time.perf_counter`.

    Attributes:
        token_times: for each of the n sequences, when each of its tokens came out.
    """

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_output_tokens: int = 0
    first_scheduled_time: float | None = None
    token_times: list[list[float]] = field(default_factory=list)

    @property
    def queue_time(self) -> float | None:
        """From arrival to the first step that worked on it, in seconds; None before that."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds; None before there is one."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between neighbouring tokens of the same sequence, for all sequences."""
        return [after - before for times in self.token_times for before, after in pairwise(times)]

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None before the second."""
        latencies = self.inter_token_latencies
        return sum(latencies) / len(latencies) if latencies else None

    @property
    def e2e_latency(self) -> float | None:
        """From arrival to the newest token, in seconds; None before there is one."""
        return None if self.last_token_time is None else self.last_token_time - self.arrival_time

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens of all sequences over the time from arrival to the newest; None before there is one."""
        return self.num_output_tokens / self.e2e_latency if self.e2e_latency else None

    def record_token(self, index: int, now: float) -> None:
        """A token of sequence `index` came out at `now`."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now
        self.num_output_tokens += 1
        self.token_times[index].append(now)


@dataclass
class Logprob:
    """Attributes:
    logprob: natural logarithm of the token's probability before any sampling parameter was applied.
    rank: 1 for the most likely token.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class ModelRunnerOutput:
    """One step's draws, on the host. Rows are the sequences that a token was drawn for, in order.

    Attributes:
        token_ids: a token for each row.
        logprobs: {row: [(token id, log-probability, rank), …]}, the row's token first, for rows that want them.
        errors: {row: message} where a request's own logits processor failed; such a row's token means nothing.
    """

    token_ids: list[int]
    logprobs: dict[int, list[tuple[int, float, int]]]
    errors: dict[int, str]


@dataclass
class SequenceOutput:
    """What one step did for one sequence.

    Attributes:
        token_id: the new token.
        logprobs: (token id, log-probability, rank), the new token first, if asked for.
    """

    seq: Sequence
    token_id: int
    logprobs: list[tuple[int, float, int]] | None = None


@dataclass
class CompletionOutput:
    """One generated continuation.

    Attributes:
        index: its number within the request.
        text: the decoded output so far, without special tokens and without the token that ended it.
        token_ids: the generated ids so far, including the one that ended it.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop token or string that ended it, or the message of an error; None for EOS and for length.
        delta: the part of `text` that is new since the last output of a stream.
        cumulative_logprob: sum of the generated tokens' log-probabilities; None unless `logprobs` was asked for.
        logprobs: for each generated token {token id: Logprob}, the token itself first.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    delta: str = ""
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    """The answer to one request; `text`, `token_ids` and `delta` are short for its first completion's.

    Attributes:
        num_cached_tokens: tokens of the prompt that were in the prefix cache and need not be computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(repr=False)
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def delta(self) -> str:
        return self.outputs[0].delta

    def snapshot(self) -> RequestOutput:
        """A copy that no later step changes (but for `metrics`, which goes on)."""
        outputs = [
            replace(o, token_ids=list(o.token_ids), logprobs=o.logprobs and list(o.logprobs)) for o in self.outputs
        ]
        return replace(self, outputs=outputs)

    def __getitem__(self, key: object) -> NoReturn:
        key = {"tokens": "token_ids"}.get(str(key), key)
        raise TypeError(f"a RequestOutput is an object, not a dict: write output.{key}, not output[{key!r}]")
