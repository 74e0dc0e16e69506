"""README.md and its neighbours hold the tables that stages.toml, the code and docs/results give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.bench import result_tables, stage_table
from folovllm.stages import find_root, load_ledger

ROOT = find_root()
MARKED = "# Title\n\n<!-- table: {name} -->\nold\n<!-- end of table -->\n\nrest\n"


def test_the_committed_tables_are_up_to_date() -> None:
    differing = [document.relative_to(ROOT).as_posix() for document, _ in stage_table.out_of_date(ROOT)]
    assert differing == [], f"run {stage_table.COMMAND}"


@pytest.mark.parametrize(
    ("document", "tables"),
    [
        ("README.md", ["stages", "times"]),
        ("README.zh-CN.md", ["stages in Chinese", "times in Chinese"]),
        ("docs/performance.md", [f"figures m{number}" for number in range(8)]),
        ("docs/interview_guide.md", [f"questions m{number}" for number in range(8)]),
    ],
)
def test_the_documents_have_their_tables(document: str, tables: list[str]) -> None:
    names = [name for _, name, _ in stage_table.TABLE.findall((ROOT / document).read_text(encoding="utf-8"))]
    assert set(tables) <= set(names)


def test_every_stage_has_its_gains_and_its_files() -> None:
    stages = load_ledger(ROOT)
    shorts = {stage.short for stage in stages}
    assert shorts == set(stage_table.GAINS) == set(stage_table.READ_FIRST) == set(stage_table.CHINESE_IDEAS)
    missing = [
        f"{stage.name}/{file}"
        for stage in stages
        for file in stage_table.READ_FIRST[stage.short]
        if not (ROOT / stage.name / file).is_file()
    ]
    assert missing == []


def test_every_file_of_figures_is_shown_or_of_a_known_other_kind() -> None:
    hidden = {
        path.stem
        for path in (ROOT / result_tables.RESULTS).glob("*.json")
        if result_tables.show(result_tables.read_result(ROOT, path.stem) or {}) is None
    }
    assert hidden <= {"commands_cpu", "gpu_tests", "tiny_eval", "tiny_training"}


# ---- a small repository ----------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, code in (("m0_first", "A = 1\n"), ("m1_second", "A = 1\nB = 2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code, encoding="utf-8")
    (tmp_path / "stages.toml").write_text(
        '[[stage]]\nname = "m0_first"\ntitle = "T"\nidea = "Begin."\n'
        '[[stage]]\nname = "m1_second"\ntitle = "T"\nidea = "Go on."\nchanges = ["__init__.py"]\n',
        encoding="utf-8",
    )
    (tmp_path / "docs" / "results").mkdir(parents=True)
    return tmp_path


def keep(root: Path, name: str, **figures: Any) -> None:
    (root / "docs" / "results" / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")


ENVIRONMENT = {"command": "python x.py --json /tmp/single_m1_cpu.json", "cpu": "C", "threads": 1, "gpus": []}
COMPARED: dict[str, Any] = {
    "workload": "single",
    "description": "one request",
    "model": "tiny",
    "dtype": "bfloat16",
    "device": "cpu",
    "repeats": 5,
    "environment": ENVIRONMENT,
    "median": {"m0": {"output_tokens_per_s": 40.0}, "m1": {"output_tokens_per_s": 1234.5}},
    "ratio_to_first": {"m0": {"output_tokens_per_s": 1.0}, "m1": {"output_tokens_per_s": 30.86}},
}


def row_of(table: str, stage: str) -> str:
    return next(line for line in table.splitlines() if f"`{stage}`" in line)


def test_the_stage_map(root: Path) -> None:
    table = stage_table.stage_map(root, root)
    assert row_of(table, "m0_first").startswith("| [`m0_first`](m0_first/README.md) | Begin. | ")
    assert "| 2, 1 changed | not measured yet | not measured yet |" in row_of(table, "m1_second")
    keep(root, "single_m1_cpu", **COMPARED)
    gained = "| one request: 30.9 × the tokens/s ([JSON](docs/results/single_m1_cpu.json)) | not measured yet |"
    assert gained in row_of(stage_table.stage_map(root, root), "m1_second")
    assert "](../docs/results/" in row_of(stage_table.stage_map(root, root / "folder"), "m1_second")
    assert "尚未测量" in row_of(stage_table.stage_map(root, root, chinese=True), "m1_second")


def test_figures_of_a_stage(root: Path) -> None:
    assert stage_table.make_table("figures m1", root, root / "docs") == "Nothing has been measured yet."
    keep(root, "single_m1_cpu", **COMPARED)
    keep(root, "single_m1_beside_m0", **COMPARED)
    page = stage_table.make_table("figures m1", root, root / "docs")
    assert page.splitlines()[:2] == [
        "**[single_m1_cpu.json](results/single_m1_cpu.json)**: single, one request, the embedded model, bfloat16; "
        "C, 1 thread, 5 runs.",
        "`python x.py --json docs/results/single_m1_cpu.json`",
    ]
    assert page.splitlines()[-1] == "| `m1` | 1,234 | 30.86 |"
    assert "single_m1_beside_m0" not in page


def test_documents_are_written_and_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_table, "find_root", lambda: root)
    document = root / "README.md"
    document.write_text(MARKED.format(name="stages"), encoding="utf-8")
    assert stage_table.main(["--check"]) == 1
    assert "README.md has a table that is out of date" in capsys.readouterr().err
    assert "old" in document.read_text(encoding="utf-8")
    assert stage_table.main([]) == 0
    text = document.read_text(encoding="utf-8")
    assert "old" not in text and "m1_second" in text and text.startswith("# Title\n") and text.endswith("\n\nrest\n")
    assert stage_table.main(["--check"]) == 0
    (root / "m1_second" / "__init__.py").write_text("A = 1\nB = 2\nC = 3\n", encoding="utf-8")
    assert stage_table.main(["--check"]) == 1


@pytest.mark.parametrize("name", ["stage", "figures m2", "figures"])
def test_an_unknown_table(root: Path, name: str) -> None:
    (root / "README.md").write_text(MARKED.format(name=name), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"README.md: there is no table '{name}'"):
        list(stage_table.out_of_date(root))


def test_comparisons_with_transformers(root: Path) -> None:
    keep(root, "single_m1_cpu", **COMPARED)
    assert stage_table.make_table("transformers", root, root / "docs").count("\n") == 1  # the head alone
    medians = {**COMPARED["median"], "transformers": {"output_tokens_per_s": 400.0}}
    ratios = {**COMPARED["ratio_to_first"], "transformers": {"output_tokens_per_s": 10.0}}
    keep(root, "single_m1_cpu", **{**COMPARED, "median": medians, "ratio_to_first": ratios})
    row = stage_table.make_table("transformers", root, root / "docs").splitlines()[2]
    assert "| the embedded model, bfloat16 | C, 1 thread | `m1`: 1,234 | 400 | 3.09 | " in row


def test_times_of_the_two_commands(root: Path) -> None:
    assert stage_table.make_table("times", root, root) == "They have not been timed yet."
    keep(root, "commands_cpu", make_demo_s=41, make_test_s=77, environment={"cores": 3})
    for name in ("times", "times in Chinese"):
        said = stage_table.make_table(name, root, root)
        assert all(part in said for part in ("41", "77", "3", "(docs/results/commands_cpu.json)"))


NOTE = """# 01
## Questions, answers, follow-ups

**1. Why
here?**
Because. *Follow-up: and there?*
Yes.

**2. How?**
So.

## References
**3. Not this.**
"""


def test_questions_of_a_note(root: Path) -> None:
    (root / "docs" / "learn").mkdir()
    (root / "docs" / "learn" / "01_second.md").write_text(NOTE, encoding="utf-8")
    found = stage_table.make_table("questions m1", root, root / "docs")
    assert found.startswith(
        "**1. Why\nhere?**\n\n<details><summary>Answer</summary>\n\nBecause. *Follow-up: and there?*"
    )
    assert found.endswith("**2. How?**\n\n<details><summary>Answer</summary>\n\nSo.\n\n</details>")
    with pytest.raises(ValueError, match="no note with questions for m0_first"):
        stage_table.make_table("questions m0", root, root / "docs")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.04781, "0.048"), (0.9505, "0.951"), (1.2345, "1.23"), (14.06, "14.1"), (999.6, "1,000"), (18374.99, "18,375")],
)
def test_numbers(value: float, shown: str) -> None:
    assert result_tables.number(value) == shown


# ---- figures that are still to come ----------------------------------------------------------------------------------

QUANTISED: dict[str, Any] = {
    "stage": "m7_gptq",
    "device": "cuda",
    "environment": {**ENVIRONMENT, "gpus": ["G"]},
    "decode": {
        "dtype": "bfloat16",
        "rows": {
            name: {
                "bytes": {"bf16": {"total": size}, "gptq": {"total": size // 4}},
                "batches": {
                    "1": {"bf16_tokens_per_s": 100.0, "gptq_tokens_per_s": speed * 100.0, "speed_up": speed},
                },
            }
            for name, size, speed in (("small", 2**22, 1.25), ("large", 2**24, 2.5))
        },
    },
}
QUALITY: dict[str, Any] = {
    "stage": "m7_gptq",
    "device": "cpu",
    "environment": ENVIRONMENT,
    "quality": {
        "tokens": 1000,
        "text": "stories",
        "perplexity": 3.25,
        "rows": [
            {
                "bits": 4,
                "group_size": 32,
                "act_order": act_order,
                "bytes": 2**20,
                "rtn_excess": 0.02,
                "gptq_excess_p50": 0.0123 if act_order else 0.5,
            }
            for act_order in (False, True)
        ],
    },
}


KERNELS: dict[str, Any] = {
    "stage": "m7_gptq",
    "device": "cuda",
    "environment": {**ENVIRONMENT, "gpus": ["G"]},
    "kernels": {
        "rows": [
            {"shape": "S", "layer": "o", "k": 1024, "n": 2048, "rows": num, "fused_us": fused, **rest}
            for num, fused, rest in (
                (1, 4.5, {"share_of_copy": 0.51, "speed_up": 2.25}),
                (128, None, {"share_of_copy": None, "speed_up": 0.75}),
            )
        ]
    },
}
CASE: dict[str, Any] = {"writer": "we", "largest_weight_difference": 0.0, "relative_logits_difference": 0.0002}
EXCHANGED: dict[str, Any] = {
    "stage": "m7_gptq",
    "machine": "M",
    "command": "python x.py",
    "cases": [CASE, {**CASE, "relative_logits_difference": 0.001}, {**CASE, "writer": "they"}],
}


def test_kernels_and_checkpoints_of_four_bits(root: Path) -> None:
    keep(root, "kernels_m7_cuda", **KERNELS)
    keep(root, "interop_m7", **EXCHANGED)
    page = result_tables.stage_figures(root, "m7", "results")
    assert "| S o | 1,024 × 2,048 | 4.50 | 51 % | 2.25 | 0.75 |" in page
    assert "**[interop_m7.json](results/interop_m7.json)**: M.\n`python x.py`" in page
    assert "| we | 2 | 0.0e+00 | 1.0e-03 |\n| they | 1 | 0.0e+00 | 2.0e-04 |" in page


def test_gains_of_four_bits(root: Path) -> None:
    stage = load_ledger(ROOT)[7]
    keep(root, "decode_m7_cuda", **QUANTISED)
    keep(root, "quality_m7_cpu", **QUALITY)
    gained = stage_table.gain_cell(root, root, stage, "cuda", False)
    assert gained.startswith("small: 75 % less memory for weights, 1.2 × the tokens/s at batch 1 ([JSON]")
    assert "; large: 75 % less, 2.5 × ([JSON]" in gained
    assert "+1.23 %" in stage_table.gain_cell(root, root, stage, "cpu", False)
    page = result_tables.stage_figures(root, "m7", "results")
    assert "| large | 1 | 100 | 250 | 2.50 | 16.0 → 4.00 |" in page
    assert "| 4 | 32 | yes | 1.00 | +2.000 % | +1.230 % |" in page
