"""A record of every step of the engine, to be plotted or opened in a trace viewer."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of the newest steps so many are kept at least, and twice as many at most.
MAX_STEPS = 100_000


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: its number, from 0.
        phase: "prefill" or "decode".
        seq_ids: the sequences that ran.
        num_tokens: tokens that went through the model.
        start: on the clock of `time.perf_counter`.
        seconds: how long it took.
        num_running, num_waiting: sequences after the step.
        num_preemptions: of sequences, since the engine started.
        kv_slots_used: slots of the KV cache that hold a token after the step.
        kv_slots_allocated: slots of blocks that belong to running sequences.
        kv_slots: slots of the whole cache.
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
