"""The Scheduler without a model: sequences made by hand, tokens made up, and any order of events.

A state machine checks what must hold after every event. What a policy promises is checked one by one below it; where
vLLM has a test for the same thing, its number in the checklist (reference/vllm_v1.md, 9.4) stands in the docstring.
"""

from __future__ import annotations

import ast
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ..conftest import no_prefix_cache, phases_apart, submodule

pytestmark = pytest.mark.since("m2")

EOS, TOKEN, ANOTHER_TOKEN = 0, 5, 6
MAX_MODEL_LEN = 16
POLICIES = ["fcfs", "priority", "sjf"]

every_policy = pytest.mark.parametrize("policy", POLICIES)


def make_seqs(
    stage: ModuleType,
    request_id: str,
    prompt_len: int = 3,
    max_tokens: int = 4,
    n: int = 1,
    priority: int = 0,
    arrival: float = 0.0,
    **arguments: Any,
) -> list[Any]:
    """The sequences of a request, as the InputProcessor makes them; `arguments` are of SamplingParams."""
    request = stage.Request(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=[TOKEN] * prompt_len,
        sampling_params=stage.SamplingParams(n=n, max_tokens=max_tokens, **arguments),
        max_tokens=max_tokens,
        eos_token_ids=(EOS,),
        arrival_time=arrival,
        priority=priority,
    )
    seed = arguments.get("seed", 0)
    return [stage.Sequence(f"{request_id}-{index}", request, index, seed + index) for index in range(n)]


def make_scheduler(stage: ModuleType, **options: Any) -> Any:
    """Equal prompts find nothing of each other unless the test asks for it: test_prefix_cache.py is about that."""
    sizes = {"max_model_len": 64, "max_num_batched_tokens": 8192, "max_num_seqs": 4}
    options = {**sizes, **no_prefix_cache(stage), **options}
    if "enable_paged_kv" in stage.EngineConfig.__annotations__ and "num_kv_blocks" not in options:
        # As many blocks as rows, each for all of a sequence: this file is about rows, test_paged.py about blocks.
        paging = {"enable_paged_kv": False, "block_size": 1024, "num_kv_blocks": options["max_num_seqs"]}
        options = {**paging, **options}
    if "max_chunk_size" in stage.EngineConfig.__annotations__:
        options = {"max_chunk_size": 2048, **options}
    config = stage.EngineConfig(**options)
    return submodule(stage, "core.sched.scheduler").Scheduler(config)


def make_output(stage: ModuleType, token_ids: list[int], errors: dict[int, str] | None = None) -> Any:
    return submodule(stage, "outputs").ModelRunnerOutput(token_ids, {}, errors or {})


def ids(seqs: Iterable[Any]) -> list[str]:
    return [seq.seq_id for seq in seqs]


def sampled_seqs(scheduled: Any) -> list[Any]:
    """Who gets a token. Before m5 all do."""
    return list(getattr(scheduled, "sampled_seqs", scheduled.seqs))


def num_tokens(scheduled: Any) -> list[int]:
    """How many tokens of each, in the order of the step; nobody else has any."""
    assert scheduled.num_scheduled_tokens.keys() == set(ids(scheduled.seqs))
    return [scheduled.num_scheduled_tokens[seq.seq_id] for seq in scheduled.seqs]


# ---------------------------------------------------------------------- any order of events


class Events(RuleBasedStateMachine):
    """What may happen to a scheduler, and what holds after each event, whatever the rule by which it chooses."""

    def __init__(self, stage: ModuleType) -> None:
        super().__init__()
        self.stage = stage
        self.status = stage.SequenceStatus
        self.seqs: dict[str, Any] = {}  # unfinished
        self.tokens: dict[str, list[int]] = {}  # what each of these should hold
        self.departures: Counter[str] = Counter()  # that no step has reported
        self.num_urgent = 0
        self.ever: list[weakref.ref[Any]] = []

    @initialize(
        policy=st.sampled_from(POLICIES), max_num_seqs=st.integers(1, 4), extra_budget=st.sampled_from([0, 3, 9, 30])
    )
    def start(self, policy: str, max_num_seqs: int, extra_budget: int) -> None:
        self.policy, self.max_num_seqs, self.budget = policy, max_num_seqs, MAX_MODEL_LEN + extra_budget
        self.scheduler = make_scheduler(
            self.stage,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            scheduling_policy=policy,
            **self.options(),
        )

    def options(self) -> dict[str, Any]:
        """More options of the scheduler."""
        return {}

    # ------------------------------------------------------------------ events

    @rule(
        request_id=st.sampled_from("abcdefgh"),
        prompt_len=st.integers(1, MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 6),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-1, 2),
        arrival=st.integers(0, 9),
    )
    def add(self, request_id: str, prompt_len: int, max_tokens: int, n: int, priority: int, arrival: int) -> None:
        """An id may come again once all its sequences have finished. Arrival times are in hundredths of a second."""
        if any(seq.request_id == request_id for seq in self.seqs.values()):
            return
        max_tokens = min(max_tokens, MAX_MODEL_LEN - prompt_len)
        for seq in make_seqs(self.stage, request_id, prompt_len, max_tokens, n, priority, arrival / 100):
            self.scheduler.add_sequence(seq)
            self.seqs[seq.seq_id] = seq
            self.tokens[seq.seq_id] = list(seq.token_ids)
            self.ever.append(weakref.ref(seq))

    @precondition(lambda self: self.seqs)
    @rule(
        num_steps=st.integers(1, 4),
        fates=st.lists(st.sampled_from(["token", "token", "token", "eos", "error"]), min_size=1, max_size=6),
        leaver=st.none() | st.integers(0, 3),
    )
    def step(self, num_steps: int, fates: list[str], leaver: int | None) -> None:
        """Each that runs gets a token, an EOS or an error; `leaver` is aborted while the model runs."""
        for _ in range(num_steps):
            if self.seqs:
                self.one_step(fates, leaver)

    @precondition(lambda self: self.seqs)
    @rule(leaver=st.none() | st.integers(0, 3))
    def failing_step(self, leaver: int | None) -> None:
        """The model raises: whoever took part waits again, in front of those who waited, but for who has left."""
        waiting = list(self.scheduler.waiting)
        scheduled = self.schedule()
        untouched = [seq for seq in self.scheduler.running if seq not in scheduled.seqs]
        self.abort_one_of(scheduled.seqs, leaver)
        before = list(self.scheduler.running)
        self.scheduler.undo(scheduled)
        self.note_departures(before)
        self.departures.update(scheduled.retired_seq_ids)  # nobody has heard
        assert self.scheduler.running == untouched
        if self.policy == "fcfs":
            in_order = scheduled.seqs + [seq for seq in waiting if seq not in scheduled.seqs]
            assert list(self.scheduler.waiting) == [seq for seq in in_order if not seq.is_finished]

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), status=st.sampled_from(["FINISHED_ABORTED", "FINISHED_STOPPED"]))
    def finish(self, data: st.DataObject, status: str) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.seqs)))
        self.finish_from_outside(self.seqs[seq_id], self.status[status])

    @rule()
    def finish_what_is_not_there(self) -> None:
        assert self.scheduler.finish_sequence("nobody", self.status.FINISHED_ABORTED) is None

    # ------------------------------------------------------------------ what an event consists of

    def one_step(self, fates: list[str], leaver: int | None = None) -> Any:
        scheduled = self.schedule()
        # Whoever has tokens left to compute after this step gets none yet.
        complete = [seq for seq in scheduled.seqs if seq.num_computed_tokens == seq.num_tokens]
        assert sampled_seqs(scheduled) == complete
        self.abort_one_of(scheduled.seqs, leaver)
        told = [fates[row % len(fates)] for row in range(len(complete))]
        errors = {row: "ValueError: no" for row, fate in enumerate(told) if fate == "error"}
        token_ids = [EOS if fate == "eos" else ANOTHER_TOKEN for fate in told]
        outputs = self.scheduler.update_from_output(scheduled, make_output(self.stage, token_ids, errors))
        expected = [seq for seq in complete if seq.seq_id in self.seqs]
        assert [output.seq for output in outputs] == expected
        for row, seq in enumerate(complete):
            if seq not in expected:
                continue
            if told[row] != "error":
                self.tokens[seq.seq_id].append(token_ids[row])
            status = {"eos": self.status.FINISHED_STOPPED, "error": self.status.FINISHED_ERROR}.get(told[row])
            if status is None and seq.num_output_tokens == seq.request.max_tokens:
                status = self.status.FINISHED_LENGTH
            assert seq.status is (status or self.status.RUNNING)
            assert seq.stop_reason == ("ValueError: no" if told[row] == "error" else None)
            if status is not None:
                self.note_finished(seq)
        return scheduled

    def schedule(self) -> Any:
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        computed = {seq.seq_id: seq.num_computed_tokens for seq in running}
        scheduled = self.scheduler.schedule()
        victims = self.note_departures(running)
        assert Counter(scheduled.retired_seq_ids) == self.departures, "somebody's departure was lost, or told twice"
        self.departures.clear()

        seqs, nums = scheduled.seqs, num_tokens(scheduled)
        assert 0 < len(seqs) <= self.max_num_seqs
        assert len(seqs) == len(set(ids(seqs)))
        assert min(nums) > 0 and sum(nums) == scheduled.total_num_scheduled_tokens <= self.budget
        for seq, num in zip(seqs, nums, strict=True):
            assert seq.status is self.status.RUNNING and seq in self.scheduler.running
            assert seq.num_computed_tokens == computed.get(seq.seq_id, 0) + num <= seq.num_tokens
        self.num_urgent += len(victims)
        assert self.scheduler.num_preemptions["urgent"] == self.num_urgent
        self.check_choice(scheduled, waiting, running, victims)
        return scheduled

    def check_choice(self, scheduled: Any, waiting: list[Any], running: list[Any], victims: list[Any]) -> None:
        """Whether these were to be chosen, out of those that waited and ran before."""

    def note_departures(self, before: list[Any]) -> list[Any]:
        """Those of `before` who ran and now wait."""
        gone = [seq for seq in before if seq.status is self.status.PREEMPTED]
        self.departures.update(ids(gone))
        return gone

    def note_finished(self, seq: Any) -> None:
        del self.seqs[seq.seq_id], self.tokens[seq.seq_id]
        self.departures[seq.seq_id] += 1

    def abort_one_of(self, seqs: list[Any], number: int | None) -> None:
        """The step, which the model is running, stays as it is."""
        before = list(seqs)
        if number is not None and number < len(seqs):
            self.finish_from_outside(seqs[number], self.status.FINISHED_ABORTED)
        assert seqs == before

    def finish_from_outside(self, seq: Any, status: Any) -> None:
        assert self.scheduler.finish_sequence(seq.seq_id, status) is seq
        assert seq.status is status
        self.note_finished(seq)
        assert self.scheduler.finish_sequence(seq.seq_id, status) is None, "it finished twice"

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def everybody_is_in_one_place(self) -> None:
        waiting, running = list(self.scheduler.waiting), self.scheduler.running
        assert Counter(ids(waiting) + ids(running)) == Counter(self.seqs.keys())
        assert len(self.scheduler.waiting) == len(waiting) and len(running) <= self.max_num_seqs
        assert self.scheduler.has_unfinished_sequences() == bool(self.seqs)
        if waiting:
            assert self.scheduler.waiting.peek() is waiting[0]
        assert {seq.status for seq in running} <= {self.status.RUNNING}
        assert {seq.status for seq in waiting} <= {self.status.WAITING, self.status.PREEMPTED}
        assert not any(seq.num_computed_tokens or seq.block_table for seq in waiting), "who waits holds nothing"
        assert all(0 <= seq.num_computed_tokens < seq.num_tokens for seq in running)
        assert {seq_id: seq.token_ids for seq_id, seq in self.seqs.items()} == self.tokens

    @invariant()
    def the_queue_is_in_order(self) -> None:
        keys = [self.key(seq) for seq in self.scheduler.waiting]
        assert keys == sorted(keys)

    def key(self, seq: Any) -> Any:
        request = seq.request
        if self.policy == "priority":
            return request.priority, request.arrival_time, seq.index
        return 0 if self.policy == "fcfs" else len(request.prompt_token_ids) + 1000.0 * request.arrival_time

    @invariant()
    def nobody_shares_the_cache(self) -> None:
        """With one block a sequence: each has its own, and every block is somebody's or free."""
        rows = [row for seq in self.scheduler.running for row in seq.block_table]
        if hasattr(self.scheduler, "_free_rows"):
            free = self.scheduler._free_rows
        else:
            free_blocks = self.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
            free = [block.block_id for block in free_blocks]
        assert sorted(rows + free) == list(range(self.max_num_seqs))
        assert all(len(seq.block_table) == 1 for seq in self.scheduler.running)

    def teardown(self) -> None:
        """Left to run, everybody finishes; then nothing is left, and the last departures are reported."""
        if not hasattr(self, "scheduler"):
            return
        bound = self.most_steps_to_the_end()
        for _ in range(bound):
            if self.seqs:
                self.one_step(["token"])
                self.everybody_is_in_one_place()
                self.nobody_shares_the_cache()
        assert not self.seqs, f"not done after {bound} steps"
        scheduled = self.scheduler.schedule()
        assert Counter(scheduled.retired_seq_ids) == self.departures
        assert scheduled.seqs == num_tokens(scheduled) == []
        assert self.scheduler.schedule().retired_seq_ids == []
        assert len(self.scheduler.waiting) == 0 and self.scheduler.running == []
        del scheduled
        assert [seq() for seq in self.ever if seq() is not None] == []

    def most_steps_to_the_end(self) -> int:
        """Every step brings at least one token, or one chunk of somebody's prompt."""
        return sum(seq.request.max_tokens - seq.num_output_tokens + seq.num_tokens for seq in self.seqs.values())


class EventsWithPhasesApart(Events):
    """Prefill steps and decode steps: who exactly is chosen, and how soon all are done."""

    def __init__(self, stage: ModuleType) -> None:
        super().__init__(stage)
        self.num_prefills_in_a_row = 0

    def options(self) -> dict[str, Any]:
        return phases_apart(self.stage)

    def check_choice(self, scheduled: Any, waiting: list[Any], running: list[Any], victims: list[Any]) -> None:
        seqs = scheduled.seqs
        forced = self.num_prefills_in_a_row >= 8 and running != []
        self.num_prefills_in_a_row = self.num_prefills_in_a_row + 1 if scheduled.is_prefill else 0
        stayed = [seq for seq in running if seq not in victims]
        if forced:
            assert not scheduled.is_prefill and not victims
        if not scheduled.is_prefill:
            assert seqs == running and num_tokens(scheduled) == [1] * len(running)
        else:
            assert seqs == waiting[: len(seqs)], "somebody was overtaken"
            assert num_tokens(scheduled) == [seq.num_tokens for seq in seqs]
            assert self.scheduler.running == stayed + seqs
        if not forced and self.scheduler.waiting and len(seqs) < len(waiting):
            following = waiting[len(seqs) if scheduled.is_prefill else 0]
            budget = self.budget - (scheduled.total_num_scheduled_tokens if scheduled.is_prefill else 0)
            if following.num_tokens <= budget:  # it would have fitted, but for a row
                assert len(self.scheduler.running) == self.max_num_seqs
                if self.policy == "priority":
                    assert all(seq.request.priority <= following.request.priority for seq in stayed)
        if victims:
            assert self.policy == "priority"
            assert len(victims) == len(seqs) - (self.max_num_seqs - len(running)), "more gave way than there was need"
            victims.sort(key=self.key, reverse=True)
            assert all(self.key(seq) <= self.key(victims[-1]) for seq in stayed), "there was a less urgent one"
            for victim, seq in zip(victims, seqs[-len(victims) :], strict=True):
                assert victim.request.priority > seq.request.priority

    @invariant()
    def all_but_the_newest_token_is_computed(self) -> None:
        assert all(seq.num_computed_tokens == seq.num_tokens - 1 for seq in self.scheduler.running)

    def most_steps_to_the_end(self) -> int:
        """With nobody new.

        Prefill steps: one for each that waits, and for each that is preempted for another, which takes one that waits.
        Decode steps: one in eight of those at worst; else all rows work, or nobody waits any longer.
        """
        left = [seq.request.max_tokens - seq.num_output_tokens for seq in self.seqs.values()]
        prefills = len(self.scheduler.waiting) * (2 if self.policy == "priority" else 1)
        return prefills + prefills // 8 + math.ceil(sum(left) / self.max_num_seqs) + max(left, default=0)


def run_events(stage: ModuleType, machine: type[Events]) -> None:
    class Machine(machine):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(stage)

    examples = 10 * settings().max_examples  # they cost little
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=examples, stateful_step_count=30, report_multiple_bugs=False)
    )


@pytest.mark.since("m5")  # before, the test below does this and more
def test_any_order_of_events(stage: ModuleType) -> None:
    run_events(stage, Events)


def test_any_order_of_events_with_phases_apart(stage: ModuleType) -> None:
    run_events(stage, EventsWithPhasesApart)


@pytest.mark.until("m2")
def test_rows_are_checked(stage: ModuleType) -> None:
    """The state machine looks for them by name."""
    assert make_scheduler(stage, max_num_seqs=3)._free_rows == [2, 1, 0]


def test_the_scheduler_knows_no_tensors(stage: ModuleType) -> None:
    files = list((Path(str(stage.__file__)).parent / "core").rglob("*.py"))
    assert len(files) >= 3
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "numpy"}, file


# ---------------------------------------------------------------------- by hand


class Drive:
    """A scheduler, and who got his tokens when.

    Attributes:
        steps: ids of those who ran in each step.
        first: ids in the order of their first tokens.
        seqs: by id.
    """

    def __init__(self, stage: ModuleType, **options: Any) -> None:
        self.stage = stage
        self.scheduler = make_scheduler(stage, **options)
        self.steps: list[list[str]] = []
        self.first: list[str] = []
        self.seqs: dict[str, Any] = {}

    def add(self, request_id: str, *args: Any, **arguments: Any) -> None:
        for seq in make_seqs(self.stage, request_id, *args, **arguments):
            self.seqs[seq.seq_id] = seq
            self.scheduler.add_sequence(seq)

    def step(self, token: Callable[[Any], int] = lambda seq: ANOTHER_TOKEN) -> Any:
        scheduled = self.scheduler.schedule()
        self.steps.append(ids(scheduled.seqs))
        output = make_output(self.stage, [token(seq) for seq in sampled_seqs(scheduled)])
        for seq_output in self.scheduler.update_from_output(scheduled, output):
            if seq_output.seq.num_output_tokens == 1:
                self.first.append(seq_output.seq.seq_id)
        return scheduled

    def fail(self) -> None:
        self.scheduler.undo(self.scheduler.schedule())

    def run(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.scheduler.has_unfinished_sequences():
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    @property
    def running(self) -> list[str]:
        return ids(self.scheduler.running)

    @property
    def waiting(self) -> list[str]:
        return ids(self.scheduler.waiting)


# ---------------------------------------------------------------------- first come, first served

shapes = st.tuples(st.integers(1, MAX_MODEL_LEN - 1), st.integers(1, 6))
few_rows = st.fixed_dictionaries(
    {"max_num_seqs": st.integers(1, 4), "max_num_batched_tokens": st.sampled_from([16, 17, 24, 64])}
)


@given(options=few_rows, arrivals=st.lists(st.tuples(st.integers(0, 5), shapes), min_size=2, max_size=12))
def test_first_tokens_come_in_order(
    options: dict[str, int], arrivals: list[tuple[int, tuple[int, int]]], stage: ModuleType
) -> None:
    """Under "fcfs", however long the prompts are, and whenever they come."""
    drive = Drive(stage, max_model_len=MAX_MODEL_LEN, **options)
    for number, (steps, (prompt_len, max_tokens)) in enumerate(arrivals):
        for _ in range(steps):
            if drive.scheduler.has_unfinished_sequences():
                drive.step()
        drive.add(f"{number}", prompt_len, min(max_tokens, MAX_MODEL_LEN - prompt_len), arrival=-number)
    drive.run()
    assert drive.first == [f"{number}-0" for number in range(len(arrivals))]


@every_policy
def test_who_does_not_fit_is_not_overtaken(stage: ModuleType, policy: str) -> None:
    """A small one that would fit stays behind; in the next step both are admitted."""
    drive = Drive(stage, max_num_seqs=8, max_num_batched_tokens=64, scheduling_policy=policy, **phases_apart(stage))
    for number, (name, prompt_len) in enumerate([("a", 40), ("b", 25), ("c", 10), ("d", 10)]):
        drive.add(name, prompt_len, arrival=number)
    assert ids(drive.step().seqs) == ["a-0"]
    assert ids(drive.step().seqs) == ["b-0", "c-0", "d-0"]


def test_the_whole_budget_and_not_one_token_more(stage: ModuleType) -> None:
    drive = Drive(stage, max_num_batched_tokens=64, max_num_seqs=9, **phases_apart(stage))
    for name, prompt_len in [("a", 30), ("b", 34), ("c", 1), ("d", 63), ("e", 1)]:
        drive.add(name, prompt_len, 1)
    scheduled = [drive.step() for _ in range(3)]
    assert [num_tokens(step) for step in scheduled] == [[30, 34], [1, 63], [1]]
    assert [step.total_num_scheduled_tokens for step in scheduled] == [64, 64, 1]
    assert [step.is_prefill for step in scheduled] == [True] * 3


def test_prefill_first_then_everybody_decodes(stage: ModuleType) -> None:
    """Whoever is done leaves, and his row is taken in the next step."""
    drive = Drive(stage, max_num_seqs=2, **phases_apart(stage))
    drive.add("a", 5, 2)
    drive.add("b", 6, 4)
    drive.add("c", 7, 2)
    scheduled = [drive.step() for _ in range(6)]
    assert drive.steps == [["a-0", "b-0"], ["a-0", "b-0"], ["c-0"], ["b-0", "c-0"], ["b-0"], []]
    assert [num_tokens(step) for step in scheduled] == [[5, 6], [1, 1], [7], [1, 1], [1], []]
    assert [step.is_prefill for step in scheduled] == [True, False, True, False, False, False]
    assert [step.retired_seq_ids for step in scheduled] == [[], [], ["a-0"], [], ["c-0"], ["b-0"]]


def test_decodes_are_not_starved_by_a_stream_of_newcomers(stage: ModuleType) -> None:
    """Requests of one token each come faster than they are served: after 8 of their steps, one for those that run."""
    drive = Drive(stage, max_num_seqs=3, **phases_apart(stage))
    drive.add("long", 3, 6)
    for number in range(200):
        drive.add(f"{number}a", 1, 1)
        drive.add(f"{number}b", 1, 1)
        drive.step()
        if "long-0" not in drive.running:
            break
    assert drive.seqs["long-0"].is_finished
    turns = [number for number, step in enumerate(drive.steps) if "long-0" in step]
    assert turns == [0, 8, 17, 26, 35, 44]
    assert all(drive.steps[turn] == ["long-0"] for turn in turns[1:])
    drive.run()
    names = [f"{number}{letter}-0" for number in range(45) for letter in "ab"]
    assert drive.first == ["long-0", *names], "the others keep their order"


def test_newcomers_need_not_wait_for_an_empty_room(stage: ModuleType) -> None:
    """With nobody running there is nobody to give a step to."""
    drive = Drive(stage, max_num_seqs=1, **phases_apart(stage))
    for number in range(20):
        drive.add(f"{number}", 1, 1)
    assert [drive.step().is_prefill for _ in range(20)] == [True] * 20


# ---------------------------------------------------------------------- shortest first


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 80), st.integers(1, 4)), min_size=2, max_size=10, unique=True
    )
)
def test_shortest_first_but_who_waits_grows_old(requests: list[tuple[int, int, int]], stage: ModuleType) -> None:
    """Served one at a time, all waiting: the order is by length and age, and nobody is overtaken for ever.

    Arrival times are in milliseconds. Only those can overtake who come within a millisecond a token of the prompt.
    """
    module = submodule(stage, "core.sched.request_queue")
    per_second = module.SJF_TOKENS_PER_SECOND
    drive = Drive(stage, max_num_seqs=1, scheduling_policy="sjf")
    for number, (prompt_len, arrival, max_tokens) in enumerate(requests):
        drive.add(f"{number}", prompt_len, max_tokens, arrival=arrival / 1000)
    drive.run()
    served = [requests[int(seq_id.split("-")[0])] for seq_id in drive.first]
    for place, (prompt_len, arrival, _) in enumerate(served):
        for other_len, other_arrival, _ in served[:place]:
            if other_arrival > arrival:  # it came later, and was served earlier
                assert other_len < prompt_len
                assert (other_arrival - arrival) / 1000 <= prompt_len / per_second
            if other_arrival == arrival:
                assert other_len <= prompt_len
            if other_arrival < arrival and other_len > prompt_len:
                assert (arrival - other_arrival) / 1000 * per_second >= other_len - prompt_len - 1e-6


def test_a_long_prompt_among_a_stream_of_short_ones(stage: ModuleType) -> None:
    """500 tokens, half a second: those who come later than that stay behind it, in whatever numbers they come."""
    drive = Drive(stage, max_num_seqs=1, max_model_len=600, scheduling_policy="sjf")
    drive.add("long", 500, 1, arrival=100.0)
    for hundredth in range(1, 100):
        drive.add(f"{hundredth}", 1, 1, arrival=100.0 + hundredth / 100)
    drive.run()
    place = drive.first.index("long-0")
    assert drive.first[:place] == [f"{hundredth}-0" for hundredth in range(1, 50)]


@pytest.mark.parametrize("policy", ["priority", "sjf"])
def test_a_failed_step_does_not_reorder_the_sequences_of_a_request(stage: ModuleType, policy: str) -> None:
    """They are as urgent as each other, and of one length: only their number tells them apart."""
    drive = Drive(stage, max_num_seqs=2, scheduling_policy=policy)
    drive.add("a", 3, 1, n=4)
    drive.fail()
    assert drive.waiting == ["a-0", "a-1", "a-2", "a-3"]
    drive.fail()
    drive.run()
    assert drive.first == ["a-0", "a-1", "a-2", "a-3"]


# ---------------------------------------------------------------------- by priority


def by_priority(stage: ModuleType, **options: Any) -> Drive:
    return Drive(stage, **{"scheduling_policy": "priority", **options})


def test_priority_order(stage: ModuleType) -> None:
    """Item 24: the smallest value first (…_basic_ordering), whatever the order in which they came."""
    drive = by_priority(stage, max_num_seqs=1)
    for name, priority in [("low", 5), ("high", -1), ("middle", 0)]:
        drive.add(name, 3, 2, priority=priority)
    drive.run()
    assert drive.first == ["high-0", "middle-0", "low-0"]


def test_priority_ties_go_by_arrival(stage: ModuleType) -> None:
    """Item 24: …_arrival_time_tiebreaker and …_mixed_priority_and_arrival."""
    drive = by_priority(stage, max_num_seqs=1)
    for name, priority, arrival in [("d", 1, 3.0), ("b", 0, 2.0), ("c", 1, 0.5), ("a", 0, 1.0), ("e", 1, 9.0)]:
        drive.add(name, 3, 2, priority=priority, arrival=arrival)
    drive.run()
    assert drive.first == ["a-0", "b-0", "c-0", "d-0", "e-0"]


@every_policy
def test_equal_priorities_are_first_come_first_served(stage: ModuleType, policy: str) -> None:
    """Item 24: …_fcfs_fallback; the sequences of one request stay in their order."""
    drive = Drive(stage, max_num_seqs=2, scheduling_policy=policy)
    for number in range(6):
        drive.add(f"{number}", 3, 2, n=2, priority=3, arrival=number)
    drive.run()
    assert drive.first == [f"{number}-{index}" for number in range(6) for index in range(2)]
    assert not drive.scheduler.num_preemptions


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_priorities_count_under_priority_only(stage: ModuleType, policy: str) -> None:
    drive = Drive(stage, max_num_seqs=1, scheduling_policy=policy)
    drive.add("a", 3, 5, priority=9, arrival=0.0)
    drive.step()
    drive.add("b", 3, 5, priority=-9, arrival=1.0)
    drive.run()
    assert drive.first == ["a-0", "b-0"]
    assert not drive.scheduler.num_preemptions


def test_no_preemption_while_a_row_is_free(stage: ModuleType) -> None:
    """Item 26: …_no_preemption_when_space_available."""
    drive = by_priority(stage, max_num_seqs=3)
    drive.add("a", 3, 9, priority=5)
    drive.add("b", 3, 9, priority=5)
    drive.step()
    drive.add("urgent", 3, 9, priority=0)
    drive.step()
    assert drive.running == ["a-0", "b-0", "urgent-0"]
    assert not drive.scheduler.num_preemptions


def test_priority_queue_with_few_rows(stage: ModuleType) -> None:
    """Item 27: …_waiting_queue_order and …_with_limited_slots."""
    drive = by_priority(stage, max_num_seqs=2)
    for number, priority in enumerate([4, 1, 3, 0, 2]):
        drive.add(f"p{priority}", 3, 2, priority=priority, arrival=number)
    assert drive.waiting == ["p0-0", "p1-0", "p2-0", "p3-0", "p4-0"]
    drive.step()
    assert (drive.running, drive.waiting) == (["p0-0", "p1-0"], ["p2-0", "p3-0", "p4-0"])
    drive.run()
    assert drive.first == ["p0-0", "p1-0", "p2-0", "p3-0", "p4-0"]


@given(priorities=st.lists(st.integers(-3, 3), min_size=1, max_size=30), data=st.data())
def test_the_order_survives_removals(priorities: list[int], data: st.DataObject, stage: ModuleType) -> None:
    """Item 27: …_heap_property, with requests that are aborted while they wait."""
    drive = by_priority(stage, max_num_seqs=1)
    for number, priority in enumerate(priorities):
        drive.add(f"{number}", 2, 1, priority=priority, arrival=number)
    gone = data.draw(st.sets(st.integers(0, len(priorities) - 1)))
    for number in gone:
        drive.scheduler.finish_sequence(f"{number}-0", stage.SequenceStatus.FINISHED_ABORTED)
    left = sorted((priority, number) for number, priority in enumerate(priorities) if number not in gone)
    assert drive.waiting == [f"{number}-0" for _, number in left]
    drive.run()
    assert drive.first == [f"{number}-0" for _, number in left]


# ---------------------------------------------------------------------- urgent requests take rows


def test_the_least_urgent_gives_way(stage: ModuleType) -> None:
    """The largest (priority, arrival); it waits again, keeps its output, and is the only one that is recomputed."""
    drive = by_priority(stage, max_num_seqs=3)
    for name, priority, arrival in [("early", 5, 0.0), ("late", 5, 2.0), ("good", 1, 3.0)]:
        drive.add(name, 4, 8, priority=priority, arrival=arrival)
    while drive.seqs["late-0"].num_output_tokens < 3:
        drive.step()
    drive.add("urgent", 6, 2, priority=0, arrival=4.0)
    scheduled = drive.step()
    assert drive.running == ["good-0", "early-0", "urgent-0"]
    assert "late-0" in scheduled.retired_seq_ids and "urgent-0" in drive.steps[-1]
    late = drive.seqs["late-0"]
    assert late.status is stage.SequenceStatus.PREEMPTED
    assert (late.num_computed_tokens, late.block_table, late.num_output_tokens) == (0, [], 3)
    assert drive.scheduler.num_preemptions == {"urgent": 1}
    while late.num_computed_tokens == 0:
        scheduled = drive.step()
    assert scheduled.num_scheduled_tokens["late-0"] == 4 + 3, "prompt and output again"
    drive.run()
    assert {len(seq.output_token_ids) for name, seq in drive.seqs.items() if name != "urgent-0"} == {8}
    assert drive.scheduler.num_preemptions == {"urgent": 1}


def test_equal_priority_takes_no_row(stage: ModuleType) -> None:
    """Nor does a request that came earlier."""
    drive = by_priority(stage, max_num_seqs=1)
    drive.add("a", 3, 5, priority=2, arrival=1.0)
    drive.step()
    drive.add("b", 3, 5, priority=2, arrival=0.0)
    drive.add("c", 3, 5, priority=3, arrival=0.0)
    drive.run()
    assert drive.first == ["a-0", "b-0", "c-0"]
    assert not drive.scheduler.num_preemptions


def test_no_more_give_way_than_the_step_can_admit(stage: ModuleType) -> None:
    """Four urgent prompts wait and two fit into the token budget: two rows are taken, and the others a step later."""
    drive = by_priority(stage, max_num_seqs=4, max_num_batched_tokens=64, **phases_apart(stage))
    for number in range(4):
        drive.add(f"{number}", 3, 9, priority=5, arrival=number)
    drive.step()
    for number in range(4):
        drive.add(f"u{number}", 30, 9, priority=0, arrival=10 + number)
    drive.step()
    assert drive.running == ["0-0", "1-0", "u0-0", "u1-0"]
    assert drive.scheduler.num_preemptions == {"urgent": 2}
    drive.step()
    assert drive.running == ["u0-0", "u1-0", "u2-0", "u3-0"]
    assert drive.scheduler.num_preemptions == {"urgent": 4}


def test_free_rows_are_taken_before_anybody_gives_way(stage: ModuleType) -> None:
    drive = by_priority(stage, max_num_seqs=3)
    drive.add("a", 3, 9, priority=5, arrival=0.0)
    drive.add("b", 3, 9, priority=4, arrival=1.0)
    drive.step()
    for number in range(2):
        drive.add(f"u{number}", 3, 9, priority=0, arrival=2.0 + number)
    drive.step()
    assert drive.running == ["b-0", "u0-0", "u1-0"]
    assert drive.scheduler.num_preemptions == {"urgent": 1}


def test_several_urgent_ones_take_the_least_urgent_rows(stage: ModuleType) -> None:
    """Each only of somebody less urgent than itself."""
    drive = by_priority(stage, max_num_seqs=3)
    for name, priority in [("a", 1), ("b", 3), ("c", 7)]:
        drive.add(name, 3, 9, priority=priority)
    drive.step()
    for name, priority in [("u0", 0), ("u2", 2), ("u4", 4)]:
        drive.add(name, 3, 9, priority=priority)
    drive.step()
    assert drive.running == ["a-0", "u0-0", "u2-0"]
    assert drive.waiting == ["b-0", "u4-0", "c-0"]


def test_a_step_that_belongs_to_the_decodes_takes_no_row(stage: ModuleType) -> None:
    """After 8 prefill steps in a row those that run get their step, the victim-to-be among them."""
    drive = by_priority(stage, max_num_seqs=2, **phases_apart(stage))
    drive.add("slow", 3, 9, priority=5)
    for number in range(8):
        drive.step()
        drive.add(f"{number}", 1, 1, priority=5, arrival=1 + number)
    drive.add("u0", 3, 9, priority=0)
    drive.add("u1", 3, 9, priority=0)
    drive.step()
    assert drive.steps[-1] == ["slow-0"] and not drive.scheduler.num_preemptions
    drive.step()
    assert drive.running == ["u0-0", "u1-0"]


def test_a_preempted_sequence_may_be_aborted(stage: ModuleType) -> None:
    drive = by_priority(stage, max_num_seqs=1)
    drive.add("a", 3, 9, priority=5)
    drive.step()
    drive.add("b", 3, 2, priority=0)
    assert drive.step().retired_seq_ids == ["a-0"]
    assert drive.scheduler.finish_sequence("a-0", stage.SequenceStatus.FINISHED_ABORTED) is drive.seqs["a-0"]
    drive.run()
    assert drive.first == ["a-0", "b-0"]
    assert not drive.scheduler.running and not drive.waiting


# ---------------------------------------------------------------------- steps that fail


def test_who_was_in_a_failed_step_starts_over(stage: ModuleType) -> None:
    """What the step wrote cannot be trusted. Output is kept, and nobody new comes before those who ran."""
    drive = Drive(stage, max_num_seqs=2, **phases_apart(stage))
    for name in "abc":
        drive.add(name, 3, 4)
    drive.fail()
    assert (drive.running, drive.waiting) == ([], ["a-0", "b-0", "c-0"])
    assert ids(drive.step().seqs) == ["a-0", "b-0"]
    drive.step()
    drive.fail()
    assert (drive.running, drive.waiting) == ([], ["a-0", "b-0", "c-0"])
    assert {drive.seqs[name].status for name in ("a-0", "b-0")} == {stage.SequenceStatus.PREEMPTED}
    scheduled = drive.step()
    assert (ids(scheduled.seqs), num_tokens(scheduled)) == (["a-0", "b-0"], [3 + 2, 3 + 2])
    assert sorted(scheduled.retired_seq_ids) == ["a-0", "b-0"]
    assert drive.seqs["a-0"].num_output_tokens == 3
    drive.run()
    assert {seq.num_output_tokens for seq in drive.seqs.values()} == {4}
    assert not drive.scheduler.num_preemptions, "to start over after a failure is no preemption"


def test_a_failed_prefill_leaves_those_who_decode_alone(stage: ModuleType) -> None:
    drive = Drive(stage, max_num_seqs=2)
    drive.add("a", 3, 9)
    drive.step()
    drive.add("b", 3, 9)
    scheduled = drive.scheduler.schedule()
    drive.scheduler.undo(scheduled)
    assert drive.running == [name for name in ("a-0",) if name not in ids(scheduled.seqs)]
    drive.run()
    assert drive.first == ["a-0", "b-0"]


@every_policy
@pytest.mark.parametrize("num_failures", [1, 3, 10])
def test_every_step_may_fail_several_times(stage: ModuleType, policy: str, num_failures: int) -> None:
    """Everybody gets all his tokens, in the order in which he would; and every departure is told."""
    drive = Drive(stage, max_num_seqs=2, scheduling_policy=policy)
    for number in range(5):
        drive.add(f"{number}", 3 + number, 2 + number, arrival=number)
    retired: Counter[str] = Counter()
    for _ in range(100):
        for _ in range(num_failures):
            drive.fail()
        retired.update(drive.step().retired_seq_ids)
        if not drive.scheduler.has_unfinished_sequences():
            break
    assert drive.first == [f"{number}-0" for number in range(5)]
    assert [seq.num_output_tokens for seq in drive.seqs.values()] == [2, 3, 4, 5, 6]
    retired.update(drive.scheduler.schedule().retired_seq_ids)
    assert all(retired[seq_id] >= num_failures + 1 for seq_id in drive.seqs)


def test_a_step_may_fail_after_some_tokens_were_taken_in(stage: ModuleType) -> None:
    """A sequence that its token has finished is gone; the others start over."""
    drive = Drive(stage, max_num_seqs=3)
    drive.add("a", 3, 1)
    drive.add("b", 3, 2)
    scheduled = drive.scheduler.schedule()
    with pytest.raises(IndexError):
        drive.scheduler.update_from_output(scheduled, make_output(stage, [ANOTHER_TOKEN]))
    drive.scheduler.undo(scheduled)
    assert drive.seqs["a-0"].is_finished
    assert (drive.running, drive.waiting) == ([], ["b-0"])
    assert Counter(drive.step().retired_seq_ids) == {"a-0": 1, "b-0": 1}
    drive.run()
    assert not drive.scheduler.has_unfinished_sequences()


def test_an_id_may_be_used_again_at_once(stage: ModuleType) -> None:
    """The step that admits the new one reports that the old one left."""
    drive = Drive(stage, max_num_seqs=1)
    drive.add("a", 3, 9)
    drive.step()
    old = drive.seqs["a-0"]
    drive.scheduler.finish_sequence("a-0", stage.SequenceStatus.FINISHED_ABORTED)
    drive.add("a", 5, 9)
    scheduled = drive.step()
    assert scheduled.seqs == [drive.seqs["a-0"]] and drive.seqs["a-0"] is not old
    assert (num_tokens(scheduled), scheduled.retired_seq_ids) == ([5], ["a-0"])
