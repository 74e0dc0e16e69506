"""What the benchmark scripts have in common: which engine to open, and how their results leave the program."""

import argparse
import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import TINY, lab


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--model, --load-format, --dtype, --device, --max-model-len, --json."""
    parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy: random weights")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")


def open_llm(args: argparse.Namespace, stage: str | None, **overrides: Any) -> Any:
    """An LLM of `stage` (None: the newest) as `add_engine_options` describes it; `overrides` win.

    Raises:
        ValueError, TypeError: anything that the user can mend.
    """
    names = ("load_format", "dtype", "device", "max_model_len")
    options = {"log_level": "WARNING", **{name: getattr(args, name) for name in names}, **overrides}
    return lab.load_stage(stage).LLM(args.model, **options)


def describe_engine(args: argparse.Namespace, llm: Any) -> dict[str, Any]:
    """What was measured, for the JSON; the model goes by its name, wherever its folder is."""
    return {"model": Path(args.model).name, "dtype": llm.config.dtype, "device": llm.config.device}


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """ "m1:max_model_len=256:dtype=float32" is the stage "m1" and two of its engine options.

    Raises:
        ValueError: something after a colon is not of the form option=value.
    """
    stage, *settings = text.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ValueError(f"{text!r}: write a stage, or a stage with options such as m1:max_model_len=256")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return stage, options


def run_script(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """A benchmark from arguments to exit code: measure, show it to people, and to programs as one line of JSON.

    Returns:
        0, or 2 when the user must change something.
    """
    args = parser.parse_args(argv)
    try:
        figures = {**measure(args), "environment": lab.environment()}
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_json(figures)
    return 0


def print_json(figures: dict[str, Any]) -> None:
    """One line of JSON for the program at the other end of a pipe; at a terminal there is none."""
    if not sys.stdout.isatty():
        print(json.dumps(figures, ensure_ascii=False))
