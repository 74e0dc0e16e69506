"""generation_config.json: what a checkpoint suggests holds where the user says nothing, and its end tokens always."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.checkpoints import EOS, VOCAB_SIZE
from tests.conftest import CheckpointPath
from tests.integration.conftest import TEXT, NewLLM, decode, run

pytestmark = pytest.mark.since("m0")


@pytest.fixture
def suggest(new_llm: NewLLM, checkpoint_path: CheckpointPath, tmp_path: Path) -> NewLLM:
    """`suggest(temperature=0.6)`: an engine whose generation_config.json says so, and says nothing else."""

    def make(**suggestions: Any) -> Any:
        folder = Path(shutil.copytree(checkpoint_path("qwen3"), tmp_path / "qwen3", dirs_exist_ok=True))
        (folder / "generation_config.json").write_text(json.dumps(suggestions))
        return new_llm(folder)

    return make


def test_suggested_parameters_are_the_defaults(stage: ModuleType, suggest: NewLLM) -> None:
    llm = suggest(temperature=0.6, max_new_tokens=3, do_sample=True, transformers_version="4.51.0")
    assert llm.get_default_sampling_params() == stage.SamplingParams(temperature=0.6, max_tokens=3)
    assert len(run(llm, TEXT)[0]) <= 3
    seeded = stage.SamplingParams(temperature=0.6, seed=1, max_tokens=3)
    assert run(llm, TEXT, seeded) == run(llm, [TEXT], [seeded])


def test_suggestions_are_honoured_in_a_bare_call(suggest: NewLLM, greedy: Any) -> None:
    llm = suggest(temperature=0.0, max_new_tokens=5)
    expected = run(llm, TEXT, greedy)[0][:5]
    assert EOS not in expected
    assert run(llm, TEXT) == [expected]
    assert [output.token_ids for output in llm.stream(TEXT)][-1] == expected


def test_every_suggestion_that_the_stage_knows_is_taken(stage: ModuleType, suggest: NewLLM) -> None:
    suggestions = {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "temperature": 0.7}
    defaults = suggest(**suggestions).get_default_sampling_params()
    known = {name: value for name, value in suggestions.items() if hasattr(stage.SamplingParams(), name)}
    assert "temperature" in known
    assert {name: getattr(defaults, name) for name in known} == known


def test_explicit_parameters_win(stage: ModuleType, suggest: NewLLM, greedy: Any) -> None:
    llm = suggest(temperature=1.5, max_new_tokens=2)
    assert len(run(llm, TEXT, greedy)[0]) == 6
    assert run(llm, TEXT, greedy) * 2 == run(llm, [TEXT, TEXT], [greedy, greedy])
    assert stage.SamplingParams().max_tokens == 16  # what a plain object says does not come from the checkpoint
    assert len(run(llm, TEXT, stage.SamplingParams(ignore_eos=True))[0]) == 16


@pytest.mark.parametrize("suggestions", [{}, {"temperature": None, "max_new_tokens": None}], ids=["empty", "nulls"])
def test_nothing_suggested(stage: ModuleType, suggest: NewLLM, suggestions: dict[str, None]) -> None:
    assert suggest(**suggestions).get_default_sampling_params() == stage.SamplingParams()


def test_any_of_several_eos_tokens_ends(suggest: NewLLM, stage: ModuleType, greedy: Any) -> None:
    """generation_config.json's list is the one that counts, not config.json's single id."""
    tokens = run(suggest(), TEXT, greedy)[0]
    end = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    unused = next(i for i in range(3, VOCAB_SIZE) if i not in tokens)
    llm = suggest(eos_token_id=[unused, tokens[end]])
    params = stage.SamplingParams(temperature=0.0, max_tokens=6)
    (output,) = llm.generate(TEXT, params, use_tqdm=False)
    assert output.token_ids == tokens[: end + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert output.text == decode(llm, tokens[:end])
    assert run(llm, TEXT, greedy) == [tokens]  # unless they are to be ignored
    assert run(suggest(eos_token_id=unused), TEXT, params) == [tokens]


def test_eos_of_config_json_where_nothing_else_names_one(
    new_llm: NewLLM, checkpoint_path: CheckpointPath, tmp_path: Path, stage: ModuleType, greedy: Any
) -> None:
    folder = Path(shutil.copytree(checkpoint_path("qwen3"), tmp_path / "qwen3"))
    (folder / "generation_config.json").unlink()
    tokens = run(new_llm(folder), TEXT, greedy)[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": tokens[0]}))
    params = stage.SamplingParams(temperature=0.0, max_tokens=6)
    assert run(new_llm(folder), TEXT, params) == [tokens[:1]]
