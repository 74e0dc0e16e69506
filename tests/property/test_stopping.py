"""Where a text ends, and what of it is shown on the way: every way of stopping, alone and against the others.

The model is made to say what a test wants (`says`), so that stop strings, special tokens and characters of several
bytes stand exactly where it hurts. What must come out is worked out again from whole texts, decoded anew for every
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ..checkpoints import EOS, IM_END, make_tokenizer
from ..conftest import MakeLLM
from ..sampling import says

pytestmark = pytest.mark.since("m1")

IM_START = 1
PROMPT = [10, 20, 30]
MAX_MODEL_LEN = 48
ROOM = MAX_MODEL_LEN - len(PROMPT)
FILLER = make_tokenizer().encode("z")[0]

# Few letters, so that stop strings are hit; characters of one to four bytes.
texts = st.text("ab é中🙂", min_size=1, max_size=6)
specials = st.sampled_from([EOS, IM_START, IM_END])


@st.composite
def scripts(draw: st.DrawFn) -> list[int]:
    """What the model says: texts, and special tokens between them; then z for ever."""
    parts = draw(st.lists(st.one_of(texts, texts, specials), min_size=1, max_size=6))
    return [token for part in [*parts, "z"] for token in ([part] if isinstance(part, int) else encode(part))]


@st.composite
def stop_strings(draw: st.DrawFn, script: list[int]) -> list[str]:
    """Mostly pieces of what will be said."""
    text = decode(script, draw(st.booleans()))
    if not text:
        return draw(st.lists(texts, max_size=2))
    pieces = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6)).map(lambda cut: text[cut[0] :][: cut[1]])
    return draw(st.lists(st.one_of(pieces, pieces, texts), max_size=3))


def encode(text: str) -> list[int]:
    return make_tokenizer().encode(text, add_special_tokens=False)


def decode(token_ids: list[int], skip_special_tokens: bool) -> str:
    """The text so far; a character whose last byte is still to come is no part of it."""
    return str(make_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)).rstrip("\ufffd")


@dataclass
class Ending:
    """What has to come out: the parts of a CompletionOutput, and the text as far as it was known after each token."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    known: list[str]


def expected_ending(script: list[int], params: Any, eos: Sequence[int] = (EOS,)) -> Ending:
    """By decoding everything anew after every token."""
    limit = min(params.max_tokens or ROOM, ROOM)
    said = [*script, *[script[-1]] * limit][:limit]
    known: list[str] = []
    for count, token in enumerate(said, start=1):
        before = known[-1] if known else ""
        reason: tuple[str, int | str | None] | None = None
        if token in eos and not params.ignore_eos:
            reason = "stop", None
        elif token in params.stop_token_ids:
            reason = "stop", token
        elif count == limit:
            reason = "length", None
        hidden = reason is not None and reason[0] == "stop" and not params.include_stop_str_in_output
        text = before if hidden else decode(said[:count], params.skip_special_tokens)
        known.append(text)
        if count > params.min_tokens and not hidden:
            hits = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in params.stop]
            ends = [(start + len(stop), number) for number, (start, stop) in enumerate(hits) if start >= 0]
            if ends:
                end, number = min(ends)
                text = text[: end if params.include_stop_str_in_output else hits[number][0]]
                return Ending(said[:count], text, "stop", hits[number][1], known)
        if reason is not None:
            return Ending(said[:count], text, *reason, known)
    raise AssertionError("unreachable")


def check(stage: ModuleType, llm: Any, script: list[int], **arguments: Any) -> Ending:
    """Run the script through `stream` and `generate` and hold both to `expected_ending`."""
    params = stage.SamplingParams(temperature=0.0, logits_processors=[says(script, len(PROMPT))], **arguments)
    expected = expected_ending(script, params)
    (whole,) = llm.generate([PROMPT], params, use_tqdm=False)
    stream = list(llm.stream([PROMPT], params))
    for output in (whole, stream[-1]):
        assert output.token_ids == expected.token_ids
        assert output.text == expected.text
        assert output.outputs[0].finish_reason == expected.finish_reason
        assert output.outputs[0].stop_reason == expected.stop_reason
        assert output.finished
    assert len(stream) == len(expected.token_ids)
    held = 0 if params.include_stop_str_in_output else max(map(len, params.stop), default=1) - 1
    shown = ""
    for output, known in zip(stream, expected.known, strict=True):
        shown += output.delta
        assert output.text == shown
        assert expected.text.startswith(shown), "something was shown that had to be taken back"
        if not output.finished:
            assert shown == known[: max(len(known) - held, 0)], "too much or too little was held back"
    assert shown == expected.text
    return expected


@given(
    script=scripts(),
    data=st.data(),
    max_tokens=st.none() | st.integers(1, 25),
    min_tokens=st.integers(0, 6),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_ending(
    script: list[int],
    data: st.DataObject,
    max_tokens: int | None,
    min_tokens: int,
    flags: tuple[bool, bool, bool],
    stage: ModuleType,
    make_llm: MakeLLM,
) -> None:
    ignore_eos, include, skip_special_tokens = flags
    stop_token_ids = data.draw(st.lists(st.sampled_from(script), max_size=1))
    ends = {*stop_token_ids, *([] if ignore_eos else [EOS])}
    first_end = next((index for index, token in enumerate(script) if token in ends), min_tokens)
    check(
        stage,
        make_llm(max_model_len=MAX_MODEL_LEN),
        script,
        stop=data.draw(stop_strings(script)),
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, first_end, max_tokens or min_tokens),  # what ends it is forbidden before that
        include_stop_str_in_output=include,
        skip_special_tokens=skip_special_tokens,
    )


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "found", "kept"),
    [
        ("hello there, world", ["there"], "there", "hello "),
        ("hello there, world", "lo th", "lo th", "hel"),  # over two tokens, and more
        ("one two three", ["three", "two"], "two", "one "),  # the earlier one
        ("abcdef", ["bcd", "cd"], "bcd", "a"),  # they end together: the first of the list
        ("abcdef", ["cd", "bcd"], "cd", "ab"),
        ("abcdef", ["abcdef", "c"], "c", "ab"),  # c is complete while the long one is not
        ("aaaa", ["aaa"], "aaa", ""),
        ("x中y", ["中"], "中", "x"),  # three bytes, three tokens
        ("x中国y", ["中国"], "中国", "x"),
        ("a🙂é!", ["🙂é"], "🙂é", "a"),
        ("line\n\nnext", ["\n\n"], "\n\n", "line"),
    ],
    ids=str,
)
def test_stop_strings(
    stage: ModuleType, make_llm: MakeLLM, text: str, stop: Any, found: str, kept: str, include: bool
) -> None:
    ending = check(
        stage, make_llm(max_model_len=MAX_MODEL_LEN), encode(text), stop=stop, include_stop_str_in_output=include
    )
    assert (ending.finish_reason, ending.stop_reason) == ("stop", found)
    assert ending.text == kept + (found if include else "")


def test_what_was_held_back_appears_at_the_end(stage: ModuleType, make_llm: MakeLLM) -> None:
    """However it ends: by length, by EOS, by a stop token, or because the stop string did not go on."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    stop = "bcdefgh"
    cases: list[tuple[list[int], dict[str, Any]]] = [
        ([*encode("abcd"), EOS], {}),
        ([*encode("abcd"), IM_END], {"stop_token_ids": [IM_END]}),
        (encode("abcd"), {"max_tokens": len(encode("abcd"))}),
    ]
    for script, arguments in cases:
        assert check(stage, llm, script, stop=stop, **arguments).text == "abcd"
    assert check(stage, llm, [*encode("abcdxbc"), EOS], stop=stop).text == "abcdxbc"


def test_a_stop_string_on_the_last_allowed_token(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, script = make_llm(max_model_len=MAX_MODEL_LEN), encode("x中 y")
    exact = check(stage, llm, script, stop="中", max_tokens=4)
    assert (exact.finish_reason, exact.stop_reason, exact.text) == ("stop", "中", "x")
    short = check(stage, llm, script, stop="中", max_tokens=3)
    assert (short.finish_reason, short.stop_reason, short.text) == ("length", None, "x")


def test_a_stop_string_at_max_model_len(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    for length, reason in ((ROOM, "stop"), (ROOM + 1, "length")):
        script = [FILLER] * (length - 1) + encode("Q")
        ending = check(stage, llm, script, stop="Q", max_tokens=None)
        assert (ending.finish_reason, len(ending.token_ids)) == (reason, ROOM)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("end", "stop_reason"), [(EOS, None), (IM_END, IM_END)])
def test_a_token_that_ends_it_is_in_the_ids_and_in_the_text_on_request(
    stage: ModuleType, make_llm: MakeLLM, end: int, stop_reason: int | None, skip: bool, include: bool
) -> None:
    ending = check(
        stage,
        make_llm(max_model_len=MAX_MODEL_LEN),
        [*encode("hello"), end, *encode("never said")],
        stop_token_ids=[IM_END],
        skip_special_tokens=skip,
        include_stop_str_in_output=include,
    )
    assert (ending.token_ids[-1], ending.finish_reason, ending.stop_reason) == (end, "stop", stop_reason)
    name = {EOS: "<|endoftext|>", IM_END: "<|im_end|>"}[end]
    assert ending.text == "hello" + (name if include and not skip else "")


def test_an_eos_that_is_a_stop_token_too_is_an_eos(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, script = make_llm(max_model_len=MAX_MODEL_LEN), [*encode("a"), EOS]
    assert check(stage, llm, script, stop_token_ids=[EOS]).stop_reason is None
    assert check(stage, llm, script, stop_token_ids=[EOS], ignore_eos=True).stop_reason == EOS
    assert check(stage, llm, script, stop_token_ids=[EOS], max_tokens=2).finish_reason == "stop"


def test_an_ordinary_stop_token_is_text_only_on_request(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, script = make_llm(max_model_len=MAX_MODEL_LEN), [*encode("a"), FILLER]
    for include, text in ((False, "a"), (True, "az")):
        params = {"stop_token_ids": [FILLER], "include_stop_str_in_output": include}
        assert check(stage, llm, script, **params).text == text


@pytest.mark.parametrize("skip", [False, True])
def test_special_tokens_in_the_middle(stage: ModuleType, make_llm: MakeLLM, skip: bool) -> None:
    """A stop string can be part of a special token's name, but only where the name is shown."""
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    script = [*encode("a"), IM_START, *encode("b"), EOS]
    plain = check(stage, llm, script, skip_special_tokens=skip)
    assert plain.text == ("ab" if skip else "a<|im_start|>b")
    stopped = check(stage, llm, script, skip_special_tokens=skip, stop="start")
    assert stopped.text == ("ab" if skip else "a<|im_")


@given(min_tokens=st.integers(0, 9))
@example(min_tokens=0)
def test_no_stop_string_is_looked_for_before_min_tokens(min_tokens: int, stage: ModuleType, make_llm: MakeLLM) -> None:
    """Each token is an x; a stop of two of them is found at the first token after min_tokens, not before it."""
    (x,) = encode("x")
    ending = check(stage, make_llm(max_model_len=MAX_MODEL_LEN), [x], stop="xx", min_tokens=min_tokens)
    assert len(ending.token_ids) == max(min_tokens + 1, 2)
    assert ending.text == "x" * (len(ending.token_ids) - 2)


def test_min_tokens_holds_off_eos_and_stop_tokens(stage: ModuleType, make_llm: MakeLLM) -> None:
    """The model of this checkpoint says EOS once in eight tokens."""
    llm = make_llm("qwen2", max_model_len=MAX_MODEL_LEN)
    eos = set(range(0, 512, 8))
    lengths = {}
    for min_tokens in (0, 5, 20):
        params = stage.SamplingParams(temperature=1.0, seed=5, max_tokens=40, min_tokens=min_tokens, stop_token_ids=[1])
        outputs = llm.generate([[start] for start in range(1, 200, 9)], params, use_tqdm=False)
        for output in outputs:
            assert not eos & set(output.token_ids[:min_tokens])
            assert len(output.token_ids) > min_tokens
        lengths[min_tokens] = min(len(output.token_ids) for output in outputs)
    assert lengths[0] == 1


def test_length_caps_win_over_min_tokens(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    params = stage.SamplingParams(temperature=0.0, max_tokens=None, min_tokens=500)
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    assert (len(output.token_ids), output.outputs[0].finish_reason) == (ROOM, "length")


@pytest.mark.parametrize("kind", ["eos", "stop token", "stop string"])
def test_each_sequence_of_a_request_stops_on_its_own(stage: ModuleType, make_llm: MakeLLM, kind: str) -> None:
    llm = make_llm(max_model_len=MAX_MODEL_LEN)
    (z,) = encode("z")
    bias = {EOS if kind == "eos" else z: 6.0}
    stops: dict[str, dict[str, Any]] = {"eos": {}, "stop token": {"stop_token_ids": [z]}, "stop string": {"stop": "z"}}
    params = stage.SamplingParams(n=5, seed=3, max_tokens=12, temperature=1.0, logit_bias=bias, **stops[kind])
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    assert len({len(completion.token_ids) for completion in output.outputs}) > 1
    for completion in output.outputs:
        says_z = "z" in decode(completion.token_ids, False)
        ended = says_z if kind == "stop string" else completion.token_ids[-1] == (EOS if kind == "eos" else z)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert kind != "stop string" or "z" not in completion.text
