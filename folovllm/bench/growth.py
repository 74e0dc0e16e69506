"""How the time per token grows with the context: `python -m folovllm.bench.growth --stage m0`.

Runs the workload `decode_growth` on a stage and fits what came out: a line through the time of each token, a parabola
through the time of all tokens so far. The points and the fits go to docs/results/growth_STAGE_DEVICE.json
(and a dtype that was asked for stands in the name too).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import TINY, lab
from .options import print_json


def fastest(results: Sequence[lab.Result]) -> lab.Result:
    """One result out of several runs of the same single request: of the times of each token, the shortest.

    Other programs can slow a token down but never speed it up.
    """
    traces = [result.traces[0] for result in results]
    gaps = np.min([np.diff([trace.sent, *trace.token_times]) for trace in traces], axis=0)
    trace = replace(traces[0], sent=0.0, token_times=np.cumsum(gaps).tolist())
    return replace(results[0], seconds=float(gaps.sum()), traces=[trace])


def fit(x: np.ndarray, y: np.ndarray, degree: int) -> dict[str, Any]:
    """Least squares: coefficients from the constant up, and the share of the variance of `y` that they explain."""
    polynomial = np.polynomial.Polynomial.fit(x, y, degree)
    unexplained = np.var(y - polynomial(x)) / np.var(y)
    return {"coefficients": polynomial.convert().coef.tolist(), "r_squared": round(float(1 - unexplained), 5)}


def describe(result: lab.Result) -> dict[str, Any]:
    """Points, fits and ratios of a run of `decode_growth`. Milliseconds and tokens."""
    contexts, seconds = lab.growth(result, window=16)
    ms = seconds * 1e3
    trace = result.traces[0]
    done = np.arange(1, len(trace.token_times) + 1)
    elapsed = np.array(trace.token_times) - trace.sent
    return {
        "contexts": contexts.tolist(),
        "ms_per_token": [round(value, 4) for value in ms.tolist()],
        "last_over_first": round(float(ms[-1] / ms[0]), 2),
        "line_through_ms_per_token": fit(contexts, ms, 1),
        "parabola_through_seconds_so_far": fit(done, elapsed, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m folovllm.bench.growth", description="Time per token by context.")
    parser.add_argument("--stage", default="m0", help="m0, m1, … (default: m0)")
    parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy: random weights")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--runs", type=int, default=1, help="keep the fastest of so many runs, token by token")
    args = parser.parse_args(argv)
    try:
        options = {name: getattr(args, name) for name in ("load_format", "dtype", "device")}
        with lab.load_stage(args.stage).LLM(args.model, log_level="WARNING", **options) as llm:
            result = fastest([lab.run(llm, "decode_growth") for _ in range(max(1, args.runs))])
            model = {"model": Path(args.model).name, "dtype": llm.config.dtype, "device": llm.config.device}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {**model, "runs": args.runs, **result.summary(), **describe(result)}
    parts = ["growth", result.stage.partition("_")[0], model["device"].partition(":")[0]]
    path = lab.save_result("_".join(parts if args.dtype == "auto" else [*parts, args.dtype]), figures)
    print(f"first {figures['ms_per_token'][0]:.2f} ms a token, last {figures['ms_per_token'][-1]:.2f} ms")
    print(f"written to {path}")
    print_json({key: value for key, value in figures.items() if key not in ("contexts", "ms_per_token")})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
