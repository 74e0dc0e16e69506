"""What hypothesis draws: prompts, sampling parameters, companies of requests.

Parameters come as keyword arguments, since only the stage under test knows their class.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .checkpoints import VOCAB_SIZE

INT64 = st.integers(-(2**63), 2**63 - 1)

# -1 asks for no seed at all.
seeds = st.one_of(st.integers(0, 3), INT64).filter(lambda seed: seed != -1)

token_ids = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def prompts(draw: st.DrawFn, max_size: int = 40) -> list[int]:
    """Token ids; some repeat a short pattern, as real text does and uniform draws never do."""
    pattern = draw(st.lists(token_ids, min_size=1, max_size=max_size))
    repeats = draw(st.integers(1, 4)) if len(pattern) <= max_size // 4 else 1
    return pattern * repeats


def greedy(max_tokens: int = 12) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of SamplingParams that leave no choice."""
    return st.fixed_dictionaries(
        {"temperature": st.just(0.0), "max_tokens": st.integers(1, max_tokens), "ignore_eos": st.booleans()}
    )


def sampled(max_tokens: int = 12) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of SamplingParams for seeded draws."""
    return st.fixed_dictionaries(
        {
            "temperature": st.floats(0.05, 2.0),
            "seed": seeds,
            "max_tokens": st.integers(1, max_tokens),
            "ignore_eos": st.booleans(),
        }
    )


def full(max_tokens: int = 10) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of SamplingParams that use everything that shapes the law of a token, each in about half the cases."""
    bias = st.dictionaries(token_ids, st.floats(-20, 20), max_size=4)
    return st.fixed_dictionaries(
        {
            "temperature": st.just(0.0) | st.floats(0.3, 2.0),
            "seed": seeds,
            "max_tokens": st.integers(4, max_tokens),
            "ignore_eos": st.booleans(),
        },
        optional={**cuts(), **penalties(), "logit_bias": bias, "min_tokens": st.integers(0, 4)},
    )


def cuts() -> dict[str, st.SearchStrategy[Any]]:
    """What leaves tokens out of a draw."""
    return {
        "top_k": st.sampled_from([-1, 0, 1, 2, VOCAB_SIZE, 10**6]) | st.integers(1, VOCAB_SIZE),
        "top_p": st.sampled_from([1e-9, 1.0]) | st.floats(0.05, 1.0),
        "min_p": st.sampled_from([0.0, 1.0]) | st.floats(1e-3, 0.9),
    }


def penalties() -> dict[str, st.SearchStrategy[Any]]:
    return {
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2.0),
    }


def requests(min_size: int = 1, max_size: int = 4) -> st.SearchStrategy[list[tuple[list[int], dict[str, Any]]]]:
    """Several (prompt, arguments of SamplingParams), each of which determines its tokens."""
    return st.lists(st.tuples(prompts(), st.one_of(greedy(), sampled())), min_size=min_size, max_size=max_size)
