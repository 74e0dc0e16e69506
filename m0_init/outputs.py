"""What the engine hands back: one RequestOutput a request, holding one CompletionOutput a generated sequence.

The same objects serve `generate` (once, complete) and `stream` (once a step, cumulative, with what is new in `delta`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds on the clock of `time.perf_counter`."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_output_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds; None before there is one."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None before the second."""
        if self.first_token_time is None or self.last_token_time is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_output_tokens - 1)

    @property
    def e2e_latency(self) -> float | None:
        """From arrival to the newest token, in seconds; None before there is one."""
        return None if self.last_token_time is None else self.last_token_time - self.arrival_time

    def record_token(self, now: float) -> None:
        """A token of the request came out at `now`."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now
        self.num_output_tokens += 1


@dataclass
class CompletionOutput:
    """One generated continuation.

    Attributes:
        index: its number within the request.
        text: the decoded output so far, without special tokens and without the token that ended it.
        token_ids: the generated ids so far, including the one that ended it.
        finish_reason: "stop" or "length"; None while it runs.
        stop_reason: the stop token that ended it; None for EOS and for length.
        delta: the part of `text` that is new since the last output of a stream.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    delta: str = ""


@dataclass
class RequestOutput:
    """The answer to one request; `text`, `token_ids` and `delta` are short for its first completion's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(repr=False)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def delta(self) -> str:
        return self.outputs[0].delta

    def __getitem__(self, key: object) -> NoReturn:
        key = {"tokens": "token_ids"}.get(str(key), key)
        raise TypeError(f"a RequestOutput is an object, not a dict: write output.{key}, not output[{key!r}]")
