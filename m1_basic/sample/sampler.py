"""From logits to token ids, as a pure function of (logits, parameters, seed, position).

There is no random state anywhere: the randomness of a draw is a hash of the sequence's seed and the position of the
token. The same request therefore draws the same tokens whoever shares its batch and however often a step is redone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..request import Sequence
from .logits_processor import apply_logit_bias, apply_logits_processors, apply_min_tokens
from .ops.penalties import apply_penalties, count_tokens
from .ops.topk_topp import apply_min_p, apply_top_k_top_p


@dataclass
class SamplingMetadata:
    """Sampling parameters of N rows, as tensors. What no row uses is None and costs nothing.

    Attributes:
        temperature: float32 [N]; rows that are greedy hold 0.
        seeds: int64 [N].
        positions: int64 [N]; index of the token to draw within its whole sequence.
        all_greedy: no row needs a draw.
        top_k: int64 [N] in [1, V].
        top_p, min_p: float32 [N].
        penalties: float32 [3, N]: presence, frequency, repetition.
        num_logprobs: the most that any row wants.
        seqs: the sequences themselves, for what depends on their history.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    all_greedy: bool
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    penalties: torch.Tensor | None
    num_logprobs: int | None
    seqs: list[Sequence]

    @classmethod
    def from_sequences(cls, seqs: list[Sequence], vocab_size: int, device: torch.device) -> SamplingMetadata:
        """What the next token of each of `seqs` is drawn with."""
        params = [seq.request.sampling_params for seq in seqs]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        penalties = [[p.presence_penalty, p.frequency_penalty, p.repetition_penalty] for p in params]
        wanted = [vocab_size if p.logprobs == -1 else p.logprobs for p in params if p.logprobs is not None]
        return cls(
            temperature=column([0.0 if p.is_greedy else p.temperature for p in params]),
            seeds=torch.tensor([seq.seed for seq in seqs], dtype=torch.int64, device=device),
            positions=torch.tensor([seq.num_tokens for seq in seqs], dtype=torch.int64, device=device),
            all_greedy=all(p.is_greedy for p in params),
            top_k=torch.tensor(top_k, device=device) if min(top_k) < vocab_size else None,
            top_p=column([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
            min_p=column([p.min_p for p in params]) if any(p.min_p > 0 for p in params) else None,
            penalties=torch.tensor(penalties, device=device).T if any(p.has_penalties for p in params) else None,
            num_logprobs=max(wanted, default=None),
            seqs=seqs,
        )


@dataclass
class SamplerOutput:
    """Attributes:
    token_ids: the N tokens.
    logprobs: for each row [(token id, log-probability, rank)], the chosen token first; None if nobody asked.
    errors: {row: message} where a request's own logits processor failed; such a row's token means nothing.
    """

    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None = None
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Greedy where the temperature is 0, else a draw from what the request's parameters leave of the distribution."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """logits [N, V] of any float dtype -> a token for each row. The logits may be overwritten."""
        logits = logits.float()
        logprobs = None if metadata.num_logprobs is None else logits.log_softmax(dim=-1)  # of the unmodified logits
        apply_logit_bias(logits, metadata.seqs)
        apply_min_tokens(logits, metadata.seqs)
        if metadata.penalties is not None:
            histories = [(seq.request.prompt_token_ids, seq.output_token_ids) for seq in metadata.seqs]
            counts = [count_tokens(list(ids), logits.shape[-1], logits.device) for ids in zip(*histories, strict=True)]
            logits = apply_penalties(logits, counts[0], counts[1], *metadata.penalties)
        errors = apply_logits_processors(logits, metadata.seqs)
        token_ids = self.sample(logits, metadata)
        rows = None if logprobs is None else gather_logprobs(logprobs, token_ids, metadata.num_logprobs or 0)
        return SamplerOutput(token_ids.tolist(), rows, errors)

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Penalised logits float32 [N, V] -> token ids int64 [N]."""
        greedy = logits.argmax(dim=-1)
        if metadata.all_greedy:
            return greedy
        is_greedy = metadata.temperature == 0
        temperature = metadata.temperature.masked_fill(is_greedy, 1.0)
        logits = logits / temperature[:, None]
        if metadata.min_p is not None:
            logits = apply_min_p(logits, metadata.min_p)
        logits = apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
        drawn = draw(logits, random_uniform(metadata.seeds, metadata.positions))
        return torch.where(is_greedy, greedy, drawn)


def gather_logprobs(
    logprobs: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int
) -> list[list[tuple[int, float, int]]]:
    """For every row (token id, log-probability, rank from 1): the chosen token, then the most likely ones.

    Args:
        logprobs: float32 [N, V].
        token_ids: int64 [N].
    """
    chosen = logprobs.gather(-1, token_ids[:, None])  # [N, 1]
    chosen_ranks = (logprobs >= chosen).sum(dim=-1)
    top_values, top_ids = logprobs.topk(num_logprobs, dim=-1)
    columns = (token_ids, chosen.squeeze(-1), chosen_ranks, top_ids, top_values)
    return [
        [(token_id, value, rank), *zip(ids, values, range(1, num_logprobs + 1), strict=True)]
        for token_id, value, rank, ids, values in zip(*(column.tolist() for column in columns), strict=True)
    ]


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
