"""Many sequences in one batch: each says what it says alone, whoever comes, goes or fails beside it.

Tokens are compared with those of the same request alone in the same engine. Where they differ, the oracle judges both,
since a tie may fall either way.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import weakref
from collections.abc import Callable
from itertools import groupby
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folovllm.stages import known_stages

from .. import strategies
from ..checkpoints import SPECS, VOCAB_SIZE
from ..conftest import (
    CheckpointPath,
    GetOracle,
    MakeLLM,
    Milestone,
    forget_prefixes,
    no_prefix_cache,
    open_llm,
    phases_apart,
    submodule,
)
from ..unit.test_cache import caches
from .test_engine import check_empty, result_of

pytestmark = pytest.mark.since("m2")

MAX_MODEL_LEN = 64

Prompt = list[int]
Arguments = dict[str, Any]
Requests = list[tuple[Prompt, Arguments]]

# Sizes at which some wait, and at which prompts do not all fit into a step.
TIGHT: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 3, "max_num_batched_tokens": 70}


def alone(stage: ModuleType, llm: Any, request: tuple[Prompt, Arguments]) -> Any:
    prompt, arguments = request
    return llm.generate([prompt], stage.SamplingParams(**arguments), use_tqdm=False)[0]


def check_as_alone(stage: ModuleType, llm: Any, oracle: Any, request: tuple[Prompt, Arguments], output: Any) -> None:
    """`output` is that of `request`; its tokens, text and reasons are those that it has alone, or as right as those."""
    prompt, arguments = request
    by_itself = alone(stage, llm, request)
    assert output.finished and output.prompt_token_ids == prompt
    if result_of(output) == result_of(by_itself):
        return
    for completion, expected in zip(output.outputs, by_itself.outputs, strict=True):
        own = {**arguments, "n": 1, **({"seed": arguments["seed"] + completion.index} if "seed" in arguments else {})}
        for token_ids in (completion.token_ids, expected.token_ids):
            oracle.check(prompt, token_ids, stage.SamplingParams(**own))


def finish_all(llm: Any, outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Step until nobody is left; the finished outputs by request id."""
    outputs = {} if outputs is None else outputs
    for _ in range(2000):
        if not llm.engine.has_unfinished_requests():
            return outputs
        outputs.update({output.request_id: output for output in llm.engine.step() if output.finished})
    raise AssertionError("not done after 2000 steps")


# ---------------------------------------------------------------------- batch invariance


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, int, tuple[Prompt, Arguments]]]:
    """(steps before it comes, priority, request); some want several sequences, some only a few of all parameters."""
    requests = draw(
        st.lists(st.tuples(strategies.prompts(), strategies.full() | strategies.sampled()), min_size=2, max_size=6)
    )
    result = []
    for prompt, arguments in requests:
        if arguments["temperature"] > 0 and abs(arguments["seed"]) < 100 and draw(st.booleans()):
            arguments["n"] = 2
            arguments["seed"] = abs(arguments["seed"])
        result.append((draw(st.integers(0, 4)), draw(st.integers(0, 2)), (prompt, arguments)))
    return result


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
@given(arriving=arrivals(), leaving=st.none() | st.tuples(st.integers(0, 5), st.integers(0, 12)))
def test_tokens_are_the_same_alone_and_in_any_company(
    policy: str,
    arriving: list[tuple[int, int, tuple[Prompt, Arguments]]],
    leaving: tuple[int, int] | None,
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Requests come between steps, take rows of less urgent ones, wait for rows, and one of them may be aborted."""
    llm = make_llm(**TIGHT, scheduling_policy=policy)
    outputs: dict[str, Any] = {}
    step = 0
    gone = None
    for number, (gap, priority, (prompt, arguments)) in enumerate(arriving):
        for _ in range(gap):
            outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
            step += 1
            if leaving and step >= leaving[1] and gone is None and leaving[0] < number:
                gone = f"x{leaving[0]}"
                llm.engine.abort_request(gone)
        llm.engine.add_request(f"x{number}", prompt, stage.SamplingParams(**arguments), priority=priority)
    finish_all(llm, outputs)
    check_empty(stage, llm)
    for number, (_, _, request) in enumerate(arriving):
        if f"x{number}" != gone:
            check_as_alone(stage, llm, get_oracle("qwen3"), request, outputs[f"x{number}"])


@pytest.mark.parametrize("checkpoint", SPECS)
def test_a_batch_is_the_oracles(checkpoint: str, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    """Prompts of all lengths, greedy and drawn, more of them than rows."""
    llm = make_llm(checkpoint, max_model_len=128, max_num_seqs=5)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 90, 17, 2, 40, 5, 64, 33)]
    params = [
        stage.SamplingParams(temperature=number % 2, seed=number, max_tokens=4 + 3 * number, ignore_eos=True)
        for number in range(8)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert len(output.token_ids) == each.max_tokens
        get_oracle(checkpoint).check(prompt, output.token_ids, each)


def test_nothing_is_read_but_what_a_sequence_wrote(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Slots of others, of who was here before, and of nobody may hold anything."""
    llm = make_llm(**TIGHT)
    requests: Requests = [
        ([number] * length, {"temperature": 0.0, "max_tokens": 2 + number, "ignore_eos": True})
        for number, length in enumerate([1, 40, 7, 30, 55, 3, 12])
    ]
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    clean = [alone(stage, llm, request).token_ids for request in requests]
    forget_prefixes(llm)
    try:
        for cache in caches(stage, llm):
            cache.fill_(float("nan"))
        outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
        assert [output.token_ids for output in outputs] == clean
    finally:
        for cache in caches(stage, llm):
            cache.zero_()
        forget_prefixes(llm)


def test_output_survives_urgent_preemption(stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    """Rows are taken from sequences in the middle of their outputs, twice from some; tokens are those of before."""
    llm = make_llm(**TIGHT, scheduling_policy="priority")
    counts = llm.engine.core.scheduler.num_preemptions
    before = counts["urgent"]
    requests: Requests = [
        ([3, 1, 4], {"temperature": 0.0, "max_tokens": 14, "ignore_eos": True}),
        ([1, 5, 9, 2], {"temperature": 1.0, "seed": 6, "max_tokens": 14, "ignore_eos": True, "logprobs": 1}),
        ([6, 5], {"temperature": 0.9, "seed": 7, "max_tokens": 14, "ignore_eos": True, "frequency_penalty": 1.5}),
        ([3, 5, 8], {"temperature": 1.0, "seed": 9, "max_tokens": 3, "n": 2, "ignore_eos": True}),
        ([9, 7, 9], {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True}),
    ]
    seen: dict[str, list[int]] = {}
    outputs = {}
    for number, (prompt, arguments) in enumerate(requests):
        if number >= 3:
            for _ in range(4):
                for output in llm.engine.step():
                    seen[output.request_id] = list(output.token_ids)
                    outputs[output.request_id] = output  # the engine's own, which goes on growing
        priority = 5 if number < 3 else 3 - number
        llm.engine.add_request(f"x{number}", prompt, stage.SamplingParams(**arguments), priority=priority)
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            ids = seen.get(output.request_id, [])
            assert output.token_ids[: len(ids)] == ids, "output was lost, or came twice"
            seen[output.request_id] = list(output.token_ids)
            outputs[output.request_id] = output
    has_chunks = getattr(llm.config, "enable_chunked_prefill", False)  # one came in a step with decodes: one row less
    assert counts["urgent"] - before >= (2 if has_chunks else 3)
    for number, request in enumerate(requests):
        check_as_alone(stage, llm, get_oracle("qwen3"), request, outputs[f"x{number}"])
    assert len(outputs["x1"].outputs[0].logprobs) == 14


# ---------------------------------------------------------------------- everybody's own parameters


def push(token: int) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
    """A logits processor that likes a token more, the longer the sequence is."""

    def processor(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[token] += len(token_ids)
        return logits

    return processor


PARAMETERS: dict[str, Arguments] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.5, "seed": 1},
    "cold": {"temperature": 0.1, "seed": 2},
    "top_k": {"temperature": 1.5, "seed": 3, "top_k": 3},
    "top_p": {"temperature": 1.5, "seed": 4, "top_p": 0.3},
    "min_p": {"temperature": 1.5, "seed": 5, "min_p": 0.3},
    "presence": {"temperature": 0.0, "presence_penalty": 2.0},
    "frequency": {"temperature": 1.0, "seed": 6, "frequency_penalty": -2.0},
    "repetition": {"temperature": 0.0, "repetition_penalty": 2.0},
    "bias": {"temperature": 0.0, "logit_bias": {7: 9.0, 8: 8.9}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": list(range(256)), "ignore_eos": False},
    "stop": {"temperature": 1.0, "seed": 7, "stop": ["e"], "ignore_eos": False},
    "logprobs": {"temperature": 1.0, "seed": 8, "logprobs": 3},
    "all logprobs": {"temperature": 0.0, "logprobs": -1},
    "processor": {"temperature": 0.0, "logits_processors": [push(9)]},
    "processors": {"temperature": 1.0, "seed": 9, "logits_processors": [push(9), push(10)]},
}


@given(names=st.lists(st.sampled_from(list(PARAMETERS)), min_size=2, max_size=6))
def test_parameters_of_a_row_stay_in_it(names: list[str], stage: ModuleType, make_llm: MakeLLM) -> None:
    """Rows of equal prompts, so that only the parameters tell them apart; log-probabilities as well as tokens."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    prompt = [3, 1, 4, 1, 5]
    arguments = [{"max_tokens": 6, "ignore_eos": True, **PARAMETERS[name]} for name in names]
    outputs = llm.generate([prompt] * len(names), [stage.SamplingParams(**each) for each in arguments], use_tqdm=False)
    for name, each, output in zip(names, arguments, outputs, strict=True):
        expected = alone(stage, llm, (prompt, each))
        assert result_of(output) == result_of(expected), name
        ours, theirs = output.outputs[0].logprobs, expected.outputs[0].logprobs
        assert (ours is None) == (theirs is None) == ("logprobs" not in each)
        for one, other in zip(ours or [], theirs or [], strict=True):
            assert one.keys() == other.keys()
            assert [entry.rank for entry in one.values()] == [entry.rank for entry in other.values()]
            values = [entry.logprob for entry in other.values()]
            assert [entry.logprob for entry in one.values()] == pytest.approx(values, abs=1e-4)


def test_parameters_have_an_effect(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Else the test above would see nothing."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    common = {"max_tokens": 6, "ignore_eos": True}
    results = {name: alone(stage, llm, ([3, 1, 4, 1, 5], {**common, **each})) for name, each in PARAMETERS.items()}
    assert len({tuple(result.token_ids) for result in results.values()}) >= 12


# ---------------------------------------------------------------------- one row is one request at a time


def test_one_row_is_the_stage_before(
    stage: ModuleType, checkpoint_path: CheckpointPath, request: pytest.FixtureRequest
) -> None:
    """The same steps in the same order, the same tokens: batching switched off."""
    milestone: Milestone = request.node.callspec.params["stage"]
    before = importlib.import_module(known_stages()[milestone.number - 1])
    names = {field.name for field in dataclasses.fields(before.EngineConfig)}
    runs = []
    for package, switch in (
        (before, {"max_num_seqs": 1} if "max_num_seqs" in names else {}),
        (stage, {"max_num_seqs": 1}),
    ):
        switch |= {**phases_apart(package), **no_prefix_cache(package)}
        with open_llm(package, checkpoint_path("qwen2"), max_model_len=MAX_MODEL_LEN, **switch) as llm:

            def params(package: ModuleType = package, **arguments: Any) -> Any:
                return package.SamplingParams(**{"max_tokens": 7, **arguments})

            engine, tokens = llm.engine, {}
            engine.add_request("a", [1, 2, 3], params(temperature=0.0, ignore_eos=True))
            engine.add_request("b", [5] * 20, params(n=3))
            engine.add_request("c", [7], params(seed=4, stop=["e", "t"]))
            engine.add_request("d", [7, 8], params(seed=5, max_tokens=1))
            for step in range(1000):
                if step == 2:
                    engine.add_request("e", [9] * 30, params(temperature=1.3, logprobs=1, max_tokens=None))
                if step == 4:
                    engine.abort_request("c")
                    engine.add_request("c", [4, 4], params(seed=6))
                if not engine.has_unfinished_requests():
                    break
                for output in engine.step():
                    tokens[output.request_id] = result_of(output)
            records = engine.stats.steps
            steps = [(record.phase, record.num_tokens, record.seq_ids, record.kv_slots) for record in records]
            runs.append((steps, tokens, [len(record.seq_ids) for record in records]))
    assert runs[0] == runs[1]
    assert set(runs[1][2]) == {1}


# ---------------------------------------------------------------------- what users see


def test_results_keep_their_place_while_requests_overtake_each_other(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(**TIGHT)
    lengths = [9, 1, 5, 2, 7, 3]
    params = [stage.SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in lengths]
    finished = [
        output.prompt_token_ids[0] for output in llm.stream([[at + 1] for at in range(6)], params) if output.finished
    ]
    assert sorted(finished) == [1, 2, 3, 4, 5, 6] != finished
    outputs = llm.generate([[at + 1] for at in range(6)], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[at + 1] for at in range(6)]
    assert [len(output.token_ids) for output in outputs] == lengths


def test_a_stream_of_several_requests_interleaves(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Everybody's tokens come as they are made, step by step; each one's deltas concatenate to his text."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    params = stage.SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    outputs = list(llm.stream([[1], [2, 3], [4, 5, 6]], params))
    order = [output.request_id for output in outputs]
    assert len(set(order)) == 3 and order == order[:3] * 6, "in every step each of the three"
    by_request = sorted(outputs, key=lambda output: order.index(output.request_id))
    for _, group in groupby(by_request, key=lambda output: output.request_id):
        each = list(group)
        assert "".join(output.delta for output in each) == each[-1].text
        assert [len(output.token_ids) for output in each] == [1, 2, 3, 4, 5, 6]
        expected = alone(
            stage, llm, (each[0].prompt_token_ids, {"temperature": 1.0, "seed": 3, "max_tokens": 6, "ignore_eos": True})
        )
        assert result_of(each[-1]) == result_of(expected)


def test_requests_may_be_added_while_others_run(stage: ModuleType, make_llm: MakeLLM) -> None:
    """They share steps with those that are there; nobody waits for anybody's end."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    llm.engine.stats.clear()
    params = stage.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs: dict[str, Any] = {}
    for number in range(6):
        llm.engine.add_request(f"{number}", [number + 1], params)
        for _ in range(2):
            outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
    finish_all(llm, outputs)
    for number in range(6):
        assert (
            outputs[f"{number}"].token_ids
            == alone(stage, llm, ([number + 1], {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True})).token_ids
        )
    assert max(len(step.seq_ids) for step in llm.engine.stats.steps) >= 4


def test_n_sequences_run_side_by_side(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    llm.engine.stats.clear()
    params = stage.SamplingParams(n=5, seed=1, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert [len(completion.token_ids) for completion in output.outputs] == [6] * 5
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 5
    assert [len(step.seq_ids) for step in llm.engine.stats.steps].count(5) >= 5


def failing_at(stage: ModuleType, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """The model's `at`-th forward pass from now on raises `error`, after it has written its part of the cache."""
    model_class = submodule(stage, "model_executor.models.llama").LlamaForCausalLM
    forward, calls = model_class.forward, iter(range(10_000))

    def failing(self: Any, *arguments: Any) -> Any:
        hidden = forward(self, *arguments)
        if next(calls) == at:
            raise error
        return hidden

    patch.setattr(model_class, "forward", failing)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of some memory")], ids=["ctrl_c", "fault"])
def test_other_users_requests_survive(
    stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle, call: str, at: int, error: BaseException
) -> None:
    """A call in the middle of a batch is interrupted, or the engine fails: it is gone, and theirs go on as before."""
    llm = make_llm(**TIGHT)
    theirs: Requests = [
        ([1, 2, 3], {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}),
        ([4] * 20, {"temperature": 1.0, "seed": 5, "max_tokens": 9, "ignore_eos": True, "repetition_penalty": 1.3}),
        ([5], {"temperature": 1.0, "seed": 6, "max_tokens": 5, "n": 2}),
    ]
    for number, (prompt, arguments) in enumerate(theirs):
        llm.engine.add_request(f"theirs{number}", prompt, stage.SamplingParams(**arguments))
    outputs: dict[str, Any] = {}
    for _ in range(2):
        outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
    seen: list[Any] = [llm.engine.get_output(f"theirs{number}") for number in range(3)]
    mine = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        failing_at(stage, patch, at, error)
        with pytest.raises(type(error)):
            list(getattr(llm, call)([[8], [9, 9]], mine))
    finish_all(llm)
    for request, output in zip(theirs, seen, strict=True):
        check_as_alone(stage, llm, get_oracle("qwen3"), request, output)
    check_empty(stage, llm)


@given(steps=st.lists(st.integers(0, 8), min_size=1, max_size=4), policy=st.sampled_from(["fcfs", "priority", "sjf"]))
def test_steps_that_fail_are_done_again(
    steps: list[int], policy: str, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """At any moment and more than once: everybody ends as if nothing had been."""
    llm = make_llm(**TIGHT, scheduling_policy=policy)
    requests: Requests = [
        ([1, 2, 3], {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True}),
        ([4] * 30, {"temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True, "presence_penalty": 1.3}),
        ([5] * 40, {"temperature": 1.0, "seed": 6, "max_tokens": 3, "n": 2}),
    ]
    outputs = {}
    for number, (prompt, arguments) in enumerate(requests):
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments), priority=-number)
    for wait in steps:
        with pytest.MonkeyPatch.context() as patch:
            failing_at(stage, patch, wait, RuntimeError("once"))
            for _ in range(wait + 1):
                try:
                    outputs.update({each.request_id: each for each in llm.engine.step() if each.finished})
                except RuntimeError:
                    assert llm.engine.has_unfinished_requests()
    finish_all(llm, outputs)
    for number, request in enumerate(requests):
        check_as_alone(stage, llm, get_oracle("qwen3"), request, outputs[f"{number}"])
    check_empty(stage, llm)


def test_nothing_of_who_left_remains(stage: ModuleType, make_llm: MakeLLM) -> None:
    """After the next step not even the runner's rows remember him."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    params = stage.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, presence_penalty=1.0)
    llm.engine.add_request("stays", [1], params)
    for name in ("finishes", "aborted"):
        llm.engine.add_request(name, [2], dataclasses.replace(params, max_tokens=3))
    gone = [weakref.ref(seq) for seq in llm.engine.core.scheduler._seqs.values() if seq.request_id != "stays"]
    assert len(gone) == 2
    llm.engine.step()
    llm.engine.step()
    llm.engine.abort_request("aborted")
    for _ in range(2):
        llm.engine.step()
    gc.collect()
    assert [seq() for seq in gone] == [None, None]
    assert list(llm.engine.worker.model_runner.input_batch.rows) == ["stays-0"]
    finish_all(llm)


# ---------------------------------------------------------------------- priorities of a call


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("priority", [[], [1], [1, 2, 3], 1, "12", [1, "2"], [1, None], [0.5, 1]])
def test_priorities_are_checked_before_anything_runs(
    stage: ModuleType, make_llm: MakeLLM, call: str, priority: Any
) -> None:
    """One integer for each prompt. Nothing of the call stays behind."""
    for policy in ("fcfs", "priority"):
        llm = make_llm(**TIGHT, scheduling_policy=policy)
        llm.engine.stats.clear()
        with pytest.raises(ValueError, match="priority"):
            list(getattr(llm, call)([[1], [2]], stage.SamplingParams(max_tokens=2), priority=priority))
        assert llm.engine.stats.steps == []
        check_empty(stage, llm)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_priorities_of_a_call(stage: ModuleType, checkpoint_path: CheckpointPath, call: str) -> None:
    """The smallest is served first; results of `generate` stay in the order of the prompts."""
    with open_llm(
        stage, checkpoint_path("qwen3"), max_model_len=MAX_MODEL_LEN, max_num_seqs=1, scheduling_policy="priority"
    ) as llm:
        params = stage.SamplingParams(max_tokens=2, ignore_eos=True)
        outputs = list(getattr(llm, call)([[1], [2], [3]], params, priority=[2, 0, 1]))
        order = [int(step.seq_ids[0].split("-")[1]) for step in llm.engine.stats.steps[::2]]
        first = min(order)
        assert [number - first for number in order] == [1, 2, 0]
        expected = [[1], [2], [3]] if call == "generate" else [[2], [3], [1]]
        assert [output.prompt_token_ids for output in outputs if output.finished] == expected
