"""One workload on one stage: `python -m folovllm.bench.run --stage m0 --workload single`. A table for people, and one
line of JSON for programs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import TINY, lab
from .options import print_json
from .workloads import WORKLOADS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m folovllm.bench.run", description="Time a workload on a stage.")
    parser.add_argument("--stage", help="m0, m1, … (default: the newest)")
    parser.add_argument("--workload", default="single", choices=WORKLOADS, help="default: single")
    parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy: random weights")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what the arguments ask for. ValueError for anything that the user can mend."""
    options = {name: getattr(args, name) for name in ("load_format", "dtype", "device")}
    with lab.load_stage(args.stage).LLM(args.model, log_level="WARNING", **options) as llm:
        result = lab.run(llm, args.workload)
        model = {"model": args.model, "dtype": llm.config.dtype, "device": llm.config.device}
    return {**model, **result.summary(), "environment": lab.environment()}


def print_table(figures: dict[str, Any]) -> None:
    """The figures of `measure`, one a row."""
    console = Console()
    console.print(f"{figures['stage']}, {figures['workload']}: {figures['description']}")
    console.print(f"{figures['model']}, {figures['dtype']}, {figures['device']}")
    table = Table("", "p50", "p99")
    for name in ("ttft", "tpot", "itl", "e2e"):
        p50, p99 = figures[f"{name}_p50_ms"], figures[f"{name}_p99_ms"]
        table.add_row(f"{name.upper()}, ms", *("–" if value is None else f"{value:,.2f}" for value in (p50, p99)))
    console.print(table)
    console.print(
        f"{figures['output_tokens']:,} tokens in {figures['seconds']:,.2f} s: "
        f"{figures['output_tokens_per_s']:,.1f} tokens/s, {figures['requests_per_s']:,.2f} requests/s; "
        f"peak memory {figures['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    for note in figures["notes"]:
        console.print(f"Note: {note}.")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the user must change something."""
    args = make_parser().parse_args(argv)
    try:
        figures = measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, ensure_ascii=False) + "\n", encoding="utf-8")
    print_json(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
