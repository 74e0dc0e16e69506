"""The queues of waiting sequences: each against a list that is sorted anew at every look."""

from __future__ import annotations

from itertools import islice
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import submodule
from ..property.test_scheduler import POLICIES, make_seqs

pytestmark = pytest.mark.since("m2")

every_policy = pytest.mark.parametrize("policy", POLICIES)


def make_queue(stage: ModuleType, policy: str) -> Any:
    return submodule(stage, "core.sched.request_queue").create_request_queue(policy)


def key_of(policy: str, seq: Any) -> Any:
    """The order of service as the documentation has it; equal keys stay as they are."""
    request = seq.request
    if policy == "fcfs":
        return 0
    if policy == "priority":
        return request.priority, request.arrival_time, seq.index
    return len(request.prompt_token_ids) + 1000.0 * request.arrival_time


events = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "prepend", "pop", "remove"]),
        st.integers(0, 4),  # prompt, priority and arrival: few values, so that many keys are equal
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 20),
    ),
    max_size=40,
)


@every_policy
@given(events=events)
def test_any_order_of_events(policy: str, events: list[tuple[str, int, int, int, int]], stage: ModuleType) -> None:
    """Whoever is prepended comes before those of his own key, whoever is added behind them."""
    queue = make_queue(stage, policy)
    model: list[Any] = []  # a stable sort keeps the order of equal keys
    for number, (event, prompt, priority, arrival, place) in enumerate(events):
        if event in ("add", "prepend"):
            (seq,) = make_seqs(stage, f"{number}", prompt + 1, priority=priority, arrival=arrival / 1000)
            getattr(queue, event)(seq)
            model.insert(len(model) if event == "add" else 0, seq)
            model.sort(key=lambda each: key_of(policy, each))
        elif model and event == "pop":
            assert queue.pop() is model.pop(0)
        elif model and event == "remove":
            queue.remove(model.pop(place % len(model)))
        assert len(queue) == len(model)
        assert list(queue) == model
        assert bool(queue) == bool(model)
        if model:
            assert queue.peek() is model[0]
    assert [queue.pop() for _ in model] == model
    assert len(queue) == 0


@every_policy
def test_nobody_waits(stage: ModuleType, policy: str) -> None:
    queue = make_queue(stage, policy)
    (seq,) = make_seqs(stage, "a")
    for call in (queue.peek, queue.pop):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError):
        queue.remove(seq)
    assert list(queue) == []


@every_policy
def test_removing_one_who_does_not_wait(stage: ModuleType, policy: str) -> None:
    """A ValueError, as the contract says, and the others stay."""
    queue = make_queue(stage, policy)
    here, gone = make_seqs(stage, "a", n=2)
    queue.add(here)
    with pytest.raises(ValueError):
        queue.remove(gone)
    assert list(queue) == [here]


@every_policy
def test_looking_changes_nothing(stage: ModuleType, policy: str) -> None:
    queue = make_queue(stage, policy)
    seqs = [seq for number in range(6) for seq in make_seqs(stage, f"{number}", arrival=number)]
    for seq in reversed(seqs):
        queue.prepend(seq)
    assert list(islice(queue, 2)) == seqs[:2]
    assert list(queue) == list(queue) == seqs
    assert [queue.pop() for _ in seqs] == seqs


def test_an_order_of_service_may_change_while_somebody_looks(stage: ModuleType) -> None:
    """The scheduler preempts, and so prepends, in the middle of a look."""
    queue = make_queue(stage, "priority")
    seqs = [seq for number in range(4) for seq in make_seqs(stage, f"{number}", priority=number)]
    for seq in seqs:
        queue.add(seq)
    (victim,) = make_seqs(stage, "victim", priority=2, arrival=-1.0)
    looked: list[Any] = []
    for seq in queue:
        if not looked:
            queue.prepend(victim)
        looked.append(seq)
    assert looked == seqs
    assert list(queue) == [*seqs[:2], victim, *seqs[2:]]


def test_urgency(stage: ModuleType) -> None:
    """By priority, then arrival, then number within the request; and by nothing else."""
    urgency = submodule(stage, "core.sched.request_queue").urgency
    first, second = make_seqs(stage, "a", n=2, priority=1, arrival=5.0)
    (earlier,) = make_seqs(stage, "b", prompt_len=60, priority=1, arrival=4.0)
    (urgent,) = make_seqs(stage, "c", priority=0, arrival=9.0)
    assert sorted([second, first, earlier, urgent], key=urgency) == [urgent, earlier, first, second]


def test_age_counts_as_tokens(stage: ModuleType) -> None:
    """A prompt of 500 tokens stands with one of 1 token that comes 0.499 s later. Output does not count."""
    module = submodule(stage, "core.sched.request_queue")
    assert module.SJF_TOKENS_PER_SECOND == 1000.0
    aged = module.aged_prompt_length
    (long,) = make_seqs(stage, "a", prompt_len=500, arrival=10.0)
    (sooner,), (later,) = (make_seqs(stage, f"{at}", prompt_len=1, arrival=at) for at in (10.498, 10.500))
    assert aged(sooner) < aged(long) < aged(later)
    before = aged(long)
    long.token_ids.extend([5] * 100)
    assert aged(long) == before
