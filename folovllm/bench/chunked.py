"""What long prompts do to those who are in the middle of their output: `python -m folovllm.bench.chunked`.

Two measurements. The first runs the workload `long_arrivals` on stages and chunk sizes, and reports how long the steady
decodes, the short prompts and the long ones had to wait, and what all of it cost. The second keeps an engine with
chunk_policy="dynamic" in long prompts and reports how near its steps come to the time that was asked for.
"""

import argparse
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import lab
from .compare import medians, ratios, run_in_turns
from .options import add_engine_options, describe_engine, open_llm, parse_variant, run_script
from .workloads import Workload

WORKLOAD = "long_arrivals"
MILESTONES = "m4,m5"
BACKLOG = {"cpu": (16, 1500), "cuda": (64, 8192)}  # steady decodes, tokens of a long prompt: as in long_arrivals
SETTLING = 10  # steps that a controller may take to find its share, after as many of decodes alone
NUM_STEPS = 60
WINDOW = (5, 60)  # steps of the timeline: so many before a long prompt arrives, and so many in all


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.chunked", description="What long prompts do to running decodes."
    )
    parser.add_argument(
        "--milestones",
        default=MILESTONES,
        help=f"stages, with options if need be: m4,m5:max_chunk_size=256 (default: {MILESTONES}); '' for none",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of every row (default: 3)")
    parser.add_argument(
        "--target", default="", help="step times in ms, such as 15,30,60: measure chunk_policy=dynamic at each"
    )
    parser.add_argument("--dynamic", default="m5", help="the stage for that, with options if need be (default: m5)")
    parser.add_argument(
        "--steps", type=int, default=NUM_STEPS, help=f"steps with a backlog to count (default: {NUM_STEPS})"
    )
    add_engine_options(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both measurements, as far as asked for. ValueError or TypeError for anything that the user can mend."""
    for option in ("repeats", "steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    names = [name for name in args.milestones.split(",") if name]
    if len(set(names)) < len(names):
        raise ValueError(f"--milestones names a row twice: {args.milestones}")
    try:
        targets = [float(target) for target in args.target.split(",") if target]
    except ValueError as error:
        raise ValueError(f"--target must be milliseconds with commas between, got {args.target!r}") from error
    if not names and not targets:
        raise ValueError("nothing to measure: --milestones and --target are both empty")
    figures: dict[str, Any] = {}
    if names:
        figures |= measure_arrivals(args, names)
    if targets:
        figures |= measure_dynamic(args, targets)
    return figures


# ---- long prompts among decodes --------------------------------------------------------------------------------------


def measure_arrivals(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """`long_arrivals` on every row: in turns on a CPU. On a GPU one engine is open at a time, with the whole card for
    its cache, and its runs follow each other, after one that is not counted."""
    results: dict[str, list[lab.Result]] = {}
    timelines: dict[str, dict[str, Any]] = {}
    runners: dict[str, Callable[[Workload], lab.Result]] = {}
    with ExitStack() as stack:
        for name in names:
            stage, options = parse_variant(name)
            llm = stack.enter_context(open_llm(args, stage, **options))
            if not hasattr(getattr(llm, "engine", None), "stats"):
                raise ValueError(f"{stage} keeps no record of its steps: choose m1 or a later one")
            engine, workload = describe_engine(args, llm), lab.workload_for(llm, WORKLOAD)
            runners[name] = partial(run_once, llm, name, timelines)
            in_turns = engine["device"] == "cpu"
            lab.run(llm, two_tokens_each(workload) if in_turns else workload)  # not counted
            if not in_turns:
                results |= run_in_turns(runners, workload, args.repeats)
                runners.clear()
                stack.close()
        if runners:
            results = run_in_turns(runners, workload, args.repeats)
    rows = {name: [figures_of(result) for result in found] for name, found in results.items()}
    return {
        **engine,
        "workload": workload.name,
        "description": workload.description,
        "repeats": args.repeats,
        "in_turns": in_turns,
        "median": {name: medians(runs) for name, runs in rows.items()},
        "ratio_to_first": {name: ratios(runs, rows[names[0]]) for name, runs in rows.items()},
        "runs": rows,
        "timelines": timelines,
    }


def run_once(llm: Any, name: str, timelines: dict[str, dict[str, Any]], workload: Workload) -> lab.Result:
    """Runs the workload and leaves its steps in `timelines`."""
    llm.engine.stats.clear()
    result = lab.run(llm, workload, warmup=False)
    timelines[name] = timeline(llm.engine.stats.steps, output_lengths(result))
    return result


def two_tokens_each(workload: Workload) -> Workload:
    """One short request and the longest one: enough to wake a CPU up."""
    requests = [workload.requests[0], max(workload.requests, key=lambda request: len(request.prompt_token_ids))]
    requests = [replace(request, max_tokens=2, arrival_step=0) for request in requests]
    return Workload(workload.name, workload.description, requests)


def figures_of(result: lab.Result) -> dict[str, float | None]:
    """One run: gaps between the tokens of the steady requests, and times to first token of the others, in ms.

    A long prompt and the short ones right behind it are sent together, so what a short one has to wait for counts from
    the moment when the long one begins.
    """
    requests = result.workload.requests
    longest = max(len(request.prompt_token_ids) for request in requests)
    steady: list[float] = []
    short: list[float] = []
    long: list[float] = []
    for trace in result.traces:
        request = requests[trace.request]
        if request.arrival_step == 0:
            steady += trace.inter_token
        elif len(request.prompt_token_ids) == longest:
            long.append(trace.ttft)
        else:
            short.append(trace.ttft)
    return {
        "seconds": round(result.seconds, 4),
        "output_tokens_per_s": round(result.output_tokens_per_s, 2),
        "steady_itl_p50_ms": _ms(steady, 50),
        "steady_itl_p99_ms": _ms(steady, 99),
        "steady_itl_max_ms": _ms(steady, 100),
        "short_ttft_p50_ms": _ms(short, 50),
        "short_ttft_max_ms": _ms(short, 100),
        "long_ttft_p50_ms": _ms(long, 50),
        "long_ttft_max_ms": _ms(long, 100),
    }


def _ms(seconds: Sequence[float], percentile: float) -> float | None:
    return round(float(np.percentile(seconds, percentile)) * 1e3, 3) if seconds else None


# ---- steps -----------------------------------------------------------------------------------------------------------


def output_lengths(result: lab.Result) -> dict[str, int]:
    """{sequence id: tokens of its output}: `lab.run` numbers requests in the order of their arrival."""
    requests = result.workload.requests
    order = sorted(range(len(requests)), key=lambda index: requests[index].arrival_step)
    tokens = {trace.request: len(trace.token_ids) for trace in result.traces}
    return {f"lab-{number}": tokens[index] for number, index in enumerate(order)}


def prompt_tokens(steps: Sequence[Any], outputs: dict[str, int]) -> list[int]:
    """How many tokens of each step (StepRecord) belonged to prompts, if nobody was preempted.

    A sequence with k tokens of output was last in k - 1 steps for one token each; in those before, for its prompt.
    """
    left = Counter(seq_id for step in steps for seq_id in step.seq_ids)
    found = []
    for step in steps:
        num_decodes = 0
        for seq_id in step.seq_ids:
            num_decodes += left[seq_id] < outputs[_request_of(seq_id, outputs)]
            left[seq_id] -= 1
        found.append(step.num_tokens - num_decodes)
    return found


def _request_of(seq_id: str, outputs: dict[str, int]) -> str:
    return seq_id if seq_id in outputs else seq_id.rpartition("-")[0]


def timeline(steps: Sequence[Any], outputs: dict[str, int]) -> dict[str, Any]:
    """The steps around the arrival of the first long prompt, compactly; a number for each step, in milliseconds from
    the first of them or in tokens."""
    chunks = prompt_tokens(steps, outputs)
    arrivals = (number for number in range(1, len(steps)) if steps[number - 1].phase == "decode" and chunks[number])
    first = max(next(arrivals, 0) - WINDOW[0], 0)
    shown = range(first, min(first + WINDOW[1], len(steps)))
    return {
        "first_step": first,
        "phases": " ".join(steps[number].phase for number in shown),
        "tokens": " ".join(str(steps[number].num_tokens) for number in shown),
        "prompt_tokens": " ".join(str(chunks[number]) for number in shown),
        "start_ms": " ".join(f"{1e3 * (steps[number].start - steps[first].start):.3f}" for number in shown),
        "ms": " ".join(f"{1e3 * steps[number].seconds:.3f}" for number in shown),
    }


# ---- a step time that was asked for ----------------------------------------------------------------------------------


def measure_dynamic(args: argparse.Namespace, targets: Iterable[float]) -> dict[str, Any]:
    """chunk_policy="dynamic" at each target (ms), among long prompts of which there are always more."""
    stage, options = parse_variant(args.dynamic)
    rows: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for target in targets:
        dynamic = {"chunk_policy": "dynamic", "target_step_time_ms": target}
        with open_llm(args, stage, **{**options, **dynamic}) as llm:
            engine = describe_engine(args, llm)
            num_decodes, length = BACKLOG["cpu" if engine["device"] == "cpu" else "cuda"]
            length = min(length, llm.config.max_model_len - 1)
            steps, chunks = run_backlog(llm, num_decodes, length, args.steps)
        rows[f"{target:g}"] = {**step_figures(steps, chunks, target), "max_tokens": llm.config.max_num_batched_tokens}
    return {
        **engine,
        "dynamic": {
            "variant": args.dynamic,
            "description": f"{num_decodes} decodes, and always more prompts of {length:,} than a step can take",
            "steps": args.steps,
            "not_counted_before": SETTLING,
            "rows": rows,
        },
    }


def run_backlog(llm: Any, num_decodes: int, length: int, num_steps: int) -> tuple[list[Any], list[int]]:
    """Steps with a backlog of prompts, and how many prompt tokens each had.

    `num_decodes` short prompts run first, and decode for a while. Then prompts of `length` tokens are there in such
    number that no step can take them all. The steps in which a controller finds its share are left out.
    """
    engine, rng = llm.engine, random.Random(0)
    params_type = type(llm.get_default_sampling_params())
    vocab_size = llm.hf_config.vocab_size
    outputs: dict[str, Any] = {}

    def send(prompt: list[int], max_tokens: int) -> None:
        request_id = f"backlog-{len(outputs)}"
        engine.add_request(request_id, prompt, params_type(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
        outputs[request_id] = engine.get_output(request_id)

    def num_tokens() -> dict[str, int]:
        return {request_id: len(output.outputs[0].token_ids) for request_id, output in outputs.items()}

    for _ in range(num_decodes):
        send([rng.randrange(vocab_size) for _ in range(32)], 2 * SETTLING + num_steps + 32)
    while not all(num_tokens().values()):
        engine.step()
    for _ in range(SETTLING):
        engine.step()
    # A sequence's first token ends its prompt, and these have had theirs.
    earlier = {request_id: number - 1 for request_id, number in num_tokens().items()}
    engine.stats.clear()
    prompt = [rng.randrange(vocab_size) for _ in range(length)]
    budget, chunk = llm.config.max_num_batched_tokens, min(length, llm.config.max_chunk_size)
    for _ in range(SETTLING + num_steps):
        while list(num_tokens().values()).count(0) < 2 * -(-budget // chunk):
            send([len(outputs) % vocab_size, *prompt[1:]], 1)
        engine.step()
    steps = list(engine.stats.steps)
    chunks = prompt_tokens(
        steps, {request_id: number - earlier.get(request_id, 0) for request_id, number in num_tokens().items()}
    )
    for request_id, output in outputs.items():
        if not output.finished:
            engine.abort_request(request_id)
    return steps[SETTLING:], chunks[SETTLING:]


def step_figures(steps: Sequence[Any], chunks: Sequence[int], target: float) -> dict[str, Any]:
    """Times of the steps that have prompt tokens, in ms and as shares of the target (ms)."""
    times = [1e3 * step.seconds for step, chunk in zip(steps, chunks, strict=True) if chunk]
    median, p95 = statistics.median(times), float(np.percentile(times, 95))
    return {
        "steps": len(times),
        "median_ms": round(median, 3),
        "p95_ms": round(p95, 3),
        "median_over_target": round(median / target, 3),
        "p95_over_target": round(p95 / target, 3),
        "prompt_tokens_p50": round(statistics.median(chunk for chunk in chunks if chunk)),
        "prompt_tokens_per_s": round(1e3 * sum(chunks) / sum(1e3 * step.seconds for step in steps)),
        "ms": " ".join(f"{1e3 * step.seconds:.2f}" for step in steps),
        "prompt_tokens": " ".join(map(str, chunks)),
    }


# ---- for people ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "output tokens/s": ("output_tokens_per_s", ",.0f"),
    "ITL p50": ("steady_itl_p50_ms", ",.2f"),
    "p99": ("steady_itl_p99_ms", ",.2f"),
    "max": ("steady_itl_max_ms", ",.2f"),
    "short TTFT p50": ("short_ttft_p50_ms", ",.1f"),
    "max ": ("short_ttft_max_ms", ",.1f"),
    "long TTFT p50": ("long_ttft_p50_ms", ",.1f"),
}


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{figures['model']}, {figures['dtype']}, {figures['device']}")
    if "median" in figures:
        console.print(f"{figures['workload']}: {figures['description']}; median of {figures['repeats']}; ms")
        table = Table("", *COLUMNS, "speed x first", "p99 x first", "max x first", "short x first")
        for name, row in figures["median"].items():
            cells = ["–" if row[key] is None else format(row[key], form) for key, form in COLUMNS.values()]
            ratio = figures["ratio_to_first"][name]
            keys = ("output_tokens_per_s", "steady_itl_p99_ms", "steady_itl_max_ms", "short_ttft_p50_ms")
            table.add_row(name, *cells, *("–" if ratio[key] is None else f"{ratio[key]:.2f}" for key in keys))
        console.print(table)
    if dynamic := figures.get("dynamic"):
        console.print(f"{dynamic['variant']}, chunk_policy=dynamic: {dynamic['description']}; {dynamic['steps']} steps")
        table = Table("target, ms", "median", "p95", "median / target", "p95 / target", "prompt tokens", "a second")
        for target, row in dynamic["rows"].items():
            times = (f"{row['median_ms']:,.1f}", f"{row['p95_ms']:,.1f}")
            shares = (f"{row['median_over_target']:.2f}", f"{row['p95_over_target']:.2f}")
            table.add_row(target, *times, *shares, f"{row['prompt_tokens_p50']:,}", f"{row['prompt_tokens_per_s']:,}")
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
