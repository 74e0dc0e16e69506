"""ChunkController on its own: steps whose time is known beforehand, and how many prompt tokens it then asks for.

A step of n prompt tokens takes a + b n seconds here. It must find the n at which that is the target, keep within its
limits wherever that n lies, and learn nothing from steps that have nothing to teach.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import submodule

pytestmark = pytest.mark.since("m5")

MAX_TOKENS = 8192


def make_controller(stage: ModuleType, target: float, max_tokens: int = MAX_TOKENS) -> Any:
    return submodule(stage, "core.sched.chunk_policy").ChunkController(target, max_tokens)


def least(stage: ModuleType) -> int:
    return int(submodule(stage, "core.sched.chunk_policy").MIN_PREFILL_TOKENS)


def feed(controller: Any, num_steps: int, base: float, per_token: float) -> list[int]:
    """Full steps of base + per_token x tokens seconds; the budget after each."""
    budgets = []
    for _ in range(num_steps):
        num_tokens = controller.prefill_budget
        controller.update(num_tokens, base + per_token * num_tokens)
        budgets.append(controller.prefill_budget)
    return budgets


costs = {
    "target": st.floats(1e-3, 1.0),
    "share": st.floats(0.0, 0.9),  # of the target, for what a step takes whatever its prompt tokens
    "fitting": st.integers(1, 20_000),  # prompt tokens that fill the rest
}


@given(**costs)
def test_it_finds_the_size_that_takes_as_long_as_was_asked_for(
    target: float, share: float, fitting: int, stage: ModuleType
) -> None:
    """Within a tenth, where that lies within the limits; else at the nearer limit."""
    controller = make_controller(stage, target)
    base = share * target
    per_token = (target - base) / fitting
    # The worst start and the least share that depends on tokens: it closes a twentieth of the distance a step.
    feed(controller, 200, base, per_token)
    wanted = min(max(fitting, least(stage)), MAX_TOKENS)
    for budget in feed(controller, 20, base, per_token):
        if least(stage) <= fitting <= MAX_TOKENS:
            assert base + per_token * budget == pytest.approx(target, rel=0.1)
        assert budget == pytest.approx(wanted, rel=0.1, abs=8)


def test_it_is_there_soon(stage: ModuleType) -> None:
    """From the size that it starts with to one four times as large, or an eighth, in ten steps."""
    for fitting in (2048, 64):
        controller = make_controller(stage, 0.030)
        feed(controller, 10, 0.006, 0.024 / fitting)
        assert 0.006 + 0.024 / fitting * controller.prefill_budget == pytest.approx(0.030, rel=0.1)


@given(
    target=costs["target"],
    max_tokens=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 1), st.floats(1e-6, 100)), max_size=60),
)
def test_it_keeps_within_its_limits(
    target: float, max_tokens: int, steps: list[tuple[float, float]], stage: ModuleType
) -> None:
    """Whatever the steps take: prompts are never starved, unless a step may hold no more than that anyway."""
    controller = make_controller(stage, target, max_tokens)
    assert 0 < controller.prefill_budget <= max_tokens
    for part, seconds in steps:
        controller.update(round(part * controller.prefill_budget), seconds)
        assert min(least(stage), max_tokens) <= controller.prefill_budget <= max_tokens
        assert isinstance(controller.prefill_budget, int)


def test_decodes_alone_may_be_too_slow(stage: ModuleType) -> None:
    """Then prompts get the least, for ever, and no less; and more as soon as there is time for it."""
    controller = make_controller(stage, 0.010)
    assert set(feed(controller, 60, 0.100, 1e-5)[-10:]) == {least(stage)}
    assert feed(controller, 60, 0.001, 1e-5)[-1] == pytest.approx(900, rel=0.1)


@given(fitting=st.integers(100, 8000), factor=st.floats(1.5, 1000))
def test_one_spike_is_soon_forgotten(fitting: int, factor: float, stage: ModuleType) -> None:
    """A step that takes up to a thousand times as long: a half is lost at most, and back within ten steps."""
    controller = make_controller(stage, 0.040)
    settled = feed(controller, 100, 0.004, 0.036 / fitting)[-1]
    controller.update(settled, 0.040 * factor)
    assert 0.49 * settled <= controller.prefill_budget < settled
    assert feed(controller, 10, 0.004, 0.036 / fitting)[-1] == pytest.approx(settled, rel=0.05, abs=4)


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(0, 0.001), (0, 0.5), (0, 1e-9), (1, 0.001), (100, 0.030), (400, 0.002), (460, 0.019)],
)
def test_what_says_nothing_changes_nothing(num_tokens: int, seconds: float, stage: ModuleType) -> None:
    """Steps without prompt tokens, however slow, and those that were not full, as long as they were in time."""
    controller = make_controller(stage, 0.030)
    assert controller.prefill_budget == 512
    controller.update(num_tokens, min(seconds, 0.030) if num_tokens else seconds)
    assert controller.prefill_budget == 512


def test_a_step_that_was_not_full_and_yet_late_counts(stage: ModuleType) -> None:
    """A full one would have been later still."""
    controller = make_controller(stage, 0.030)
    controller.update(100, 0.060)
    assert controller.prefill_budget == 256


@pytest.mark.parametrize(("factor", "expected"), [(1.25, 410), (1.5, 341), (2.0, 256), (100.0, 256)])
def test_a_step_that_was_late(factor: float, expected: int, stage: ModuleType) -> None:
    """All the way to what it suggests, at once, which is half as much at least."""
    controller = make_controller(stage, 0.030)
    controller.update(512, 0.030 * factor)
    assert controller.prefill_budget == expected


def test_it_starts_small(stage: ModuleType) -> None:
    assert make_controller(stage, 0.030).prefill_budget == 512
    assert make_controller(stage, 0.030, 100).prefill_budget == 100


@pytest.mark.parametrize(("num_tokens", "factor"), [(512, 3.0), (512, 100.0), (470, 1.5)])
def test_a_step_that_was_early(num_tokens: int, factor: float, stage: ModuleType) -> None:
    """Halfway to what it suggests, which is twice as much at most."""
    controller = make_controller(stage, 0.030)
    controller.update(num_tokens, 0.030 / factor)
    assert controller.prefill_budget == round(512 * (1 + 0.5 * (min(factor, 2.0) - 1)))


def test_what_decodes_take_is_not_steered(stage: ModuleType) -> None:
    """Where decodes take most of the target, a few per cent of the step are all of the prompt's: 20 us a token here."""
    blind, knowing = make_controller(stage, 0.030), make_controller(stage, 0.030)
    for _ in range(20):
        knowing.update(0, 0.026)
    for _ in range(8):
        for controller in (blind, knowing):
            tokens = controller.prefill_budget
            controller.update(tokens, 0.026 + 20e-6 * tokens)
    assert abs(knowing.prefill_budget - 200) < abs(blind.prefill_budget - 200)
    assert 190 <= knowing.prefill_budget <= 220
