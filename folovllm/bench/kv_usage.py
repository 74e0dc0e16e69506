"""How well a stage fills the memory that it has for keys and values: `python -m folovllm.bench.kv_usage`.

Stages get the same bytes and the same longest length, once with a workload of many requests, once with several samples
of one prompt. Counted are slots that hold a token against slots that belong to somebody, how many sequences run while
others wait, and what the samples of one prompt have in common. These are counts: they do not depend on the machine's
speed, and hardly on the model.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import lab
from .options import add_engine_options, describe_engine, open_llm, run_script
from .workloads import WORKLOADS, Workload

PARALLEL = "parallel"
MAX_MODEL_LEN = 4096
ROWS = {"cpu": 2, "cuda": 16}  # as many sequences as long as can be, unless --kv-bytes says otherwise


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.kv_usage", description="How well stages fill the same KV memory."
    )
    parser.add_argument("--milestones", default="m2,m3", help="stages with a scheduler (default: m2,m3)")
    parser.add_argument("--workload", default="mixed_cpu", choices=WORKLOADS, help="default: mixed_cpu")
    parser.add_argument("--block-sizes", default="16,256", help="for stages that have blocks (default: 16,256)")
    parser.add_argument(
        "--kv-bytes", type=int, help="KV memory of each stage (default: 2 sequences of --max-model-len; on CUDA, 16)"
    )
    add_engine_options(parser)
    parser.set_defaults(max_model_len=MAX_MODEL_LEN)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run of the workload and one of `parallel` for each row. ValueError for anything that the user can mend."""
    kv_bytes = args.kv_bytes or default_kv_bytes(args)
    rows: dict[str, Any] = {}
    for stage, options in variants(args.milestones.split(","), args.block_sizes.split(",")):
        with open_llm(args, stage, kv_cache_memory_bytes=kv_bytes, **options) as llm:
            workload = lab.workload_for(llm, args.workload)
            samples = lab.workload_for(llm, PARALLEL)
            engine = describe_engine(args, llm)
            name = ", ".join([stage, *(f"{option}={value}" for option, value in options.items())])
            rows[name] = {"workload": fill(llm, workload), PARALLEL: sharing(llm, samples)}
    return {
        **engine,
        "workload": workload.name,
        "description": workload.description,
        "parallel": samples.description,
        "max_model_len": args.max_model_len,
        "kv_bytes": kv_bytes,
        "rows": rows,
    }


def default_kv_bytes(args: argparse.Namespace) -> int:
    """Bytes of so many sequences of the longest length as `ROWS` says for the device."""
    stage = lab.load_stage(args.milestones.split(",")[0]).__name__
    loader, common = (import_module(f"{stage}.{part}") for part in ("model_executor.model_loader", "utils.common"))
    config = loader.load_hf_config(loader.resolve_model(args.model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = common.resolve_dtype(args.dtype, config).itemsize
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize
    return int(ROWS[common.resolve_device(args.device).type] * args.max_model_len * bytes_per_token)


def variants(stages: list[str], block_sizes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every stage, and if it has blocks, with each of the sizes. ValueError for a size that is no number."""
    for stage in stages:
        if "block_size" not in {option.name for option in fields(lab.load_stage(stage).EngineConfig)}:
            yield stage, {}
            continue
        for block_size in block_sizes:
            if not block_size.isdecimal():
                raise ValueError(f"--block-sizes must be numbers with commas between, got {block_size!r}")
            yield stage, {"block_size": int(block_size)}


def run(llm: Any, workload: Workload) -> tuple[lab.Result, list[Any]]:
    """The workload's result and its StepRecords, none of the warm-up among them. ValueError if it records no slots."""
    params = type(llm.get_default_sampling_params())(max_tokens=2, temperature=0.0, ignore_eos=True)
    llm.generate([[1, 2, 3]], params, use_tqdm=False)
    if not hasattr(llm.engine.stats.steps[0], "kv_slots_allocated"):
        raise ValueError("this stage does not record whose slots are whose: choose m2 or a later one")
    llm.engine.stats.clear()
    result = lab.run(llm, workload, warmup=False)
    return result, list(llm.engine.stats.steps)


def fill(llm: Any, workload: Workload) -> dict[str, Any]:
    """Slots and sequences during the workload; sequences as the mean over all steps after which somebody waited."""
    result, steps = run(llm, workload)
    used = np.array([step.kv_slots_used for step in steps])
    allocated = np.array([step.kv_slots_allocated for step in steps])
    crowded = [step for step in steps if step.num_waiting]
    return {
        "kv_slots": steps[0].kv_slots,
        "steps": len(steps),
        "used_over_allocated": round(float(used.sum() / allocated.sum()), 4),
        "steps_with_somebody_waiting": len(crowded),
        "running_while_others_wait": round(float(np.mean([s.num_running for s in crowded])), 2) if crowded else None,
        "used_over_all_while_others_wait": round(
            float(np.mean([step.kv_slots_used / step.kv_slots for step in crowded])), 4
        )
        if crowded
        else None,
        "most_running": max(step.num_running for step in steps),
        "num_preemptions": getattr(steps[-1], "num_preemptions", 0),
        "tokens_computed": sum(step.num_tokens for step in steps),
        "seconds": round(result.seconds, 3),
        "output_tokens_per_s": round(result.output_tokens_per_s, 1),
    }


def sharing(llm: Any, workload: Workload) -> dict[str, Any]:
    """What the samples of one prompt compute and hold."""
    result, steps = run(llm, workload)
    (request,) = workload.requests
    # The last token of an output is never computed; everything else that is not prompt is, once for each sample.
    num_output_tokens_computed = sum(len(trace.token_ids) - 1 for trace in result.traces)
    most = max(steps, key=lambda step: step.kv_slots_allocated)
    return {
        "prompt_tokens": len(request.prompt_token_ids),
        "samples": request.n,
        "tokens_computed_for_the_prompt": sum(step.num_tokens for step in steps) - num_output_tokens_computed,
        "most_running": max(step.num_running for step in steps),
        "most_slots_allocated": most.kv_slots_allocated,
        "slots_used_then": most.kv_slots_used,
        "most_blocks": most.kv_slots_allocated // (getattr(llm.config, "block_size", None) or llm.config.max_model_len),
    }


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{figures['workload']}: {figures['description']}")
    console.print(
        f"{figures['model']}, {figures['dtype']}, {figures['device']}; {figures['kv_bytes'] / 2**20:,.0f} MiB of KV "
        f"cache, max_model_len {figures['max_model_len']:,}"
    )
    table = Table(
        "", "slots", "used / allocated", "running while others wait", "most", "steps", "preempted", "computed for the"
        " prompt", "blocks of 8 samples",
    )  # fmt: skip
    for name, row in figures["rows"].items():
        filled, shared = row["workload"], row[PARALLEL]
        running = filled["running_while_others_wait"]
        table.add_row(
            name,
            f"{filled['kv_slots']:,}",
            f"{filled['used_over_allocated']:.1%}",
            "nobody waits" if running is None else f"{running:.1f}",
            f"{filled['most_running']:,}",
            f"{filled['steps']:,}",
            f"{filled['num_preemptions']:,}",
            f"{shared['tokens_computed_for_the_prompt']:,} of {shared['prompt_tokens']:,}",
            f"{shared['most_blocks']:,}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
