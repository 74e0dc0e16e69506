"""What every part of the engine needs and none owns: logging, and the choice of device, dtype and length.

Nothing here knows about models or requests, so every other module may import it.
"""

from __future__ import annotations

import logging
import sys

import torch
from transformers import PretrainedConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def configure_logging(level: str) -> None:
    """Send the engine's log to stderr at `level` ("DEBUG", "INFO", "WARNING", "ERROR").

    Raises:
        ValueError: `level` is not the name of a logging level.
    """
    package = logging.getLogger(__name__.rsplit(".", 2)[0])
    try:
        package.setLevel(level.upper())
    except ValueError:
        raise ValueError(f"log_level must be DEBUG, INFO, WARNING or ERROR, got {level!r}") from None
    if not package.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        package.addHandler(handler)


def resolve_device(name: str) -> torch.device:
    """The device to run on; "auto" is CUDA where there is a GPU, else the CPU; anything else is the device's own name.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA GPUs; use device='cpu'"
        )
    return device


def resolve_dtype(name: str, hf_config: PretrainedConfig) -> torch.dtype:
    """The dtype to compute in; "auto" is the one that the checkpoint's config.json names (float32 where it names none).

    Raises:
        ValueError: not a floating-point type that the engine computes in.
    """
    if name == "auto":
        name = str(hf_config.dtype or torch.float32).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def resolve_max_model_len(asked: int | None, hf_config: PretrainedConfig) -> int:
    """Longest prompt plus output in tokens; None is all that the model was made for.

    Raises:
        ValueError: more was asked for than the model has positions.
    """
    limit = hf_config.max_position_embeddings
    if asked is not None and asked > limit:
        raise ValueError(f"max_model_len={asked} is more than the model's {limit} positions; lower it")
    return asked or limit
