"""The tokens themselves: every stage says what transformers would, and the same thing however it is asked."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from .. import strategies
from ..checkpoints import EOS, SCRIPTS, SPECS, VOCAB_SIZE, byte_token_id
from ..conftest import CheckpointPath, GetOracle, MakeLLM, open_llm, submodule
from ..oracle import LOGIT_TOLERANCE, Oracle, engine_logits

CHECKPOINTS = list(SPECS)
Requests = list[tuple[list[int], dict[str, Any]]]

every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
greedy_and_drawn = pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"]
)


def generate(stage: ModuleType, llm: Any, requests: Requests) -> list[Any]:
    """The completed output of each (prompt, arguments of SamplingParams)."""
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    return llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)


def tokens(stage: ModuleType, llm: Any, requests: Requests) -> list[list[int]]:
    return [output.token_ids for output in generate(stage, llm, requests)]


# ---------------------------------------------------------------------- the oracle


@every_checkpoint
def test_the_context_decides_the_token(checkpoint: str, get_oracle: GetOracle) -> None:
    """Else a broken cache would go unnoticed: without most of it, most predictions are others."""
    oracle = get_oracle(checkpoint)
    sequence = torch.randint(VOCAB_SIZE, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    full = oracle.logits(sequence).argmax(-1)
    for window in (1, 5):
        windows = [sequence[max(0, end - window) : end] for end in range(1, len(sequence) + 1)]
        short = torch.stack([oracle.logits(recent)[-1] for recent in windows]).argmax(-1)
        assert (full != short).float().mean() > 0.9
    assert len(full.unique()) > 50


@every_checkpoint
@pytest.mark.parametrize("length", [1, 2, 17, 300])  # 300 is more than a tile of queries
def test_logits_are_the_oracles(
    checkpoint: str, length: int, stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    prompt = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    token_ids, logits = engine_logits(stage, make_llm(checkpoint), prompt, max_tokens=4)
    assert len(token_ids) == length + 3
    torch.testing.assert_close(logits, get_oracle(checkpoint).logits(token_ids), atol=LOGIT_TOLERANCE, rtol=0)


def test_logits_of_the_embedded_model(stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle) -> None:
    llm = make_llm("tiny", max_model_len=512)
    prompt = llm.tokenizer.encode("One day, an old fisherman found a small blue box on the beach.")
    token_ids, logits = engine_logits(stage, llm, prompt, max_tokens=4)
    torch.testing.assert_close(logits, get_oracle("tiny").logits(token_ids), atol=LOGIT_TOLERANCE, rtol=0)


@every_checkpoint
@given(prompt=strategies.prompts(), arguments=strategies.greedy())
def test_greedy_tokens_are_the_oracles(
    checkpoint: str,
    prompt: list[int],
    arguments: dict[str, Any],
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    (output,) = generate(stage, make_llm(checkpoint), [(prompt, arguments)])
    get_oracle(checkpoint).check(prompt, output.token_ids, stage.SamplingParams(**arguments))


@every_checkpoint
@given(prompt=strategies.prompts(), arguments=strategies.sampled())
def test_seeded_tokens_are_the_oracles(
    checkpoint: str,
    prompt: list[int],
    arguments: dict[str, Any],
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    (output,) = generate(stage, make_llm(checkpoint), [(prompt, arguments)])
    get_oracle(checkpoint).check(prompt, output.token_ids, stage.SamplingParams(**arguments))


@pytest.mark.since("m1")
@every_checkpoint
@given(prompt=strategies.prompts(), arguments=strategies.full(), picks=st.lists(strategies.token_ids, max_size=100))
def test_tokens_under_any_parameters_are_the_oracles(
    checkpoint: str,
    prompt: list[int],
    arguments: dict[str, Any],
    picks: list[int],
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    """Many stop tokens, so that min_tokens has something to forbid."""
    params = {**arguments, "stop_token_ids": picks}
    (output,) = generate(stage, make_llm(checkpoint), [(prompt, params)])
    assert len(output.token_ids) >= arguments.get("min_tokens", 0)
    get_oracle(checkpoint).check(prompt, output.token_ids, stage.SamplingParams(**params))


@every_checkpoint
@greedy_and_drawn
def test_a_long_prompt(
    checkpoint: str, arguments: dict[str, Any], stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    """Outputs on both sides of 256 tokens."""
    prompt = torch.randint(VOCAB_SIZE, (253,), generator=torch.Generator().manual_seed(0)).tolist()
    params = {**arguments, "max_tokens": 8, "ignore_eos": True}
    (output,) = generate(stage, make_llm(checkpoint), [(prompt, params)])
    assert len(output.token_ids) == 8
    get_oracle(checkpoint).check(prompt, output.token_ids, stage.SamplingParams(**params))


@greedy_and_drawn
def test_the_embedded_model(
    arguments: dict[str, Any], stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle
) -> None:
    llm = make_llm("tiny", max_model_len=512)
    for text in ("Once upon a time", "Yesterday a"):
        prompt = llm.tokenizer.encode(text)
        params = {**arguments, "max_tokens": 12}
        (output,) = generate(stage, llm, [(prompt, params)])
        get_oracle("tiny").check(prompt, output.token_ids, stage.SamplingParams(**params))


# ---------------------------------------------------------------------- the oracle can say no


@greedy_and_drawn
@pytest.mark.parametrize("part", ["k", "v"])
@every_checkpoint
def test_a_wrong_cache_row_is_noticed(
    checkpoint: str,
    part: str,
    arguments: dict[str, Any],
    stage: ModuleType,
    make_llm: MakeLLM,
    checkpoint_path: CheckpointPath,
    get_oracle: GetOracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: position 2 holds the key, or the value, of position 1. A shared engine might keep what it cached."""
    attention = submodule(stage, "model_executor.layers.attention").Attention
    rotary_embedding = submodule(stage, "model_executor.layers.rotary_embedding").RotaryEmbedding
    forward, look_up = attention.forward, rotary_embedding.forward
    positions = torch.empty(0)

    def remember_positions(self: Any, new_positions: torch.Tensor) -> Any:
        nonlocal positions
        positions = new_positions
        return look_up(self, new_positions)

    def forward_with_a_wrong_row(self: Any, rotation: Any, q: Any, k: Any, v: Any, metadata: Any) -> Any:
        kv = {"k": k.clone(), "v": v.clone()}
        if (positions == 2).any():
            kv[part][positions == 2] = kv[part][positions == 1]
        return forward(self, rotation, q, kv["k"], kv["v"], metadata)

    params = {**arguments, "max_tokens": 16, "ignore_eos": True}
    requests: Requests = [(list(range(start, start + 60, 7)), params) for start in (3, 100, 200, 300)]
    oracle = get_oracle(checkpoint)
    check_all(stage, oracle, requests, tokens(stage, make_llm(checkpoint), requests))
    monkeypatch.setattr(attention, "forward", forward_with_a_wrong_row)
    monkeypatch.setattr(rotary_embedding, "forward", remember_positions)
    with open_llm(stage, checkpoint_path(checkpoint)) as mutant:
        wrong = tokens(stage, mutant, requests)
    with pytest.raises(AssertionError, match=r"below the best|the draw was"):
        check_all(stage, oracle, requests, wrong)


def check_all(stage: ModuleType, oracle: Oracle, requests: Requests, outputs: list[list[int]]) -> None:
    for (prompt, arguments), output in zip(requests, outputs, strict=True):
        oracle.check(prompt, output, stage.SamplingParams(**arguments))


@greedy_and_drawn
@given(prompt=strategies.prompts(max_size=8), index=st.integers(0, 5), distance=st.integers(100, VOCAB_SIZE - 100))
def test_one_wrong_token_is_noticed(
    arguments: dict[str, Any],
    prompt: list[int],
    index: int,
    distance: int,
    stage: ModuleType,
    make_llm: MakeLLM,
    get_oracle: GetOracle,
) -> None:
    params = {**arguments, "max_tokens": 6, "ignore_eos": True}
    (output,) = tokens(stage, make_llm(), [(prompt, params)])
    changed = list(output)
    changed[index] = (output[index] + distance) % VOCAB_SIZE
    with pytest.raises(AssertionError, match=f"token {index} of"):
        get_oracle("qwen3").check(prompt, changed, stage.SamplingParams(**params))


# ---------------------------------------------------------------------- the same thing however it is asked


@given(requests=strategies.requests(min_size=2), data=st.data())
def test_company_and_order_do_not_matter(
    requests: Requests, data: st.DataObject, stage: ModuleType, make_llm: MakeLLM
) -> None:
    llm = make_llm()
    together = tokens(stage, llm, requests)
    assert tokens(stage, llm, requests) == together, "repeating changed the tokens"
    assert [tokens(stage, llm, [request])[0] for request in requests] == together, "company changed the tokens"
    order = data.draw(st.permutations(range(len(requests))))
    shuffled = tokens(stage, llm, [requests[index] for index in order])
    assert shuffled == [together[index] for index in order], "order changed the tokens"


def test_different_seeds_differ(stage: ModuleType, make_llm: MakeLLM) -> None:
    params = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    outputs = tokens(stage, make_llm(), [([1, 2, 3], {**params, "seed": seed}) for seed in range(20)])
    assert len({tuple(output) for output in outputs}) == 20


def test_requests_without_a_seed_differ_from_each_other(stage: ModuleType, make_llm: MakeLLM) -> None:
    params = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    outputs = tokens(stage, make_llm(), [([1, 2, 3], params)] * 20)
    assert len({tuple(output) for output in outputs}) == 20


def test_the_engines_seed_serves_requests_without_one(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    def run(seed: int) -> list[list[int]]:
        params = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
        with open_llm(stage, checkpoint_path("qwen3"), seed=seed) as llm:
            return tokens(stage, llm, [([1, 2, 3], params)] * 2)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_temperature_spreads_the_tokens(stage: ModuleType, make_llm: MakeLLM) -> None:
    def distinct(temperature: float) -> int:
        params = {"temperature": temperature, "max_tokens": 1}
        outputs = tokens(stage, make_llm(), [([1, 2, 3], {**params, "seed": seed}) for seed in range(40)])
        return len({output[0] for output in outputs})

    assert distinct(0.05) <= 2 < 10 < distinct(2.0)


# ---------------------------------------------------------------------- where it stops


def expected_stop(
    endless: list[int], eos: set[int], arguments: dict[str, Any], room: int
) -> tuple[list[int], str, int | None]:
    """Tokens, finish_reason and stop_reason, given what a run without stops would say."""
    limit = min(arguments["max_tokens"] or room, room)
    for index, token in enumerate(endless[:limit]):
        if token in eos and not arguments["ignore_eos"]:
            return endless[: index + 1], "stop", None
        if token in arguments["stop_token_ids"]:
            return endless[: index + 1], "stop", token
    return endless[:limit], "length", None


@given(
    prompt=strategies.prompts(max_size=8),
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.none() | st.integers(1, 16),
    ignore_eos=st.booleans(),
    picks=st.lists(st.integers(0, 15), max_size=2),
)
def test_stop_conditions(
    prompt: list[int],
    temperature: float,
    max_tokens: int | None,
    ignore_eos: bool,
    picks: list[int],
    stage: ModuleType,
    make_llm: MakeLLM,
) -> None:
    """EOS, stop_token_ids, max_tokens and max_model_len, alone and against each other."""
    max_model_len = 16
    room = max_model_len - len(prompt)
    llm = make_llm("qwen2", max_model_len=max_model_len)  # one token in eight is an EOS
    params = {"temperature": temperature, "seed": 7}
    endless = tokens(stage, make_llm("qwen2"), [(prompt, {**params, "max_tokens": room, "ignore_eos": True})])[0]
    arguments = {
        **params,
        "max_tokens": max_tokens,
        "ignore_eos": ignore_eos,
        "stop_token_ids": [endless[pick % room] for pick in picks],
    }
    (output,) = generate(stage, llm, [(prompt, arguments)])
    completion = output.outputs[0]
    eos = set(SPECS["qwen2"].options["eos_token_id"])
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == expected_stop(
        endless, eos, arguments, room
    )
    ended_by_token = completion.finish_reason == "stop"
    shown = completion.token_ids[:-1] if ended_by_token else completion.token_ids
    assert readable(completion.text) == readable(llm.tokenizer.decode(shown, skip_special_tokens=True))


def readable(text: str) -> str:
    """Without replacement characters: how many of them broken bytes become is the decoder's business."""
    return text.replace("\ufffd", "")


def script_of(start: bytes) -> list[int]:
    """Token ids that the scripted checkpoint says after `start`, with the EOS that ends them."""
    return [*map(byte_token_id, SCRIPTS[start]), EOS]


def test_eos_on_the_last_allowed_token_is_a_stop(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, script = make_llm("scripted"), script_of(b">")
    prompt = [byte_token_id(ord(">"))]

    def run(**arguments: Any) -> Any:
        return generate(stage, llm, [(prompt, {"temperature": 0.0, **arguments})])[0].outputs[0]

    exact = run(max_tokens=len(script))
    assert (exact.token_ids, exact.finish_reason, exact.stop_reason) == (script, "stop", None)
    short = run(max_tokens=len(script) - 1)
    assert (short.token_ids, short.finish_reason) == (script[:-1], "length")
    assert exact.text == short.text == SCRIPTS[b">"].decode()
    further = run(max_tokens=len(script) + 3, ignore_eos=True)
    assert (further.token_ids[: len(script)], further.finish_reason) == (script, "length")
    assert len(further.token_ids) == len(script) + 3
    as_stop_token = run(max_tokens=20, ignore_eos=True, stop_token_ids=[EOS])
    assert (as_stop_token.token_ids, as_stop_token.stop_reason) == (script, EOS)


def test_the_longest_prompt_leaves_room_for_one_token(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=16)
    for max_tokens in (1, 5, None):
        (output,) = generate(stage, llm, [(list(range(15)), {"temperature": 0.0, "max_tokens": max_tokens})])
        assert len(output.token_ids) == 1
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="16 tokens and max_model_len is 16"):
        generate(stage, llm, [(list(range(16)), {})])


# ---------------------------------------------------------------------- streams


@given(requests=strategies.requests(max_size=3), checkpoint=st.sampled_from(CHECKPOINTS))
def test_a_stream_adds_up_to_generate(
    requests: Requests, checkpoint: str, stage: ModuleType, make_llm: MakeLLM
) -> None:
    """Random tokens are mostly broken UTF-8, the hardest thing there is to stream."""
    llm = make_llm(checkpoint)
    whole = generate(stage, llm, requests)
    params = [stage.SamplingParams(**arguments) for _, arguments in requests]
    pieces: dict[str, list[Any]] = {}
    for output in llm.stream([prompt for prompt, _ in requests], params):
        pieces.setdefault(output.request_id, []).append(output)
    assert len(pieces) == len(requests)
    for expected, stream in zip(whole, pieces.values(), strict=True):
        assert "".join(output.delta for output in stream) == expected.text == stream[-1].text
        assert stream[-1].token_ids == expected.token_ids
        assert stream[-1].outputs[0].finish_reason == expected.outputs[0].finish_reason
        assert [output.finished for output in stream] == [False] * (len(stream) - 1) + [True]
        for earlier, later in pairwise(stream):
            assert later.text == earlier.text + later.delta
            assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
            assert len(later.token_ids) > len(earlier.token_ids)


def test_characters_are_streamed_whole(stage: ModuleType, make_llm: MakeLLM) -> None:
    llm, params = make_llm("scripted"), stage.SamplingParams(temperature=0.0, max_tokens=20)
    deltas = [output.delta for output in llm.stream([byte_token_id(ord(">"))], params)]
    assert [delta for delta in deltas if delta] == ["é", "中", "🙂", "!"]
    assert len(deltas) == len(script_of(b">"))
    broken = [output.delta for output in llm.stream([byte_token_id(ord("<"))], params)]
    assert [delta for delta in broken if delta] == ["\ufffdz"]
    cut = stage.SamplingParams(temperature=0.0, max_tokens=3)  # in the middle of the second character
    assert "".join(output.delta for output in llm.stream([byte_token_id(ord(">"))], cut)) == "é"


@pytest.mark.parametrize("checkpoint", ["qwen3", "qwen2", "llama3", "tiny"])
def test_logits_in_bfloat16(
    checkpoint: str, stage: ModuleType, checkpoint_path: CheckpointPath, get_oracle: GetOracle
) -> None:
    """No further from float32 than twice as far as transformers is in bfloat16."""
    prompt = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    folder = checkpoint_path(checkpoint)
    with open_llm(stage, folder, dtype="bfloat16", max_model_len=128) as llm:
        token_ids, ours = engine_logits(stage, llm, prompt, max_tokens=20)
    exact = get_oracle(checkpoint).logits(token_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        theirs = model(torch.tensor([token_ids])).logits[0].float()
    ours_error, theirs_error = (float((x.float() - exact).norm() / exact.norm()) for x in (ours, theirs))
    assert 0 < ours_error < 2 * theirs_error < 0.2
