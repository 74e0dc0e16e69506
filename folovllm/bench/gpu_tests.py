"""The tests marked `gpu`, stage by stage, on a machine with a GPU: `python -m folovllm.bench.gpu_tests [STAGE …]`.

What passed is written to docs/results/gpu_tests.json beside a hash of the code that it passed with, so that
`folovllm stages check` can say when the code has moved on. Stages that are not named keep their record. Tests marked
`exclusive` look at the memory that the whole GPU has left, and run when all others are through.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .. import lab
from ..stages import known_stages, resolve_stage, stage_hash

RESULTS = lab.ROOT / "docs" / "results" / "gpu_tests.json"


def start(name: str, marks: str, report: Path, workers: int) -> subprocess.Popen[bytes]:
    """pytest on one stage, as a process of its own; `workers` > 1 needs pytest-xdist."""
    # Only the files that hold such tests: others may import what a machine made for GPUs does not have.
    files = [str(p) for p in (lab.ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-m", marks, "--milestone", name.partition("_")[0]]
    command += ["-n", str(workers)] if workers > 1 else []
    return subprocess.Popen([*command, f"--junitxml={report}", "-p", "no:cacheprovider"], cwd=lab.ROOT)


def make_record(name: str, reports: list[Path]) -> dict[str, Any]:
    """What the reports of one stage's runs say together."""
    suites = [suite for path in reports for suite in ElementTree.parse(path).getroot().iter("testsuite")]
    counts = {
        key: sum(int(suite.attrib[key]) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    measured = {item.attrib["name"]: float(item.attrib["value"]) for s in suites for item in s.iter("property")}
    return {
        "hash": stage_hash(lab.ROOT, name),
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        **counts,
        "seconds": sum(float(suite.attrib["time"]) for suite in suites),
        "measured": measured,
        "environment": lab.environment(),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a test failed or was skipped."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.bench.gpu_tests", description="Run the GPU tests.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="m0, m1, … (default: all)")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="OUT", help="default: docs/results/gpu_tests.json"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes for a stage's tests (default: 1)")
    parser.add_argument("--at-once", action="store_true", help="all stages side by side")
    args = parser.parse_args(argv)
    import torch  # for the environment's sake: lab names the GPUs that torch sees

    if not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    names = known_stages()
    chosen = [resolve_stage(name, names) for name in args.stages] or names
    with tempfile.TemporaryDirectory() as folder:
        shared = {name: Path(folder) / f"{name}.xml" for name in chosen}
        at_once = len(chosen) if args.at_once else 1
        for first in range(0, len(chosen), at_once):
            batch = chosen[first : first + at_once]
            for run in [start(name, "gpu and not exclusive", shared[name], args.workers) for name in batch]:
                run.wait()
        for name in chosen:
            alone = Path(folder) / f"{name}_alone.xml"
            start(name, "gpu and exclusive", alone, 1).wait()
            records[name] = make_record(name, [shared[name], alone])
            args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
            print(name, {key: records[name][key] for key in ("passed", "failures", "errors", "skipped", "measured")})
    return int(any(records[name]["passed"] != records[name]["tests"] or not records[name]["tests"] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
