"""Token ids to text, one token at a time.

Decoding the whole output again after every token would be right and quadratic. A stream remembers just enough context
to say what one more token adds, at about a microsecond a token.
"""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

# Some decoders strip or add a space depending on what stands before; this much of the prompt settles it.
_CONTEXT_TOKENS = 8
# A character has at most four bytes, so more tokens than this without any text are bytes that make no character.
_MAX_HELD_TOKENS = 8


class IncrementalDetokenizer:
    """The text of one sequence, growing.

    A character's bytes may come in several tokens; nothing of it is shown until the last has come. The pieces that
    `step` returns concatenate to the whole text.

    Args:
        tokenizer: a fast one (backed by the tokenizers library).
        prompt_token_ids: what the output continues; none of it is returned.
        skip_special_tokens: leave out tokens such as <|im_end|>.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: list[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._start_stream()
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.step(token_id)
        if self._held:  # the prompt ends inside a character: no text to continue from
            self._start_stream()

    def step(self, token_id: int) -> str:
        """The text that this token completes; often a word, sometimes nothing."""
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:  # the decoder rewrote text that it had already given out, as byte-fallback tokenizers may
            self._start_stream()
            piece = self._stream.step(self._tokenizer, token_id)
        if piece is not None:
            self._held.clear()
            return piece
        self._held.append(token_id)
        if len(self._held) <= _MAX_HELD_TOKENS:
            return ""
        text = self._tokenizer.decode(self._held, skip_special_tokens=self._skip_special_tokens)
        self._start_stream()
        return text

    def _start_stream(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
        self._held: list[int] = []  # tokens since the last piece
