"""The sampler: the right law, no memory, no neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from ..conftest import MakeLLM, submodule
from ..oracle import GOLDEN, splitmix, uniform

LARGEST_UNIFORM = 1 - 2.0**-24

positions = st.integers(0, 2**40)


def sample(
    stage: ModuleType, logits: torch.Tensor, temperature: Sequence[float], seeds: Sequence[int], at: Sequence[int]
) -> list[int]:
    """Tokens for logits [N, V]; a sampler's further parameters are left unused."""
    sampler = submodule(stage, "sample.sampler")
    given = {
        "temperature": torch.tensor(temperature, dtype=torch.float32),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "positions": torch.tensor(at, dtype=torch.int64),
        "all_greedy": all(value == 0 for value in temperature),
    }
    others = [field for field in fields(sampler.SamplingMetadata) if field.name not in given]
    unused: dict[str, Any] = {field.name: [] if field.type == "Rows" else None for field in others}
    output = sampler.Sampler()(logits.clone(), sampler.SamplingMetadata(**given, **unused))
    return list(map(int, getattr(output, "token_ids", output)))


def draw_with(stage: ModuleType, logits: torch.Tensor, drawn: Sequence[float], temperature: float = 1.0) -> list[int]:
    """As `sample`, with seeds found such that the rows' uniform numbers are `drawn`."""
    seeds, at = [seed_for(value, position) for position, value in enumerate(drawn)], range(len(drawn))
    return sample(stage, logits, [temperature] * len(drawn), seeds, at)


def seed_for(value: float, position: int) -> int:
    """A seed whose uniform number at `position` is `value`, a multiple of 2^-24: the hash run backwards."""
    bits = unsplitmix(int(value * 2**24) << 40)
    seed = unsplitmix(bits - position * GOLDEN)
    return seed - 2**64 if seed >= 2**63 else seed


def unsplitmix(x: int) -> int:
    x %= 2**64
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x = x * pow(factor, -1, 2**64) % 2**64
    return x


def test_seed_for() -> None:
    for value, position in ((0.0, 0), (0.0, 5), (0.5, 0), (LARGEST_UNIFORM, 1), (0.123456, 77)):
        value = int(value * 2**24) / 2**24
        assert uniform(seed_for(value, position), position) == value


# ---------------------------------------------------------------------- the random numbers


@given(seed=strategies.INT64, position=positions)
def test_random_uniform_is_splitmix(stage: ModuleType, seed: int, position: int) -> None:
    random_uniform = submodule(stage, "sample.sampler").random_uniform
    numbers = random_uniform(torch.tensor([seed, 1, seed]), torch.tensor([position, position, 3]))
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [uniform(seed, position), uniform(1, position), uniform(seed, 3)]


def test_splitmix_is_the_published_one() -> None:
    """The first outputs of the generator that is seeded with 1234567, as published with its reference code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567 + step * GOLDEN) for step in range(1, 5)] == published


@pytest.mark.parametrize("along", ["seeds", "positions", "both"])
def test_random_uniform_is_uniform(stage: ModuleType, along: str) -> None:
    """Neighbouring seeds and positions are what users and sequences have: pairs of them fill the square evenly."""
    count = torch.arange(1 << 16)
    fixed = torch.full_like(count, 42)
    seeds, at = {"seeds": (count, fixed), "positions": (fixed, count), "both": (count, count)}[along]
    numbers = submodule(stage, "sample.sampler").random_uniform(seeds, at)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert_law((numbers * 256).long(), torch.full((256,), 1 / 256))
    cells = (numbers * 16).long()
    for lag in (1, 2, 16):
        assert_law(cells[lag:] * 16 + cells[:-lag], torch.full((256,), 1 / 256))


def assert_law(drawn: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square test; categories with fewer than five expected draws are taken together."""
    expected = probabilities.double() * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[probabilities == 0].sum() == 0, "an impossible value was drawn"
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic = ((counts - expected).square() / expected)[expected > 1].sum()
    degrees = (expected > 1).sum() - 1
    if degrees > 0:
        p_value = torch.special.gammaincc(degrees / 2, statistic / 2)
        assert p_value > 1e-6, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


def test_assert_law_notices() -> None:
    drawn = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(0))
    assert_law(drawn, torch.full((10,), 0.1))
    for wrong in ([0.11, 0.09, *[0.1] * 8], [0.0, 0.2, *[0.1] * 8]):
        with pytest.raises(AssertionError):
            assert_law(drawn, torch.tensor(wrong))


# ---------------------------------------------------------------------- the law of a draw


@given(
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    size=st.sampled_from([3, 17, 512]),
)
def test_law(stage: ModuleType, temperature: float, seed: int, spread: float, size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    logits[seed % size] = float("-inf")
    num = 20_000
    drawn = sample(stage, logits.expand(num, -1), [temperature] * num, range(seed, seed + num), [seed] * num)
    assert_law(torch.tensor(drawn), (logits.double() / temperature).softmax(-1))


def test_law_along_a_sequence(stage: ModuleType) -> None:
    """One seed, many positions: the draws of a long text."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    drawn = sample(stage, logits.expand(20_000, -1), [1.0] * 20_000, [7] * 20_000, range(20_000))
    assert_law(torch.tensor(drawn), logits.double().softmax(-1))


@given(temperature=st.floats(0.05, 2.0), seed=strategies.INT64, position=positions)
def test_a_draw_is_the_inverse_of_the_distribution(
    stage: ModuleType, temperature: float, seed: int, position: int
) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(position % 1000)) * 2
    (token,) = sample(stage, logits, [temperature], [seed], [position])
    cdf = (logits[0].double() / temperature).softmax(-1).cumsum(0)
    drawn = uniform(seed, position)
    assert (float(cdf[token - 1]) if token else 0.0) - 1e-5 <= drawn <= float(cdf[token]) + 1e-5


# ---------------------------------------------------------------------- greedy, extremes


@given(seed=st.integers(0, 10_000), size=st.integers(1, 100))
def test_greedy_is_argmax(stage: ModuleType, seed: int, size: int) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(seed))
    assert sample(stage, logits, [0.0] * 4, [seed] * 4, range(4)) == logits.argmax(-1).tolist()


def test_the_ends_of_the_unit_interval(stage: ModuleType) -> None:
    """The smallest and the largest uniform number give the first and the last token that is possible at all."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    logits[[0, 1, 998, 999]] = float("-inf")
    for temperature in (0.5, 1.0, 2.0):
        assert draw_with(stage, logits.expand(2, -1), [0.0, LARGEST_UNIFORM], temperature) == [2, 997]


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 151_936])
def test_the_largest_uniform_number_stays_inside(stage: ModuleType, size: int) -> None:
    """Rounding in a long cumulative sum must not push the threshold over its end."""
    generator = torch.Generator().manual_seed(size)
    for logits in (torch.zeros(1, size), torch.randn(1, size, generator=generator)):
        (token,) = draw_with(stage, logits, [LARGEST_UNIFORM])
        assert token < size
        (token,) = draw_with(stage, logits, [0.0])
        assert token == 0


def test_a_uniform_number_on_an_edge_belongs_to_the_token_above(stage: ModuleType) -> None:
    """Intervals are closed below and open above, so a token without probability has no number at all."""
    logits = torch.tensor([0.0, float("-inf"), 0.0, 0.0, 0.0]).expand(5, -1)
    assert draw_with(stage, logits, [0.0, 0.25 - 2**-24, 0.25, 0.5, 0.75]) == [0, 0, 2, 3, 4]


def test_impossible_tokens_are_never_drawn(stage: ModuleType) -> None:
    logits = torch.full((5000, 64), float("-inf"))
    logits[:, [3, 40]] = torch.tensor([0.0, 1.0])
    drawn = sample(stage, logits, [1.0] * 5000, range(5000), [1] * 5000)
    assert set(drawn) == {3, 40}


def test_a_single_possible_token_is_drawn(stage: ModuleType) -> None:
    for winner in (0, 20, 63):
        one_hot = torch.full((200, 64), float("-inf"))
        one_hot[:, winner] = -5.0
        assert set(sample(stage, one_hot, [1.5] * 200, range(200), [9] * 200)) == {winner}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(stage: ModuleType, dtype: torch.dtype) -> None:
    """They are widened before anything else: the largest float16 overflows as soon as it is divided by 0.5."""
    logits = torch.randn(100, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 7], logits[:, 9] = 60_160.0, 59_904.0
    assert set(sample(stage, logits, [0.5] * 100, range(100), [1] * 100)) == {7}
    logits[:, [7, 9]] = 0.0
    temperatures = [0.5, 2.0] * 50
    drawn = sample(stage, logits, temperatures, range(100), [1] * 100)
    assert drawn == sample(stage, logits.float(), temperatures, range(100), [1] * 100)


def test_temperatures_at_the_ends(stage: ModuleType) -> None:
    logits = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)) * 100
    assert sample(stage, logits, [1e-5] * 50, range(50), [1] * 50) == logits.argmax(-1).tolist()


# ---------------------------------------------------------------------- neighbours


@given(data=st.data(), rows=st.integers(1, 8))
def test_rows_do_not_know_each_other(stage: ModuleType, data: st.DataObject, rows: int) -> None:
    """A row's token is the same alone and in any company, greedy and random rows mixed."""
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))

    def column(elements: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(elements, min_size=rows, max_size=rows))

    temperature = column(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    seeds, at = column(strategies.INT64), column(positions)
    together = sample(stage, logits, temperature, seeds, at)
    alone = [sample(stage, logits[i : i + 1], [temperature[i]], [seeds[i]], [at[i]])[0] for i in range(rows)]
    assert together == alone
    for row in range(rows):
        if temperature[row] == 0:
            assert together[row] == int(logits[row].argmax())


def test_nothing_is_remembered_between_calls(stage: ModuleType) -> None:
    logits = torch.randn(32, 100, generator=torch.Generator().manual_seed(3))
    first = sample(stage, logits, [1.0] * 32, range(32), range(32))
    assert first == sample(stage, logits, [1.0] * 32, range(32), range(32))
    assert first != sample(stage, logits, [1.0] * 32, range(32), range(1, 33))
    assert first != sample(stage, logits, [1.0] * 32, range(1, 33), range(32))


def test_a_whole_number_is_a_temperature(stage: ModuleType, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same type as any other, or a kernel would be compiled for it once more."""
    metadata_class = submodule(stage, "sample.sampler").SamplingMetadata
    from_sequences, seen = metadata_class.from_sequences, []

    def watched(*args: Any) -> Any:
        seen.append(from_sequences(*args))
        return seen[-1]

    monkeypatch.setattr(metadata_class, "from_sequences", watched)
    llm = make_llm("qwen3", max_model_len=32)
    params = [stage.SamplingParams(temperature=value, seed=7, max_tokens=5, ignore_eos=True) for value in (1, 1.0)]
    whole, other = (llm.generate([[1, 2, 3]], each, use_tqdm=False)[0].token_ids for each in params)
    assert whole == other and seen
    assert all(metadata.temperature.dtype == torch.float32 for metadata in seen)
