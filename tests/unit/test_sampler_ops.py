"""The sampler's operations: what each does to logits, in which order, and that no row knows another's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..conftest import submodule
from ..law import adjusted_logits, distribution, possible_laws
from ..sampling import Row, draws, make_sequence, sample_rows
from .test_sampler import assert_law

pytestmark = pytest.mark.since("m1")

INF = math.inf
SIZE = 48
NUM_DRAWS = 6000

few_tokens = st.integers(0, 9)  # so that they meet
tokens = st.lists(few_tokens, max_size=12)
logits_seeds = st.integers(0, 10_000)
biases = st.dictionaries(few_tokens, st.floats(-5, 5), max_size=4)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.3, 2.0])
rows_of_cuts = st.fixed_dictionaries({"temperature": temperatures}, optional=strategies.cuts())
rows_of_anything = st.fixed_dictionaries(
    {"temperature": st.just(0.0) | temperatures, "seed": st.integers(0, 10**6)},
    optional={**strategies.cuts(), **strategies.penalties(), "logit_bias": biases, "min_tokens": st.integers(0, 5)},
)


def random_logits(seed: int, rows: int = 1, size: int = SIZE) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def greedy_token(stage: ModuleType, logits: list[float], row: Row) -> int:
    greedy = replace(row, arguments={**row.arguments, "temperature": 0.0})
    return int(sample_rows(stage, torch.tensor([logits]), [greedy]).token_ids[0])


# ---------------------------------------------------------------------- the law


@given(arguments=rows_of_cuts, seed=logits_seeds)
def test_law_of_a_draw(stage: ModuleType, arguments: dict[str, Any], seed: int) -> None:
    """Temperature, min_p, top_k and top_p, alone and together: Pearson's test against the exact distribution."""
    (logits,) = random_logits(seed)
    drawn = draws(stage, logits, Row(arguments, prompt=[seed % SIZE]), NUM_DRAWS)
    assert_law(drawn, distribution(logits, stage.SamplingParams(**arguments)))


@given(arguments=rows_of_anything, seed=logits_seeds, prompt=tokens, output=tokens)
def test_law_with_a_history(
    stage: ModuleType, arguments: dict[str, Any], seed: int, prompt: list[int], output: list[int]
) -> None:
    arguments = {**arguments, "temperature": arguments["temperature"] or 1.0}
    (logits,) = random_logits(seed)
    drawn = draws(stage, logits, Row(arguments, prompt, output, eos_token_ids=(3, 5)), NUM_DRAWS)
    assert_law(drawn, distribution(logits, stage.SamplingParams(**arguments), prompt, output, (3, 5)))


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"top_k": 10}, {"top_k": 11}),
        ({"top_p": 0.8}, {"top_p": 0.9}),
        ({"min_p": 0.1}, {"min_p": 0.05}),
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.3}),
    ],
    ids=str,
)
def test_the_test_of_the_law_notices(stage: ModuleType, arguments: dict[str, Any], wrong: dict[str, Any]) -> None:
    (logits,) = random_logits(1)
    prompt = list(range(0, SIZE, 2))
    drawn = draws(stage, logits, Row(arguments, prompt), NUM_DRAWS)
    with pytest.raises(AssertionError):
        assert_law(drawn, distribution(logits, stage.SamplingParams(**wrong), prompt))


# ---------------------------------------------------------------------- min_p, top_k, top_p


def kept(stage: ModuleType, logits: torch.Tensor, arguments: list[dict[str, Any]]) -> torch.Tensor:
    """Which tokens the stage's own cuts leave of logits [N, V], bool [N, V]; what they leave must be unchanged."""
    ops = submodule(stage, "sample.ops.topk_topp")
    sampler = submodule(stage, "sample.sampler")
    seqs = [make_sequence(stage, Row(each)) for each in arguments]
    metadata = sampler.SamplingMetadata.from_sequences(seqs, logits.shape[-1], logits.device)
    before = logits.clone()
    if metadata.min_p is not None:
        logits = ops.apply_min_p(logits, metadata.min_p)
    logits = ops.apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
    left = logits > -INF
    assert torch.equal(logits[left], before[left])
    return left


@given(arguments=rows_of_cuts, seed=logits_seeds, size=st.sampled_from([1, 2, 7, 100, 3000]))
def test_what_is_left(stage: ModuleType, arguments: dict[str, Any], seed: int, size: int) -> None:
    arguments = {**arguments, "temperature": 1.0}
    logits = random_logits(seed, size=size)
    left = set(kept(stage, logits, [arguments])[0].nonzero().flatten().tolist())
    assert int(logits.argmax()) in left
    laws = possible_laws(logits[0].tolist(), stage.SamplingParams(**arguments), 1e-6, 1e-5)
    assert left in [set(law) for law in laws]
    assert len(laws) < 8 or arguments.get("top_p", 1) > 0.99  # not anything goes; only a long tail is too fine to tell


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 10**9}, [0, 1, 2, 3]),
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": -1}, [0, 1, 2, 3]),
        ({"top_p": 1e-12}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_p": 0.91}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
        ({"min_p": 0.24}, [0, 1, 2, 3]),
        ({"min_p": 0.26}, [0, 1, 3]),
        ({"min_p": 0.76}, [1]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.77}, [1, 3]),  # 0.7 / 0.9 is above it
        ({"top_k": 3, "top_p": 0.79}, [0, 1, 3]),
        ({"top_k": 2, "min_p": 0.4}, [1, 3]),
        ({"top_k": 3, "min_p": 0.6}, [1, 3]),
    ],
    ids=str,
)
def test_cuts_by_hand(stage: ModuleType, arguments: dict[str, Any], expected: list[int]) -> None:
    logits = logits_of([0.2, 0.4, 0.1, 0.3])
    assert kept(stage, logits[None], [arguments])[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("arguments", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_equal_tokens_share_one_fate(stage: ModuleType, arguments: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]])
    assert kept(stage, logits, [arguments])[0].tolist() == [False, True, True, False, True]
    flat = torch.zeros(1, 300)
    assert kept(stage, flat, [arguments]).all()


@pytest.mark.parametrize("top_p", [0.9999999, 1 - 2.0**-24, 1.0])
def test_top_p_one_keeps_the_whole_tail(stage: ModuleType, top_p: float) -> None:
    """A sum of many probabilities may come out above 1; p = 1 must not lose tokens to that, beside whatever row."""
    logits = random_logits(0, rows=2, size=150_000)
    left = kept(stage, logits, [{"top_p": top_p}, {"top_p": 0.5}])
    assert left[0].all() or top_p < 1
    assert left[0].float().mean() > 0.99
    assert left[1].float().mean() < 0.5


@pytest.mark.parametrize("arguments", [{"top_k": 3}, {"top_k": 60}, {"top_p": 0.5}, {"top_p": 1.0}, {"min_p": 0.5}])
def test_forbidden_tokens_stay_forbidden(stage: ModuleType, arguments: dict[str, Any]) -> None:
    logits = torch.full((1, 64), -INF)
    logits[0, [5, 60]] = torch.tensor([0.0, 0.1])
    left = kept(stage, logits, [arguments])[0].nonzero().flatten().tolist()
    assert left == [60] if arguments == {"top_p": 0.5} else [5, 60]
    drawn = draws(stage, logits[0], Row(arguments), 500)
    assert set(drawn.tolist()) == set(left)


@pytest.mark.parametrize("arguments", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 1, "top_p": 0.1}, {}])
@pytest.mark.parametrize("broken", [-INF, math.nan])
def test_a_row_without_hope_does_no_harm(stage: ModuleType, arguments: dict[str, Any], broken: float) -> None:
    """Nothing is possible, or nothing is known: any token will do, but it must be one, and the neighbours stay well."""
    logits = random_logits(3, rows=3)
    expected = sample_rows(stage, logits, [Row({**arguments, "seed": seed}) for seed in range(3)]).token_ids
    logits[1] = broken
    drawn = sample_rows(stage, logits, [Row({**arguments, "seed": seed}) for seed in range(3)]).token_ids
    assert (drawn[0], drawn[2]) == (expected[0], expected[2])
    assert 0 <= drawn[1] < SIZE


# ---------------------------------------------------------------------- neighbours


@given(rows=st.lists(st.tuples(rows_of_anything, tokens, tokens), min_size=2, max_size=6), seed=logits_seeds)
def test_rows_do_not_know_each_others_parameters(
    stage: ModuleType, rows: list[tuple[dict[str, Any], list[int], list[int]]], seed: int
) -> None:
    logits = random_logits(seed, rows=len(rows))
    seen: list[torch.Tensor] = []

    def spy(token_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append(row.clone())
        return row

    batch = [Row({**each, "logits_processors": [spy]}, prompt, output, (3,)) for each, prompt, output in rows]
    together = sample_rows(stage, logits, batch).token_ids
    alone = [sample_rows(stage, logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(batch)]
    assert together == alone
    for in_company, by_itself in zip(seen[: len(rows)], seen[len(rows) :], strict=True):
        assert torch.equal(in_company, by_itself)


@given(cuts=st.lists(rows_of_cuts, min_size=2, max_size=6), seed=logits_seeds, size=st.sampled_from([5, 33, 700]))
def test_cuts_do_not_know_each_other(stage: ModuleType, cuts: list[dict[str, Any]], seed: int, size: int) -> None:
    logits = random_logits(seed, rows=len(cuts), size=size)
    together = kept(stage, logits, cuts)
    for row, each in enumerate(cuts):
        assert torch.equal(kept(stage, logits[row : row + 1], [each])[0], together[row])


def test_the_very_edge_of_top_p_does_not_move_with_the_neighbours(stage: ModuleType) -> None:
    """Where top_p is exactly what some tokens sum to, the last bit of the sum decides: it may not depend on company."""
    for seed in range(100):
        logits = random_logits(seed, size=700)
        probabilities = logits.topk(50 + seed * 5).values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        edge = {"top_k": before.shape[-1], "top_p": float(before[0, 5 + seed % 40])}
        alone = kept(stage, logits, [edge])[0]
        assert torch.equal(kept(stage, logits.expand(2, -1), [edge, {}])[0], alone)
        assert torch.equal(kept(stage, logits.expand(3, -1), [{"top_k": 400}, {"top_p": 0.9}, edge])[2], alone)


# ---------------------------------------------------------------------- bias, min_tokens, penalties


@given(arguments=rows_of_anything, seed=logits_seeds, prompt=tokens, output=tokens)
def test_adjusted_logits(
    stage: ModuleType, arguments: dict[str, Any], seed: int, prompt: list[int], output: list[int]
) -> None:
    """Against dictionaries: what a logits processor gets to see has bias, min_tokens and penalties in it."""
    seen: list[torch.Tensor] = []

    def spy(token_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        assert token_ids == [*prompt, *output]
        seen.append(row.clone())
        return row

    logits = random_logits(seed)
    arguments = {**arguments, "stop_token_ids": [7]}
    ends = (3, 5)
    (token,) = sample_rows(
        stage, logits, [Row({**arguments, "logits_processors": [spy]}, prompt, output, ends)]
    ).token_ids
    expected = adjusted_logits(logits[0], stage.SamplingParams(**arguments), prompt, output, ends)
    torch.testing.assert_close(seen[0].double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)
    if arguments["temperature"] == 0:
        assert token == int(seen[0].argmax())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1.0, -1.0, 2.0, 3.0]),
        ({"presence_penalty": 0.5}, [1.0, -1.0, 1.5, 2.5]),
        ({"presence_penalty": -0.5}, [1.0, -1.0, 2.5, 3.5]),
        ({"frequency_penalty": 0.5}, [1.0, -1.0, 1.5, 2.0]),
        ({"frequency_penalty": -2.0}, [1.0, -1.0, 4.0, 7.0]),
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 1.0, 1.5]),
        ({"repetition_penalty": 0.5}, [1.0, -0.5, 4.0, 6.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 1.0}, [1.0, -2.0, -0.5, -0.5]),
        ({"logit_bias": {0: 10, 1: -2.5}}, [11.0, -3.5, 2.0, 3.0]),
    ],
    ids=str,
)
def test_adjusted_logits_by_hand(stage: ModuleType, arguments: dict[str, Any], expected: list[float]) -> None:
    """Token 1 is in the prompt, token 2 came out once and token 3 twice."""
    seen: list[list[float]] = []

    def spy(token_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append(row.tolist())
        return row

    row = Row({**arguments, "logits_processors": [spy]}, prompt=[1, 1], output=[3, 2, 3])
    sample_rows(stage, torch.tensor([[1.0, -1.0, 2.0, 3.0]]), [row])
    assert seen == [pytest.approx(expected)]


@pytest.mark.parametrize(("ignore_eos", "ends"), [(False, {1, 2, 3}), (True, {3})])
def test_min_tokens_forbids_what_would_end_it(stage: ModuleType, ignore_eos: bool, ends: set[int]) -> None:
    """Tokens 1 and 2 are EOS, 3 is a stop token, 4 is the best of the rest; an EOS that ends nothing is free."""
    logits = torch.tensor([0.0, 30.0, 30.5, 31.0, 15.0, 0.0])
    params = {"min_tokens": 2, "stop_token_ids": [3], "ignore_eos": ignore_eos, "seed": 1}
    for num_output in range(4):
        row = Row(params, output=[0] * num_output, eos_token_ids=(1, 2))
        allowed = {1, 2, 3} if num_output >= 2 else {1, 2, 3} - ends or {4}
        assert set(draws(stage, logits, row, 200).tolist()) == allowed
        assert greedy_token(stage, logits.tolist(), row) == max(allowed)


def test_logit_bias_decides(stage: ModuleType) -> None:
    logits = [3.0, 2.0, 1.0]
    assert greedy_token(stage, logits, Row({})) == 0
    assert greedy_token(stage, logits, Row({"logit_bias": {2: 2.5}})) == 2
    assert greedy_token(stage, logits, Row({"logit_bias": {0: -100, 1: -100}})) == 2
    assert set(draws(stage, torch.tensor(logits), Row({"logit_bias": {2: 100}}), 200).tolist()) == {2}


# ---------------------------------------------------------------------- the order


def test_bias_comes_before_the_penalties(stage: ModuleType) -> None:
    """(1 - 2) · 2 = -2 loses against -1.75; 1 / 2 - 2 = -1.5 would win."""
    row = Row({"logit_bias": {0: -2.0}, "repetition_penalty": 2.0}, prompt=[0])
    assert greedy_token(stage, [1.0, -1.75], row) == 1


def test_repetition_comes_before_frequency_and_presence(stage: ModuleType) -> None:
    """2 / 2 - 1 = 0 loses against 0.25; (2 - 1) / 2 = 0.5 would win."""
    for name in ("frequency_penalty", "presence_penalty"):
        row = Row({"repetition_penalty": 2.0, name: 1.0}, prompt=[1], output=[0])
        assert greedy_token(stage, [2.0, 0.5], row) == 1


def test_a_mask_survives_bias_and_penalties(stage: ModuleType) -> None:
    arguments = {"min_tokens": 2, "logit_bias": {0: 100}, "repetition_penalty": 0.01, "frequency_penalty": -2.0}
    assert greedy_token(stage, [50.0, -50.0], Row(arguments, prompt=[0], output=[1], eos_token_ids=(0,))) == 1


@pytest.mark.parametrize(
    ("probabilities", "arguments", "output", "right", "wrong"),
    [
        # Penalties, then temperature: 1 - 1 = 0 against 0; the other way round it is 1 / 0.5 - 1 = 1 against 0.
        ([math.e, 1.0], {"presence_penalty": 1.0, "temperature": 0.5}, [0], [0.5, 0.5], [0.731, 0.269]),
        # Temperature, then min_p: at 2 the odds are 1 : 0.61, at 1 they are 1 : 0.37.
        ([1.0, math.exp(-1)], {"temperature": 2.0, "min_p": 0.5}, [], [0.6225, 0.3775], [1.0, 0.0]),
        # Temperature, then top_p: at 0.5 the first token has 0.64 of the whole, at 1 it has 0.57.
        ([0.4, 0.3], {"temperature": 0.5, "top_p": 0.6}, [], [1.0, 0.0], [0.64, 0.36]),
        # min_p, then top_p: of the first two, the first has 0.57, of all it has 0.4.
        ([0.4, 0.3, 0.2, 0.1], {"min_p": 0.6, "top_p": 0.55}, [], [1.0, 0, 0, 0], [4 / 7, 3 / 7, 0, 0]),
        # top_k, then top_p: likewise.
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.55}, [], [1.0, 0, 0, 0], [4 / 7, 3 / 7, 0, 0]),
    ],
    ids=["penalties temperature", "temperature min_p", "temperature top_p", "min_p top_p", "top_k top_p"],
)
def test_order(
    stage: ModuleType,
    probabilities: list[float],
    arguments: dict[str, Any],
    output: list[int],
    right: list[float],
    wrong: list[float],
) -> None:
    drawn = draws(stage, logits_of(probabilities), Row(arguments, [len(probabilities) - 1], output), NUM_DRAWS)
    assert_law(drawn, torch.tensor(right))
    with pytest.raises(AssertionError):
        assert_law(drawn, torch.tensor(wrong))


# ---------------------------------------------------------------------- processors


def test_processors_run_in_their_order_before_the_temperature(stage: ModuleType) -> None:
    def add(amount: float) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
        return lambda token_ids, logits: logits + amount * torch.tensor([0.0, 1.0])

    def double(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits * 2

    # (0 + 1) · 2 = 2, at temperature 2: odds 1 : e.
    row = Row({"logits_processors": [add(1.0), double], "temperature": 2.0})
    drawn = draws(stage, torch.zeros(2), row, NUM_DRAWS)
    assert_law(drawn, torch.tensor([1.0, math.e]) / (1 + math.e))
    row = Row({"logits_processors": [double, add(1.0)], "temperature": 2.0})
    with pytest.raises(AssertionError):
        assert_law(draws(stage, torch.zeros(2), row, NUM_DRAWS), torch.tensor([1.0, math.e]) / (1 + math.e))


def test_a_processor_cannot_reach_its_neighbours(stage: ModuleType) -> None:
    """It gets copies of its own row and of its own history, to do with as it likes."""

    def vandal(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        token_ids.clear()
        logits.zero_()[2] = 1.0
        return logits

    rows = [Row({"temperature": 0.0}), Row({"temperature": 0.0, "logits_processors": [vandal, vandal]})]
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    assert sample_rows(stage, logits, rows).token_ids == [1, 2]
    seq = make_sequence(stage, Row({"logits_processors": [vandal]}, [4, 5], [6]))
    submodule(stage, "sample.logits_processor").apply_logits_processors(logits, [(0, seq)])
    assert seq.token_ids == [4, 5, 6]


def test_what_a_processor_was_given_stays_as_it_was(stage: ModuleType) -> None:
    """It may keep the tensor, to look at it later."""
    kept: list[torch.Tensor] = []

    def collector(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        kept.append(logits)
        return logits + 1

    sample_rows(stage, torch.zeros(1, 3), [Row({"logits_processors": [collector, collector]})])
    assert [row.tolist() for row in kept] == [[0.0] * 3, [1.0] * 3]


def raises(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raises, "KeyError: 'no such thing'"),
        (lambda token_ids, logits: None, "None"),
        (lambda token_ids, logits: logits[:-1], ""),
        (lambda token_ids, logits: logits[:1], ""),
        (lambda token_ids, logits: logits * math.nan, ""),
        (lambda token_ids, logits: torch.full_like(logits, -INF), ""),
    ],
    ids=["raises", "None", "too short", "one element", "nan", "all forbidden"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_that_fails_is_named_with_its_row(
    stage: ModuleType, processor: Any, message: str, temperature: float
) -> None:
    rows = [Row({"temperature": temperature, "seed": 1, "logits_processors": each}) for each in (None, [processor], [])]
    logits = random_logits(0, rows=3)
    output = sample_rows(stage, logits, rows)
    assert list(output.errors) == [1]
    assert output.errors[1] and message in output.errors[1]
    for row in (0, 2):
        assert output.token_ids[row] == sample_rows(stage, logits[row : row + 1], [rows[row]]).token_ids[0]


# ---------------------------------------------------------------------- log-probabilities


@given(seed=logits_seeds, counts=st.lists(st.sampled_from([None, 0, 1, 5, 20, -1]), min_size=1, max_size=4))
def test_logprobs_are_those_of_the_untouched_logits(stage: ModuleType, seed: int, counts: list[int | None]) -> None:
    logits = random_logits(seed, rows=len(counts))
    arguments = {"temperature": 0.5, "top_k": 3, "seed": seed, "repetition_penalty": 2.0, "logit_bias": {1: 50.0}}
    output = sample_rows(stage, logits, [Row({**arguments, "logprobs": count}, [2, 3], [4]) for count in counts])
    if counts == [None] * len(counts):
        assert output.logprobs is None
        return
    expected = logits.double().log_softmax(-1)
    assert set(output.logprobs) == {row for row, count in enumerate(counts) if count is not None}
    for row, count in enumerate(counts):
        if count is None:
            continue
        entries = output.logprobs[row]
        assert entries[0][0] == output.token_ids[row]
        assert len(entries) >= 1 + (SIZE if count == -1 else count or 0)
        ranks = {int(token): rank for rank, token in enumerate(expected[row].argsort(descending=True), start=1)}
        for token, logprob, rank in entries:
            assert logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
            assert rank == ranks[token]
        assert [rank for _, _, rank in entries[1:]] == list(range(1, len(entries)))
