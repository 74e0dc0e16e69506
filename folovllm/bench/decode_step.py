"""Where the time of a decode step goes: `python -m folovllm.bench.decode_step`.

N sequences of about C tokens run in an engine, and decode steps are timed from the outside. A step cannot be faster
than its bytes, the weights and everybody's keys and values, can be read; what a plain copy moves in a second says how
long that takes. On a GPU a profile of a few steps says what the device did meanwhile: kernel by kernel for one step,
and the sum for each kind of kernel. With CUDA graphs their replay is timed alone as well.
"""

import argparse
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from .. import lab
from .options import add_engine_options, describe_engine, open_llm, parse_variant, run_script
from .paged import copy_gb_per_s

SIZES = {"cpu": "16x128,1x128", "cuda": "256x1024,1x256"}
MILESTONES = "m4,m4:enforce_eager=True"
WARMUP = 5
PATIENCE = 4  # steps without anybody new, of which a scheduler may put in one for those that run
PROFILED = 4  # steps; one of them is kept whole
SPARE = 32  # tokens that the first sequences may be given while the last are still computing their prompts
COPY_BYTES = 2**28  # on a CPU
NAME_LENGTH = 60


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.decode_step", description="Where the time of a decode step goes."
    )
    parser.add_argument("--milestones", default=MILESTONES, help=f"stages with options (default: {MILESTONES})")
    parser.add_argument("--sizes", help=f"sequences x tokens of each (default: {SIZES['cpu']}, a GPU {SIZES['cuda']})")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each (default: 30)")
    add_engine_options(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes on all engines. ValueError or TypeError for anything that the user can mend."""
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    is_cuda = torch.cuda.is_available() and args.device != "cpu"
    sizes = parse_sizes(args.sizes or SIZES["cuda" if is_cuda else "cpu"])
    copy = copy_gb_per_s(args.steps) if is_cuda else cpu_copy_gb_per_s()
    if is_cuda:
        torch.cuda.empty_cache()  # of what was copied, before engines look how much is free
    longest = max(context for _, context in sizes) + args.steps + WARMUP + PROFILED + SPARE
    rows: dict[str, Any] = {}
    for name in args.milestones.split(","):
        stage, options = parse_variant(name)
        options = {"max_model_len": longest, "max_num_seqs": max(num_seqs for num_seqs, _ in sizes), **options}
        if "cuda_graph_sizes" in {option.name for option in fields(lab.load_stage(stage).EngineConfig)}:
            options.setdefault("cuda_graph_sizes", sorted({num_seqs for num_seqs, _ in sizes}))
        with open_llm(args, stage, **options) as llm:
            engine = describe_engine(args, llm)
            rows[name] = {f"{n}x{context}": time_steps(llm, n, context, args.steps, copy) for n, context in sizes}
    return {**engine, "steps": args.steps, "copy_gb_per_s": round(copy, 2), "rows": rows}


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "256x1024,1x256" -> pairs. ValueError for anything else."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"--sizes must be sequences x tokens with commas between, such as 256x1024, got {text!r}")
    return [(int(match[1]), int(match[2])) for match in found if match]


def cpu_copy_gb_per_s() -> float:
    """Bytes read and written by a copy in memory, a second; the fastest of some."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / 1e6 / min(milliseconds(lambda: target.copy_(source)) for _ in range(7))


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def time_steps(llm: Any, num_seqs: int, context: int, num_steps: int, copy_gb_per_s: float) -> dict[str, Any]:
    """One size: steps from the outside, the bound, and on a GPU what the device does.

    Raises:
        ValueError: memory does not hold so many sequences at once.
    """
    engine, is_cuda = llm.engine, llm.config.device.startswith("cuda")
    prompt_len = context - num_steps // 2 - WARMUP
    if prompt_len < 1:
        raise ValueError(f"{num_steps} steps around a context of {context} tokens: ask for fewer --steps")
    fill(llm, num_seqs, prompt_len, num_steps + WARMUP + PROFILED + SPARE)
    for _ in range(WARMUP):
        engine.step()
    running = engine.core.scheduler.running
    if len(running) < num_seqs:
        num_running = len(running)
        clear(engine)
        raise ValueError(f"{num_running} of {num_seqs} sequences of {context} tokens run: memory holds no more")
    times = [milliseconds(engine.step) for _ in range(num_steps)]
    found: dict[str, Any] = {
        "step_ms": round(statistics.median(times), 4),
        **bound(llm, num_seqs * context, copy_gb_per_s),
    }
    found["share_of_bound"] = round(found["bound_ms"] / found["step_ms"], 3)
    if is_cuda:
        found |= graph_replay(llm, num_seqs, num_steps)
        found |= profile_steps(engine, found["step_ms"])
    clear(engine)
    return found


def fill(llm: Any, num_seqs: int, prompt_len: int, max_tokens: int) -> None:
    """Sequences of `prompt_len` random tokens and one new, all of them running."""
    drawn = random.Random(0)
    params_type = type(llm.get_default_sampling_params())
    vocab_size = llm.engine.worker.model.config.vocab_size
    for index in range(num_seqs):
        prompt = [drawn.randrange(3, vocab_size) for _ in range(prompt_len)]
        params = params_type(temperature=0.6, max_tokens=max_tokens, ignore_eos=True, seed=index)
        llm.engine.add_request(str(index), prompt, params)
    scheduler = llm.engine.core.scheduler
    most, since = 0, 0
    while scheduler.waiting and since < PATIENCE:
        llm.engine.step()
        most, since = max(most, len(scheduler.running)), 0 if len(scheduler.running) > most else since + 1


def clear(engine: Any) -> None:
    for request_id in {seq.request_id for seq in [*engine.core.scheduler.running, *engine.core.scheduler.waiting]}:
        engine.abort_request(request_id)


def bound(llm: Any, num_cached_tokens: int, copy_gb_per_s: float) -> dict[str, Any]:
    """What a step must read, every weight and every cached key and value once, and how long a copy's speed takes."""
    worker = llm.engine.worker
    model = worker.model
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if model.lm_head is not None:  # of an embedding that is not the head too, only some rows are read
        weight_bytes -= model.model.embed_tokens.weight.nbytes
    caches = [cache for layer in worker.layers for cache in (layer.k_cache, layer.v_cache)]
    kv_bytes = num_cached_tokens * sum(cache[0].nbytes for cache in caches)
    return {
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "bound_ms": round((weight_bytes + kv_bytes) / copy_gb_per_s / 1e6, 4),
    }


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def graph_replay(llm: Any, num_seqs: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the recorded part of the last step, run again as it stands; None without graphs."""
    runner = getattr(llm.engine.worker.model_runner, "cuda_graphs", None)
    if runner is None:
        return {"graph_ms": None}
    graph = runner.graphs[next(size for size in runner.sizes if size >= num_seqs)]
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {"graph_ms": round(statistics.median(times), 4)}


@dataclass(frozen=True)
class Activity:
    """What the device did: a kernel or a copy, in microseconds since some point in the past."""

    name: str
    start: float
    duration: float


def profile_steps(engine: Any, step_ms: float) -> dict[str, Any]:
    """Busy and idle milliseconds of a step, the time of each kind of kernel, and one step whole.

    Host and device run apart, so what the device does not do while a step lasts is what it waits for the host.
    """
    engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    activities = [
        Activity(short_name(event.name), event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return summarise(divide(sorted(activities, key=lambda activity: activity.start)), step_ms)


def short_name(name: str) -> str:
    """A kernel's name without its types: what people call it."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", name)
    return re.sub(r" *[<(].*", "", name)[:NAME_LENGTH] or name[:NAME_LENGTH]


def divide(activities: list[Activity]) -> list[list[Activity]]:
    """The activities of each step: it ends when the tokens have been copied to the host."""
    steps: list[list[Activity]] = [[]]
    for activity in activities:
        steps[-1].append(activity)
        if activity.name.startswith("Memcpy DtoH"):
            steps.append([])
    return steps[:-1]


def summarise(steps: list[list[Activity]], step_ms: float) -> dict[str, Any]:
    """Figures of all steps, and the timeline of the last one; nothing if a profile could not be had.

    No two activities of ours overlap, so their durations add up.
    """
    if len(steps) < 2:
        return {}
    by_name: dict[str, list[float]] = defaultdict(list)
    for activity in (activity for step in steps for activity in step):
        by_name[activity.name].append(activity.duration)
    busy_ms = sum(sum(durations) for durations in by_name.values()) / len(steps) / 1e3
    kinds = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "busy_ms": round(busy_ms, 4),
        "idle_ms": round(max(0.0, step_ms - busy_ms), 4),
        "activities": round(sum(map(len, steps)) / len(steps), 1),
        "kernels": [
            {
                "name": name,
                "microseconds": round(sum(durations) / len(steps), 2),
                "calls": round(len(durations) / len(steps), 2),
            }
            for name, durations in kinds
        ],
        "timeline": timeline(*steps[-2:]),
    }


def timeline(before: list[Activity], step: list[Activity]) -> dict[str, Any]:
    """A step, compactly: for each activity its name's index, start and duration; 0 is the end of the step before."""
    names = list(dict.fromkeys(activity.name for activity in step))
    end = before[-1].start + before[-1].duration
    return {
        "names": names,
        "index": " ".join(str(names.index(activity.name)) for activity in step),
        "start_us": " ".join(f"{activity.start - end:.1f}" for activity in step),
        "duration_us": " ".join(f"{activity.duration:.1f}" for activity in step),
    }


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"decode steps; {figures['model']}, {figures['dtype']}, {figures['device']}")
    console.print(f"a copy moves {figures['copy_gb_per_s']:,.1f} GB/s; median of {figures['steps']} steps")
    table = Table(
        "", "size", "step, ms", "bound, ms", "share", "graph, ms", "busy, ms", "idle, ms", "kernels and copies"
    )
    for name, sizes in figures["rows"].items():
        for size, row in sizes.items():
            numbers = [row.get(key) for key in ("graph_ms", "busy_ms", "idle_ms", "activities")]
            table.add_row(
                name,
                size,
                f"{row['step_ms']:,.3f}",
                f"{row['bound_ms']:,.3f}",
                f"{row['share_of_bound']:.2f}",
                *("–" if number is None else f"{number:,.3f}" for number in numbers[:3]),
                "–" if numbers[3] is None else f"{numbers[3]:,.0f}",
            )
    console.print(table)
    for name, sizes in figures["rows"].items():
        for size, row in sizes.items():
            for kernel in row.get("kernels", [])[:8]:
                console.print(
                    f"{name} {size}: {kernel['microseconds']:10,.1f} µs {kernel['calls']:6.1f} x {kernel['name']}"
                )


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
