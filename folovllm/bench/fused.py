"""What each fused kernel of a stage gains over the same in torch: `python -m folovllm.bench.fused`, on a GPU.

Sizes are those of Qwen3-0.6B. Each is timed in two ways: as part of a CUDA graph, where only the device's time counts,
and called one by one from Python, where launching counts too. Weights are read anew each time, as in a model whose
other layers have pushed them out of the cache; what one kernel has just written is still there for the next.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from .. import lab
from .options import run_script
from .paged import stage_part

NUM_TOKENS = (1, 8, 256, 8192)
MOST_ROWS = 256  # that a sampler is given: one for each sequence, however many tokens they have
CALLS = 20  # in a graph, and in a row
COLD_BYTES = 2**28  # so many bytes of weights, all different, before one is read again


@dataclass(frozen=True)
class Sizes:
    """Of a model: the defaults are Qwen3-0.6B's."""

    hidden: int = 1024
    intermediate: int = 3072
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936


@dataclass(frozen=True)
class Pair:
    """The same work in torch and in a kernel. Both take the number of the call, and return what they computed."""

    kernel: str
    what: str
    before: Callable[[int], torch.Tensor]
    after: Callable[[int], torch.Tensor]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.fused", description="Time fused kernels against torch, on a GPU."
    )
    parser.add_argument("--stage", help="m4, … (default: the newest)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: 15)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All kernels at all sizes. ValueError for anything that the user can mend."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    stage = lab.load_stage(args.stage)
    stage_part(stage, "model_executor.layers.fused")
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here, and the kernels run on one only: try a machine that has one")
    rows = []
    with torch.inference_mode():
        for num_tokens in NUM_TOKENS:
            for pair in pairs(stage, num_tokens, Sizes(), getattr(torch, args.dtype), torch.device("cuda")):
                rows.append(time_pair(pair, num_tokens, args.repeats))
                torch.cuda.empty_cache()
    return {
        "stage": stage.__name__,
        "device": "cuda",
        "dtype": args.dtype,
        "description": "sizes of Qwen3-0.6B; microseconds a call",
        "repeats": args.repeats,
        "rows": rows,
    }


def pairs(stage: ModuleType, num_tokens: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Pair]:
    """Everything that is worth a kernel at so many tokens."""
    fused = stage_part(stage, "model_executor.layers.fused")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    found = [add_rms_norm(fused, num_tokens, sizes, random), silu_and_mul(fused, num_tokens, sizes, random)]
    found.append(norm_rotate_write(stage, num_tokens, sizes, random))
    if num_tokens == 1:
        found += [
            matvec(fused, what, rows, columns, random)
            for what, rows, columns in (
                ("q, k, v", (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim, sizes.hidden),
                ("o", sizes.hidden, sizes.num_heads * sizes.head_dim),
                ("gate, up", 2 * sizes.intermediate, sizes.hidden),
                ("down", sizes.hidden, sizes.intermediate),
                ("head", sizes.vocab, sizes.hidden),
            )
        ]
    if num_tokens <= MOST_ROWS:
        found.append(draw_from_logits(stage, num_tokens, sizes, random))
    return found


Random = Callable[..., torch.Tensor]


def add_rms_norm(fused: ModuleType, num_tokens: int, sizes: Sizes, random: Random) -> Pair:
    x, weight = random(num_tokens, sizes.hidden), random(sizes.hidden)
    first = random(num_tokens, sizes.hidden)
    residuals = first, first.clone()  # each call adds to its own

    def before(_: int) -> torch.Tensor:
        return F.rms_norm(residuals[0].add_(x), x.shape[-1:], weight, 1e-6)

    return Pair("add_rms_norm", "residual + norm", before, lambda _: fused.add_rms_norm(x, residuals[1], weight, 1e-6))


def silu_and_mul(fused: ModuleType, num_tokens: int, sizes: Sizes, random: Random) -> Pair:
    x = random(num_tokens, 2 * sizes.intermediate)

    def before(_: int) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    return Pair("silu_and_mul", "silu(gate) * up", before, lambda _: fused.silu_and_mul(x))


def norm_rotate_write(stage: ModuleType, num_tokens: int, sizes: Sizes, random: Random) -> Pair:
    fused = stage_part(stage, "model_executor.layers.fused")
    rotate = stage_part(stage, "model_executor.layers.rotary_embedding").rotate
    write_kv_cache = stage_part(stage, "attention.ops").write_kv_cache
    num_heads, num_kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    heads = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # slices, as in a model
    rotation = random(num_tokens, 1, head_dim), random(num_tokens, 1, head_dim)
    norms = random(head_dim), random(head_dim)
    k_cache, v_cache = random(num_tokens + 1, num_kv_heads, head_dim), random(num_tokens + 1, num_kv_heads, head_dim)
    slots = torch.randperm(num_tokens, device=q.device)

    def before(_: int) -> torch.Tensor:
        normed = [F.rms_norm(x, (head_dim,), weight, 1e-6) for x, weight in zip((q, k), norms, strict=True)]
        rotated_q, rotated_k = rotate(*normed, rotation)
        write_kv_cache(rotated_k, v, k_cache, v_cache, slots)
        return rotated_q

    def after(_: int) -> torch.Tensor:
        out: torch.Tensor = fused.norm_rotate_write(q, k, v, *norms, 1e-6, rotation, k_cache, v_cache, slots)
        return out

    return Pair("norm_rotate_write", "q/k norm, rotation, write", before, after)


def matvec(fused: ModuleType, what: str, num_rows: int, num_columns: int, random: Random) -> Pair:
    x = random(1, num_columns)
    first = random(num_rows, num_columns)
    weights = [first, *(first.clone() for _ in range(COLD_BYTES // first.nbytes if first.is_cuda else 0))]
    return Pair(
        "matvec",
        f"{what}: {num_rows:,} x {num_columns:,}",
        lambda call: F.linear(x, weights[call % len(weights)]),
        lambda call: fused.matvec(x, weights[call % len(weights)], None),
    )


def draw_from_logits(stage: ModuleType, num_rows: int, sizes: Sizes, random: Random) -> Pair:
    sampler, ops = stage_part(stage, "sample.sampler"), stage_part(stage, "sample.ops.draw")
    logits = random(num_rows, sizes.vocab)
    temperature = torch.full((num_rows,), 0.6, device=logits.device)
    seeds = torch.arange(num_rows, device=logits.device)

    def before(_: int) -> torch.Tensor:
        values = logits.float()
        greedy, is_greedy = values.argmax(dim=-1), temperature == 0
        values = values / temperature.masked_fill(is_greedy, 1.0)[:, None]
        drawn = sampler.draw(values, sampler.random_uniform(seeds, seeds))
        return torch.where(is_greedy, greedy, drawn)

    return Pair(
        "draw_from_logits",
        f"of {sizes.vocab:,} tokens",
        before,
        lambda _: ops.draw_from_logits(logits, temperature, seeds, seeds),
    )


def time_pair(pair: Pair, num_tokens: int, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": pair.kernel, "what": pair.what, "num_tokens": num_tokens}
    for way, function in (("before", pair.before), ("after", pair.after)):
        row[way] = {
            "graph_us": round(graph_microseconds(function, repeats), 2),
            "launched_us": round(launched_microseconds(function, repeats), 2),
        }
    return row


def graph_microseconds(function: Callable[[int], object], repeats: int) -> float:
    """On the device, for a call among many in a CUDA graph."""
    for call in range(3):
        function(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            function(call)
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[1:]) / CALLS


def launched_microseconds(function: Callable[[int], object], repeats: int) -> float:
    """From outside, for a call among many in a row: the longer of what the host and what the device takes."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for call in range(CALLS):
            function(call)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[1:]) / CALLS


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{figures['stage']}: {figures['description']}; {figures['dtype']}, {figures['device']}")
    table = Table("kernel", "what", "tokens", "in a graph, µs", "launched, µs", "gain in a graph", "gain launched")
    for row in figures["rows"]:
        before, after = row["before"], row["after"]
        table.add_row(
            row["kernel"],
            row["what"],
            f"{row['num_tokens']:,}",
            *(f"{before[way]:,.1f} → {after[way]:,.1f}" for way in ("graph_us", "launched_us")),
            *(f"{before[way] / after[way]:.1f} x" for way in ("graph_us", "launched_us")),
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
