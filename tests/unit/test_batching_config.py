"""How many sequences fit: defaults that fit the machine, and explicit values that are kept or refused with others."""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..checkpoints import SPECS
from ..conftest import CheckpointPath, MakeLLM, open_llm, phases_apart, submodule
from .test_cache import BYTES_PER_TOKEN, caches

pytestmark = pytest.mark.since("m2")

# From m3 on a sequence holds small blocks, and no row of max_model_len slots is reserved for it.
rows_of_slots = pytest.mark.until("m2")

PER_TOKEN = BYTES_PER_TOKEN["qwen3"]


def greedy(stage: ModuleType, max_tokens: int | None = None) -> Any:
    return stage.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def fills_all_rows(stage: ModuleType, llm: Any) -> bool:
    """Whether as many sequences as were promised run at once, each to the longest length that was promised."""
    llm.engine.stats.clear()
    num_seqs = llm.config.max_num_seqs
    outputs = llm.generate([[1 + number % 9] for number in range(num_seqs + 1)], greedy(stage), use_tqdm=False)
    most = max(len(step.seq_ids) for step in llm.engine.stats.steps)
    return most == num_seqs and {len(output.token_ids) for output in outputs} == {llm.config.max_model_len - 1}


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "default"), [("max_num_seqs", None), ("max_num_batched_tokens", None), ("scheduling_policy", "fcfs")]
)
def test_defaults(stage: ModuleType, name: str, default: object) -> None:
    assert getattr(stage.EngineConfig(), name) == default


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "16"])
def test_sizes_are_positive_integers(stage: ModuleType, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        stage.EngineConfig(**{name: value})
    assert repr(value) in str(error.value)
    assert getattr(stage.EngineConfig(**{name: 2}), name) == 2


@pytest.mark.parametrize("value", ["FCFS", "lifo", None, 3])
def test_unknown_policies_are_refused_with_the_known_ones(stage: ModuleType, value: Any) -> None:
    with pytest.raises(ValueError, match="scheduling_policy") as error:
        stage.EngineConfig(scheduling_policy=value)
    for name in ("fcfs", "priority", "sjf", repr(value)):
        assert name in str(error.value)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_every_policy_serves(stage: ModuleType, make_llm: MakeLLM, policy: str) -> None:
    llm = make_llm(max_model_len=64, scheduling_policy=policy)
    prompts = [[1] * 9, [2], [3] * 4]
    outputs = llm.generate(prompts, greedy(stage, 5), use_tqdm=False, priority=[2, 0, 1])
    assert outputs[0].prompt_token_ids == prompts[0]
    assert [len(output.token_ids) for output in outputs] == [5, 5, 5]
    assert llm.config.scheduling_policy == policy


# ---------------------------------------------------------------------- sizes that are chosen


@rows_of_slots
def test_everything_is_settled(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Sixteen rows on a CPU, and at least a prompt of full length in a step."""
    config = make_llm().config
    assert (config.max_num_seqs, config.max_model_len, config.max_num_batched_tokens) == (16, 512, 8192)
    assert make_llm(max_num_seqs=3).config.max_num_seqs == 3
    assert make_llm(max_model_len=64).config.max_num_seqs == 16
    assert make_llm(max_model_len=64, max_num_batched_tokens=64).config.max_num_batched_tokens == 64


def test_a_small_budget_shortens_what_is_left_open(stage: ModuleType, make_llm: MakeLLM) -> None:
    """A prompt of full length fits into a step, and so does a token of every sequence."""
    config = make_llm(max_num_batched_tokens=100, **phases_apart(stage)).config
    most = 16 if "num_kv_blocks" not in stage.EngineConfig.__annotations__ else 100  # where nobody reserves rows
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (100, most, 100)
    config = make_llm(max_num_batched_tokens=5, **phases_apart(stage)).config
    assert (config.max_model_len, config.max_num_seqs) == (5, 5)


@rows_of_slots
@pytest.mark.parametrize("checkpoint", SPECS)
def test_reserved_bytes(checkpoint: str, stage: ModuleType, make_llm: MakeLLM) -> None:
    """max_num_seqs rows of max_model_len slots, and a spare one; nothing more."""
    for num_seqs in (5, None):
        llm = make_llm(checkpoint, max_model_len=64, max_num_seqs=num_seqs)
        reserved = sum(cache.nbytes for cache in caches(stage, llm))
        assert reserved == ((num_seqs or 16) * 64 + 1) * BYTES_PER_TOKEN[checkpoint]
        assert {len(cache) for cache in caches(stage, llm)} == {(num_seqs or 16) * 64 + 1}


@rows_of_slots
@pytest.mark.parametrize(
    ("num_tokens", "options", "num_seqs", "max_model_len"),
    [
        (16 * 512, {}, 16, 512),
        (16 * 512 - 1, {}, 15, 512),
        (600, {}, 1, 512),
        (511, {}, 1, 511),
        (2, {}, 1, 2),
        (1000, {"max_model_len": 100}, 10, 100),
        (1600, {"max_model_len": 100}, 16, 100),
        (100, {"max_model_len": 100}, 1, 100),
        (1000, {"max_num_seqs": 10}, 10, 100),
        (1009, {"max_num_seqs": 10}, 10, 100),
        (20, {"max_num_seqs": 10}, 10, 2),
        (600 * 10, {"max_num_seqs": 10}, 10, 512),
        (1000, {"max_num_seqs": 10, "max_model_len": 100}, 10, 100),
        (10_000, {"max_num_seqs": 20}, 20, 500),
    ],
)
def test_what_is_left_open_is_fitted_to_memory(
    stage: ModuleType,
    checkpoint_path: CheckpointPath,
    num_tokens: int,
    options: dict[str, int],
    num_seqs: int,
    max_model_len: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The longest context first, then as many rows of it as there is room for; an explicit value stays."""
    memory = num_tokens * PER_TOKEN + PER_TOKEN - 1
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=memory, log_level="INFO", **options) as llm,
    ):
        assert (llm.config.max_num_seqs, llm.config.max_model_len) == (num_seqs, max_model_len)
        assert sum(cache.nbytes for cache in caches(stage, llm)) <= memory + PER_TOKEN, "but for the spare slot"
        if num_tokens <= 1000:
            assert fills_all_rows(stage, llm)
    is_shortened = "max_model_len" not in options and max_model_len < 512
    assert (f"max_model_len lowered from 512 to {max_model_len}" in caplog.text) == is_shortened


@rows_of_slots
def test_a_long_context_is_shortened_before_rows_are_few(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a comfortable length, and no further while there are rows to give up."""
    monkeypatch.setattr(submodule(stage, "worker.gpu_worker"), "_COMFORTABLE_MODEL_LEN", 100)

    def sizes(num_tokens: int) -> tuple[int, int]:
        memory = num_tokens * PER_TOKEN
        with open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=memory) as llm:
            return llm.config.max_num_seqs, llm.config.max_model_len

    assert sizes(16 * 512) == (16, 512)
    assert sizes(16 * 300 + 15) == (16, 300)
    assert sizes(16 * 100) == (16, 100)
    assert sizes(15 * 100) == (15, 100)
    assert sizes(199) == (1, 199)
    assert sizes(60) == (1, 60)


@rows_of_slots
def test_the_log_says_what_is_reserved(
    stage: ModuleType, checkpoint_path: CheckpointPath, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("llama_bias"), log_level="INFO", max_num_seqs=6),
    ):
        pass
    mebibytes = 6 * 512 * BYTES_PER_TOKEN["llama_bias"] / 2**20
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("KV cache")]
    assert line.startswith("KV cache: 6 rows of 512 slots × 2 layers = ")
    assert float(line.split("= ")[1].removesuffix(" MiB")) == pytest.approx(mebibytes, abs=0.5)


@rows_of_slots
def test_what_is_asked_for_may_take_more_than_the_default_share(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory that is free; with kv_cache_memory_bytes given, that is the limit. What is not there, nobody gets."""
    worker = submodule(stage, "worker.gpu_worker")
    monkeypatch.setattr(worker, "available_memory", lambda device: 4 * 200 * PER_TOKEN)
    folder = checkpoint_path("qwen3")

    def sizes(**options: int) -> tuple[int, int]:
        with open_llm(stage, folder, **options) as llm:
            return llm.config.max_num_seqs, llm.config.max_model_len

    assert sizes() == (1, 200), "a quarter of what is free"
    assert sizes(max_num_seqs=4, max_model_len=200) == (4, 200)
    assert sizes(max_model_len=400) == (1, 400)
    with pytest.raises(ValueError, match="max_model_len=201 × max_num_seqs=4 needs"):
        sizes(max_num_seqs=4, max_model_len=201)
    with pytest.raises(ValueError, match="max_model_len=200 × max_num_seqs=4 needs"):
        sizes(max_num_seqs=4, max_model_len=200, kv_cache_memory_bytes=4 * 200 * PER_TOKEN - 1)
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes=\d+ is more than the \d+ bytes that are free"):
        sizes(kv_cache_memory_bytes=4 * 200 * PER_TOKEN + 1)


# ---------------------------------------------------------------------- sizes that are refused


def proposed(message: str) -> int:
    """The product of rows and length that would fit."""
    match = re.search(r"lower them until their product is at most (\d+)", message)
    assert match, message
    return int(match[1])


@rows_of_slots
@given(num_tokens=st.integers(2, 300), num_seqs=st.integers(1, 40), max_model_len=st.integers(2, 300), data=st.data())
def test_what_does_not_fit_is_refused_with_what_would(
    num_tokens: int, num_seqs: int, max_model_len: int, data: st.DataObject, stage: ModuleType, make_llm: MakeLLM
) -> None:
    """Any rows and length of the proposed product are accepted, and no larger ones. No engine is started for it."""
    llm = make_llm()
    memory = num_tokens * PER_TOKEN

    def fit(num_seqs: int, max_model_len: int) -> tuple[int, int]:
        config = stage.EngineConfig(
            max_num_seqs=num_seqs, max_model_len=max_model_len, kv_cache_memory_bytes=memory, device="cpu"
        )
        length, rows = llm.engine.worker._fit_cache(config, llm.hf_config, PER_TOKEN)
        return rows, length

    if num_seqs * max_model_len <= num_tokens:
        assert fit(num_seqs, max_model_len) == (num_seqs, max_model_len)
        return
    with pytest.raises(ValueError, match=f"max_model_len={max_model_len} × max_num_seqs={num_seqs} needs") as error:
        fit(num_seqs, max_model_len)
    message = str(error.value)
    assert f"{num_seqs * max_model_len * PER_TOKEN} bytes" in message and f"there are {memory}" in message
    most = proposed(message)
    rows = data.draw(st.integers(1, most // 2))
    assert fit(rows, most // rows) == (rows, most // rows)
    with pytest.raises(ValueError, match="needs"):
        fit(rows, most // rows + 1)


@rows_of_slots
def test_a_refused_engine_starts_with_what_was_proposed(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    folder, memory = checkpoint_path("qwen3"), 100 * PER_TOKEN
    with pytest.raises(ValueError, match="max_model_len=50 × max_num_seqs=8") as error:
        open_llm(stage, folder, max_num_seqs=8, max_model_len=50, kv_cache_memory_bytes=memory)
    assert proposed(str(error.value)) == 100
    for sizes in ({"max_num_seqs": 2, "max_model_len": 50}, {"max_num_seqs": 8, "max_model_len": 12}):
        with open_llm(stage, folder, kv_cache_memory_bytes=memory, **sizes) as llm:
            assert fills_all_rows(stage, llm)


@rows_of_slots
def test_more_rows_than_there_is_memory_for(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """A row needs room for a prompt token and an output token."""
    folder, memory = checkpoint_path("qwen3"), 100 * PER_TOKEN
    with pytest.raises(ValueError, match="max_num_seqs=51 needs") as error:
        open_llm(stage, folder, max_num_seqs=51, kv_cache_memory_bytes=memory)
    assert proposed(str(error.value)) == 100
    with open_llm(stage, folder, max_num_seqs=50, kv_cache_memory_bytes=memory) as llm:
        assert llm.config.max_model_len == 2
        assert fills_all_rows(stage, llm)


def test_a_budget_below_the_longest_prompt_is_refused(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """It would wait for ever. One token more, or a shorter context, is accepted."""
    folder = checkpoint_path("qwen3")
    with pytest.raises(ValueError, match="max_num_batched_tokens=63 is less than max_model_len=64"):
        open_llm(stage, folder, max_num_batched_tokens=63, max_model_len=64, **phases_apart(stage))
    for budget, length in ((64, 64), (63, 63)):
        with open_llm(stage, folder, max_num_batched_tokens=budget, max_model_len=length, **phases_apart(stage)) as llm:
            outputs = llm.generate([[5] * (length - 1), [6] * (length - 1), [7]], greedy(stage), use_tqdm=False)
            assert [len(output.token_ids) for output in outputs] == [1, 1, length - 1]
            assert max(step.num_tokens for step in llm.engine.stats.steps) <= budget


def test_a_budget_below_a_token_for_everybody_is_refused(stage: ModuleType) -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=63 is less than max_num_seqs=64"):
        stage.EngineConfig(max_num_batched_tokens=63, max_num_seqs=64)
    assert stage.EngineConfig(max_num_batched_tokens=64, max_num_seqs=64).max_num_seqs == 64


# ---------------------------------------------------------------------- what the records say


@rows_of_slots
def test_slots_in_the_records(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """Allocated: a whole row for each that runs. Used: the tokens that stand in it."""
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=40, max_num_seqs=3) as llm:
        lengths = [(9, 3), (1, 2), (5, 4), (7, 2)]
        params = [greedy(stage, num) for _, num in lengths]
        llm.generate([[5] * num for num, _ in lengths], params, use_tqdm=False)
        steps = llm.engine.stats.steps
    assert [step.phase for step in steps] == ["prefill", "decode", "prefill", "decode", "decode"]
    assert [step.num_tokens for step in steps] == [15, 3, 7, 3, 1]
    assert [(step.num_running, step.num_waiting) for step in steps] == [(3, 1), (2, 1), (3, 0), (1, 0), (0, 0)]
    assert [step.kv_slots_used for step in steps] == [15, 10 + 6, 16 + 7, 7, 0]
    assert [step.kv_slots_allocated for step in steps] == [120, 80, 120, 40, 0]
    assert {step.kv_slots for step in steps} == {120}
    assert [len(step.seq_ids) for step in steps] == [3, 3, 1, 3, 1]


def test_records_of_a_batch_agree(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=64, max_num_seqs=4)
    llm.engine.stats.clear()
    params = [greedy(stage, 1 + number) for number in range(9)]
    llm.generate([[5] * (1 + number) for number in range(9)], params, use_tqdm=False)
    steps = llm.engine.stats.steps
    for step in steps:
        assert 0 <= step.kv_slots_used <= step.kv_slots_allocated <= step.kv_slots
        assert 0 < len(step.seq_ids) == len(set(step.seq_ids)) <= 4
        assert 0 <= step.num_running <= 4
    assert max(step.num_running for step in steps) == 4, "nobody shared a step"
    for step, following in pairwise(steps):
        assert following.num_waiting <= step.num_waiting
        assert following.num_running + following.num_waiting <= step.num_running + step.num_waiting
    assert (steps[-1].num_running, steps[-1].num_waiting, steps[-1].kv_slots_used) == (0, 0, 0)
