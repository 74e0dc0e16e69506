"""What one seeded draw costs: `python -m folovllm.bench.sampling [--device cuda]`.

A draw has to be a pure function of (logits, seed, position). Inverse-CDF hashes one number a row and needs a running
sum over the vocabulary; Gumbel-max hashes one number for every token id and needs only an arg max. Both are timed here
on the vocabulary of Qwen3, with the first stage's own sampler for the former; the figures go to docs/results.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .. import lab
from .options import print_json

VOCAB_SIZE = 151_936
TEMPERATURE = 0.6
WARMUP = 2


def make_ways(sampler: ModuleType, device: torch.device, num_rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to draw `num_rows` tokens, each a function without arguments."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=generator, device=device) * 3
    token_ids = torch.arange(VOCAB_SIZE, device=device)
    seeds = torch.arange(num_rows, device=device)
    positions = torch.full_like(seeds, 1000)
    noise = torch.empty_like(logits)
    mix, golden = sampler._mix, sampler._GOLDEN

    def inverse_cdf() -> torch.Tensor:
        return sampler.draw(logits / TEMPERATURE, sampler.random_uniform(seeds, positions))

    def gumbel_hashed() -> torch.Tensor:
        keys = mix(mix(seeds) + positions * golden)
        bits = mix(keys[:, None] + token_ids * golden)  # [N, V]
        uniform = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)  # in (0, 1): both logarithms are finite
        return (logits / TEMPERATURE - uniform.log_().neg_().log_()).argmax(dim=-1)

    def exponential_generator() -> torch.Tensor:
        """For comparison only: this noise depends on everything that the generator has drawn before."""
        probs = (logits / TEMPERATURE).softmax(dim=-1)
        return probs.div_(noise.exponential_(generator=generator)).argmax(dim=-1)

    return {
        "argmax": lambda: logits.argmax(dim=-1),
        "inverse_cdf": inverse_cdf,
        "gumbel_hashed": gumbel_hashed,
        "exponential_generator": exponential_generator,
    }


def measure(device: torch.device, num_rows: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each way; they take turns, so that a busy machine slows all of them alike.

    Not the fastest: most of the work is in large temporaries, and whether their memory is fresh or used is part of it.
    """
    sampler = importlib.import_module(f"{lab.load_stage('m0').__name__}.sample.sampler")
    ways = make_ways(sampler, device, num_rows)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARMUP + repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= WARMUP:
                taken[name].append((time.perf_counter() - started) * 1e3)
    median_ms = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "device": device.type,
        "rows": num_rows,
        "vocab_size": VOCAB_SIZE,
        "repeats": repeats,
        "median_ms": {name: round(value, 3) for name, value in median_ms.items()},
        "gumbel_over_inverse_cdf": round(median_ms["gumbel_hashed"] / median_ms["inverse_cdf"], 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m folovllm.bench.sampling", description="Time one seeded draw.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, help="sequences that draw at once (default: 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args(argv)
    figures = measure(torch.device(args.device), args.rows or (256 if args.device == "cuda" else 16), args.repeats)
    for name, value in figures["median_ms"].items():
        print(f"{name:24}{value:10.3f} ms")
    print(f"written to {lab.save_result(f'sampling_{args.device}', figures)}")
    print_json(figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
