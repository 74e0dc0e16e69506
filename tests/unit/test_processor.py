"""The two ends of the engine: what is refused before it costs anything, and how tokens become text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .. import strategies
from ..checkpoints import EOS, IM_END, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer
from ..conftest import CheckpointPath, MakeLLM, open_llm, submodule

pytestmark = pytest.mark.since("m1")

# ---------------------------------------------------------------------- stop strings


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=6),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_find_stop_string(stage: ModuleType, pieces: list[str], stop: list[str]) -> None:
    """Against every place where a stop string could end: the first one that the new piece completed."""
    find_stop_string = submodule(stage, "engine.processor").find_stop_string
    text = ""
    for piece in pieces:
        old, text = text, text + piece
        candidates = (
            (string, end - len(string))
            for end in range(len(old) + 1, len(text) + 1)
            for string in stop
            if text[:end].endswith(string)
        )
        assert find_stop_string(text, len(piece), tuple(stop)) == next(candidates, None)


@pytest.mark.parametrize(
    ("text", "num_new", "stop", "expected"),
    [
        ("abc", 3, ["b"], ("b", 1)),
        ("abc", 1, ["b"], None),  # it was there before, so it was allowed to be
        ("abc", 1, ["bc"], ("bc", 1)),
        ("abab", 1, ["ab"], ("ab", 2)),  # only the new one
        ("abab", 4, ["ab"], ("ab", 0)),
        ("hello world", 5, ["world", "wo"], ("wo", 6)),
        ("hello world", 5, ["lo wo", "wo"], ("lo wo", 3)),
        ("hello world", 5, ["wo", "lo wo"], ("wo", 6)),
        ("abc", 0, ["c"], None),
        ("abc", 3, [], None),
        ("", 0, ["a"], None),
        ("a", 1, ["abc"], None),
    ],
)
def test_find_stop_string_by_hand(
    stage: ModuleType, text: str, num_new: int, stop: list[str], expected: tuple[str, int] | None
) -> None:
    assert submodule(stage, "engine.processor").find_stop_string(text, num_new, tuple(stop)) == expected


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("call", ["generate", "stream", "add_request"])
@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, f"token id {VOCAB_SIZE} in logit_bias is not in the vocabulary"),
        ([1], {"logit_bias": {0: 1.0, 10**9: 1.0}}, "token id 1000000000 in logit_bias is not in the vocabulary"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} in stop_token_ids is not in the vocabulary"),
        ([1], {"stop_token_ids": [0, -1]}, "token id -1 in stop_token_ids is not in the vocabulary"),
        ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} in the prompt is not in the vocabulary"),
        ([-1], {}, "token id -1 in the prompt is not in the vocabulary"),
        ([1] * 64, {}, "the prompt has 64 tokens and max_model_len is 64"),
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
    ],
)
def test_refused_before_it_costs_anything(
    stage: ModuleType, make_llm: MakeLLM, call: str, prompt: Any, arguments: dict[str, Any], message: str
) -> None:
    llm = make_llm(max_model_len=64)
    params = stage.SamplingParams(**arguments)
    with pytest.raises(ValueError, match=message):
        if call == "add_request":
            llm.engine.add_request("a", prompt, params)
        else:
            list(getattr(llm, call)([[1, 2], prompt], params))
    assert not llm.engine.has_unfinished_requests()


def test_the_last_id_of_the_vocabulary_is_served(stage: ModuleType, make_llm: MakeLLM) -> None:
    last = VOCAB_SIZE - 1
    params = stage.SamplingParams(temperature=0.0, max_tokens=3, stop_token_ids=[last], logit_bias={last: 100})
    (output,) = make_llm(max_model_len=64).generate([[last]], params, use_tqdm=False)
    assert (output.token_ids, output.outputs[0].stop_reason) == ([last], last)


# ---------------------------------------------------------------------- byte-level text


def decode(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def pieces_of(
    stage: ModuleType, tokenizer: Any, prompt: list[int], output: list[int], skip_special_tokens: bool = True
) -> Iterator[str]:
    detokenizer = submodule(stage, "engine.detokenizer").IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens)
    return (detokenizer.step(token) for token in output)


@given(
    prompt=st.text(max_size=6),
    parts=st.lists(st.text(max_size=5) | st.integers(0, len(SPECIAL_TOKENS) - 1), max_size=8),
    skip=st.booleans(),
)
def test_text_with_special_tokens(stage: ModuleType, prompt: str, parts: list[str | int], skip: bool) -> None:
    tokenizer = make_tokenizer()
    encoded = [[part] if isinstance(part, int) else tokenizer.encode(part) for part in parts]
    output = [token for tokens in encoded for token in tokens]
    shown = [
        "" if isinstance(part, int) and skip else decode(tokenizer, ids)
        for part, ids in zip(parts, encoded, strict=True)
    ]
    pieces = list(pieces_of(stage, tokenizer, tokenizer.encode(prompt), output, skip))
    assert "".join(pieces) == "".join(shown) == decode(tokenizer, output, skip)


@given(prompt=strategies.prompts(max_size=6), output=st.lists(strategies.token_ids, max_size=30), skip=st.booleans())
def test_random_tokens(stage: ModuleType, prompt: list[int], output: list[int], skip: bool) -> None:
    """What can be read of broken text appears, in order and once; a prompt's broken end is the prompt's affair."""
    tokenizer = make_tokenizer()
    text = "".join(pieces_of(stage, tokenizer, prompt, output, skip)).replace("\ufffd", "")
    whole = decode(tokenizer, output, skip).replace("\ufffd", "")
    assert whole.startswith(text)
    assert len(whole) - len(text) <= 4


@given(text=st.text("a é中🙂\n", min_size=1, max_size=12), cut=st.integers(0, 40))
def test_a_prompt_that_ends_inside_a_character(stage: ModuleType, text: str, cut: int) -> None:
    """The output's bytes that belong to it are shown as they can be; all after them as always."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text + "END")
    cut %= len(ids) - len(tokenizer.encode("END"))
    pieces = list(pieces_of(stage, tokenizer, ids[:cut] or [EOS], ids[cut:]))
    shown = "".join(pieces)
    rest = (text + "END").encode()[len(decode(tokenizer, ids[:cut]).rstrip("\ufffd").encode()) :].decode()
    assert shown.endswith("END")
    assert shown == rest or rest[1:].endswith(shown.lstrip("\ufffd"))


# ---------------------------------------------------------------------- text as sentencepiece has it


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """What Llama 2 and Mistral have: spaces inside the tokens, bytes for what is not in the vocabulary.

    Decoding alone drops the first space of a text, so a continuation cannot be decoded without what stands before it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(["the book was read by the lamp and the light was good " * 5], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")


def test_sentencepiece_is_what_it_should_be(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = sentencepiece.encode("the book 中")
    assert decode(sentencepiece, ids) == "the book 中"
    assert "▁book" in sentencepiece.convert_ids_to_tokens(ids)
    assert decode(sentencepiece, ids[1:2]) == "book"  # its space is lost: that is the difficulty
    assert "<0xE4>" in sentencepiece.convert_ids_to_tokens(ids)


words = st.lists(st.sampled_from(["the", "book", "lamp", "中", "é🙂", "x", ""]), min_size=1, max_size=6).map(" ".join)


@given(prompt=words, text=words)
def test_a_continuation_keeps_its_first_space(
    stage: ModuleType, prompt: str, text: str, sentencepiece: PreTrainedTokenizerFast
) -> None:
    whole = sentencepiece.encode(f"{prompt} {text}")
    start = sentencepiece.encode(prompt)
    if not prompt.strip() or whole[: len(start)] != start:
        return
    pieces = list(pieces_of(stage, sentencepiece, start, whole[len(start) :]))
    assert decode(sentencepiece, start) + "".join(pieces) == decode(sentencepiece, whole)


def test_a_continuation_after_a_long_prompt(stage: ModuleType, sentencepiece: PreTrainedTokenizerFast) -> None:
    for prompt in ("the book", "the lamp " * 50 + "was", "the 中"):
        start, whole = sentencepiece.encode(prompt), sentencepiece.encode(prompt + " was good")
        assert whole[: len(start)] == start
        assert "".join(pieces_of(stage, sentencepiece, start, whole[len(start) :])) == " was good"


def test_the_engine_continues_a_prompt_with_a_space(
    stage: ModuleType, checkpoint_path: CheckpointPath, sentencepiece: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sentencepiece.save_pretrained(tmp_path)
    book = sentencepiece.convert_tokens_to_ids("▁book")
    with open_llm(stage, checkpoint_path("qwen3"), tokenizer=str(tmp_path), max_model_len=64) as llm:
        params = stage.SamplingParams(temperature=0.0, max_tokens=3, logit_bias={book: 100})
        deltas = [output.delta for output in llm.stream("the lamp", params)]
        assert deltas == [" book"] * 3
        assert llm.generate("the lamp", params, use_tqdm=False)[0].text == " book book book"
        stopped = stage.SamplingParams(temperature=0.0, max_tokens=3, logit_bias={book: 100}, stop=" ")
        assert llm.generate("the lamp", stopped, use_tqdm=False)[0].text == ""


@given(output=st.lists(st.integers(0, 258), max_size=25))
def test_random_bytes_of_sentencepiece(
    stage: ModuleType, output: list[int], sentencepiece: PreTrainedTokenizerFast
) -> None:
    """Its decoder takes back what it has said when later bytes break it: no piece may raise, and none comes twice."""
    start = sentencepiece.encode("the book")
    text = "".join(pieces_of(stage, sentencepiece, start, output))
    said = (chr(token - 3) for token in output if 3 <= token < 3 + 128)
    assert all(character in said for character in text if ord(character) < 128)  # in this order


def test_special_tokens_in_a_prompt_do_no_harm(stage: ModuleType) -> None:
    tokenizer = make_tokenizer()
    prompt = [IM_END, *tokenizer.encode("a"), IM_END, EOS]
    assert "".join(pieces_of(stage, tokenizer, prompt, tokenizer.encode(" b c"))) == " b c"
