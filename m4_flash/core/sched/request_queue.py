"""Who is next: queues of waiting sequences, one for every scheduling policy."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from ...request import Sequence


class RequestQueue(ABC):
    """Waiting sequences in the order in which they will be served."""

    @abstractmethod
    def add(self, seq: Sequence) -> None:
        """A new sequence waits."""

    @abstractmethod
    def prepend(self, seq: Sequence) -> None:
        """A sequence that has run before waits again, ahead of all whom the policy does not put before it."""

    @abstractmethod
    def peek(self) -> Sequence:
        """The one to be served next, which stays. Raises IndexError when nobody waits."""

    @abstractmethod
    def pop(self) -> Sequence:
        """Take the one to be served next. Raises IndexError when nobody waits."""

    @abstractmethod
    def remove(self, seq: Sequence) -> None:
        """Take out a sequence wherever it stands. Raises ValueError if it does not wait."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Sequence]:
        """In order of service."""


class FCFSRequestQueue(RequestQueue):
    """First come, first served."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()

    def add(self, seq: Sequence) -> None:
        self._queue.append(seq)

    def prepend(self, seq: Sequence) -> None:
        self._queue.appendleft(seq)

    def peek(self) -> Sequence:
        return self._queue[0]

    def pop(self) -> Sequence:
        return self._queue.popleft()

    def remove(self, seq: Sequence) -> None:
        self._queue.remove(seq)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)


class HeapRequestQueue(RequestQueue):
    """Smallest key first; among equal keys those that were prepended, then the others in the order of their arrival.

    Args:
        key: must give the same sequence the same key every time.
    """

    def __init__(self, key: Callable[[Sequence], Any]) -> None:
        self._key = key
        self._back, self._front = count(), count(-1, -1)
        self._heap: list[tuple[Any, int, Sequence]] = []

    def add(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (self._key(seq), next(self._back), seq))

    def prepend(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (self._key(seq), next(self._front), seq))

    def peek(self) -> Sequence:
        return self._heap[0][-1]

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[-1]

    def remove(self, seq: Sequence) -> None:
        self._heap.pop([entry[-1] for entry in self._heap].index(seq))
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        heap = self._heap.copy()
        while heap:  # sorting as far as somebody looks
            yield heapq.heappop(heap)[-1]


# A second of waiting makes up for this many tokens of prompt.
SJF_TOKENS_PER_SECOND = 1000.0


def urgency(seq: Sequence) -> tuple[int, float, int]:
    """The order under "priority": smaller is more urgent. The n sequences of a request go by their number."""
    return seq.request.priority, seq.request.arrival_time, seq.index


def aged_prompt_length(seq: Sequence) -> float:
    """The order under "sjf": shortest prompt first, and whoever came later counts as longer.

    All who wait age alike, so their order never changes and is known on arrival; nobody can be overtaken by more than
    those who arrive within num_prompt_tokens / SJF_TOKENS_PER_SECOND seconds.
    """
    return seq.num_prompt_tokens + SJF_TOKENS_PER_SECOND * seq.request.arrival_time


def create_request_queue(policy: str) -> RequestQueue:
    """The queue for EngineConfig.scheduling_policy."""
    if policy == "fcfs":
        return FCFSRequestQueue()
    return HeapRequestQueue(urgency if policy == "priority" else aged_prompt_length)
