"""`LLM` as its users meet it: what may go in, what comes out, what is refused, and what is left after `close`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.checkpoints import MAX_POSITIONS, VOCAB_SIZE
from tests.conftest import CheckpointPath, MakeLLM
from tests.inside import model_of
from tests.integration.conftest import HELLO, OTHER, TEXT, NewLLM, decode, run, token_ids

pytestmark = pytest.mark.since("m0")

# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "knows_text"),
    [
        (lambda text, ids: text, True),
        (lambda text, ids: ids, False),
        (lambda text, ids: tuple(ids), False),
        (lambda text, ids: {"prompt": text}, True),
        (lambda text, ids: {"prompt_token_ids": ids}, False),
        (lambda text, ids: [text], True),
        (lambda text, ids: (text,), True),
        (lambda text, ids: [ids], False),
        (lambda text, ids: [{"prompt": text}], True),
        (lambda text, ids: [{"prompt_token_ids": ids}], False),
    ],
    ids=["text", "ids", "tuple of ids", "dict", "dict of ids", "[text]", "(text,)", "[ids]", "[dict]", "[dict of ids]"],
)
def test_a_prompt_may_come_in_any_form(
    llm: Any, greedy: Any, form: Callable[[str, list[int]], Any], knows_text: bool
) -> None:
    ids = llm.tokenizer.encode(TEXT)
    (output,) = llm.generate(form(TEXT, ids), greedy, use_tqdm=False)
    assert output.prompt_token_ids == ids
    assert output.prompt == (TEXT if knows_text else None)
    assert [output.token_ids] == run(llm, TEXT, greedy)


def test_forms_may_be_mixed(llm: Any, greedy: Any) -> None:
    ids = llm.tokenizer.encode(TEXT)
    tokens = run(llm, [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}], greedy)
    assert tokens == run(llm, TEXT, greedy) * 4


def test_the_callers_list_is_not_changed(llm: Any, greedy: Any) -> None:
    """Neither by the engine nor through what it hands back."""
    ids = llm.tokenizer.encode(TEXT)
    kept = list(ids)
    for prompt in (ids, [ids], {"prompt_token_ids": ids}):
        (output,) = llm.generate(prompt, greedy, use_tqdm=False)
        output.prompt_token_ids.append(1)
        output.token_ids.append(1)
        assert ids == kept


def test_results_come_in_prompt_order(stage: ModuleType, llm: Any) -> None:
    """However long each takes, and when two are equal."""
    prompts = [OTHER, TEXT, [5, 6], TEXT, OTHER]
    lengths = [9, 1, 5, 3, 2]
    params = [stage.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == [OTHER, TEXT, None, TEXT, OTHER]
    assert [len(output.token_ids) for output in outputs] == lengths
    alone = [run(llm, prompt, param)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert token_ids(outputs) == alone
    assert len({output.request_id for output in outputs}) == len(prompts)


def test_no_prompts_give_no_results(llm: Any, greedy: Any) -> None:
    assert llm.generate([], greedy, use_tqdm=False) == []
    assert list(llm.stream([], greedy)) == []


@pytest.mark.parametrize("prompt", ["", [], [[]], {"prompt": ""}, {"prompt_token_ids": []}, [TEXT, ""]], ids=repr)
def test_empty_prompt(llm: Any, greedy: Any, prompt: Any) -> None:
    if prompt == []:
        prompt = [prompt]
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate(prompt, greedy, use_tqdm=False)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 10**12])
def test_token_id_out_of_the_vocabulary(llm: Any, greedy: Any, token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} in the prompt is not in the vocabulary .*{VOCAB_SIZE - 1}"):
        llm.generate([1, token, 2], greedy, use_tqdm=False)


def test_the_last_token_id_is_in_the_vocabulary(llm: Any, greedy: Any) -> None:
    assert len(run(llm, [0, VOCAB_SIZE - 1], greedy)[0]) == 6


def test_stop_token_id_out_of_the_vocabulary(stage: ModuleType, llm: Any) -> None:
    with pytest.raises(ValueError, match=f"token id {VOCAB_SIZE} in stop_token_ids is not in the vocabulary"):
        llm.generate(TEXT, stage.SamplingParams(stop_token_ids=[1, VOCAB_SIZE]), use_tqdm=False)


@pytest.mark.parametrize(
    "prompt",
    [3, None, 1.5, [1.5], [None], [[1, "a"]], {"text": "a"}, {"prompt": 5}, {"prompt": "a", "suffix": "b"}, {}],
    ids=repr,
)
def test_what_is_no_prompt(llm: Any, greedy: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        llm.generate(prompt, greedy, use_tqdm=False)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_room_for_one_token(stage: ModuleType, llm: Any) -> None:
    params = stage.SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate([1] * 63, params, use_tqdm=False)
    assert len(output.token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_that_leaves_no_room(llm: Any, greedy: Any, length: int) -> None:
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens and max_model_len is 64"):
        llm.generate([1] * length, greedy, use_tqdm=False)


def test_max_tokens_none_fills_the_context(stage: ModuleType, llm: Any) -> None:
    params = stage.SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([1] * 50, params, use_tqdm=False)
    assert len(output.token_ids) == 14
    assert output.outputs[0].finish_reason == "length"


def test_max_model_len_beyond_the_model(new_llm: NewLLM, checkpoint_path: CheckpointPath) -> None:
    folder = checkpoint_path("qwen3")
    assert new_llm(folder).config.max_model_len == MAX_POSITIONS
    assert new_llm(folder, max_model_len=MAX_POSITIONS).config.max_model_len == MAX_POSITIONS
    with pytest.raises(ValueError, match=f"max_model_len={MAX_POSITIONS + 1} .*{MAX_POSITIONS}"):
        new_llm(folder, max_model_len=MAX_POSITIONS + 1)


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_params_as_prompts(stage: ModuleType, llm: Any, count: int) -> None:
    with pytest.raises(ValueError, match=f"2 prompts but {count} sampling_params"):
        llm.generate([TEXT, OTHER], [stage.SamplingParams()] * count, use_tqdm=False)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, [{"temperature": 0.0}], 0.7, "greedy"], ids=repr)
def test_what_is_no_sampling_params(llm: Any, params: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate(TEXT, params, use_tqdm=False)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("bad", ["", [VOCAB_SIZE], [1] * 64, None], ids=["empty", "vocabulary", "length", "type"])
def test_all_prompts_are_validated_before_any_runs(llm: Any, greedy: Any, bad: Any, call: str) -> None:
    """Not one forward pass happens, and the next call is not burdened with what was refused."""
    expected = run(llm, OTHER, greedy)
    passes: list[object] = []
    hook = model_of(llm).register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        with pytest.raises(ValueError, match=r"prompt|token"):
            list(getattr(llm, call)([TEXT, OTHER, bad], greedy))
        assert passes == []
        assert run(llm, OTHER, greedy) == expected
        assert passes  # the hook was watching
    finally:
        hook.remove()


# ---- streaming -------------------------------------------------------------------------------------------------------


def test_stream_tells_the_same_as_generate(stage: ModuleType, llm: Any) -> None:
    params = stage.SamplingParams(temperature=0.9, seed=4, max_tokens=20, ignore_eos=True)
    prompts = [TEXT, OTHER, "你好"]
    expected = llm.generate(prompts, params, use_tqdm=False)
    pieces: dict[str, list[Any]] = {}
    for output in llm.stream(prompts, params):
        pieces.setdefault(output.request_id, []).append(output)
    assert len(pieces) == 3
    for outputs, whole in zip(pieces.values(), expected, strict=True):
        assert "".join(output.delta for output in outputs) == whole.text == outputs[-1].text
        assert outputs[-1].token_ids == whole.token_ids
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length"
        assert outputs[0].outputs[0].finish_reason is None


def test_a_stream_that_is_left_early_leaves_the_engine_usable(llm: Any, greedy: Any) -> None:
    expected = run(llm, [TEXT, OTHER], greedy)
    stream = llm.stream([TEXT, OTHER], greedy)
    next(stream)
    stream.close()
    assert run(llm, [TEXT, OTHER], greedy) == expected


def test_the_progress_bar_can_be_switched_off(llm: Any, greedy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT, OTHER], greedy, use_tqdm=False)
    assert capfd.readouterr().err == ""
    llm.generate([TEXT, OTHER], greedy)
    assert "12/12" in capfd.readouterr().err  # tokens


# ---- results ---------------------------------------------------------------------------------------------------------


def test_shorthands(llm: Any, greedy: Any) -> None:
    (output,) = llm.generate(TEXT, greedy, use_tqdm=False)
    (completion,) = output.outputs
    assert (output.text, output.token_ids) == (completion.text, completion.token_ids)
    assert completion.index == 0
    assert output.finished
    assert output.text == decode(llm, output.token_ids)


@pytest.mark.parametrize("name", ["text", "prompt", "token_ids", "outputs"])
def test_an_output_is_no_dict_and_says_so(llm: Any, greedy: Any, name: str) -> None:
    (output,) = llm.generate(TEXT, greedy, use_tqdm=False)
    with pytest.raises(TypeError, match=rf"output\.{name}, not output\['{name}'\]"):
        output[name]


def test_metrics(llm: Any, greedy: Any) -> None:
    outputs = llm.generate([TEXT, OTHER], greedy, use_tqdm=False)
    for output in outputs:
        metrics = output.metrics
        assert 0 < metrics.ttft < metrics.e2e_latency
        assert metrics.tpot == pytest.approx((metrics.e2e_latency - metrics.ttft) / (len(output.token_ids) - 1))
    assert outputs[0].metrics.arrival_time <= outputs[1].metrics.arrival_time


def test_metrics_of_a_single_token(stage: ModuleType, llm: Any) -> None:
    (output,) = llm.generate(TEXT, stage.SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.metrics.ttft == output.metrics.e2e_latency > 0
    assert output.metrics.tpot is None


def test_metrics_before_there_is_a_token(stage: ModuleType) -> None:
    metrics = stage.RequestMetrics(arrival_time=1.0)
    assert (metrics.ttft, metrics.tpot, metrics.e2e_latency) == (None, None, None)


# ---- close -----------------------------------------------------------------------------------------------------------


def test_close_gives_the_memory_back(new_llm: NewLLM, checkpoint_path: CheckpointPath, greedy: Any) -> None:
    llm = new_llm(checkpoint_path("qwen3"))
    run(llm, [TEXT, OTHER], greedy)
    held = [weakref.ref(model_of(llm)), *(weakref.ref(param) for param in model_of(llm).parameters())]
    gc.disable()  # close itself has to see to it, not a collection that happens to come by
    try:
        llm.close()
        assert [ref() for ref in held if ref() is not None] == []
    finally:
        gc.enable()
    llm.close()  # once more does no harm


def test_a_closed_engine_says_so(new_llm: NewLLM, checkpoint_path: CheckpointPath, greedy: Any) -> None:
    llm = new_llm(checkpoint_path("qwen3"))
    llm.close()
    for call in (llm.generate, llm.chat):
        with pytest.raises(ValueError, match="closed"):
            call(TEXT if call == llm.generate else HELLO, greedy, use_tqdm=False)
    with pytest.raises(ValueError, match="closed"):
        next(llm.stream(TEXT, greedy))


@pytest.mark.timeout(30)  # an engine that waits for a step that can no longer come would wait for ever
def test_closing_under_a_running_stream_says_so(new_llm: NewLLM, checkpoint_path: CheckpointPath, greedy: Any) -> None:
    llm = new_llm(checkpoint_path("qwen3"))
    stream = llm.stream(TEXT, greedy)
    next(stream)
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_context_manager(new_llm: NewLLM, checkpoint_path: CheckpointPath, greedy: Any) -> None:
    with new_llm(checkpoint_path("qwen3")) as llm:
        assert len(run(llm, TEXT, greedy)[0]) == 6
    with pytest.raises(ValueError, match="closed"):
        llm.generate(TEXT)
    with pytest.raises(KeyError, match="the caller's own"), new_llm(checkpoint_path("qwen3")) as llm:
        raise KeyError("the caller's own")
    with pytest.raises(ValueError, match="closed"):
        llm.generate(TEXT)


@pytest.mark.since("m1")
def test_the_progress_bar_ends_where_the_text_ends(
    stage: ModuleType, make_llm: MakeLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = make_llm("qwen3", max_model_len=64)
    params = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    tokens = llm.generate([5, 6], params, use_tqdm=False)[0].token_ids
    num = tokens.index(tokens[2]) + 1
    early = stage.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[tokens[2]])
    capfd.readouterr()
    llm.generate([5, 6], early)
    assert f"{num}/{num} " in capfd.readouterr().err
