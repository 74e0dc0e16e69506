"""What a step costs besides the model: `python -m folovllm.bench.scheduler --stage m2`.

A stage's own scheduler and output side take turns with a model that is not there: tokens come from a random generator.
What is timed is Python alone: choosing who runs, taking their tokens in, and turning these into text. On a GPU that is
time in which nothing is computed.
"""

import argparse
import random
import sys
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import TINY, lab
from .options import run_script

PROMPT_TOKENS = 128


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.scheduler", description="Time everything in a step but the model."
    )
    parser.add_argument("--stage", help="m2, m3, … (default: the newest)")
    parser.add_argument("--num-seqs", type=int, default=256, help="sequences that run (default: 256)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps that are timed (default: 200)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


class Engine:
    """Scheduler and output side of a stage, without a model; `num_seqs` sequences run, their prompts are computed.

    Raises:
        ValueError: the stage has no scheduler.
    """

    def __init__(self, stage: ModuleType, num_seqs: int, max_new_tokens: int) -> None:
        def part(name: str) -> ModuleType:
            return import_module(f"{stage.__name__}.{name}")

        try:
            scheduler = part("core.sched.scheduler")
        except ModuleNotFoundError:
            raise ValueError(f"{stage.__name__} has no scheduler: choose a later stage") from None
        loader, processor = part("model_executor.model_loader"), part("engine.processor")
        self.model_runner_output = part("outputs").ModelRunnerOutput
        hf_config, tokenizer = loader.load_hf_config(TINY), loader.load_tokenizer(TINY)
        self.vocab_size = hf_config.vocab_size
        self.rng = random.Random(0)
        config = settled_config(stage, num_seqs, PROMPT_TOKENS + max_new_tokens)
        self.scheduler = scheduler.Scheduler(config)
        self.output_processor = processor.OutputProcessor(tokenizer)
        input_processor = processor.InputProcessor(config, hf_config, tokenizer, {})
        params = stage.SamplingParams(max_tokens=max_new_tokens, ignore_eos=True, seed=0)
        for number in range(num_seqs):
            (seq,) = input_processor.process(str(number), self._tokens(PROMPT_TOKENS), params)
            self.output_processor.add_request([seq])
            self.scheduler.add_sequence(seq)
        while any(seq.num_output_tokens == 0 for seq in self.scheduler.running) or len(self.scheduler.waiting):
            self.step()

    def step(self) -> tuple[int, list[float]]:
        """How many sequences ran, and the seconds that schedule, update and output took."""
        started = time.perf_counter()
        scheduled = self.scheduler.schedule()
        chosen = time.perf_counter()
        sampled = self.model_runner_output(self._tokens(len(scheduled.seqs)), {}, {})
        resumed = time.perf_counter()
        seq_outputs = self.scheduler.update_from_output(scheduled, sampled)
        updated = time.perf_counter()
        self.output_processor.process_outputs(seq_outputs)
        return len(scheduled.seqs), [chosen - started, updated - resumed, time.perf_counter() - updated]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(count)]


def settled_config(stage: ModuleType, num_seqs: int, max_model_len: int) -> Any:
    """An EngineConfig without a None that a scheduler could stumble over, as a worker would hand it on."""
    block_size = 16
    settled = {
        "max_model_len": max_model_len,
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": 8192,
        "max_chunk_size": 2048,
        "block_size": block_size,
        "num_kv_blocks": num_seqs * (-(-max_model_len // block_size) + 1),  # nobody is preempted
    }
    known = {option.name for option in fields(stage.EngineConfig)}
    return stage.EngineConfig(str(TINY), **{name: value for name, value in settled.items() if name in known})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Decode steps with all sequences running. ValueError for anything that the user can mend."""
    for option in ("num_seqs", "steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    stage = lab.load_stage(args.stage)
    # Nobody finishes: a token for the prompt's step, one for each that is timed, and some for decode steps in between.
    engine = Engine(stage, args.num_seqs, 2 * args.steps + args.num_seqs)
    steps = [engine.step() for _ in range(args.steps)]
    assert all(num_seqs == args.num_seqs for num_seqs, _ in steps)
    times = 1e3 * np.array([seconds for _, seconds in steps])  # [steps, 3], milliseconds
    columns = {
        "schedule": times[:, 0],
        "update_from_output": times[:, 1],
        "process_outputs": times[:, 2],
        "together": times.sum(axis=1),
    }
    return {
        "stage": stage.__name__,
        "description": f"{args.num_seqs} sequences decode, {args.steps} steps, no model",
        "num_seqs": args.num_seqs,
        "steps": args.steps,
        "ms": {
            name: {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 99)}
            for name, values in columns.items()
        },
    }


def show(figures: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{figures['stage']}: {figures['description']}")
    table = Table("", "p50, ms", "p99, ms")
    for name, values in figures["ms"].items():
        table.add_row(name, f"{values['p50']:.3f}", f"{values['p99']:.3f}")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
