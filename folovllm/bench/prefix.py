"""What is gained where prompts begin alike, and what looking for it costs: `python -m folovllm.bench.prefix`.

Four measurements. The time to first token of a prompt whose beginning is cached against one whose is not; time and hit
rate of the workloads that share something, all requests at once and one after the other, beside what a model of the
cache in plain Python expects; the price of a hash; and how much of a prefix shorter than a block is found. What it
costs where nothing is shared is seen by tests/benchmark/compare.py.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import lab
from ..cli import import_stage
from .options import add_engine_options, describe_engine, open_llm, parse_variant, run_script
from .workloads import Workload

WORKLOADS = "shared_prefix,few_shot,multi_turn"
MILESTONES = "m5,m6"
MODES = ("at_once", "one_by_one")
OWN_TOKENS = 32  # of each prompt, after what it shares
HASHED_TOKENS = 32_768
SHORT_PREFIX = 200  # shared by the prompts that fill a block of 256, and
NUM_FOLLOWERS = 63  # so many of them come after the first
COPIED_SHARE = 1 / 8  # of a block, which must begin alike to be copied


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.prefix", description="What prefix caching gains and costs."
    )
    parser.add_argument(
        "--stage", default="m6", help="for all but the workloads, with options if need be (default: m6)"
    )
    parser.add_argument("--prefix", default="2000", help="lengths of a shared prefix in tokens (default: 2000)")
    parser.add_argument("--workloads", default=WORKLOADS, help=f"'' for none (default: {WORKLOADS})")
    parser.add_argument("--milestones", default=MILESTONES, help=f"stages that run these (default: {MILESTONES})")
    parser.add_argument("--hash-blocks", default="16,256", help="block sizes to time hashes at (default: 16,256)")
    parser.add_argument("--sub-block", type=int, default=256, help="block size for short prefixes; 0 for none")
    parser.add_argument(
        "--repeats", type=int, default=5, help="prefixes of each length, runs of every row (default: 5)"
    )
    add_engine_options(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for. ValueError or TypeError for anything that the user can mend."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    lengths, block_sizes = numbers("--prefix", args.prefix), numbers("--hash-blocks", args.hash_blocks)
    workloads = [name for name in args.workloads.split(",") if name]
    figures: dict[str, Any] = {"repeats": args.repeats}
    if lengths:
        figures |= measure_ttft(args, lengths)
    if workloads:
        figures |= measure_workloads(args, workloads)
    if block_sizes:
        figures["hashing"] = measure_hashing(args.stage, block_sizes)
    if args.sub_block:
        figures |= measure_sub_block(args)
    if len(figures) == 1:
        raise ValueError("nothing to measure: give --prefix, --workloads, --hash-blocks or --sub-block")
    return figures


def numbers(option: str, text: str) -> list[int]:
    """ "16,256" as a list. ValueError unless all are positive integers."""
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be numbers of at least 1 with commas between, got {text!r}")
    return [int(part) for part in parts]


def ask(llm: Any, prompts: list[list[int]], max_tokens: int = 1) -> list[Any]:
    """The outputs of these prompts, sent together: greedy, and as long as asked for."""
    params_type = type(llm.get_default_sampling_params())
    params = params_type(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return list(llm.generate(prompts, params, use_tqdm=False))


# ---- a hit against a miss --------------------------------------------------------------------------------------------


def measure_ttft(args: argparse.Namespace, lengths: Sequence[int]) -> dict[str, Any]:
    """Of each length so many prefixes that nobody has seen: the first prompt with it misses, the second one hits."""
    stage, options = parse_variant(args.stage)
    rows = {}
    with open_llm(args, stage, **options) as llm:
        check_stage(llm, args.stage)
        longest = llm.config.max_model_len - OWN_TOKENS - 1
        if max(lengths) > longest:
            raise ValueError(f"--prefix {max(lengths)} is too long: with max_model_len={llm.config.max_model_len} "
                             f"at most {longest}")  # fmt: skip
        rng, vocab_size = random.Random(0), llm.hf_config.vocab_size
        for length in lengths:
            runs = []
            for _ in range(args.repeats + 1):
                prefix = draw(rng, length, vocab_size)
                miss, hit = (ask(llm, [prefix + draw(rng, OWN_TOKENS, vocab_size)])[0] for _ in range(2))
                runs.append((1e3 * miss.metrics.ttft, 1e3 * hit.metrics.ttft, hit.num_cached_tokens))
            rows[str(length)] = ttft_figures(runs[1:])  # the first one woke everything up
        engine, block_size = describe_engine(args, llm), llm.config.block_size
    return {**engine, "ttft": {"variant": args.stage, "block_size": block_size, "own_tokens": OWN_TOKENS, "rows": rows}}


def ttft_figures(runs: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """Medians of (miss in ms, hit in ms, cached tokens of the hit); the ratio is that within each pair."""
    return {
        "miss_ms": round(statistics.median(miss for miss, _, _ in runs), 3),
        "hit_ms": round(statistics.median(hit for _, hit, _ in runs), 3),
        "miss_over_hit": round(statistics.median(miss / hit for miss, hit, _ in runs), 2),
        "cached_tokens": min(cached for _, _, cached in runs),
        "runs_ms": [[round(miss, 3), round(hit, 3)] for miss, hit, _ in runs],
    }


def draw(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def check_stage(llm: Any, name: str) -> None:
    if not getattr(llm.config, "enable_prefix_caching", False):
        raise ValueError(f"{name} has no prefix cache: choose m6 or a later one, and leave it on")


# ---- workloads -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A workload on a stage; `groups` are the requests that were sent together: (prompt, output) of each."""

    seconds: float
    ttft_ms: float
    counts: tuple[int, int] | None  # tokens of prompts, and those of them that were found; None: no such count
    groups: list[list[tuple[list[int], list[int]]]]


def measure_workloads(args: argparse.Namespace, workloads: list[str]) -> dict[str, Any]:
    """Every workload on every row, from an empty cache each time: in turns on a CPU. On a GPU one engine is open at a
    time, with the whole card for its cache. The first run of each is not counted."""
    names = args.milestones.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"--milestones names a row twice: {args.milestones}")
    rows: dict[str, Any] = {name: {mode: {} for mode in MODES} for name in workloads}
    runs: dict[tuple[str, str, str], list[Run]] = {}
    with ExitStack() as stack:
        llms, configs = {}, {}
        for name in names:
            stage, options = parse_variant(name)
            llms[name] = llm = stack.enter_context(open_llm(args, stage, **options))
            if not hasattr(getattr(llm, "engine", None), "stats"):
                raise ValueError(f"{stage} keeps no record of its steps: choose m1 or a later one")
            engine, configs[name] = describe_engine(args, llm), llm.config
            in_turns = engine["device"] == "cpu"
            if in_turns and name != names[-1]:
                continue
            for workload_name in workloads:
                workload = lab.workload_for(llm, workload_name)
                rows[workload_name]["description"] = workload.description
                for mode in MODES:
                    for _ in range(args.repeats + 1):
                        for row, opened in llms.items():
                            runs.setdefault((workload_name, mode, row), []).append(run_once(opened, workload, mode))
            if not in_turns:
                llms.clear()
                stack.close()
    for (workload_name, mode, row), found in runs.items():
        first = runs[workload_name, mode, names[0]]
        rows[workload_name][mode][row] = workload_figures(found[1:], first[1:], configs[row])
    return {**engine, "workloads": {"in_turns": in_turns, "rows": rows}}


def run_once(llm: Any, workload: Workload, mode: str) -> Run:
    """One run from an empty cache: as the workload says ("at_once"), or each request once the one before is done."""
    if reset := getattr(llm, "reset_prefix_cache", None):
        reset()
    before = counts_of(llm)
    histories: list[list[int]] = []
    groups: list[list[tuple[list[int], list[int]]]] = []
    if mode == "at_once":
        result = lab.run(llm, workload, warmup=False)
        seconds, ttfts = result.seconds, [trace.ttft for trace in result.traces]
        depths: list[int] = []
        for request, trace in zip(workload.requests, result.traces, strict=True):
            follows = request.follows
            prompt = ([] if follows is None else histories[follows]) + request.prompt_token_ids
            depths.append(0 if follows is None else depths[follows] + 1)
            histories.append(prompt + trace.token_ids)
            if depths[-1] == len(groups):
                groups.append([])
            groups[depths[-1]].append((prompt, trace.token_ids))
    else:
        ttfts, started = [], time.perf_counter()
        for request in workload.requests:
            prompt = ([] if request.follows is None else histories[request.follows]) + request.prompt_token_ids
            output = ask(llm, [prompt], request.max_tokens)[0]
            ttfts.append(output.metrics.ttft)
            histories.append(prompt + list(output.token_ids))
            groups.append([(prompt, list(output.token_ids))])
        seconds = time.perf_counter() - started
    after = counts_of(llm)
    counts = (after[0] - before[0], after[1] - before[1]) if before and after else None
    return Run(seconds, 1e3 * statistics.median(ttfts), counts, groups)


def counts_of(llm: Any) -> tuple[int, int] | None:
    """Tokens that the prefix cache was asked for and those that it had, since the engine started."""
    if not getattr(llm.config, "enable_prefix_caching", False):
        return None
    stats = llm.engine.core.scheduler.kv_cache_manager.prefix_cache_stats
    return stats.queries, stats.hits


def workload_figures(runs: Sequence[Run], first: Sequence[Run], config: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "seconds": round(statistics.median(run.seconds for run in runs), 4),
        "ttft_p50_ms": round(statistics.median(run.ttft_ms for run in runs), 3),
        "times_first": round(statistics.median(a.seconds / b.seconds for a, b in zip(first, runs, strict=True)), 3),
        "ttft_times_first": round(
            statistics.median(a.ttft_ms / b.ttft_ms for a, b in zip(first, runs, strict=True)), 3
        ),
    }
    if runs[-1].counts is not None:
        queries, hits = runs[-1].counts
        expected = expected_hits(
            runs[-1].groups, config.block_size, config.max_num_batched_tokens, config.max_chunk_size
        )
        figures |= {"block_size": config.block_size, "queries": queries, "hits": hits, "expected_hits": expected}
        figures |= {"hit_rate": round(hits / queries, 4), "expected_hit_rate": round(expected / queries, 4)}
    return figures


def expected_hits(
    groups: Sequence[Sequence[tuple[list[int], list[int]]]], block_size: int, budget: int, max_chunk_size: int
) -> int:
    """Tokens that a cache without limits has of the prompts, by a model of it in plain Python: a tree of blocks.

    The (prompt, output)s of a group are sent together, once the group before is done. What a step computes is found
    from the next step on, and whoever would go on with a block that it computes for somebody else waits for that.
    """
    known: dict[tuple[int, ...], Any] = {}
    total = 0
    for group in groups:
        waiting = [SimpleNamespace(tokens=p + o, num_prompt=len(p), known=len(p), computed=0) for p, o in group]
        running: list[SimpleNamespace] = []
        while waiting or running:
            left, alone, parts, aside = budget, len(waiting) + len(running) == 1, {}, []
            under_way = set()
            for seq in sorted(running, key=lambda seq: seq.known - seq.computed > 1):
                parts[id(seq)] = min(seq.known - seq.computed, left, left if alone else max_chunk_size)
                left -= parts[id(seq)]
                if parts[id(seq)]:
                    under_way.add(next_missing(known, seq, block_size))
            while waiting and left:
                seq = waiting.pop(0)
                seq.computed = longest_match(known, seq.tokens[: seq.known - 1], block_size)
                missing = next_missing(known, seq, block_size)
                if missing is not None and missing in under_way:
                    aside.append(seq)
                    continue
                under_way.add(missing)
                running.append(seq)
                total += seq.computed
                parts[id(seq)] = min(seq.known - seq.computed, left, left if alone else max_chunk_size)
                left -= parts[id(seq)]
            waiting = aside + waiting
            for seq in running:
                seq.computed += parts[id(seq)]
                node = known
                for start in range(0, seq.computed - block_size + 1, block_size):
                    node = node.setdefault(tuple(seq.tokens[start : start + block_size]), {})
                seq.known += seq.computed == seq.known
            running = [seq for seq in running if seq.known < len(seq.tokens)]
    return total


def next_missing(known: dict[tuple[int, ...], Any], seq: SimpleNamespace, block_size: int) -> tuple[int, ...] | None:
    """The prompt up to the end of the block that is computed next; None if it ends before, or the tree has it."""
    end = seq.computed // block_size * block_size + block_size
    if end > seq.num_prompt:
        return None
    node: dict[tuple[int, ...], Any] | None = known
    for start in range(0, end, block_size):
        node = None if node is None else node.get(tuple(seq.tokens[start : start + block_size]))
    return tuple(seq.tokens[:end]) if node is None else None


def longest_match(known: dict[tuple[int, ...], Any], tokens: list[int], block_size: int) -> int:
    """Tokens at the beginning of `tokens` that are in the tree, with those of a block that begins like the rest."""
    num, node = 0, known
    while (block := tuple(tokens[num : num + block_size])) in node:
        num, node = num + block_size, node[block]
    most = 0
    for other in node:
        same = 0
        while same < len(block) and other[same] == block[same]:
            same += 1
        most = max(most, same)
    return num + (most if most >= max(int(COPIED_SHARE * block_size), 1) else 0)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def measure_hashing(variant: str, block_sizes: Sequence[int], num_tokens: int = HASHED_TOKENS) -> dict[str, Any]:
    """Microseconds a token to hash a prompt: the median of 11."""
    stage = import_stage(parse_variant(variant)[0])
    try:
        extend_hashes = import_module(f"{stage.__name__}.core.prefix_cache").extend_hashes
    except ModuleNotFoundError:
        raise ValueError(f"{variant} has no prefix cache: choose m6 or a later one") from None
    token_ids = draw(random.Random(0), num_tokens, 150_000)
    found = {}
    for block_size in block_sizes:
        times = []
        for _ in range(11):
            seq = SimpleNamespace(block_hashes=[], token_ids=token_ids, request=SimpleNamespace(cache_salt=None))
            started = time.perf_counter()
            extend_hashes(seq, block_size)
            times.append(time.perf_counter() - started)
        found[str(block_size)] = round(1e6 * statistics.median(times) / num_tokens, 4)
    return {"tokens": num_tokens, "us_per_token": found}


# ---- a prefix shorter than a block -----------------------------------------------------------------------------------


def measure_sub_block(args: argparse.Namespace) -> dict[str, Any]:
    """One prompt, then 63 more that share its first 200 tokens, with and without hits inside a block."""
    stage, options = parse_variant(args.stage)
    found = {}
    with open_llm(args, stage, **{**options, "block_size": args.sub_block}) as llm:
        check_stage(llm, args.stage)
        module: Any = import_module(f"{import_stage(stage).__name__}.core.prefix_cache")
        rng, vocab_size = random.Random(0), llm.hf_config.vocab_size
        share = module.MIN_COPIED_SHARE
        for name, min_share in (("with", share), ("without", 2.0)):
            prefix = draw(rng, SHORT_PREFIX, vocab_size)
            prompts = [prefix + draw(rng, rng.randint(100, 200), vocab_size) for _ in range(NUM_FOLLOWERS + 1)]
            module.MIN_COPIED_SHARE = min_share
            try:
                ask(llm, prompts[:1])
                started = time.perf_counter()
                outputs = ask(llm, prompts[1:])
            finally:
                module.MIN_COPIED_SHARE = share
            hits = sum(output.num_cached_tokens for output in outputs)
            found[name] = {
                "seconds": round(time.perf_counter() - started, 4),
                "hits": hits,
                "share": round(hits / (SHORT_PREFIX * NUM_FOLLOWERS), 4),
            }
        engine = describe_engine(args, llm)
    description = (
        f"{NUM_FOLLOWERS} prompts of {SHORT_PREFIX + 100} to {SHORT_PREFIX + 200} tokens after one that shares"
    )
    description += f" {SHORT_PREFIX}"
    return {**engine, "sub_block": {"block_size": args.sub_block, "description": description, **found}}


# ---- for people ------------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    if "model" in figures:
        console.print(f"{figures['model']}, {figures['dtype']}, {figures['device']}; medians of {figures['repeats']}")
    if ttft := figures.get("ttft"):
        table = Table(
            "shared prefix", "miss, ms", "hit, ms", "miss / hit", "cached tokens", title="time to first token"
        )
        for length, row in ttft["rows"].items():
            cells = (f"{row['miss_ms']:,.2f}", f"{row['hit_ms']:,.2f}", f"{row['miss_over_hit']:,.1f}")
            table.add_row(f"{int(length):,}", *cells, f"{row['cached_tokens']:,}")
        console.print(table)
    if workloads := figures.get("workloads"):
        table = Table(
            "workload", "sent", "stage", "seconds", "x first", "TTFT p50, ms", "x first", "hit rate", "expected"
        )
        for name, found in workloads["rows"].items():
            for mode in MODES:
                for stage, row in found[mode].items():
                    times = (f"{row['seconds']:.3f}", f"{row['times_first']:.2f}")
                    ttfts = (f"{row['ttft_p50_ms']:,.1f}", f"{row['ttft_times_first']:.2f}")
                    rates = (row.get("hit_rate"), row.get("expected_hit_rate"))
                    shown = ("–" if rate is None else f"{rate:.1%}" for rate in rates)
                    table.add_row(name, mode.replace("_", " "), stage, *times, *ttfts, *shown)
        console.print(table)
    if hashing := figures.get("hashing"):
        for block_size, us in hashing["us_per_token"].items():
            console.print(f"a hash at blocks of {block_size}: {us:.3f} us a token")
    if found := figures.get("sub_block"):
        console.print(f"blocks of {found['block_size']}: {found['description']}")
        for name in ("with", "without"):
            row = found[name]
            console.print(f"  {name} hits inside a block: {row['hits']:,} = {row['share']:.1%}, {row['seconds']:.2f} s")


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
