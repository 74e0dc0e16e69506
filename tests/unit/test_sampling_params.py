"""SamplingParams from the stage with the whole sampler on: defaults, ranges, and refusals that name their field.

Names, defaults and ranges are vLLM's; the fields that the first stage has are in test_config.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.since("m1")

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "logit_bias": None,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "logits_processors": None,
}


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_defaults(stage: ModuleType, name: str, default: object) -> None:
    value = getattr(stage.SamplingParams(), name)
    assert value == default
    assert type(value) is type(default)


def test_no_stops_by_default(stage: ModuleType) -> None:
    params = stage.SamplingParams()
    assert not params.stop and not params.stop_token_ids


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [1, 2, 100]),
        ("presence_penalty", [-2, -2.0, 0, 2.0]),
        ("frequency_penalty", [-2, -2.0, 0, 2.0]),
        ("repetition_penalty", [1e-6, 0.5, 1, 2.0, 100.0]),
        ("temperature", [0, 1e-6, 0.7, 2]),
        ("top_p", [1e-9, 0.5, 1, 1.0]),
        ("top_k", [-1, 0, 1, 10**9]),
        ("min_p", [0, 0.5, 1.0]),
        ("min_tokens", [0, 1, 16]),
        ("logprobs", [None, -1, 0, 1, 20]),
        ("logit_bias", [None, {}, {5: 1}, {0: -100.0, 1: 100.0}]),
        ("skip_special_tokens", [True, False]),
        ("include_stop_str_in_output", [True, False]),
        ("logits_processors", [None, [], [lambda token_ids, logits: logits]]),
    ],
)
def test_accepted(stage: ModuleType, name: str, values: list[Any]) -> None:
    for value in values:
        kept = getattr(stage.SamplingParams(**{name: value}), name)
        assert (list(kept) if isinstance(value, list) and kept else kept) in (value, value or None, value or ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", -1),
        ("n", 1.0),
        ("n", "2"),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", "1.1"),
        ("top_p", 0),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", "0.9"),
        ("top_k", -2),
        ("top_k", 2.0),
        ("top_k", "5"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("min_p", "0.1"),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("min_tokens", "1"),
        ("logprobs", -2),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("logprobs", 2.0),
        ("logprobs", "3"),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: -100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {"1": 2.0}),
        ("logit_bias", {1: "2"}),
        ("logit_bias", [1, 2]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 5]),
        ("stop", 5),
        ("stop", b"a"),
        ("logits_processors", [5]),
        ("logits_processors", print),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused_by_name(stage: ModuleType, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        stage.SamplingParams(**{name: value})
    message = str(error.value)
    assert "\n" not in message
    culprits = [*value, *value.values()] if isinstance(value, dict) else [value]
    assert any(repr(culprit) in message for culprit in culprits)


def test_min_tokens_beyond_max_tokens(stage: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"min_tokens=5 .*max_tokens=4"):
        stage.SamplingParams(min_tokens=5, max_tokens=4)
    assert stage.SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    assert stage.SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500


@pytest.mark.parametrize("temperature", [0, 0.0, 9e-6])
def test_several_greedy_answers_would_be_the_same(stage: ModuleType, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"n must be 1 when sampling is greedy"):
        stage.SamplingParams(n=2, temperature=temperature)
    assert stage.SamplingParams(n=1, temperature=temperature).n == 1
    assert stage.SamplingParams(n=2, temperature=1.1e-5).n == 2


@given(n=st.integers(1, 4), temperature=st.floats(0, 2))
def test_greedy_is_below_a_hundred_thousandth(stage: ModuleType, n: int, temperature: float) -> None:
    greedy = temperature < 1e-5
    if greedy and n > 1:
        with pytest.raises(ValueError, match="greedy"):
            stage.SamplingParams(n=n, temperature=temperature)
    else:
        assert stage.SamplingParams(n=n, temperature=temperature).is_greedy == greedy


@pytest.mark.parametrize(
    ("given", "expected"), [(None, []), ("END", ["END"]), (["a", "bc"], ["a", "bc"]), (("a",), ["a"]), ([], [])]
)
def test_stop_may_be_one_string_or_several(stage: ModuleType, given: Any, expected: list[str]) -> None:
    assert list(stage.SamplingParams(stop=given).stop or ()) == expected


def test_what_was_given_is_copied(stage: ModuleType) -> None:
    """The engine reads parameters long after the call: what its caller does to a list by then must not matter."""
    stop, ids, bias, processors = ["a"], [5], {1: 2.0}, [print]
    params = stage.SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias, logits_processors=processors)
    stop.append("b")
    ids.append(6)
    bias[10**9] = 1000.0
    processors.clear()
    assert list(params.stop) == ["a"]
    assert list(params.stop_token_ids) == [5]
    assert dict(params.logit_bias) == {1: 2.0}
    assert list(params.logits_processors) == [print]


@pytest.mark.parametrize("name", DEFAULTS)
def test_frozen(stage: ModuleType, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stage.SamplingParams(), name, 1)


def test_replace_checks_again(stage: ModuleType) -> None:
    params = stage.SamplingParams(stop="x", top_k=5, stop_token_ids=[3])
    changed = dataclasses.replace(params, top_k=6)
    assert (changed.top_k, list(changed.stop), list(changed.stop_token_ids)) == (6, ["x"], [3])
    with pytest.raises(ValueError, match="top_k"):
        dataclasses.replace(params, top_k=-5)


def test_every_field_is_documented(stage: ModuleType) -> None:
    documented = set(re.findall(r"^\s+([a-z_, ]+): ", str(stage.SamplingParams.__doc__), re.MULTILINE))
    names = {name for line in documented for name in line.split(", ")}
    assert {field.name for field in dataclasses.fields(stage.SamplingParams)} <= names
