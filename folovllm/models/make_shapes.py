"""Writes `shapes/`: the shapes of well-known models, without their weights, for `load_format="dummy"`.

Speed and memory depend on a model's shape and not on what it has learned, so random weights of the right shape are
enough to measure them, and need no download. Each folder holds the config.json with the public figures of the model,
spelled as on the hub, and a byte tokenizer: token id = byte value, then three special tokens. It reads and writes any
text (for Qwen2.5 transformers insists on its own class, which composes accents first, as the real one does), and
`eos_token_id` is its `<|im_end|>`.

    python folovllm/models/make_shapes.py        # rewrites folovllm/models/shapes/
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SHAPES_FOLDER = Path(__file__).resolve().parent / "shapes"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "torch_dtype": "bfloat16",
}

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
}

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-4B": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    # Biases on q, k and v belong to this architecture: its config has no field for them.
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Llama-3.2-1B": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
}


def byte_tokenizer() -> Tokenizer:
    """A BPE without merges over the 256 bytes, so id = byte value, and the special tokens."""
    # Byte-level tokenizers write a byte as a visible character: itself where it is one, else the next from U+0100 on.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in visible else next(stand_ins)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(max_position_embeddings: int) -> dict[str, Any]:
    """What transformers wants to know besides tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_position_embeddings,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_shape(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json, tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(_COMMON | config, indent=2),
        "tokenizer.json": byte_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config(config["max_position_embeddings"]), indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Rewrites every folder of `shapes/`."""
    for name, config in SHAPES.items():
        write_shape(SHAPES_FOLDER / name, config)


if __name__ == "__main__":
    main()
