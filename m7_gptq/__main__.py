"""The engine from the command line: `python -m PACKAGE "Once upon a time" --stream`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .llm import LLM
from .outputs import RequestOutput


def embedded_model() -> str | None:
    """The small model that comes with the repository, if it is there."""
    spec = find_spec("folovllm")
    folder = Path(spec.origin).parent / "models" / "tiny" if spec and spec.origin else None
    return str(folder) if folder and folder.is_dir() else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="Continue one or more prompts.")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to continue (default: a prompt a line, stdin)"
    )
    parser.add_argument("--model", default=embedded_model(), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy: random weights")
    parser.add_argument("--quantization", help="gptq: insist on quantised weights (default: what the checkpoint has)")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--log-level", default="WARNING", help="DEBUG, INFO, WARNING or ERROR")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, help="0: always the most likely token")
    parser.add_argument("--top-p", type=float, help="draw from the most likely tokens that reach this probability")
    parser.add_argument("--top-k", type=int, help="draw from this many most likely tokens")
    parser.add_argument("--stop", action="append", help="end at this text (may be given several times)")
    parser.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stream", action="store_true", help="print every piece of text as it comes")
    how.add_argument("--json", action="store_true", help="print a JSON object a line: text, token_ids, timings, …")
    return parser


def run(args: argparse.Namespace) -> None:
    """Generate and print.

    Raises:
        ValueError: anything that the user can mend.
    """
    if not args.prompts and sys.stdin.isatty():
        print("reading prompts, one a line; Ctrl-D ends them", file=sys.stderr)
    prompts = args.prompts or [prompt for line in sys.stdin if (prompt := line.rstrip("\n"))]
    if not prompts:
        raise ValueError("no prompt: give one, or one a line on the standard input")
    engine_options = ("dtype", "device", "load_format", "quantization", "max_model_len", "log_level")
    with LLM(args.model, **{name: getattr(args, name) for name in engine_options}) as llm:
        options = ("temperature", "top_p", "top_k", "stop", "seed", "max_tokens", "ignore_eos")
        given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
        params = replace(llm.get_default_sampling_params(), **given)
        if args.stream:
            print_stream(llm.stream(prompts, params))
            return
        for output in llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()):
            print(json.dumps(to_dict(output), ensure_ascii=False) if args.json else f"{output.prompt}{output.text}")


def print_stream(outputs: Iterable[RequestOutput]) -> None:
    """Print text as it comes, one prompt after the other however their outputs are interleaved."""
    waiting: dict[str, str] = {}  # request id: what is still to be printed, in the order of the prompts
    finished = set()
    for output in outputs:
        waiting[output.request_id] = waiting.get(output.request_id, output.prompt or "") + output.delta
        if output.finished:
            finished.add(output.request_id)
        for request_id, text in list(waiting.items()):
            print(text, end="\n" if request_id in finished else "", flush=True)
            waiting[request_id] = ""
            if request_id not in finished:
                break
            del waiting[request_id]


def to_dict(output: RequestOutput) -> dict[str, Any]:
    """What --json prints; times in seconds."""
    completion, metrics = output.outputs[0], output.metrics
    return {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "ttft": metrics.ttft,
        "tpot": metrics.tpot,
        "e2e_latency": metrics.e2e_latency,
        "tokens_per_second": metrics.tokens_per_second,
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 when the user must change something, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
