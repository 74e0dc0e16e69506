"""From logits to token ids, as a pure function of (logits, parameters, seed, position).

There is no random state anywhere: the randomness of a draw is a hash of the sequence's seed and the position of the
token. The same request therefore draws the same tokens whoever shares its batch and however often a step is redone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..request import Sequence
from ..sampling_params import SamplingParams
from .logits_processor import Rows, apply_logit_bias, apply_logits_processors, apply_min_tokens
from .ops.penalties import apply_penalties
from .ops.topk_topp import apply_min_p, apply_top_k_top_p


@dataclass
class SamplingMetadata:
    """Sampling parameters of N rows, as tensors. What no row uses is None or empty, and costs nothing.

    Attributes:
        temperature: float32 [N]; rows that are greedy hold 0.
        seeds: int64 [N].
        positions: int64 [N]; index of the token to draw within its whole sequence.
        all_greedy: no row needs a draw.
        top_k: int64 [N] in [1, V].
        top_p, min_p: float32 [N].
        logit_bias, min_tokens, penalties, logits_processors, logprobs: (row, sequence) of the rows that use it.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    all_greedy: bool
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    logit_bias: Rows
    min_tokens: Rows
    penalties: Rows
    logits_processors: Rows
    logprobs: Rows

    @classmethod
    def from_sequences(cls, seqs: list[Sequence], vocab_size: int, device: torch.device) -> SamplingMetadata:
        """What the next token of each of `seqs` is drawn with."""
        params = [seq.request.sampling_params for seq in seqs]
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        def rows(uses: Callable[[SamplingParams], bool]) -> Rows:
            return [(row, seq) for row, seq in enumerate(seqs) if uses(seq.request.sampling_params)]

        return cls(
            temperature=column([0.0 if p.is_greedy else float(p.temperature) for p in params]),
            seeds=torch.tensor([seq.seed for seq in seqs], dtype=torch.int64, device=device),
            positions=torch.tensor([seq.num_tokens for seq in seqs], dtype=torch.int64, device=device),
            all_greedy=all(p.is_greedy for p in params),
            top_k=torch.tensor(top_k, device=device) if min(top_k) < vocab_size else None,
            top_p=column([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
            min_p=column([p.min_p for p in params]) if any(p.min_p > 0 for p in params) else None,
            logit_bias=rows(lambda p: bool(p.logit_bias)),
            min_tokens=rows(lambda p: p.min_tokens > 0),
            penalties=rows(lambda p: p.has_penalties),
            logits_processors=rows(lambda p: bool(p.logits_processors)),
            logprobs=rows(lambda p: p.logprobs is not None),
        )


@dataclass
class SamplerOutput:
    """Attributes:
    token_ids: int64 [N].
    logprobs: of the rows that asked for them.
    errors: {row: message} where a request's own logits processor failed; such a row's token means nothing.
    """

    token_ids: torch.Tensor
    logprobs: LogprobsTensors | None = None
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Greedy where the temperature is 0, else a draw from what the request's parameters leave of the distribution."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """logits [N, V] of any float dtype -> a token for each row. The logits may be overwritten."""
        logits = logits.float()
        asked = [row for row, _ in metadata.logprobs]
        logprobs = logits[asked].log_softmax(dim=-1) if asked else None  # of the unmodified logits
        apply_logit_bias(logits, metadata.logit_bias)
        apply_min_tokens(logits, metadata.min_tokens)
        if metadata.penalties:
            penalised = [row for row, _ in metadata.penalties]
            logits[penalised] = apply_penalties(logits[penalised], [seq for _, seq in metadata.penalties])
        errors = apply_logits_processors(logits, metadata.logits_processors)
        token_ids = self.sample(logits, metadata)
        if logprobs is None:
            return SamplerOutput(token_ids, None, errors)
        wanted = [seq.request.sampling_params.logprobs or 0 for _, seq in metadata.logprobs]
        num_logprobs = logits.shape[-1] if -1 in wanted else max(wanted)
        return SamplerOutput(token_ids, gather_logprobs(logprobs, asked, token_ids[asked], num_logprobs), errors)

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


@dataclass
class LogprobsTensors:
    """Log-probabilities of M rows: the chosen token first, then the K most likely ones.

    Attributes:
        rows: of the batch, in order.
        token_ids: int64 [M, 1 + K].
        logprobs: float32 [M, 1 + K].
        ranks: int64 [M], of the chosen tokens, from 1.
    """

    rows: list[int]
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor

    def tolists(self) -> dict[int, list[tuple[int, float, int]]]:
        """{row: [(token id, log-probability, rank), …]}."""
        columns = zip(self.rows, self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True)
        return {
            row: list(zip(ids, values, [rank, *range(1, len(ids))], strict=True)) for row, ids, values, rank in columns
        }


def gather_logprobs(
    logprobs: torch.Tensor, rows: list[int], token_ids: torch.Tensor, num_logprobs: int
) -> LogprobsTensors:
    """What to report of logprobs, float32 [M, V], where `token_ids`, int64 [M], were chosen."""
    chosen = logprobs.gather(-1, token_ids[:, None])  # [M, 1]
    top_values, top_ids = logprobs.topk(num_logprobs, dim=-1)
    return LogprobsTensors(
        rows=rows,
        token_ids=torch.cat([token_ids[:, None], top_ids], dim=-1),
        logprobs=torch.cat([chosen, top_values], dim=-1),
        ranks=(logprobs >= chosen).sum(dim=-1),
    )


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
