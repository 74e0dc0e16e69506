"""What the next token may be, given logits and sampling parameters: vLLM's order of operations, written a second time.

Dictionaries, loops and float64 on purpose: nothing here can share a mistake with the engine's tensors. The engine's
logits differ from the oracle's in the last digits, so a token that stands within a tolerance of a cut may be kept or
not; `possible_laws` then gives a law for either choice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

# Token -> probability, most likely first; tokens that cannot come are not in it.
Law = dict[int, float]

# What the parameters of the first stage, which have only a temperature, leave undone.
_UNUSED = {
    "logit_bias": None,
    "min_tokens": 0,
    "stop_token_ids": (),
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logits_processors": None,
    "min_p": 0.0,
    "top_k": 0,
    "top_p": 1.0,
}


def _get(params: Any, name: str) -> Any:
    return getattr(params, name, _UNUSED[name])


def adjusted_logits(
    logits: torch.Tensor, params: Any, prompt: Sequence[int] = (), output: Sequence[int] = (), ends: Sequence[int] = ()
) -> list[float]:
    """Logits [V] after everything that comes before the temperature: bias, min_tokens, penalties, own functions.

    Args:
        output: the tokens generated so far.
        ends: the model's end-of-sequence tokens.
    """
    scores: list[float] = logits.double().tolist()
    for token, bias in (_get(params, "logit_bias") or {}).items():
        scores[token] += bias
    if len(output) < _get(params, "min_tokens"):
        for token in [*(_get(params, "stop_token_ids") or ()), *(() if params.ignore_eos else ends)]:
            scores[token] = -math.inf
    for token in {*prompt, *output}:
        penalty = _get(params, "repetition_penalty")
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= _get(params, "frequency_penalty") * count + _get(params, "presence_penalty")
    for processor in _get(params, "logits_processors") or ():
        scores = processor([*prompt, *output], torch.tensor(scores)).tolist()
    return scores


def possible_laws(
    scores: Sequence[float], params: Any, logit_tolerance: float = 0.0, mass_tolerance: float = 0.0
) -> list[Law]:
    """Temperature, min_p, top_k, top_p on adjusted logits [V]; without tolerances this is one law.

    Args:
        logit_tolerance: how wrong a difference of two logits may be.
        mass_tolerance: how wrong a cumulative probability may be.
    """
    logit_tolerance /= params.temperature
    laws = [_softmax({token: score / params.temperature for token, score in enumerate(scores) if score > -math.inf})]
    min_p, top_k, top_p = (_get(params, name) for name in ("min_p", "top_k", "top_p"))
    if min_p > 0:
        laws = _cut_all(laws, logit_tolerance, lambda law: _min_p_ends(law, min_p, logit_tolerance))
    if top_k > 0:
        laws = _cut_all(laws, logit_tolerance, lambda law: [min(top_k, len(law))])
    if top_p < 1:
        laws = _cut_all(laws, logit_tolerance, lambda law: _top_p_ends(law, top_p, mass_tolerance))
    return laws


def distribution(logits: torch.Tensor, params: Any, *context: Sequence[int]) -> torch.Tensor:
    """The law of the next token, [V] in float64, sums to 1; `context` as for `adjusted_logits`."""
    (law,) = possible_laws(adjusted_logits(logits, params, *context), params)
    return torch.tensor([law.get(token, 0.0) for token in range(len(logits))], dtype=torch.float64)


def _softmax(scores: Law) -> Law:
    largest = max(scores.values())
    return _normalise({token: math.exp(score - largest) for token, score in scores.items()})


def _normalise(weights: Law) -> Law:
    total = math.fsum(weights.values())
    return {token: weights[token] / total for token in sorted(weights, key=lambda token: -weights[token])}


def _cut_all(laws: list[Law], tolerance: float, ends: Callable[[Law], Iterable[int]]) -> list[Law]:
    """Every law that cutting one of `laws` at one of its `ends` may give."""
    cuts = (_normalise(kept) for law in laws for end in ends(law) for kept in _cut(list(law.items()), end, tolerance))
    return list({frozenset(law): law for law in cuts}.values())


def _cut(ordered: list[tuple[int, float]], end: int, tolerance: float) -> Iterator[Law]:
    """The first `end` tokens, and those that are equal to the last of them.

    Two that are only nearly equal may change places, or share one fate.
    """
    while end < len(ordered) and ordered[end][1] == ordered[end - 1][1]:
        end += 1
    yield dict(ordered[:end])
    if end < len(ordered) and ordered[end - 1][1] <= ordered[end][1] * math.exp(tolerance):
        yield dict(ordered[: end + 1])
        yield dict([*ordered[: end - 1], ordered[end]])


def _min_p_ends(law: Law, min_p: float, tolerance: float) -> range:
    """How many tokens may stay: those at least `min_p` times as likely as the first."""
    largest = max(law.values())
    tolerance = max(tolerance, 1e-12)
    fewest = sum(probability >= min_p * largest * math.exp(tolerance) for probability in law.values())
    most = sum(probability >= min_p * largest * math.exp(-tolerance) for probability in law.values())
    return range(max(fewest, 1), most + 1)


def _top_p_ends(law: Law, top_p: float, tolerance: float) -> list[int]:
    """How many tokens may stay: the fewest that reach `top_p` together."""
    reached, ends = 0.0, []
    for count, probability in enumerate(law.values(), start=1):
        before, reached = reached, reached + probability
        if before < top_p + tolerance and reached >= top_p - tolerance:
            ends.append(count)
        if not tolerance and ends:
            break
    return ends or [len(law)]
