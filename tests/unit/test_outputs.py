"""What the engine hands back, and the states that a sequence goes through on the way."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..checkpoints import make_tokenizer
from ..conftest import MakeLLM, submodule


def run(stage: ModuleType, llm: Any, prompt: Any, **params: Any) -> Any:
    (output,) = llm.generate(prompt, stage.SamplingParams(**params), use_tqdm=False)
    return output


def test_request_output(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm()
    output = run(stage, llm, "read the book", temperature=0.0, max_tokens=5, ignore_eos=True)
    assert isinstance(output, stage.RequestOutput)
    assert isinstance(output.request_id, str)
    assert output.prompt == "read the book"
    assert output.prompt_token_ids == llm.tokenizer.encode("read the book")
    assert output.finished
    (completion,) = output.outputs
    assert isinstance(completion, stage.CompletionOutput)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert output.text is completion.text and output.token_ids is completion.token_ids
    assert output.delta is completion.delta
    assert len(output.token_ids) == 5
    assert run(stage, llm, [5, 6], max_tokens=1).prompt is None


def test_a_request_output_is_no_dict(stage: ModuleType, make_llm: MakeLLM) -> None:
    output = run(stage, make_llm(), [5, 6], max_tokens=1)
    with pytest.raises(TypeError, match=r"output\.text, not output\['text'\]"):
        output["text"]


def test_request_ids_are_never_reused(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, params = make_llm(), stage.SamplingParams(max_tokens=1)
    outputs = [output for _ in range(3) for output in llm.generate([[1], [2]], params, use_tqdm=False)]
    assert len({output.request_id for output in outputs}) == 6


def test_metrics_of_a_request(stage: ModuleType, make_llm: MakeLLM) -> None:
    metrics = run(stage, make_llm(), [5, 6], temperature=0.0, max_tokens=5, ignore_eos=True).metrics
    assert metrics.num_output_tokens == 5
    assert 0 < metrics.ttft < metrics.e2e_latency
    assert metrics.tpot == pytest.approx((metrics.e2e_latency - metrics.ttft) / 4)
    single = run(stage, make_llm(), [5, 6], max_tokens=1).metrics
    assert single.tpot is None
    assert single.ttft == single.e2e_latency > 0


def test_metrics_before_the_first_token(stage: ModuleType) -> None:
    metrics = submodule(stage, "outputs").RequestMetrics(arrival_time=10.0)
    assert (metrics.ttft, metrics.tpot, metrics.e2e_latency, metrics.num_output_tokens) == (None, None, None, 0)


def test_a_stream_gives_snapshots(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Whoever keeps an earlier output keeps what it said then."""
    params = stage.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    outputs = list(make_llm().stream([1, 2, 3], params))
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4]
    assert [output.outputs[0].finish_reason for output in outputs] == [None, None, None, "length"]


def test_statuses(stage: ModuleType) -> None:
    statuses = submodule(stage, "request").SequenceStatus
    for status in statuses:
        assert status.is_finished == status.name.startswith("FINISHED")
        assert (status.finish_reason is not None) == status.is_finished
    assert statuses.FINISHED_STOPPED.finish_reason == "stop"
    assert statuses.FINISHED_LENGTH.finish_reason == "length"


def test_seeds_of_requests_without_one(stage: ModuleType) -> None:
    """Signed 64-bit, a function of engine seed and number, and no two alike among the first thousands."""
    derive_seed = submodule(stage, "request").derive_seed
    seeds = [derive_seed(engine_seed, number) for engine_seed in (0, 1, 11) for number in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 0) == seeds[0]


# ---------------------------------------------------------------------- text, piece by piece


def detokenize(stage: ModuleType, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = submodule(stage, "engine.detokenizer").IncrementalDetokenizer(make_tokenizer(), prompt)
    return [detokenizer.step(token) for token in output]


@given(prompt=st.text(max_size=10), text=st.text(max_size=30))
def test_pieces_of_any_text(stage: ModuleType, prompt: str, text: str) -> None:
    tokenizer = make_tokenizer()
    pieces = detokenize(stage, tokenizer.encode(prompt), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


@given(prompt=strategies.prompts(max_size=6), output=st.lists(strategies.token_ids, max_size=30))
def test_pieces_of_any_tokens(stage: ModuleType, prompt: list[int], output: list[int]) -> None:
    """Random tokens are mostly no UTF-8: what can be read of them appears all the same, and nothing twice."""
    text = "".join(detokenize(stage, prompt, output))
    whole = str(make_tokenizer().decode(output, skip_special_tokens=True))
    shown, readable = text.replace("\ufffd", ""), whole.replace("\ufffd", "")
    assert readable.startswith(shown)
    assert len(readable) - len(shown) <= 4, "more than an unfinished character was held back"


def test_endless_broken_bytes_do_not_pile_up(stage: ModuleType) -> None:
    """Bytes that never become a character are given out as replacement characters, not kept for ever."""
    byte = make_tokenizer().get_vocab()["ÿ"]  # byte 0xFF, which UTF-8 never has
    pieces = detokenize(stage, [5], [byte] * 100)
    assert set("".join(pieces)) == {"\ufffd"}
    assert len("".join(pieces)) > 80
