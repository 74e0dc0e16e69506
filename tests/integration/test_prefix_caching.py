"""Prefix caching in whole engines: the same tokens, whatever is found, and as much found as there should be.

Greedy and seeded requests that begin alike run in engines without a cache, with an empty one, a filled one, and one
that is too small; the oracle judges them. What hits is counted by hand.
"""

from __future__ import annotations

import importlib
import logging
import math
import random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.stages import known_stages

from ..conftest import CheckpointPath, GetOracle, MakeLLM, forget_prefixes, no_prefix_cache, open_llm
from ..property.test_engine import check_empty
from ..property.test_paged import check_oracle
from ..unit.test_cache import caches
from ..unit.test_prefix_cache import make_seq

pytestmark = pytest.mark.since("m6")

LENGTH = 64

Request = tuple[list[int], dict[str, Any]]

ENGINES: list[dict[str, Any]] = [
    {"block_size": 4, "num_kv_blocks": 400, "max_num_seqs": 4},
    {"block_size": 16, "num_kv_blocks": 100, "max_num_seqs": 4, "max_chunk_size": 5, "max_num_batched_tokens": 16},
    {"block_size": 4, "num_kv_blocks": 17, "max_num_seqs": 5, "max_chunk_size": 7, "scheduling_policy": "priority"},
    {"block_size": 64, "num_kv_blocks": 3, "max_num_seqs": 5},
    {"block_size": 1, "num_kv_blocks": 70, "max_num_seqs": 5, "enable_chunked_prefill": False},
]


@st.composite
def companies(draw: st.DrawFn) -> list[Request]:
    """Prompts that share beginnings of two texts, cut anywhere."""
    texts = [
        [random.Random(seed).randrange(512) for _ in range(44)] for seed in draw(st.tuples(*[st.integers(0, 9)] * 2))
    ]
    requests: list[Request] = []
    for number in range(draw(st.integers(2, 6))):
        shared = draw(st.sampled_from(texts))[: draw(st.integers(0, 44))]
        prompt = shared + draw(st.lists(st.integers(0, 511), max_size=6)) or [7]
        arguments: dict[str, Any] = {"max_tokens": draw(st.integers(1, 12)), "ignore_eos": True, "seed": number}
        arguments |= {"temperature": draw(st.sampled_from([0.0, 1.0])), "n": 1}
        if arguments["temperature"]:
            arguments["n"] = draw(st.sampled_from([1, 1, 3]))
        requests.append((prompt, arguments))
    return requests


def generate(stage: ModuleType, llm: Any, requests: list[Request], **more: Any) -> list[Any]:
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    outputs: list[Any] = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False, **more)
    manager = llm.engine.core.scheduler.kv_cache_manager
    manager.block_pool.check_integrity([])
    assert manager.num_used_blocks == 0
    return outputs


def poison(stage: ModuleType, llm: Any) -> None:
    """Whoever reads what is not in the cache gets nan."""
    forget_prefixes(llm)
    for cache in caches(stage, llm):
        cache.fill_(math.nan)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: "-".join(map(str, engine.values())))
@settings(max_examples=max(settings().max_examples // 2, 1))
@given(requests=companies(), gone=st.none() | st.integers(0, 5))
def test_the_oracles_tokens_cold_and_warm(
    engine: dict[str, Any],
    requests: list[Request],
    gone: int | None,
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Cold, warm, and one after the other; too few blocks mean eviction and preemption; one may be aborted."""
    llm, oracle = make_llm(max_model_len=LENGTH, **engine), get_oracle("qwen3")
    poison(stage, llm)
    for number, (prompt, arguments) in enumerate(requests):
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments), priority=number % 3)
        llm.engine.step()
    if gone is not None and gone < len(requests):
        llm.engine.abort_request(f"{gone}")
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            if output.finished:
                check_oracle(stage, oracle, requests[int(output.request_id)], output)
    check_empty(stage, llm)
    for request, output in zip(requests, generate(stage, llm, requests), strict=True):
        check_oracle(stage, oracle, request, output)
        assert 0 <= output.num_cached_tokens < len(request[0])


def test_on_and_off(stage: ModuleType, make_llm: MakeLLM) -> None:
    """And what is found the second time: all whole blocks of the prompt, and what its own output filled."""
    text = [random.Random(1).randrange(512) for _ in range(50)]
    requests: list[Request] = [
        (text[:n], {"temperature": n % 2, "seed": n, "max_tokens": 8, "ignore_eos": True}) for n in (50, 33, 32, 20, 5)
    ]
    off = make_llm(max_model_len=LENGTH, block_size=16, num_kv_blocks=60, **no_prefix_cache(stage))
    llm = make_llm(max_model_len=LENGTH, block_size=16, num_kv_blocks=60)
    forget_prefixes(llm)
    expected = [output.token_ids for output in generate(stage, off, requests)]
    found = []
    for _ in range(2):
        outputs = [generate(stage, llm, [request])[0] for request in requests]
        assert [output.token_ids for output in outputs] == expected
        found.append([output.num_cached_tokens for output in outputs])
    assert found == [[0, 32, 31, 19, 4], [48, 32, 31, 19, 4]]
    assert off.generate([text], use_tqdm=False)[0].num_cached_tokens == 0


def test_several_turns(stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    """Outputs are cached as prompts are: of the next prompt only what is new, and the last token, is computed."""
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400)
    poison(stage, llm)
    arguments = {"temperature": 0.0, "max_tokens": 7, "ignore_eos": True}
    prompt: list[int] = [5, 9, 200, 31, 77]
    found = []
    for turn in range(4):
        (output,) = generate(stage, llm, [(prompt, arguments)])
        get_oracle("qwen3").check(prompt, output.token_ids, stage.SamplingParams(**arguments))
        found.append(output.num_cached_tokens)
        prompt = [*prompt, *output.token_ids, 300 + turn, 400]
    # 5 + 7, 14 + 7, 23 + 7 tokens, of which the last one has no keys: 11, 20 and 29 of them make 2, 5 and 7 blocks.
    assert found == [0, 8, 20, 28]


@pytest.mark.parametrize(
    ("more", "hit"),
    [({}, 34), ({"max_chunk_size": 18}, 34), ({"max_chunk_size": 7}, 32), ({"enable_chunked_prefill": False}, 34)],
    ids=str,
)
def test_prompts_that_arrive_together(
    more: dict[str, Any], hit: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """What they share is computed once, and they say what they would say alone.

    That is 34 tokens. In chunks of 7 the block with the last two of them is not full when the other 32 are there.
    """
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400, **more)
    poison(stage, llm)
    rng = random.Random(7)
    shared = [rng.randrange(512) for _ in range(34)]
    requests: list[Request] = [
        ([*shared, 100 + i, 7], {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}) for i in range(6)
    ]
    num_steps = len(llm.engine.stats.steps)
    outputs = generate(stage, llm, requests)
    assert [output.num_cached_tokens for output in outputs] == [0] + [hit] * 5
    computed = sum(step.num_tokens for step in llm.engine.stats.steps[num_steps:])
    assert computed == 36 + 5 * (36 - hit) + 6 * 3, "the first one's prompt, the ends of the others', and the decodes"
    for request, output in zip(requests, outputs, strict=True):
        check_oracle(stage, get_oracle("qwen3"), request, output)


def test_salts(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400)
    forget_prefixes(llm)
    requests: list[Request] = [(list(range(20)), {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True})] * 2

    def found(*salts: str | None) -> list[int]:
        outputs = [generate(stage, llm, requests[:1], cache_salt=salt)[0] for salt in salts]
        assert len({tuple(output.token_ids) for output in outputs}) == 1
        return [output.num_cached_tokens for output in outputs]

    assert found(None, "a", "b", "a", None, "b") == [0, 0, 0, 19, 19, 19]
    assert [each.num_cached_tokens for each in generate(stage, llm, requests, cache_salt=["c", None])] == [0, 19]
    assert list(llm.stream([list(range(20))], cache_salt="a"))[-1].num_cached_tokens == 19
    with pytest.raises(ValueError, match="cache_salt"):
        generate(stage, llm, requests, cache_salt="")
    with pytest.raises(ValueError, match="2 prompts but 1 cache_salts"):
        generate(stage, llm, requests, cache_salt=["a"])


def test_salts_of_chats(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400)
    forget_prefixes(llm)
    messages = [{"role": "user", "content": "Who wrote the book?"}]
    params = stage.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    num_tokens = len(llm.preprocess_chat(messages))

    def found(conversations: Any, salt: Any) -> list[int]:
        return [output.num_cached_tokens for output in llm.chat(conversations, params, use_tqdm=False, cache_salt=salt)]

    assert found(messages, "a") == found(messages, None) == [0]
    (again,) = found(messages, "a")
    assert num_tokens - 4 <= again < num_tokens
    assert found([messages, messages, messages], ["b", "a", None]) == [0, again, again]


def test_of_several_samples_the_first_is_looked_up(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Its siblings get the prompt from it, and find nothing themselves."""
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400)
    forget_prefixes(llm)
    requests: list[Request] = [(list(range(30, 50)), {"temperature": 1.0, "seed": 3, "max_tokens": 4, "n": 3})]
    assert [generate(stage, llm, requests)[0].num_cached_tokens for _ in range(2)] == [0, 19]
    record = llm.engine.stats.steps[-1]
    before = record.prefix_cache_queries, record.prefix_cache_hits
    assert list(llm.stream(requests[0][0], stage.SamplingParams(**requests[0][1])))[-1].num_cached_tokens == 19
    record = llm.engine.stats.steps[-1]
    assert (record.prefix_cache_queries - before[0], record.prefix_cache_hits - before[1]) == (20, 19)
    llm.engine.add_request("a", requests[0][0], stage.SamplingParams(n=3, max_tokens=8, ignore_eos=True))
    llm.engine.step()
    llm.engine.step()
    llm.engine.add_request("b", [400] * 9, stage.SamplingParams(max_tokens=2, ignore_eos=True))
    found = {}
    while llm.engine.has_unfinished_requests():
        found.update({output.request_id: output.num_cached_tokens for output in llm.engine.step()})
    assert found == {"a": 19, "b": 0}, "while others come, its siblings change nothing"


def test_reset_while_somebody_runs(stage: ModuleType, make_llm: MakeLLM, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=400)
    forget_prefixes(llm)
    llm.engine.add_request("a", list(range(20)), stage.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    llm.engine.step()
    with caplog.at_level(logging.WARNING, logger=stage.__name__):
        logging.getLogger(stage.__name__).propagate = True
        assert llm.reset_prefix_cache() is False
    llm.engine.abort_request("a")
    assert len(llm.engine.core.scheduler.kv_cache_manager.prefix_cache) == 5
    assert llm.reset_prefix_cache() is True
    assert len(llm.engine.core.scheduler.kv_cache_manager.prefix_cache) == 0


def test_reset_of_a_closed_engine(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=LENGTH) as llm:
        assert llm.reset_prefix_cache()
    with pytest.raises(ValueError, match="closed"):
        llm.reset_prefix_cache()


def test_who_is_forgotten_first(stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    """Sixteen blocks of 4: what was used longest ago goes first, of each text its end before its beginning.

    Three texts of 17 tokens leave four blocks each, and the first comes a second time. A long one then takes the four
    that nobody can find and two more, which are the last two of the second text.
    """
    llm = make_llm(max_model_len=LENGTH, block_size=4, num_kv_blocks=16)
    poison(stage, llm)
    rng = random.Random(4)
    a, b, c = ([100 * text + rng.randrange(100) for _ in range(17)] for text in (1, 2, 3))
    long = [rng.randrange(400, 500) for _ in range(21)]
    arguments = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
    manager = llm.engine.core.scheduler.kv_cache_manager
    before = manager.prefix_cache.num_evictions
    found = [generate(stage, llm, [(prompt, arguments)])[0].num_cached_tokens for prompt in (a, b, c, a)]
    assert (found, len(manager.prefix_cache)) == ([0, 0, 0, 16], 12)
    for prompt, evicted, left in ((long, 2, (16, 8, 16)), (long[::-1], 7, (16, 0, 4)), ([7] * 40, 16, (0, 0, 0))):
        assert generate(stage, llm, [(prompt, arguments)])[0].num_cached_tokens == 0
        record = llm.engine.stats.steps[-1]
        assert record.prefix_cache_evictions - before == evicted
        assert record.kv_slots_cached == 4 * len(manager.prefix_cache)
        assert tuple(manager.get_computed_blocks(make_seq(stage, "?", text)).num_tokens for text in (a, b, c)) == left
    for prompt in (a, b, c):
        (output,) = generate(stage, llm, [(prompt, arguments)])
        get_oracle("qwen3").check(prompt, output.token_ids, stage.SamplingParams(**arguments))


def test_large_blocks_hit_by_the_token(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """One request, then 63 more that share its first 200 tokens: blocks of 256 are copied up to there."""
    rng = random.Random(0)
    head = [rng.randrange(512) for _ in range(200)]
    prompts = [head + [100 + number] + [rng.randrange(512) for _ in range(99)] for number in range(64)]
    params = stage.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    sizes = {"block_size": 256, "num_kv_blocks": 160, "max_model_len": 320}
    with open_llm(stage, checkpoint_path("qwen3_tied"), **sizes) as llm:
        first = llm.generate(prompts[:1], params, use_tqdm=False)
        outputs = first + llm.generate(prompts[1:], params, use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [0] + [200] * 63
        record = llm.engine.stats.steps[-1]
        assert (record.prefix_cache_hits, record.num_copied_blocks) == (63 * 200, 63)
        assert record.prefix_cache_queries == 64 * 300
        assert record.prefix_cache_hit_rate == 63 * 200 / (64 * 300)


def test_switched_off_it_is_the_stage_before(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """The very steps of m5, with chunks, forks, preemption and equal prompts."""
    names = known_stages()
    sizes = {"max_model_len": LENGTH, "block_size": 4, "num_kv_blocks": 24, "max_num_seqs": 6, "max_chunk_size": 9}
    wanted = [([1, 2, 3], 30, 1), ([5] * 20, 9, 3), ([5] * 20, 9, 1), ([9] * 40, 12, 2), ([1, 2, 3], 20, 1)]

    def run(package: ModuleType, **switch: Any) -> Any:
        with open_llm(package, checkpoint_path("qwen3"), **sizes, **switch) as llm:
            for number, (prompt, max_tokens, n) in enumerate(wanted):
                params = package.SamplingParams(seed=number, max_tokens=max_tokens, n=n, ignore_eos=True)
                llm.engine.add_request(f"{number}", prompt, params)
            texts = {}
            while llm.engine.has_unfinished_requests():
                for output in llm.engine.step():
                    texts[output.request_id] = [list(each.token_ids) for each in output.outputs]
            fields = [
                "phase",
                "seq_ids",
                "num_tokens",
                "num_running",
                "num_waiting",
                "kv_slots_used",
                "num_preemptions",
            ]
            return [[getattr(step, field) for field in fields] for step in llm.engine.stats.steps], texts

    steps, texts = run(stage, **no_prefix_cache(stage))
    assert (steps, texts) == run(importlib.import_module(names[5]))
    assert steps[-1][-1] > 0
    again, same = run(stage)
    assert again != steps and same == texts
