"""How many prompt tokens a step may take if it is to last no longer than was asked for.

A step's time grows with its tokens, but how steeply depends on the device, the model and the context, and changes as
texts grow. So nothing is assumed: whoever has measured a step says how long it took, and the next one gets more or
less.
"""

from __future__ import annotations

# A step's share of prompt tokens never falls below this, however slow its decodes are: prompts must get on, too.
MIN_PREFILL_TOKENS = 32
# A step may ask for so many times as much at most, or for that part of it at least. One step says little, so the share
# goes only this part of the way up; down it goes at once, as somebody waited for too long.
_MAX_FACTOR = 2.0
_SMOOTHING = 0.5


class ChunkController:
    """Steers the prompt tokens of a step towards a step time.

    If a step with n prompt tokens takes a + b n seconds, the n to aim at is n * (target - a) / (time - a); a is what
    steps of decodes alone take.

    Args:
        target: seconds.
        max_tokens: most prompt tokens in a step.
    """

    def __init__(self, target: float, max_tokens: int) -> None:
        self.target = target
        self.max_tokens = max_tokens
        self._share = float(min(max_tokens, 16 * MIN_PREFILL_TOKENS))
        self._decode_seconds = 0.0

    @property
    def prefill_budget(self) -> int:
        """Prompt tokens for the next step."""
        return round(self._share)

    def update(self, num_prefill_tokens: int, seconds: float) -> None:
        """A step with so many prompt tokens took so long."""
        if num_prefill_tokens == 0:
            self._decode_seconds += _SMOOTHING * (seconds - self._decode_seconds)
            return
        if seconds <= self.target and num_prefill_tokens < 0.9 * self._share:
            return  # it says nothing of what a full one would take
        base = min(self._decode_seconds, 0.9 * self.target, 0.9 * seconds)  # or nothing could be steered
        factor = min(max((self.target - base) / (seconds - base), 1 / _MAX_FACTOR), _MAX_FACTOR)
        wanted = self._share * (factor if factor < 1 else 1 + _SMOOTHING * (factor - 1))
        self._share = min(max(wanted, MIN_PREFILL_TOKENS), self.max_tokens)
