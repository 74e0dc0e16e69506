"""LLMEngine under any order of events: requests come and go, users leave, code fails, and nothing is left behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from .. import strategies
from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, GetOracle, MakeLLM, open_llm, submodule
from ..oracle import LOGIT_TOLERANCE

pytestmark = pytest.mark.since("m1")

MAX_MODEL_LEN = 64

# Requests whose outputs depend on nothing but themselves.
POOL: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}),
    ([7] * 20, {"temperature": 1.0, "seed": 5, "max_tokens": 9}),
    (list(range(50, 90)), {"temperature": 0.7, "seed": 1, "top_p": 0.9, "top_k": 50, "max_tokens": 4}),
    ([9, 8], {"n": 3, "seed": 11, "max_tokens": 5}),
    ([9, 8, 7], {"n": 2, "seed": 2**63 - 1, "max_tokens": 3, "repetition_penalty": 1.5}),
    ([4], {"temperature": 1.0, "seed": 3, "max_tokens": 1}),
    ([4, 5], {"temperature": 1.3, "seed": 4, "max_tokens": 20, "stop": ["e", "th"], "min_p": 0.01}),
    ([30, 31], {"temperature": 0.0, "max_tokens": 7, "logprobs": 2, "min_tokens": 3, "frequency_penalty": 1.0}),
    (list(range(100, 163)), {"temperature": 0.0, "max_tokens": None}),
]

Result = list[tuple[list[int], str, str | None]]


def result_of(output: Any) -> Result:
    return [(list(each.token_ids), each.text, each.finish_reason) for each in output.outputs]


def leftovers(stage: ModuleType, engine: Any) -> list[str]:
    """Where in the engine there still are requests, sequences or outputs; records of past steps do not count.

    The model runner's own picture of the batch does not count either: it hears of who has left at its next step.
    """
    tracked = (stage.Request, stage.Sequence, stage.RequestOutput, stage.CompletionOutput)
    found: list[str] = []
    seen: set[int] = set()

    def look(value: Any, path: str) -> None:
        if id(value) in seen or isinstance(value, (torch.Tensor, torch.nn.Module)):
            return
        seen.add(id(value))
        if isinstance(value, tracked):
            found.append(path)
        elif isinstance(value, dict):
            look_at_all(value.values(), f"{path}[…]")
        elif isinstance(value, (list, tuple, set, deque)):
            look_at_all(value, f"{path}[…]")
        elif type(value).__module__.partition(".")[0] == stage.__name__ and type(value).__name__ != "InputBatch":
            for name, part in getattr(value, "__dict__", {}).items():  # a block of the cache has none
                look(part, f"{path}.{name}")

    def look_at_all(values: Iterable[Any], path: str) -> None:
        for value in values:
            look(value, path)

    look(engine, "engine")
    return found


def check_empty(stage: ModuleType, llm: Any) -> None:
    assert not llm.engine.has_unfinished_requests()
    assert leftovers(stage, llm.engine) == []
    assert [name for name, value in vars(llm).items() if isinstance(value, (dict, list, deque)) and value] == []
    assert llm.engine.step() == []


def check_usable(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    """Nothing is left of what went before, and the engine says what it always said."""
    check_empty(stage, llm)
    assert [alone(stage, llm, index) for index in range(4)] == expected[:4]
    check_empty(stage, llm)


def alone(stage: ModuleType, llm: Any, index: int) -> Result:
    prompt, arguments = POOL[index]
    return result_of(llm.generate([prompt], stage.SamplingParams(**arguments), use_tqdm=False)[0])


@pytest.fixture
def llm(make_llm: MakeLLM) -> Any:
    return make_llm(max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def expected(stage: ModuleType, llm: Any) -> list[Result]:
    """What each request of the pool says when it is alone."""
    return [alone(stage, llm, index) for index in range(len(POOL))]


def test_leftovers_are_found(stage: ModuleType, llm: Any) -> None:
    llm.engine.add_request("a", [1, 2])
    assert len(leftovers(stage, llm.engine)) >= 2
    llm.engine.abort_request("a")
    check_empty(stage, llm)


# ---------------------------------------------------------------------- any order of events


class Engine(RuleBasedStateMachine):
    """Requests are added, brought on and aborted; those that finish say what they say alone."""

    def __init__(self, stage: ModuleType, llm: Any, expected: list[Result]) -> None:
        super().__init__()
        self.stage, self.llm, self.expected = stage, llm, expected
        self.live: dict[str, int] = {}  # request id -> number in the pool
        self.num_tokens: dict[str, int] = {}

    @rule(request_id=st.sampled_from("abcdef"), index=st.integers(0, len(POOL) - 1))
    def add(self, request_id: str, index: int) -> None:
        """An id may come again, but not while it is in use."""
        prompt, arguments = POOL[index]
        if request_id in self.live:
            with pytest.raises(ValueError, match=f"'{request_id}' is in use"):
                self.llm.engine.add_request(request_id, prompt, self.stage.SamplingParams(**arguments))
            return
        request = self.llm.engine.add_request(request_id, prompt, self.stage.SamplingParams(**arguments))
        assert request.request_id == request_id
        self.live[request_id] = index
        self.num_tokens[request_id] = 0

    @rule(bad=st.sampled_from([[], [VOCAB_SIZE], [1] * MAX_MODEL_LEN, 5]))
    def add_what_cannot_be_served(self, bad: Any) -> None:
        with pytest.raises(ValueError, match=r"prompt|token"):
            self.llm.engine.add_request("bad", bad)

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.llm.engine.step():
                self.take_in(output)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.llm.engine.abort_request(request_id)
        del self.live[request_id]

    @rule()
    def abort_what_is_not_there(self) -> None:
        self.llm.engine.abort_request("nobody")

    @invariant()
    def it_knows_whether_there_is_work(self) -> None:
        assert self.llm.engine.has_unfinished_requests() == bool(self.live)
        if not self.live:
            check_empty(self.stage, self.llm)

    def take_in(self, output: Any) -> None:
        assert output.request_id in self.live, "an output of a request that is gone"
        expected = self.expected[self.live[output.request_id]]
        for (ids, text, _), (expected_ids, expected_text, _) in zip(result_of(output), expected, strict=True):
            assert ids == expected_ids[: len(ids)]
            assert expected_text.startswith(text)
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        assert num_tokens > self.num_tokens[output.request_id], "an output that brings nothing"
        self.num_tokens[output.request_id] = num_tokens
        if output.finished:
            assert result_of(output) == expected
            del self.live[output.request_id]

    def teardown(self) -> None:
        try:
            for _ in range(1000):
                if not self.live:
                    break
                self.step(1)
            assert self.live == {}
            check_empty(self.stage, self.llm)
        finally:
            for request_id in self.live:
                self.llm.engine.abort_request(request_id)


def test_any_order_of_events(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    class ThisEngine(Engine):
        def __init__(self) -> None:
            super().__init__(stage, llm, expected)

    run_state_machine_as_test(ThisEngine, settings=settings(stateful_step_count=30))  # type: ignore[no-untyped-call]


@given(
    requests=strategies.requests(min_size=2, max_size=4),
    aborted=st.integers(0, 3),
    steps=st.integers(0, 30),
)
def test_an_abort_does_not_disturb_the_neighbours(
    requests: list[tuple[list[int], dict[str, Any]]],
    aborted: int,
    steps: int,
    stage: ModuleType,
    make_llm: MakeLLM,
) -> None:
    """At any step, of a request in any place; seeded draws included."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    undisturbed = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    for index, (prompt, _) in enumerate(requests):
        llm.engine.add_request(f"x{index}", prompt, params[index])
    results = {}
    for step in range(1000):
        if step == steps:
            llm.engine.abort_request(f"x{aborted % len(requests)}")
        if not llm.engine.has_unfinished_requests():
            break
        results.update({each.request_id: result_of(each) for each in llm.engine.step() if each.finished})
    for index, output in enumerate(undisturbed):
        assert results.get(f"x{index}", result_of(output)) == result_of(output)
        assert f"x{index}" in results or index == aborted % len(requests)
    check_empty(stage, llm)


def test_default_parameters(stage: ModuleType, llm: Any) -> None:
    request = llm.engine.add_request("a", "the book")
    assert request.sampling_params == llm.get_default_sampling_params()
    assert request.prompt_token_ids == llm.tokenizer.encode("the book")
    llm.engine.abort_request("a")
    check_empty(stage, llm)


# ---------------------------------------------------------------------- users who leave


class Interrupter:
    """A logits processor that raises `error` at the request's `at`-th token, once."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error: BaseException | None = error
        self.at = at

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.at -= 1
        if self.at <= 0 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return logits


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_ctrl_c(stage: ModuleType, llm: Any, expected: list[Result], call: str, at: int, place: int) -> None:
    """It may come at any moment; here it comes in the middle of a step, from a logits processor."""
    params = stage.SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    each = [params] * 3
    each[place] = replace(params, logits_processors=[Interrupter(KeyboardInterrupt(), at)])
    with pytest.raises(KeyboardInterrupt):
        list(getattr(llm, call)([[1], [2, 3], [4]], each))
    check_usable(stage, llm, expected)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_between_two_steps(
    stage: ModuleType, llm: Any, expected: list[Result], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = llm.engine.step, iter(range(100))

    def interrupted_step() -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            list(getattr(llm, call)([[1], [2, 3]], stage.SamplingParams(max_tokens=5, ignore_eos=True)))
    check_usable(stage, llm, expected)


def test_whoever_steps_the_engine_may_go_on_after_ctrl_c(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    """A step that was interrupted has not happened: the next one does its work."""
    for at in (1, 2, 4):
        prompt, arguments = POOL[0]
        params = stage.SamplingParams(**arguments, logits_processors=[Interrupter(KeyboardInterrupt(), at)])
        llm.engine.add_request("a", prompt, params)
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.engine.step()
        outputs = []
        while llm.engine.has_unfinished_requests():
            outputs.extend(llm.engine.step())
        assert result_of(outputs[-1]) == expected[0]
    check_empty(stage, llm)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_leaving_a_stream_early_aborts_it(stage: ModuleType, llm: Any, expected: list[Result], num_steps: int) -> None:
    stream = llm.stream([[1], [2, 3], [4]], stage.SamplingParams(max_tokens=3, ignore_eos=True))
    for _ in range(num_steps):
        next(stream)
    assert llm.engine.has_unfinished_requests() == (num_steps > 0)
    stream.close()
    check_usable(stage, llm, expected)


def test_an_error_in_the_loop_of_a_stream_aborts_it(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    def consume() -> None:
        for _ in llm.stream([[1], [2]], stage.SamplingParams(max_tokens=5, ignore_eos=True)):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        consume()
    check_usable(stage, llm, expected)


@pytest.mark.timeout(60)
def test_calls_may_overlap(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    """A stream waits half-way while another stream and a `generate` run: everybody gets all of his own."""
    streams = [llm.stream([POOL[i][0]], stage.SamplingParams(**POOL[i][1])) for i in (0, 1)]
    seen = [[next(stream)] for stream in streams]
    assert alone(stage, llm, 2) == expected[2]
    seen[0].append(next(streams[0]))
    assert alone(stage, llm, 3) == expected[3]
    for index in (1, 0):
        seen[index].extend(streams[index])
        assert result_of(seen[index][-1]) == expected[index]
        assert "".join(output.delta for output in seen[index]) == seen[index][-1].text
    check_empty(stage, llm)


@pytest.mark.timeout(60)
def test_calls_leave_the_users_own_requests_alone(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    """Who adds requests by hand may call `generate` in between; the engine's own ids do not meet his."""
    prompt, arguments = POOL[4]
    llm.engine.add_request("mine", prompt, stage.SamplingParams(**arguments))
    llm.engine.step()
    assert alone(stage, llm, 1) == expected[1]
    llm.engine.abort_request("mine")
    check_empty(stage, llm)


# ---------------------------------------------------------------------- code that fails


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_processor_ends_its_own_request(
    stage: ModuleType, llm: Any, expected: list[Result], at: int, place: int
) -> None:
    params = stage.SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    prompts = [[1], [2, 3], [4]]
    whole = [result_of(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    each = [params] * 3
    each[place] = replace(params, logits_processors=[Interrupter(KeyError("oh no"), at)])
    outputs = llm.generate(prompts, each, use_tqdm=False)
    for index, output in enumerate(outputs):
        assert output.finished
        if index != place:
            assert result_of(output) == whole[index]
    (failed,) = outputs[place].outputs
    assert (failed.finish_reason, failed.stop_reason) == ("error", "KeyError: 'oh no'")
    assert failed.token_ids == whole[place][0][0][: at - 1]
    assert failed.text == llm.tokenizer.decode(failed.token_ids).rstrip("\ufffd")
    check_usable(stage, llm, expected)


def test_text_that_was_held_back_survives_an_error(stage: ModuleType, llm: Any) -> None:
    """It might have become a stop string; now it will not."""
    params = stage.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logit_bias={40: 100})
    text = llm.generate([[1]], replace(params, max_tokens=3), use_tqdm=False)[0].text
    failing = replace(params, stop="never said by anyone", logits_processors=[Interrupter(ValueError("x"), 4)])
    outputs = list(llm.stream([[1]], failing))
    assert outputs[-1].outputs[0].finish_reason == "error"
    assert outputs[-1].text == "".join(output.delta for output in outputs) == text != ""


def test_a_failing_processor_of_one_of_several_sequences(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    prompt, arguments = POOL[3]
    params = stage.SamplingParams(**arguments, logits_processors=[Interrupter(RuntimeError("once"), 2)])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    reasons = [completion.finish_reason for completion in output.outputs]
    assert reasons.count("error") == 1
    for completion, (ids, _, _) in zip(output.outputs, expected[3], strict=True):
        assert completion.token_ids == ids[: len(completion.token_ids)]
    check_usable(stage, llm, expected)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("what", ["forward", "compute_logits"])
def test_a_fault_of_the_engine_ends_the_call(
    stage: ModuleType,
    llm: Any,
    expected: list[Result],
    call: str,
    at: int,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call's requests are gone, the error is the original one, and the engine can be used again."""
    model_class = submodule(stage, "model_executor.models.llama").LlamaForCausalLM
    original, calls = getattr(model_class, what), iter(range(100))

    def failing(self: Any, *arguments: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("out of some memory")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model_class, what, failing)
        with pytest.raises(RuntimeError, match="out of some memory"):
            list(getattr(llm, call)([[1], [2, 3]], stage.SamplingParams(max_tokens=5, ignore_eos=True)))
    check_usable(stage, llm, expected)


def test_close_drops_what_is_unfinished(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    llm = open_llm(stage, checkpoint_path("qwen3"), max_model_len=MAX_MODEL_LEN)
    llm.engine.add_request("a", [1, 2], stage.SamplingParams(n=2, max_tokens=5))
    llm.engine.add_request("b", [1, 2])
    llm.engine.step()
    llm.close()
    assert not llm.engine.has_unfinished_requests()
    assert leftovers(stage, llm.engine) == []


# ---------------------------------------------------------------------- several sequences


@given(prompt=strategies.prompts(), seed=strategies.INT64, n=st.integers(2, 4), temperature=st.floats(0.3, 2.0))
def test_a_sequence_draws_with_the_seed_plus_its_number(
    prompt: list[int], seed: int, n: int, temperature: float, stage: ModuleType, make_llm: MakeLLM
) -> None:
    llm = make_llm()
    params = stage.SamplingParams(n=n, seed=seed, temperature=temperature, max_tokens=5)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == list(range(n))
    if seed == -1:  # no seed at all
        return
    for index, result in enumerate(result_of(output)):
        own = (seed + index + 2**63) % 2**64 - 2**63  # 64 bits wrap around
        if own != -1:
            single = llm.generate([prompt], replace(params, n=1, seed=own), use_tqdm=False)[0]
            assert result_of(single) == [result]


def test_sequences_without_a_seed_differ(stage: ModuleType, llm: Any) -> None:
    (output,) = llm.generate([[1, 2]], stage.SamplingParams(n=10, max_tokens=8, ignore_eos=True), use_tqdm=False)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 10


def test_a_stream_of_several_sequences(stage: ModuleType, llm: Any, expected: list[Result]) -> None:
    """Each has its own delta; a step that brings a sequence nothing leaves its delta empty."""
    prompt, arguments = POOL[3]
    outputs = list(llm.stream([prompt], stage.SamplingParams(**arguments)))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert result_of(outputs[-1]) == expected[3]
    for index, (_, text, _) in enumerate(expected[3]):
        assert "".join(output.outputs[index].delta for output in outputs) == text


# ---------------------------------------------------------------------- log-probabilities


@given(
    prompt=strategies.prompts(), arguments=strategies.full(max_tokens=5), num=st.sampled_from([None, 0, 1, 5, 20, -1])
)
def test_logprobs(
    prompt: list[int],
    arguments: dict[str, Any],
    num: int | None,
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Of the model's own distribution, before any parameter; the token that came stands first."""
    llm = make_llm()
    params = stage.SamplingParams(**arguments, logprobs=num)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    (completion,) = output.outputs
    if num is None:
        assert completion.logprobs is None and completion.cumulative_logprob is None
        return
    logits = get_oracle("qwen3").logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
    rows = logits.double().log_softmax(-1)
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, entries, row in zip(completion.token_ids, completion.logprobs, rows, strict=True):
        assert next(iter(entries)) == token
        best = row.argsort(descending=True).tolist()
        wanted = VOCAB_SIZE if num == -1 else num
        assert len(entries) == (wanted if entries[token].rank <= wanted else wanted + 1)
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[other]), abs=LOGIT_TOLERANCE)
            assert float(row[best[entry.rank - 1]]) == pytest.approx(float(row[other]), abs=2 * LOGIT_TOLERANCE)
            assert entry.decoded_token == llm.tokenizer.decode([other])
        ranks = [entry.rank for other, entry in entries.items() if other != token]
        assert ranks == [rank for rank in range(1, wanted + 1) if rank != entries[token].rank]
    total = sum(
        entries[token].logprob for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-6)


def test_everybody_gets_as_many_logprobs_as_he_asked_for(stage: ModuleType, llm: Any) -> None:
    wanted = [None, 0, 3, -1, 1]
    params = [stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=num) for num in wanted]
    outputs = llm.generate([[1, 2]] * 5, params, use_tqdm=False)
    sizes = [each.outputs[0].logprobs and [len(entries) for entries in each.outputs[0].logprobs] for each in outputs]
    assert sizes == [None, [1, 1], [3, 3], [VOCAB_SIZE] * 2, [1, 1]]


def test_logprobs_grow_with_a_stream(stage: ModuleType, llm: Any) -> None:
    params = stage.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    outputs = list(llm.stream([[1, 2]], params))
    assert [len(output.outputs[0].logprobs) for output in outputs] == [1, 2, 3, 4]
    sums = [output.outputs[0].cumulative_logprob for output in outputs]
    assert sums == sorted(sums, reverse=True) and sums[0] < 0


@pytest.mark.timeout(30)
def test_a_stream_ends_when_its_request_is_ended_by_others(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Aborted, one of its sequences finished from outside, or stepped to its end by somebody else."""
    llm = make_llm()
    params = stage.SamplingParams(max_tokens=6, ignore_eos=True, seed=1)

    stream = llm.stream([1, 2], params)
    llm.engine.abort_request(next(stream).request_id)
    last = list(stream)[-1]
    assert (last.finished, last.outputs[0].finish_reason, len(last.token_ids)) == (True, "abort", 1)

    stream = llm.stream([1, 2], stage.SamplingParams(n=2, max_tokens=3, ignore_eos=True, seed=1))
    first = next(stream)
    llm.engine.finish_sequence(f"{first.request_id}-1", stage.SequenceStatus.FINISHED_ABORTED)
    last = list(stream)[-1]
    assert [output.finish_reason for output in last.outputs] == ["length", "abort"]

    stream = llm.stream([1, 2], params)
    next(stream)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    last = list(stream)[-1]
    assert (last.finished, len(last.token_ids)) == (True, 6)

    llm.engine.finish_sequence("nobody", stage.SequenceStatus.FINISHED_ABORTED)
    assert not llm.engine.has_unfinished_requests()


def test_ctrl_c_before_the_first_step(stage: ModuleType, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    llm = make_llm()
    monkeypatch.setattr(submodule(stage, "llm"), "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1, 2], stage.SamplingParams(max_tokens=2))
    assert not llm.engine.has_unfinished_requests()


# ---------------------------------------------------------------------- whoever turns the crank


@pytest.mark.timeout(60)
@given(turns=st.lists(st.sampled_from(["mine", "theirs", "step", "step"]), min_size=4, max_size=40))
def test_streams_lose_nothing_when_others_step(turns: list[str], stage: ModuleType, make_llm: MakeLLM) -> None:
    """Pieces concatenate to the text, whoever turns the crank; who comes late gets several tokens at once."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    wanted = {"mine": POOL[3], "theirs": POOL[6]}
    expected = {
        name: result_of(llm.generate([prompt], stage.SamplingParams(**arguments), use_tqdm=False)[0])
        for name, (prompt, arguments) in wanted.items()
    }
    streams = {
        name: llm.stream([prompt], stage.SamplingParams(**arguments)) for name, (prompt, arguments) in wanted.items()
    }
    seen: dict[str, list[Any]] = {name: [next(stream)] for name, stream in streams.items()}
    for turn in turns:
        if turn == "step":
            llm.engine.step()
        else:
            seen[turn].extend(output for output in [next(streams[turn], None)] if output is not None)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    for name, stream in streams.items():
        seen[name].extend(stream)
        assert [output.finished for output in seen[name]] == [False] * (len(seen[name]) - 1) + [True]
        assert result_of(seen[name][-1]) == expected[name]
        for index, (_, text, _) in enumerate(expected[name]):
            assert "".join(output.outputs[index].delta for output in seen[name]) == text
        nums = [sum(len(completion.token_ids) for completion in output.outputs) for output in seen[name]]
        assert nums == sorted(set(nums)), "an output that brings nothing"
    check_empty(stage, llm)


@pytest.mark.parametrize("at", [1, 3])
def test_a_processor_may_abort_its_own_request(stage: ModuleType, llm: Any, expected: list[Result], at: int) -> None:
    """In the middle of a step. It ends there, and the others of the call go on."""
    calls = iter(range(100))

    def leave(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if next(calls) + 1 == at:
            llm.engine.abort_request(leaving)
        return logits

    for number in (0, 1):
        prompt, arguments = POOL[number]
        llm.engine.add_request(f"{number}", prompt, stage.SamplingParams(**arguments))
    leaving = llm.engine.add_request(
        "leaves", [1, 2], stage.SamplingParams(max_tokens=9, ignore_eos=True, logits_processors=[leave])
    ).request_id
    left = llm.engine.get_output(leaving)
    outputs: dict[str, Any] = {}
    while llm.engine.has_unfinished_requests():
        outputs.update({output.request_id: output for output in llm.engine.step() if output.finished})
    assert [result_of(outputs[name]) for name in ("0", "1")] == expected[:2]
    assert (left.outputs[0].finish_reason, len(left.token_ids)) == ("abort", at - 1)
    check_usable(stage, llm, expected)


def test_ids_of_calls_are_not_those_of_users(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """Whoever numbers his requests from 0 does not meet a call that does the same."""
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=MAX_MODEL_LEN) as llm:
        for number in range(3):
            llm.engine.add_request(f"{number}", [1, 2])
        params = stage.SamplingParams(max_tokens=2, ignore_eos=True)
        outputs = llm.generate([[1], [2], [3]], params, use_tqdm=False)
        assert [len(output.token_ids) for output in outputs] == [2, 2, 2]
        assert len({output.request_id for output in outputs} | {"0", "1", "2"}) == 6
