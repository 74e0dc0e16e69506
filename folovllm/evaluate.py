"""`folovllm eval`: the perplexity of a text, or of what the model itself says, computed by the newest stage.

What is measured is `evaluate.py::perplexity` of the stage; here is only what goes into it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import import_stage

SAMPLE_SEED = 1_000_000  # of a text to measure by; a calibration text begins with small seeds


def evaluate(
    model: str | Path,
    text: str | None = None,
    *,
    window: int | None = None,
    num_samples: int = 16,
    use_tqdm: bool = True,
    stage: str | None = None,
    **options: Any,
) -> tuple[float, int, int]:
    """Perplexity of a text.

    Args:
        model: folder or hub id.
        text: None: what the model itself says when it is let talk, the same for the same model and seed.
        window: tokens of context at most, the foreseen one included; None: 512, or the model's length if that is less.
        num_samples: windows that the model writes, where there is no text.
        use_tqdm: tell on stderr what is being done, with a bar for what takes long.
        stage: None: FOLOVLLM_STAGE, or the newest.
        **options: of the engine (`EngineConfig`).

    Returns:
        Perplexity, how many tokens were foreseen, and the window.

    Raises:
        ValueError: a text of less than two tokens, a window that does not fit the model, a stage that cannot do it.
    """
    perplexity = stage_module(stage, "evaluate").perplexity
    with import_stage(stage).LLM(model, **{"enforce_eager": True, **options}) as llm:
        window = check_window(llm, window)
        if text is None:
            tell(f"Letting the model write {num_samples} texts of {window} tokens", use_tqdm)
            token_ids = sample_token_ids(llm, num_samples, window, SAMPLE_SEED, use_tqdm).flatten()
        else:
            token_ids = encode(llm, text)
        tell(f"Measuring the perplexity of {len(token_ids):,} tokens", use_tqdm)
        return (*perplexity(llm.model, token_ids, window), window)


def stage_module(stage: str | None, name: str) -> Any:
    """The module `name` of a stage.

    Raises:
        ValueError: the stage has none.
    """
    package = import_stage(stage).__name__
    try:
        return import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
        raise ValueError(f"{package} has no {name}.py; name a stage that has it with --stage") from None


def tell(what: str, use_tqdm: bool) -> None:
    """A line on stderr on what takes its time now, where progress is wanted."""
    if use_tqdm:
        print(f"{what} ...", file=sys.stderr, flush=True)


def check_window(llm: Any, window: int | None) -> int:
    """The window in tokens, settled; raises ValueError if the model has no so many positions."""
    longest = llm.hf_config.max_position_embeddings
    if window is None:
        return min(512, longest)
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} must be from 2 to the model's {longest} positions")
    return window


def encode(llm: Any, text: str) -> torch.Tensor:
    """Token ids of a text, int64 [T], without special tokens."""
    return torch.tensor(llm.tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=torch.int64)


def sample_token_ids(llm: Any, num_samples: int, length: int, seed: int, use_tqdm: bool = False) -> torch.Tensor:
    """What the model says, from the token that begins a document, at temperature 1: int64 [num_samples, length]."""
    start = llm.hf_config.bos_token_id
    if start is None:
        ends = llm.hf_config.eos_token_id
        start = ends[0] if isinstance(ends, list) else ends or 0
    params_class = type(llm.get_default_sampling_params())
    params = params_class(n=num_samples, temperature=1.0, max_tokens=length - 1, ignore_eos=True, seed=seed)
    (output,) = llm.generate({"prompt_token_ids": [start]}, params, use_tqdm=use_tqdm)
    return torch.tensor([[start, *completion.token_ids] for completion in output.outputs])
