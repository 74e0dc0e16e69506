"""The stage map, the figures and the questions in the documents: `python -m folovllm.bench.stage_table [--check]`.

A document says where a table belongs, between two comments: `<!-- table: stages -->` and `<!-- end of table -->`. What
stands between them comes from stages.toml, from the code itself, from docs/results and docs/learn, so it is the same on
every machine, and a test holds the documents to it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..stages import Stage, check, find_root, load_ledger
from .result_tables import RESULTS, bound_table, commands_note, read_result, stage_figures, transformers_table

COMMAND = "python -m folovllm.bench.stage_table"
DOCUMENTS = ("*.md", "docs/*.md")
NOTES = Path("docs", "learn")
QUESTIONS = re.compile(r"^## Questions, answers, follow-ups\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
QUESTION = re.compile(r"^\*\*(\d+)\. (.*?)\*\*\n(.*?)(?=^\*\*\d+\. |\Z)", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Figures = dict[str, Any]


# ---- what a stage gained ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """One sentence about one file under docs/results.

    Attributes:
        result: the file's name without its ending. It need not be there yet.
        english, chinese: the sentence, with `{names}` of the values.
        values: takes the file's figures, and gives the values.
    """

    result: str
    english: str
    chinese: str
    values: Callable[[Figures], dict[str, Any]]


def times_first(variant: str, measure: str = "output_tokens_per_s") -> Callable[[Figures], dict[str, Any]]:
    """How many times the first variant's figure; a variant is meant by how its name begins."""

    def values(figures: Figures) -> dict[str, Any]:
        return {"times": _variant(figures, variant)[measure]}

    return values


def _variant(figures: Figures, variant: str) -> Figures:
    found = [row for name, row in figures["ratio_to_first"].items() if name.startswith(variant)]
    return dict(found[0])


def _chunked(variant: str) -> Callable[[Figures], dict[str, Any]]:
    def values(figures: Figures) -> dict[str, Any]:
        row = _variant(figures, variant)
        return {"lower": 1 / row["steady_itl_p99_ms"], "throughput": row["output_tokens_per_s"]}

    return values


def _usage(figures: Figures) -> dict[str, Any]:
    rows = {name: row["workload"] for name, row in figures["rows"].items()}
    before, after = rows["m2"], rows["m3, block_size=16"]
    return {
        "share": after["used_over_allocated"],
        "before": before["used_over_allocated"],
        "times": after["running_while_others_wait"] / before["running_while_others_wait"],
    }


def _attention(figures: Figures) -> dict[str, Any]:
    row = next(row for row in figures["rows"] if row["length"] == 4096)["rows"]
    return {"times": row["naive"]["ms"] / row["flash"]["ms"]}


def _longest_hit(figures: Figures) -> dict[str, Any]:
    length, row = max(figures["ttft"]["rows"].items(), key=lambda item: int(item[0]))
    return {"length": int(length), "lower": row["miss_over_hit"]}


def _decode(figures: Figures) -> dict[str, Any]:
    shape, row = next(iter(figures["decode"]["rows"].items()))
    total = {name: loaded["total"] for name, loaded in row["bytes"].items()}
    return {"shape": shape, "times": row["batches"]["1"]["speed_up"], "less": 1 - total["gptq"] / total["bf16"]}


def _largest_decode(figures: Figures) -> dict[str, Any]:
    rows = figures["decode"]["rows"]
    shape = max(rows, key=lambda name: rows[name]["bytes"]["bf16"]["total"])
    return _decode({"decode": {"rows": {shape: rows[shape]}}})


def _quality(figures: Figures) -> dict[str, Any]:
    rows = figures["quality"]["rows"]
    row = next(row for row in rows if (row["bits"], row["group_size"], row["act_order"]) == (4, 32, True))
    return {"excess": row["gptq_excess_p50"]}


def _growth(device: str) -> Gain:
    return Gain(
        f"growth_m0_{device}",
        "the baseline: at the end of 1,024 tokens each takes {last_over_first:.1f} × as long as at the start",
        "基线：生成 1,024 个 token，末尾每个 token 的耗时是开头的 {last_over_first:.1f} 倍",
        lambda figures: figures,
    )


#: {stage: {device: sentences}}
GAINS: dict[str, dict[str, list[Gain]]] = {
    "m0": {"cpu": [_growth("cpu")], "cuda": [_growth("cuda")]},
    "m1": {
        "cpu": [
            Gain(
                "single_m1_cpu",
                "one request: {times:.1f} × the tokens/s",
                "单请求吞吐为 {times:.1f} 倍",
                times_first("m1"),
            )
        ],
        "cuda": [
            Gain(
                "decode_growth_m1_cuda",
                "one request of 1,024 tokens: {times:.1f} × the tokens/s",
                "单请求生成 1,024 个 token，吞吐为 {times:.1f} 倍",
                times_first("m1"),
            )
        ],
    },
    "m2": {
        "cpu": [
            Gain(
                "uniform_m2_cpu",
                "16 requests: {times:.1f} × the tokens/s",
                "16 个请求，吞吐为 {times:.1f} 倍",
                times_first("m2"),
            )
        ],
        "cuda": [
            Gain(
                "uniform_m2_cuda",
                "256 requests: {times:.0f} × the tokens/s",
                "256 个请求，吞吐为 {times:.0f} 倍",
                times_first("m2"),
            )
        ],
    },
    "m3": {
        device: [
            Gain(
                f"mixed_m3_{device}",
                "mixed requests, cache of the same size: {times:.1f} × the tokens/s",
                "混合负载、缓存大小相同，吞吐为 {times:.1f} 倍",
                times_first("m3"),
            ),
            Gain(
                f"kv_usage_m3_{device}",
                "{share:.0%} of the allocated slots hold tokens ({before:.0%} before)",
                "已分配的 KV 槽位有 {share:.0%} 存着 token（之前 {before:.0%}）",
                _usage,
            ),
        ]
        for device in ("cpu", "cuda")
    },
    "m4": {
        "cpu": [
            Gain(
                "attention_m4_cpu",
                "attention of a 4,096-token prompt: {times:.1f} × as fast",
                "4,096 个 token 的提示词，注意力计算快 {times:.1f} 倍",
                _attention,
            ),
            Gain(
                "mixed_m4_cpu",
                "mixed requests: {times:.2f} × the tokens/s",
                "混合负载，吞吐为 {times:.2f} 倍",
                times_first("m4"),
            ),
        ],
        "cuda": [
            Gain("single_m4_cuda", "one request: {times:.1f} ×", "单请求吞吐为 {times:.1f} 倍", times_first("m4")),
            Gain(
                "mixed_m4_cuda",
                "mixed requests: {times:.1f} × the tokens/s",
                "混合负载，吞吐为 {times:.1f} 倍",
                times_first("m4"),
            ),
        ],
    },
    "m5": {
        device: [
            Gain(
                f"chunked_m5_{device}",
                f"long prompts among decodes, chunks of {chunk:,}: p99 inter-token latency {{lower:.1f}} × lower "
                "at {throughput:.0%} of the tokens/s",
                f"长提示词混入解码，分块 {chunk:,}：p99 token 间延迟降为 1/{{lower:.1f}}，"
                "吞吐为之前的 {throughput:.0%}",
                _chunked(f"m5:max_chunk_size={chunk}"),
            )
        ]
        for device, chunk in (("cpu", 256), ("cuda", 1024))
    },
    "m6": {
        device: [
            Gain(
                f"prefix_m6_{device}",
                "TTFT {lower:.0f} × lower when {length:,} tokens are found",
                "命中 {length:,} 个 token 时 TTFT 降为 1/{lower:.0f}",
                _longest_hit,
            )
        ]
        for device in ("cpu", "cuda")
    },
    "m7": {
        "cpu": [
            Gain(
                "decode_m7_cpu",
                "{shape}: {less:.0%} less memory for weights, {times:.1f} × the tokens/s at batch 1",
                "{shape}：权重内存减少 {less:.0%}，batch 1 吞吐为 {times:.1f} 倍",
                _decode,
            ),
            Gain(
                "quality_m7_cpu",
                "perplexity {excess:+.2%} (4 bits, groups of 32, act-order)",
                "困惑度变化 {excess:+.2%}（4 bit，每组 32，act-order）",
                _quality,
            ),
        ],
        "cuda": [
            Gain(
                "decode_m7_cuda",
                "{shape}: {less:.0%} less memory for weights, {times:.1f} × the tokens/s at batch 1",
                "{shape}：权重显存减少 {less:.0%}，batch 1 吞吐为 {times:.1f} 倍",
                _decode,
            ),
            Gain(
                "decode_m7_cuda",
                "{shape}: {less:.0%} less, {times:.1f} ×",
                "{shape}：减少 {less:.0%}，{times:.1f} 倍",
                _largest_decode,
            ),
        ],
    },
}

#: What to read first; the stage's own page has the whole order.
READ_FIRST = {
    "m0": ["llm.py", "model_executor/model_loader.py", "model_executor/models/llama.py", "sample/sampler.py"],
    "m1": ["engine/llm_engine.py", "worker/model_runner.py", "attention/ops.py", "model_executor/layers/attention.py"],
    "m2": ["core/sched/scheduler.py", "engine/core.py", "worker/input_batch.py"],
    "m3": ["core/block_pool.py", "core/kv_cache_manager.py", "attention/backends/paged.py"],
    "m4": ["attention/backends/abstract.py", "attention/backends/flash_attn.py", "worker/cuda_graph.py"],
    "m5": ["core/sched/scheduler.py", "core/sched/chunk_policy.py"],
    "m6": ["core/prefix_cache.py", "core/kv_cache_manager.py"],
    "m7": ["model_executor/layers/quantization.py", "model_executor/layers/quantized_matmul.py", "quantize.py"],
}

CHINESE_IDEAS = {
    "m0": "读取检查点；每生成一个 token 都把整个序列重新算一遍，再采样下一个。",
    "m1": "保存每个 token 的 K 和 V，下一个 token 只需一个 token 的计算量；并做成一个引擎。",
    "m2": "每一步都让完成者离开、让放得下的进来：许多序列共享每一次权重读取。",
    "m3": "把缓存切成任何序列都能用的小块：不预留用不到的空间，提示词可以共享。",
    "m4": "内存管好之后，时间花在搬运字节和启动 kernel 上：少搬字节，少启动 kernel。",
    "m5": "提示词可以分段计算，并与解码共用同一步：没有人再为一个长提示词等待。",
    "m6": "算过的内容可以凭 token 再次找到：开头相同的提示词共享开头。",
    "m7": "解码的每一步都要为少数几个 token 读取全部权重：字节减到四分之一，时间最多也能减到四分之一。",
}


# ---- the stage map ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    head: tuple[str, ...]
    lines: str
    not_yet: str
    separator: str


ENGLISH = Language(
    ("stage", "the idea", "read first", "code lines", "gain on a CPU", "gain on an H200"),
    "{code}, {changed} changed",
    "not measured yet",
    "; ",
)
CHINESE = Language(
    ("阶段", "思路", "先读这些文件", "代码行数", "CPU 上的收益", "H200 上的收益"),
    "{code}（改动 {changed}）",
    "尚未测量",
    "；",
)


def stage_map(root: Path, folder: Path, chinese: bool = False) -> str:
    """One row a stage; links lead from `folder`. What has no file under docs/results yet is said not to be measured."""
    language = CHINESE if chinese else ENGLISH
    sizes = {row[0]: row for row in check(root).rows}
    lines = ["| " + " | ".join(language.head) + " |", "|---" * len(language.head) + "|"]
    for stage in load_ledger(root):
        link = _link(root / stage.name, folder)
        files = READ_FIRST.get(stage.short, stage.adds[:3])
        _, _, code, changed, _ = sizes[stage.name]
        code = f"{int(code):,}"
        cells = [
            f"[`{stage.name}`]({link}/README.md)",
            CHINESE_IDEAS.get(stage.short, stage.idea) if chinese else stage.idea,
            ", ".join(f"[{file}]({link}/{file})" for file in files),
            language.lines.format(code=code, changed=changed) if changed else code,
            *(gain_cell(root, folder, stage, device, chinese) for device in ("cpu", "cuda")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain_cell(root: Path, folder: Path, stage: Stage, device: str, chinese: bool) -> str:
    """The stage's sentences for a device, each with a link to its figures."""
    language = CHINESE if chinese else ENGLISH
    found = []
    for gain in GAINS.get(stage.short, {}).get(device, []):
        figures = read_result(root, gain.result)
        if figures is not None:
            sentence = (gain.chinese if chinese else gain.english).format(**gain.values(figures)).replace(" -", " −")
            sentence = sentence if chinese else sentence.replace("%", " %")
            found.append(f"{sentence} ([JSON]({_link(root / RESULTS / gain.result, folder)}.json))")
    return language.separator.join(found) or language.not_yet


# ---- questions -------------------------------------------------------------------------------------------------------


def ledger_table(root: Path) -> str:
    """What `folovllm stages check` counts, and the files that the ledger lists."""
    lines = [
        "| stage | files | code lines | changed lines | budget | files added | files changed |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, (name, files, code, *step) in zip(load_ledger(root), check(root).rows, strict=True):
        counts = [f"{int(number):,}" if number else "–" for number in (files, code, *step)]
        listed = (len(stage.adds), len(stage.changes)) if step[0] else ("–", "–")
        lines.append(f"| `{name}` | {' | '.join(counts)} | {listed[0]} | {listed[1]} |")
    return "\n".join(lines)


def question_list(root: Path, stage: Stage) -> str:
    """The questions of the stage's note, with their answers folded away."""
    number = int(stage.short[1:])
    note = next((root / NOTES).glob(f"{number:02}_*.md"), None)
    section = QUESTIONS.search(note.read_text(encoding="utf-8")) if note else None
    found = QUESTION.findall(section[1]) if section else []
    if not found:
        raise ValueError(f"there is no note with questions for {stage.name}")
    return "\n\n".join(
        f"**{index}. {question.strip()}**\n\n<details><summary>Answer</summary>\n\n{answer.strip()}\n\n</details>"
        for index, question, answer in found
    )


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


# ---- documents -------------------------------------------------------------------------------------------------------


def make_table(name: str, root: Path, folder: Path) -> str:
    """The table of that name for a document in `folder`. ValueError if there is none."""
    if name in ("stages", "stages in Chinese"):
        return stage_map(root, folder, chinese=name != "stages")
    link = _link(root / RESULTS, folder)
    if name in ("times", "times in Chinese"):
        return commands_note(root, link, chinese=name != "times")
    if name == "ledger":
        return ledger_table(root)
    if name == "bandwidth bound":
        return bound_table(root, link)
    if name == "transformers":
        return transformers_table(root, link)
    if name == "other figures":
        return stage_figures(root, "", link)
    kind, _, short = name.partition(" ")
    for stage in load_ledger(root):
        if (kind, short) == ("figures", stage.short):
            return stage_figures(root, short, link)
        if (kind, short) == ("questions", stage.short):
            return question_list(root, stage)
    raise ValueError(f"there is no table {name!r}")


def filled(document: Path, root: Path) -> str:
    """The document's text with its tables as they should be. ValueError, naming the document, for an unknown table."""

    def table(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}{make_table(match[2], root, document.parent)}\n{match[3]}"
        except ValueError as error:
            raise ValueError(f"{document.relative_to(root)}: {error}") from None

    return TABLE.sub(table, document.read_text(encoding="utf-8"))


def out_of_date(root: Path) -> Iterator[tuple[Path, str]]:
    """Every document that differs from what would be written, and that text."""
    for document in sorted({path for pattern in DOCUMENTS for path in root.glob(pattern)}):
        text = filled(document, root)
        if text != document.read_text(encoding="utf-8"):
            yield document, text


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when --check finds a document that is not as it would be written."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the tables in README.md and under docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    args = parser.parse_args(argv)
    root = find_root()
    found = list(out_of_date(root))
    for document, text in found:
        if args.check:
            print(f"{document.relative_to(root)} has a table that is out of date: run {COMMAND}", file=sys.stderr)
        else:
            document.write_text(text, encoding="utf-8")
            print(f"wrote {document.relative_to(root)}")
    if not found:
        print("all tables are up to date")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
