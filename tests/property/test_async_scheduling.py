"""Steps that are launched before the tokens of the step before are known: nobody can tell, but by the clock.

First the scheduler by hand: when it runs ahead, and when it must not. Then engines on the CPU, where `async_scheduling`
changes what is launched when, and no token: companies of requests that come, leave and fail at random, those who end
while a step with them is under way, and steps that fail while another is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..conftest import CheckpointPath, GetOracle, MakeLLM, forget_prefixes, open_llm, submodule
from .test_engine import check_empty, result_of
from .test_paged import check_pool, poison
from .test_scheduler import ANOTHER_TOKEN, EOS, Drive, ids, make_output, sampled_seqs

pytestmark = pytest.mark.since("m4")

# ---------------------------------------------------------------------- the scheduler by hand


def with_blocks(stage: ModuleType, **options: Any) -> Drive:
    """Blocks for everybody, unless the test says how many."""
    sizes = {"max_num_seqs": 4, "max_model_len": 64, "block_size": 4, "num_kv_blocks": 100}
    return Drive(stage, **{**sizes, **options})


def take_in(drive: Drive, scheduled: Any, token: int = ANOTHER_TOKEN) -> list[str]:
    """Everybody in the step got that token; who is told so."""
    output = make_output(drive.stage, [token] * len(sampled_seqs(scheduled)))
    return [each.seq.seq_id for each in drive.scheduler.update_from_output(scheduled, output)]


def state(drive: Drive) -> Any:
    """What a step that is not scheduled leaves as it is."""
    seqs = {name: (seq.num_computed_tokens, list(seq.block_table)) for name, seq in drive.seqs.items()}
    return seqs, drive.running, drive.waiting, drive.scheduler.kv_cache_manager.num_free_blocks


def check_refused(drive: Drive, scheduled: Any) -> None:
    before = state(drive)
    assert drive.scheduler.schedule_ahead(scheduled) is None
    assert state(drive) == before


def test_a_step_ahead_of_the_tokens(stage: ModuleType) -> None:
    """Each computes the token that the step before draws in its row; both steps are taken in, one after the other."""
    drive = with_blocks(stage)
    for name, length in (("a", 3), ("b", 5)):
        drive.add(name, length, 3)
    steps = [drive.scheduler.schedule()]
    steps.append(drive.scheduler.schedule_ahead(steps[0]))
    assert not steps[0].source_rows and steps[1].source_rows == [0, 1]
    assert steps[1].num_scheduled_tokens == {"a-0": 1, "b-0": 1} and ids(sampled_seqs(steps[1])) == ["a-0", "b-0"]
    assert not steps[1].is_prefill
    assert [len(drive.seqs[name].block_table) for name in ("a-0", "b-0")] == [1, 2], "slots for tokens yet unknown"
    assert [seq.num_computed_tokens for seq in drive.seqs.values()] == [4, 6]
    assert [seq.num_tokens for seq in drive.seqs.values()] == [3, 5]
    assert take_in(drive, steps[0], 7) == ["a-0", "b-0"]
    steps.append(drive.scheduler.schedule_ahead(steps[1]))
    assert take_in(drive, steps[1], 8) == ["a-0", "b-0"]
    check_refused(drive, steps[2])  # it draws their last tokens
    assert take_in(drive, steps[2], 9) == ["a-0", "b-0"]
    assert [seq.token_ids[-3:] for seq in drive.seqs.values()] == [[7, 8, 9]] * 2
    assert all(seq.status is stage.SequenceStatus.FINISHED_LENGTH for seq in drive.seqs.values())
    assert drive.scheduler.kv_cache_manager.num_used_blocks == 0


def test_who_draws_its_last_token_takes_no_part(stage: ModuleType) -> None:
    drive = with_blocks(stage)
    for name, max_tokens in (("a", 1), ("b", 3), ("c", 2), ("d", 4)):
        drive.add(name, 3, max_tokens)
    first = drive.scheduler.schedule()
    second = drive.scheduler.schedule_ahead(first)
    assert (ids(second.seqs), second.source_rows) == (["b-0", "c-0", "d-0"], [1, 2, 3])
    take_in(drive, first)
    third = drive.scheduler.schedule_ahead(second)
    assert (ids(third.seqs), third.source_rows) == (["b-0", "d-0"], [0, 2])
    take_in(drive, second)
    fourth = drive.scheduler.schedule_ahead(third)
    assert (ids(fourth.seqs), fourth.source_rows) == (["d-0"], [1])
    assert [step.retired_seq_ids for step in (first, second, third, fourth)] == [[], [], ["a-0"], ["c-0"]]


@pytest.mark.since("m5")
def test_rows_are_those_of_the_step_before(stage: ModuleType) -> None:
    """There decodes came first; a prompt that has begun got none, goes on beside them, and has no row."""
    drive = with_blocks(stage, max_num_batched_tokens=8, max_num_seqs=4)
    drive.add("long", 12, 9)
    take_in(drive, drive.scheduler.schedule())
    drive.add("short", 3, 9)
    scheduled = drive.scheduler.schedule()
    assert ids(scheduled.sampled_seqs) == ["long-0", "short-0"] == drive.running
    take_in(drive, scheduled)
    drive.add("third", 12, 9)
    scheduled = drive.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"long-0": 1, "short-0": 1, "third-0": 6}
    drive.scheduler.running.sort(key=lambda seq: seq.seq_id, reverse=True)  # as if admitted in another order
    ahead = drive.scheduler.schedule_ahead(scheduled)
    assert (ids(ahead.seqs), ahead.source_rows) == (["short-0", "long-0", "third-0"], [1, 0])
    assert ahead.num_scheduled_tokens == {"long-0": 1, "short-0": 1, "third-0": 6}
    assert ahead.phase == "mixed" and ids(ahead.sampled_seqs) == ["short-0", "long-0", "third-0"]
    take_in(drive, scheduled)
    last = drive.scheduler.schedule_ahead(ahead)
    assert (ids(last.seqs), last.source_rows) == (["third-0", "short-0", "long-0"], [2, 0, 1])


@pytest.mark.since("m5")
def test_the_more_urgent_prompt_goes_on_first(stage: ModuleType) -> None:
    """As in a step that is not ahead, whoever was admitted first."""
    drive = with_blocks(stage, max_num_batched_tokens=8, scheduling_policy="priority")
    drive.add("decode", 3, 9)
    drive.step()
    drive.add("late", 20, 9, priority=2)
    drive.step()
    drive.add("urgent", 20, 9, priority=1)
    scheduled = drive.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"decode-0": 1, "urgent-0": 7}
    assert drive.running == ["decode-0", "late-0", "urgent-0"]
    assert drive.scheduler.schedule_ahead(scheduled).num_scheduled_tokens == {"decode-0": 1, "urgent-0": 7}


@pytest.mark.parametrize("ending", ["FINISHED_ABORTED", "FINISHED_STOPPED"])
def test_who_ends_between_two_steps_leaves_the_next(stage: ModuleType, ending: str) -> None:
    """Its token, which is under way, is nobody's; that it is gone is told once."""
    drive = with_blocks(stage)
    for name in "abc":
        drive.add(name, 3, 9)
    first = drive.scheduler.schedule()
    second = drive.scheduler.schedule_ahead(first)
    take_in(drive, first)
    b = drive.scheduler.finish_sequence("b-0", stage.SequenceStatus[ending])
    assert b.block_table == [] and drive.scheduler.kv_cache_manager.num_used_blocks == 2
    third = drive.scheduler.schedule_ahead(second)
    assert (ids(third.seqs), third.source_rows, third.retired_seq_ids) == (["a-0", "c-0"], [0, 2], ["b-0"])
    assert take_in(drive, second) == ["a-0", "c-0"]
    assert b.num_output_tokens == 1 and b.block_table == []
    assert take_in(drive, third, EOS) == ["a-0", "c-0"]
    assert sorted(drive.scheduler.schedule().retired_seq_ids) == ["a-0", "c-0"]
    assert drive.scheduler.schedule().retired_seq_ids == []
    assert drive.scheduler.kv_cache_manager.num_used_blocks == 0


def test_who_turns_out_to_have_ended_is_passed_over(stage: ModuleType) -> None:
    drive = with_blocks(stage)
    for name in "ab":
        drive.add(name, 3, 9)
    first = drive.scheduler.schedule()
    second = drive.scheduler.schedule_ahead(first)
    output = make_output(stage, [EOS, ANOTHER_TOKEN])
    assert [each.seq.seq_id for each in drive.scheduler.update_from_output(first, output)] == ["a-0", "b-0"]
    third = drive.scheduler.schedule_ahead(second)
    assert (ids(third.seqs), third.source_rows, third.retired_seq_ids) == (["b-0"], [1], ["a-0"])
    assert take_in(drive, second, 8) == ["b-0"]
    assert [seq.token_ids[3:] for seq in drive.seqs.values()] == [[EOS], [ANOTHER_TOKEN, 8]]


def processor(token_ids: list[int], logits: Any) -> Any:
    return logits


ON_THE_HOST: list[dict[str, Any]] = [
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.1},
    {"min_tokens": 1},
    {"logprobs": 0},
    {"logprobs": 3},
    {"logit_bias": {3: 1.0}},
    {"logits_processors": [processor]},
]
ON_THE_DEVICE: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.5, "seed": 3, "top_k": 4, "top_p": 0.5, "min_p": 0.1},
    {"stop": ["x"], "stop_token_ids": [3], "ignore_eos": True},
    {"logit_bias": {}, "logits_processors": [], "skip_special_tokens": False},
]


@pytest.mark.parametrize("arguments", ON_THE_HOST, ids=lambda arguments: "-".join(arguments))
def test_not_where_the_host_takes_part_in_a_draw(stage: ModuleType, arguments: dict[str, Any]) -> None:
    drive = with_blocks(stage)
    drive.add("plain", 3, 9)
    drive.add("other", 3, 2, **arguments)
    first = drive.scheduler.schedule()
    check_refused(drive, first)
    take_in(drive, first)
    take_in(drive, drive.scheduler.schedule())
    assert drive.running == ["plain-0"], "the other one has had its last token"
    assert ids(drive.scheduler.schedule_ahead(drive.scheduler.schedule()).seqs) == ["plain-0"]


@pytest.mark.parametrize("arguments", ON_THE_DEVICE, ids=lambda arguments: "-".join(arguments))
def test_what_the_device_can_do_alone(stage: ModuleType, arguments: dict[str, Any]) -> None:
    drive = with_blocks(stage)
    drive.add("plain", 3, 9)
    drive.add("other", 3, 9, **arguments)
    assert ids(drive.scheduler.schedule_ahead(drive.scheduler.schedule()).seqs) == ["plain-0", "other-0"]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_not_where_somebody_could_come_in(stage: ModuleType, policy: str) -> None:
    """While all rows are taken nobody can, unless he is more urgent than somebody; nor if a row is about to be free."""
    drive = with_blocks(stage, max_num_seqs=2, scheduling_policy=policy)
    drive.add("a", 3, 9)
    first = drive.scheduler.schedule()
    drive.add("b", 3, 3)
    check_refused(drive, first)  # there is a row
    take_in(drive, first)
    scheduled = drive.scheduler.schedule()
    while len(scheduled.seqs) < 2:  # before m5 that step was the prompt's alone
        take_in(drive, scheduled)
        scheduled = drive.scheduler.schedule()
    drive.add("c", 3, 9)
    if policy == "priority":
        check_refused(drive, scheduled)
        take_in(drive, scheduled)
    else:
        ahead = drive.scheduler.schedule_ahead(scheduled)
        assert ids(ahead.seqs) == ["a-0", "b-0"]
        take_in(drive, scheduled)
        scheduled = ahead
    while drive.seqs["b-0"].num_output_tokens + 1 < 3:
        take_in(drive, scheduled)
        scheduled = drive.scheduler.schedule()
    check_refused(drive, scheduled)  # b draws its last token
    drive.scheduler.finish_sequence("c-0", stage.SequenceStatus.FINISHED_ABORTED)
    assert ids(drive.scheduler.schedule_ahead(scheduled).seqs) == ["a-0"]


def test_not_where_one_that_runs_took_no_part(stage: ModuleType) -> None:
    """A sibling that shares the prompt of the step; before m5 those who decode, too."""
    drive = with_blocks(stage)
    drive.add("a", 3, 9, n=2)
    first = drive.scheduler.schedule()
    assert (ids(first.seqs), drive.running) == (["a-0"], ["a-0", "a-1"])
    check_refused(drive, first)
    take_in(drive, first)
    second = drive.scheduler.schedule()
    assert drive.scheduler.schedule_ahead(second).source_rows == [0, 1]
    take_in(drive, second)

    drive = with_blocks(stage)
    drive.add("a", 3, 9)
    drive.step()
    drive.add("b", 3, 9)
    scheduled = drive.scheduler.schedule()
    if ids(scheduled.seqs) == ["b-0"]:
        check_refused(drive, scheduled)
    else:
        assert drive.scheduler.schedule_ahead(scheduled).source_rows == [0, 1]


@pytest.mark.parametrize("token", [ANOTHER_TOKEN, EOS])
def test_not_where_there_is_no_block(stage: ModuleType, token: int) -> None:
    """Who has got one keeps it; the next step that is scheduled preempts somebody, unless one has become free."""
    drive = with_blocks(stage, num_kv_blocks=4, max_model_len=16)
    for name in "abc":
        drive.add(name, 4, 6)
    first = drive.scheduler.schedule()
    assert ids(first.seqs) == ["a-0", "b-0", "c-0"]
    assert drive.scheduler.schedule_ahead(first) is None, "two blocks are missing"
    assert [seq.num_computed_tokens for seq in drive.seqs.values()] == [4, 4, 4]
    output = make_output(stage, [ANOTHER_TOKEN, ANOTHER_TOKEN, token])
    drive.scheduler.update_from_output(first, output)
    scheduled = drive.step()
    if token == EOS:  # what c had is b's
        assert (ids(scheduled.seqs), +drive.scheduler.num_preemptions) == (["a-0", "b-0"], {})
    else:
        assert (ids(scheduled.seqs), drive.waiting) == (["a-0", "b-0"], ["c-0"])
        assert drive.scheduler.num_preemptions == {"no free block": 1}
    pool = drive.scheduler.kv_cache_manager.block_pool
    pool.check_integrity([seq.block_table for seq in drive.scheduler.running])
    drive.run()
    assert all(seq.num_output_tokens == 6 for name, seq in drive.seqs.items() if (name, token) != ("c-0", EOS))
    assert drive.scheduler.kv_cache_manager.num_used_blocks == 0


def test_a_failed_step_takes_the_one_ahead_with_it(stage: ModuleType) -> None:
    """`undo` of both, the later one first: everybody starts over, in order, with nothing of what was launched."""
    drive = with_blocks(stage)
    for name, max_tokens in (("a", 1), ("b", 9), ("c", 9)):
        drive.add(name, 3, max_tokens)
    first = drive.scheduler.schedule()
    second = drive.scheduler.schedule_ahead(first)
    drive.scheduler.undo(second)
    drive.scheduler.undo(first)
    assert (drive.running, drive.waiting) == ([], ["a-0", "b-0", "c-0"])
    assert all(seq.num_computed_tokens == 0 and not seq.block_table for seq in drive.seqs.values())
    assert drive.scheduler.kv_cache_manager.num_used_blocks == 0
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [1, 9, 9]


# ---------------------------------------------------------------------- companies

LENGTH = 48


@dataclass
class Guest:
    """A request: after how many steps it comes and, perhaps, is aborted, and whether its own function fails."""

    prompt: list[int]
    arguments: dict[str, Any]
    arrival: int
    leaves_at: int | None
    fails_at: int | None
    priority: int
    salt: str | None

    def params(self, stage: ModuleType) -> Any:
        own = {} if self.fails_at is None else {"logits_processors": [self.fail_at_its_time]}
        return stage.SamplingParams(**self.arguments, **own)

    def fail_at_its_time(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == len(self.prompt) + (self.fails_at or 0):
            raise ValueError("no")
        return logits


@st.composite
def companies(draw: st.DrawFn) -> list[Guest]:
    """Most of them draw what the device can do alone, or nothing would ever be launched ahead."""
    guests = []
    shared = draw(st.lists(strategies.token_ids, min_size=1, max_size=12))
    for _ in range(draw(st.integers(2, 6))):
        arguments: dict[str, Any] = {"max_tokens": draw(st.integers(1, 16)), "ignore_eos": draw(st.booleans())}
        if draw(st.integers(0, 3)):
            arguments |= {"temperature": draw(st.floats(0.3, 2.0)), "seed": draw(st.integers(0, 99))}
            arguments |= draw(st.fixed_dictionaries({}, optional=strategies.cuts()))
            arguments["n"] = draw(st.sampled_from([1, 1, 1, 2, 3]))
        else:
            arguments["temperature"] = 0.0
        arguments["stop"] = draw(st.sampled_from([None, None, None, "e", [" ", "th"], "s"]))
        fails_at = None
        if draw(st.integers(0, 5)) == 0:
            host = {**strategies.penalties(), "logprobs": st.integers(0, 2), "min_tokens": st.integers(1, 6)}
            arguments |= draw(st.fixed_dictionaries({}, optional=host))
            arguments["min_tokens"] = min(arguments.get("min_tokens", 0), arguments["max_tokens"])
            fails_at = draw(st.none() | st.integers(0, 6))
        prompt = shared[: draw(st.sampled_from([0, 4, 12]))] + draw(strategies.prompts(20))
        arrival = draw(st.integers(0, 9))
        stays = draw(st.integers(0, 3))
        leaves_at = None if stays else arrival + draw(st.integers(0, 9))
        salt = draw(st.sampled_from([None, None, "x"]))
        guests.append(Guest(prompt[:30], arguments, arrival, leaves_at, fails_at, draw(st.integers(0, 2)), salt))
    return guests


def watch(patch: pytest.MonkeyPatch, llm: Any) -> list[Any]:
    """What is launched from now on."""
    launched: list[Any] = []
    runner = llm.engine.worker.model_runner
    execute = runner.execute_model

    def execute_model(scheduled: Any) -> Any:
        launched.append(scheduled)
        return execute(scheduled)

    patch.setattr(runner, "execute_model", execute_model)
    return launched


def serve(stage: ModuleType, llm: Any, guests: list[Guest]) -> tuple[list[Any], list[Any]]:
    """Their outputs, and the steps that were launched. The pool is sound after every step."""
    outputs: dict[int, Any] = {}
    engine = llm.engine
    engine.stats.clear()
    has_salts = "cache_salt" in stage.Request.__annotations__
    with pytest.MonkeyPatch.context() as patch:
        launched = watch(patch, llm)
        for step in range(1000):
            for number, guest in enumerate(guests):
                if guest.arrival == step:
                    options = {"cache_salt": guest.salt} if has_salts else {}
                    engine.add_request(
                        f"{number}", guest.prompt, guest.params(stage), priority=guest.priority, **options
                    )
                    outputs[number] = engine.get_output(f"{number}")
                if guest.leaves_at == step:
                    engine.abort_request(f"{number}")
            if engine.has_unfinished_requests():
                engine.step()
                check_pool(llm)
            if len(outputs) == len(guests) and not engine.has_unfinished_requests():
                break
        else:
            raise AssertionError("not done after 1000 steps")
    return [outputs[number] for number in range(len(guests))], launched


def check_clean(llm: Any) -> None:
    """No block is held, and after a step of somebody else no row."""
    assert llm.engine.core.scheduler.kv_cache_manager.num_used_blocks == 0
    llm.generate([[1]], llm.get_default_sampling_params().__class__(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(llm.engine.worker.model_runner.input_batch.rows) == 1


def check_same(stage: ModuleType, oracle: Any, guest: Guest, one: Any, other: Any) -> None:
    """The same tokens, texts and reasons, or where a tie fell otherwise, tokens as right as the others'."""
    if [*map(str, result_of(one))] == [*map(str, result_of(other))]:
        return
    for completion in (*one.outputs, *other.outputs):
        own = {**guest.arguments, "n": 1}
        if "seed" in own:
            own["seed"] += completion.index
        oracle.check(guest.prompt, completion.token_ids, stage.SamplingParams(**own))


ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {"max_num_seqs": 12, "num_kv_blocks": 200, "block_size": 4},
    "few rows": {"max_num_seqs": 2, "num_kv_blocks": 40, "block_size": 4},
    "few blocks": {"max_num_seqs": 6, "num_kv_blocks": 13, "block_size": 4},
    "priority": {"max_num_seqs": 3, "num_kv_blocks": 16, "block_size": 4, "scheduling_policy": "priority"},
}


def options_of(stage: ModuleType, name: str) -> dict[str, Any]:
    """From m5 on the pools that are tight have small chunks, too."""
    has_chunks = "max_chunk_size" in stage.EngineConfig.__annotations__ and name in ("few blocks", "priority")
    chunks = {"max_chunk_size": 5, "max_num_batched_tokens": 16} if has_chunks else {}
    return {"max_model_len": LENGTH, **ENGINES[name], **chunks}


@pytest.mark.parametrize("name", ENGINES)
@given(guests=companies())
def test_nobody_can_tell(
    name: str, guests: list[Guest], stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """Whoever comes, leaves or fails, with whatever parameters, in whatever room."""
    outputs = []
    for is_async in (False, True):
        llm = make_llm("qwen2", async_scheduling=is_async, **options_of(stage, name))
        poison(stage, llm)
        outputs.append(serve(stage, llm, guests)[0])
        assert all(output.finished for output in outputs[-1])
        check_clean(llm)
    for guest, one, other in zip(guests, *outputs, strict=True):
        if guest.leaves_at is None:
            check_same(stage, get_oracle("qwen2"), guest, one, other)
            for completion in other.outputs:
                assert completion.finish_reason != "abort"
                assert completion.logprobs is None or len(completion.logprobs) == len(completion.token_ids)


def plain(*max_tokens: int, **arguments: Any) -> list[Guest]:
    """Requests that come together and want so many tokens, drawn by seed."""
    own = {"temperature": 1.0, "ignore_eos": True, **arguments}
    return [
        Guest([3 + number] * (2 + number), {**own, "max_tokens": each, "seed": number}, 0, None, None, 0, None)
        for number, each in enumerate(max_tokens)
    ]


def both(stage: ModuleType, make_llm: MakeLLM, name: str, guests: list[Guest]) -> list[tuple[list[Any], list[Any]]]:
    """Outputs and launched steps without and with steps ahead; the outputs are the same."""
    served = []
    for is_async in (False, True):
        llm = make_llm("qwen2", async_scheduling=is_async, **options_of(stage, name))
        poison(stage, llm)
        served.append(serve(stage, llm, guests))
    assert [*map(result_of, served[0][0])] == [*map(result_of, served[1][0])]
    return served


def num_ahead(launched: list[Any]) -> int:
    return sum(bool(scheduled.source_rows) for scheduled in launched)


def test_steps_run_ahead(stage: ModuleType, make_llm: MakeLLM) -> None:
    """Else the tests above would see nothing: of a batch's steps all but the first."""
    (_, without), (_, ahead) = both(stage, make_llm, "roomy", plain(9, 9, 12))
    assert (len(without), num_ahead(without)) == (12, 0)
    assert (len(ahead), num_ahead(ahead)) == (12, 11)


@pytest.mark.parametrize("name", ["roomy", "few rows"])
@given(max_tokens=st.lists(st.integers(1, 16), min_size=1, max_size=6))
def test_ends_that_can_be_foreseen_cost_no_step(
    name: str, max_tokens: list[int], stage: ModuleType, make_llm: MakeLLM
) -> None:
    """By length. The very same batches go through the model."""
    (_, without), (_, ahead) = both(stage, make_llm, name, plain(*max_tokens))
    batches = [[scheduled.num_scheduled_tokens for scheduled in launched] for launched in (without, ahead)]
    assert batches[0] == batches[1]


@pytest.mark.parametrize("name", ["roomy", "few rows"])
@pytest.mark.parametrize("ending", [{"ignore_eos": False}, {"stop": ["e", "a", "th"]}], ids=["eos", "stop"])
def test_an_end_that_nobody_foresaw_costs_one_step_at_most(
    name: str, ending: dict[str, Any], stage: ModuleType, make_llm: MakeLLM
) -> None:
    """The one with it that was under way."""
    guests = plain(*range(12, 20), **ending)
    (outputs, without), (_, ahead) = both(stage, make_llm, name, guests)
    num_ends = sum(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert num_ends >= 4 and num_ahead(ahead) > 0
    assert len(ahead) <= len(without) + num_ends
    tokens = [sum(scheduled.total_num_scheduled_tokens for scheduled in launched) for launched in (without, ahead)]
    assert tokens[0] < tokens[1] <= tokens[0] + num_ends, "a token too many for each of them"


# ---------------------------------------------------------------------- who ends while a step is under way


def greedy_tokens(stage: ModuleType, llm: Any, prompt: list[int], num: int) -> list[int]:
    params = stage.SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
    tokens: list[int] = llm.generate([prompt], params, use_tqdm=False)[0].token_ids
    return tokens


WAYS_TO_END = ["eos", "stop token", "stop string", "abort"]


@pytest.mark.parametrize("way", WAYS_TO_END)
def test_a_token_too_many_is_nobodys(way: str, stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """It is in no output; its blocks are free at once, and whoever gets them writes his own keys into them.

    The pool has six blocks. Who comes next needs all of them.
    """
    sizes = {"max_model_len": 24, "block_size": 4, "num_kv_blocks": 6, "max_num_seqs": 3}
    with open_llm(stage, checkpoint_path("qwen3"), async_scheduling=True, **sizes) as llm:
        poison(stage, llm)
        prompt, follower = [9, 8, 7], list(range(40, 60))
        tokens = greedy_tokens(stage, llm, prompt, 12)
        expected = greedy_tokens(stage, llm, follower, 4)
        at = next(number for number in range(3, 12) if tokens[number] not in tokens[:number])
        arguments: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
        if way == "eos":
            llm.engine.input_processor.eos_token_ids = (tokens[at],)
            arguments["ignore_eos"] = False
        elif way == "stop token":
            arguments["stop_token_ids"] = [tokens[at]]
        elif way == "stop string":
            texts = [llm.tokenizer.decode(tokens[: number + 1]) for number in range(12)]
            at = next(n for n in range(3, 12) if len(texts[n]) > len(texts[n - 1]) and texts[n][-1] not in texts[n - 1])
            arguments["stop"] = texts[at][-1]
        forget_prefixes(llm)
        engine, core = llm.engine, llm.engine.core
        engine.add_request("a", prompt, stage.SamplingParams(**arguments))
        output = engine.get_output("a")
        with pytest.MonkeyPatch.context() as patch:
            launched = watch(patch, llm)
            for _ in range(at + 1):
                engine.step()
            assert len(launched) == at + 2, "one more than was taken in"
        if way == "abort":
            engine.abort_request("a")
        assert (output.finished, output.token_ids) == (True, tokens[: at + 1])
        assert output.metrics.num_output_tokens == at + 1
        snapshot = result_of(output)
        assert core.scheduler.kv_cache_manager.num_used_blocks == 0
        engine.add_request("b", follower, stage.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        seen = engine.get_output("b")
        while engine.has_unfinished_requests():
            assert all(each.request_id == "b" for each in engine.step())
            check_pool(llm)
        assert (seen.token_ids, result_of(output)) == (expected, snapshot)
        assert greedy_tokens(stage, llm, prompt, 12) == tokens


def test_nothing_is_under_way_when_nobody_is_left(stage: ModuleType, make_llm: MakeLLM) -> None:
    """However they ended: no step holds them, and the next request does not wait for a step of nobody."""
    llm = make_llm("qwen3", async_scheduling=True, **options_of(stage, "roomy"))
    tokens = greedy_tokens(stage, llm, [9, 8, 7], 6)
    for name in ("stop token", "abort"):
        arguments = {"stop_token_ids": [tokens[3]]} if name == "stop token" else {}
        params = stage.SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, **arguments)
        llm.engine.add_request("a", [9, 8, 7], params)
        for _ in range(4):
            llm.engine.step()
        llm.engine.abort_request("a")
        check_empty(stage, llm)
        llm.engine.add_request("b", [1, 2], params)
        assert [output.request_id for output in llm.engine.step()] == ["b"]
        llm.engine.abort_request("b")


def test_an_id_may_be_used_again_while_a_step_with_it_is_under_way(stage: ModuleType, make_llm: MakeLLM) -> None:
    """The token on its way is not the newcomer's, nor is the row."""
    llm = make_llm("qwen3", async_scheduling=True, **options_of(stage, "roomy"))
    params = stage.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = greedy_tokens(stage, llm, [5, 6, 7, 8, 9], 6)
    others = greedy_tokens(stage, llm, [4, 4], 20)
    for num_steps in (1, 2, 3):
        llm.engine.add_request("stays", [4, 4], stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        llm.engine.add_request("a", [1, 2, 3], params)
        stays = llm.engine.get_output("stays")
        for _ in range(num_steps):
            llm.engine.step()
        llm.engine.abort_request("a")
        llm.engine.add_request("a", [5, 6, 7, 8, 9], params)
        again = llm.engine.get_output("a")
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
            check_pool(llm)
        assert (again.token_ids, stays.token_ids) == (expected, others)


@pytest.mark.since("m5")
def test_what_is_told_of_an_id_that_was_used_again(stage: ModuleType, make_llm: MakeLLM) -> None:
    """The chunk that is under way is the old request's: the new one has not been scheduled yet."""
    llm = make_llm("qwen3", async_scheduling=True, max_num_batched_tokens=8, max_model_len=48, block_size=4)
    params = stage.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    engine = llm.engine
    engine.add_request("stays", [4, 4], params)
    engine.add_request("a", list(range(30, 60)), params)
    while engine.core.ahead is None or engine.core.ahead[0].phase != "mixed":
        engine.step()
    engine.abort_request("a")
    engine.add_request("a", list(range(60, 70)), params)
    again = engine.get_output("a")
    engine.step()
    assert again.metrics.first_scheduled_time is None and again.metrics.queue_time is None
    while engine.has_unfinished_requests():
        engine.step()
    assert again.metrics.first_scheduled_time is not None
    assert getattr(again, "num_cached_tokens", 0) == 0


def test_those_who_wait_do_not_wait_for_a_step_of_nobody(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    """One at a time, each ended by a token: as many steps as without."""
    num_steps = []
    for ahead in (False, True):
        with open_llm(stage, checkpoint_path("qwen3"), async_scheduling=ahead, max_num_seqs=1, max_model_len=32) as llm:
            tokens = greedy_tokens(stage, llm, [9, 8, 7], 4)
            forget_prefixes(llm)
            llm.engine.stats.clear()
            params = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=tokens[3:])
            outputs = llm.generate([[9, 8, 7]] * 3, params, use_tqdm=False)
            assert all(output.token_ids == tokens for output in outputs)
            num_steps.append(len(llm.engine.stats.steps))
    assert num_steps[0] == num_steps[1] == 3 * 4


@pytest.mark.since("m6")
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_the_cache_holds_nothing_that_is_not_computed(
    length: int, stage: ModuleType, make_llm: MakeLLM, checkpoint_path: CheckpointPath
) -> None:
    """Who ends at any place of a block, with a step under way that would fill it: only what he says is to be found.

    And whoever goes on from there gets the tokens that he gets without a cache.
    """
    llm = make_llm("qwen3", async_scheduling=True, **options_of(stage, "roomy"))
    without = make_llm("qwen3", async_scheduling=True, enable_prefix_caching=False, **options_of(stage, "roomy"))
    prompt = [50 + number for number in range(length)]
    poison(stage, llm)
    tokens = greedy_tokens(stage, without, prompt, 12)
    for num in range(2, 10):
        if tokens[num - 1] in tokens[: num - 1]:
            continue
        forget_prefixes(llm)
        params = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[tokens[num - 1]])
        said = llm.generate([prompt], params, use_tqdm=False)[0].token_ids
        assert said == tokens[:num]
        cache = llm.engine.core.scheduler.kv_cache_manager.prefix_cache
        assert len(cache) == (length + num - 1) // 4, "the last token was not to be computed any more"
        for following in ([*prompt, *said, 1], [*prompt, *tokens[: num + 1], 2]):
            assert greedy_tokens(stage, llm, following, 3) == greedy_tokens(stage, without, following, 3)


# ---------------------------------------------------------------------- steps that fail


@pytest.mark.parametrize("what", ["launch", "half a launch", "get_output"])
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("error", [RuntimeError("once"), KeyboardInterrupt()], ids=["fault", "ctrl_c"])
def test_a_step_that_fails_beside_another(
    what: str, at: int, error: BaseException, stage: ModuleType, make_llm: MakeLLM
) -> None:
    """Launched or waited for while another is under way: both are forgotten, and all is computed again."""
    llm = make_llm("qwen2", async_scheduling=True, **options_of(stage, "roomy"))
    guests = plain(6, 12, 9, n=2)
    expected = [result_of(output) for output in serve(stage, llm, guests)[0]]
    poison(stage, llm)
    engine, runner = llm.engine, llm.engine.worker.model_runner
    for number, guest in enumerate(guests):
        engine.add_request(f"{number}", guest.prompt, guest.params(stage))
    outputs = [engine.get_output(f"{number}") for number in range(3)]
    calls = iter(range(1000))

    def once(function: Callable[[Any], Any], is_late: bool) -> Callable[[Any], Any]:
        def failing(argument: Any) -> Any:
            is_ahead = what == "get_output" or bool(argument.source_rows)
            fails = is_ahead and next(calls) == at
            if fails and not is_late:
                raise error
            result = function(argument)
            if fails:
                raise error
            return result

        return failing

    with pytest.MonkeyPatch.context() as patch:
        if what == "get_output":
            output_class = submodule(stage, "worker.model_runner").AsyncModelRunnerOutput
            patch.setattr(output_class, "get_output", once(output_class.get_output, False))
        else:
            patch.setattr(runner, "execute_model", once(runner.execute_model, what == "half a launch"))
        with pytest.raises(type(error)):
            for _ in range(20):
                engine.step()
    scheduler = engine.core.scheduler
    assert (scheduler.running, scheduler.kv_cache_manager.num_used_blocks, engine.core.ahead) == ([], 0, None)
    assert len(scheduler.waiting) == sum(not each.finish_reason for output in outputs for each in output.outputs)
    poison(stage, llm)
    while engine.has_unfinished_requests():
        engine.step()
        check_pool(llm)
    assert [result_of(output) for output in outputs] == expected
    check_clean(llm)


@pytest.mark.since("m5")
@pytest.mark.parametrize("what", ["get_output", "update_from_output"])
def test_a_prompt_that_is_in_the_later_step_only(what: str, stage: ModuleType, make_llm: MakeLLM) -> None:
    """Its last chunk was launched ahead, beside the step that fails, in which more urgent ones took all tokens."""
    sizes = {"max_model_len": 48, "block_size": 4, "max_num_batched_tokens": 8, "max_chunk_size": 4}
    llm = make_llm("qwen2", async_scheduling=True, scheduling_policy="priority", **sizes)
    params = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = {"decode": range(3), "late": range(30, 42), "urgent": range(60, 67), "other": range(70, 79)}
    expected = {name: greedy_tokens(stage, llm, list(prompt), 20) for name, prompt in prompts.items()}
    forget_prefixes(llm)
    engine, core, outputs = llm.engine, llm.engine.core, {}

    def add(name: str, priority: int) -> None:
        engine.add_request(name, list(prompts[name]), params, priority)
        outputs[name] = engine.get_output(name)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        launched = watch(patch, llm)
        add("decode", 0)
        engine.step()
        add("late", 2)
        engine.step()
        engine.step()
        add("urgent", 1)
        add("other", 1)
        engine.step()
        engine.step()
        if what == "get_output":
            patch.setattr(submodule(stage, "worker.model_runner").AsyncModelRunnerOutput, "get_output", fail)
        else:
            patch.setattr(core.scheduler, "update_from_output", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    taking_part = [{name.removesuffix("-0") for name in step.num_scheduled_tokens} for step in launched[-2:]]
    assert taking_part == [{"decode", "urgent", "other"}, set(prompts)]
    assert (core.scheduler.running, core.scheduler.kv_cache_manager.num_used_blocks, core.ahead) == ([], 0, None)
    while engine.has_unfinished_requests():
        engine.step()
        check_pool(llm)
    assert {name: output.token_ids for name, output in outputs.items()} == expected


# ---------------------------------------------------------------------- the option


def test_it_is_off_on_a_cpu_unless_it_is_asked_for(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    assert stage.EngineConfig().async_scheduling is None
    for asked, settled in ((None, False), (False, False), (True, True)):
        with open_llm(stage, checkpoint_path("qwen3"), max_model_len=32, async_scheduling=asked) as llm:
            assert llm.config.async_scheduling is settled
            with pytest.MonkeyPatch.context() as patch:
                launched = watch(patch, llm)
                assert len(greedy_tokens(stage, llm, [1, 2], 4)) == 4
            assert num_ahead(launched) == (3 if settled else 0)


@pytest.mark.since("m6")
def test_what_was_computed_beside_steps_ahead_is_found(stage: ModuleType, make_llm: MakeLLM) -> None:
    """A prompt in chunks beside decodes, launched ahead: every full block is found again."""
    llm = make_llm("qwen3", max_model_len=128, block_size=4, num_kv_blocks=100, max_chunk_size=8, async_scheduling=True)
    decode = stage.SamplingParams(max_tokens=40, ignore_eos=True, seed=1)
    one = stage.SamplingParams(max_tokens=1, ignore_eos=True)
    llm.engine.add_request("decode", [7, 8, 9], decode)
    for _ in range(3):
        llm.engine.step()
    prompt = [(11 * number) % 400 + 3 for number in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        launched = watch(patch, llm)
        for request_id, found in (("first", 0), ("again", 59)):
            llm.engine.add_request(request_id, prompt, one)
            output = llm.engine.get_output(request_id)
            while not output.finished:
                llm.engine.step()
            assert output.num_cached_tokens == found
    assert num_ahead([scheduled for scheduled in launched if scheduled.phase == "mixed"]) > 5
