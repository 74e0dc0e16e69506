"""EngineConfig and SamplingParams: what they default to, what they accept, and what they say about the rest.

Names, defaults and ranges are vLLM's. A value that a user got wrong is a ValueError and a name that does not exist a
TypeError; either is one sentence that names the culprit.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.since("m0")

ENGINE_DEFAULTS = {
    "model": None,
    "tokenizer": None,
    "revision": None,
    "dtype": "auto",
    "device": "auto",
    "load_format": "auto",
    "seed": 0,
    "log_level": "INFO",
    "max_model_len": None,
    "attention_backend": None,
    "tensor_parallel_size": 1,
}
SAMPLING_DEFAULTS = {"temperature": 1.0, "seed": None, "ignore_eos": False, "max_tokens": 16}

# What other engines say -> what vLLM says.
ENGINE_ALIASES = {
    "max_batch_size": "max_num_seqs",
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_kv_blocks",
}
SAMPLING_ALIASES = {"max_new_tokens": "max_tokens", "eos_token_id": "stop_token_ids"}


def field_names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which has to be one line that says something."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- EngineConfig ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "default"), ENGINE_DEFAULTS.items())
def test_engine_defaults(stage: ModuleType, name: str, default: object) -> None:
    assert getattr(stage.EngineConfig(), name) == default


@pytest.mark.parametrize(
    "options",
    [
        {"load_format": "dummy"},
        {"max_model_len": 2},
        {"attention_backend": "naive"},
        {"tensor_parallel_size": 1},
        {"dtype": "float32", "device": "cpu", "seed": 7, "log_level": "DEBUG"},
    ],
)
def test_engine_accepts(stage: ModuleType, options: dict[str, Any]) -> None:
    config = stage.EngineConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_format", "pickle"),
        ("max_model_len", 1),
        ("max_model_len", 0),
        ("max_model_len", -1),
        ("attention_backend", "telepathy"),
        ("tensor_parallel_size", 2),
        ("tensor_parallel_size", 0),
    ],
)
def test_engine_refuses_by_name(stage: ModuleType, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        stage.EngineConfig(**{name: value})
    assert str(value) in message_of(error)


@pytest.mark.parametrize("value", ["100", 100.5])
def test_max_model_len_is_an_integer(stage: ModuleType, value: object) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        stage.EngineConfig(max_model_len=value)


def test_engine_config_is_frozen(stage: ModuleType) -> None:
    config = stage.EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_replace_keeps_the_rest_and_checks_again(stage: ModuleType) -> None:
    config = stage.EngineConfig(seed=3, max_model_len=100)
    assert dataclasses.replace(config, seed=4) == stage.EngineConfig(seed=4, max_model_len=100)
    with pytest.raises(ValueError, match="max_model_len"):
        dataclasses.replace(config, max_model_len=1)
    with pytest.raises(TypeError, match="no option 'sede'; did you mean seed"):
        dataclasses.replace(config, sede=4)


# ---- SamplingParams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "default"), SAMPLING_DEFAULTS.items())
def test_sampling_defaults(stage: ModuleType, name: str, default: object) -> None:
    params = stage.SamplingParams()
    assert getattr(params, name) == default
    assert not params.stop_token_ids  # None or empty: which of the two is the engine's own affair


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-10),
        ("temperature", 2.0),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("seed", -(2**63)),
        ("ignore_eos", True),
        ("max_tokens", 1),
        ("max_tokens", None),
    ],
)
def test_sampling_accepts(stage: ModuleType, name: str, value: object) -> None:
    assert getattr(stage.SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.inf),
        ("temperature", -math.inf),
        ("temperature", math.nan),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("stop_token_ids", [1, "2"]),
        ("stop_token_ids", [1.0]),
        ("max_tokens", 0),
        ("max_tokens", -1),
    ],
)
def test_sampling_refuses_by_name(stage: ModuleType, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        stage.SamplingParams(**{name: value})
    assert str(value) in message_of(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "0.7"), ("max_tokens", "16"), ("max_tokens", 1.5), ("stop_token_ids", 5)],
)
def test_sampling_refuses_the_wrong_type_by_name(stage: ModuleType, name: str, value: object) -> None:
    # max_tokens=1.5 is the worst of them: no count of tokens ever equals it, so nothing would end the generation.
    with pytest.raises(ValueError, match=name):
        stage.SamplingParams(**{name: value})


def test_seed_minus_one_means_no_seed(stage: ModuleType) -> None:
    assert stage.SamplingParams(seed=-1).seed is None


def test_stop_token_ids_are_copied(stage: ModuleType) -> None:
    given = [5, 6]
    params = stage.SamplingParams(stop_token_ids=given)
    given.append(7)
    assert list(params.stop_token_ids) == [5, 6]


def test_sampling_params_are_frozen_and_take_keywords_only(stage: ModuleType) -> None:
    params = stage.SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 1
    with pytest.raises(TypeError):
        stage.SamplingParams(0.7)


# ---- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        ("EngineConfig", "max_model_length", "max_model_len"),
        ("EngineConfig", "tensor_parallelism", "tensor_parallel_size"),
        ("EngineConfig", "loglevel", "log_level"),
        ("SamplingParams", "temprature", "temperature"),
        ("SamplingParams", "max_token", "max_tokens"),
        ("SamplingParams", "stop_token_id", "stop_token_ids"),
    ],
)
def test_a_misspelt_name_gets_the_right_one(stage: ModuleType, cls: str, name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"{cls} has no option '{name}'; did you mean {meant}\\?") as error:
        getattr(stage, cls)(**{name: 1})
    message_of(error)


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        *(("EngineConfig", name, meant) for name, meant in ENGINE_ALIASES.items()),
        *(("SamplingParams", name, meant) for name, meant in SAMPLING_ALIASES.items()),
    ],
)
def test_names_of_other_engines_get_ours(stage: ModuleType, cls: str, name: str, meant: str) -> None:
    """Only an option that this stage has may be recommended."""
    options = getattr(stage, cls)
    with pytest.raises(TypeError, match=f"no option '{name}'") as error:
        options(**{name: 1})
    assert (f"did you mean {meant}?" in message_of(error)) == (meant in field_names(options))


@pytest.mark.parametrize("cls", ["EngineConfig", "SamplingParams"])
def test_a_name_like_no_other_gets_the_list(stage: ModuleType, cls: str) -> None:
    options = getattr(stage, cls)
    with pytest.raises(TypeError, match="no option 'xyzzy'") as error:
        options(xyzzy=1)
    message = message_of(error)
    assert "did you mean" not in message
    assert all(name in message for name in field_names(options))


def test_every_hint_names_an_option_that_exists(stage: ModuleType) -> None:
    """Whatever is misspelt: what comes after "did you mean" must work."""
    for cls in (stage.EngineConfig, stage.SamplingParams):
        for name in field_names(cls):
            with pytest.raises(TypeError) as error:
                cls(**{f"{name}_": 1})
            hint = message_of(error).partition("did you mean ")[2].rstrip("?")
            assert hint == name


# ---- LLM's overrides -------------------------------------------------------------------------------------------------


def test_unknown_override_of_llm(stage: ModuleType) -> None:
    """Names are looked at before any checkpoint is: nothing has to exist for this answer."""
    with pytest.raises(TypeError, match=r"no option 'max_modellen'; did you mean max_model_len\?"):
        stage.LLM(model="/nowhere", max_modellen=100)


def test_tensor_parallel_size_is_refused_by_name(stage: ModuleType) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=4"):
        stage.LLM(model="/nowhere", tensor_parallel_size=4)


def test_an_override_wins_over_the_config(stage: ModuleType) -> None:
    config = stage.EngineConfig(model="/nowhere/config", log_level="loud")
    with pytest.raises(ValueError, match="log_level"):
        stage.LLM(engine_config=config)
    with pytest.raises(ValueError, match="/nowhere/config"):
        stage.LLM(engine_config=config, log_level="ERROR")
    with pytest.raises(ValueError, match="/nowhere/argument"):
        stage.LLM("/nowhere/argument", engine_config=config, log_level="ERROR")
    assert config.model == "/nowhere/config"
