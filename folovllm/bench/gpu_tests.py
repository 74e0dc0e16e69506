"""The tests marked `gpu`, stage by stage, on a machine with a GPU: `python -m folovllm.bench.gpu_tests [STAGE …]`.

What passed is written to docs/results/gpu_tests.json beside a hash of the code that it passed with, so that
`folovllm stages check` can say when the code has moved on. Stages that are not named keep their record.
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


def run_stage(name: str) -> dict[str, Any]:
    """Run the tests of one stage; the record of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Only the files that hold such tests: others may import what a machine made for GPUs does not have.
        files = [str(p) for p in (lab.ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text("utf-8")]
        command = [sys.executable, "-m", "pytest", *files, "-q", "-m", "gpu", "--milestone", name.partition("_")[0]]
        subprocess.run([*command, f"--junitxml={report}", "-p", "no:cacheprovider"], cwd=lab.ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise RuntimeError(f"pytest wrote no report for {name}")
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    measured = {item.attrib["name"]: float(item.attrib["value"]) for item in suite.iter("property")}
    return {
        "hash": stage_hash(lab.ROOT, name),
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        **counts,
        "seconds": float(suite.attrib["time"]),
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
    args = parser.parse_args(argv)
    import torch  # for the environment's sake: lab names the GPUs that torch sees

    if not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    names = known_stages()
    chosen = [resolve_stage(name, names) for name in args.stages] or names
    for name in chosen:
        records[name] = run_stage(name)
    args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    for name in chosen:
        print(name, {key: records[name][key] for key in ("passed", "failures", "errors", "skipped", "measured")})
    return int(any(records[name]["passed"] != records[name]["tests"] or not records[name]["tests"] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
