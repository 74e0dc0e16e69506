"""How close the paged decode kernel comes to the memory's speed: `python -m folovllm.bench.paged --stage m3`, on a GPU.

Decode attention has to read every key and value once and does next to nothing with them, so the measure of a kernel is
the share of the bandwidth that a plain copy reaches on the same card. The second-level cache is emptied before every
run: in an engine the other layers' keys and values would have pushed these ones out.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import lab
from .options import run_script

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128  # of Qwen3-0.6B
# Sequences, the shortest and the longest of them, and the block size.
SHAPES = (
    (256, 1024, 1024, 16),
    (256, 1024, 1024, 256),
    (64, 1024, 1024, 16),
    (8, 8192, 8192, 16),
    (8, 8192, 8192, 256),
    (1, 8192, 8192, 16),
    (256, 100, 2000, 16),
    (96, 100, 2000, 16),
    (48, 100, 2000, 16),
)
COPY_BYTES = 2**31
FLUSH_BYTES = 2**30  # many times the cache; and while it is written, the host has time to launch what is timed
WARMUP = 5


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.paged", description="Time the paged decode kernel of a stage on a GPU."
    )
    parser.add_argument("--stage", help="m3, m4, … (default: the newest)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each shape (default: 30)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def stage_part(stage: ModuleType, name: str) -> ModuleType:
    """A module of the stage. Raises ValueError if the stage has none of that name."""
    try:
        return import_module(f"{stage.__name__}.{name}")
    except ModuleNotFoundError:
        raise ValueError(f"{stage.__name__} has no {name}: choose a later stage") from None


class Case:
    """Random queries, and a cache whose blocks lie in no order.

    Args:
        seq_lens: tokens cached of each sequence.
    """

    def __init__(
        self, stage: ModuleType, seq_lens: list[int], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_seqs, longest = len(seq_lens), max(seq_lens)
        num_columns = -(-longest // block_size)
        num_blocks = num_seqs * num_columns
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        cache_shape = (num_blocks * block_size + 1, NUM_KV_HEADS, HEAD_DIM)
        self.num_bytes = 2 * sum(seq_lens) * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize  # keys and values, read once
        metadata = stage_part(stage, "attention.metadata").AttentionMetadata(
            query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            max_query_len=1,
            max_seq_len=longest,
            slot_mapping=torch.zeros(num_seqs, dtype=torch.int64, device=device),
            block_table=torch.randperm(num_blocks, generator=generator, device=device)
            .view(num_seqs, num_columns)
            .to(torch.int32),
            block_size=block_size,
        )
        self.arguments = (
            random(num_seqs, NUM_HEADS + NUM_KV_HEADS, HEAD_DIM)[:, :NUM_HEADS],  # a slice, as the model hands it over
            random(*cache_shape),
            random(*cache_shape),
            metadata,
            HEAD_DIM**-0.5,
        )


def largest_deviation(stage: ModuleType, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference between the kernel and the slow loop, over sequences of many lengths and block sizes."""
    paged = stage_part(stage, "attention.backends.paged")
    differences = []
    for block_size in sorted({block_size for *_, block_size in SHAPES}):
        case = Case(stage, [1, 15, 16, 17, 255, 256, 257, 700], block_size, dtype, device)
        kernel, loop = paged.paged_decode(*case.arguments), paged.paged_decode_reference(*case.arguments)
        differences.append(float((kernel.float() - loop.float()).abs().max()))
    return max(differences)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Milliseconds on the GPU, with nothing of the data in its cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARMUP + repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[WARMUP:])


def copy_gb_per_s(repeats: int) -> float:
    """Bytes read and written by a copy, a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(lambda: target.copy_(source), repeats) / 1e6


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All shapes. ValueError for anything that the user can mend."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    stage = lab.load_stage(args.stage)
    paged = stage_part(stage, "attention.backends.paged")
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here, and the kernel runs on one only: try a machine that has one")
    dtype, device = getattr(torch, args.dtype), torch.device("cuda")
    copy = copy_gb_per_s(args.repeats)
    rows = []
    for num_seqs, shortest, longest, block_size in SHAPES:
        seq_lens = np.linspace(shortest, longest, num_seqs).round().astype(int)
        case = Case(stage, np.random.default_rng(0).permutation(seq_lens).tolist(), block_size, dtype, device)
        milliseconds = median_ms(lambda case=case: paged.paged_decode(*case.arguments), args.repeats)  # type: ignore[misc]
        speed = case.num_bytes / milliseconds / 1e6
        rows.append(
            {
                "batch": num_seqs,
                "context": longest,
                "lengths": f"{longest:,}" if shortest == longest else f"{shortest:,}–{longest:,}",
                "block_size": block_size,
                "splits": paged.choose_num_splits(num_seqs * NUM_KV_HEADS, longest, device)[1],
                "microseconds": round(1e3 * milliseconds, 2),
                "gb_per_s": round(speed, 1),
                "share_of_copy": round(speed / copy, 3),
            }
        )
    return {
        "stage": stage.__name__,
        "device": "cuda",
        "dtype": args.dtype,
        "description": f"one decode query a sequence, {NUM_HEADS} heads, {NUM_KV_HEADS} KV heads, {HEAD_DIM} wide",
        "repeats": args.repeats,
        "copy_gb_per_s": round(copy, 1),
        "largest_deviation_from_reference": largest_deviation(stage, dtype, device),
        "shapes": rows,
    }


def show(figures: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{figures['stage']}: {figures['description']}; {figures['dtype']}")
    console.print(f"a copy moves {figures['copy_gb_per_s']:,.0f} GB/s")
    table = Table("batch", "context", "block", "splits", "time, µs", "GB/s", "share of the copy")
    for row in figures["shapes"]:
        cells = [str(row[name]) for name in ("batch", "lengths", "block_size", "splits")]
        table.add_row(*cells, f"{row['microseconds']:,.1f}", f"{row['gb_per_s']:,.0f}", f"{row['share_of_copy']:.2f}")
    console.print(table)
    console.print(f"largest deviation from the loop: {figures['largest_deviation_from_reference']:.1e}")


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
