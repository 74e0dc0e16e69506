"""How long a batch takes: `python tests/benchmark/latency_test.py --help`.

A script, not a test; the work is in folovllm/bench/latency.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also without an install

from folovllm.bench.latency import main

if __name__ == "__main__":
    sys.exit(main())
