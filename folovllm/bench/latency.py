"""How long a batch of equal requests takes from its arrival to its last token, again and again.

Options and their meaning are those of `vllm bench latency`; the defaults are smaller, so that a laptop is done in a
minute. The script is tests/benchmark/latency_test.py.
"""

import argparse
import random
from typing import Any

import numpy as np

from .. import lab
from .options import add_engine_options, describe_engine, open_llm, run_script
from .workloads import Workload, WorkloadRequest

PERCENTILES = (10, 25, 50, 75, 90, 99)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time a batch of equal requests from its arrival to its last token.")
    parser.add_argument("--stage", help="m0, m1, … (default: the newest)")
    parser.add_argument("--input-len", type=int, default=32, help="prompt tokens a request (default: 32)")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens a request (default: 128)")
    parser.add_argument("--batch-size", type=int, default=1, help="requests sent together (default: 1)")
    parser.add_argument("--num-iters-warmup", type=int, default=2, help="batches that are not counted (default: 2)")
    parser.add_argument("--num-iters", type=int, default=10, help="batches that are (default: 10)")
    add_engine_options(parser)
    return parser


def make_batch(args: argparse.Namespace, vocab_size: int) -> Workload:
    """The batch: random prompts, temperature 1, no early end.

    Raises:
        ValueError: a count below 1.
    """
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    rng = random.Random(0)
    requests = [
        WorkloadRequest(
            [rng.randrange(vocab_size) for _ in range(args.input_len)], args.output_len, temperature=1.0, seed=index
        )
        for index in range(args.batch_size)
    ]
    plural = "" if args.batch_size == 1 else "s"
    description = f"{args.batch_size} request{plural}, prompt {args.input_len}, output {args.output_len}"
    return Workload("latency", description, requests)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a batch. ValueError for anything that the user can mend."""
    with open_llm(args, args.stage) as llm:
        batch = make_batch(args, llm.hf_config.vocab_size)
        for _ in range(args.num_iters_warmup):
            lab.run(llm, batch, warmup=False)
        results = [lab.run(llm, batch, warmup=False) for _ in range(args.num_iters)]
        engine = describe_engine(args, llm)
    latencies = [result.seconds for result in results]
    return {
        "stage": results[0].stage,
        **engine,
        "description": batch.description,
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(q): float(np.percentile(latencies, q)) for q in PERCENTILES},
    }


def show(figures: dict[str, Any]) -> None:
    print(f"{figures['stage']}, {figures['model']}, {figures['dtype']}, {figures['device']}: {figures['description']}")
    print(f"Avg latency: {figures['avg_latency']:.4f} seconds")
    for q, seconds in figures["percentiles"].items():
        print(f"{q}% percentile latency: {seconds:.4f} seconds")


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)
