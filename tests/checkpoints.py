"""Small checkpoints with random weights, on disk as the hub would have them.

Default initialisation makes models that repeat one token whatever stands before it, and a wrong cache would go
unnoticed. These are drawn wide enough that the context decides the next token; a test holds them to it. Between them
they cover what checkpoints differ in: tied embeddings, grouped heads, given and derived head_dim, biases, rope types,
shards, one end-of-sequence token or many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 512
MAX_POSITIONS = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
EOS = 0
IM_END = 2

# At 0.12 greedy outputs still get stuck on one token; the float32 error of the logits (1e-5 here) grows with it.
WEIGHT_STD = 0.2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the tokenizer learns its merges from; ASCII only, so that every byte of another character is its own token.
_TEXT = """
The lighthouse keeper counted seven ships before the morning fog had lifted from the harbour. Each carried something
different: barrels of salt, copper wire, oranges, mirrors, two dozen clocks that disagreed about the hour, and one very
patient donkey. When the last rope was tied he wrote everything into the book, closed the window against the wind, and
asked his daughter whether she would rather repair the lamp or peel potatoes. She chose the lamp, because nobody can
read by the light of a potato. Numbers such as 1, 23, 456 and 7890 were kept on another page (with their sums).
"""


@dataclass(frozen=True)
class Spec:
    """One checkpoint.

    Attributes:
        model_type: transformers' name of the architecture.
        options: of its config, over those that all share.
        max_shard_size: bytes a safetensors file; None: one file.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    max_shard_size: int | None = None


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SPECS = {
    "qwen3": Spec("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_tied": Spec(
        "qwen3",
        {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    # One token in eight ends a text.
    "qwen2": Spec("qwen2", {"num_key_value_heads": 4, "eos_token_id": list(range(0, VOCAB_SIZE, 8))}),
    "qwen2_tied": Spec("qwen2", {"tie_word_embeddings": True, "eos_token_id": [IM_END, EOS]}, max_shard_size=60_000),
    "llama3": Spec(
        "llama",
        {"num_key_value_heads": 1, "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5},
        max_shard_size=60_000,
    ),
    "llama_bias": Spec("llama", {"num_key_value_heads": 4, "head_dim": 24, "attention_bias": True, "mlp_bias": True}),
}


# What the "scripted" checkpoint says after each start: characters of one to four bytes, a broken one, and then EOS.
SCRIPTS = {b">": "é中🙂!".encode(), b"<": b"\xd0z"}


def save_checkpoint(name: str, folder: Path) -> Path:
    """Make the checkpoint SPECS[name], or "scripted", in `folder`; the same one every time."""
    if name == "scripted":
        model, sharding = make_scripted_model(), {}
    else:
        spec = SPECS[name]
        model = make_random_model(spec, seed=list(SPECS).index(name))
        sharding = {"max_shard_size": spec.max_shard_size} if spec.max_shard_size else {}
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, **sharding)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_random_model(spec: Spec, seed: int) -> Any:
    """A transformers model of `spec` in float32, its weights drawn from `seed`."""
    model = make_model(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0.0, WEIGHT_STD, generator=generator)
            elif name.endswith("norm.weight"):
                param.uniform_(0.5, 1.5, generator=generator)
            else:
                param.normal_(0.0, 0.3, generator=generator)
    return model


def make_scripted_model() -> Any:
    """A model that looks at the last token only and then says what SCRIPTS has next, or EOS, almost surely."""
    model = make_model(Spec("qwen3", {"hidden_size": VOCAB_SIZE, "num_hidden_layers": 1}))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0) if param.dim() == 1 else param.zero_()  # attention and MLP add nothing
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        following = dict.fromkeys(range(VOCAB_SIZE), EOS)
        for start, script in SCRIPTS.items():
            following.update(pairwise(map(byte_token_id, start + script)))
        for token, next_token in following.items():
            model.lm_head.weight[next_token, token] = 1.0  # its logit is sqrt(VOCAB_SIZE), all others are 0
    return model


def make_model(spec: Spec) -> Any:
    """A small transformers model of `spec` in float32 that waits for its weights."""
    shared = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.model_type, **{**shared, **spec.options})).eval()


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 ids that splits every character outside ASCII into its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the text is too short for {VOCAB_SIZE} ids: {tokenizer.get_vocab_size()}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[EOS], chat_template=CHAT_TEMPLATE
    )


def byte_token_id(byte: int) -> int:
    """The id of a single byte. Byte-level BPE writes bytes that do not print as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [other for other in range(256) if other not in printable]
    character = chr(byte) if byte in printable else chr(0x100 + hidden.index(byte))
    return make_tokenizer().get_vocab()[character]
