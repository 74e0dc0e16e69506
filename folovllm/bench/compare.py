"""Stages side by side on one workload, in one process and in turns, so that a busy machine slows all of them alike.

A row of the table is a stage, a stage with engine options ("m1:max_model_len=256"), or transformers' `generate`. Every
figure is the median over the repeats, and every ratio the median of the ratios within each repeat. For a workload of
one request the JSON holds the undisturbed figures as well: of the times of each token, the shortest. `--plot`
draws the medians. The script is tests/benchmark/compare.py.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import lab
from ..stages import known_stages
from .growth import fastest
from .options import add_engine_options, describe_engine, open_llm, parse_variant, run_script
from .workloads import WORKLOADS, Workload

Runner = Callable[[Workload], lab.Result]

TRANSFORMERS = "transformers"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run stages in turns on one workload and compare them.")
    parser.add_argument(
        "--milestones",
        default=",".join(name.partition("_")[0] for name in known_stages()),
        help="such as m0,m1 (default: all), or with engine options: m1:max_model_len=256,m1:max_model_len=4096",
    )
    parser.add_argument("--workload", default="single", choices=WORKLOADS, help="default: single")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every row (default: 5)")
    parser.add_argument("--num-requests", type=int, metavar="N", help="so many requests (workload uniform only)")
    parser.add_argument("--transformers", action="store_true", help="a row for transformers' generate as well")
    parser.add_argument(
        "--transformers-batch-size",
        type=int,
        default=16,
        metavar="N",
        help="requests in each of its static batches (default: 16)",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the medians, a bar chart a measure (.png, .svg)")
    add_engine_options(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rows in turns. ValueError or TypeError for anything that the user can mend."""
    for option in ("repeats", "transformers_batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    names = args.milestones.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"--milestones names a row twice: {args.milestones}")
    variants = [parse_variant(name) for name in names]
    if args.plot:
        check_plot(args.plot)  # before hours of measuring
    with ExitStack() as stack:
        llms = [stack.enter_context(open_llm(args, stage, **options)) for stage, options in variants]
        runners: dict[str, Runner] = {name: partial(lab.run, llm) for name, llm in zip(names, llms, strict=True)}
        engine = describe_engine(args, llms[0])
        if args.transformers:
            runners[TRANSFORMERS] = open_transformers(stack, args, engine)
        # Drawn for the shortest of them, so that all are given the same work.
        shortest = min(llms, key=lambda llm: llm.config.max_model_len)
        workload = lab.workload_for(shortest, args.workload, args.num_requests)
        results = run_in_turns(runners, workload, args.repeats)
    stages = {name: found[0].stage for name, found in results.items()}
    rows = {name: [figures_of(result) for result in found] for name, found in results.items()}
    figures = {
        **engine,
        "workload": workload.name,
        "description": workload.description,
        "repeats": args.repeats,
        "stages": stages,
        "median": {name: medians(runs) for name, runs in rows.items()},
        "ratio_to_first": {name: ratios(runs, rows[names[0]]) for name, runs in rows.items()},
        **({"fastest": undisturbed(results)} if len(workload.requests) == 1 else {}),
        **({"growth": growth_curves(results)} if workload.name == "decode_growth" else {}),
        "runs": rows,
        "notes": {name: found[0].notes for name, found in results.items() if found[0].notes},
    }
    if args.plot:
        plot(figures, args.plot)
    return figures


def open_transformers(stack: ExitStack, args: argparse.Namespace, engine: dict[str, Any]) -> Runner:
    """`generate` on the model, dtype and device of the first stage. ValueError if the model is not a folder."""
    from .hf_generate import HFGenerate

    if not Path(args.model).is_dir():
        raise ValueError(f"--transformers needs a folder as --model, got {args.model!r}")
    model = HFGenerate(
        args.model,
        dtype=engine["dtype"],
        device=engine["device"],
        load_format=args.load_format,
        batch_size=args.transformers_batch_size,
    )
    return stack.enter_context(model).run


def run_in_turns(runners: dict[str, Runner], workload: Workload, repeats: int) -> dict[str, list[lab.Result]]:
    """A B C, C B A, A B C, …: a slow trend of the machine then favours nobody."""
    results: dict[str, list[lab.Result]] = {name: [] for name in runners}
    with tqdm(total=repeats * len(runners), unit="run", disable=None) as bar:  # at a terminal only
        for turn in range(repeats):
            for name in list(runners) if turn % 2 == 0 else reversed(runners):
                bar.set_description(f"{name}, {turn + 1} of {repeats}")
                results[name].append(runners[name](workload))
                bar.update()
    return results


def figures_of(result: lab.Result) -> dict[str, float | None]:
    """The figures of one run. `decode_tokens_per_s` is that of one sequence: the inverse of the median gap."""
    summary = result.summary()
    names = (
        "seconds",
        "output_tokens_per_s",
        "ttft_p50_ms",
        "tpot_p50_ms",
        "itl_p50_ms",
        "itl_p99_ms",
        "peak_kv_slots",
    )
    figures: dict[str, float | None] = {name: summary[name] for name in names}
    gap = figures["itl_p50_ms"]
    figures["decode_tokens_per_s"] = round(1e3 / gap, 2) if gap else None
    if result.workload.name == "decode_growth":
        figures |= growth_figures(result)
    return figures


def undisturbed(results: dict[str, list[lab.Result]]) -> dict[str, dict[str, float | None]]:
    """The figures of each row made of its fastest tokens: what it would take if nothing else ran on the machine."""
    return {name: figures_of(fastest(found)) for name, found in results.items()}


def growth_curves(results: dict[str, list[lab.Result]]) -> dict[str, dict[str, list[float]]]:
    """Time per token against context for each row, made of its fastest tokens, ready to be plotted."""
    curves = {}
    for name, found in results.items():
        contexts, seconds = lab.growth(fastest(found), window=16)
        curves[name] = {"contexts": contexts.tolist(), "ms_per_token": (seconds * 1e3).round(4).tolist()}
    return curves


def growth_figures(result: lab.Result) -> dict[str, float | None]:
    """Milliseconds a token in the first and last quarter of the output, their ratio, and at 512 tokens of context."""
    gaps = np.array(result.traces[0].inter_token) * 1e3
    quarter = len(gaps) // 4
    if not quarter:
        return {}
    first, last = float(np.median(gaps[:quarter])), float(np.median(gaps[-quarter:]))
    contexts, seconds = lab.growth(result)
    near = np.abs(contexts - 512) <= 32
    return {
        "first_quarter_ms": round(first, 4),
        "last_quarter_ms": round(last, 4),
        "last_over_first_quarter": round(last / first, 3),
        "ms_at_context_512": round(float(np.median(seconds[near]) * 1e3), 4) if near.any() else None,
    }


def medians(runs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Over the repeats, for each figure that all of them have."""
    found: dict[str, float | None] = {}
    for name in runs[0]:
        values = [value for run in runs if (value := run[name]) is not None]
        found[name] = round(float(np.median(values)), 4) if len(values) == len(runs) else None
    return found


def ratios(runs: list[dict[str, float | None]], base: list[dict[str, float | None]]) -> dict[str, float | None]:
    """How many times the base's figures, repeat by repeat, then the median."""
    paired = [
        {name: _ratio(run[name], other[name]) for name in run.keys() & other.keys()}
        for run, other in zip(runs, base, strict=True)
    ]
    found = medians(paired)
    return {name: found[name] for name in runs[0] if name in found}


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


COLUMNS = {
    "output tokens/s": ("output_tokens_per_s", ",.1f"),
    "decode tokens/s": ("decode_tokens_per_s", ",.1f"),
    "TTFT, ms": ("ttft_p50_ms", ",.2f"),
    "ITL p50, ms": ("itl_p50_ms", ",.2f"),
    "ITL p99, ms": ("itl_p99_ms", ",.2f"),
    "peak KV slots": ("peak_kv_slots", ",.0f"),
    "last/first quarter": ("last_over_first_quarter", ".2f"),
    "at 512, ms": ("ms_at_context_512", ",.2f"),
}


def show(figures: dict[str, Any]) -> None:
    """The table: the medians, and how each row's speed compares with the first's and with the row before."""
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{figures['workload']}: {figures['description']}; median of {figures['repeats']}")
    console.print(f"{figures['model']}, {figures['dtype']}, {figures['device']}")
    columns = {
        title: column
        for title, column in COLUMNS.items()
        if any(row.get(column[0]) is not None for row in figures["median"].values())
    }
    table = Table("", *columns, "x first", "x previous", "decode x first")
    previous: float | None = None
    for name, row in figures["median"].items():
        cells = ["–" if row.get(key) is None else format(row[key], form) for key, form in columns.values()]
        speed = figures["ratio_to_first"][name]["output_tokens_per_s"]
        decode = figures["ratio_to_first"][name]["decode_tokens_per_s"]
        step = "" if previous is None else f"{speed / previous:.2f}"
        table.add_row(name, *cells, f"{speed:.2f}", step, "–" if decode is None else f"{decode:.2f}")
        previous = speed
    console.print(table)
    for name, notes in figures["notes"].items():
        for note in notes:
            console.print(f"Note on {name}: {note}.")


PLOTTED = {
    "output tokens/s": ("output_tokens_per_s", ",.1f"),
    "time to first token, median (ms)": ("ttft_p50_ms", ",.1f"),
    "time between tokens, 99th percentile (ms)": ("itl_p99_ms", ",.2f"),
    "KV slots of running sequences, peak": ("peak_kv_slots", ",.0f"),
}


def check_plot(path: Path) -> None:
    """ValueError unless a picture can be written to `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join(f'.{each}' for each in formats)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draws what `measure` found: for each measure the medians as bars, and the spread of the repeats as a line.

    A measure that no row has is left out; a row that has not got it has no bar.
    """
    from matplotlib.figure import Figure

    rows = figures["median"]
    measures = {title: it for title, it in PLOTTED.items() if any(row.get(it[0]) is not None for row in rows.values())}
    names = list(rows)
    num_lines = -(-len(measures) // 2)
    figure = Figure(figsize=(12, num_lines * (1.3 + 0.34 * len(names))), dpi=100, layout="constrained")
    panels = figure.subplots(num_lines, 2, squeeze=False).flatten()
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    for axes, (title, (key, form)) in zip(panels, measures.items(), strict=False):
        for position, name in enumerate(names):
            value = rows[name].get(key)
            if value is None:
                axes.text(0, position, " –", va="center")
                continue
            runs = [run[key] for run in figures["runs"][name]]
            colour = "#777777" if name == TRANSFORMERS else lab.colour_of(name, position)
            bar = axes.barh(
                position, value, color=colour, xerr=[[value - min(runs)], [max(runs) - value]], ecolor="#999999"
            )
            axes.bar_label(bar, [format(value, form)], padding=4, fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(axis="x", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    subject = f"{figures['model']}, {figures['dtype']}, {figures['device']}; median of {figures['repeats']}"
    figure.suptitle(f"{figures['workload']}: {figures['description']}\n{subject}", fontsize=11, x=0.01, ha="left")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)
