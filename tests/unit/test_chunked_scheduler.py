"""Chunks of prompts beside decodes, by hand: who gets how many of a step's tokens, and blocks, and when.

Where vLLM has a test for the same thing, its number in the checklist (reference/vllm_v1.md, 9.1) stands in the
docstring. Any order of events is in tests/property/test_chunked.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from ..conftest import MakeLLM, no_prefix_cache, phases_apart
from ..property.test_scheduler import ANOTHER_TOKEN, POLICIES, Drive, ids, make_output

pytestmark = pytest.mark.since("m5")

every_policy = pytest.mark.parametrize("policy", POLICIES)


def with_chunks(stage: ModuleType, **options: Any) -> Drive:
    """Blocks for everybody, unless the test says how many."""
    sizes = {"max_num_seqs": 16, "max_model_len": 4096, "block_size": 16, "num_kv_blocks": 2000}
    return Drive(stage, **{**sizes, **options})


def free_blocks(drive: Drive) -> int:
    return int(drive.scheduler.kv_cache_manager.num_free_blocks)


def chunks(drive: Drive) -> dict[str, int]:
    """What the next step gives to whom."""
    return dict(drive.step().num_scheduled_tokens)


def check_blocks(drive: Drive) -> None:
    pool = drive.scheduler.kv_cache_manager.block_pool
    pool.check_integrity([seq.block_table for seq in drive.scheduler.running])


# ---------------------------------------------------------------------- the checklist


def test_what_fits_is_computed_whole(stage: ModuleType) -> None:
    """Item 3, test_schedule: ten prompts, one step; running holds them in order."""
    drive = with_chunks(stage, max_num_batched_tokens=8192)
    for number in range(10):
        drive.add(f"{number}", 10 + number)
    scheduled = drive.step()
    assert scheduled.num_scheduled_tokens == {f"{number}-0": 10 + number for number in range(10)}
    assert drive.running == ids(scheduled.seqs) == ids(scheduled.sampled_seqs) == [f"{n}-0" for n in range(10)]
    assert (drive.waiting, scheduled.phase) == ([], "prefill")


def test_a_prompt_over_the_budget_is_cut(stage: ModuleType) -> None:
    """Item 4, test_schedule_partial_requests: the rest comes next, and nothing in between."""
    drive = with_chunks(stage, max_num_batched_tokens=1000)
    for name, length in (("a", 300), ("b", 400), ("c", 500)):
        drive.add(name, length)
    scheduled = drive.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"a-0": 300, "b-0": 400, "c-0": 300}
    assert ids(scheduled.sampled_seqs) == ["a-0", "b-0"]
    outputs = drive.scheduler.update_from_output(scheduled, make_output(stage, [ANOTHER_TOKEN] * 2))
    assert ids(output.seq for output in outputs) == ["a-0", "b-0"]
    c = drive.seqs["c-0"]
    assert (c.num_output_tokens, c.num_computed_tokens, c.status) == (0, 300, stage.SequenceStatus.RUNNING)
    scheduled = drive.step()
    assert (scheduled.num_scheduled_tokens, scheduled.phase) == ({"a-0": 1, "b-0": 1, "c-0": 200}, "mixed")
    assert ids(scheduled.sampled_seqs) == ["a-0", "b-0", "c-0"] and c.num_output_tokens == 1
    scheduled = drive.step()
    assert (scheduled.num_scheduled_tokens, scheduled.phase) == ({"a-0": 1, "b-0": 1, "c-0": 1}, "decode")


def test_a_step_may_bring_no_token(stage: ModuleType) -> None:
    drive = with_chunks(stage, max_num_batched_tokens=100)
    drive.add("a", 250, 1)
    for _ in range(2):
        scheduled = drive.scheduler.schedule()
        assert (scheduled.sampled_seqs, scheduled.phase) == ([], "prefill")
        assert (scheduled.is_prefill, scheduled.is_decode) == (True, False)
        assert drive.scheduler.update_from_output(scheduled, make_output(stage, [])) == []
        assert drive.running == ["a-0"]
    assert chunks(drive) == {"a-0": 50}
    assert drive.first == ["a-0"] and drive.running == []


def test_three_prompts_share_a_budget(stage: ModuleType) -> None:
    """Item 5, test_schedule_concurrent_partial_requests, to the token."""
    drive = with_chunks(stage, max_num_batched_tokens=1024, max_chunk_size=400)
    for name in "abc":
        drive.add(name, 800)
    assert chunks(drive) == {"a-0": 400, "b-0": 400, "c-0": 224}
    assert chunks(drive) == {"a-0": 400, "b-0": 400, "c-0": 224}
    assert chunks(drive) == {"a-0": 1, "b-0": 1, "c-0": 352}
    assert drive.first == ["a-0", "b-0", "c-0"]


def test_alone_it_ignores_the_cap(stage: ModuleType) -> None:
    """Item 6, test_long_prefill_threshold_ignored_when_alone; it heeds it as soon as it is not."""
    drive = with_chunks(stage, max_num_batched_tokens=1024, max_chunk_size=400)
    drive.add("a", 3000)
    assert chunks(drive) == {"a-0": 1024}
    drive.add("b", 10)
    assert chunks(drive) == {"a-0": 400, "b-0": 10}
    drive.scheduler.finish_sequence("b-0", stage.SequenceStatus.FINISHED_ABORTED)
    assert chunks(drive) == {"a-0": 1024}


def test_in_company_it_heeds_the_cap(stage: ModuleType) -> None:
    """Item 7, test_long_prefill_threshold_applies_with_other_requests."""
    drive = with_chunks(stage, max_num_batched_tokens=1024, max_chunk_size=400)
    drive.add("a", 2000)
    drive.add("b", 10)
    assert chunks(drive) == {"a-0": 400, "b-0": 10}


@pytest.mark.parametrize("is_chunked", [True, False])
def test_with_chunks_the_budget_is_used_up(stage: ModuleType, is_chunked: bool) -> None:
    """Item 9, test_schedule_order: without, a prompt that does not fit into the rest blocks those behind it."""
    options = {} if is_chunked else phases_apart(stage)
    drive = with_chunks(stage, max_num_batched_tokens=1024, max_model_len=1024, **options)
    for name, length in (("a", 800), ("b", 800), ("c", 10), ("d", 10)):
        drive.add(name, length)
    assert chunks(drive) == ({"a-0": 800, "b-0": 224} if is_chunked else {"a-0": 800})
    others = {"c-0": 10, "d-0": 10}
    assert chunks(drive) == ({"a-0": 1, "b-0": 576, **others} if is_chunked else {"b-0": 800, **others})


def test_two_batches_before_the_first_output(stage: ModuleType) -> None:
    """Item 11, test_schedule_concurrent_batches: who waits for a token has nothing to compute; prompts go on."""
    drive = with_chunks(stage, max_num_batched_tokens=512)
    drive.add("a", 500)
    first = drive.scheduler.schedule()
    drive.add("b", 600)
    second = drive.scheduler.schedule()
    third = drive.scheduler.schedule()
    assert [step.num_scheduled_tokens for step in (first, second, third)] == [{"a-0": 500}, {"b-0": 512}, {"b-0": 88}]
    assert drive.scheduler.schedule().seqs == []
    (output,) = drive.scheduler.update_from_output(first, make_output(stage, [7]))
    assert ids([output.seq]) == ["a-0"] and output.seq.output_token_ids == [7]
    fourth = drive.scheduler.schedule()
    assert fourth.num_scheduled_tokens == {"a-0": 1}
    assert drive.scheduler.update_from_output(second, make_output(stage, [])) == []
    (output,) = drive.scheduler.update_from_output(third, make_output(stage, [8]))
    assert ids([output.seq]) == ["b-0"]
    drive.scheduler.update_from_output(fourth, make_output(stage, [9]))
    assert [drive.seqs[name].output_token_ids for name in ("a-0", "b-0")] == [[7, 9], [8]]
    drive.run()
    check_blocks(drive)


@pytest.mark.parametrize("chunk", [16, 40, 2048])
def test_the_last_admitted_gives_way_to_a_decode(stage: ModuleType, chunk: int) -> None:
    """Item 15, test_preempt_during_execution, in any chunks: ten blocks, and the first one's next token needs one."""
    drive = with_chunks(stage, num_kv_blocks=10, max_model_len=160, max_chunk_size=chunk)
    drive.add("a", 80, 4)
    drive.add("b", 80, 4)
    while drive.first != ["a-0", "b-0"]:
        drive.step()
    assert (free_blocks(drive), drive.scheduler.num_preemptions) == (0, {})
    scheduled = drive.step()
    assert (drive.running, drive.waiting) == (["a-0"], ["b-0"])
    assert (scheduled.num_scheduled_tokens, scheduled.retired_seq_ids) == ({"a-0": 1}, ["b-0"])
    b = drive.seqs["b-0"]
    assert (b.status, b.num_computed_tokens, b.block_table) == (stage.SequenceStatus.PREEMPTED, 0, [])
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [4, 4]
    assert drive.scheduler.num_preemptions == {"no free block": 1}


def hold_all_blocks_but(drive: Drive, num: int) -> list[int]:
    """As if others held the rest."""
    pool = drive.scheduler.kv_cache_manager.block_pool
    return list(pool.get_new_blocks(pool.num_free_blocks - num))


def test_a_decode_that_was_scheduled_gives_way(stage: ModuleType) -> None:
    """Item 29, test_priority_scheduler_preempt_skipped_request: it came first, and nobody after it is skipped."""
    drive = with_chunks(stage, scheduling_policy="priority")
    drive.add("low", 20, 3, priority=5)
    drive.step()
    drive.add("high", 16, 3, priority=0)
    drive.add("middle", 5, 3, priority=1)
    drive.step()
    held = hold_all_blocks_but(drive, 0)
    scheduled = drive.step()  # low has a slot for its token, and high has not
    assert scheduled.num_scheduled_tokens == {"high-0": 1, "middle-0": 1}
    assert ids(scheduled.seqs) == ids(scheduled.sampled_seqs) == ["high-0", "middle-0"]
    assert (scheduled.retired_seq_ids, drive.waiting, free_blocks(drive)) == (["low-0"], ["low-0"], 1)
    assert drive.seqs["low-0"].num_output_tokens == 2 and drive.seqs["low-0"].num_computed_tokens == 0
    drive.scheduler.kv_cache_manager.block_pool.free_blocks(held)
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {3}


def test_a_chunk_that_was_scheduled_gives_its_tokens_back(stage: ModuleType) -> None:
    """Item 29: an urgent one that takes its row gets what it had taken of the budget, too."""
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 9, "max_chunk_size": 6, "block_size": 2}
    drive = with_chunks(stage, scheduling_policy="priority", **options)
    drive.add("decode", 1, 9, priority=0)
    drive.add("low", 60, 1, priority=5)
    assert chunks(drive) == {"decode-0": 1, "low-0": 6}
    assert chunks(drive) == {"decode-0": 1, "low-0": 6}
    drive.add("high", 60, 1, priority=1)
    scheduled = drive.step()
    assert scheduled.num_scheduled_tokens == {"decode-0": 1, "high-0": 6}
    assert (drive.running, drive.waiting) == (["decode-0", "high-0"], ["low-0"])
    assert (scheduled.retired_seq_ids, drive.scheduler.num_preemptions) == (["low-0"], {"urgent": 1})
    low = drive.seqs["low-0"]
    assert (low.num_computed_tokens, low.block_table) == (0, [])
    check_blocks(drive)
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [9, 1, 1]
    assert free_blocks(drive) == 2000


def test_urgent_prompts_go_on_first(stage: ModuleType) -> None:
    """Whoever was admitted first: what the budget does not hold is missing at the end of the order."""
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_chunk_size": 6}
    drive = with_chunks(stage, scheduling_policy="priority", **options)
    drive.add("low", 60, 1, priority=5)
    drive.step()
    drive.add("high", 60, 1, priority=1)
    assert chunks(drive) == {"low-0": 6, "high-0": 2}
    assert chunks(drive) == {"low-0": 2, "high-0": 6}
    drive.run()
    assert drive.first == ["high-0", "low-0"]


def test_a_prompt_admitted_earlier_outlives_a_decode(stage: ModuleType) -> None:
    """Under "fcfs" the last admitted gives way, also if it is a decode that this step has served already."""
    drive = with_chunks(stage, max_chunk_size=16)
    drive.add("prompt", 100, 1)
    drive.add("decode", 5, 9)
    drive.step()
    held = hold_all_blocks_but(drive, 0)
    assert chunks(drive) == {"prompt-0": 16}
    assert (drive.running, drive.waiting) == (["prompt-0"], ["decode-0"])
    drive.scheduler.kv_cache_manager.block_pool.free_blocks(held)
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [1, 9]


def test_who_finds_no_victim_gives_way_himself(stage: ModuleType) -> None:
    """And nobody is admitted in that step."""
    drive = with_chunks(stage, max_chunk_size=16)
    drive.add("decode", 5, 9)
    drive.add("prompt", 100, 1)
    drive.step()
    drive.add("newcomer", 1, 2)
    held = hold_all_blocks_but(drive, 0)
    assert chunks(drive) == {"decode-0": 1}
    assert (drive.running, drive.waiting) == (["decode-0"], ["prompt-0", "newcomer-0"])
    drive.scheduler.kv_cache_manager.block_pool.free_blocks(held)
    drive.step()
    assert drive.running == ["decode-0", "prompt-0", "newcomer-0"]
    drive.run()


@pytest.mark.parametrize("chunk", [1, 16, 2048])
def test_all_of_a_prompt_must_fit(stage: ModuleType, chunk: int) -> None:
    """Item 51, test_can_fit_full_sequence_…: not only its first chunk; and nobody smaller goes first."""
    drive = with_chunks(stage, num_kv_blocks=10, max_chunk_size=chunk, max_model_len=160)
    drive.add("a", 100, 2)
    drive.add("large", 60, 2)
    drive.add("small", 5, 2)
    drive.step()
    assert (drive.running, drive.waiting) == (["a-0"], ["large-0", "small-0"])
    while "a-0" in drive.running:
        assert drive.waiting == ["large-0", "small-0"]
        drive.step()
    drive.step()
    assert drive.running[:2] == ["large-0", "small-0"]
    drive.run()
    assert not drive.scheduler.num_preemptions


# ---------------------------------------------------------------------- decodes first


@every_policy
def test_decodes_come_first(stage: ModuleType, policy: str) -> None:
    """Whoever was admitted when; then prompts that have begun, then new ones, in what is left of the budget."""
    options = {"max_num_batched_tokens": 20, "max_chunk_size": 10, "scheduling_policy": policy}
    drive = with_chunks(stage, **options)
    drive.add("long", 35, 4, arrival=0.0)
    for number in range(3):
        drive.add(f"{number}", 3, 9, arrival=0.01 + number / 1000)
    drive.add("late", 30, 4, arrival=50.0)
    steps = [chunks(drive) for _ in range(5)]
    if policy == "sjf":  # the short ones were admitted first
        assert steps[0] == {"0-0": 3, "1-0": 3, "2-0": 3, "long-0": 10, "late-0": 1}
        assert steps[1] == {"0-0": 1, "1-0": 1, "2-0": 1, "long-0": 10, "late-0": 7}
    else:
        assert steps[0] == {"long-0": 10, "0-0": 3, "1-0": 3, "2-0": 3, "late-0": 1}
        assert steps[1] == {"long-0": 10, "0-0": 1, "1-0": 1, "2-0": 1, "late-0": 7}
    assert steps[2] == {"long-0": 10, "0-0": 1, "1-0": 1, "2-0": 1, "late-0": 7}
    assert steps[3] == {"long-0": 5, "0-0": 1, "1-0": 1, "2-0": 1, "late-0": 10}
    assert steps[4] == {"long-0": 1, "0-0": 1, "1-0": 1, "2-0": 1, "late-0": 5}


def test_no_decode_is_skipped_for_a_prompt_that_was_there_before(stage: ModuleType) -> None:
    """As many decodes as the budget has tokens: prompts wait, in order, until one of them is done."""
    drive = with_chunks(stage, max_num_seqs=4, max_num_batched_tokens=4, max_chunk_size=3)
    drive.add("long", 9, 2)
    for number in range(3):
        drive.add(f"{number}", 1, 3)
    assert chunks(drive) == {"long-0": 3, "0-0": 1}
    assert chunks(drive) == {"0-0": 1, "long-0": 3}
    assert chunks(drive) == {"0-0": 1, "long-0": 3}
    assert chunks(drive) == {"long-0": 1, "1-0": 1, "2-0": 1}
    drive.run()
    assert drive.first == ["0-0", "long-0", "1-0", "2-0"]


@pytest.mark.parametrize(
    ("budget", "given", "then"), [(512, [256, 252], 256), (1000, [256, 256], 256), (32, [16, 12], 32)]
)
def test_a_controller_limits_prompts_and_not_decodes(
    stage: ModuleType, budget: int, given: list[int], then: int
) -> None:
    """chunk_policy="dynamic": first 512 prompt tokens, or the budget, of which one prompt leaves half to others."""
    options = {"chunk_policy": "dynamic", "target_step_time_ms": 30.0}
    drive = with_chunks(stage, max_num_batched_tokens=budget, **options)
    decodes = {f"{number}-0": 1 for number in range(4)}
    for number in range(4):
        drive.add(f"{number}", 1, 9)
    drive.step()
    drive.add("long", 3000, 1)
    drive.add("longer", 3000, 1)
    scheduled = drive.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {**decodes, "long-0": given[0], "longer-0": given[1]}
    drive.scheduler.record_step_time(scheduled, 0.060)
    assert drive.scheduler.chunk_controller.prefill_budget == then
    drive.scheduler.update_from_output(scheduled, make_output(stage, [ANOTHER_TOKEN] * 4))
    rest = min(then, budget - 4) - then // 2
    assert chunks(drive) == {**decodes, "long-0": then // 2, "longer-0": rest}
    drive.scheduler.finish_sequence("long-0", stage.SequenceStatus.FINISHED_ABORTED)
    assert chunks(drive) == {**decodes, "longer-0": min(then, budget - 4)}


def test_a_fixed_policy_measures_nothing(stage: ModuleType) -> None:
    drive = with_chunks(stage)
    drive.add("a", 10)
    scheduled = drive.step()
    drive.scheduler.record_step_time(scheduled, 9.0)
    assert drive.scheduler.chunk_controller is None


# ---------------------------------------------------------------------- blocks that are promised


@every_policy
def test_two_prompts_that_do_not_fit_together(stage: ModuleType, policy: str) -> None:
    """The first chunks of both would fit, and the rest of neither: the second waits, and nobody is preempted."""
    sizes = {"num_kv_blocks": 12, "max_model_len": 192, "max_chunk_size": 16}
    drive = with_chunks(stage, scheduling_policy=policy, **sizes)
    drive.add("a", 100, 2, arrival=0.0)
    drive.add("b", 101, 2, arrival=1.0)
    steps = 0
    while drive.seqs["a-0"].num_output_tokens == 0:
        assert chunks(drive) in ({"a-0": 16}, {"a-0": 4})
        steps += 1
    assert (steps, drive.waiting) == (7, ["b-0"])
    drive.run()
    assert drive.first == ["a-0", "b-0"] and not drive.scheduler.num_preemptions


def test_what_is_promised_to_one_may_be_all_but_what_another_needs(stage: ModuleType) -> None:
    """Twelve blocks: seven promised, five for the other, to the last; a block less, and it waits."""
    for num_blocks, running in ((12, ["a-0", "b-0"]), (11, ["a-0"])):
        drive = with_chunks(stage, num_kv_blocks=num_blocks, max_model_len=176, max_chunk_size=16)
        drive.add("a", 112, 1)
        drive.add("b", 80, 1)
        drive.step()
        assert drive.running == running
        drive.run()
        assert drive.first == (["b-0", "a-0"] if num_blocks == 12 else ["a-0", "b-0"])
        assert not drive.scheduler.num_preemptions


# ---------------------------------------------------------------------- siblings


def family(stage: ModuleType, **options: Any) -> Drive:
    """a, of ten tokens and three samples, in chunks of four, and b behind it."""
    drive = with_chunks(stage, **{"max_chunk_size": 4, "block_size": 4, **options})
    drive.add("a", 10, 3, n=3, priority=5, arrival=0.0)
    drive.add("b", 2, 3, priority=5, arrival=1.0)
    return drive


@every_policy
def test_siblings_come_with_the_last_chunk(stage: ModuleType, policy: str) -> None:
    """Until then they wait, and let others pass; then they share what has been computed."""
    drive = family(stage, scheduling_policy=policy)
    for expected in ({"a-0": 4, "b-0": 2}, {"a-0": 4, "b-0": 1}):  # under "sjf", too: b came a second later
        assert chunks(drive) == expected
        assert (drive.running, drive.waiting) == (["a-0", "b-0"], ["a-1", "a-2"])
    assert chunks(drive) == {"a-0": 2, "b-0": 1}
    assert drive.seqs["b-0"].is_finished and drive.running == ["a-0", "a-1", "a-2"]
    tables = [drive.seqs[f"a-{index}"].block_table for index in range(3)]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 3
    assert [drive.seqs[f"a-{index}"].num_computed_tokens for index in range(3)] == [10, 9, 9]
    scheduled = drive.step()
    assert scheduled.num_scheduled_tokens == {"a-0": 1, "a-1": 1, "a-2": 1}
    assert len(scheduled.block_copies) == 2
    check_blocks(drive)
    drive.run()
    assert drive.first == ["b-0", "a-0", "a-1", "a-2"]
    assert sum(map(len, drive.steps)) == 2 + 4 * 3


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_parent_is_aborted_between_chunks(stage: ModuleType, policy: str, after: int) -> None:
    """The next of them starts from the beginning and takes its place."""
    drive = family(stage, scheduling_policy=policy)
    for _ in range(after):
        drive.step()
    drive.scheduler.finish_sequence("a-0", stage.SequenceStatus.FINISHED_ABORTED)
    assert drive.running == ["b-0"]
    assert [chunks(drive)["a-1"] for _ in range(2)] == [4, 4]
    assert drive.seqs["a-2"].block_table == []
    drive.step()
    assert drive.running == ["a-1", "a-2"]
    assert drive.seqs["a-2"].block_table == drive.seqs["a-1"].block_table
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [0, 3, 3, 3]
    assert free_blocks(drive) == 2000


@pytest.mark.parametrize("max_num_seqs", [1, 16])
@pytest.mark.parametrize("after", [1, 2])
def test_the_parent_is_preempted_between_chunks(stage: ModuleType, after: int, max_num_seqs: int) -> None:
    """By an urgent one that wants its row or its blocks; it starts over, and its siblings wait for it again."""
    drive = family(stage, scheduling_policy="priority", max_num_seqs=max_num_seqs, num_kv_blocks=7, max_model_len=28)
    for _ in range(after):
        assert chunks(drive)["a-0"] == 4
    drive.add("urgent", 24, 1, priority=0, arrival=2.0)
    assert chunks(drive)["urgent-0"] == 4
    assert "a-0" in drive.waiting and drive.seqs["a-0"].num_computed_tokens == 0
    assert drive.scheduler.num_preemptions["urgent"] >= 1
    check_blocks(drive)
    while drive.seqs["a-0"].num_output_tokens == 0:
        assert drive.seqs["a-1"].block_table == [] == drive.seqs["a-2"].block_table
        drive.step()
        check_blocks(drive)
    drive.run()
    assert drive.first.index("urgent-0") < drive.first.index("a-0")
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [3, 3, 3, 3, 1]
    assert free_blocks(drive) == 7


def test_a_failed_last_chunk_undoes_the_fork(stage: ModuleType) -> None:
    """What the siblings were to share was not computed: they wait again, holding nothing."""
    drive = family(stage)
    drive.step()
    drive.fail()
    assert (drive.running, drive.waiting, free_blocks(drive)) == ([], ["a-0", "b-0", "a-1", "a-2"], 2000)
    for _ in range(2):
        drive.step()
    drive.fail()
    assert drive.seqs["b-0"].is_finished
    assert (drive.running, drive.waiting, free_blocks(drive)) == ([], ["a-0", "a-1", "a-2"], 2000)
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {3}


def test_a_failed_step_leaves_who_did_not_take_part(stage: ModuleType) -> None:
    """A budget of one decode: the prompt that got nothing keeps what it has."""
    drive = with_chunks(stage, max_num_seqs=2, max_num_batched_tokens=2, max_chunk_size=1)
    drive.add("a", 1, 9)
    drive.add("b", 6, 1)
    drive.step()
    scheduled = drive.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"a-0": 1, "b-0": 1}
    drive.scheduler.undo(scheduled)
    assert (drive.running, drive.waiting) == ([], ["a-0", "b-0"])
    drive.run()
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [9, 1]


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_chunk_size": 0}, ValueError, "max_chunk_size"),
        ({"max_chunk_size": -1}, ValueError, "max_chunk_size"),
        ({"max_chunk_size": 2.5}, (TypeError, ValueError), "max_chunk_size"),
        ({"chunk_policy": "adaptive"}, ValueError, "chunk_policy must be 'fixed' or 'dynamic'"),
        ({"chunk_policy": "dynamic"}, ValueError, "target_step_time_ms goes with chunk_policy='dynamic'"),
        ({"target_step_time_ms": 30.0}, ValueError, "target_step_time_ms goes with chunk_policy='dynamic'"),
        ({"chunk_policy": "dynamic", "target_step_time_ms": 0.0}, ValueError, "target_step_time_ms"),
        ({"chunk_policy": "dynamic", "target_step_time_ms": -3}, ValueError, "target_step_time_ms"),
        ({"chunk_policy": "dynamic", "target_step_time_ms": float("nan")}, ValueError, "target_step_time_ms"),
        ({"chunk_policy": "dynamic", "target_step_time_ms": float("inf")}, ValueError, "target_step_time_ms"),
        ({"chunk_policy": "dynamic", "target_step_time_ms": "30"}, (TypeError, ValueError), "target_step_time_ms"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], error: Any, message: str, stage: ModuleType) -> None:
    with pytest.raises(error, match=message):
        stage.EngineConfig(**options)


def test_defaults(stage: ModuleType, make_llm: MakeLLM) -> None:
    """A step holds 8,192 tokens, and 2,048 of one prompt, while others are there."""
    config = make_llm(max_model_len=64).config
    assert (config.enable_chunked_prefill, config.chunk_policy, config.target_step_time_ms) == (True, "fixed", None)
    assert (config.max_num_batched_tokens, config.max_chunk_size) == (8192, 2048)


def test_a_prompt_may_be_longer_than_a_step(stage: ModuleType, make_llm: MakeLLM) -> None:
    """The budget has to hold a token for everybody, and no more; a long context does not raise it."""
    assert stage.EngineConfig(max_num_batched_tokens=64, max_model_len=65).max_num_batched_tokens == 64
    with pytest.raises(ValueError, match="max_num_batched_tokens=63 is less than max_num_seqs=64"):
        stage.EngineConfig(max_num_batched_tokens=63, max_num_seqs=64)
    config = make_llm(max_num_batched_tokens=20).config
    assert (config.max_model_len, config.max_num_batched_tokens, config.max_num_seqs) == (512, 20, 20)
    with pytest.raises(ValueError, match="max_num_batched_tokens=63 is less than max_model_len=64"):
        stage.EngineConfig(max_num_batched_tokens=63, max_model_len=64, **phases_apart(stage))


# ---------------------------------------------------------------------- records


def test_the_first_chunk_is_when_it_was_scheduled(stage: ModuleType, make_llm: MakeLLM) -> None:
    """And the step of its last chunk is when its first token came."""
    llm = make_llm(max_model_len=64, max_num_batched_tokens=8, max_num_seqs=4, **no_prefix_cache(stage))
    llm.engine.stats.clear()
    params = stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for name, length in (("a", 20), ("b", 12)):
        llm.engine.add_request(name, [5] * length, params)
    outputs = [llm.engine.get_output(name) for name in "ab"]
    grown = []
    while llm.engine.has_unfinished_requests():
        grown.append([output.request_id for output in llm.engine.step()])
    steps = llm.engine.stats.steps
    assert [step.num_tokens for step in steps] == [8, 8, 8, 8, 1, 1]
    assert [step.phase for step in steps[:4]] == ["prefill", "prefill", "prefill", "mixed"]
    assert grown[:2] == [[], []]
    a, b = (output.metrics for output in outputs)
    first = [next(step for step in steps if name in step.seq_ids) for name in ("a-0", "b-0")]
    assert (first[0], first[1]) == (steps[0], steps[2])
    assert (a.first_scheduled_time, b.first_scheduled_time) == (first[0].start, first[1].start)
    assert a.token_times[0][0] > steps[2].start and b.token_times[0][0] > steps[3].start
    assert a.arrival_time <= a.first_scheduled_time < a.token_times[0][0]


def test_an_urgent_one_takes_a_row_and_the_tokens_with_it(stage: ModuleType) -> None:
    """All of the budget was given to whoever has the row: it is given back, and the urgent one comes in this step."""
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "max_chunk_size": 8}
    drive = with_chunks(stage, scheduling_policy="priority", **options)
    drive.add("low", 60, 1, priority=5)
    drive.step()
    drive.add("high", 20, 1, priority=0)
    assert chunks(drive) == {"high-0": 8}
    assert (drive.running, drive.waiting) == (["high-0"], ["low-0"])
    assert drive.scheduler.num_preemptions == {"urgent": 1}


def test_an_urgent_one_among_long_prompts_comes_in_the_next_step(stage: ModuleType) -> None:
    """The least urgent of them leaves the step, keeps its blocks and what it has computed, and nobody is preempted."""
    drive = with_chunks(stage, scheduling_policy="priority", max_num_batched_tokens=64, max_chunk_size=16)
    for number in range(4):
        drive.add(f"{number}", 320, 1, priority=number + 2)
    assert chunks(drive) == {f"{number}-0": 16 for number in range(4)}
    drive.add("urgent", 20, 2, priority=1)
    assert chunks(drive) == {"0-0": 16, "1-0": 16, "2-0": 16, "urgent-0": 16}
    least = drive.seqs["3-0"]
    assert (least.num_computed_tokens, len(least.block_table), least.status) == (
        16,
        2,  # the second one is there for the chunk that it did not get
        stage.SequenceStatus.RUNNING,
    )
    assert chunks(drive) == {"urgent-0": 4, "0-0": 16, "1-0": 16, "2-0": 16, "3-0": 12}
    assert chunks(drive) == {"urgent-0": 1, "0-0": 16, "1-0": 16, "2-0": 16, "3-0": 15}
    assert drive.scheduler.num_preemptions == {}
    check_blocks(drive)
    drive.run()
    assert drive.scheduler.num_preemptions == {} and drive.first[0] == "urgent-0"


@pytest.mark.parametrize("priority", [3, 4])
def test_who_is_no_more_urgent_takes_no_tokens(stage: ModuleType, priority: int) -> None:
    drive = with_chunks(stage, scheduling_policy="priority", max_num_batched_tokens=16, max_chunk_size=16)
    drive.add("long", 64, 1, priority=3)
    drive.step()
    drive.add("late", 4, 1, priority=priority)
    assert chunks(drive) == {"long-0": 16}
    assert (drive.running, drive.waiting) == (["long-0"], ["late-0"])


def test_decodes_keep_their_tokens(stage: ModuleType) -> None:
    """What they have of a step is theirs, however urgent others are: only prompts give tokens back."""
    drive = with_chunks(stage, scheduling_policy="priority", max_num_seqs=4, max_num_batched_tokens=4)
    for name in "ab":
        drive.add(name, 2, 9, priority=5)
    drive.step()
    drive.add("long", 30, 1, priority=4)
    assert chunks(drive) == {"a-0": 1, "b-0": 1, "long-0": 2}
    drive.add("urgent", 3, 1, priority=0)
    assert chunks(drive) == {"a-0": 1, "b-0": 1, "urgent-0": 2}


def test_what_was_promised_to_a_victim_is_free(stage: ModuleType) -> None:
    """Ten blocks: low holds two and is to have four more, mid one. Low's place is all that the urgent one needs."""
    options = {"num_kv_blocks": 10, "max_model_len": 160, "max_chunk_size": 16}
    drive = with_chunks(stage, scheduling_policy="priority", **options)
    drive.add("mid", 5, 9, priority=3)
    drive.add("low", 96, 1, priority=5)
    drive.step()
    drive.add("urgent", 96, 1, priority=0)
    assert chunks(drive) == {"mid-0": 1, "urgent-0": 16}
    assert (drive.running, drive.waiting) == (["mid-0", "urgent-0"], ["low-0"])
    assert drive.scheduler.num_preemptions == {"urgent": 1}
    check_blocks(drive)
    drive.run()


def test_a_decode_is_no_prompt_token(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller hears how many tokens of prompts a step had; of decodes alone it learns what they take."""
    drive = with_chunks(stage, chunk_policy="dynamic", target_step_time_ms=30.0)
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(drive.scheduler.chunk_controller, "update", lambda num, seconds: told.append((num, seconds)))
    for number in range(4):
        drive.add(f"{number}", 1, 9)
    drive.step()
    scheduled = drive.step()
    assert scheduled.phase == "decode"
    drive.scheduler.record_step_time(scheduled, 0.026)
    drive.add("long", 3000, 1)
    scheduled = drive.step()
    assert scheduled.phase == "mixed" and scheduled.total_num_scheduled_tokens == 4 + 512
    drive.scheduler.record_step_time(scheduled, 0.060)
    assert told == [(0, 0.026), (512, 0.060)]
