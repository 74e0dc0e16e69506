"""Prompts that arrive together and begin alike: one computes what they share, the others wait for it and find it.

The scheduler alone, with tokens made up. Who may be found at all is in test_prefix_cache.py, any order of events in
tests/property/test_prefix_cache.py.
"""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest

from ..conftest import submodule
from ..property.test_scheduler import Drive, every_policy, ids, make_seqs, num_tokens
from .test_prefix_cache import make_seq

pytestmark = pytest.mark.since("m6")

SIZES = {"max_model_len": 2048, "block_size": 16, "num_kv_blocks": 2000, "max_num_seqs": 32}


def start(stage: ModuleType, **options: Any) -> Drive:
    return Drive(stage, **{"enable_prefix_caching": True, **SIZES, **options})


def send(drive: Drive, name: str, tokens: list[int], max_tokens: int = 1, **arguments: Any) -> Any:
    seq = make_seq(drive.stage, name, tokens, max_tokens=max_tokens, **arguments)
    drive.seqs[seq.seq_id] = seq
    drive.scheduler.add_sequence(seq)
    return seq


def text(number: int, length: int) -> list[int]:
    """Every number has a text of its own, no two of which begin alike."""
    rng = random.Random(number)
    return [10_000 + number, *(rng.randrange(10_000) for _ in range(length - 1))]


def family(drive: Drive, num: int, num_shared: int, num_own: int, number: int = 0, **arguments: Any) -> list[Any]:
    """Prompts that share the beginning of one text."""
    shared = text(number, num_shared)
    own = [text(100 * number + i + 1, num_own) for i in range(num)]
    return [send(drive, f"{number}.{i}", shared + own[i], **arguments) for i in range(num)]


def found(seqs: list[Any]) -> list[int]:
    return [seq.num_cached_tokens for seq in seqs]


@pytest.mark.parametrize(("num", "num_shared", "num_own", "computed"), [(16, 256, 16, 512), (8, 1000, 10, 1080)])
@pytest.mark.parametrize("is_chunked", [True, False])
@every_policy
def test_the_others_wait_one_step(
    stage: ModuleType, num: int, num_shared: int, num_own: int, computed: int, is_chunked: bool, policy: str
) -> None:
    """What they share is computed once. Who waits is counted once, when he is admitted."""
    drive = start(stage, enable_chunked_prefill=is_chunked, scheduling_policy=policy)
    seqs = family(drive, num, num_shared, num_own, max_tokens=2)
    first, second = drive.step(), drive.step()
    assert num_tokens(first) == [num_shared + num_own]
    decodes = [1] if is_chunked else []
    assert num_tokens(second) == decodes + [num_own] * (num - 1)
    assert sum(num_tokens(first)) + sum(num_tokens(second)) - len(decodes) == computed
    assert found(seqs) == [0] + [num_shared] * (num - 1)
    stats = drive.scheduler.make_stats()
    assert stats["prefix_cache_queries"] == num * (num_shared + num_own)
    assert stats["prefix_cache_hits"] == (num - 1) * num_shared
    drive.run()


@pytest.mark.parametrize(("length", "num_found"), [(15, None), (16, 15), (31, 16), (32, 31), (40, 32)])
def test_two_equal_prompts(stage: ModuleType, length: int, num_found: int | None) -> None:
    """All whole blocks but for the last token; where there is none, there is nothing to wait for."""
    drive = start(stage)
    seqs = [send(drive, name, text(0, length)) for name in "ab"]
    if num_found is None:
        assert num_tokens(drive.step()) == [length] * 2 and found(seqs) == [0, 0]
        return
    assert num_tokens(drive.step()) == [length]
    assert seqs[1].num_cached_tokens == -1 and seqs[1].num_computed_tokens == 0 and seqs[1].block_table == []
    assert num_tokens(drive.step()) == [length - num_found] and found(seqs) == [0, num_found]


def test_nobody_waits_for_what_is_there(stage: ModuleType) -> None:
    """Of a block that is cached, several compute the last token again in the same step."""
    drive = start(stage)
    seqs = [send(drive, "a", text(0, 32))]
    drive.step()
    seqs += [send(drive, name, text(0, 32)) for name in "bcd"]
    assert num_tokens(drive.step()) == [1, 1, 1] and found(seqs) == [0, 31, 31, 31]


def test_a_leader_in_chunks(stage: ModuleType) -> None:
    """Who shares four chunks waits for four, who shares two for two; others pass, and nobody computes twice."""
    drive = start(stage, max_chunk_size=64)
    shared = text(0, 256)
    names = {"leader": shared + text(1, 100), "all": shared + text(2, 20), "half": shared[:128] + text(3, 20)}
    for name, tokens in names.items():
        send(drive, name, tokens)
    send(drive, "other", text(9, 30))
    steps = [drive.step().num_scheduled_tokens for _ in range(6)]
    assert steps == [
        {"leader-0": 64, "other-0": 30},
        {"leader-0": 64},
        {"leader-0": 64, "half-0": 20},
        {"leader-0": 64},
        {"leader-0": 64, "all-0": 20},
        {"leader-0": 36},
    ]
    assert not drive.scheduler.has_unfinished_sequences()


@pytest.mark.parametrize("chunk", [5, 16, 24])
def test_chunks_that_end_within_a_block(stage: ModuleType, chunk: int) -> None:
    drive = start(stage, max_chunk_size=chunk)
    seqs = family(drive, 5, 64, 16)
    drive.run()
    assert found(seqs) == [0] + [64] * 4


def test_followers_of_different_leaders(stage: ModuleType) -> None:
    """Each waits for his own, and some for a follower."""
    drive = start(stage)
    a, b = text(0, 32), text(1, 48)
    both = [*a, *text(2, 16)]
    for name, tokens in {
        "a": [*a, 1],
        "b": [*b, 1],
        "a-follows": [*a, 2],
        "a-too": [*both, 3],
        "b-follows": [*b, 4],
        "last": [*both, 5],
        "alone": text(3, 40),
    }.items():
        send(drive, name, tokens)
    steps = [drive.step().num_scheduled_tokens for _ in range(3)]
    assert steps == [
        {"a-0": 33, "b-0": 49, "alone-0": 40},
        {"a-follows-0": 1, "a-too-0": 17, "b-follows-0": 1},
        {"last-0": 1},
    ]


def test_a_follower_of_one_who_runs(stage: ModuleType) -> None:
    """Also who comes while the leader is in the middle of its prompt; a decode is nobody's leader."""
    drive = start(stage, max_chunk_size=32)
    tokens = text(0, 96)
    leader = send(drive, "leader", tokens, max_tokens=40)
    send(drive, "other", text(1, 1000))
    drive.step()
    follower = send(drive, "follower", [*tokens[:64], 1])
    assert "follower-0" not in drive.step().num_scheduled_tokens
    assert drive.step().num_scheduled_tokens["follower-0"] == 1 and follower.num_cached_tokens == 64
    while leader.num_tokens < 112:
        drive.step()
    assert leader.num_computed_tokens == 111
    late = send(drive, "late", leader.token_ids)
    assert drive.step().num_scheduled_tokens["late-0"] == 112 - 96 and late.num_cached_tokens == 96


def test_salts_do_not_wait_for_each_other(stage: ModuleType) -> None:
    drive = start(stage)
    tokens = text(0, 40)
    salts = [None, "x", "y", "x", None]
    seqs = [send(drive, f"{i}", tokens, salt=salt) for i, salt in enumerate(salts)]
    assert ids(drive.step().seqs) == ["0-0", "1-0", "2-0"]
    assert ids(drive.step().seqs) == ["3-0", "4-0"]
    assert found(seqs) == [0, 0, 0, 32, 32]


@every_policy
def test_who_shares_no_block_is_never_set_aside(stage: ModuleType, policy: str) -> None:
    """Unrelated prompts, and some that part within the first block or end in it."""
    drive = start(stage, scheduling_policy=policy)
    shared = text(0, 15)
    tokens = [text(i + 1, 40) for i in range(10)] + [[*shared, i, *text(50 + i, 40)] for i in range(10)] + [shared] * 3
    for i, prompt in enumerate(tokens):
        send(drive, f"{i}", prompt)
    assert len(drive.step().seqs) == 23 and drive.waiting == []


@pytest.mark.parametrize("is_chunked", [True, False])
def test_switched_off_nobody_waits(stage: ModuleType, is_chunked: bool) -> None:
    drive = start(stage, enable_prefix_caching=False, enable_chunked_prefill=is_chunked)
    seqs = family(drive, 16, 256, 16)
    assert num_tokens(drive.step()) == [272] * 16 and found(seqs) == [0] * 16


def test_siblings_let_others_pass(stage: ModuleType) -> None:
    """More of them than may run wait for a prompt in chunks, as in m5."""
    for is_on in (True, False):
        drive = start(stage, enable_prefix_caching=is_on, max_num_seqs=3, max_chunk_size=16)
        for seq in make_seqs(stage, "a", 80, 2, n=5):
            drive.scheduler.add_sequence(seq)
        send(drive, "b", text(1, 3))
        assert ids(drive.step().seqs) == ["a-0", "b-0"]
        drive.run()


# ---------------------------------------------------------------------- order


def test_followers_keep_their_order(stage: ModuleType) -> None:
    """Others pass them while they wait. Then they are the first, before others who came after them."""
    drive = start(stage, max_num_seqs=3)
    family(drive, 3, 32, 8, max_tokens=3)
    for i in range(3):
        send(drive, f"other{i}", text(5 + i, 20), max_tokens=1)
    assert ids(drive.step().seqs) == ["0.0-0", "other0-0", "other1-0"]
    assert drive.waiting == ["0.1-0", "0.2-0", "other2-0"]
    assert ids(drive.step().seqs) == ["0.0-0", "0.1-0", "0.2-0"]
    drive.run()
    assert drive.first == ["0.0-0", "other0-0", "other1-0", "0.1-0", "0.2-0", "other2-0"]


def test_priority_names_the_leader(stage: ModuleType) -> None:
    """The most urgent one computes, the others keep the order of their urgency; somebody less urgent passes them."""
    drive = start(stage, scheduling_policy="priority", max_num_seqs=4)
    shared = text(0, 32)
    for i, priority in enumerate((2, 0, 3, 1)):
        send(drive, f"{i}", [*shared, i], priority=priority, arrival=float(i))
    send(drive, "last", text(9, 20), priority=9)
    assert ids(drive.step().seqs) == ["1-0", "last-0"]
    assert drive.waiting == ["3-0", "0-0", "2-0"]
    assert ids(drive.step().seqs) == ["3-0", "0-0", "2-0"]


def test_the_shortest_is_the_leader(stage: ModuleType) -> None:
    drive = start(stage, scheduling_policy="sjf")
    shared = text(0, 32)
    seqs = [send(drive, f"{i}", shared + text(i + 1, num_own)) for i, num_own in enumerate((20, 3, 9))]
    assert ids(drive.step().seqs) == ["1-0"] and drive.waiting == ["2-0", "0-0"]
    assert ids(drive.step().seqs) == ["2-0", "0-0"] and found(seqs) == [32, 0, 32]


# ---------------------------------------------------------------------- who leads may leave


def test_a_leader_that_is_aborted_within_the_step(stage: ModuleType) -> None:
    """Nothing of it is found, so the next one computes it; the third waits for that one."""
    drive = start(stage)
    leader, follower, third = family(drive, 3, 64, 8)
    scheduled = drive.scheduler.schedule()
    assert ids(scheduled.seqs) == [leader.seq_id]
    drive.scheduler.finish_sequence(leader.seq_id, stage.SequenceStatus.FINISHED_ABORTED)
    drive.scheduler.update_from_output(scheduled, submodule(stage, "outputs").ModelRunnerOutput([5], {}, {}))
    assert drive.step().num_scheduled_tokens == {follower.seq_id: 72}
    assert drive.step().num_scheduled_tokens == {third.seq_id: 8}
    assert found([leader, follower, third]) == [0, 0, 64]


def test_a_leader_that_is_aborted_between_chunks(stage: ModuleType) -> None:
    """What it has computed is found."""
    drive = start(stage, max_chunk_size=32)
    leader, follower, _ = family(drive, 3, 64, 8)
    assert ids(drive.step().seqs) == [leader.seq_id]
    drive.scheduler.finish_sequence(leader.seq_id, stage.SequenceStatus.FINISHED_ABORTED)
    assert drive.step().num_scheduled_tokens == {follower.seq_id: 32} and follower.num_cached_tokens == 32


def test_a_step_that_fails(stage: ModuleType) -> None:
    drive = start(stage)
    seqs = family(drive, 3, 64, 8)
    for _ in range(3):
        drive.fail()
        assert drive.waiting == ids(seqs)
    assert [num_tokens(drive.step()) for _ in range(2)] == [[72], [8, 8]]


def test_a_leader_that_is_preempted_in_the_same_step(stage: ModuleType) -> None:
    """Somebody urgent takes its place after its tokens were given out.

    The follower, who waited for these, is more urgent than the leader. So it goes on by itself where the leader was.
    """
    drive = start(stage, scheduling_policy="priority", max_num_seqs=2, max_chunk_size=16)
    shared = text(0, 48)
    leader = send(drive, "leader", [*shared, 1], priority=5)
    send(drive, "other", text(1, 10), max_tokens=2, priority=1)
    assert drive.step().num_scheduled_tokens == {"leader-0": 16, "other-0": 10}
    send(drive, "urgent", text(2, 10), priority=0)
    follower = send(drive, "follower", [*shared, 2], priority=3)
    assert ids(drive.step().seqs) == ["other-0", "urgent-0"]
    assert drive.scheduler.num_preemptions == {"urgent": 1}
    assert drive.waiting == ["follower-0", "leader-0"] and leader.num_computed_tokens == 0
    assert [drive.step().num_scheduled_tokens for _ in range(3)] == [
        {"follower-0": 16},
        {"follower-0": 16},
        {"follower-0": 1, "leader-0": 1},
    ]
    assert follower.num_cached_tokens == 16 and not drive.scheduler.has_unfinished_sequences()


# ---------------------------------------------------------------------- nobody waits for ever


def test_nobody_starves_where_leaders_leave(stage: ModuleType) -> None:
    """Whoever leads is aborted within its step: in every step another one leads, the first of those who wait."""
    drive = start(stage)
    seqs = family(drive, 6, 64, 8)
    for seq in seqs[:-1]:
        scheduled = drive.scheduler.schedule()
        assert ids(scheduled.seqs) == [seq.seq_id]
        drive.scheduler.finish_sequence(seq.seq_id, stage.SequenceStatus.FINISHED_ABORTED)
        drive.scheduler.update_from_output(scheduled, submodule(stage, "outputs").ModelRunnerOutput([5], {}, {}))
    assert drive.step().num_scheduled_tokens == {seqs[-1].seq_id: 72}
    assert not drive.scheduler.has_unfinished_sequences()


@pytest.mark.parametrize("max_num_seqs", [2, 32])
@every_policy
def test_nobody_starves_in_a_stream_that_begins_alike(stage: ModuleType, max_num_seqs: int, policy: str) -> None:
    """In every step one comes who begins like the one before for another block: all are leaders and followers."""
    drive = start(stage, scheduling_policy=policy, max_num_seqs=max_num_seqs)
    tokens = text(0, 16 * 60)
    came: dict[str, int] = {}
    for step in range(40):
        seq = send(drive, f"{step}", [*tokens[: 16 * (step + 1)], 1], arrival=float(step))
        came[seq.seq_id] = step
        for seq_id in ids(drive.step().seqs):
            assert step - came[seq_id] <= 1
    assert len(drive.waiting) <= 1


def test_many_who_wait_are_not_all_looked_up(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's work is bounded by the rows, not by the queue: as many are set aside as may run."""
    drive = start(stage, max_num_seqs=4)
    seqs = family(drive, 500, 32, 8)
    cache = drive.scheduler.kv_cache_manager.prefix_cache
    match, looked_up = cache.match, []

    def counting(seq: Any) -> Any:
        looked_up.append(seq.seq_id)
        return match(seq)

    monkeypatch.setattr(cache, "match", counting)
    assert ids(drive.step().seqs) == ids(seqs[:1])
    assert looked_up == ids(seqs[:5])
    for number in range(1, 497, 4):
        looked_up.clear()
        assert ids(drive.step().seqs) == ids(seqs[number : number + 4])
        assert len(looked_up) == 5, "those who run, and the first for whom there is no row"
    drive.run()
