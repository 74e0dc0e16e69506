"""Executes the notebooks from top to bottom, so that what is committed is what the code prints today.

`python -m folovllm.bench.notebooks` rewrites them in place, without the metadata that changes from run to run or from
machine to machine; with `--check` it only executes them, and fails on the first error. Kernels start in the root of the
repository.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]


def find_notebooks() -> list[Path]:
    """All committed notebooks, in reading order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, timeout: int) -> NotebookNode:
    """The notebook with fresh outputs; a cell may take `timeout` seconds. nbclient's errors pass through."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False, resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    return strip_metadata(notebook)


def strip_metadata(notebook: NotebookNode) -> NotebookNode:
    """Removes what differs between two equal runs: timestamps, widget state, and the version of Python."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        for key in ("execution", "ExecuteTime", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a notebook fails, 2 when there is none to run."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.bench.notebooks", description="Execute the notebooks.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all under notebooks/")
    parser.add_argument("--check", action="store_true", help="execute only, write nothing")
    parser.add_argument("--timeout", type=int, default=300, help="seconds a cell may take (default: 300)")
    args = parser.parse_args(argv)
    paths = args.files or find_notebooks()
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        print(f"error: no such notebook: {', '.join(missing) or 'notebooks/*.ipynb'}", file=sys.stderr)
        return 2
    failed = []
    for path in paths:
        started = time.perf_counter()
        verdict = "ok"
        try:
            notebook = execute(path, args.timeout)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(path)
            verdict = f"FAILED\n{error}"
        else:
            if not args.check:
                nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s, {verdict}", flush=True)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks ran to the end")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
