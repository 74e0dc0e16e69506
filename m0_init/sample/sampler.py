"""From logits to token ids, as a pure function of (logits, parameters, seed, position).

There is no random state anywhere: the randomness of a draw is a hash of the sequence's seed and the position of the
token. The same request therefore draws the same tokens whoever shares its batch and however often a step is redone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..request import Sequence


@dataclass
class SamplingMetadata:
    """Sampling parameters of N rows, as tensors.

    Attributes:
        temperature: float32 [N]; rows that are greedy hold 0.
        seeds: int64 [N].
        positions: int64 [N]; index of the token to draw within its whole sequence.
        all_greedy: no row needs a draw.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    all_greedy: bool

    @classmethod
    def from_sequences(cls, seqs: list[Sequence], device: torch.device) -> SamplingMetadata:
        """What the next token of each of `seqs` is drawn with."""
        params = [seq.request.sampling_params for seq in seqs]
        return cls(
            temperature=torch.tensor([0.0 if p.is_greedy else float(p.temperature) for p in params], device=device),
            seeds=torch.tensor([seq.seed for seq in seqs], dtype=torch.int64, device=device),
            positions=torch.tensor([seq.num_tokens for seq in seqs], dtype=torch.int64, device=device),
            all_greedy=all(p.is_greedy for p in params),
        )


class Sampler:
    """Greedy where the temperature is 0, else a draw from softmax(logits / temperature)."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """logits [N, V] of any float dtype -> token ids int64 [N]."""
        logits = logits.float()
        greedy = logits.argmax(dim=-1)
        if metadata.all_greedy:
            return greedy
        is_greedy = metadata.temperature == 0
        temperature = metadata.temperature.masked_fill(is_greedy, 1.0)
        drawn = draw(logits / temperature[:, None], random_uniform(metadata.seeds, metadata.positions))
        return torch.where(is_greedy, greedy, drawn)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: the first token at which the cumulative probability exceeds `uniform`.

    One uniform a row is all the randomness it takes; the Gumbel-max trick would hash one for every token of the
    vocabulary.

    Args:
        logits: float32 [N, V]; -inf for a token that must not come.
        uniform: float32 [N] in [0, 1).

    Returns:
        int64 [N].
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    cdf = weights.cumsum(dim=-1)  # up to the total weight, not to 1
    threshold = uniform * cdf[:, -1]  # below the total: uniform <= 1 - 2^-24 and float32 rounds the product down
    token_ids = torch.searchsorted(cdf, threshold[:, None], right=True).clamp_(max=logits.shape[-1] - 1)  # [N, 1]
    # A GPU sums in parallel and may round up at a token of weight 0; and a row of NaN has no answer at all.
    possible = weights.gather(-1, token_ids) > 0
    return torch.where(possible.squeeze(-1), token_ids.squeeze(-1), logits.argmax(dim=-1))


def random_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) for each (seed, position): int64 [N], int64 [N] -> float32 [N], multiples of 2^-24."""
    bits = _mix(_mix(seeds) + positions * _GOLDEN)
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), in wrapping int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: torch.Tensor) -> torch.Tensor:
    # An int64 shifts in copies of its sign; the masks make the shifts logical.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
