"""The ledger tool behind `folovllm stages` and `folovllm diff`: eight stages, one idea a step, kept honest by a table.

`check` holds the tree to stages.toml, `diff` shows a step, `port` carries a fix upwards, and `stage_hash` is what a GPU
test run writes down beside its result.
"""

from .checking import Report, check
from .differ import FileDiff, diff, diff_trees, format_html, format_stat
from .ledger import LedgerError, Stage, find_root, known_stages, load_ledger, read_stage, resolve_stage, stage_hash
from .porting import PortReport, port

__all__ = [
    "FileDiff",
    "LedgerError",
    "PortReport",
    "Report",
    "Stage",
    "check",
    "diff",
    "diff_trees",
    "find_root",
    "format_html",
    "format_stat",
    "known_stages",
    "load_ledger",
    "port",
    "read_stage",
    "resolve_stage",
    "stage_hash",
]
