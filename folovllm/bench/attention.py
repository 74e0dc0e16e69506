"""Attention alone, by every backend of a stage and by the textbook: `python -m folovllm.bench.attention`.

Prompts of several lengths go through each backend as one layer would hand them over, and through the formula with its
whole N x N matrix of scores. Measured are time and the most memory that is taken beside what comes in; counted are the
bytes that the formula and the tiled algorithm move. `--decode`, on a GPU, times one query a sequence instead, by our
kernel and by flash-attn's, as a share of what a plain copy moves.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .. import TINY, lab
from .options import run_script
from .paged import Case, copy_gb_per_s, median_ms, stage_part

LENGTHS = "256,512,1024,2048,4096,8192"
BACKENDS = ("naive", "paged", "flash")
TEXTBOOK = "textbook"
TEXTBOOK_LIMIT = 8 * 10**9  # bytes that its matrices may take
TILES = (64, 128)  # queries, and keys, in a tile of the tiled algorithm
DECODE = tuple((num_seqs, context) for context in (1024, 8192) for num_seqs in (1, 8, 32, 64, 96, 128, 256))
DECODE_LIMIT = 256 * 2048  # tokens of a case: 4 GiB of keys and values
PAGE = 256  # slots of a block in the decode sweep: flash-attn 2 reads multiples of it only


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.attention", description="Time and memory of attention alone."
    )
    parser.add_argument("--stage", help="m4, … (default: the newest)")
    parser.add_argument("--model", default=str(TINY), help="folder whose config.json gives the number of heads")
    parser.add_argument("--lengths", default=LENGTHS, help=f"of the prompts, in tokens (default: {LENGTHS})")
    parser.add_argument("--decode", action="store_true", help="one query a sequence (a GPU; heads of Qwen3-0.6B)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prompts, or decode steps. ValueError for anything that the user can mend."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    lengths = args.lengths.split(",")
    if not all(length.isdecimal() and int(length) for length in lengths):
        raise ValueError(f"--lengths must be numbers of tokens with commas between, got {args.lengths!r}")
    stage = lab.load_stage(args.stage)
    stage_part(stage, "attention.backends.flash_attn")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available() and (args.decode or device.type == "cuda"):
        raise ValueError("torch sees no CUDA GPU here: try a machine that has one, or prompts with --device cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    figures = {"stage": stage.__name__, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if args.decode:
        return figures | {"repeats": args.repeats} | decode_sweep(stage, dtype, args.repeats)
    heads = heads_of(Path(args.model))
    return {
        **figures,
        "model": Path(args.model).name,
        "description": "one causal prompt, {} heads, {} KV heads, {} wide".format(*heads),
        "repeats": args.repeats,
        "rows": [prompt_row(stage, int(length), heads, dtype, device, args.repeats) for length in lengths],
    }


def heads_of(folder: Path) -> tuple[int, int, int]:
    """num_heads, num_kv_heads, head_dim. ValueError if the folder has no config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: --model takes a folder") from None
    num_heads = config["num_attention_heads"]
    return num_heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // num_heads


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompt_row(
    stage: ModuleType,
    length: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds and bytes of one length; None where something was left out."""
    functions = {name: prompt_function(stage, name, length, heads, dtype, device) for name in BACKENDS}
    if 3 * heads[0] * length**2 * dtype.itemsize <= TEXTBOOK_LIMIT:
        num_heads, num_kv_heads, head_dim = heads
        q = torch.randn(length, num_heads, head_dim, dtype=dtype, device=device)
        k, v = torch.randn(2, length, num_kv_heads, head_dim, dtype=dtype, device=device)
        functions[TEXTBOOK] = lambda: textbook(q, k, v)
    took: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        function()  # whatever is built or loaded at first use
        took[name] = {"peak_bytes": peak_bytes(function, device)}
    for name, ms in median_times(functions, device, repeats).items():
        took[name]["ms"] = round(ms, 4)
    return {
        "length": length,
        "input_bytes": (heads[0] + 2 * heads[1]) * length * heads[2] * dtype.itemsize,
        "rows": {name: took.get(name) for name in (*BACKENDS, TEXTBOOK)},
        "bytes_moved": {
            TEXTBOOK: textbook_bytes(length, heads, dtype),
            **{f"tiles of {tile}": tiled_bytes(stage, length, heads, dtype, tile) for tile in TILES},
        },
    }


def prompt_function(
    stage: ModuleType,
    name: str,
    length: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], torch.Tensor]:
    """Attention of one prompt by a backend, over blocks in no order. ValueError if it cannot serve here."""
    num_heads, num_kv_heads, head_dim = heads
    abstract = stage_part(stage, "attention.backends.abstract")
    backend = abstract.select_backend(name, dtype, head_dim, None, device)
    block_size = backend.preferred_block_size(device)
    num_blocks = -(-length // block_size)
    k_cache, v_cache = torch.randn(2, num_blocks * block_size + 1, num_kv_heads, head_dim, dtype=dtype, device=device)
    metadata = stage_part(stage, "attention.metadata").AttentionMetadata(
        query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
        max_query_len=length,
        max_seq_len=length,
        slot_mapping=torch.zeros(length, dtype=torch.int64, device=device),
        block_table=torch.randperm(num_blocks, device=device).int()[None],
        block_size=block_size,
    )
    q = torch.randn(length, num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)[:, :num_heads]
    return lambda: backend.forward(q, k_cache, v_cache, metadata, head_dim**-0.5)  # type: ignore[no-any-return]


def textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T + mask) v with every score of every head at once: q [N, H, D], k and v [N, KvH, D] -> [N, H, D]."""
    (length, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    grouped = (q * head_dim**-0.5).view(length, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = torch.bmm(grouped.reshape(num_kv_heads, -1, head_dim), k.permute(1, 2, 0))  # [KvH, G * N, N]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    scores.view(num_heads, length, length).masked_fill_(later, float("-inf"))
    out = torch.bmm(scores.softmax(dim=-1), v.transpose(0, 1))  # [KvH, G * N, D]
    return out.view(num_heads, length, head_dim).transpose(0, 1)


class CountBytes(TorchDispatchMode):
    """Sums what every operation reads and writes: the tensors that go in and come out. A view moves nothing.

    Attributes:
        num_bytes: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [value for value in (*args, out) if isinstance(value, torch.Tensor)]
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return out


def textbook_bytes(length: int, heads: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes that the operations of `textbook` read and write, counted on tensors without contents."""
    num_heads, num_kv_heads, head_dim = heads
    q = torch.empty(length, num_heads, head_dim, dtype=dtype, device="meta")
    k, v = torch.empty(2, length, num_kv_heads, head_dim, dtype=dtype, device="meta").unbind()
    with CountBytes() as counted:
        textbook(q, k, v)
    return counted.num_bytes


def tiled_bytes(stage: ModuleType, length: int, heads: tuple[int, int, int], dtype: torch.dtype, tile: int) -> int:
    """Bytes that the stage's `tiled_attention` moves, every query head with keys and values of its own.

    Counted on heads of one dimension: each tile is proportional to their width and number.
    """
    q, k, v = torch.zeros(3, length, 1, 1, dtype=dtype)
    tiled_attention = stage_part(stage, "attention.backends.flash_attn").tiled_attention
    _, traffic = tiled_attention(q, k, v, 1.0, query_tile=tile, key_tile=tile)
    return int((traffic.read + traffic.written) * heads[0] * heads[2])


def median_times(
    functions: dict[str, Callable[[], torch.Tensor]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of each; on a CPU in turns, so that other work on the machine slows all of them alike."""
    if device.type == "cuda":
        return {name: median_ms(function, repeats) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], torch.Tensor], device: torch.device) -> int:
    """The most that the call holds at once, its result included, as torch's allocator sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---- decode steps ----------------------------------------------------------------------------------------------------


def decode_sweep(stage: ModuleType, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Microseconds of our kernel and of flash-attn's, with nothing of the data in the card's cache."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        flash_attn_with_kvcache = None
    paged, device = stage_part(stage, "attention.backends.paged"), torch.device("cuda")
    copy = copy_gb_per_s(repeats)

    def timed(function: Callable[[], object], num_bytes: int) -> dict[str, float]:
        milliseconds = median_ms(function, repeats)
        return {
            "microseconds": round(1e3 * milliseconds, 2),
            "share_of_copy": round(num_bytes / milliseconds / 1e6 / copy, 3),
        }

    rows = []
    for num_seqs, context in DECODE:
        if num_seqs * context > DECODE_LIMIT:
            continue
        case = Case(stage, [context] * num_seqs, PAGE, dtype, device)
        ours = timed(lambda case=case: paged.paged_decode(*case.arguments), case.num_bytes)  # type: ignore[misc]
        theirs = None
        if flash_attn_with_kvcache is not None:
            q, k, v, metadata, scale = case.arguments
            pages = [cache[:-1].view(-1, PAGE, *cache.shape[1:]) for cache in (k, v)]
            call = {"cache_seqlens": metadata.seq_lens, "block_table": metadata.block_table, "softmax_scale": scale}
            theirs = timed(
                lambda q=q, pages=pages, call=call: flash_attn_with_kvcache(q[:, None], *pages, causal=True, **call),  # type: ignore[misc]
                case.num_bytes,
            )
        rows.append({"num_seqs": num_seqs, "context": context, "paged_decode": ours, "flash_attn": theirs})
    return {
        "description": f"one decode query a sequence, 16 heads, 8 KV heads, 128 wide, blocks of {PAGE}",
        "copy_gb_per_s": round(copy, 1),
        "decode": rows,
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{figures['stage']}: {figures['description']}; {figures['dtype']}, {figures['device']}")
    if "decode" in figures:
        console.print(f"a copy moves {figures['copy_gb_per_s']:,.0f} GB/s")
        table = Table("sequences", "context", "ours, µs", "share of the copy", "flash-attn, µs", "share of the copy")
        for row in figures["decode"]:
            cells = []
            for one in (row["paged_decode"], row["flash_attn"]):
                cells += ["–", "–"] if one is None else [f"{one['microseconds']:,.1f}", f"{one['share_of_copy']:.2f}"]
            table.add_row(str(row["num_seqs"]), f"{row['context']:,}", *cells)
        console.print(table)
        return
    names = (*BACKENDS, TEXTBOOK)
    table = Table("tokens", *(f"{name}, ms" for name in names), *(f"{name}, MiB" for name in names), "moved, textbook")
    table.add_column(f"moved, {TILES[0]}")
    for row in figures["rows"]:
        found = [row["rows"][name] for name in names]
        table.add_row(
            f"{row['length']:,}",
            *("–" if one is None else f"{one['ms']:,.2f}" for one in found),
            *("–" if one is None else f"{one['peak_bytes'] / 2**20:,.1f}" for one in found),
            *(f"{row['bytes_moved'][name] / 2**20:,.0f} MiB" for name in (TEXTBOOK, f"tiles of {TILES[0]}")),
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
