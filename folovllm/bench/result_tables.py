"""Markdown tables of the files under docs/results, for docs/performance.md and its neighbours.

Every file tells by its keys which command wrote it, and so how to show it. A figure is never typed into a document: it
is copied from a file, with the machine and the command beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("docs", "results")
STAGE = re.compile(r"(?<=_)m\d+(?=_|$)")

Figures = dict[str, Any]
Row = Sequence[str]

#: Measures of a comparison, as far as a file has them: key, heading, unit.
MEASURES = (
    ("output_tokens_per_s", "tokens/s"),
    ("ttft_p50_ms", "TTFT p50, ms"),
    ("itl_p50_ms", "ITL p50, ms"),
    ("itl_p99_ms", "ITL p99, ms"),
    ("steady_itl_p50_ms", "ITL of those that decode, p50, ms"),
    ("steady_itl_p99_ms", "p99, ms"),
    ("short_ttft_p50_ms", "TTFT of short prompts, p50, ms"),
    ("long_ttft_p50_ms", "of long ones, ms"),
)


def read_result(root: Path, name: str) -> Figures | None:
    """The file `name`.json under docs/results, or None if it is not there."""
    path = root / RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, with commas in thousands; a dash for nothing."""
    if value is None:
        return "–"
    decimals = max(0, digits - len(str(int(abs(value)))) + (abs(value) < 1))
    return f"{value:,.{decimals}f}"


def percent(share: float, decimals: int = 0, sign: str = "") -> str:
    return f"{share:{sign}.{decimals}%}".replace("%", " %").replace("-", "−")


def markdown(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(figures: Figures) -> str:
    """What it ran on, in a few words."""
    if "environment" not in figures:
        return str(figures["machine"])
    found = figures["environment"]
    if figures.get("device") == "cuda" and found["gpus"]:
        return str(found["gpus"][0])
    threads = found["threads"]
    return f"{found['cpu']}, {threads} thread" + ("" if threads == 1 else "s")


def model_name(figures: Figures) -> str | None:
    name = figures.get("model")
    return "the embedded model" if name == "tiny" else name


# ---- one file --------------------------------------------------------------------------------------------------------


def comparison(figures: Figures) -> str:
    """Variants that ran the same workload in turns: medians, and the median of the ratios within each turn."""
    variants = figures["median"]
    first = next(iter(variants))
    measures = [(key, title) for key, title in MEASURES if variants[first].get(key) is not None]
    ratio = "" if len(variants) == 1 else "times the first"
    rows = []
    for name, median in variants.items():
        times = figures["ratio_to_first"][name]["output_tokens_per_s"]
        rows.append(
            [f"`{name}`", *(number(median.get(key)) for key, _ in measures), *([f"{times:.2f}"] if ratio else [])]
        )
    return markdown(["variant", *(title for _, title in measures), *([ratio] if ratio else [])], rows)


def growth(figures: Figures) -> str:
    """Time for a token while a text grows."""
    ends = figures["contexts"][0], figures["contexts"][-1]
    times = figures["ms_per_token"][0], figures["ms_per_token"][-1]
    head = ["tokens/s", *(f"ms a token at context {number(end)}" for end in ends), "last over first"]
    return markdown(
        head, [[number(figures["output_tokens_per_s"]), *map(number, times), f"{figures['last_over_first']:.2f}"]]
    )


def attention(figures: Figures) -> str:
    """One causal prompt, by backend."""
    names = list(figures["rows"][0]["rows"])
    rows = []
    for row in figures["rows"]:
        cells = [f"{number(row['rows'][name]['ms'])}" if name in row["rows"] else "–" for name in names]
        memory = [
            f"{number(row['rows'][name]['peak_bytes'] / 2**20)}" if name in row["rows"] else "–" for name in names
        ]
        rows.append([f"{row['length']:,}", *cells, *memory])
    return markdown(["tokens", *(f"{name}, ms" for name in names), *(f"{name}, MiB" for name in names)], rows)


def decode_attention(figures: Figures) -> str:
    """One query a sequence: our kernel and flash-attn, as shares of the bandwidth of a copy."""
    rows = [
        [
            str(row["num_seqs"]),
            f"{row['context']:,}",
            *(
                cell
                for name in ("paged_decode", "flash_attn")
                for cell in (number(row[name]["microseconds"]), percent(row[name]["share_of_copy"]))
            ),
        ]
        for row in figures["decode"]
    ]
    head = ["sequences", "context", "our kernel, µs", "of copy bandwidth", "flash-attn, µs", "of copy bandwidth"]
    return markdown(head, rows)


def paged_kernel(figures: Figures) -> str:
    rows = [
        [
            str(row["batch"]),
            row["lengths"],
            str(row["block_size"]),
            str(row["splits"]),
            number(row["microseconds"]),
            percent(row["share_of_copy"]),
        ]
        for row in figures["shapes"]
    ]
    return markdown(["sequences", "context", "block size", "splits", "µs", "of copy bandwidth"], rows)


def kv_usage(figures: Figures) -> str:
    """What becomes of the same memory: slots in use, sequences in flight, and one prompt with eight samples."""
    rows = []
    for name, row in figures["rows"].items():
        load, parallel = row["workload"], row["parallel"]
        rows.append(
            [
                name,
                percent(load["used_over_allocated"], 1),
                number(load["running_while_others_wait"]),
                str(load["most_running"]),
                str(load["num_preemptions"]),
                f"{parallel['tokens_computed_for_the_prompt']:,}",
                f"{parallel['most_slots_allocated']:,}",
            ]
        )
    head = [
        "variant",
        "allocated slots in use",
        "running while others wait",
        "most running",
        "preemptions",
        "eight samples: prompt tokens computed",
        "slots",
    ]
    return markdown(head, rows)


def decode_step(figures: Figures) -> str:
    """One decode step, beside the time that its bytes take at the bandwidth of a copy."""
    rows = []
    for variant, sizes in figures["rows"].items():
        for size, row in sizes.items():
            num_seqs, context = size.split("x")
            rows.append(
                [
                    f"`{variant}`",
                    num_seqs,
                    f"{int(context):,}",
                    number(row["weight_bytes"] / 1e9),
                    number(row["kv_bytes"] / 1e9),
                    number(row["bound_ms"]),
                    number(row["busy_ms"]),
                    number(row["step_ms"]),
                    percent(row["share_of_bound"]),
                ]
            )
    head = ["variant", "sequences", "context", "weights, GB", "K/V, GB", "bound, ms", "GPU busy, ms", "step, ms"]
    return markdown([*head, "bound / step"], rows)


def fused(figures: Figures) -> str:
    rows = [
        [
            f"`{row['kernel']}`",
            row["what"],
            f"{row['num_tokens']:,}",
            number(row["before"]["graph_us"]),
            number(row["after"]["graph_us"]),
        ]
        for row in figures["rows"]
    ]
    return markdown(["kernel", "what", "tokens", "torch, µs", "fused, µs"], rows)


def dynamic(figures: Figures) -> str:
    rows = [
        [target, number(row["median_ms"]), number(row["p95_ms"]), f"{row['prompt_tokens_per_s']:,}"]
        for target, row in figures["dynamic"]["rows"].items()
    ]
    return markdown(["target, ms", "step p50, ms", "p95, ms", "prompt tokens/s"], rows)


def scheduler(figures: Figures) -> str:
    return markdown(
        ["part of a step", "p50, ms", "p99, ms"],
        [[name.replace("_", " "), number(row["p50"]), number(row["p99"])] for name, row in figures["ms"].items()],
    )


def prefix(figures: Figures) -> str:
    """Time to first token with and without a hit, and what the names of blocks cost."""
    found = []
    if figures.get("ttft"):
        rows = [
            [
                f"{int(length):,}",
                number(row["miss_ms"]),
                number(row["hit_ms"]),
                f"{row['miss_over_hit']:.1f}",
                f"{row['cached_tokens']:,}",
            ]
            for length, row in figures["ttft"]["rows"].items()
        ]
        found.append(markdown(["prefix, tokens", "TTFT of a miss, ms", "of a hit, ms", "ratio", "tokens found"], rows))
    if figures.get("hashing"):
        rows = [[size, number(value)] for size, value in figures["hashing"]["us_per_token"].items()]
        found.append(markdown(["block size", "hashing, µs a token"], rows))
    if figures.get("sub_block"):
        part = figures["sub_block"]
        rows = [
            [name, number(part[name]["seconds"]), f"{part[name]['hits']:,}", percent(part[name]["share"])]
            for name in ("with", "without")
        ]
        head = [
            f"hits inside a block of {part['block_size']} ({part['description']})",
            "seconds",
            "tokens found",
            "share",
        ]
        found.append(markdown(head, rows))
    return "\n\n".join(found)


def shared(figures: Figures) -> str:
    """Workloads whose prompts begin alike."""
    rows = []
    for workload, modes in figures["workloads"]["rows"].items():
        for mode in ("at_once", "one_by_one"):
            for variant, row in modes[mode].items():
                hits = (
                    f"{row['hits']:,} of {row['queries']:,} ({row['expected_hits']:,} by hand)"
                    if "expected_hits" in row
                    else "–"
                )
                rows.append(
                    [
                        workload,
                        mode.replace("_", " "),
                        variant,
                        number(row["seconds"]),
                        f"{row['times_first']:.2f}",
                        number(row["ttft_p50_ms"]),
                        hits,
                    ]
                )
    head = ["workload", "requests come", "variant", "seconds", "times as fast", "TTFT p50, ms", "prompt tokens found"]
    return markdown(head, rows)


def sampling(figures: Figures) -> str:
    rows = [[name.replace("_", " "), number(value)] for name, value in figures["median_ms"].items()]
    return markdown([f"{figures['rows']} rows of {figures['vocab_size']:,}", "ms"], rows)


def quality(figures: Figures) -> str:
    """What perplexity rises by: rounded to nearest, and by GPTQ."""
    part = figures["quality"]
    rows = [
        [
            str(row["bits"]),
            "all inputs" if row["group_size"] == -1 else str(row["group_size"]),
            "yes" if row["act_order"] else "no",
            number(row["bytes"] / 2**20),
            percent(row["rtn_excess"], 3, "+"),
            percent(row["gptq_excess_p50"], 3, "+"),
        ]
        for row in part["rows"]
    ]
    head = ["bits", "group", "act-order", "linear layers, MiB", "perplexity, rounded", "perplexity, GPTQ"]
    said = f"Perplexity of {part['tokens']:,} tokens of {part['text']}, against {number(part['perplexity'], 5)}."
    return f"{said}\n\n{markdown(head, rows)}"


def quantised_decode(figures: Figures) -> str:
    rows = []
    for shape, row in figures["decode"]["rows"].items():
        total = {name: number(loaded["total"] / 2**20) for name, loaded in row["bytes"].items()}
        for batch, part in row["batches"].items():
            rows.append(
                [
                    shape,
                    batch,
                    number(part["bf16_tokens_per_s"]),
                    number(part["gptq_tokens_per_s"]),
                    f"{part['speed_up']:.2f}",
                    f"{total['bf16']} → {total['gptq']}",
                ]
            )
    head = ["shape", "sequences", "16 bits, tokens/s", "4 bits, tokens/s", "ratio", "weights, MiB"]
    return markdown(head, rows)


def quantised_kernels(figures: Figures) -> str:
    """A row for each layer: one token, and the speed-up by number of tokens."""
    part = figures["kernels"]
    layers: dict[tuple[str, str], dict[int, Figures]] = {}
    for row in part["rows"]:
        layers.setdefault((row["shape"], row["layer"]), {})[row["rows"]] = row
    tokens = sorted({row["rows"] for row in part["rows"]})
    rows = []
    for (shape, layer), found in layers.items():
        one = found[tokens[0]]
        share = "–" if one["share_of_copy"] is None else percent(one["share_of_copy"])
        speed_ups = [f"{found[num]['speed_up']:.2f}" if num in found else "–" for num in tokens]
        rows.append([f"{shape} {layer}", f"{one['k']:,} × {one['n']:,}", number(one["fused_us"]), share, *speed_ups])
    head = ["layer", "K × N", f"{tokens[0]} token, µs", "of copy bandwidth"]
    return markdown([*head, *(f"times bf16 at {num}" for num in tokens)], rows)


def exchanged(figures: Figures) -> str:
    """Checkpoints that one tool wrote and the other read."""
    rows = []
    for writer in dict.fromkeys(case["writer"] for case in figures["cases"]):
        cases = [case for case in figures["cases"] if case["writer"] == writer]
        weights, logits = (
            max(case[key] for case in cases) for key in ("largest_weight_difference", "relative_logits_difference")
        )
        rows.append([writer, str(len(cases)), f"{weights:.1e}", f"{logits:.1e}"])
    head = ["written by", "checkpoints", "largest difference of a weight", "largest relative difference of logits"]
    return markdown(head, rows)


#: How to show a file that has this key; the first that fits.
KINDS = (
    ("median", comparison),
    ("last_over_first", growth),
    ("shapes", paged_kernel),
    ("dynamic", dynamic),
    ("ttft", prefix),
    ("workloads", shared),
    ("ms", scheduler),
    ("median_ms", sampling),
)
PARTS = (
    ("decode", quantised_decode),
    ("quality", quality),
    ("kernels", quantised_kernels),
    ("cases", exchanged),
)


def show(figures: Figures) -> str | None:
    """The file's figures as tables, or None for a file of another kind."""
    if figures.get("stage") == "m7_gptq":
        return "\n\n".join(table(figures) for key, table in PARTS if key in figures) or None
    for key, table in KINDS:
        if key in figures:
            return table(figures)
    rows = figures.get("rows")
    if isinstance(rows, list) and "length" in rows[0]:
        return attention(figures)
    if isinstance(rows, list) and "kernel" in rows[0]:
        return fused(figures)
    if isinstance(rows, dict) and "kv_bytes" in figures:
        return kv_usage(figures)
    if isinstance(rows, dict) and "copy_gb_per_s" in figures:
        return decode_step(figures)
    return decode_attention(figures) if "decode" in figures else None


def commands_note(root: Path, link: str, chinese: bool = False) -> str:
    """How long the two commands of the README took from a clean clone."""
    figures = read_result(root, "commands_cpu")
    if figures is None:
        return "尚未测量。" if chinese else "They have not been timed yet."
    demo, test, cores = figures["make_demo_s"], figures["make_test_s"], figures["environment"]["cores"]
    source = f"[commands_cpu.json]({link}/commands_cpu.json)"
    if chinese:
        return (
            f"在一台 {cores} 核、无 GPU 的 Linux 机器上，从全新的克隆开始，PyTorch 的 CPU 版已在磁盘上，"
            f"其他包现场下载，`make demo` 用时 {demo} 秒，随后 `make test` 用时 {test} 秒（{source}）。"
        )
    return (
        f"On a Linux machine with {cores} cores and no GPU, from a clean clone, with PyTorch's CPU build on the disk\n"
        f"already and the other packages downloaded, `make demo` took {demo} s, and `make test` {test} s after it\n"
        f"({source})."
    )


# ---- tables of documents ---------------------------------------------------------------------------------------------


def stage_figures(root: Path, short: str, link: str) -> str:
    """A table, and what it ran with, for each file of a stage.

    Args:
        short: `m4`, for files whose last stage that is, as mixed_m4_cuda; or "", for those that name none.
        link: the folder of the results, as the document sees it.
    """
    found = []
    for path in sorted((root / RESULTS).glob("*.json")):
        if STAGE.findall(path.stem)[-1:] != ([short] if short else []):
            continue
        figures = read_result(root, path.stem) or {}
        table = show(figures)
        if table is None:
            continue
        turns = "one engine after the other" if figures.get("in_turns") is False else None
        runs = f"{figures['repeats']} run" + ("s" if figures["repeats"] > 1 else "") if "repeats" in figures else None
        what = [figures.get("workload"), figures.get("description"), model_name(figures), figures.get("dtype")]
        about = "; ".join(
            ", ".join(str(word) for word in words if word)
            for words in (what, [machine(figures), runs, turns])
            if any(words)
        )
        text = f"**[{path.name}]({link}/{path.name})**: {about}.\n`{command(figures)}`\n\n{table}"
        if (picture := path.with_suffix(".png")).is_file():
            text += f"\n\n![{path.stem}]({link}/{picture.name})"
        found.append(text)
    return "\n\n".join(found) or "Nothing has been measured yet."


def command(figures: Figures) -> str:
    """As it was typed, but for the folder of the output."""
    words = str(figures.get("environment", figures)["command"]).split()
    return " ".join(f"docs/results/{Path(word).name}" if word.endswith(".json") else word for word in words)


def bound_table(root: Path, link: str) -> str:
    """Decode steps beside the time that reading their bytes takes, from all files that know it."""
    found = []
    for path in sorted((root / RESULTS).glob("decode_step_*.json")):
        figures = read_result(root, path.stem) or {}
        found.append(
            f"{machine(figures)}, {figures['model']}, {figures['dtype']}; a copy moves "
            f"{number(figures['copy_gb_per_s'], 4)} GB/s ([{path.name}]({link}/{path.name})).\n\n{decode_step(figures)}"
        )
    return "\n\n".join(found)


def transformers_table(root: Path, link: str) -> str:
    """Every comparison in which transformers took part in the turns."""
    rows = []
    for path in sorted((root / RESULTS).glob("*.json")):
        figures = read_result(root, path.stem) or {}
        medians = figures.get("median", {})
        if not isinstance(medians, dict) or "transformers" not in medians:
            continue
        ours = [name for name in medians if name != "transformers"][-1]
        own, other = (medians[name]["output_tokens_per_s"] for name in (ours, "transformers"))
        ratio = [figures["ratio_to_first"][name]["output_tokens_per_s"] for name in (ours, "transformers")]
        rows.append(
            [
                f"{figures['workload']}: {figures['description']}",
                f"{model_name(figures)}, {figures['dtype']}",
                machine(figures),
                f"`{ours}`: {number(own)}",
                number(other),
                f"{ratio[0] / ratio[1]:.2f}",
                f"[JSON]({link}/{path.name})",
            ]
        )
    head = ["workload", "model", "machine", "ours, tokens/s", "transformers", "ratio within turns", "figures"]
    return markdown(head, rows)
