"""Checks of what users pass: the names of options, and the ranges of numbers.

Every message names the option and says what it must be, so that nobody has to look it up.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other engines call the same thing.
_ALIASES = {
    "max_batch_size": "max_num_seqs",
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_kv_blocks",
    "max_new_tokens": "max_tokens",
    "eos_token_id": "stop_token_ids",
}


def check_option_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an option that `owner` does not have, and name the one that was probably meant.

    Raises:
        TypeError: as Python itself would raise for an unexpected keyword.
    """
    known = sorted(known)
    for name in given:
        if name in known:
            continue
        guess = _ALIASES.get(name)
        if guess not in known:
            guess = next(iter(difflib.get_close_matches(name, known, n=1)), None)
        hint = f"did you mean {guess}?" if guess else f"it has: {', '.join(known)}"
        raise TypeError(f"{owner} has no option {name!r}; {hint}")


def check_int(name: str, value: object, low: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_real(name: str, value: object, low: float, high: float, *, low_is_open: bool = False) -> None:
    """Raises ValueError unless `value` is a number in [low, high], or in (low, high]; NaN is not."""
    if not isinstance(value, (int, float)) or not low <= value <= high or (low_is_open and value == low):
        raise ValueError(f"{name} must be in {'(' if low_is_open else '['}{low}, {high}], got {value!r}")
