"""The laboratory that notebooks and benchmarks share: it runs a workload on a stage and says how long every token took.

An engine is driven only through `LLM.stream`, which all stages have, and is timed from the outside, so that the same
code measures all of them. Every figure that is kept goes through `save_result`, which writes down the machine, the
versions and the command beside it.
"""

from __future__ import annotations

import heapq
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from . import TINY
from .bench.workloads import Workload, WorkloadRequest, make_workload
from .cli import import_stage

ROOT = Path(__file__).resolve().parent.parent

#: `load_stage("m0")` is the package `m0_init`.
load_stage = import_stage


# ---- running a workload ----------------------------------------------------------------------------------------------


@dataclass
class SequenceTrace:
    """When the tokens of one generated sequence came out, in seconds since the run began."""

    request: int
    sample: int
    num_prompt_tokens: int
    sent: float
    token_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to first token, waiting for others included."""
        return self.token_times[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.token_times[-1] - self.sent

    @property
    def inter_token(self) -> list[float]:
        """The gaps between consecutive tokens."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass
class Result:
    """What a run of a workload took; `traces` are in the order of its requests, then of their samples.

    `peak_kv_slots` is the most slots of the KV cache (tokens) that belonged to running sequences after a step; None for
    an engine that does not say.
    """

    stage: str
    workload: Workload
    seconds: float
    traces: list[SequenceTrace]
    peak_memory_bytes: int
    notes: list[str]
    peak_kv_slots: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(len(trace.token_times) for trace in self.traces)

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.seconds

    def summary(self) -> dict[str, Any]:
        """The figures of the run, ready for JSON. Latencies in milliseconds, as the median and the 99th percentile over
        sequences (TTFT, TPOT, E2E) or over all gaps between tokens (ITL)."""
        tpots = [np.mean(trace.inter_token) for trace in self.traces if len(trace.token_times) > 1]
        latencies: dict[str, list[Any]] = {
            "ttft": [trace.ttft for trace in self.traces],
            "tpot": tpots,
            "itl": [gap for trace in self.traces for gap in trace.inter_token],
            "e2e": [trace.e2e for trace in self.traces],
        }
        return {
            "stage": self.stage,
            "workload": self.workload.name,
            "description": self.workload.description,
            "requests": len(self.workload.requests),
            "output_tokens": self.num_output_tokens,
            "seconds": round(self.seconds, 4),
            "output_tokens_per_s": round(self.output_tokens_per_s, 2),
            "requests_per_s": round(len(self.workload.requests) / self.seconds, 4),
            **{
                f"{name}_p{q}_ms": round(float(np.percentile(values, q)) * 1e3, 3) if values else None
                for name, values in latencies.items()
                for q in (50, 99)
            },
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_kv_slots": self.peak_kv_slots,
            "notes": self.notes,
        }


def workload_for(llm: Any, name: str, num_requests: int | None = None) -> Workload:
    """The workload `name` in the sizes for this engine's device and with token ids of its vocabulary; of "uniform" with
    as many requests as one likes."""
    return make_workload(
        name,
        vocab_size=llm.hf_config.vocab_size,
        max_model_len=llm.config.max_model_len,
        device=llm.config.device,
        num_requests=num_requests,
    )


def run(engine: Any, workload: Workload | str, *, warmup: bool = True, **engine_options: Any) -> Result:
    """Runs `workload` and times every token.

    `engine` is an open LLM of any stage, or a stage's name: then an LLM is made with `engine_options` (the embedded
    model unless they name another), and closed again. All requests are sent at once, but for those that arrive at a
    later step, and for turns of a conversation, which wait for the turn before. With `warmup`, a two-token request goes
    first and is not counted. What the stage cannot do as the workload asks is said in `Result.notes`.
    """
    if isinstance(engine, str):
        with load_stage(engine).LLM(**{"model": str(TINY), **engine_options}) as llm:
            return run(llm, workload, warmup=warmup)
    if engine_options:
        raise TypeError(f"an open LLM takes no engine options: {', '.join(engine_options)}")
    if isinstance(workload, str):
        workload = workload_for(engine, workload)
    params_type = type(engine.get_default_sampling_params())
    has_n = "n" in {option.name for option in fields(params_type)}
    if warmup:
        # The tail of a prompt, so that no prefix of it is left in a cache.
        tail = workload.requests[0].prompt_token_ids[-8:]
        engine.generate([tail], params_type(max_tokens=2, temperature=0.0, ignore_eos=True), use_tqdm=False)
    if reset_prefix_cache := getattr(engine, "reset_prefix_cache", None):
        reset_prefix_cache()  # a run finds what it has computed itself, not what the one before has
    _reset_peak_memory()
    num_earlier_steps = len(_steps_of(engine))
    start = time.perf_counter()
    traces: dict[tuple[int, int], SequenceTrace] = {}
    histories: list[list[int]] = [request.prompt_token_ids for request in workload.requests]
    for turn in _turns(workload.requests):
        jobs: list[_Job] = []
        for index in turn:
            request = workload.requests[index]
            if request.follows is not None:
                histories[index] = histories[request.follows] + request.prompt_token_ids
            jobs += _jobs(index, request, histories[index], params_type, has_n)
        send = _stream if not _notes_times(engine) else _step if any(job.arrival_step for job in jobs) else _generate
        for trace in send(engine, jobs, start):
            traces[trace.request, trace.sample] = trace
        for index in turn:
            histories[index] = histories[index] + traces[index, 0].token_ids
    seconds = time.perf_counter() - start
    # The first stage with a cache has one row for its one sequence: all of it.
    slots = [getattr(step, "kv_slots_allocated", step.kv_slots) for step in _steps_of(engine)[num_earlier_steps:]]
    return Result(
        stage=type(engine).__module__.partition(".")[0],
        workload=workload,
        seconds=seconds,
        traces=[traces[key] for key in sorted(traces)],
        peak_memory_bytes=_peak_memory(),
        notes=_notes(workload.requests, has_n, _notes_times(engine)),
        peak_kv_slots=max(slots, default=None),
    )


def _steps_of(llm: Any) -> list[Any]:
    """The engine's own records of its steps; none in the first stage."""
    steps: list[Any] = getattr(getattr(getattr(llm, "engine", None), "stats", None), "steps", [])
    return steps


@dataclass(frozen=True)
class _Job:
    request: int
    sample: int
    prompt: list[int]
    params: Any
    arrival_step: int


def _turns(requests: list[WorkloadRequest]) -> list[list[int]]:
    """Indices of the requests that can be sent together: those that follow nothing, then those that follow them, …"""
    depths: list[int] = []
    for request in requests:
        depths.append(0 if request.follows is None else depths[request.follows] + 1)
    return [[index for index, at in enumerate(depths) if at == depth] for depth in range(max(depths) + 1)]


def _jobs(index: int, request: WorkloadRequest, prompt: list[int], params_type: type, has_n: bool) -> Iterator[_Job]:
    """The request as this stage can take it: whole, or one job a sample. Sample i draws with seed + i either way."""
    options: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "ignore_eos": request.ignore_eos,
    }
    if has_n or request.n == 1:
        if request.n > 1:
            options["n"] = request.n
        yield _Job(index, 0, prompt, params_type(seed=request.seed, **options), request.arrival_step)
        return
    for sample in range(request.n):
        seed = None if request.seed is None else request.seed + sample
        yield _Job(index, sample, prompt, params_type(seed=seed, **options), request.arrival_step)


def _notes_times(llm: Any) -> bool:
    """Whether the engine itself notes when each token came out, as all but the first stage do."""
    outputs = sys.modules.get(f"{type(llm).__module__.partition('.')[0]}.outputs")
    return "token_times" in getattr(getattr(outputs, "RequestMetrics", None), "__dataclass_fields__", ())


def _generate(llm: Any, jobs: list[_Job], start: float) -> Iterable[SequenceTrace]:
    """Sends the jobs and takes the engine's own times: snapshots of a stream would cost more than a fast step."""
    sent = time.perf_counter() - start
    outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
    for job, output in zip(jobs, outputs, strict=True):
        yield from _traces_of(job, output, sent, start)


def _step(llm: Any, jobs: list[_Job], start: float) -> Iterable[SequenceTrace]:
    """Steps the engine by hand, and sends each job before the step that it is to arrive at."""
    engine, step = llm.engine, 0
    coming = deque(sorted(jobs, key=lambda job: job.arrival_step))
    sent: list[tuple[_Job, Any, float]] = []
    while coming or engine.has_unfinished_requests():
        while coming and coming[0].arrival_step <= step:
            job, request_id = coming.popleft(), f"lab-{len(sent)}"
            now = time.perf_counter() - start
            engine.add_request(request_id, job.prompt, job.params)
            sent.append((job, engine.get_output(request_id), now))
        engine.step()
        step += 1
    for job, output, now in sent:
        yield from _traces_of(job, output, now, start)


def _traces_of(job: _Job, output: Any, sent: float, start: float) -> Iterator[SequenceTrace]:
    for completion, times in zip(output.outputs, output.metrics.token_times, strict=True):
        trace = SequenceTrace(job.request, job.sample + completion.index, len(job.prompt), sent)
        trace.token_times = [moment - start for moment in times]
        trace.token_ids = list(completion.token_ids)
        yield trace


def _stream(llm: Any, jobs: list[_Job], start: float) -> Iterable[SequenceTrace]:
    """Sends the jobs and notes the time of every token."""
    # Outputs come in any order and under ids of the engine's choosing; equal prompts are told apart by turn of arrival.
    unseen: dict[tuple[int, ...], deque[_Job]] = defaultdict(deque)
    for job in jobs:
        unseen[tuple(job.prompt)].append(job)
    job_of: dict[str, _Job] = {}
    traces: dict[tuple[str, int], SequenceTrace] = {}
    sent = time.perf_counter() - start
    for output in llm.stream([job.prompt for job in jobs], [job.params for job in jobs]):
        now = time.perf_counter() - start
        if output.request_id not in job_of:
            job_of[output.request_id] = unseen[tuple(output.prompt_token_ids)].popleft()
        job = job_of[output.request_id]
        for completion in output.outputs:
            key = (output.request_id, completion.index)
            if key not in traces:
                traces[key] = SequenceTrace(job.request, job.sample + completion.index, len(job.prompt), sent)
            trace = traces[key]
            trace.token_times += [now] * (len(completion.token_ids) - len(trace.token_times))
            if output.finished:
                trace.token_ids = list(completion.token_ids)
    return traces.values()


def _notes(requests: list[WorkloadRequest], has_n: bool, has_steps: bool) -> list[str]:
    notes = []
    if any(request.n > 1 for request in requests) and not has_n:
        notes.append("this stage has no n: every sample was sent as a request of its own")
    if any(request.arrival_step for request in requests) and not has_steps:
        notes.append("every request was sent at the start: arrival steps were not kept")
    return notes


def _cuda() -> Any:
    """torch.cuda if somebody has loaded torch and there is a GPU, else None: this module alone does not need torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _reset_peak_memory() -> None:
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    """Bytes, weights included: on a GPU the most that tensors held during the run; on a CPU the most that the process
    has ever held, so a second run in one process never shows less than the first."""
    if cuda := _cuda():
        return int(cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- what is written down --------------------------------------------------------------------------------------------


def environment(command: str | None = None) -> dict[str, Any]:
    """The machine, the versions, the commit and the command (this process's own unless given) behind a figure."""
    torch, cuda = sys.modules.get("torch"), _cuda()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": _output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [cuda.get_device_name(index) for index in range(cuda.device_count())] if cuda else [],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "flash-attn", "numpy")},
    }


def save_result(name: str, figures: Mapping[str, Any], folder: Path = ROOT / "docs" / "results") -> Path:
    """Writes `figures`, with the environment before them, to `folder`/`name`.json; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"environment": environment(), **figures}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ---- pictures --------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart with any kind of colour vision. Stage k always has colour k.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999933")
_STYLE: Any = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
}


def colour_of(label: str, position: int) -> str:
    """The stage's colour if `label` starts with one ("m3", "m3_paged"), else the colour number `position`."""
    stage = re.match(r"m(\d+)", label)
    return COLOURS[(int(stage[1]) if stage else position) % len(COLOURS)]


def new_axes(title: str, xlabel: str, ylabel: str) -> Any:
    """A figure with one matplotlib Axes in the project's style; returns the Axes."""
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        _, axes = plt.subplots()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def growth(result: Result, window: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Context length in tokens and seconds a token, for the one request of `result`.

    Each point is the median of `window` neighbouring tokens, which a hiccup of the machine does not move. The first
    token is left out: it is the prefill.
    """
    trace = result.traces[0]
    gaps = np.array(trace.inter_token)
    contexts = trace.num_prompt_tokens + 1 + np.arange(len(gaps))
    whole = len(gaps) // window * window
    if not whole:
        raise ValueError(f"{len(gaps)} gaps between tokens are less than one window of {window}")
    return contexts[:whole].reshape(-1, window).mean(axis=1), np.median(gaps[:whole].reshape(-1, window), axis=1)


def plot_time_per_token(results: Mapping[str, Result], degrees: Mapping[str, int] | None = None) -> Any:
    """Milliseconds a token against context length, one colour a label; returns the Axes.

    `degrees` asks for a least-squares polynomial through a label's points: 1 is a line, 2 a parabola.
    """
    axes = new_axes("Time per token", "context (tokens)", "time per token (ms)")
    for position, (label, result) in enumerate(results.items()):
        colour = colour_of(label, position)
        contexts, seconds = growth(result)
        axes.plot(contexts, seconds * 1e3, ".", color=colour, alpha=0.5, label=label)
        if degree := (degrees or {}).get(label):
            fit = np.polynomial.Polynomial.fit(contexts, seconds * 1e3, degree)
            kind = {1: "linear", 2: "quadratic"}.get(degree, f"degree {degree}")
            axes.plot(contexts, fit(contexts), color=colour, label=f"{label}, {kind} fit")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return axes


def assign_lanes(steps: Sequence[Any]) -> dict[str, int]:
    """{sequence id: its lane}: a sequence takes the lowest lane that is free from its first step to its last, as if it
    were a row of a batch. `steps` are StepRecords."""
    last_step = {seq_id: number for number, step in enumerate(steps) for seq_id in step.seq_ids}
    lanes: dict[str, int] = {}
    free: list[int] = []
    for number, step in enumerate(steps):
        for seq_id in step.seq_ids:
            if seq_id not in lanes:
                lanes[seq_id] = heapq.heappop(free) if free else len(set(lanes.values()))
        for seq_id in step.seq_ids:
            if last_step[seq_id] == number:
                heapq.heappush(free, lanes[seq_id])
    return lanes


def row_shares(steps: Sequence[Any], num_rows: int) -> dict[str, float]:
    """How `num_rows` rows spend the time of `steps` (StepRecords), as shares of it that sum to 1.

    A row is "busy" while its sequence runs, "stalled" while a step leaves out a sequence that has run and will run
    again, and "empty" while it has none.
    """
    first_step: dict[str, int] = {}
    last_step: dict[str, int] = {}
    for number, step in enumerate(steps):
        for seq_id in step.seq_ids:
            first_step.setdefault(seq_id, number)
            last_step[seq_id] = number
    total = num_rows * sum(step.seconds for step in steps)
    busy = sum(len(step.seq_ids) * step.seconds for step in steps)
    held = sum(step.seconds for seq_id, first in first_step.items() for step in steps[first : last_step[seq_id] + 1])
    return {"busy": busy / total, "stalled": (held - busy) / total, "empty": 1 - held / total}


PHASE_COLOURS = {"prefill": COLOURS[5], "decode": COLOURS[1]}


def plot_steps(steps: Sequence[Any], rows: Mapping[str, int], title: str, axes: Any = None) -> Any:
    """Who ran when: a bar for every step (StepRecord) of every sequence, in the row that `rows` gives it; prefill and
    decode by colour. Returns the Axes, new ones unless given."""
    if axes is None:
        axes = new_axes("", "", "")
    axes.set_title(title, loc="left")
    axes.set_xlabel("time (ms)")
    origin = steps[0].start
    for phase, colour in PHASE_COLOURS.items():
        bars_of: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for step in steps:
            if step.phase == phase:
                for seq_id in step.seq_ids:
                    bars_of[rows[seq_id]].append((1e3 * (step.start - origin), 1e3 * step.seconds))
        for number, (row, spans) in enumerate(bars_of.items()):
            label = phase if number == 0 else None  # one entry in the legend
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.15, label=label)
    axes.set_ylim(max(rows.values()) + 0.6, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    return axes


def render_prefix_cache(manager: Any, to_text: Callable[[list[int]], str] | None = None) -> str:
    """What a KVCacheManager's prefix cache holds, as a tree: how long, which tokens, who holds it, or when it will go.

    Args:
        manager: `llm.engine.core.scheduler.kv_cache_manager`, of m6 or later.
        to_text: for example a tokenizer's `decode`; None: the token ids are shown.
    """
    cache = manager.prefix_cache
    if cache is None:
        return "no prefix cache"
    free_blocks = manager.block_pool.free_block_queue.get_all_free_blocks()
    cached_and_free = [block.block_id for block in free_blocks if block.block_hash is not None]
    place = {block_id: i for i, block_id in enumerate(cached_and_free)}
    lines = [f"prefix cache: {len(cache)} blocks of {cache.block_size} tokens"]
    stack = [(node, "", i == 0) for i, node in enumerate(reversed(cache.as_tree()))]
    while stack:
        node, indent, is_last = stack.pop()
        if node.ref_cnt > 0:
            state = f"held by {node.ref_cnt}"
        else:
            state = f"free, {min(place.get(block_id, 0) for block_id in node.block_ids)} go before it"
        tokens = ("… " if node.is_orphan else "") + _abbreviate(node.token_ids, to_text)
        lines.append(f"{indent}{'└─' if is_last else '├─'} {len(node.block_ids)} × [{tokens}] {state}")
        indent += "   " if is_last else "│  "
        stack += [(child, indent, i == 0) for i, child in enumerate(reversed(node.children))]
    return "\n".join(lines)


def _abbreviate(token_ids: list[int], to_text: Callable[[list[int]], str] | None) -> str:
    """At most about 40 characters: the beginning and the end."""
    if to_text is None:
        words = [str(token) for token in token_ids]
        return " ".join(words if len(words) <= 8 else [*words[:5], "…", *words[-2:]])
    text = repr(to_text(token_ids))[1:-1]
    return text if len(text) <= 40 else f"{text[:24]} … {text[-13:]}"


def bars(values: Mapping[str, float], title: str, unit: str, number: str = ",.1f") -> Any:
    """Horizontal bars from the top down, each with its value written by the format `number`; returns the Axes."""
    axes = new_axes(title, unit, "")
    labels = list(values)
    colours = [colour_of(label, 1) for label in labels]
    drawn = axes.barh(labels, list(values.values()), color=colours)
    axes.bar_label(drawn, [format(value, number) for value in values.values()], padding=4)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return axes
