"""What the tests of whole engines share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import MakeLLM

TEXT = "Seven ships were counted"
OTHER = "The donkey asked for oranges, and"

HELLO = [{"role": "user", "content": "Who wrote the book?"}]

NewLLM = Callable[..., Any]


@pytest.fixture
def llm(make_llm: MakeLLM) -> Any:
    return make_llm("qwen3", max_model_len=64)


@pytest.fixture
def new_llm(stage: ModuleType) -> NewLLM:
    """`new_llm(folder)`: an engine of the test's own."""
    options = {"device": "cpu", "dtype": "float32", "log_level": "ERROR"}
    return lambda model, **more: stage.LLM(model, **{**options, **more})


@pytest.fixture
def greedy(stage: ModuleType) -> Any:
    return stage.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def token_ids(outputs: list[Any]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def run(llm: Any, prompts: Any, params: Any = None) -> list[list[int]]:
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def decode(llm: Any, ids: list[int]) -> str:
    """The text of some output; a character whose last byte did not come any more is no part of it."""
    return str(llm.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")
