"""A record of every step of the engine, to be plotted or opened in a trace viewer."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of the newest steps so many are kept at least, and twice as many at most.
MAX_STEPS = 100_000
RECENT_SEQUENCES = 1000  # that the hit rate is about


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: its number, from 0.
        phase: "prefill", "decode", or "mixed" of both.
        seq_ids: the sequences that ran.
        num_tokens: tokens that went through the model.
        start: on the clock of `time.perf_counter`.
        seconds: how long it took.
        num_running, num_waiting: sequences after the step.
        num_preemptions: of sequences, since the engine started.
        kv_slots_used: slots of the KV cache that hold a token after the step.
        kv_slots_allocated: slots of blocks that belong to running sequences.
        kv_slots: slots of the whole cache.
        kv_slots_cached: slots of blocks that the prefix cache can find, whether or not somebody holds them.
        num_copied_blocks: blocks copied on write, since the engine started.
        prefix_cache_evictions: blocks that it could find and that were used for other tokens, since then.
        prefix_cache_queries, prefix_cache_hits: tokens of admitted sequences, and those of them that were found.
        prefix_cache_hit_rate: the share that was found, of the last 1,000 admitted since the cache was reset.
    """

    step: int
    phase: str
    seq_ids: tuple[str, ...]
    num_tokens: int
    start: float
    seconds: float
    num_running: int
    num_waiting: int
    num_preemptions: int
    kv_slots_used: int
    kv_slots_allocated: int
    kv_slots: int
    kv_slots_cached: int
    num_copied_blocks: int
    prefix_cache_evictions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prefix_cache_hit_rate: float


class PrefixCacheStats:
    """How many tokens the prefix cache was asked for and how many it had, since the engine started.

    A sequence counts once, when it is first admitted. Those that share a prompt (n > 1) and get it with all its blocks
    from the first of them do not count.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.hits = 0
        self.forget_recent()

    def record(self, num_tokens: int, num_hits: int) -> None:
        """A sequence of `num_tokens` was admitted and need not compute `num_hits` of them."""
        self.queries += num_tokens
        self.hits += num_hits
        self._recent.append((num_tokens, num_hits))
        self._recent_queries += num_tokens
        self._recent_hits += num_hits
        if len(self._recent) > RECENT_SEQUENCES:
            oldest = self._recent.popleft()
            self._recent_queries -= oldest[0]
            self._recent_hits -= oldest[1]

    def forget_recent(self) -> None:
        """The rate starts anew."""
        self._recent: deque[tuple[int, int]] = deque()  # (queries, hits) of a sequence
        self._recent_queries = self._recent_hits = 0

    @property
    def hit_rate(self) -> float:
        """Of the last 1,000; 0.0 before the first."""
        return self._recent_hits / self._recent_queries if self._recent_queries else 0.0


@dataclass
class EngineStats:
    """The steps since the engine started, or since `clear`; of a long run the last ones."""

    steps: list[StepRecord] = field(default_factory=list)

    def record(self, *, start: float, **what: Any) -> None:
        """Note a step that began at `start` and ends now; `what` are the other fields of StepRecord."""
        seconds = time.perf_counter() - start
        if len(self.steps) == 2 * MAX_STEPS:
            del self.steps[:MAX_STEPS]
        number = self.steps[-1].step + 1 if self.steps else 0
        self.steps.append(StepRecord(step=number, start=start, seconds=seconds, **what))

    def clear(self) -> None:
        self.steps.clear()

    def to_trace(self, path: str | Path) -> None:
        """Write the steps in the Trace Event format, for chrome://tracing or ui.perfetto.dev.

        One track shows the steps; every sequence has a track of its own below it; a counter shows the cache.
        """
        tracks: dict[str, int] = {}
        events: list[dict[str, object]] = []
        origin = self.steps[0].start if self.steps else 0.0
        common = {"pid": os.getpid(), "cat": "step", "ph": "X"}
        for record in self.steps:
            times = {"ts": (record.start - origin) * 1e6, "dur": record.seconds * 1e6}  # microseconds
            args = {"step": record.step, "tokens": record.num_tokens, "sequences": len(record.seq_ids)}
            events.append({"name": record.phase, "tid": 0, "args": args, **times, **common})
            for seq_id in record.seq_ids:
                track = tracks.setdefault(seq_id, len(tracks) + 1)
                events.append({"name": record.phase, "tid": track, "args": args, **times, **common})
            slots = {
                "used": record.kv_slots_used,
                "allocated, not used": record.kv_slots_allocated - record.kv_slots_used,
                "free": record.kv_slots - record.kv_slots_allocated,
            }
            sequences = {"running": record.num_running, "waiting": record.num_waiting}
            for name, counter in {"KV slots": slots, "sequences": sequences}.items():
                events.append({**common, "name": name, "ph": "C", "ts": times["ts"], "args": counter})
        for name, track in {"steps": 0, **tracks}.items():
            events.append({**common, "ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}})
        Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
