"""The shapes under folovllm/models/shapes are the models they are named after, down to the last parameter, and their
byte tokenizer reads and writes any text. A figure measured on a shape is worth nothing otherwise."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from folovllm.models.make_shapes import SHAPES, SHAPES_FOLDER, SPECIAL_TOKENS, write_shape

PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7B": 6_738_415_616,
}

each_shape = pytest.mark.parametrize("name", PARAMETERS)


def count_parameters(config: dict[str, Any]) -> int:
    """By hand, from the figures of a config.json."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    attention = hidden * q + 2 * hidden * kv + q * hidden
    if config["model_type"] == "qwen2":
        attention += q + 2 * kv  # biases
    if config["model_type"] == "qwen3":
        attention += 2 * head_dim  # norms of q and k
    mlp = 3 * hidden * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return embeddings + config["num_hidden_layers"] * (attention + mlp + 2 * hidden) + hidden


def test_every_shape_is_counted() -> None:
    assert set(PARAMETERS) == set(SHAPES) == {path.name for path in SHAPES_FOLDER.iterdir()}


@each_shape
def test_files_are_what_the_script_writes(name: str, tmp_path: Path) -> None:
    write_shape(tmp_path, SHAPES[name])
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in (SHAPES_FOLDER / name).iterdir()}


@each_shape
def test_formula_gives_the_public_parameter_count(name: str) -> None:
    config = json.loads((SHAPES_FOLDER / name / "config.json").read_text(encoding="utf-8"))
    assert count_parameters(config) == PARAMETERS[name]


@each_shape
def test_transformers_builds_a_model_of_that_size(name: str) -> None:
    config = AutoConfig.from_pretrained(SHAPES_FOLDER / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.config.architectures == [type(model).__name__]
    # Tied embeddings are one tensor, and parameters() yields it once.
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.fixture(scope="module", params=PARAMETERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(SHAPES_FOLDER / request.param)


@given(text=st.text())
@example(text="e\u0301")  # two characters that a normaliser would make one
@example(text=" a  b\r\n\t.")
def test_tokens_are_bytes_and_come_back_as_the_text(tokenizer: Any, text: str) -> None:
    assume(not any(special in text for special in SPECIAL_TOKENS))
    ids = tokenizer.encode(text)
    if "Qwen2.5" in tokenizer.name_or_path:  # Qwen2Tokenizer normalises, whatever tokenizer.json says
        text = unicodedata.normalize("NFC", text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_and_special_tokens(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [257, *b"user\nHi", 258, *b"\n", 257, *b"assistant\n"]
    assert tokenizer.eos_token_id == 258
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\nassistant\n"


def test_ids_beyond_the_bytes_decode_to_nothing(tokenizer: Any) -> None:
    """A model with random weights mostly draws ids that this tokenizer does not have."""
    assert tokenizer.decode([*b"ab", 31_999, *b"c"]) == "abc"
