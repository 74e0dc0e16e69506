"""The `folovllm` command: talk to a stage, quantise and evaluate a model, show what a stage changed, practise, and keep
the ledger.

A fault of the user is one sentence on stderr and exit code 2. Stages, and with them torch, are imported only by the
commands that run one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from . import TINY, import_stage, stages


def generate(arguments: list[str]) -> int:
    """Hand everything but `--stage` to the stage's own command line."""
    name, rest = None, []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--stage":
            name = next(words, None)
            if name is None:
                raise ValueError("--stage needs a name, such as m0")
        elif word.startswith("--stage="):
            name = word.removeprefix("--stage=")
        else:
            rest.append(word)
    stage = import_stage(name)
    if {"-h", "--help"} & set(rest):
        print(f"`folovllm generate` runs {stage.__name__} (another with --stage NAME), whose options are:\n")
    return int(importlib.import_module(f"{stage.__name__}.__main__").main(rest))


def chat(args: argparse.Namespace) -> int:
    """Read questions, stream answers, remember both."""
    stage = import_stage(args.stage)
    with stage.LLM(model=str(args.model), log_level="WARNING") as llm:
        given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "seed")}
        params = dataclasses.replace(
            llm.get_default_sampling_params(), **{name: value for name, value in given.items() if value is not None}
        )
        if Path(args.model).resolve() == TINY:
            millions = sum(weight.numel() for weight in llm.model.parameters()) / 1e6
            print(f"This is a story model of {millions:.1f} million parameters: small stories are all it knows.")
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys and line history in input())
            print("Ctrl-C stops an answer, /reset forgets the conversation, /quit or Ctrl-D leaves.")
        return _converse(llm, params, interactive)


def _converse(llm: Any, params: Any, interactive: bool) -> int:
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return 0
        if line == "/reset":
            history.clear()
        elif re.fullmatch(r"/\w+", line):
            print(f"There is no {line}: /reset forgets the conversation, and /quit leaves.")
        elif line:
            question = {"role": "user", "content": line}
            try:
                answer = _answer(llm, [*history, question], params)
            except ValueError as error:
                # A pipe has nobody to try again.
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
            else:
                history += [question, {"role": "assistant", "content": answer}]


def _answer(llm: Any, messages: list[dict[str, str]], params: Any) -> str:
    """Print an answer as it is made; Ctrl-C ends it, and what was said so far stands."""
    answer = ""
    with contextlib.closing(llm.stream(llm.preprocess_chat(messages), params)) as outputs:
        try:
            for output in outputs:
                answer += output.delta
                print(output.delta, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    return answer


def quantize_command(args: argparse.Namespace) -> int:
    """Write a quantised copy of a checkpoint and print what it cost."""
    from .quantize import quantize

    report = quantize(
        args.model,
        args.out,
        bits=args.bits,
        group_size=args.group_size,
        act_order=args.act_order,
        sym=args.sym,
        method=args.method,
        calibration=_read_text(args.calibration),
        num_samples=args.samples,
        sample_length=args.sample_length,
        stage=args.stage,
        device=args.device,
        dtype=args.dtype,
        log_level="WARNING",
    )
    print(report)
    print(f"wrote {args.out}")
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    """Print the perplexity of a text."""
    from .evaluate import evaluate

    options = {"stage": args.stage, "device": args.device, "dtype": args.dtype, "log_level": "WARNING"}
    perplexity, num_tokens, window = evaluate(args.model, _read_text(args.text), window=args.window, **options)
    what = args.text or "what the model itself says"
    print(f"perplexity {perplexity:.4f} of {what} ({num_tokens:,} tokens, windows of {window})")
    if args.text is None:
        print("Another model says other things: to compare models, give both the same --text FILE.")
    return 0


def _read_text(path: str | None) -> str | None:
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def diff(args: argparse.Namespace) -> int:
    """Print the diff of two stages, or its summary, or write it as a page."""
    found = stages.diff(stages.find_root(), args.a, args.b, args.file)
    _show_diff(found, " ".join(filter(None, ["folovllm diff", args.a, args.b, args.file])), args)
    if not found:
        print(f"{args.file or 'everything'} is the same in {args.a} and {args.b}")
    return 0


def _show_diff(found: list[stages.FileDiff], title: str, args: argparse.Namespace) -> None:
    if args.html:
        Path(args.html).write_text(stages.format_html(found, title), encoding="utf-8")
        print(f"wrote {args.html}")
    if not args.stat and not args.html:
        _print_coloured([line for item in found for line in item.unified])
    if found:
        print(stages.format_stat(found))


def practice(args: argparse.Namespace) -> int:
    """Lay out a stage to be built by oneself, or compare what was built with ours."""
    from . import practice as sheets

    root = stages.find_root()
    if args.stage is None:
        if args.compare is not None or args.fresh:
            raise ValueError("which stage? As in: folovllm practice m5 --compare")
        print(sheets.overview(root))
    elif args.compare is not None:
        found = sheets.compare(root, args.stage, args.compare or None)
        _show_diff(found, f"folovllm practice {args.stage} --compare", args)
        if not found:
            print(f"{args.compare or 'everything'} is the same in your copy and in ours")
    elif args.stat or args.html:
        raise ValueError("--stat and --html go with --compare, as in: folovllm practice m5 --compare --stat")
    else:
        if args.fresh and (aside := sheets.move_aside(root, args.stage)):
            print(f"The copy that was there is {aside.relative_to(root)} now.")
        folder = sheets.start(root, args.stage).relative_to(root)
        print(f"{folder} is a copy of {sheets.find_stages(root, args.stage)[1]}: make {args.stage} of it.")
        print(f"The tasks, their tests and hints are in {folder / sheets.TASKS}; to compare with ours:")
        print(f"  folovllm practice {folder.name} --compare [FILE] [--stat]")
    return 0


def _print_coloured(lines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    colours = {"---": "bold", "+++": "bold", "@@ ": "cyan", "+": "green", "-": "red"}
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        style = next((colour for start, colour in colours.items() if line.startswith(start)), "")
        console.print(Text(line, style))


def check_ledger(args: argparse.Namespace) -> int:
    """Print the ledger's report; 1 if it has errors."""
    report = stages.check(stages.find_root())
    print(report)
    return 1 if report.errors else 0


def port(args: argparse.Namespace) -> int:
    """Carry a fix upwards; 1 if a file was left with conflict markers."""
    report = stages.port(stages.find_root(), args.stage, args.to, args.base)
    print(report)
    return 1 if report.conflicts else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _version() -> str:
    try:
        return metadata.version("folovllm")
    except metadata.PackageNotFoundError:  # run from its folder
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="folovllm", description="A small vLLM, built in eight steps.")
    parser.add_argument("--version", action="version", version=f"folovllm {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("generate", help="continue prompts: [--stage NAME] and then that stage's own options")

    talk = commands.add_parser("chat", help="a conversation in the terminal, or with questions from a pipe, one a line")
    talk.add_argument("--stage", help="which stage answers, as m0 or m0_init (default: FOLOVLLM_STAGE, or the newest)")
    talk.add_argument("--model", default=str(TINY), help="hub id or local folder (default: the embedded model)")
    talk.add_argument("--max-tokens", type=int, default=256, help="the longest answer, in tokens (default: 256)")
    talk.add_argument("--temperature", type=float, help="0 is greedy (default: what the model recommends)")
    talk.add_argument("--seed", type=int, help="makes the answers repeatable")
    talk.set_defaults(run=chat)

    _add_quantize_and_eval(commands)
    _add_diff(commands)
    _add_practice(commands)
    ledger = commands.add_parser("stages", help="look after the stages: check, diff, port")
    actions = ledger.add_subparsers(metavar="ACTION", required=True)
    actions.add_parser("check", help="hold the stages to stages.toml").set_defaults(run=check_ledger)
    _add_diff(actions)
    carry = actions.add_parser("port", help="carry a fix to the later stages by three-way merges")
    carry.add_argument("stage", help="the first stage that had the bug, mended in the working tree")
    carry.add_argument("--to", help="the last stage to carry it to (default: the newest)")
    carry.add_argument("--base", default="HEAD", help="the revision that the fix is measured against (default: HEAD)")
    carry.set_defaults(run=port)
    return parser


def _add_quantize_and_eval(commands: Any) -> None:
    parser = commands.add_parser("quantize", help="write a copy of a model with weights of 4 or 8 bits (GPTQ)")
    parser.add_argument("model", metavar="MODEL", help="hub id or local folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--bits", type=int, default=4, help="4 or 8 (default: 4)")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale; -1: all (default: 128)")
    parser.add_argument("--act-order", action="store_true", help="round the inputs that matter most first")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--sym", action="store_true", default=True, help="a grid symmetric around zero (default)")
    grid.add_argument("--asym", action="store_false", dest="sym", help="a grid from the least to the largest weight")
    parser.add_argument("--method", default="gptq", choices=("gptq", "rtn"), help="rtn: round to nearest, to compare")
    parser.add_argument("--calibration", metavar="FILE", help="text to fit to (default: what the model itself says)")
    parser.add_argument("--samples", type=int, default=64, help="windows of it (default: 64)")
    parser.add_argument("--sample-length", type=int, help="tokens of a window (default: 512)")
    _add_common(parser, dtype="float32")
    parser.set_defaults(run=quantize_command)

    parser = commands.add_parser("eval", help="perplexity of a text; less is better")
    parser.add_argument("model", metavar="MODEL", nargs="?", default=str(TINY), help="default: the embedded model")
    parser.add_argument("--text", metavar="FILE", help="to compare models by (default: what this one says)")
    parser.add_argument("--window", type=int, help="tokens that the model sees at once (default: 512)")
    _add_common(parser, dtype="auto")
    parser.set_defaults(run=evaluate_command)


def _add_common(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--dtype", default=dtype, help=f"to compute in (default: {dtype})")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--stage", help="which stage does it (default: FOLOVLLM_STAGE, or the newest)")


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser("diff", help="what one stage changes in another")
    parser.add_argument("a", metavar="OLD", help="a stage, as m0 or m0_init")
    parser.add_argument("b", metavar="NEW", help="another stage")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="only this file, by its path in the stage or the end of it"
    )
    _add_diff_output(parser)
    parser.set_defaults(run=diff)


def _add_diff_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stat", action="store_true", help="the summary alone")
    parser.add_argument("--html", metavar="OUT", help="write a side-by-side page to this file instead")


def _add_practice(commands: Any) -> None:
    parser = commands.add_parser(
        "practice",
        help="build a stage yourself, with a task sheet",
        description="Copies the stage before STAGE to practice/, with a sheet of tasks that make STAGE of it.",
    )
    parser.add_argument("stage", metavar="STAGE", nargs="?", help="m1 to m7 (default: list them)")
    parser.add_argument("--fresh", action="store_true", help="begin again: the copy that is there is moved aside")
    parser.add_argument(
        "--compare", metavar="FILE", nargs="?", const="", help="show what our stage has otherwise than your copy"
    )
    _add_diff_output(parser)
    parser.set_defaults(run=practice)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (check or port found something) or 2 (a fault of the user)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["generate"]:
            return generate(argv[1:])
        args = _parser().parse_args(argv or ["--help"])
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `folovllm diff m0 m1 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # without its number
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
