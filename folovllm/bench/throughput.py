"""How many requests and tokens a stage finishes in a second when all requests are there from the start.

The script is tests/benchmark/throughput_test.py; before the JSON it prints the line of `vllm bench
throughput`.
"""

import argparse
from dataclasses import replace
from typing import Any

from .. import lab
from .options import add_engine_options, describe_engine, open_llm, run_script
from .workloads import WORKLOADS, Workload


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Requests and tokens a second, with all requests there from the start."
    )
    parser.add_argument("--stage", help="m0, m1, … (default: the newest)")
    parser.add_argument("--workload", default="uniform", choices=WORKLOADS, help="default: uniform")
    parser.add_argument("--batch-size", type=int, metavar="N", help="send only the first N requests of the workload")
    add_engine_options(parser)
    return parser


def first_requests(workload: Workload, count: int | None) -> Workload:
    """The workload with its first `count` requests; None: with all.

    Raises:
        ValueError: it does not have that many.
    """
    if count is None or count == len(workload.requests):
        return workload
    if not 1 <= count <= len(workload.requests):
        raise ValueError(
            f"--batch-size must be between 1 and {len(workload.requests)}, the requests of {workload.name}; got {count}"
        )
    description = f"{workload.description}; only {count} of the requests"
    return replace(workload, description=description, requests=workload.requests[:count])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run. ValueError for anything that the user can mend."""
    with open_llm(args, args.stage) as llm:
        result = lab.run(llm, first_requests(lab.workload_for(llm, args.workload), args.batch_size))
        engine = describe_engine(args, llm)
    num_prompt_tokens = sum(trace.num_prompt_tokens for trace in result.traces if trace.sample == 0)
    return {
        **engine,
        **result.summary(),
        "prompt_tokens": num_prompt_tokens,
        "total_tokens_per_s": round((num_prompt_tokens + result.num_output_tokens) / result.seconds, 2),
    }


def show(figures: dict[str, Any]) -> None:
    print(f"{figures['stage']}, {figures['model']}, {figures['dtype']}, {figures['device']}: {figures['description']}")
    for note in figures["notes"]:
        print(f"Note: {note}.")
    print(
        f"Throughput: {figures['requests_per_s']:.2f} requests/s, {figures['total_tokens_per_s']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_s']:.2f} output tokens/s"
    )


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)
