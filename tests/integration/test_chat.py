"""Conversations: the tokenizer's chat template, rendered once and tokenised without adding to it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tests.checkpoints import CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, make_tokenizer
from tests.conftest import CheckpointPath, MakeLLM
from tests.integration.conftest import HELLO, TEXT, NewLLM, run

pytestmark = pytest.mark.since("m0")

LONGER = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "assistant", "content": "The keeper."},
    {"role": "user", "content": "Why?"},
]


def test_chat_renders_the_template(llm: Any, greedy: Any) -> None:
    text = "<|im_start|>user\nWho wrote the book?<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.preprocess_chat(HELLO)
    assert llm.tokenizer.decode(ids) == text
    assert ids[0] == SPECIAL_TOKENS.index("<|im_start|>")  # one token, not its letters
    (output,) = llm.chat(HELLO, greedy, use_tqdm=False)
    assert output.prompt_token_ids == ids
    assert [output.token_ids] == run(llm, ids, greedy)


def test_chat_takes_a_list_of_conversations(stage: ModuleType, make_llm: MakeLLM, greedy: Any) -> None:
    llm = make_llm("qwen3", max_model_len=256)
    params = [greedy, stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)]
    both = llm.chat([LONGER, HELLO], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in both] == [llm.preprocess_chat(LONGER), llm.preprocess_chat(HELLO)]
    assert [len(output.token_ids) for output in both] == [6, 2]
    assert both[0].token_ids == llm.chat(LONGER, greedy, use_tqdm=False)[0].token_ids


def save_tokenizer(folder: Path, chat_template: str | None, bos: str | None = None) -> str:
    """The shared tokenizer with another template, and with a BOS that it writes before every text if `bos` is given."""
    make_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if chat_template is not None:
        config["chat_template"] = chat_template
    if bos is not None:
        config["bos_token"] = bos
        backend = make_tokenizer().backend_tokenizer
        backend = type(backend).from_str(backend.to_str())
        special = [(bos, SPECIAL_TOKENS.index(bos))]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
        backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_chat_writes_no_second_bos(
    new_llm: NewLLM, checkpoint_path: CheckpointPath, tmp_path: Path, greedy: Any
) -> None:
    """Llama's template writes the BOS, and so does its tokenizer."""
    tokenizer = save_tokenizer(tmp_path, "{{ bos_token }}" + CHAT_TEMPLATE, bos="<|endoftext|>")
    llm = new_llm(checkpoint_path("llama3"), tokenizer=tokenizer)
    assert llm.tokenizer.encode("Hello")[0] == EOS  # this tokenizer does write one
    (output,) = llm.chat(HELLO, greedy, use_tqdm=False)
    assert output.prompt_token_ids[0] == EOS
    assert output.prompt_token_ids.count(EOS) == 1
    assert llm.generate("Hello", greedy, use_tqdm=False)[0].prompt_token_ids.count(EOS) == 1


def test_chat_without_a_template(new_llm: NewLLM, checkpoint_path: CheckpointPath, tmp_path: Path) -> None:
    llm = new_llm(checkpoint_path("qwen3"), tokenizer=save_tokenizer(tmp_path, None))
    with pytest.raises(ValueError, match="chat template") as error:
        llm.chat(HELLO, use_tqdm=False)
    assert "\n" not in str(error.value)
    assert run(llm, TEXT)  # everything else works


def test_a_template_that_refuses(new_llm: NewLLM, checkpoint_path: CheckpointPath, tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    llm = new_llm(checkpoint_path("qwen3"), tokenizer=save_tokenizer(tmp_path, template))
    with pytest.raises(ValueError, match="roles must alternate"):
        llm.chat(HELLO, use_tqdm=False)


def test_of_several_chats_one_that_cannot_be_served(stage: ModuleType, make_llm: MakeLLM) -> None:
    """The others are not left behind: item 70, test_chat_batch_failure_cleanup."""
    llm = make_llm("qwen3", max_model_len=128)
    params = stage.SamplingParams(max_tokens=2, ignore_eos=True)
    short, long = ([{"role": "user", "content": text}] for text in ("Hi", "word " * 200))
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens"):
        llm.chat([short, long], params, use_tqdm=False)
    if hasattr(llm, "engine"):
        assert not llm.engine.has_unfinished_requests()
    assert [len(output.token_ids) for output in llm.chat([short, short], params, use_tqdm=False)] == [2, 2]
