"""Requests and tokens a second: `python tests/benchmark/throughput_test.py --help`.

A script, not a test; the work is in folovllm/bench/throughput.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also without an install

from folovllm.bench.throughput import main

if __name__ == "__main__":
    sys.exit(main())
